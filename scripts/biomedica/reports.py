"""What the reading of pairs tells beside the pairs."""

import dataclasses
from collections import Counter
from typing import Any

COUNTS = ("samples", "train", "held_out", "rejected", "quarantined")


@dataclasses.dataclass
class Report:
    """What happened since the report before; plain values.

    Attributes:
        lanes: {lane: where its reading stands, to go on from}.
        finished: {shard that was read to its end: {each of `COUNTS`: pairs}}; samples are those of train and held_out.
        rejected: (shard, key, "rejected" or "quarantined", reason) of what gave no pair.
        unreachable: (shard that was given up, reason, pairs of train that it gave before).
        reread_pairs, reread_bytes: what a resumed lane reads again to stand where it stood.
        transfer: {counter of the hub (`remote.Counts`): growth}, such as bytes and retries.
        versions: {shard: version}, of those opened so far.
    """

    lanes: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    finished: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    rejected: list[tuple[str, str, str, str]] = dataclasses.field(default_factory=list)
    unreachable: list[tuple[str, str, int]] = dataclasses.field(default_factory=list)
    reread_pairs: int = 0
    reread_bytes: int = 0
    transfer: Counter[str] = dataclasses.field(default_factory=Counter)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, other: "Report") -> None:
        """Take over what `other` tells; it is the later one."""
        self.lanes |= other.lanes
        self.finished |= other.finished
        self.rejected += other.rejected
        self.unreachable += other.unreachable
        self.reread_pairs += other.reread_pairs
        self.reread_bytes += other.reread_bytes
        self.transfer += other.transfer
        self.versions |= other.versions
