"""A step of rule `rae_train_autoencoder`, in each stage of the schedule.

On a GPU, at the paper's shapes (DINOv2-B with registers, ViT-XL decoder, 256 pixels, S_8 discriminator, LPIPS of
VGG16): images/s, share of the GPU's peak, peak memory; eager against compiled. Pictures lie in memory. FLOPs are those
that a step executes, counted once by torch.utils.flop_counter: products and convolutions, of the frozen models too.
On a CPU, at a demo's shapes: the share of a step that is neither forward nor backward, by clocks around the phases of
a real training that reads its pictures from Arrow.
"""

import argparse
import contextlib
import statistics
import time
import unittest.mock
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure, rae_data
from scripts.common import devices
from scripts.rae import arrow, autoencoder_training, losses
from scripts.rae.autoencoder_training import Fit, TrainingPictures, build_autoencoder, build_discriminator
from scripts.rae.encoder import Encoder
from scripts.rae.perceptual import Lpips
from scripts.rae.settings import AutoencoderSettings, DecoderSettings, DiscriminatorSettings

STAGES = {"before the discriminator": 0, "with the discriminator": 6, "with the GAN": 8}  # and the epoch they start in
STEPS, WARM = 5, 3
DEMO_SIDE, DEMO_IMAGES = 64, 160
DEMO = {
    "encoder": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "image_size": 64},
    "decoder": DecoderSettings(size="free"),
    "disc": DiscriminatorSettings(recipe="free", weights=None),
    "backbone": (8, 16, 32),
    "input": 64,
    "side": DEMO_SIDE,
}
PAPER = {
    "encoder": {}, "decoder": DecoderSettings(), "disc": DiscriminatorSettings(), "backbone": None, "input": 224,
    "side": 256,
}  # fmt: skip


def prepare(root: Path, shapes: dict) -> None:
    """The frozen models, below `root`."""
    rae_data.write_encoder(root / "encoder", **shapes["encoder"])
    if shapes["backbone"] is None:
        rae_data.write_vgg(root / "vgg.pth")
        rae_data.write_dino(root / "dino.pth")


def make_fit(root: Path, shapes: dict, data, device: str, threads: int, workers: int = 0, **settings) -> Fit:
    """A training at `shapes` on what `prepare` wrote."""
    values = AutoencoderSettings(tracker="none", **settings)
    accelerator = devices.make_accelerator(device, values.precision, threads, values.deterministic)
    encoder = Encoder(root / "encoder", shapes["input"])
    stats = torch.zeros(encoder.dim, encoder.grid, encoder.grid)
    published = shapes["backbone"] is None
    return Fit(
        build_autoencoder(encoder, shapes["decoder"], shapes["side"], values, stats, stats + 1),
        build_discriminator(shapes["disc"], root / "dino.pth" if published else None, values.seed),
        Lpips(root / "vgg.pth" if published else None, shapes["backbone"]), data, values, shapes["disc"], accelerator,
        workers,
    )  # fmt: skip


class Steps:
    """Training steps on pictures in memory."""

    def __init__(self, root: Path, shapes: dict, args: argparse.Namespace, compiled: bool):
        self.fit = make_fit(
            root, shapes, range(1000 * args.batch_size), args.device, args.threads, batch_size=args.batch_size,
            precision=args.precision, compile=compiled,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(args.batch_size, 3, shapes["side"], shapes["side"], generator=generator)
        if self.fit.accelerator.device.type == "cuda":
            self.images = self.images.pin_memory()
        self.indices = torch.arange(args.batch_size)

    def seconds(self, epoch: int, steps: int) -> float:
        """Of one step in `epoch`, over `steps` of them."""
        self.fit.at.epoch = epoch

        def work():
            for _ in range(steps):
                self.fit._step(self.images, self.indices)

        return measure.seconds_of(work, self.fit.accelerator.device) / steps

    def flops(self, epoch: int) -> float:
        """Floating-point operations of a step, for one picture."""
        self.fit.at.epoch, few = epoch, min(2, len(self.images))
        with FlopCounterMode(display=False) as counter:
            self.fit._step(self.images[:few], self.indices[:few])
        return counter.get_total_flops() / few


def compare_compiled(args: argparse.Namespace, root: Path, shapes: dict) -> dict:
    """Eager against compiled steps, in turns, stage by stage."""
    prepare(root, shapes)
    cuda, made, flops, warm, peaks = args.device != "cpu", {}, {}, {}, {}
    for name in ("eager", "compiled"):
        before = torch.cuda.memory_allocated() if cuda else 0
        made[name] = Steps(root, shapes, args, name == "compiled")
        peaks[name] = {}
        for stage, epoch in STAGES.items():
            start = time.perf_counter()
            made[name].seconds(epoch, WARM)
            warm.setdefault(name, {})[stage] = time.perf_counter() - start
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                made[name].seconds(epoch, 1)
                peaks[name][stage] = (torch.cuda.max_memory_allocated() - before) / 2**30
            if name == "eager":
                flops[stage] = made[name].flops(epoch)
    found: dict = {
        "model": f"{'DINOv2-B with registers' if not shapes['encoder'] else 'small DINOv2 with registers'}, decoder "
        f"{shapes['decoder'].size}, {shapes['side']} pixels, discriminator {shapes['disc'].recipe}, LPIPS of "
        f"{shapes['backbone'] or 'VGG16'}; random weights",
        "dtype": args.precision, "batch_size": args.batch_size, "peak_tflops": args.peak_tflops, "stages": {},
    }  # fmt: skip
    for stage, epoch in STAGES.items():
        seconds = measure.interleave(
            {name: lambda one=one, epoch=epoch: one.seconds(epoch, STEPS) for name, one in made.items()}, args.runs
        )
        rates = {name: args.batch_size / statistics.median(values) for name, values in seconds.items()}
        found["stages"][stage] = {
            "images_per_second": rates,
            "tflop_per_image": flops[stage] / 1e12,
            "share_of_peak": {name: rate * flops[stage] / (args.peak_tflops * 1e12) for name, rate in rates.items()},
            "peak_gib": {name: values.get(stage) for name, values in peaks.items()},
            "eager_over_compiled": measure.ratio(seconds["eager"], seconds["compiled"]),
            "first_steps_seconds": {name: values[stage] for name, values in warm.items()},
            "seconds_of_a_step": seconds,
        }
    return found


@contextlib.contextmanager
def clocks(fit: Fit) -> Iterator[dict[str, float]]:
    """Seconds in each phase of `fit`'s steps while the block runs."""
    spent = dict.fromkeys(("step", "optimisers", "average", "logging"), 0.0)

    def timed(name: str, work):
        def call(*args, **kwargs):
            start = time.perf_counter()
            found = work(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return found

        return call

    patch = unittest.mock.patch.object
    with (
        patch(fit, "_step", timed("step", fit._step)),
        patch(fit, "_count", timed("logging", fit._count)),
        patch(fit.optimiser, "step", timed("optimisers", fit.optimiser.step)),
        patch(fit.disc_optimiser, "step", timed("optimisers", fit.disc_optimiser.step)),
        patch(autoencoder_training.losses, "update_ema", timed("average", losses.update_ema)),
    ):
        yield spent


def phases(args: argparse.Namespace, root: Path, dataset: Path) -> dict:
    """Shares of a training's time, one epoch for each stage, at a demo's shapes."""
    prepare(root, DEMO)
    data = TrainingPictures(arrow.open_split(dataset, "train"), DEMO_SIDE, 42)
    found = {}
    for workers in sorted({0, args.workers}):
        runs: dict[str, list[dict]] = {stage: [] for stage in STAGES}
        for _ in range(args.runs):
            fit = make_fit(
                root, DEMO, data, args.device, args.threads, workers, batch_size=args.batch_size,
                precision=args.precision, epochs=3, discriminator_start=1, gan_start=2,
            )  # fmt: skip
            stages = iter(STAGES)
            with clocks(fit) as spent:
                mark = [time.perf_counter(), dict(spent)]

                def after_epoch(_fit, spent=spent, mark=mark, stages=stages, runs=runs) -> None:
                    now = time.perf_counter()
                    own = {name: spent[name] - mark[1][name] for name in spent}
                    own["data"] = now - mark[0] - own.pop("step")
                    runs[next(stages)].append({name: value / (now - mark[0]) for name, value in own.items()})
                    mark[:] = [time.perf_counter(), dict(spent)]

                fit.run(lambda _: None, after_epoch)
        found[f"{workers} workers"] = {stage: _shares(values) for stage, values in runs.items()}
    return {
        "model": "DINOv2 with registers, width 64, 2 layers; decoder of width 128, 4 layers; 64 pixels; random weights",
        "dtype": args.precision, "batch_size": args.batch_size, "threads": args.threads,
        "images_of_an_epoch": len(data), "shares": found,
    }  # fmt: skip


def _shares(runs: list[dict]) -> dict:
    made = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    totals = [sum(run.values()) for run in runs]
    return {"not_forward_or_backward": statistics.median(totals), "min": min(totals), "max": max(totals), **made}
