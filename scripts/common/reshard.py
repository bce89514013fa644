"""Compact the many small shards that additions left into as few as can be, and remove what no shard needs any more.

    python -m scripts.common.reshard --results results

The next run of the workflow lists, classifies and encodes no image again: it takes each from where it is kept.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from scripts.common import step
from scripts.common.cluster_guard import only_controller
from scripts.common.errors import KilnError
from scripts.common.reuse import BEFORE, KEYS, VALUES, before
from scripts.common.settings import read_yaml
from scripts.common.shards import ShardTable

TABLE = "shards.parquet"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.common.reshard",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of results (default: results)")
    parser.add_argument("--per-shard", type=int, help="files per shard (default: images_per_shard of the last run)")
    parser.add_argument("--directory", type=Path, default=Path(), help="Snakemake's working directory (default: .)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Reshard every pipeline of `args.results` that has a shard table.

    Raises:
        KilnError: there is none, it is damaged, or a run is under way.
    """
    results = args.directory / args.results
    tables = sorted((results / "state").glob(f"*/{TABLE}"))
    if not tables:
        raise KilnError(f"{results}: no pipeline has a shard table there", "give --results (make reshard RESULTS=...)")
    with only_controller(args.directory.resolve(), "scripts.common.reshard"):
        if locks := sorted((args.directory / ".snakemake/locks").glob("*.lock")):
            raise KilnError(
                f"{args.directory}: a Snakemake runs here, or was killed ({locks[0].name})",
                "wait until it ends; if none runs: snakemake --unlock",
            )
        for table in tables:
            reshard(table, results, args.per_shard or images_per_shard(results, table.parent.name), args.dry_run)


def images_per_shard(results: Path, pipeline: str) -> int:
    """Files per shard, as the last run had them.

    Raises:
        KilnError: it has not recorded them.
    """
    path = results / "config.yaml"
    section = read_yaml(path).get(pipeline) if path.is_file() else None
    value = section.get("images_per_shard") if isinstance(section, dict) else None
    if not isinstance(value, int) or value < 1:
        raise KilnError(f"{path}: no {pipeline}.images_per_shard of 1 or more", "give --per-shard")
    return value


def reshard(path: Path, results: Path, per_shard: int, dry_run: bool) -> None:
    """Compact the shards of the table at `path`, and remove the results of those that it no longer has."""
    old = ShardTable.load(path)
    before, after = len(old.names()), -(-len(old) // per_shard)
    pipeline = path.parent.name
    if before <= after:
        print(f"{pipeline}: {len(old)} files in {before} shards of up to {per_shard}: nothing to compact")
        new = old
    else:
        print(f"{pipeline}: {len(old)} files in {before} shards become {after} of up to {per_shard}")
        new = old.resharded(per_shard)
    gone = [*leftovers(results, pipeline, new.names()), *obsolete(path.parent, new.names())]
    for file in gone:
        print(f"    remove {file}")
    if dry_run:
        return
    if new is not old:
        new.save(path)  # before results go: killed in between, a run has all that it needs
    for file in gone:
        file.unlink(missing_ok=True)
    if new is not old:
        print(
            f"Now run the workflow: it makes the new shards of {pipeline} from what is kept, and reads no file again."
        )


def leftovers(results: Path, pipeline: str, live: Sequence[str]) -> list[Path]:
    """Results, logs and benchmarks of shards other than `live`."""
    places = [results / pipeline, results / "logs" / pipeline, results / "benchmarks" / pipeline]
    files = (file for place in places for file in place.rglob("s[0-9]*.*") if file.is_file())
    shard = re.compile(r"(s\d{5,9})\.(parquet|arrow|meta\.json|log|tsv)")
    keep = set(live)
    return sorted(file for file in files if (found := shard.fullmatch(file.name)) and found[1] not in keep)


def obsolete(state: Path, live: Sequence[str]) -> list[Path]:
    """What the steps of a pipeline keep in `state` of shards that are no more, where each of `live` has its own.

    Until then the items that moved from such a shard to another are still to be found there.
    """
    gone = []
    for place in {file.parent for file in state.rglob(f"*{KEYS}")}:
        files = {file.name.removesuffix(KEYS): file for file in place.glob(f"s*{KEYS}") if BEFORE not in file.name}
        if set(live) <= set(files):
            gone += before(place)
            for name in sorted(set(files) - set(live)):
                gone += [files[name], *place.glob(f"{name}-*{VALUES}")]
    return sorted(set(gone))


def sweep(states: Path) -> None:
    """Remove what is kept of shards that are no more, of every pipeline with a shard table; when no job runs."""
    for table in sorted(states.glob("*/shards.parquet")):
        for file in obsolete(table.parent, ShardTable.load(table).names()):
            file.unlink(missing_ok=True)


if __name__ == "__main__":
    step.run(main)
