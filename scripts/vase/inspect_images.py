"""Decode and hash every image of one shard: what it is, or why it cannot be used.

Rule `vase_inspect_images`; one job per shard, so that only new or changed shards are looked at again, and of these
only files whose path, size or time of change is new are read (`--state-folder`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from scripts.common import reuse, shards, step, tables
from scripts.common.inspection import inspect_files
from scripts.common.settings import of_kind
from scripts.vase.settings import InspectSettings

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mode", pa.string()),
        ("format", pa.string()),
        ("shard", pa.string()),
        ("generation", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, InspectSettings)
    made.add_argument("--images", type=Path, required=True, help="folder of raw images")
    made.add_argument("--shard-table", type=Path, required=True, help="table that assigns files to shards")
    made.add_argument("--shard", required=True, help="name of the shard, such as s00000")
    reuse.add_state_folder(made)
    made.add_argument("--output", type=Path, required=True, help="table of this shard (.parquet)")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Inspect the shard that `args` name."""
    values = step.read_settings(args)
    record = step.record(args, "scripts.vase.inspect_images", values, {})
    listed = shards.ShardTable.load(args.shard_table).rows(args.shard).to_pandas()
    keys = [reuse.key(*row) for row in listed.itertuples(index=False)]
    place = reuse.folder(args.state_folder, of_kind(values, "numerics"), {}, record.code, ["pillow"])
    kept = reuse.Kept(place, args.shard, tables.read_rows)
    missing, parts = listed, []
    for where, part in kept.find(keys):
        parts.append(part)
        missing = missing.drop(index=where)
    rows = inspect_files(args.images, missing["path"].tolist(), values.max_pixels, step.threads(args))
    frame = pd.concat([*parts, pd.DataFrame(rows, columns=SCHEMA.names)], ignore_index=True)
    generations = frame["path"].map(listed.set_index("path")["generation"])
    frame = frame.assign(shard=args.shard, generation=generations)
    tables.write_table(args.output, frame, ["path"], SCHEMA)
    quarantined = int((frame.status == "quarantined").sum())
    step.log.info("%s: %d images, %d quarantined", args.shard, len(frame), quarantined)
    for row in missing.itertuples():
        if not _is_as_scanned(args.images / row.path, row):
            keys[row.Index] = None  # what was read is not what the key says
    kept.keep(keys, args.output)
    record.facts |= reuse.facts(args.shard, len(rows), len(frame))
    record.write(args.meta, [args.output], items=len(frame))


def _is_as_scanned(path: Path, row) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (row.size, row.mtime_ns)


if __name__ == "__main__":
    step.run(main)
