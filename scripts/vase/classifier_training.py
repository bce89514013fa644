"""Optimisation of the quality classifier: all that decides its weights, and nothing else.

Messages, files and command line lie in `train_classifier`, so that editing those retrains nothing.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from scripts.common.data_order import EpochBatches, item_seed
from scripts.common.errors import KilnError
from scripts.common.listed_images import collate, open_listed, unwrapped
from scripts.vase import classifier
from scripts.vase.settings import ClassifierSettings


class LabelledImages(Dataset):
    """(epoch, index) -> ([3,S,S] float32, label); augmentation depends on seed, epoch and index alone."""

    def __init__(self, paths: list[Path], labels: np.ndarray, settings: ClassifierSettings, augment: bool):
        self.paths, self.labels, self.seed = paths, labels, settings.seed
        self.decode = classifier.decode_size(settings)
        make = classifier.training_transform if augment else classifier.evaluation_transform
        self.transform = make(settings.image_size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int] | KilnError:
        epoch, index = key
        try:
            image = open_listed(self.paths[index], self.decode)
        except KilnError as error:
            return error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(item_seed(self.seed, epoch, index))
            return self.transform(image), int(self.labels[index])


@dataclasses.dataclass
class Progress:
    """Where training stands; plain values and tensors, so that it can be saved and loaded safely."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    best_epoch: int = -1
    best: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


def class_weights(labels: np.ndarray, settings: ClassifierSettings) -> torch.Tensor:
    """Cross-entropy weights [2]: n / (2 n_class) when balanced, else ones."""
    counts = np.bincount(labels, minlength=2)
    balanced = len(labels) / (2 * counts)
    return torch.tensor(balanced if settings.class_weights == "balanced" else [1.0, 1.0], dtype=torch.float32)


def make_schedule(optimiser: torch.optim.Optimizer, settings: ClassifierSettings):
    """Per-epoch learning rate: lr * gamma^(epoch // step_epochs) as published, or a cosine to zero."""
    if settings.schedule == "step":
        return torch.optim.lr_scheduler.StepLR(optimiser, settings.step_epochs, settings.gamma)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.epochs)


def build_model(values: ClassifierSettings, weights: Path | None) -> nn.Module:
    """A seeded model, from ImageNet weights or an earlier classifier where settings say so."""
    torch.manual_seed(values.seed)
    np.random.seed(values.seed)
    model = classifier.build(values)
    if values.init_from:
        loaded, _ = classifier.load(Path(values.init_from))
        try:
            model.load_state_dict(loaded.state_dict())
        except RuntimeError as error:
            raise KilnError(
                f"{values.init_from}: another architecture: {error}", "check vase.classifier.arch"
            ) from None
    elif weights is not None:
        classifier.load_backbone(model, weights)
    return model


class Fit:
    """One training run over images of the train side, its weights chosen on the validation side.

    Args:
        model: from `classifier.build`.
        train, validation: (paths, labels); labels int array of 0 and 1.
        settings: numerics.
        accelerator: device, precision and processes.
        workers: processes that decode images.
    """

    def __init__(self, model: nn.Module, train, validation, settings, accelerator: Accelerator, workers: int):
        self.settings, self.accelerator, self.workers = settings, accelerator, workers
        self.data = LabelledImages(*train, settings, augment=settings.augment)
        self.validation = LabelledImages(*validation, settings, augment=False)
        if accelerator.device.type == "cuda":
            model = model.to(memory_format=torch.channels_last)
        optimiser = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        self.model, self.optimiser = accelerator.prepare(model, optimiser)
        self.schedule = make_schedule(self.optimiser.optimizer, settings)
        self.weights = class_weights(self.data.labels, settings).to(accelerator.device)
        self.at = Progress()

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs, but for the random generators."""
        scaler = self.accelerator.scaler
        return {
            "model": self.accelerator.unwrap_model(self.model).state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
            "progress": dataclasses.asdict(self.at),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.at = Progress(**state["progress"])

    def run(self, after_step: Callable[["Fit"], None], after_epoch: Callable[["Fit"], None]) -> None:
        """Train to the last epoch; `after_step` may save, `after_epoch` may report."""
        while self.at.epoch < self.settings.epochs:
            self._epoch(after_step)
            after_epoch(self)

    def _epoch(self, after_step: Callable[["Fit"], None]) -> None:
        at, ranks = self.at, self.accelerator.num_processes
        batches = EpochBatches(
            len(self.data), self.settings.batch_size, self.settings.seed, at.epoch,
            self.accelerator.process_index, ranks, at.batch,
        )  # fmt: skip
        self.model.train()
        for batch in self._loader(self.data, batches):
            self._step(*unwrapped(batch))
            if at.batch < batches.total():
                after_step(self)
        self._close_epoch()
        after_step(self)

    def _loader(self, data: Dataset, batches) -> DataLoader:
        return make_loader(data, batches, self.workers, pin_memory=self._on_gpu())

    def _on_gpu(self) -> bool:
        return self.accelerator.device.type == "cuda"

    def _to_device(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layout = torch.channels_last if self._on_gpu() else torch.contiguous_format
        device = self.accelerator.device
        return images.to(device, non_blocking=True, memory_format=layout), labels.to(device, non_blocking=True)

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        images, labels = self._to_device(images, labels)
        with self.accelerator.autocast():
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, weight=self.weights)
        self.optimiser.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        self.optimiser.step()
        count = torch.full_like(loss, len(labels))
        sums = torch.stack([loss.detach() * count, (logits.argmax(1) == labels).sum(), count]).detach()
        loss_sum, correct, seen = self.accelerator.reduce(sums.double(), "sum").tolist()
        at = self.at
        at.loss_sum, at.correct, at.seen = at.loss_sum + loss_sum, at.correct + int(correct), at.seen + int(seen)
        at.batch, at.step = at.batch + 1, at.step + 1

    def _close_epoch(self) -> None:
        at = self.at
        val_loss, val_accuracy = self.evaluate()
        at.history.append(
            {
                "train_loss": at.loss_sum / at.seen,
                "train_accuracy": at.correct / at.seen,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "lr": self.optimiser.param_groups[0]["lr"],
            }
        )
        best = at.history[at.best_epoch] if at.best_epoch >= 0 else None
        if best is None or (val_accuracy, -val_loss) > (best["val_accuracy"], -best["val_loss"]):
            at.best_epoch = at.epoch
            state = self.accelerator.unwrap_model(self.model).state_dict()
            at.best = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        self.schedule.step()
        at.epoch, at.batch, at.loss_sum, at.correct, at.seen = at.epoch + 1, 0, 0.0, 0, 0

    def evaluate(self) -> tuple[float, float]:
        """(loss, accuracy) on the validation side; every process evaluates all of it."""
        logits, labels = predict(self.model, self.validation, self.settings, self.accelerator, self.workers)
        loss = F.cross_entropy(logits, labels, weight=self.weights.cpu())
        return float(loss), float((logits.argmax(1) == labels).double().mean())


def make_loader(data: Dataset, batches, workers: int, pin_memory: bool = False) -> DataLoader:
    """A loader of given batches that leaves torch's global generator alone.

    A loader draws a seed for its workers each time it starts: a resumed epoch would draw once more.
    """
    own = torch.Generator().manual_seed(0)
    return DataLoader(
        data, batch_sampler=batches, num_workers=workers, collate_fn=collate, pin_memory=pin_memory, generator=own
    )


@torch.inference_mode()
def predict(model: nn.Module, data: LabelledImages, settings: ClassifierSettings, accelerator, workers: int):
    """Logits [N,2] float32 and labels [N] int64, both on the CPU, in the order of `data`."""
    model = accelerator.unwrap_model(model)  # no collective calls: each process evaluates the whole set
    model.eval()
    keys = [(0, index) for index in range(len(data))]
    batches = [keys[i : i + settings.batch_size] for i in range(0, len(keys), settings.batch_size)]
    logits, labels = [], []
    for batch in make_loader(data, batches, workers):
        images, target = unwrapped(batch)
        with accelerator.autocast():
            logits.append(model(images.to(accelerator.device)).float().cpu())
        labels.append(target)
    return torch.cat(logits), torch.cat(labels)
