"""What the parts of benchmark `coca` share: both models with the same weights, drawn pairs, and a step of each."""

import argparse
import gc
from collections.abc import Callable, Iterator

import coca_pytorch
import numpy as np
import torch
from torch import Tensor

from benchmarks import measure
from scripts.coca import batches, training
from scripts.coca.model import CoCa
from scripts.coca.pairs import Batch, Collate, Pair
from scripts.coca.settings import EncoderSettings, ModelSettings, TrainSettings
from scripts.coca.slide_model import SlideModel
from scripts.common import devices

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 8000
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
ORIGINAL = {"lr": 1e-4, "weight_decay": 0.01}  # as published


def shapes(args: argparse.Namespace) -> tuple[ModelSettings, EncoderSettings, int]:
    """Settings of model and slide encoder, and the vocabulary: the published ones, or the smallest."""
    if not args.smallest:
        return ModelSettings(), EncoderSettings(), VOCABULARY
    model = {"dim": 64, "unimodal_depth": 1, "multimodal_depth": 1, "dim_latents": 32, "image_queries": 8,
             "dim_head": 16, "heads": 2}  # fmt: skip
    encoder = {"dim": 32, "latents": 16, "depth": 3, "transformer_depth": 1, "heads": 2}
    return ModelSettings(**model), EncoderSettings(**encoder), 100


def described(args: argparse.Namespace) -> str:
    """The model, for headers."""
    model, encoder, vocabulary = shapes(args)
    return (
        f"CoCa of width {model.dim}, {model.unimodal_depth} + {model.multimodal_depth} layers, latents of "
        f"{model.dim_latents}, {model.image_queries} + 1 image queries, vocabulary {vocabulary}; {encoder.latents} "
        f"image tokens of {encoder.dim}; the same random weights on both sides"
    )


def original(args: argparse.Namespace) -> coca_pytorch.CoCa:
    """The package's model with seeded random weights, on the device; models of an earlier comparison go first."""
    gc.collect()
    model, encoder, vocabulary = shapes(args)
    values = model.model_dump()
    queries = values.pop("image_queries")
    torch.manual_seed(0)
    made = coca_pytorch.CoCa(
        **values, num_tokens=vocabulary, num_img_queries=queries, image_dim=encoder.dim, pad_id=PAD
    )  # fmt: skip
    return made.to(args.device)


def ours(args: argparse.Namespace, weights: dict[str, Tensor]) -> CoCa:
    """Our model with the weights of the package's, on the device."""
    model, encoder, vocabulary = shapes(args)
    made = CoCa(vocabulary, **model.model_dump(), image_dim=encoder.dim, pad_id=PAD)
    made.load_state_dict(weights)
    return made.to(args.device)


class Drawn:
    """Pairs of random image tokens and random texts of given lengths, marks included, as `pairs.Pairs` has them.

    Image tokens are those of a few slides over and over: memory must not grow with the pairs.
    """

    def __init__(self, args: argparse.Namespace, lengths: np.ndarray):
        encoder, vocabulary = shapes(args)[1:]
        rng = np.random.default_rng(0)
        self.ids = [np.array([BOS, *rng.integers(EOS + 1, vocabulary, n - 2), EOS]) for n in lengths]
        self.slides = torch.randn(8, encoder.latents, encoder.dim, generator=torch.Generator().manual_seed(0))
        self.tokens, self.codes = np.asarray(lengths, np.int64), np.arange(len(lengths))
        self.images, self.names = self, [str(number) for number in range(len(lengths))]
        self.sizes = np.full(len(lengths), encoder.latents)

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, members: np.ndarray, length: int | None = None) -> Batch:
        """Pairs, texts padded to the longest or to `length`."""
        made = Collate(PAD)([Pair(self.slides[one % 8], torch.from_numpy(self.ids[one])) for one in members])
        missing = 0 if length is None else length - made.ids.shape[1]
        return made._replace(ids=torch.nn.functional.pad(made.ids, (0, missing), value=PAD))


class Ours:
    """Optimiser steps as rule `coca_train` makes them, on stored latents."""

    def __init__(self, args: argparse.Namespace, weights: dict[str, Tensor], data: Drawn, compiled: bool = False):
        accelerator = devices.make_accelerator(args.device, args.precision, args.threads)
        values = TrainSettings(
            batch_size=args.batch_size, lr=ORIGINAL["lr"], final_lr=ORIGINAL["lr"], warmup=0,
            weight_decay=ORIGINAL["weight_decay"], betas=(0.9, 0.999), clip_grad=0, precision=args.precision,
            compile=compiled, tracker="none",
        )  # fmt: skip
        self.data, self.model = data, ours(args, weights)
        self.fit = training.Fit(SlideModel(None, self.model), data, data, values, accelerator, 0)
        self.fit.model.train()
        self.clock = OptimiserClock(self.fit.optimiser, self.fit.device)

    def step(self, members: np.ndarray, length: int | None = None) -> None:
        """One step on pairs; texts are padded to `length`, or to the longest of each pass."""
        passes = self.fit._passes(self.data, members)

        def stream() -> Iterator[Batch]:
            for one in passes * (2 if len(passes) > 1 else 1):
                yield self.data.batch(one, length).to(self.fit.device)

        self.fit._step(members, len(passes), stream())


class Original:
    """Optimiser steps as one writes them around the package: its own loss, AdamW, no clipping."""

    def __init__(self, args: argparse.Namespace, model: coca_pytorch.CoCa, data: Drawn, compiled: bool = False):
        self.data, self.model, self.device = data, model, torch.device(args.device)
        self.dtype = None if args.precision == "fp32" else devices.DTYPES[args.precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.precision == "fp16")
        if compiled:
            self.model.compile(dynamic=True)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), **ORIGINAL)
        self.clock = OptimiserClock(self.optimiser, self.device)

    def loss(self, batch: Batch) -> Tensor:
        """The package's caption and contrastive losses."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            return self.model(batch.ids, image_tokens=batch.tiles, return_loss=True)

    def step(self, members: np.ndarray, length: int | None = None) -> None:
        """One step on pairs; texts are padded to `length`, or to the longest."""
        loss = self.loss(self.data.batch(members, length).to(self.device))
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()
        loss.item()  # as every loop does, to log it


class OptimiserClock:
    """Counts the seconds of an optimiser's steps."""

    def __init__(self, optimiser, device: torch.device):
        self.seconds, step = 0.0, optimiser.step

        def timed(*given, **named):
            self.seconds += measure.seconds_of(lambda: step(*given, **named), device)

        optimiser.step = timed


def products_share(work: Callable[[], object]) -> float:
    """Share of matrix products in the time of all operators of `work`, on the device."""
    with torch.profiler.profile() as seen:
        work()
    spent = {one.key: (one.self_device_time_total, one.self_cpu_time_total) for one in seen.key_averages()}
    which = 0 if any(device for device, _ in spent.values()) else 1
    operators = {name: times[which] for name, times in spent.items() if name.startswith("aten::")}
    return sum(operators.get(f"aten::{name}", 0) for name in PRODUCTS) / sum(operators.values())


def time_steps(side: Ours | Original, work: Callable[[], object]) -> dict[str, float]:
    """{"all": seconds of `work`, "optimiser": those of the optimiser's steps in it}."""
    device = side.fit.device if isinstance(side, Ours) else side.device
    side.clock.seconds = 0.0
    return {"all": measure.seconds_of(work, device), "optimiser": side.clock.seconds}


def epoch(data: Drawn, batch_size: int) -> list[np.ndarray]:
    """The first epoch's batches, of like lengths each."""
    return batches.epoch_batches(training.lengths(data), batch_size, 42, 0)
