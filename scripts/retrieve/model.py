"""Retrieve one model of config/models.csv.

Writes its files, files.json ({name: {bytes, sha256}}) and the record of the run into the output folder,
which appears whole or not at all. The first retrieval of a model locks its commit and hashes; a later
one gets the same bytes or fails. Files that are there already with the locked bytes are not downloaded
again, and when all are, no network is needed.
"""

from collections.abc import Sequence
from pathlib import Path

from scripts.common import step
from scripts.retrieve import files, models

MODULE = "scripts.retrieve.model"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = step.parser(__doc__)
    parser.add_argument("--name", required=True, help="of the model, as in the table")
    parser.add_argument("--models", type=Path, required=True, help="the table of models (models.csv)")
    parser.add_argument("--lock", type=Path, help="the lock (default: models.lock.json beside the table)")
    files.add_options(parser)
    args = parser.parse_args(argv)
    model = models.find(models.read_table(args.models), args.name, args.models)
    record = step.record(args, MODULE, model, {"models": args.models})
    args.lock = args.lock or args.models.with_name("models.lock.json")
    files.retrieve(args, model, record, MODULE)


if __name__ == "__main__":
    step.run(main)
