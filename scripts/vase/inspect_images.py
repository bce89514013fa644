"""Decode and hash every image of one shard: what it is, or why it cannot be used.

Rule `vase_inspect_images`; one job per shard, so that only new or changed shards are read again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa

from scripts.common import shards, step, tables
from scripts.common.inspection import inspect_files
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
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, InspectSettings)
    made.add_argument("--images", type=Path, required=True, help="folder of raw images")
    made.add_argument("--shard-table", type=Path, required=True, help="table that assigns files to shards")
    made.add_argument("--shard", required=True, help="name of the shard, such as s00000")
    made.add_argument("--output", type=Path, required=True, help="table of this shard (.parquet)")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Inspect the shard that `args` name."""
    values = step.read_settings(args)
    record = step.record(args, "scripts.vase.inspect_images", values, {})
    paths = [item.path for item in shards.ShardTable.load(args.shard_table).items(args.shard)]
    rows = inspect_files(args.images, paths, values.max_pixels, step.threads(args))
    frame = pd.DataFrame(rows).assign(shard=args.shard)[SCHEMA.names]
    tables.write_table(args.output, frame, ["path"], SCHEMA)
    quarantined = int((frame.status == "quarantined").sum())
    step.log.info("%s: %d images, %d quarantined", args.shard, len(frame), quarantined)
    record.write(args.meta, [args.output], items=len(frame))


if __name__ == "__main__":
    step.run(main)
