"""How many pairs of an epoch are local and how many are streamed, and which shards each lane reads for them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.biomedica.settings import HeldOutSettings, PlanSettings
from scripts.common import artefacts, hashed
from scripts.common.errors import KilnError

MARGIN = 0.05  # planned shards are expected to hold so much more than is needed: shards hold more or less than the mean


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run trains on. All counts are of pairs of the train side.

    Attributes:
        arm: "hybrid" or "local".
        samples: pairs of an epoch; whole batches, of which `local_per_epoch` and `streamed_per_epoch` are the parts.
        steps: of the whole run; the last epoch may end early.
        dropped: pairs of the target that do not fill a batch. shortfall: those that there are too few for.
        lanes: shards that are read side by side; 0 if nothing is streamed.
        bytes_per_sample: mean bytes of a shard per usable pair of any side, None if nothing is streamed.
        network_bytes_per_epoch: expected; pairs held out are passed over, but come along.
        disk_saved_bytes: what the pairs streamed in an epoch would take on disk.
        local_share, streamed_share: in percent of `samples`.
        shards: {name: {"bytes", "expected_samples"}} of the repo.
        schedule: per epoch, per lane: names of shards in the order in which they are read.
        reserve: the same of the shards that are read if the planned ones hold too little.
        seed: of the order of shards.
    """

    arm: str
    samples: int
    epochs: int
    batch_size: int
    steps_per_epoch: int
    steps: int
    local_per_epoch: int
    streamed_per_epoch: int
    dropped: int
    shortfall: int
    lanes: int
    shuffle_buffer: int
    bytes_per_sample: float | None
    network_bytes_per_epoch: int
    disk_saved_bytes: int
    local_share: float
    streamed_share: float
    seed: int
    shards: dict[str, dict[str, int]]
    schedule: list[list[list[str]]]
    reserve: list[list[list[str]]]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` of them is this plan."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str = "plan.json") -> "Plan":
        """The plan of what `to_json` gave.

        Raises:
            KilnError: other keys.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            odd = sorted(names ^ set(values)) if isinstance(values, Mapping) else type(values).__name__
            raise KilnError(f"{source}: no plan: {odd}", "run biomedica_plan again")
        return cls(**values)

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """The plan in a file of rule biomedica_plan.

        Raises:
            KilnError: missing, or no plan.
        """
        return cls.from_json(artefacts.read_json(path), str(path))


def quota(streamed: int, lanes: int, lane: int) -> int:
    """How many of an epoch's `streamed` pairs are a lane's: streamed pair p is of lane p modulo `lanes`."""
    return streamed // lanes + (lane < streamed % lanes)


def streamed_until(plan: Plan, batch: int) -> int:
    """Streamed pairs of an epoch before global batch `batch` (0 to `steps_per_epoch`), rounded half up.

    So each batch has the planned ratio within one pair, and an epoch has `streamed_per_epoch`.
    """
    return (2 * batch * plan.batch_size * plan.streamed_per_epoch + plan.samples) // (2 * plan.samples)


def epoch_shards(plan: Plan, epoch: int, counts: Mapping[str, int]) -> list[list[str]]:
    """Names of shards of each lane for an epoch (from 0), in the order of reading: planned ones, then the reserve.

    Args:
        counts: {name: pairs of the train side that it really gave}, of shards read whole in earlier epochs. They take
            the place of the estimates from the second epoch on; give the same to all processes.
    """
    if epoch == 0 or not counts:
        planned, reserve = plan.schedule[epoch], plan.reserve[epoch]
    else:
        sizes = {name: counts.get(name, facts["expected_samples"]) for name, facts in plan.shards.items()}
        planned, reserve = _deal(_order(sizes, plan.seed, epoch), sizes, plan.streamed_per_epoch, plan.lanes)
    return [[*own, *more] for own, more in zip(planned, reserve, strict=True)]


def make_plan(
    values: PlanSettings,
    held_out: HeldOutSettings,
    arm: str,
    local: int,
    remote: Sequence[tuple[str, int]],
    bytes_per_sample: float | None,
) -> Plan:
    """The plan of a run.

    Args:
        arm: "hybrid", or "local": local pairs alone, for as many steps as the hybrid plan has.
        local: local pairs of the train side.
        remote: (name, bytes) of the repo's shards.
        bytes_per_sample: mean bytes of a shard per usable pair; None if not measured.

    Raises:
        KilnError: too few pairs for a batch; fewer than wanted, if `values.shortfall` is "fail"; no mean to plan with.
    """
    own, batch = min(local, values.samples), values.batch_size
    wanted = max(values.samples // batch * batch - own, 0)
    sizes = _expected(remote, bytes_per_sample, held_out) if wanted else {}
    lanes = min(values.lanes, len(sizes))
    dealt = [_deal(_order(sizes, values.seed, epoch), sizes, wanted, lanes) for epoch in range(values.epochs)]
    held = min(_capacity(one, sizes) for one in dealt)
    target = values.samples if held >= wanted else own + held
    samples = target // batch * batch
    if target < values.samples and values.shortfall == "fail":
        raise _too_few(values, own, sizes, held, wanted)
    if not samples:
        raise KilnError(
            f"{target} pairs to train on ({own} local), fewer than a batch of {batch}",
            "add shards, set biomedica.remote.repo, or set biomedica.plan.batch_size lower",
        )
    steps, epochs = values.epochs * (samples // batch), values.epochs
    own = min(own, samples)
    if arm == "local":
        target, samples = own, own // batch * batch
        if not samples:
            raise KilnError(
                f"{own} local pairs to train on, fewer than a batch of {batch}",
                "arm local needs local shards: add some, or set biomedica.plan.batch_size lower",
            )
        own, epochs, sizes, lanes = samples, math.ceil(steps / (samples // batch)), {}, 0
    streamed = samples - own
    if streamed != wanted:
        dealt = [_deal(_order(sizes, values.seed, epoch), sizes, streamed, lanes) for epoch in range(epochs)]
    network = round(streamed * bytes_per_sample / _train_share(held_out)) if streamed else 0
    return Plan(
        arm=arm,
        samples=samples,
        epochs=epochs,
        batch_size=batch,
        steps_per_epoch=samples // batch,
        steps=steps,
        local_per_epoch=own,
        streamed_per_epoch=streamed,
        dropped=target - samples,
        shortfall=0 if arm == "local" else values.samples - target,
        lanes=lanes,
        shuffle_buffer=values.shuffle_buffer,
        bytes_per_sample=bytes_per_sample if streamed else None,
        network_bytes_per_epoch=network,
        disk_saved_bytes=network,
        local_share=100 * own / samples,
        streamed_share=100 * streamed / samples,
        seed=values.seed,
        shards={name: {"bytes": size, "expected_samples": sizes[name]} for name, size in sorted(remote) if sizes},
        schedule=[planned for planned, _ in dealt],
        reserve=[reserve for _, reserve in dealt],
    )


def _train_share(held_out: HeldOutSettings) -> float:
    return 1 - held_out.validation - held_out.test


def _expected(
    remote: Sequence[tuple[str, int]], bytes_per_sample: float | None, held_out: HeldOutSettings
) -> dict[str, int]:
    """{name: expected pairs of the train side}."""
    if remote and not bytes_per_sample:
        raise KilnError(
            "no mean size of a pair to plan with: there is no local pair, and none was measured in the repo",
            "run biomedica_list_remote again: it measures the head of the repo's first shard",
        )
    share = _train_share(held_out)
    return {name: int(size / bytes_per_sample * share) for name, size in sorted(remote)}


def _order(sizes: Mapping[str, int], seed: int, epoch: int) -> list[str]:
    """All shards in an order that seed and epoch decide; it stays as it is for the others if one is added."""
    return sorted(sizes, key=lambda name: (hashed.unit(seed, "biomedica", str(epoch), name), name))


def _deal(
    order: Sequence[str], sizes: Mapping[str, int], streamed: int, lanes: int
) -> tuple[list[list[str]], list[list[str]]]:
    """(planned, reserve) shards of each lane: each next shard goes to the lane that lacks most, until all have enough
    for their quota and a margin; those that are left over to the lane with the smallest reserve."""
    planned, reserve = [[] for _ in range(lanes)], [[] for _ in range(lanes)]
    lacks = [quota(streamed, lanes, lane) * (1 + MARGIN) for lane in range(lanes)]
    spare = [0] * lanes
    for name in order:
        lane = max(range(lanes), key=lacks.__getitem__)
        if lacks[lane] > 0:
            planned[lane].append(name)
            lacks[lane] -= sizes[name]
        else:
            lane = min(range(lanes), key=lambda one: (spare[one], len(reserve[one])))
            reserve[lane].append(name)
            spare[lane] += sizes[name]
    return planned, reserve


def _capacity(dealt: tuple[list[list[str]], list[list[str]]], sizes: Mapping[str, int]) -> int:
    """The most streamed pairs of which each lane's shards are expected to hold its quota."""
    held = [sum(sizes[name] for name in (*own, *more)) for own, more in zip(*dealt, strict=True)]
    return min((own * len(held) + lane for lane, own in enumerate(held)), default=0)


def _too_few(values: PlanSettings, own: int, sizes: Mapping[str, int], held: int, wanted: int) -> KilnError:
    total, lanes = sum(sizes.values()), min(values.lanes, len(sizes))
    return KilnError(
        f"{values.samples} pairs are wanted: {own} are local, and {len(sizes)} shards of the repo are expected to hold "
        f"{total} more, of which {held} can be used by {lanes} lanes that read equally many; {wanted} are needed",
        f"set biomedica.plan.samples to at most {own + held}, biomedica.plan.shortfall to fewer"
        + (", or fewer biomedica.plan.lanes" if total >= wanted else ", or add shards"),
    )
