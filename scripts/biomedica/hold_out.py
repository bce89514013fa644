"""Hold validation and test out: pairs of articles that no training sees, with their images, in one file a side.

Rule `biomedica_hold_out`. Local pairs come first, in an order by their keys alone; a side with fewer than 2 of them is
filled up from the first shards of the repo.
"""

import argparse
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.biomedica import held_out, pairs, tars
from scripts.biomedica.local import LocalPairs
from scripts.biomedica.pairs import Pair
from scripts.biomedica.settings import HeldOutSettings, IndexSettings, RemoteSettings
from scripts.common import artefacts, hashed, progress, step, tables
from scripts.common.errors import KilnError
from scripts.common.settings import Settings

LEAST = 2  # pairs of a side: of fewer there is no retrieval
STREAMED = 3  # shards that are read at most


class HoldOutStepSettings(Settings):
    """Settings of this step."""

    index: IndexSettings = IndexSettings()
    remote: RemoteSettings = RemoteSettings()
    held_out: HeldOutSettings = HeldOutSettings()


class Sides:
    """What is held out so far; `add` are the writers of both sides."""

    def __init__(self, add: Mapping[str, Callable[[Pair, str], None]], max_pairs: int):
        self._add, self._max = add, max_pairs
        self._keys: set[str] = set()
        self._articles: dict[str, set[str]] = {side: set() for side in add}
        self._facts = {side: {"pairs": 0, "bytes": 0, "local": 0, "streamed": 0} for side in add}
        self._sources, self._types = ({side: Counter() for side in add} for _ in range(2))

    def count(self, side: str) -> int:
        """Pairs of a side."""
        return self._facts[side]["pairs"]

    def full(self, side: str) -> bool:
        """Whether a side takes no more."""
        return self.count(side) >= self._max

    def takes(self, key: str, side: str) -> bool:
        """Whether a pair of this key would be new, and has room."""
        return key not in self._keys and not self.full(side)

    def keep(self, pair: Pair, source: str) -> None:
        """Hold a pair out."""
        self._add[pair.side](pair, source)
        self._keys.add(pair.key)
        self._articles[pair.side].add(pair.article)
        facts = self._facts[pair.side]
        for name, more in (
            ("pairs", 1), ("bytes", len(pair.image)), ("local" if source == held_out.LOCAL else "streamed", 1),
        ):  # fmt: skip
            facts[name] += more
        self._sources[pair.side][source] += 1
        self._types[pair.side][pair.panel_type] += 1

    def summary(self) -> dict[str, dict[str, Any]]:
        """{side: pairs, articles, bytes of images, local and streamed pairs, pairs by source and by panel type}."""
        return {
            side: facts
            | {"articles": len(self._articles[side]), "sources": dict(sorted(self._sources[side].items()))}
            | {"panel_types": dict(sorted(self._types[side].items()))}
            for side, facts in self._facts.items()
        }


def keep_local(sides: Sides, local: LocalPairs, seed: int) -> dict[str, dict[str, int]]:
    """Keep local pairs, in order of a hash of their keys; per side how many there are, were kept, and left out."""
    counts = {}
    for side in held_out.SIDES:
        rows = local.rows(side).tolist()
        keys = {row: local.key(row) for row in rows}
        rows.sort(key=lambda row: (hashed.unit(seed, keys[row]), row))
        doubled = 0
        for row in rows:
            if sides.full(side):
                break
            if sides.takes(keys[row], side):
                sides.keep(local.read(row), held_out.LOCAL)
            else:
                doubled += 1
        kept = sides.count(side)
        counts[side] = tables.reconcile(
            f"local pairs of {side}", len(rows), kept=kept, doubled=doubled, left_out=len(rows) - kept - doubled
        )
    return counts


def keep_streamed(
    sides: Sides, wanted: Sequence[str], items: Iterable[tars.Raw | tars.Bad], name: str, values: HoldOutStepSettings
) -> dict[str, Any]:
    """Keep pairs of the `wanted` sides from a shard until they are full; what became of all that was read.

    A damaged shard gives what stands before the damage; its `reason` says so.
    """
    counts, reasons, reason = Counter(), Counter(), ""
    try:
        for raw in items:
            counts["in"] += 1
            found = _checked(raw, sides, wanted, values)
            if isinstance(found, Pair):
                sides.keep(found, name)
                counts["kept"] += 1
            elif isinstance(found, pairs.Rejected):
                counts[found.status] += 1
                reasons[f"{found.status}: {found.reason.partition(':')[0]}"] += 1
            else:
                counts[found] += 1
            if all(sides.full(side) for side in wanted):
                break
    except tars.TarError as error:
        reason = str(error)
        step.log.warning("%s: %s", name, reason)
    parts = {part: counts[part] for part in ("kept", "train", "left_out", "rejected", "quarantined")}
    return tables.reconcile(name, counts["in"], **parts) | {"reasons": dict(sorted(reasons.items())), "reason": reason}


def _checked(raw: tars.Raw | tars.Bad, sides: Sides, wanted: Sequence[str], values: HoldOutStepSettings):
    """The pair to be kept, its rejection, or what else becomes of it: "train", or "left_out" (unwanted, or doubled)."""
    if isinstance(raw, tars.Bad):
        return pairs.Rejected(raw.key, "quarantined", raw.reason)
    found = pairs.check(raw, values.index, values.held_out, decode=False)
    if not isinstance(found, Pair):
        return found
    if found.side not in wanted or not sides.takes(found.key, found.side):
        return "train" if found.side == "train" else "left_out"
    return pairs.check(raw, values.index, values.held_out, decode=True)  # whole images cost time: only where needed


def stream(sides: Sides, wanted: Sequence[str], remote: Path, values: HoldOutStepSettings) -> dict[str, Any]:
    """Fill `wanted` sides from the first shards of the listing in `remote`; {shard: what became of its pairs}.

    Raises:
        KilnError: a shard stays unreachable, or is not the one that was listed.
    """
    listed = tables.read_table(remote / "shards.parquet", ["name", "bytes", "sha256"]).head(STREAMED)
    if listed.empty:
        return {}
    from scripts.biomedica.remote import Hub  # not needed, nor its packages, where local pairs are enough

    hub = Hub(values.remote, artefacts.read_json(remote / "summary.json")["revision"])
    read = {}
    for one in progress.bar(listed.itertuples(index=False), "stream", len(listed)):
        step.log.info("%s: reading for pairs of %s", one.name, " and ".join(wanted))
        with hub.open(one.name, int(one.bytes), one.sha256 if isinstance(one.sha256, str) else None) as file:
            read[one.name] = keep_streamed(sides, wanted, tars.samples(file), one.name, values)
        if all(sides.full(side) for side in wanted):
            break
    step.log.info("%.1f MB streamed, %d retries", hub.stats.bytes / 1e6, hub.stats.retries)
    return read


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, HoldOutStepSettings)
    made.add_argument("--index", type=Path, required=True, help="folder of rule biomedica_index_local")
    made.add_argument("--shards", type=Path, help="folder of local shards, if any")
    made.add_argument("--remote", type=Path, required=True, help="folder of rule biomedica_list_remote")
    made.add_argument(
        "--output-folder", type=Path, required=True, help="validation.parquet, test.parquet, summary.json"
    )
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Hold out what `args` name.

    Raises:
        KilnError: a side has fewer than `LEAST` pairs, or a shard cannot be read.
    """
    values = step.read_settings(args)
    inputs = {
        "index": args.index / "index.parquet", "shards": args.index / "shards.parquet",
        "remote": args.remote / "shards.parquet", "listing": args.remote / "summary.json",
    }  # fmt: skip
    record = step.record(args, "scripts.biomedica.hold_out", values, inputs)
    local = LocalPairs(args.index, args.shards)
    outputs = [args.output_folder / f"{side}.parquet" for side in held_out.SIDES]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(held_out.writer(path)) for path in outputs]
        sides = Sides(dict(zip(held_out.SIDES, writers, strict=True)), values.held_out.max_pairs)
        counts = keep_local(sides, local, values.held_out.seed)
        wanted = [side for side in held_out.SIDES if sides.count(side) < LEAST]
        read = stream(sides, wanted, args.remote, values) if wanted else {}
        _check_enough(sides, counts, read, values.held_out)
    summary = args.output_folder / "summary.json"
    facts = {"sides": sides.summary(), "local": counts, "streamed": read}
    artefacts.write_json(summary, facts)
    for side, one in facts["sides"].items():
        step.log.info(
            "%s: %d pairs of %d articles, %d of them local, %.1f MB",
            *(side, one["pairs"], one["articles"], one["local"], one["bytes"] / 1e6),
        )
    record.write(args.meta, [*outputs, summary], items=sum(one["pairs"] for one in facts["sides"].values()))


def _check_enough(sides: Sides, counts: Mapping, read: Mapping[str, Mapping], values: HeldOutSettings) -> None:
    streamed = sum(one["in"] for one in read.values())
    for side in held_out.SIDES:
        if sides.count(side) >= LEAST:
            continue
        hint = f"raise biomedica.held_out.{side} (now {getattr(values, side):g} of all articles)"
        if not read:
            hint += ", give more local shards, or set biomedica.remote.repo and plan more samples than are on disk"
        raise KilnError(
            f"{sides.count(side)} pairs of side {side}, expected at least {LEAST}: there are {counts[side]['in']} "
            f"local ones, and {streamed:,} pairs of all sides were read from {len(read)} shards of the repo",
            hint,
        )


if __name__ == "__main__":
    step.run(main)
