"""Decode and hash every image of one shard: what it is, or why it cannot be used.

Rule `vase_inspect_images`; one job per shard, so that only new or changed shards are read again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import joblib
import pandas as pd
import pyarrow as pa

from scripts.common import images, progress, shards, step, tables
from scripts.common.errors import KilnError
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


def inspect_files(folder: Path, paths: Sequence[str], max_pixels: int, processes: int) -> list[dict]:
    """One row of `images.inspect` per path (relative to `folder`), in order.

    Raises:
        KilnError: a file is gone since the folder was scanned, or may not be read.
    """

    def one(path: str) -> dict:
        try:
            return {"path": path, **images.inspect(folder / path, max_pixels)}
        except FileNotFoundError:
            raise KilnError(
                f"{folder / path}: the file is gone since the folder was scanned",
                "run again: the folder is scanned anew, and what is done stays done",
            ) from None
        except OSError as error:
            raise KilnError(
                f"{folder / path}: cannot be read ({error.strerror})",
                "make it readable, or move it out of the folder of images",
            ) from None

    work = (joblib.delayed(one)(path) for path in progress.bar(paths, "inspect"))
    # threads, not processes: Pillow and hashlib release the GIL while they work
    return joblib.Parallel(n_jobs=processes, prefer="threads")(work)


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
