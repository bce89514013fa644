"""The streamed pairs of one lane, in shuffled blocks, with the place to go on from after any of them.

A lane reads its shards one after another and keeps the usable pairs of train. Each `shuffle_buffer` of them, across the
borders of shards, are a block; its order is a pure function of seed, epoch, lane and block. To go on in mid-block, the
block is read again from where its reading began, which is at most one shard's start as long as no block is longer than
a shard.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from scripts.biomedica import pairs, planning
from scripts.biomedica.reading import Reading, Ready
from scripts.biomedica.remote import Hub, Unreachable
from scripts.biomedica.reports import COUNTS, Report
from scripts.biomedica.tars import Bad, Raw, Reader, Resume, TarError
from scripts.common import images
from scripts.common.data_order import epoch_order, item_seed
from scripts.common.errors import KilnError

OTHERS = "set plan.unreachable to others, which makes it up from shards that were not planned"
START = {"block": 0, "taken": 0, "index": 0, "resume": tuple(Resume()), "counts": {}, "broken": []}


class Block(NamedTuple):
    """Pairs of a lane in the order in which they are given; `short` if the lane's shards hold no more.

    `begin` and `after` are the places where its reading began and where that of the next one begins.
    """

    pairs: list[Ready]
    begin: dict[str, Any]
    after: dict[str, Any]
    report: Report
    short: bool

    def state(self, given: int) -> dict[str, Any]:
        """Where the lane stands once `given` pairs of this block were given."""
        return self.after if given == len(self.pairs) and not self.short else self.begin | {"taken": given}


class Blocks:
    """Iterates over the blocks of a lane, from `state` up to the lane's quota or the end of its shards.

    Args:
        reading: how.
        epoch, lane: of which the order depends, with reading.seed.
        names: the lane's shards in order, planned ones and then the reserve.
        hub: opens them.
        state: `Block.state` of an earlier reader, for the same arguments; plain values. It holds

            - block, taken: the block to start with, and how many of its pairs were given;
            - index, resume: the shard of `names` where that block begins, and the place in it (`tars.Resume`);
            - counts: of that shard up to there;
            - broken: (index, items) of shards given up in that block, after so many items: though a shard may be
              reachable again, the block must be as it was.
        before_each: called before each item is read; may raise to end the reading.
        before_pair: called before the place of a pair in a block is filled.

    Raises (while iterating):
        KilnError: a shard cannot be read, by `policy.unreachable`; or it is needed to stand where a run stopped.
    """

    def __init__(
        self, reading: Reading, epoch: int, lane: int, names: Sequence[str], hub: Hub,
        state: Mapping[str, Any] | None = None, before_each: Callable[[], None] = lambda: None,
        before_pair: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        state = START | dict(state or {})
        self.reading, self.epoch, self.lane, self.names, self.hub = reading, epoch, lane, list(names), hub
        self.before_each, self.before_pair = before_each, before_pair
        self.number: int = state["block"]
        self.again = state["taken"] > 0  # the block was read before, and told of
        self._index, self._resume = state["index"], Resume(*state["resume"])
        self._counts = dict.fromkeys(COUNTS, 0) | state["counts"]
        self._limits = {index: items for index, items in state["broken"]} if self.again else {}
        self._broken: list[tuple[int, int]] = []
        self._report = Report()
        self._reader: Reader | None = None
        self._passed = self._begun = self._items = 0  # bytes of shards left behind, where this one began, items
        self._pairs = self._read()

    def close(self) -> None:
        """Close the open shard, if there is one."""
        self._pairs.close()

    def __iter__(self) -> Iterator[Block]:
        plan = self.reading.plan
        size, quota = plan.shuffle_buffer, planning.quota(plan.streamed_per_epoch, plan.lanes, self.lane)
        while self.number * size < quota:
            block = self._block(min(size, quota - self.number * size))
            self.number, self.again, self._limits = self.number + 1, False, {}
            yield block
            if block.short:
                return

    def _block(self, size: int) -> Block:
        begin, found = self._place(), []
        self._report, self._broken, self._passed, self._items = Report(), [], 0, 0
        while len(found) < size:
            self.before_pair()
            pair = next(self._pairs, None)
            if pair is None:
                break
            found.append(pair)
        report = self._report
        if self.again:
            report = Report(reread_pairs=report.reread_pairs + self._items, reread_bytes=self._bytes())
        order = epoch_order(len(found), item_seed(self.reading.seed, self.epoch, self.lane), self.number)
        begin["broken"] = list(self._broken)
        after = self._place() | {"block": self.number + 1}
        return Block([found[place] for place in order], begin, after, report, len(found) < size)

    def _place(self) -> dict[str, Any]:
        resume = self._reader.resume if self._reader else self._resume
        return {
            "block": self.number, "taken": 0, "index": self._index, "resume": tuple(resume),
            "counts": dict(self._counts), "broken": [],
        }  # fmt: skip

    def _read(self) -> Iterator[Ready]:
        while self._index < len(self.names):
            name = self.names[self._index]
            try:
                yield from self._shard(name, self._limits.get(self._index))
            except (Unreachable, TarError) as error:
                self._give_up(name, error)
            self._index, self._resume, self._counts = self._index + 1, Resume(), dict.fromkeys(COUNTS, 0)

    def _shard(self, name: str, limit: int | None) -> Iterator[Ready]:
        """Usable train pairs of the current shard, from its place on; `limit` is that of `broken`."""
        if limit is not None and self._read_items() == limit:
            self._broken.append((self._index, limit))
            return
        size, start = self.reading.plan.shards[name]["bytes"], self._resume.offset
        with contextlib.closing(self.hub.open(name, size, self.reading.hashes.get(name), start)) as stream:
            self._stream, self._begun, self._reader = stream, start, Reader(stream, self._resume)
            try:
                yield from self._items_of(name, limit)
            finally:
                self._passed += stream.tell() - start
                self._reader = None

    def _items_of(self, name: str, limit: int | None) -> Iterator[Ready]:
        skipped = 0 if self._resume.offset else self._resume.given
        while True:
            self.before_each()
            if self._read_items() == limit:
                self._broken.append((self._index, limit))
                return
            item = next(self._reader, None)
            if item is None:
                self._report.finished[name] = dict(self._counts)
                return
            if skipped:
                self._report.reread_pairs, skipped = skipped, 0
                self._report.reread_bytes = item.start if isinstance(item, Raw) else self._bytes()
            self._items += 1
            pair = self._keep(name, item)
            if pair is not None:
                yield pair

    def _read_items(self) -> int:
        """Items of the current shard so far: each is in one of these counts."""
        return sum(self._counts[name] for name in ("samples", "rejected", "quarantined"))

    def _bytes(self) -> int:
        """Read since the block began."""
        return self._passed + (self._stream.tell() - self._begun if self._reader else 0)

    def _keep(self, name: str, item: Raw | Bad) -> Ready | None:
        """The pair if it is a usable one of train; else it is counted."""
        reading = self.reading
        if isinstance(item, Bad):
            found = pairs.Rejected(item.key, "quarantined", item.reason)
        else:
            found = pairs.check(item, reading.index, reading.held_out, decode=False)
        if isinstance(found, pairs.Pair):
            if found.side != "train":
                self._count("samples", "held_out")
                return None
            try:
                ready = reading.ready(found, self.epoch)
            except images.ImageError as error:
                found = pairs.Rejected(found.key, "quarantined", f"image: {error}")
            else:
                self._count("samples", "train")
                return ready
        self._count(found.status)
        self._report.rejected.append((name, found.key, found.status, found.reason))
        return None

    def _count(self, *names: str) -> None:
        for name in names:
            self._counts[name] += 1

    def _give_up(self, name: str, error: Unreachable | TarError) -> None:
        reason = error.message if isinstance(error, KilnError) else f"damaged: {error}"
        if self.again:
            raise KilnError(
                f"shard {name}: {reason}; pairs of it were given before the run stopped, and to go on from there it "
                "is needed again",
                "run again once it can be read; nothing is lost until then",
            ) from error
        if self.reading.policy.unreachable == "fail":
            raise error if isinstance(error, KilnError) else KilnError(f"shard {name}: {reason}", OTHERS) from error
        self._broken.append((self._index, self._read_items()))
        self._report.unreachable.append((name, reason, self._counts["train"]))
