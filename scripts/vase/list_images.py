"""One manifest of all images: the shards' tables, with each file's vase and view from its name.

Rule `vase_list_images`. Beside the manifest: `quarantine.tsv` (file, reason), `duplicates.tsv`
(byte-identical files) and `summary.json` with the counts, which must add up.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from scripts.common import artefacts, step, tables
from scripts.common.errors import KilnError
from scripts.vase.inspect_images import SCHEMA
from scripts.vase.settings import ListSettings
from scripts.vase.view_names import compile_pattern, require_match

HISTORY = ["shard", "generation"]  # what follows from a folder's history, not from what it holds


def add_views(frame: pd.DataFrame, pattern: str | None) -> pd.DataFrame:
    """`frame` with columns `vase` and `view` (text) and `matched` (bool), from each file's name.

    A file that does not match, or names no vase, is a vase of its own, named by its path; where no view
    is named, it is "1".
    """
    names = frame["path"].str.split("/").str[-1]
    if pattern is None:
        return frame.assign(vase=frame["path"], view="1", matched=False)
    compiled = compile_pattern(pattern)
    matches = [compiled.search(name) for name in names]
    named = [m is not None and bool(m["vase"]) for m in matches]  # an optional group may be absent or empty
    vase = [m["vase"] if ok else path for m, ok, path in zip(matches, named, frame["path"], strict=True)]
    view = [(m["view"] if ok else None) or "1" for m, ok in zip(matches, named, strict=True)]
    return frame.assign(vase=vase, view=view, matched=named)


def find_duplicates(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows (sha256, path) of readable files that share their bytes with another file."""
    readable = frame[frame["status"] == "ok"]
    doubled = readable[readable.duplicated("sha256", keep=False)]
    return doubled.sort_values(["sha256", "path"])[["sha256", "path"]]


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ListSettings)
    made.add_argument("--shards", type=Path, nargs="+", required=True, help="tables of rule vase_inspect_images")
    made.add_argument("--ignored", type=int, default=0, help="files in the folder that are no images by their ending")
    made.add_argument("--output-folder", type=Path, required=True, help="where the manifest and its companions go")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """List the images of the shards that `args` name."""
    values = step.read_settings(args)
    record = step.record(args, "scripts.vase.list_images", values, {p.stem: p for p in args.shards})
    parts = [tables.read_table(path, SCHEMA.names) for path in args.shards]
    frame = add_views(pd.concat(parts, ignore_index=True), values.view_pattern)
    require_match(frame["path"], values.view_pattern)
    ok, bad = frame[frame["status"] == "ok"], frame[frame["status"] == "quarantined"]
    if len(ok) == 0:
        first = bad.iloc[0]
        raise KilnError(
            f"none of {len(frame)} images can be read; the first, {first['path']}: {first['reason']}",
            "check the folder vase.images",
        )
    duplicates = find_duplicates(frame)
    counts = tables.reconcile("vase_list_images", len(frame), ok=len(ok), quarantined=len(bad))
    summary = {
        **counts,
        "not_images_by_name": args.ignored,
        "reasons": bad["reason"].str.split(":").str[0].value_counts().sort_index().to_dict(),
        "vases": int(ok["vase"].nunique()),
        "views_per_vase": {str(k): int(v) for k, v in ok.groupby("vase").size().value_counts().sort_index().items()},
        "unmatched_names": int((~frame["matched"]).sum()),
        "identical_files": len(duplicates),
    }
    folder = args.output_folder
    outputs = [folder / name for name in ("manifest.parquet", "quarantine.tsv", "duplicates.tsv", "summary.json")]
    tables.write_table(outputs[0], frame.drop(columns=HISTORY), ["path"])
    bad = bad.sort_values("path")[["path", "reason"]]
    artefacts.write_text(outputs[1], bad.to_csv(sep="\t", index=False))
    artefacts.write_text(outputs[2], duplicates.to_csv(sep="\t", index=False))
    artefacts.write_json(outputs[3], summary)
    step.log.info("%s", summary)
    record.write(args.meta, outputs, items=len(frame))


if __name__ == "__main__":
    step.run(main)
