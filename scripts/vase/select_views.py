"""For each vase, the accepted view that is most like the positive prompts.

Rule `vase_select_views`: `best_views/` with relative links, `best_views_report.json` and
`filtering_stats.json` with the published fields, and a sheet of chosen against other views.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from scripts.common import artefacts, sheets, step, tables
from scripts.vase.links import link_images

SHEET_VASES = 10
SHEET_VIEWS = 8


def rank_views(accepted: pd.DataFrame) -> pd.DataFrame:
    """`accepted` sorted by vase and falling similarity, with `chosen` true for the first of each vase.

    Ties go to the first path, so that the choice does not depend on the order of files.
    """
    order = ["vase", "high_quality_similarity", "path"]
    ranked = accepted.sort_values(order, ascending=[True, False, True], ignore_index=True)
    return ranked.assign(chosen=~ranked.duplicated("vase"))


def view_number(view: str) -> int | str:
    """A view as the original writes it: a number where it is one."""
    return int(view) if view.isdecimal() else view


def best_views_report(ranked: pd.DataFrame, folders: tuple[Path, Path], seconds: float) -> dict:
    """The original's report, field by field; `ranked` as `rank_views` sorts it."""
    results = []
    rows = ranked[["vase", "view", "path", "high_quality_similarity"]].itertuples(index=False)
    for vase, own in itertools.groupby(rows, key=lambda row: row.vase):
        views = list(own)
        best = views[0]
        results.append(
            {
                "vase_id": vase,
                "selected_view": view_number(best.view),
                "selected_filename": best.path,
                "clip_score": best.high_quality_similarity,
                "total_views": len(views),
                "reason": "only_one_view" if len(views) == 1 else "best_clip_score",
                "all_view_scores": [
                    {"view_number": view_number(v.view), "filename": v.path, "clip_score": v.high_quality_similarity}
                    for v in views
                ],
            }
        )
    return {
        "input_directory": str(folders[0]),
        "output_directory": str(folders[1]),
        "processing_time_seconds": round(seconds, 3),
        "total_vases": len(results),
        "total_original_images": len(ranked),
        "total_selected_images": len(results),
        "reduction_rate": 1 - len(results) / len(ranked),
        "average_clip_score": float(ranked.loc[ranked["chosen"], "high_quality_similarity"].mean()),
        "results": results,
    }


def filtering_stats(ranked: pd.DataFrame, seconds: float) -> dict:
    """The original's summary; `std` is of the population, as numpy's default."""
    chosen = ranked.loc[ranked["chosen"], "high_quality_similarity"]
    per_vase = ranked.groupby("vase").size().value_counts().sort_index()
    return {
        "summary": {
            "total_vases": len(chosen),
            "original_images": len(ranked),
            "selected_images": len(chosen),
            "reduction_rate": f"{100 * (1 - len(chosen) / len(ranked)):.1f}%",
            "average_clip_score": float(chosen.mean()),
            "processing_time_minutes": round(seconds / 60, 3),
        },
        "view_distribution": {str(views): int(vases) for views, vases in per_vase.items()},
        "clip_score_stats": {
            "min": float(chosen.min()),
            "max": float(chosen.max()),
            "mean": float(chosen.mean()),
            "std": float(chosen.std(ddof=0)),
        },
    }


def contact_sheet(path: Path, ranked: pd.DataFrame, manifest: pd.DataFrame, images: Path) -> None:
    """A row per vase: its chosen view first and marked, then its other views and why they lost."""
    rows = []
    vases = sorted(ranked["vase"].unique(), key=lambda v: artefacts.sha256_text(v))[:SHEET_VASES]
    for vase in vases:
        own = ranked[ranked["vase"] == vase]
        tiles = [
            (images / v.path, f"view {v.view}: {v.high_quality_similarity:.3f}", "good" if v.chosen else None)
            for v in own.itertuples()
        ]
        lost = manifest[(manifest["vase"] == vase) & ~manifest["path"].isin(own["path"]) & (manifest["status"] == "ok")]
        tiles += [(images / v.path, f"view {v.view}: not accepted", "bad") for v in lost.itertuples()]
        rows.append((vase, tiles[:SHEET_VIEWS]))
    sheets.contact_sheet(path, rows, "Best view of each vase (tick), other accepted views, views not accepted (cross)")


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--images", type=Path, required=True, help="folder of raw images")
    made.add_argument("--manifest", type=Path, required=True, help="manifest of rule vase_list_images")
    made.add_argument("--accepted", type=Path, required=True, help="accepted.parquet of rule vase_accept_images")
    made.add_argument("--timed", type=Path, nargs="*", default=[], help="meta.json files whose times are reported")
    made.add_argument("--output-folder", type=Path, required=True, help="gets best_views/, reports, contact sheet")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Select one view per vase from `args.accepted`."""
    inputs = {"manifest": args.manifest, "accepted": args.accepted}
    record = step.record(args, "scripts.vase.select_views", None, inputs)
    manifest = tables.read_table(args.manifest, ["path", "vase", "view", "status", "bytes", "sha256"])
    accepted = tables.read_table(args.accepted, ["path", "vase", "view", "high_quality_similarity", "accepted"])
    ranked = rank_views(accepted[accepted["accepted"]])
    chosen = ranked[ranked["chosen"]].merge(manifest[["path", "bytes", "sha256"]], on="path", validate="1:1")
    readable = manifest.loc[manifest["status"] == "ok", "vase"].nunique()
    counts = tables.reconcile(
        "vase_select_views", readable, with_view=len(chosen), without_accepted_view=readable - ranked["vase"].nunique()
    )
    folder = args.output_folder
    seconds = sum(artefacts.read_json(path)["wall_seconds"] for path in args.timed)
    link_images(folder / "best_views", chosen.assign(name=chosen["path"]), args.images)
    names = ("best_views.parquet", "best_views_report.json", "filtering_stats.json", "summary.json", "views.png")
    outputs = [folder / name for name in names]
    tables.write_table(outputs[0], chosen[["vase", "path", "view", "high_quality_similarity", "sha256"]], ["vase"])
    artefacts.write_json(outputs[1], best_views_report(ranked, (args.images, folder / "best_views"), seconds))
    artefacts.write_json(outputs[2], filtering_stats(ranked, seconds))
    artefacts.write_json(outputs[3], {"vases": counts, "accepted_images": len(ranked)})
    contact_sheet(outputs[4], ranked, manifest, args.images)
    step.log.info("%s", counts)
    record.write(args.meta, [*outputs, folder / "best_views" / "files.json"], items=len(ranked))


if __name__ == "__main__":
    step.run(main)
