"""A long slide through the slide encoder at the published size: memory in chunks against whole attention matrices.

alternative  keys, values and scores of all tiles as tensors, softmax over them: attention as it is written down, in
             Prism's layout with its cached keys
ours         rule `coca_encode_slides`: chunks of tiles, no keys, no values, softmax summed up as it goes

Each run is a process of its own with the same seeded weights and tiles, stored as float16. Counted is what the process
grows by at most: with its tiles, from before they are there, and without them, from where they and the weights are.
Latents must agree within 1e-3, else the exit status is 1.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import coca_models as models
from benchmarks import measure
from scripts.coca import encode_slides
from scripts.coca.perceiver import Perceiver
from scripts.coca.slide_model import encoder_shape
from scripts.common import devices

TARGET, TOLERANCE = 0.25, 1e-3


@torch.inference_mode()
def whole(tiles: Tensor, encoder: Perceiver) -> np.ndarray:
    """[1 + latents, dim] of tiles [N,tile_dim], by attention matrices [latents, N]."""
    layers, x = encoder.perceiver.layers, encoder.perceiver.latents[None]
    tiles, keys = tiles[None].to(x.device).float(), ()
    for number in range(encoder.depth):
        layer = layers[min(number, 1)]["xattn"]
        cross = layer["xattn"]
        keys = cross.keys(tiles) if number < 2 else keys
        key, value = (one[:, 0] for one in keys)
        scores = cross.to_q(cross.x_norm(x)) @ key.transpose(1, 2) * x.shape[-1] ** -0.5
        x = x + cross.to_out(scores.softmax(dim=-1) @ value)
        x = x + layer["ff"](x)
        for block in layers[0]["tf"]:
            x = x + block["mhsa"](x)
            x = x + block["ff"](x)
    return torch.cat([encoder.cls_norm(x[:, :1]), encoder.img_norm(x[:, 1:])], dim=1)[0].cpu().numpy()


def run(place: dict, name: str) -> dict:
    """Encode the slide by one of the two ways, in this process; seconds, and MiB beyond what was there."""
    accelerator = devices.make_accelerator(place["device"], "fp32", place["threads"])
    torch.manual_seed(0)
    encoder = Perceiver(place["tile_dim"], **place["encoder"]).eval().to(accelerator.device)
    few = torch.from_numpy(np.load(place["tiles"], mmap_mode="r")[:64].copy())
    encode(few, encoder, name, place, accelerator)  # libraries take what they need once
    memory = Memory(accelerator.device)
    tiles = torch.from_numpy(np.load(place["tiles"]))
    there = memory.now()
    start = time.perf_counter()
    latents = encode(tiles, encoder, name, place, accelerator)
    seconds, peak = time.perf_counter() - start, memory.peak()
    np.save(f"{place['latents']}_{name}.npy", latents)
    return {"seconds": seconds, "with_tiles": peak - memory.start, "without_tiles": peak - there}


def encode(tiles: Tensor, encoder: Perceiver, name: str, place: dict, accelerator) -> np.ndarray:
    """Latents of tiles by the way `name`."""
    if name == "ours":
        return encode_slides.encode(tiles, encoder, place["chunk"], accelerator)
    return whole(tiles, encoder)


class Memory:
    """MiB of this process, or on a GPU of its tensors there: now, and at most since it was made."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.start = self.now()

    def now(self) -> float:
        return torch.cuda.memory_allocated() / 2**20 if self.cuda else self._status("VmRSS")

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20 if self.cuda else self._status("VmHWM")

    def _status(self, name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def compare(args: argparse.Namespace, root: Path) -> dict:
    """Interleaved runs of both; ends the program if the latents differ."""
    settings = models.shapes(args)[1]
    shape, tile_dim = encoder_shape(settings), 32 if args.smallest else 2560
    rng = np.random.default_rng(0)
    np.save(root / "tiles.npy", rng.standard_normal((args.tiles, tile_dim), np.float32).astype(np.float16))
    place = {
        "device": args.device, "threads": args.threads, "encoder": shape, "tile_dim": tile_dim, "chunk": args.chunk,
        "tiles": str(root / "tiles.npy"), "latents": str(root / "latents"),
    }  # fmt: skip
    made: dict[str, list[dict]] = {"alternative": [], "ours": []}

    def call(name: str) -> float:
        work = f"import json\nfrom benchmarks import coca_encoding as one\nmade = one.run({place!r}, {name!r})\n"
        made[name].append(measure.program(work + "print('\\n' + json.dumps(made))").found)
        return made[name][-1]["seconds"]

    seconds = measure.interleave({name: lambda name=name: call(name) for name in made}, args.runs)
    theirs, mine = (np.load(root / f"latents_{name}.npy") for name in made)
    differs = float(np.abs(theirs - mine).max())
    if not differs <= TOLERANCE:
        sys.exit(f"latents differ by {differs:.2g}, more than {TOLERANCE}")
    peaks = {
        what: {name: max(one[what] for one in runs) for name, runs in made.items()}
        for what in ("with_tiles", "without_tiles")
    }
    shares = {what: values["ours"] / values["alternative"] for what, values in peaks.items()}
    return {
        "model": f"slide encoder {json.dumps(shape)}, tiles of {tile_dim}; the same random weights on both sides",
        "alternative": "the whole attention matrix: keys, values and scores of all tiles, softmax",
        "ours": f"chunks of {args.chunk} tiles", "tiles": args.tiles, "dtype": "fp32, tiles stored as float16",
        "threads": args.threads, "device": args.device, "largest_difference": differs,
        "peak_growth_mib": peaks, "share": shares, "target": TARGET,
        "target_met": shares["with_tiles"] <= TARGET, "target_met_without_tiles": shares["without_tiles"] <= TARGET,
        **measure.ratio(seconds["alternative"], seconds["ours"]), "seconds": seconds,
    }  # fmt: skip
