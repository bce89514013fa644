"""Which pair stands where in an epoch, and which process reads it: arithmetic on the plan alone.

An epoch has two rows of pairs, streamed ones and local ones, both counted from 0. Streamed pair p is pair p // lanes of
lane p % lanes. Of global batch b the streamed pairs come first, then the local ones. The lanes of a process are those
with lane % ranks == rank, so its streamed pairs are those with p % ranks == rank; of the local ones each process gets
what fills its share.
"""

from collections.abc import Sequence
from typing import NamedTuple

from scripts.biomedica.planning import Plan, streamed_until
from scripts.common.errors import KilnError


class Shares(NamedTuple):
    """What one reading process gives of one global batch.

    Attributes:
        streamed: {lane: streamed pairs of the epoch}, ranges in steps of the number of lanes.
        local: local pairs of the epoch.
        streamed_from, local_from: position in the epoch's order of streamed pair 0 and of local pair 0, as seen from
            this batch: add them to a pair's number.
    """

    streamed: dict[int, range]
    local: range
    streamed_from: int
    local_from: int


def check(plan: Plan, ranks: int) -> None:
    """Refuse processes that cannot share batches or lanes evenly.

    Raises:
        KilnError: `ranks` does not divide the batch size, or the lanes of a plan that streams.
    """
    if plan.batch_size % ranks:
        raise KilnError(f"plan.batch_size {plan.batch_size} over {ranks} processes", f"set it to a multiple of {ranks}")
    if plan.streamed_per_epoch and plan.lanes % ranks:
        raise KilnError(
            f"{plan.lanes} lanes over {ranks} processes",
            f"set plan.lanes to a multiple of {ranks}; there are at most as many lanes as shards",
        )


def of_lane(plan: Plan, lane: int, first: int, end: int) -> range:
    """The streamed pairs of a lane among pairs `first` to `end` - 1 of the epoch."""
    return range(first + (lane - first) % plan.lanes, end, plan.lanes)


def lanes_of(plan: Plan, rank: int, ranks: int, worker: int, workers: int) -> list[int]:
    """Lanes that a reading process of a training process reads."""
    return [lane for lane in range(rank, plan.lanes, ranks) if lane // ranks % workers == worker]


def fill(loads: Sequence[int], items: int) -> list[int]:
    """`items` handed out so that loads end as equal as they can: how many each gets."""
    order = sorted(range(len(loads)), key=lambda one: loads[one])
    given = [0] * len(loads)
    for used in range(len(loads), 0, -1):
        level, rest = divmod(items + sum(loads[one] for one in order[:used]), used)
        if level >= loads[order[used - 1]]:
            for place, one in enumerate(order[:used]):
                given[one] = level - loads[one] + (place < rest)
            break
    return given


def shares(plan: Plan, batch: int, rank: int, ranks: int, worker: int, workers: int) -> Shares:
    """The part of global batch `batch` that reading process `worker` of `workers` of a training process gives."""
    first, end = streamed_until(plan, batch), streamed_until(plan, batch + 1)
    start = batch * plan.batch_size
    own = plan.batch_size // ranks
    streamed = [len(range(first + (one - first) % ranks, end, ranks)) for one in range(ranks)]
    local = start - first + sum(own - count for count in streamed[:rank])  # the first local pair of this rank
    loads = [
        sum(len(of_lane(plan, lane, first, end)) for lane in lanes_of(plan, rank, ranks, one, workers))
        for one in range(workers)
    ]
    counts = fill(loads, own - streamed[rank])
    local += sum(counts[:worker])
    lanes = {lane: of_lane(plan, lane, first, end) for lane in lanes_of(plan, rank, ranks, worker, workers)}
    return Shares(lanes, range(local, local + counts[worker]), start - first, end)
