"""Batches of local and streamed pairs, mixed within each batch in the plan's ratio.

The order of an epoch is a pure function of seed and epoch (and of the shards' contents): neither the number of
processes nor that of their workers moves a pair. Each worker reads its lanes of streamed pairs by a thread each
(`lanes`), and local pairs where it has fewer streamed ones than others. webdataset is not used for this: its shuffle
depends on how workers are scheduled, and it has no place to go on from in mid-epoch. A worker holds at most
lanes * (2 * shuffle_buffer + prefetch) pairs of its lanes, and torch's DataLoader two batches of each worker.
"""

import contextlib
import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from scripts.biomedica import planning, positions
from scripts.biomedica.blocks import Blocks
from scripts.biomedica.lanes import Lane
from scripts.biomedica.local import LocalPairs
from scripts.biomedica.reading import Reading, Ready
from scripts.biomedica.remote import Hub
from scripts.biomedica.reports import Report
from scripts.common.data_order import epoch_order
from scripts.common.errors import KilnError
from scripts.common.images import ImageError
from scripts.common.listed_images import unwrapped


class Batch(NamedTuple):
    """A process's share of a global batch, in the epoch's order.

    Attributes:
        images: uint8 [n,3,S,S].
        tokens: int64 [n,T].
        caption_ids: int64 [n]; equal captions have equal ids.
        positions: int64 [n], in the epoch.
        streamed: bool [n]; the others are local.
        keys: n of them.
        report: what the reading told since the batch before.

    One without pairs, which is not `whole`, ends an epoch for which the shards hold too few: if one process gets it,
    none may train on this batch.
    """

    images: Tensor
    tokens: Tensor
    caption_ids: Tensor
    positions: Tensor
    streamed: Tensor
    keys: list[str]
    report: Report

    @property
    def whole(self) -> bool:
        """Whether all pairs are there, or none."""
        return len(self.keys) > 0


@dataclasses.dataclass(frozen=True)
class Part:
    """What a worker gives of a batch; `batch` is None without pairs, `short` says that pairs are missing."""

    batch: Batch | None
    report: Report
    short: bool


class Parts(IterableDataset):
    """`Part`s of each batch from `start_batch` on, or a KilnError; in a worker those of this worker.

    Arguments are those of `Loader`.
    """

    def __init__(
        self, reading: Reading, local: LocalPairs | None, hub: Hub | None, epoch: int, rank: int,
        ranks: int, start_batch: int, lane_states: Mapping[int, dict[str, Any]],
        counts: Mapping[str, int],
    ):  # fmt: skip
        self.reading, self.local, self.hub = reading, local, hub
        self.epoch, self.rank, self.ranks = epoch, rank, ranks
        self.start_batch, self.lane_states, self.counts = start_batch, dict(lane_states), dict(counts)

    def __iter__(self) -> Iterator[Part | KilnError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            with contextlib.ExitStack() as stack:
                yield from self._parts(worker, workers, stack)
        except KilnError as error:
            yield error

    def _parts(self, worker: int, workers: int, stack: contextlib.ExitStack) -> Iterator[Part]:
        plan = self.reading.plan
        numbers = positions.lanes_of(plan, self.rank, self.ranks, worker, workers)
        hub = copy.copy(self.hub) if numbers else None
        lanes = {lane: stack.enter_context(contextlib.closing(self._lane(lane, hub))) for lane in numbers}
        if hub is not None:
            stack.callback(hub.close)  # before the lanes, which may wait for it
        order = self._local_order()
        sent: Counter[str] = Counter()
        versions = dict(hub.versions) if hub else {}
        for number in range(self.start_batch, plan.steps_per_epoch):
            shares = positions.shares(plan, number, self.rank, self.ranks, worker, workers)
            report, found = Report(), []
            short = False
            for lane, numbers_of in shares.streamed.items():
                taken = lanes[lane].take(len(numbers_of), report)
                short |= len(taken) < len(numbers_of)
                found += [(shares.streamed_from + p, True, one) for p, one in zip(numbers_of, taken, strict=False)]
                report.lanes[lane] = lanes[lane].state
            found += [(shares.local_from + j, False, self._local(order[j])) for j in shares.local]
            if hub is not None:
                now = Counter(hub.stats.read()._asdict())
                report.transfer, sent = now - sent, now
                seen = dict(hub.versions)
                report.versions, versions = dict(seen.items() - versions.items()), seen
            yield Part(self._stack(found, report) if found and not short else None, report, short)

    def _lane(self, lane: int, hub: Hub) -> Lane:
        reading, plan = self.reading, self.reading.plan
        names = planning.epoch_shards(plan, self.epoch, self.counts)[lane]
        state = self.lane_states.get(lane)
        at = state["block"] * plan.shuffle_buffer + state["taken"] if state else 0
        if at != planning.quota(planning.streamed_until(plan, self.start_batch), plan.lanes, lane):
            raise ValueError(f"lane {lane} stands after {at} pairs, which is not where batch {self.start_batch} begins")

        def make(before_each: Callable[[], None], before_pair: Callable[[], None]) -> Blocks:
            return Blocks(reading, self.epoch, lane, names, hub, state, before_each, before_pair)

        return Lane(2 * plan.shuffle_buffer + reading.prefetch, make, state)

    def _local_order(self) -> np.ndarray:
        """Rows of the local pairs of this epoch."""
        plan = self.reading.plan
        if not plan.local_per_epoch:
            return np.empty(0, np.int64)
        rows = self.local.rows("train")
        return rows[epoch_order(len(rows), self.reading.seed, self.epoch)[: plan.local_per_epoch]]

    def _local(self, row: int) -> Ready:
        pair = self.local.read(int(row))
        try:
            return self.reading.ready(pair, self.epoch)
        except ImageError as error:
            raise KilnError(
                f"local pair {pair.key}: usable when it was indexed, now: {error}",
                "run again: the folder is scanned anew, and what is done stays done",
            ) from None

    def _stack(self, found: list[tuple[int, bool, Ready]], report: Report) -> Batch:
        found.sort(key=lambda one: one[0])
        pairs = [pair for _, _, pair in found]
        return Batch(
            torch.stack([pair.image for pair in pairs]),
            self.reading.tokenize([pair.caption for pair in pairs]),
            torch.tensor([pair.caption_id for pair in pairs]),
            torch.tensor([position for position, _, _ in found]),
            torch.tensor([streamed for _, streamed, _ in found]),
            [pair.key for pair in pairs],
            report,
        )


class Loader:
    """Iterates over this process's batches of an epoch; to be closed where it is left early (`contextlib.closing`).

    Args:
        reading: how pairs are read.
        local: pairs on disk; None if the plan has none.
        hub: of the shards; None if the plan streams nothing. It learns the versions of shards (`Hub.versions`), by which
            later epochs see that a shard has changed; each process that reads uses a copy.
        epoch: from 0.
        rank, ranks: of the training processes.
        workers: processes that read; 0: this one reads.
        start_batch: first global batch of the epoch.
        lane_states: {lane: state} for `start_batch` > 0, as the reports of the batches before it told, of this process
            at least.
        counts: {shard: its counts} as `Report.finished` of earlier epochs told, the same for all processes.

    Raises:
        KilnError: `ranks` does not divide lanes or batch size; while iterating also what a shard, a local pair or the
            hub raise, and a shortfall by `policy.shortfall`.
    """

    def __init__(
        self, reading: Reading, local: LocalPairs | None, hub: Hub | None, epoch: int, rank: int = 0,
        ranks: int = 1, workers: int = 0, start_batch: int = 0,
        lane_states: Mapping[int, dict[str, Any]] | None = None,
        counts: Mapping[str, Mapping[str, int]] | None = None,
    ):  # fmt: skip
        positions.check(reading.plan, ranks)
        self.plan, self.policy, self.start_batch, self.workers = reading.plan, reading.policy, start_batch, workers
        known = {name: one["train"] for name, one in (counts or {}).items()}
        self.parts = Parts(reading, local, hub, epoch, rank, ranks, start_batch, lane_states or {}, known)

    def __len__(self) -> int:
        return self.plan.steps_per_epoch - self.start_batch

    def __iter__(self) -> Iterator[Batch]:
        # in this process without torch's DataLoader, whose iterator cannot be closed
        parts = iter(self._data_loader() if self.workers else self.parts)
        try:
            for number in range(self.start_batch, self.plan.steps_per_epoch):
                own = [unwrapped(next(parts)) for _ in range(max(self.workers, 1))]
                report = Report()
                for part in own:
                    report.add(part.report)
                if self.parts.hub is not None:
                    self.parts.hub.versions.update(report.versions)
                if any(part.short for part in own):
                    if self.policy.shortfall == "fail":
                        raise self._too_few(number)
                    yield Batch(*[torch.empty(0)] * 5, [], report)
                    return
                yield join([part.batch for part in own if part.batch is not None], report)
        finally:
            if self.workers == 0:
                parts.close()
            del parts  # its workers end

    def _data_loader(self) -> DataLoader:
        own = torch.Generator()  # so that making workers does not move torch's global one
        return DataLoader(self.parts, batch_size=None, num_workers=self.workers, generator=own)

    def _too_few(self, batch: int) -> KilnError:
        plan = self.plan
        return KilnError(
            f"batch {batch + 1} of {plan.steps_per_epoch}: the shards of a lane, with those in reserve, hold fewer pairs "
            f"than planned; {batch * plan.batch_size} of {plan.steps_per_epoch * plan.batch_size} pairs of the epoch "
            "were there",
            "set plan.samples lower, or plan.shortfall to fewer, which ends such an epoch early",
        )


def join(parts: list[Batch], report: Report) -> Batch:
    """One batch in the order of positions."""
    if len(parts) == 1:
        return parts[0]._replace(report=report)
    order = torch.cat([part.positions for part in parts]).argsort()
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    joined = []
    for field in ("images", "tokens", "caption_ids", "positions", "streamed"):
        columns = [getattr(part, field) for part in parts]
        whole = columns[0].new_empty((len(order), *columns[0].shape[1:]))
        for column, place in zip(columns, places.split([len(column) for column in columns]), strict=True):
            whole[place] = column  # one copy: images are large
        joined.append(whole)
    keys = [key for part in parts for key in part.keys]
    return Batch(*joined, [keys[one] for one in order.tolist()], report)
