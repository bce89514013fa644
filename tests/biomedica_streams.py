"""What tests of biomedica's reader share: shards with all that shards may hold, a hub in memory, plans by hand."""

import dataclasses
import io
import json
import tarfile
import threading
from collections import Counter

import numpy as np
import torch
from PIL import Image

from scripts.biomedica import sides
from scripts.biomedica.pairs import Pair, caption_id
from scripts.biomedica.planning import Plan
from scripts.biomedica.reading import Reading
from scripts.biomedica.remote import Stats, Unreachable
from scripts.biomedica.settings import HeldOutSettings, IndexSettings, PlanSettings

HELD_OUT = HeldOutSettings(validation=0.1, test=0.1, seed=3)


def jpeg(number: int, size: int = 24) -> bytes:
    """A picture of one colour, which `number` chooses."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (number * 37 % 256, number * 59 % 256, number * 83 % 256)).save(buffer, "JPEG")
    return buffer.getvalue()


def noise(number: int) -> bytes:
    """A JPEG of 40x40 pixels with much more picture than header."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def tar(members: list[tuple[str, bytes]]) -> bytes:
    """A tar file of (name, data)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@dataclasses.dataclass
class Shard:
    """A shard's bytes, and what its maker knows: usable keys of train in the order in which they are whole, counts."""

    data: bytes
    keys: list[str]
    counts: dict[str, int]
    rejected: dict[str, str]


def shard(number: int, pairs: int, odd: bool = True) -> Shard:
    """Shard `number` with `pairs` keys; of an odd one some are bad, some have no json, and members interleave."""
    draw = np.random.default_rng([number, pairs])
    members, kinds = [], {}
    for one in range(pairs):
        key = f"{number}-PMC{number * 1000 + one // 2}-{one}-x"
        kind = draw.choice(["good"] * 6 + ["empty", "broken", "text", "no json", "no text"]) if odd else "good"
        image, text = jpeg(number * 100 + one), f"Caption {one % 7} of shard {number}.".encode()
        if kind == "broken":
            image = noise(number * 100 + one)[:-400]
        text = {"empty": b" \n", "text": b"\xff\xfe"}.get(kind, text)
        own = [(f"{key}.jpg", image), (f"{key}.json", json.dumps({"image_panel_type": ["Plot"]}).encode()),
               (f"{key}.txt", text)]  # fmt: skip
        kinds[key] = kind
        dropped = {"no json": 1, "no text": 2}.get(kind)
        members.append([member for place, member in enumerate(own) if place != dropped])
    if odd:
        members = _interleaved(members, draw)
    flat = [member for own in members for member in own]
    keys, counts, rejected = [], Counter(), {}
    for key in _whole(flat):
        kind = kinds[key]
        if kind in ("empty", "broken", "text", "no text"):
            held = sides.side_of(sides.article_of(key), HELD_OUT) != "train"
            if kind == "broken" and held:  # its image is not decoded
                counts.update(["samples", "held_out"])
                continue
            status = "rejected" if kind == "empty" else "quarantined"
            counts[status] += 1
            rejected[key] = status
            continue
        side = sides.side_of(sides.article_of(key), HELD_OUT)
        counts.update(["samples", "train" if side == "train" else "held_out"])
        if side == "train":
            keys.append(key)
    names = ("samples", "train", "held_out", "rejected", "quarantined")
    return Shard(tar(flat), keys, {name: counts[name] for name in names}, rejected)


def _interleaved(members: list[list], draw: np.random.Generator) -> list[list]:
    """Here and there the members of two neighbouring keys take turns."""
    done, place = [], 0
    while place < len(members):
        if draw.random() < 0.3 and place + 1 < len(members):
            mixed = members[place] + members[place + 1]
            done.append([mixed[one] for one in draw.permutation(len(mixed))])
            place += 2
        else:
            done.append(members[place])
            place += 1
    return done


def _whole(members: list[tuple[str, bytes]]) -> list[str]:
    """Keys in the order in which a reader has all three members, then those that lack one."""
    seen, done = Counter(), []
    for name, _ in members:
        key = name.rpartition(".")[0]
        seen[key] += 1
        if seen[key] == 3:
            done.append(key)
    return done + [key for key in seen if seen[key] < 3]


class MemoryHub:
    """Shards in memory. `breaks` says after how many bytes a shard becomes unreachable; `opened` what was asked for."""

    def __init__(self, shards: dict[str, Shard], breaks: dict[str, int] | None = None):
        self.data = {name: one.data for name, one in shards.items()}
        self.breaks, self.opened, self.files = dict(breaks or {}), [], []
        self.stats, self.versions = Stats(), {}
        self.hangs: str | None = None  # a shard that waits for `close` instead of giving bytes
        self.closed = threading.Event()

    def __copy__(self) -> "MemoryHub":
        made = MemoryHub({})
        made.data, made.breaks, made.opened, made.files = self.data, self.breaks, self.opened, self.files
        made.hangs = self.hangs
        return made

    def __reduce__(self):
        return _memory_hub, (self.data, self.breaks)

    def open(self, name: str, bytes: int, sha256: str | None = None, start: int = 0) -> "MemoryFile":
        assert bytes == len(self.data[name])
        self.opened.append((name, start))
        self.files.append(MemoryFile(self, name, start))
        self.versions[name] = "1"
        if self.breaks.get(name) == -1:
            raise Unreachable(f"shard {name} is away", "wait")
        return self.files[-1]

    def close(self) -> None:
        self.closed.set()


def _memory_hub(data: dict[str, bytes], breaks: dict[str, int]) -> MemoryHub:
    made = MemoryHub({}, breaks)
    made.data = data
    return made


class MemoryFile:
    """Of `MemoryHub`."""

    def __init__(self, hub: MemoryHub, name: str, start: int):
        self.hub, self.name, self.stream = hub, name, io.BytesIO(hub.data[name])
        self.stream.seek(start)

    def tell(self) -> int:
        return self.stream.tell()

    def read(self, size: int = -1) -> bytes:
        if self.hub.hangs == self.name:
            self.hub.closed.wait()
            raise ValueError("read from a closed hub")
        end = self.hub.breaks.get(self.name)
        if end is not None and self.tell() + size > end:
            raise Unreachable(f"shard {self.name} is away", "wait")
        data = self.stream.read(size)
        self.hub.stats.add(bytes=len(data))
        return data

    def close(self) -> None:
        self.stream.close()


class MemoryLocal:
    """Local pairs in memory, as `LocalPairs` gives them."""

    def __init__(self, pairs: int):
        self.pairs = [
            Pair(f"l-PMC{one}-0-x", f"PMC{one}", "train" if one % 5 else "test", f"Local {one}.",
                 caption_id(f"Local {one}."), jpeg(one), 24, 24, "Plot", "unknown")
            for one in range(pairs)
        ]  # fmt: skip

    def rows(self, side: str) -> np.ndarray:
        return np.array([row for row, pair in enumerate(self.pairs) if pair.side == side], np.int64)

    def read(self, row: int) -> Pair:
        return self.pairs[row]


def transform(image: Image.Image, seed: int) -> torch.Tensor:
    """uint8 [3,4,4] that tells the image's colour and the seed."""
    colour = torch.tensor(image.getpixel((5, 5)), dtype=torch.uint8)
    return colour[:, None, None] + torch.tensor(list(seed.to_bytes(8))[-4:], dtype=torch.uint8).repeat(3, 4, 1)


def tokenize(captions) -> torch.Tensor:
    """int64 [n,6]: the first bytes of each caption's name."""
    return torch.tensor([list(f"{caption_id(one):6d}"[-6:].encode()) for one in captions], dtype=torch.int64)


def make_plan(
    batch_size: int, batches: int, streamed: int, lanes: int, shuffle_buffer: int, schedule: list[list[str]],
    shards: dict[str, Shard], reserve: list[list[str]] | None = None, epochs: int = 2,
) -> Plan:  # fmt: skip
    """A plan with these numbers; every later epoch reads each lane's shards the other way round."""
    samples = batch_size * batches
    planned = [[own[:: 1 if epoch == 0 else -1] for own in schedule] for epoch in range(epochs)]
    return Plan(
        arm="hybrid", samples=samples, epochs=epochs, batch_size=batch_size, steps_per_epoch=batches,
        steps=epochs * batches, local_per_epoch=samples - streamed, streamed_per_epoch=streamed, dropped=0,
        shortfall=0, lanes=lanes, shuffle_buffer=shuffle_buffer, bytes_per_sample=1.0, network_bytes_per_epoch=0,
        disk_saved_bytes=0, local_share=0.0, streamed_share=0.0, seed=1,
        shards={name: {"bytes": len(one.data), "expected_samples": 10} for name, one in shards.items()},
        schedule=planned, reserve=[reserve or [[] for _ in schedule]] * epochs,
    )  # fmt: skip


def make_reading(plan: Plan, prefetch: int = 3, unreachable: str = "fail", shortfall: str = "fail") -> Reading:
    """Of pairs as this module makes them."""
    policy = PlanSettings(unreachable=unreachable, shortfall=shortfall)
    return Reading(plan, 11, IndexSettings(), HELD_OUT, policy, prefetch, transform, tokenize)


def lane_threads() -> list[threading.Thread]:
    """Threads of lanes that are there."""
    return [thread for thread in threading.enumerate() if thread.name == "lane"]
