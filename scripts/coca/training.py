"""Optimisation of a CoCa model, with or without its slide encoder: all that decides the weights, and nothing else.

Messages, files and command line lie in `train`, so that editing those retrains nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from scripts.coca import batches, contrastive, losses
from scripts.coca.batches import Budget, Lengths
from scripts.coca.pairs import Batch, Collate, Pairs
from scripts.coca.settings import TrainSettings
from scripts.coca.slide_model import SlideModel
from scripts.common import retrieval
from scripts.common.contrastive import sum_gradients
from scripts.common.errors import KilnError
from scripts.common.listed_images import unwrapped
from scripts.common.schedules import learning_rate

KS = (1, 5, 10)


@dataclasses.dataclass
class Progress:
    """Where training stands; plain values and tensors, so that it can be saved and loaded safely."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best_epoch: int = -1
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def lengths(pairs: Pairs) -> Lengths:
    """Of `pairs`, for batches."""
    return Lengths(pairs.images.sizes, pairs.tokens)


def check_batches(train: Pairs, validation: Pairs, values: TrainSettings, ranks: int) -> None:
    """Refuse what no batch can be made of; see `batches.check`."""
    budget = Budget(values.max_tiles, values.max_tokens)
    batches.check(lengths(train), values.batch_size, budget, ranks, train.names)
    batches.check(lengths(validation), 1, budget, 1, validation.names)


def parameter_groups(model: SlideModel, values: TrainSettings) -> list[dict[str, Any]]:
    """Trainable parameters of CoCa and of the slide encoder, if there is one: those that decay, and the others.

    Matrices of weights decay. An embedding's weight does not, though a linear layer shares it, nor do learnt queries
    and latents. `peak` is the group's greatest learning rate.
    """
    groups = []
    for part, peak in ((model.coca, values.lr), (model.encoder, values.encoder_lr or values.lr)):
        if part is None:
            continue
        embeddings = {module.weight for module in part.modules() if isinstance(module, nn.Embedding)}
        trainable = {name: p for name, p in part.named_parameters() if p.requires_grad}
        matrices = {p for name, p in trainable.items() if name.endswith("weight") and p.ndim > 1} - embeddings
        for decay, params in (
            (values.weight_decay, [p for p in trainable.values() if p in matrices]),
            (0.0, [p for p in trainable.values() if p not in matrices]),
        ):
            groups.append({"params": params, "weight_decay": decay, "peak": peak})
    return groups


class Fit:
    """One training run over the pairs of the train side, its weights chosen on the validation side.

    Args:
        model: with an encoder where tiles are given, without where latents are.
        train, validation: pairs.
        values: numerics.
        accelerator: device, precision and processes.
        workers: processes that read slides.
        loss: `losses.loss_terms`, or what replaces it.
    """

    def __init__(
        self, model: SlideModel, train: Pairs, validation: Pairs, values: TrainSettings, accelerator: Accelerator,
        workers: int, loss: Callable[..., dict[str, Tensor]] = losses.loss_terms,
    ):  # fmt: skip
        self.train, self.validation, self.values, self.loss = train, validation, values, loss
        self.accelerator, self.workers, self.device = accelerator, workers, accelerator.device
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.model = model.to(self.device)
        if values.compile:
            self.model.compile(dynamic=True)
        groups = parameter_groups(model, values)
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimiser = accelerator.prepare(torch.optim.AdamW(groups, lr=values.lr, betas=values.betas, fused=True))
        self.budget = Budget(values.max_tiles, values.max_tokens)
        self.at = Progress()

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return batches.count(len(self.train), self.values.batch_size)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, but for the random generators.

        Raises:
            KilnError: a weight is not finite, so that this would be no good state.
        """
        for name, weight in self.model.named_parameters():
            self._require_finite(f"the largest {name}", weight.detach().abs().max().item(), {})
        scaler = self.accelerator.scaler
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
            "progress": {field.name: getattr(self.at, field.name) for field in dataclasses.fields(self.at)},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.at = Progress(**state["progress"])

    def run(self, after_step: Callable[["Fit"], None], after_epoch: Callable[["Fit"], None]) -> None:
        """Train to the last epoch; `after_epoch` may report and keep weights, `after_step`, then, save."""
        while self.at.epoch < self.values.epochs:
            self._epoch(after_step, after_epoch)

    def _epoch(self, after_step: Callable[["Fit"], None], after_epoch: Callable[["Fit"], None]) -> None:
        at, values = self.at, self.values
        every = batches.epoch_batches(lengths(self.train), values.batch_size, values.seed, at.epoch)
        left = every[at.batch :]
        parts = [self._passes(self.train, batches.share(batch, self.rank, self.ranks)) for batch in left]
        stream = self._stream(self.train, batches.Passes(parts, at.epoch, twice=True))
        self.model.train()
        for batch, own in zip(left, parts, strict=True):
            self._step(batch, len(own), stream)
            at.batch, at.step = at.batch + 1, at.step + 1
            if at.batch < len(every):
                after_step(self)
        self._close_epoch(len(every))
        after_epoch(self)
        after_step(self)

    def _passes(self, pairs: Pairs, members: np.ndarray) -> list[np.ndarray]:
        return batches.passes(members, lengths(pairs), self.budget)

    def _stream(self, pairs: Pairs, sampler: batches.Passes) -> Iterator[Batch]:
        loader = DataLoader(
            pairs, batch_sampler=sampler, num_workers=self.workers, collate_fn=Collate(self.model.coca.pad_id),
            pin_memory=self.device.type == "cuda", generator=torch.Generator(),
        )  # fmt: skip
        for batch in loader:
            yield unwrapped(batch).to(self.device)

    def _forward(self, batch: Batch, captions: bool):
        with self.accelerator.autocast():
            return self.model(batch.ids, batch.tiles, batch.mask, captions=captions)

    def _step(self, batch: np.ndarray, passes: int, stream: Iterator[Batch]) -> None:
        """An optimiser step.

        Args:
            batch: the global batch's pairs.
            passes: of this process.
            stream: gives them.
        """
        values, scale, found = self.values, self.model.coca.temperature, {}
        tokens = int((self.train.tokens[batch] - 1).sum())
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(group["peak"])

        def encode(part: Batch) -> contrastive.Latents:
            out = self._forward(part, captions=False)
            return out.text_latents, out.image_latents

        def terms(part: Batch) -> tuple[Tensor, Tensor, Tensor]:
            out = self._forward(part, captions=True)
            own = self.loss(
                logits=out.logits, ids=part.ids, pad_id=self.model.coca.pad_id, tokens=tokens,
                caption_weight=values.caption_weight,
            )  # fmt: skip
            for name, value in own.items():
                found[name] = found.get(name, 0) + value.detach()
            return out.text_latents, out.image_latents, sum(own.values())

        same = self._same(batch)

        def loss(text: Tensor, image: Tensor, scale: Tensor) -> Tensor:
            return sum(self._contrast(text, image, scale, same).values())

        sides = contrastive.Sides(
            tuple(len(batches.share(batch, rank, self.ranks)) for rank in range(self.ranks)), self.rank
        )
        _, contrast = contrastive.backward(stream, passes, encode, terms, scale, loss, sides, self.accelerator.backward)
        if self.ranks > 1:
            sum_gradients(self.parameters)
        means = self._summed(found) | {"contrastive": contrast.item()}
        self._require_finite("loss", sum(means.values()), means)
        if values.clip_grad:
            norm = self.accelerator.clip_grad_norm_(self.parameters, values.clip_grad)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.accelerator.scaler is None:
            self._require_finite("the gradient's norm", float(norm), means)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        for name, value in means.items():
            self.at.sums[name] = self.at.sums.get(name, 0.0) + value

    def _rate(self, peak: float) -> float:
        values = self.values
        steps = values.epochs * self.steps_per_epoch
        warmup = min(round(values.warmup * steps), steps - 1)
        return learning_rate(self.at.step, steps, warmup, peak, min(values.final_lr, peak))

    def _same(self, batch: np.ndarray) -> Tensor | None:
        """Which pairs of the gathered latents have equal texts; None where that makes no difference."""
        if self.values.same_text_negatives:
            return None
        shares = [batches.share(batch, rank, self.ranks) for rank in range(self.ranks)]
        order = np.concatenate([part for one in shares for part in self._passes(self.train, one)])
        return contrastive.same(torch.from_numpy(self.train.codes[order])).to(self.device)

    def _contrast(self, text: Tensor, image: Tensor, scale: Tensor, same: Tensor | None) -> dict[str, Tensor]:
        return self.loss(
            text_latents=text, image_latents=image, log_scale=scale, same=same,
            contrastive_weight=self.values.contrastive_weight,
        )  # fmt: skip

    def _summed(self, found: dict[str, Tensor]) -> dict[str, float]:
        """Scalars added up over processes."""
        values = torch.stack([value.double() for value in found.values()])
        return dict(zip(found, self.accelerator.reduce(values, "sum").tolist(), strict=True))

    def _require_finite(self, what: str, value: float, terms: dict[str, float]) -> None:
        if math.isfinite(value):
            return
        at = self.at
        found = ", ".join(f"{name} {one:.4g}" for name, one in terms.items())
        raise KilnError(
            f"{what} is {value} at step {at.step}, epoch {at.epoch}, batch {at.batch} (counted from 0)"
            + (f": {found}" if found else ""),
            "the last saved state is kept; lower coca.train.lr, or set precision to fp32",
        )

    def _close_epoch(self, steps: int) -> None:
        at = self.at
        row = {name: total / steps for name, total in at.sums.items()} | {
            "scale": self.model.coca.temperature.exp().item(), "lr": self.optimiser.param_groups[0]["lr"],
        }  # fmt: skip
        found = self.validate()
        self._require_finite("the validation loss", found["caption"] + found["contrastive"], found)
        at.history.append(row | {f"val_{name}": value for name, value in found.items()})
        if at.best_epoch < 0 or self._score(at.epoch) > self._score(at.best_epoch):
            at.best_epoch = at.epoch
            at.best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        at.epoch, at.batch, at.sums = at.epoch + 1, 0, {}

    def _score(self, epoch: int) -> tuple[float, float]:
        """Larger is better; of equal retrieval the smaller loss, which a few pairs tell apart."""
        row = self.at.history[epoch]
        loss = -(row["val_caption"] + row["val_contrastive"])
        return (row["val_recall"], loss) if self.values.best_by == "retrieval" else (loss, 0.0)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Weighted losses as in training, and recalls, on the validation side.

        The contrastive loss is that of batches of the training's size, always the same ones. A recall is the mean of
        text to image and image to text, equal texts count as right, and `recall` is the mean of all.
        """
        pairs, values = self.validation, self.values
        self.model.eval()
        every = self._passes(pairs, np.arange(len(pairs)))
        own = every[self.rank :: self.ranks]
        width = self.model.coca.text_to_latents.to_latents.out_features
        latents = torch.zeros(2, len(pairs), width, device=self.device)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for members, part in zip(own, self._stream(pairs, batches.Passes([own], 0, twice=False)), strict=True):
            out = self._forward(part, captions=True)
            where = torch.from_numpy(members).to(self.device)
            latents[0, where], latents[1, where] = out.text_latents, out.image_latents
            terms = self.loss(
                logits=out.logits, ids=part.ids, pad_id=self.model.coca.pad_id, tokens=1.0,
                caption_weight=values.caption_weight,
            )  # fmt: skip
            total += sum(terms.values())
        total, latents = self.accelerator.reduce(total, "sum"), self.accelerator.reduce(latents, "sum")
        codes = torch.from_numpy(pairs.codes).to(self.device)
        contrast = 0.0
        for batch in batches.epoch_batches(lengths(pairs), min(values.batch_size, len(pairs)), values.seed, 0):
            where = torch.from_numpy(batch).to(self.device)
            same = None if values.same_text_negatives else contrastive.same(codes[where])
            terms = self._contrast(*latents[:, where], self.model.coca.temperature, same)
            contrast += len(batch) / len(pairs) * float(sum(terms.values()))
        made = {"caption": float(total) / int((pairs.tokens - 1).sum()), "contrastive": contrast}
        return made | recalls(latents.cpu().numpy(), pairs.codes)


def recalls(latents: np.ndarray, codes: Sequence[int]) -> dict[str, float]:
    """{"r1": ..., "recall": mean of them} of latents [2,n,d], of texts and of images; codes [n] are equal for equals.

    Cut-offs beyond n are left out.
    """
    ks = [k for k in KS if k <= len(codes)]
    both = retrieval.recall_at_k(latents[0] @ latents[1].T, ks, (codes, codes))
    made = {f"r{k}": float(np.mean([way["recall"][k] for way in both.values()])) for k in ks}
    return made | {"recall": float(np.mean(list(made.values())))}
