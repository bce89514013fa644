"""Optimisation of a CLIP model: all that decides the weights, and nothing else.

Messages, files and command line lie in `train_clip`, so that editing those retrains nothing.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from open_clip import ClipLoss
from torch import Tensor, nn

from scripts.biomedica import hybrid, positions, transforms
from scripts.biomedica.model import Clip
from scripts.biomedica.planning import Plan
from scripts.biomedica.reports import Report
from scripts.biomedica.settings import TrainSettings
from scripts.common import contrastive, retrieval
from scripts.common.data_order import epoch_order
from scripts.common.errors import KilnError
from scripts.common.schedules import learning_rate

KS = (1, 5, 10)
PASS = 256  # pairs of a pass of validation, where the training names none
# epoch, first batch, states of this process's lanes, {shard read to its end: pairs that it gave} as the epoch began,
# {shard: its version} where it is known
Loader = Callable[[int, int, dict[int, dict[str, Any]], dict[str, int], dict[str, str]], hybrid.Loader]


class Validation(NamedTuple):
    """Pairs that choose the best epoch: images uint8 [n,3,H,W], tokens int64 [n,T], caption ids int64 [n]."""

    images: Tensor
    tokens: Tensor
    caption_ids: np.ndarray


@dataclasses.dataclass
class Progress:
    """Where training stands; plain values and tensors, so that it can be saved and loaded safely.

    Attributes:
        totals: over all processes so far: pairs by source, and what reading took.
        counts: {shard: {each of `reports.COUNTS`: pairs}} of those read to the end in earlier epochs. They change an
            epoch's order, so those of this epoch wait in `finished`.
        lanes: {lane: where its reading stands}.
        rejected: {(shard, key): (status, reason)} of streamed pairs that gave none.
        unreachable: {shard: (reason, pairs that it gave before)}.
        versions: {shard: the version that was read}, by which a later epoch sees that it has changed.

    The last five are those of this process's own lanes until they are gathered.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best_epoch: int = -1
    best: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    totals: dict[str, float] = dataclasses.field(default_factory=dict)
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    lanes: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    finished: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    rejected: dict[tuple[str, str], tuple[str, str]] = dataclasses.field(default_factory=dict)
    unreachable: dict[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)


GATHERED = ("lanes", "finished", "rejected", "unreachable", "versions")


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Trainable parameters that decay, and the others: open_clip's own rule (`open_clip_train/main.py`)."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    still = {name for name, p in trainable.items()
             if p.ndim < 2 or any(one in name for one in ("bn", "ln", "bias", "logit_scale"))}  # fmt: skip
    return [
        {"params": [p for name, p in trainable.items() if name not in still], "weight_decay": decay},
        {"params": [p for name, p in trainable.items() if name in still], "weight_decay": 0.0},
    ]


def check_passes(model: nn.Module, several: bool) -> None:
    """Refuse layers for which a pair's features depend on its pass or on chance, where batches are cut.

    Args:
        several: whether a global batch is cut, into passes or over processes.

    Raises:
        KilnError: a batch norm, or a dropout of patches or of units.
    """
    for name, module in model.named_modules() if several else ():
        drops = [getattr(module, one, 0.0) for one in ("p", "prob", "drop_prob")]
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or any(isinstance(p, float) and p > 0 for p in drops):
            raise KilnError(
                f"{name}: a {type(module).__name__}, whose features depend on what else is in the pass, or on chance",
                "take a model without it (a ViT without patch_dropout), or one process and micro_batch: null",
            )


def agree(accelerator: Accelerator) -> Callable[[bool], bool]:
    """(whether this process's batch is whole) -> whether those of all are, to be asked by all."""

    def asked(whole: bool) -> bool:
        if accelerator.num_processes == 1:
            return whole
        missing = torch.tensor(0.0 if whole else 1.0, device=accelerator.device)
        return not accelerator.reduce(missing, "sum").item()

    return asked


class Fit:
    """One training run over the pairs that a plan names, its weights chosen on validation pairs.

    Args:
        clip: of `model.build`.
        plan: what to train on, and how long.
        loader: gives this process's share of each global batch of an epoch, from a given one on. It may end early, on
            all processes alike, where pairs are fewer than planned.
        validation: pairs.
        values: numerics.
        accelerator: device, precision and processes.
    """

    def __init__(
        self, clip: Clip, plan: Plan, loader: Loader, validation: Validation, values: TrainSettings,
        accelerator: Accelerator,
    ):  # fmt: skip
        self.plan, self.loader, self.validation, self.values = plan, loader, validation, values
        self.accelerator, self.device = accelerator, accelerator.device
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        positions.check(plan, self.ranks)
        learning_rate(0, plan.steps, values.warmup_steps, values.lr, values.final_lr)  # a warm-up that is too long
        self.share = plan.batch_size // self.ranks
        self.pass_size = min(values.micro_batch or self.share, self.share)
        check_passes(clip.model, self.pass_size < plan.batch_size)
        self.preprocess = clip.preprocess_cfg
        self.model = clip.model.to(self.device)
        self.model.set_grad_checkpointing(values.gradient_checkpointing)
        self.loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=self.rank, world_size=self.ranks)
        groups = parameter_groups(self.model, values.weight_decay)
        self.parameters = [p for group in groups for p in group["params"]]
        adam = torch.optim.AdamW(groups, lr=values.lr, betas=values.betas, eps=values.eps, fused=True)
        self.optimiser = accelerator.prepare(adam)
        self.at = Progress()
        self.now: dict[str, float] = {}  # of the last step, for trackers

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, but for the random generators; to be called by every process.

        Raises:
            KilnError: a weight is not finite, so that this would be no good state.
        """
        for name, weight in self.model.named_parameters():
            self._require_finite(f"the largest {name}", weight.detach().abs().max().item(), {})
        scaler = self.accelerator.scaler
        progress = {field.name: getattr(self.at, field.name) for field in dataclasses.fields(self.at)}
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
            "progress": progress | self._gathered(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.at = Progress(**state["progress"])
        # what others read since must not be hidden by how it was then
        self.at.lanes = {lane: one for lane, one in self.at.lanes.items() if lane % self.ranks == self.rank}

    def _gathered(self) -> dict[str, dict]:
        """What each process knows of its own lanes, put together."""
        parts = gather_object([{name: getattr(self.at, name) for name in GATHERED}])
        return {name: {key: value for part in parts for key, value in part[name].items()} for name in GATHERED}

    def run(self, after_step: Callable[["Fit"], None], after_epoch: Callable[["Fit"], None]) -> None:
        """Train to the last epoch; `after_epoch` may report, `after_step`, then, save."""
        while self.at.epoch < self.plan.epochs and self.at.step < self.plan.steps:
            self._epoch(after_step, after_epoch)

    def _epoch(self, after_step: Callable[["Fit"], None], after_epoch: Callable[["Fit"], None]) -> None:
        at, plan = self.at, self.plan
        planned = min(plan.steps_per_epoch, at.batch + plan.steps - at.step)
        counts = {name: one["train"] for name, one in at.counts.items()}
        reader = self.loader(at.epoch, at.batch, at.lanes, counts, at.versions)
        self.model.train()
        with contextlib.closing(iter(reader)) as stream:
            while at.batch < planned:
                started = time.monotonic()
                batch = next(stream, None)
                arrived = time.monotonic()
                if batch is None:
                    self._take(reader.shortfall.report, 0, 0, arrived - started, arrived - started)
                    break
                self._step(batch)
                streamed = int(batch.streamed.sum())
                self._take(
                    batch.report, self.share - streamed, streamed, arrived - started, time.monotonic() - started
                )  # fmt: skip
                at.batch, at.step = at.batch + 1, at.step + 1
                if at.batch < planned:
                    after_step(self)
        if not at.batch:
            raise KilnError(
                f"epoch {at.epoch + 1}: not one batch of {plan.batch_size} pairs",
                "lower biomedica.plan.batch_size, or plan anew: its shards hold too few pairs",
            )
        self._close_epoch(planned)
        after_epoch(self)
        after_step(self)

    def _encode(self, part: tuple[Tensor, Tensor]) -> contrastive.Latents:
        """Unit features of texts and images, float32 [n,d], of images uint8 and tokens."""
        images = transforms.normalise(part[0], self.preprocess)
        with self.accelerator.autocast():
            text, image = self.model.encode_text(part[1]), self.model.encode_image(images)
        return nn.functional.normalize(text.float(), dim=-1), nn.functional.normalize(image.float(), dim=-1)

    def _terms(self, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return *self._encode(part), torch.zeros((), device=self.device)

    def _gradients(self, latents: contrastive.Latents) -> contrastive.Gradients:
        """Of the mean of all processes' losses, each that of its own pairs against those of all."""
        text, image = (one.detach().requires_grad_() for one in latents)
        scale = self.model.logit_scale
        with torch.enable_grad():
            loss = self.loss(image, text, scale.exp()) / self.ranks
            found = torch.autograd.grad(loss, (text, image, scale))
        return contrastive.Gradients(self.accelerator.reduce(loss.detach(), "sum"), *found)

    def _step(self, batch: hybrid.Batch) -> None:
        """An optimiser step."""
        at, values, scale = self.at, self.values, self.model.logit_scale
        rate = learning_rate(
            at.step, self.plan.steps, values.warmup_steps, values.lr, min(values.final_lr, values.lr)
        )  # fmt: skip
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        images, tokens = (one.to(self.device, non_blocking=True) for one in (batch.images, batch.tokens))
        parts = list(zip(images.split(self.pass_size), tokens.split(self.pass_size), strict=True))
        passes = iter(parts * 2 if len(parts) > 1 else parts)
        _, loss = contrastive.backward(
            passes, len(parts), self._encode, self._terms, scale, self._gradients, self.accelerator.backward
        )
        if self.ranks > 1:
            contrastive.sum_gradients(self.parameters)
        means = {"loss": loss.item()} | self._shares(batch)
        self._require_finite("the loss", means["loss"], means)
        if values.clip_grad:
            norm = self.accelerator.clip_grad_norm_(self.parameters, values.clip_grad)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.accelerator.scaler is None:
            self._require_finite("the gradient's norm", float(norm), means)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            scale.clamp_(0, math.log(values.max_logit_scale))
        for name, value in means.items():
            at.sums[name] = at.sums.get(name, 0.0) + value
        self.now = means | {"lr": rate, "logit_scale": scale.exp().item()}

    def _shares(self, batch: hybrid.Batch) -> dict[str, float]:
        """Of the pairs of the global batch: those whose caption another has too, and whose caption fills the context.

        The first are false negatives; captions of the second are cut, or just fit.
        """
        told = torch.stack([batch.caption_ids, (batch.tokens[:, -1] != 0).long()]).to(self.device)
        ids, full = self.accelerator.gather(told.T.contiguous()).T
        counts = ids.unique(return_counts=True)[1]
        return {
            "duplicates": float(counts[counts > 1].sum()) / len(ids),
            "full_captions": float(full.sum()) / len(ids),
        }

    def _take(self, report: Report, local: int, streamed: int, waited: float, seconds: float) -> None:
        """Remember what the reader tells of this process's lanes, and add to the totals of all processes.

        Args:
            local, streamed: pairs of this process.
            waited, seconds: for the reader, and in all; their totals are of all processes together.
        """
        at, sent = self.at, report.transfer
        at.lanes |= report.lanes
        at.finished |= report.finished
        at.rejected |= {(shard, key): (status, reason) for shard, key, status, reason in report.rejected}
        at.unreachable |= {shard: (reason, pairs) for shard, reason, pairs in report.unreachable}
        at.versions |= report.versions
        found = {
            "samples_local": local, "samples_streamed": streamed, "bytes": sent.get("bytes", 0),
            "retries": sent.get("retries", 0), "reread_pairs": report.reread_pairs,
            "reread_bytes": report.reread_bytes + sent.get("reread_bytes", 0), "waited": waited, "seconds": seconds,
        }  # fmt: skip
        values = torch.tensor(list(found.values()), dtype=torch.float64, device=self.device)
        for name, value in zip(found, self.accelerator.reduce(values, "sum").tolist(), strict=True):
            at.totals[name] = at.totals.get(name, 0.0) + value

    def _require_finite(self, what: str, value: float, terms: dict[str, float]) -> None:
        if math.isfinite(value):
            return
        at = self.at
        found = ", ".join(f"{name} {one:.4g}" for name, one in terms.items())
        raise KilnError(
            f"{what} is {value} at step {at.step}, epoch {at.epoch}, batch {at.batch} (counted from 0)"
            + (f": {found}" if found else ""),
            "the last saved state is kept; lower biomedica.train.lr, or set precision to fp32",
        )

    def _close_epoch(self, planned: int) -> None:
        at = self.at
        row = {name: total / at.batch for name, total in at.sums.items()} | {
            "logit_scale": self.model.logit_scale.exp().item(), "lr": self.optimiser.param_groups[0]["lr"],
            "batches_planned": planned, "batches": at.batch,
        } | {name: int(at.totals[name]) for name in ("samples_local", "samples_streamed")}  # fmt: skip
        found = self.validate()
        self._require_finite("the validation loss", found["loss"], found)
        at.history.append(row | {f"val_{name}": value for name, value in found.items()})
        if at.best_epoch < 0 or self._score(at.epoch) > self._score(at.best_epoch):
            at.best_epoch = at.epoch
            at.best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
        for name, value in self._gathered().items():
            setattr(at, name, value)
        at.counts = at.counts | at.finished
        at.epoch, at.batch, at.sums, at.lanes, at.finished = at.epoch + 1, 0, {}, {}, {}

    def _score(self, epoch: int) -> tuple[float, float]:
        """Larger is better; of equal retrieval the smaller loss, which a few pairs tell apart."""
        row = self.at.history[epoch]
        loss = -row["val_loss"]
        return (row["val_recall"], loss) if self.values.best_by == "retrieval" else (loss, 0.0)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss as in training, and recalls, on the validation pairs; `recalls` has the latter.

        The loss is that of batches of the training's size, always the same ones; what does not fill one is left out of
        it. Fewer pairs than a batch are one batch.
        """
        pairs, size = self.validation, min(self.plan.batch_size, len(self.validation.images))
        self.model.eval()
        latents = None
        for rows in torch.arange(len(pairs.images))[self.rank :: self.ranks].split(min(self.pass_size, PASS)):
            part = pairs.images[rows].to(self.device), pairs.tokens[rows].to(self.device)
            found = torch.stack(self._encode(part))
            if latents is None:
                latents = found.new_zeros(2, len(pairs.images), found.shape[-1])
            latents[:, rows.to(self.device)] = found
        latents = self.accelerator.reduce(latents, "sum")
        order = torch.from_numpy(epoch_order(len(pairs.images), self.values.seed, 0))
        whole = [one.to(self.device) for one in order.split(size) if len(one) == size]
        alone, scale = ClipLoss(), self.model.logit_scale.exp()
        losses = [float(alone(latents[1, one], latents[0, one], scale)) for one in whole]
        return {"loss": float(np.mean(losses))} | recalls(latents.cpu().numpy(), pairs.caption_ids)


def recalls(latents: np.ndarray, ids: Sequence[int]) -> dict[str, float]:
    """{"image_to_text_r1": ..., ..., "recall": mean of all} of latents [2,n,d], of texts and of images.

    Ids [n] are equal for equal captions, of which each is right. Cut-offs beyond n are left out.
    """
    ks = [k for k in KS if k <= len(ids)]
    both = retrieval.recall_at_k(latents[1] @ latents[0].T, ks, (ids, ids))
    ways = {"image_to_text": both["row_to_column"], "text_to_image": both["column_to_row"]}
    made = {f"{name}_r{k}": way["recall"][k] for name, way in ways.items() for k in ks}
    return made | {"recall": float(np.mean(list(made.values())))}
