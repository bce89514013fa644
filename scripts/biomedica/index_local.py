"""Index of the local tar shards: each key is listed as a pair, or with the reason why it gives none.

Rule `biomedica_index_local`. Shards are read once, in processes, and each image is decoded once, so that training meets
no broken one; with --state-folder only shards that are new or have changed in size or time are read. A damaged shard
gives the pairs that are whole before the damage, and is named. Without shards all pairs will be streamed.
"""

import argparse
import json
import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scripts.biomedica.pairs import Rejected, check
from scripts.biomedica.settings import HeldOutSettings, IndexSettings
from scripts.biomedica.sides import SIDES, side_of
from scripts.biomedica.tars import Bad, Raw, Reader, TarError
from scripts.common import artefacts, progress, shards, step, tables, workers
from scripts.common.errors import KilnError
from scripts.common.settings import Settings, of_kind, to_json
from scripts.common.shards import Item

_OWN = [
    ("image_offset", pa.int64()), ("image_bytes", pa.int64()), ("text_offset", pa.int64()), ("text_bytes", pa.int64()),
    ("meta_offset", pa.int64()), ("meta_bytes", pa.int64()), ("width", pa.int32()), ("height", pa.int32()),
    ("caption_id", pa.int64()), ("panel_type", pa.string()), ("panel_subtype", pa.string()),
]  # fmt: skip
PART = pa.schema(
    [("key", pa.string()), ("article", pa.string()), *_OWN]
)  # of one shard; sides come when all are put together
INDEX = pa.schema(
    [("shard", pa.string()), ("key", pa.string()), ("article", pa.string()), ("side", pa.string()), *_OWN]
)
SHARDS = pa.schema(
    [
        ("shard", pa.string()), ("bytes", pa.int64()), ("mtime_ns", pa.int64()), ("samples", pa.int64()),
        ("train", pa.int64()), ("rejected", pa.int64()), ("quarantined", pa.int64()),
        ("tar_bytes_per_sample", pa.float64()), ("reason", pa.string()),
    ]
)  # fmt: skip
AGAIN = "duplicate key: an earlier shard has it"
REJECTED = ["shard", "key", "status", "reason"]


class StepSettings(Settings):
    index: IndexSettings = IndexSettings()
    held_out: HeldOutSettings = HeldOutSettings()


def read_shard(folder: Path, item: Item, values: IndexSettings, part: Path) -> None:
    """Write {part}.parquet, the pairs of a shard by offset, and after it {part}.json: what the shard was, its rejected
    keys, and what damage it has.

    Raises:
        KilnError: the shard is gone, cannot be read, or is not the one that was listed.
    """
    path, rows, rejected, reason = folder / item.path, [], [], ""
    try:
        with path.open("rb") as stream:
            _check_same(path, item, stream.fileno())
            try:
                for raw in Reader(stream):
                    pair = Rejected(raw.key, "quarantined", raw.reason) if isinstance(raw, Bad) else _row(raw, values)
                    (rejected if isinstance(pair, Rejected) else rows).append(pair)
            except TarError as error:
                reason = str(error)
            _check_same(path, item, stream.fileno())
    except OSError as error:
        raise KilnError(f"{path}: cannot be read ({error.strerror})", "make it readable, or move it away") from None
    rows.sort(key=lambda row: row["image_offset"])
    with artefacts.atomic_path(part.with_suffix(".parquet")) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, PART), temporary)
    facts = {"item": item, "samples": len(rows), "rejected": sorted(rejected), "reason": reason}
    artefacts.write_json(part.with_suffix(".json"), facts)


def _row(raw: Raw, values: IndexSettings) -> dict | Rejected:
    pair = check(raw, values, HeldOutSettings(), decode=True)
    if isinstance(pair, Rejected):
        return pair
    row = {name: getattr(pair, name) for name in PART.names if hasattr(pair, name)}
    for name, (offset, size) in (("image", raw.image_at), ("text", raw.text_at), ("meta", raw.meta_at)):
        row |= {f"{name}_offset": offset, f"{name}_bytes": size}
    return row


def _check_same(path: Path, item: Item, number: int) -> None:
    found = os.fstat(number)
    if (found.st_size, found.st_mtime_ns) != (item.size, item.mtime_ns):
        raise KilnError(f"{path}: it changed while shards were read", "run again once it is all there")


def read_facts(part: Path, item: Item) -> dict | None:
    """What `read_shard` wrote of the shard as it is now; None if it did not, or of another state of it."""
    try:
        facts = json.loads(part.with_suffix(".json").read_text(encoding="utf-8"))
        same = facts["item"] == list(item) and part.with_suffix(".parquet").is_file()
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        step.log.warning("%s: unreadable, its shard is read anew", part.with_suffix(".json"))
        return None
    return facts if same else None


def read_all(folder: Path, items: Sequence[Item], values: IndexSettings, state: Path, processes: int) -> list[Path]:
    """Reads the shards that are new or have changed; the place in `state` of each one's part, in their order."""
    parts = [state / artefacts.sha256_text(item.path)[:32] for item in items]
    todo = [(item, part) for item, part in zip(items, parts, strict=True) if read_facts(part, item) is None]
    step.log.info("%d of %d shards to read, %d processes", len(todo), len(items), processes)
    work = workers.pool(processes, return_as="generator_unordered")(
        joblib.delayed(read_shard)(folder, item, values, part) for item, part in todo
    )
    for _ in progress.bar(work, "index shards", len(todo)):
        pass
    return parts


class Counts:
    """What the whole index holds."""

    def __init__(self):
        self.sides, self.panel_types, self.statuses, self.reasons = Counter(), Counter(), Counter(), Counter()
        self.shards: list[dict] = []
        self.whole = np.zeros(2, np.int64)  # bytes and pairs of shards without damage: the mean of the repo's shards
        self.keys = self.without_json = 0

    def add(self, item: Item, facts: dict, rejected: Sequence[tuple], pairs: pa.Table) -> None:
        """One shard, by what `read_shard` wrote of it, its rows of rejected.tsv (key, status, reason) and its pairs.

        Raises:
            KilnError: they do not add up.
        """
        own, keys = facts["samples"], facts["samples"] + len(facts["rejected"])
        sides, statuses = Counter(_counts(pairs["side"])), Counter(status for _, status, _ in rejected)
        statuses = {name: statuses[name] for name in ("rejected", "quarantined")}
        tables.reconcile(f"biomedica_index_local {item.path}", keys, samples=sum(sides.values()), **statuses)
        self.keys += keys
        self.sides += sides
        self.statuses.update(statuses)
        self.panel_types += Counter(_counts(pairs["panel_type"]))
        self.reasons += Counter(why.split(":")[0] for _, _, why in rejected)
        self.without_json += pc.sum(pc.equal(pairs["meta_bytes"], 0)).as_py() or 0
        row = {"shard": item.path, "bytes": item.size, "mtime_ns": item.mtime_ns, "samples": len(pairs)}
        row |= {"train": sides["train"], **statuses, "tar_bytes_per_sample": item.size / own if own else None}
        row["reason"] = facts["reason"]
        if not row["reason"]:
            self.whole += np.array([item.size, own])
        self.shards.append(row)

    def summary(self, given: Path | None) -> dict:
        """summary.json.

        Raises:
            KilnError: keys do not add up.
        """
        samples = sum(self.sides.values())
        statuses = {name: self.statuses[name] for name in ("rejected", "quarantined")}
        counts = tables.reconcile("biomedica_index_local", self.keys, samples=samples, **statuses)
        return {
            **counts,
            "reasons": dict(sorted(self.reasons.items())),
            "sides": {side: self.sides[side] for side in SIDES},
            "panel_types": dict(sorted(self.panel_types.items())),
            "without_json": self.without_json,
            "shards": len(self.shards),
            "damaged_shards": sum(bool(row["reason"]) for row in self.shards),
            "bytes": sum(row["bytes"] for row in self.shards),
            "bytes_per_sample": float(self.whole[0] / self.whole[1]) if self.whole[1] else None,
            "note": "" if self.shards else f"no local shards ({_place(given)}): all pairs are streamed",
        }


def _place(given: Path | None) -> str:
    if given is None:
        return "no folder is set"
    return f"no .tar in {given.name}" if given.is_dir() else f"no folder {given.name}"


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {one["values"]: one["counts"] for one in pc.value_counts(column).to_pylist()}


def with_sides(shard: str, pairs: pa.Table, values: HeldOutSettings) -> pa.Table:
    """The rows of index.parquet of one shard."""
    articles = pairs["article"].combine_chunks().dictionary_encode()
    sides = pa.array([side_of(one, values) for one in articles.dictionary.to_pylist()], pa.string())
    columns = {name: pairs[name] for name in PART.names}
    columns |= {"shard": pa.array([shard] * len(pairs), pa.string()), "side": sides.take(articles.indices)}
    return pa.table({name: columns[name] for name in INDEX.names}, schema=INDEX)


def first_of_each(parts: Sequence[Path]) -> list[np.ndarray]:
    """Per part a mask (pairs,) of those whose key no earlier pair of any part has; 16 bytes of memory per pair."""
    hashes = [
        pd.util.hash_array(pq.read_table(part.with_suffix(".parquet"), columns=["key"])["key"].to_numpy())
        for part in parts
    ]
    if not hashes:
        return []
    _, first = np.unique(np.concatenate(hashes), return_index=True)
    mask = np.zeros(sum(map(len, hashes)), bool)
    mask[first] = True
    return np.split(mask, np.cumsum([len(one) for one in hashes])[:-1])


def put_together(items: Sequence[Item], parts: Sequence[Path], values: HeldOutSettings, folder: Path) -> Counts:
    """Write index.parquet, a row group for each shard, and rejected.tsv; one shard's rows at a time are in memory."""
    counts = Counts()
    with (
        artefacts.atomic_path(folder / "index.parquet") as index,
        artefacts.atomic_path(folder / "rejected.tsv") as rejected,
        pq.ParquetWriter(index, INDEX) as writer,
        rejected.open("w", encoding="utf-8", newline="") as lines,
    ):
        pd.DataFrame(columns=REJECTED).to_csv(lines, sep="\t", index=False)
        for item, part, first in zip(items, parts, first_of_each(parts), strict=True):
            facts = read_facts(part, item)
            if facts is None:
                raise KilnError(f"{part}.json: gone or changed since it was written", "run again, one run at a time")
            found = pq.read_table(part.with_suffix(".parquet"))
            again = [(key, "quarantined", AGAIN) for key in found["key"].filter(pa.array(~first)).to_pylist()]
            pairs = with_sides(item.path, found.filter(pa.array(first)), values)
            if len(pairs):
                writer.write_table(pairs, row_group_size=len(pairs))
            rejected_rows = sorted([*map(tuple, facts["rejected"]), *again])
            frame = pd.DataFrame([(item.path, *row) for row in rejected_rows], columns=REJECTED)
            frame.to_csv(lines, sep="\t", index=False, header=False)
            counts.add(item, facts, rejected_rows, pairs)
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, StepSettings)
    made.add_argument("--shards", type=Path, help="folder of .tar shards, at any depth (default: all is streamed)")
    made.add_argument("--state-folder", type=Path, help="where parts of shards are kept, so that none is read twice")
    made.add_argument("--output-folder", type=Path, required=True, help="where the index and its companions go")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Index the shards of `args.shards`."""
    values = step.read_settings(args)
    record = step.record(args, "scripts.biomedica.index_local", values, {})
    found = shards.Scan([])
    if args.shards is not None and args.shards.is_dir():
        found = shards.scan(args.shards, [".tar"], may_be_empty=True)
    items = found.items
    record.facts["listing"] = found.digest()
    args.output_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_folder, prefix=".parts-") as temporary:
        of = to_json(of_kind(values.index, "numerics"))
        key = artefacts.sha256_text(str(args.shards and args.shards.resolve()), of, record.code)[:16]
        state = (args.state_folder or Path(temporary)) / key
        processes = min(values.index.processes, step.threads(args), max(len(items), 1))
        parts = read_all(args.shards, items, values.index, state, processes)
        counts = put_together(items, parts, values.held_out, args.output_folder)
    summary = counts.summary(args.shards)
    outputs = [
        args.output_folder / name for name in ("index.parquet", "shards.parquet", "rejected.tsv", "summary.json")
    ]
    tables.write_table(outputs[1], pd.DataFrame(counts.shards, columns=SHARDS.names), ["shard"], SHARDS)
    artefacts.write_json(outputs[3], summary)
    step.log.info("%s", summary)
    for row in counts.shards:
        if row["reason"]:
            step.log.warning("%s: %d pairs before the damage are used; %s", row["shard"], row["samples"], row["reason"])
    if not items:
        step.log.warning("%s", summary["note"])
    record.write(args.meta, outputs, items=summary["in"])


if __name__ == "__main__":
    step.run(main)
