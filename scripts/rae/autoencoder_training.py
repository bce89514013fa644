"""Optimisation of the decoder and the discriminator: all that decides their weights, and nothing else.

Messages, files and command line lie in `train_autoencoder`, so that editing those retrains nothing.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from scripts.common.data_order import EpochBatches, item_seed
from scripts.common.errors import KilnError
from scripts.common.listed_images import collate, unwrapped
from scripts.common.schedules import learning_rate
from scripts.rae import arrow, augment, crops, losses
from scripts.rae.autoencoder import Autoencoder
from scripts.rae.decoder import DECODERS, Decoder, Size
from scripts.rae.discriminator import Discriminator, Recipe
from scripts.rae.encoder import Encoder
from scripts.rae.perceptual import Lpips
from scripts.rae.settings import AutoencoderSettings, DecoderSettings, DiscriminatorSettings

NOISE, GENERATOR, FAKE, REAL = 1, 2, 3, 4  # keep the streams of random numbers of one seed apart


def decoder_size(settings: DecoderSettings) -> Size:
    """The published size, or the free one."""
    if settings.size == "free":
        return Size(settings.layers, settings.width, settings.mlp, settings.heads)
    return DECODERS[settings.size]


def build_autoencoder(
    encoder: Encoder, decoder: DecoderSettings, image_size: int, values: AutoencoderSettings, mean, var
) -> Autoencoder:
    """A seeded decoder on a frozen encoder; mean, var: [C,H,W] statistics of clean latents."""
    torch.manual_seed(values.seed)
    made = Decoder(encoder.dim, encoder.grid, image_size, decoder_size(decoder))
    return Autoencoder(encoder, made, values.tau, mean, var)


def build_discriminator(settings: DiscriminatorSettings, weights: Path | None, seed: int) -> Discriminator:
    """Seeded heads on a frozen DINO ViT."""
    recipe: str | Recipe = settings.recipe
    if recipe == "free":
        recipe = Recipe(settings.patch, settings.dim, settings.depth, settings.heads, settings.taps, settings.size)
    torch.manual_seed(seed)
    return Discriminator(recipe, weights, settings.kernel, settings.norm)


def _unchanged(image: Image.Image) -> Image.Image:
    return image  # no lambda, which could not be pickled for loader processes that are spawned


class TrainingPictures(Dataset):
    """(epoch, index) -> ([3,S,S] float32 in [0,1], index); the crop depends on seed, epoch and index alone."""

    def __init__(self, dataset, image_size: int, seed: int):
        self.pictures = arrow.Pictures(dataset, _unchanged)
        self.image_size, self.seed = image_size, seed

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int] | KilnError:
        epoch, index = key
        item = self.pictures[index]
        if isinstance(item, KilnError):
            return item
        generator = torch.Generator().manual_seed(item_seed(self.seed, epoch, index))
        return crops.random_crop(item[0], self.image_size, generator), index


@dataclasses.dataclass
class Progress:
    """Where training stands; plain values, so that it can be saved and loaded safely.

    `step` counts optimiser steps of the decoder, once each, whatever the discriminator does.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    discriminator_step: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)


class Fit:
    """One training run of stage 1.

    Args:
        autoencoder, discriminator, perceptual: from the builders above and `Lpips`.
        data: `TrainingPictures`.
        values, disc: numerics of training and of the discriminator.
        accelerator: device, precision and processes.
        workers: processes that decode images.
    """

    def __init__(
        self, autoencoder: Autoencoder, discriminator: Discriminator, perceptual: Lpips, data: TrainingPictures,
        values: AutoencoderSettings, disc: DiscriminatorSettings, accelerator: Accelerator, workers: int,
    ):  # fmt: skip
        self.values, self.disc, self.accelerator, self.workers, self.data = values, disc, accelerator, workers, data
        self.ema = copy.deepcopy(autoencoder.decoder).requires_grad_(False).eval().to(accelerator.device)
        self.perceptual = perceptual.to(accelerator.device)
        fused = accelerator.device.type == "cuda"
        optimiser = torch.optim.AdamW(
            autoencoder.decoder.parameters(), lr=values.lr, betas=values.betas, weight_decay=values.weight_decay,
            fused=fused,
        )  # fmt: skip
        disc_optimiser = torch.optim.AdamW(
            discriminator.heads.parameters(), lr=values.discriminator_lr, betas=values.betas,
            weight_decay=values.weight_decay, fused=fused,
        )  # fmt: skip
        self.model, self.discriminator, self.optimiser, self.disc_optimiser = accelerator.prepare(
            autoencoder, discriminator, optimiser, disc_optimiser
        )
        self.autoencoder = accelerator.unwrap_model(self.model)
        self.bare_discriminator = accelerator.unwrap_model(self.discriminator)
        if values.compile:
            self.autoencoder.encoder.compile()
            # not the whole decoder: the adaptive weight's gradients end in its last layer, a compiled whole would run
            # through to the first, and cannot be run through twice
            for block in self.autoencoder.decoder.decoder_layers:
                block.compile()
        self.schedule = losses.Schedule(values.lpips_start, values.discriminator_start, values.gan_start)
        self.at = Progress()

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return max(1, len(self.data) // self.values.batch_size)

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, but for the random generators.

        Raises:
            KilnError: a weight is not finite, so that this would be no good state.
        """
        for what, model in (("decoder", self.autoencoder.decoder), ("discriminator", self.bare_discriminator.heads)):
            for name, weight in model.named_parameters():
                self._require_finite(f"the {what}'s largest {name}", weight.detach().abs().max(), {})
        scaler = self.accelerator.scaler
        return {
            "decoder": self.autoencoder.decoder.state_dict(),
            "ema": self.ema.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "heads": self.bare_discriminator.heads.state_dict(),
            "discriminator_optimiser": self.disc_optimiser.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
            "progress": dataclasses.asdict(self.at),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.autoencoder.decoder.load_state_dict(state["decoder"])
        self.ema.load_state_dict(state["ema"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.bare_discriminator.heads.load_state_dict(state["heads"])
        self.disc_optimiser.load_state_dict(state["discriminator_optimiser"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.at = Progress(**state["progress"])

    def run(self, after_step: Callable[["Fit"], None], after_epoch: Callable[["Fit"], None]) -> None:
        """Train to the last epoch; `after_step` may save, `after_epoch` may report."""
        while self.at.epoch < self.values.epochs:
            self._epoch(after_step)
            after_epoch(self)

    def _epoch(self, after_step: Callable[["Fit"], None]) -> None:
        at = self.at
        batches = EpochBatches(
            len(self.data), self.values.batch_size, self.values.seed, at.epoch,
            self.accelerator.process_index, self.accelerator.num_processes, at.batch,
        )  # fmt: skip
        loader = DataLoader(
            self.data, batch_sampler=batches, num_workers=self.workers, collate_fn=collate,
            pin_memory=self.accelerator.device.type == "cuda", generator=torch.Generator(),
        )  # fmt: skip
        for batch in loader:
            self._step(*unwrapped(batch))
            at.batch, at.step = at.batch + 1, at.step + 1
            if at.batch < batches.total():
                after_step(self)
        at.history.append({name: total / at.counts[name] for name, total in sorted(at.sums.items())})
        at.epoch, at.batch, at.sums, at.counts = at.epoch + 1, 0, {}, {}
        after_step(self)

    def _rates(self) -> tuple[float, float]:
        """Learning rates of decoder and discriminator; the latter's curve counts its own updates, as published."""
        values, per_epoch = self.values, self.steps_per_epoch
        total, warmup = values.epochs * per_epoch, round(values.warmup_epochs * per_epoch)
        peaks = (values.lr, self.at.step), (values.discriminator_lr, self.at.discriminator_step)
        return tuple(learning_rate(step, total, warmup, peak, min(values.final_lr, peak)) for peak, step in peaks)

    def _step(self, images: torch.Tensor, indices: torch.Tensor) -> None:
        """An optimiser step of the decoder, and one of the discriminator where it is due.

        Args:
            images: [B,3,S,S] float32 in [0,1], this process's slice of the global batch.
            indices: [B] int64, which draw the noise.
        """
        at, device = self.at, self.accelerator.device
        images = images.to(device, non_blocking=True)
        parts = torch.arange(len(images)).chunk(self.values.accumulation)
        rate, disc_rate = self._rates()
        _set_rate(self.optimiser, rate)
        _set_rate(self.disc_optimiser, disc_rate)
        self.model.train()
        self.autoencoder.encoder.eval()
        found: dict[str, list[torch.Tensor]] = {}
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with _synchronised(self.accelerator, self.model, last):
                terms = self._generator_loss(images[part], indices[part], part)
                loss = terms.pop("loss")
                self._require_finite("loss", loss, terms)
                self.accelerator.backward(loss / len(parts))
            for name, value in terms.items():
                found.setdefault(name, []).append(value)
        if self.values.clip_grad:
            self.accelerator.clip_grad_norm_(self.autoencoder.decoder.parameters(), self.values.clip_grad)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        losses.update_ema(self.ema, self.autoencoder.decoder, self.values.ema_decay)
        if self.schedule.discriminator(at.epoch):
            self._discriminator_step(images, parts, found)
            at.discriminator_step += 1
        means = {name: torch.stack(values).mean() for name, values in found.items()}
        self._count(means)

    def _generator_loss(self, images, indices, positions) -> dict[str, torch.Tensor]:
        """The decoder's loss and its terms, scalars."""
        at, values = self.at, self.values
        generators = [
            torch.Generator(images.device).manual_seed(item_seed(values.seed + NOISE, at.epoch, int(index)))
            for index in indices
        ]
        with self.accelerator.autocast():
            made = self.model(images, generators)
        made = made.float()
        lpips = self.perceptual if self.schedule.lpips(at.epoch) and values.lpips_weight else None
        terms = losses.reconstruction_loss(made, images, lpips, values.lpips_weight)
        found = {"l1": terms.l1.detach(), "lpips": terms.lpips.detach()}
        if not self.schedule.gan(at.epoch) or not values.gan_weight:
            return {"loss": terms.total, **found}
        bare = self.bare_discriminator.eval()
        bare.heads.requires_grad_(False)
        with self.accelerator.autocast():
            logits = bare(augment.apply(2 * made - 1, self._draw(made, positions, GENERATOR)))
        gan = losses.generator_loss(logits.float())
        weight = losses.adaptive_weight(
            terms.total, gan, self.autoencoder.decoder.decoder_pred.weight, self._mean_over_processes
        )
        return {
            "loss": terms.total + values.gan_weight * weight * gan,
            **found,
            "gan": gan.detach(),
            "adaptive_weight": weight,
        }

    def _discriminator_step(self, images, parts: Sequence[torch.Tensor], found: dict) -> None:
        """Hinge loss of real pictures against fresh reconstructions without noise, both on the 8-bit grid."""
        self.model.eval()
        self.discriminator.train()
        self.bare_discriminator.dino.eval()
        self.bare_discriminator.heads.requires_grad_(True)
        for number, part in enumerate(parts):
            with torch.no_grad(), self.accelerator.autocast():
                made = self.autoencoder(images[part]).float()
            fake = augment.apply(losses.quantise(2 * made - 1), self._draw(made, part, FAKE))
            real = augment.apply(2 * images[part] - 1, self._draw(made, part, REAL))
            with _synchronised(self.accelerator, self.discriminator, number == len(parts) - 1):
                with self.accelerator.autocast():
                    real_logits, fake_logits = self.discriminator(torch.cat([real, fake])).float().chunk(2)
                loss = losses.discriminator_loss(real_logits, fake_logits)
                self._require_finite("the discriminator's loss", loss, {})
                self.accelerator.backward(loss / len(parts))
            right = ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()) / 2
            found.setdefault("discriminator", []).append(loss.detach())
            found.setdefault("discriminator_accuracy", []).append(right.detach())
        self.disc_optimiser.step()
        self.disc_optimiser.zero_grad(set_to_none=True)

    def _require_finite(self, what: str, value: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        if torch.isfinite(value).all():
            return
        at = self.at
        found = ", ".join(f"{name} {one.item():.4g}" for name, one in terms.items())
        raise KilnError(
            f"{what} is {value.item()} at step {at.step}, epoch {at.epoch}, batch {at.batch} (counted from 0)"
            + (f": {found}" if found else ""),
            "the last saved state is kept; lower rae.autoencoder.lr, or set precision to fp32",
        )

    def _draw(self, images: torch.Tensor, positions: torch.Tensor, stream: int) -> augment.Draw:
        """DiffAugment's values of this process's samples, drawn for the global batch, whatever the processes."""
        at, ranks, settings = self.at, self.accelerator.num_processes, self.disc
        generator = torch.Generator().manual_seed(item_seed(self.values.seed + stream, at.epoch, at.batch))
        whole = augment.draw(
            self.values.batch_size, *images.shape[2:], generator, settings.augment_prob, settings.cutout
        )
        return augment.take(whole, positions * ranks + self.accelerator.process_index)

    def _mean_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, "mean")

    def _count(self, means: dict[str, torch.Tensor]) -> None:
        names = sorted(means)
        values = self._mean_over_processes(torch.stack([means[name].double() for name in names])).tolist()
        for name, value in zip(names, values, strict=True):
            self.at.sums[name] = self.at.sums.get(name, 0.0) + value
            self.at.counts[name] = self.at.counts.get(name, 0) + 1


def _set_rate(optimiser, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def _synchronised(accelerator: Accelerator, model: nn.Module, now: bool):
    """Gradients are averaged over processes in a batch's last part alone."""

    return contextlib.nullcontext() if now else accelerator.no_sync(model)
