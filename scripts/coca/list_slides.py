"""Slides with their texts and patients: every file and every text is listed or accounted for.

Rule `coca_list_slides`. A slide's id is its file's name without the ending. Files that cannot be used, and files and
texts without each other, go to quarantine.tsv with the reason. The tiles of a file are read once, by slab, in
processes; with --state-folder only those of files that are new or have changed.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pandas as pd
import pyarrow as pa

from scripts.coca import labels, slide_facts
from scripts.coca.settings import EXTENSIONS, ListSettings
from scripts.common import artefacts, shards, step, tables
from scripts.common.errors import KilnError
from scripts.common.settings import to_json

MANIFEST = pa.schema(
    [
        ("slide", pa.string()), ("path", pa.string()), ("tiles", pa.int64()), ("dim", pa.int64()),
        ("dtype", pa.string()), ("key", pa.string()), ("finite_share", pa.float64()), ("norm", pa.float64()),
        ("sha256", pa.string()), ("patient", pa.string()), ("text", pa.string()),
    ]
)  # fmt: skip


def join(
    paths: Sequence[str], texts: dict[str, str], bad: Sequence[tuple[str, str]], patients: dict[str, str] | None
) -> tuple[dict[str, str], dict[str, str]]:
    """({slide: path}, {path: reason}) of the files that have one text, and a patient where there is a table of them,
    and of those that have not."""
    by_slide = defaultdict(list)
    for path in paths:
        by_slide[PurePosixPath(path).stem].append(path)
    why = dict(bad)
    kept, reasons = {}, {}
    for slide, own in by_slide.items():
        if len(own) > 1:
            reason = f"double: {len(own)} files are named {slide}"
        elif slide in why:
            reason = f"no usable text: {why[slide]}"
        elif slide not in texts:
            reason = "no text"
        elif patients is not None and slide not in patients:
            reason = "no patient"
        else:
            kept[slide] = own[0]
            continue
        reasons |= dict.fromkeys(own, reason)
    return kept, reasons


def text_reasons(
    texts: dict[str, str], bad: Sequence[tuple[str, str]], kept: pd.Series, paths: Sequence[str]
) -> list[tuple[str, str]]:
    """(slide, reason) of each entry of the labels that no kept slide has."""
    names, kept = {PurePosixPath(path).stem for path in paths}, set(kept)
    left = sorted(set(texts) - kept)
    return [*bad, *((name, "file quarantined" if name in names else "no file") for name in left)]


def quarantine(files: dict[str, str], entries: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Rows kind ("file" or "text"), name, reason; sorted."""
    rows = [("file", *row) for row in files.items()] + [("text", *row) for row in entries]
    return pd.DataFrame(sorted(rows), columns=["kind", "name", "reason"])


def summarise(frame: pd.DataFrame, bad: pd.DataFrame, found: shards.Scan, entries: int) -> dict:
    """Counts of the listing.

    Raises:
        KilnError: files or texts do not add up.
    """
    parts = {}
    for kind, total in (("file", len(found.items)), ("text", entries)):
        own = bad.loc[bad["kind"] == kind, "reason"]
        counts = tables.reconcile(f"coca_list_slides {kind}s", total, ok=len(frame), quarantined=len(own))
        parts[f"{kind}s"] = {**counts, "reasons": dict(sorted(Counter(own.str.split(":").str[0]).items()))}
    tiles = frame["tiles"]
    return {
        **parts,
        "other_files": found.ignored,
        "patients": int(frame["patient"].nunique()),
        "distinct_texts": int(frame["text"].nunique()),
        "equal_slides": int(frame["sha256"].duplicated(keep=False).sum()),
        "tiles": {"sum": int(tiles.sum()), "least": int(tiles.min()), "median": float(tiles.median()),
                  "most": int(tiles.max())},
    }  # fmt: skip


def check_any(frame: pd.DataFrame, bad: pd.DataFrame, folder: Path, source: Path) -> None:
    """At least one slide is left.

    Raises:
        KilnError: none; says the commonest reasons, and names that were meant to meet.
    """
    if len(frame):
        return
    files, texts = (bad[bad["kind"] == kind] for kind in ("file", "text"))
    reason, count = files["reason"].value_counts().sort_index().idxmax(), len(files)
    first = files[files["reason"] == reason].iloc[0]
    message = f"{folder}: none of {count} slides can be used; {first['name']}: {reason}"
    if reason == "no text":
        hint = (
            f"{source} names slides by their files' names without ending: {PurePosixPath(first['name']).stem!r}, "
            f"but has {texts['name'].iloc[0]!r}"
        )
    elif reason.startswith("dim:"):
        hint = "set coca.list.tile_dim to the width of your embeddings (and to it that of the model)"
    else:
        hint = "mend the slides, the labels or the settings"
    raise KilnError(message, hint)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ListSettings)
    made.add_argument("--slides", type=Path, required=True, help="folder of .h5 files, at any depth")
    made.add_argument("--labels", type=Path, required=True, help="JSON {slide: text}, UTF-8")
    made.add_argument("--patients", type=Path, help="CSV with columns slide,patient (default: setting patients)")
    made.add_argument("--state-folder", type=Path, help="where facts of slides are kept, so that none is read twice")
    made.add_argument("--output-folder", type=Path, required=True, help="where the manifest and its companions go")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """List the slides of `args.slides`."""
    values = step.read_settings(args)
    table = args.patients or (Path(values.patients) if values.patients else None)
    inputs = {"labels": args.labels} | ({"patients": table} if table else {})
    record = step.record(args, "scripts.coca.list_slides", values, inputs)
    texts, bad_texts = labels.read_labels(args.labels)
    patients = labels.read_patients(table) if table else None
    found = shards.scan(args.slides, EXTENSIONS)
    record.facts["listing"] = found.digest()
    paths = [item.path for item in found.items]
    slides, reasons = join(paths, texts, bad_texts, patients)

    wanted = {"keys": values.keys, "dim": values.tile_dim, "max_tiles": values.max_tiles}
    state = artefacts.sha256_text(str(args.slides.resolve()), to_json(wanted), record.code)[:16]
    facts = slide_facts.inspect_all(
        args.slides,
        [item for item in found.items if item.path not in reasons],
        args.state_folder / f"{state}.parquet" if args.state_folder else None,
        processes=min(values.processes, step.threads(args)),
        **wanted,
    )
    is_bad = facts["reason"].notna()
    reasons |= facts[is_bad].set_index("path")["reason"].to_dict()
    of_path = {path: slide for slide, path in slides.items()}
    frame = facts[~is_bad].assign(slide=lambda rows: rows["path"].map(of_path))
    frame["text"] = frame["slide"].map(texts)
    frame["patient"] = frame["slide"].map(patients or {slide: slide for slide in slides})
    bad = quarantine(reasons, text_reasons(texts, bad_texts, frame["slide"], paths))
    check_any(frame, bad, args.slides, args.labels)
    frame["tiles"], frame["dim"] = frame["tiles"].astype("int64"), frame["dim"].astype("int64")
    summary = summarise(frame, bad, found, len(texts) + len(bad_texts))

    outputs = [args.output_folder / name for name in ("manifest.parquet", "quarantine.tsv", "summary.json")]
    tables.write_table(outputs[0], frame[MANIFEST.names], ["slide"], MANIFEST)
    artefacts.write_text(outputs[1], bad.to_csv(sep="\t", index=False))
    artefacts.write_json(outputs[2], summary)
    step.log.info("%s", summary)
    if summary["equal_slides"]:
        step.log.warning("%d slides equal another (header and sample)", summary["equal_slides"])
    record.write(args.meta, outputs, items=len(found.items))


if __name__ == "__main__":
    step.run(main)
