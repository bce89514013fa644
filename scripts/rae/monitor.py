"""rFID and sheets of reconstructions while an autoencoder trains, by the decoder's average and without noise.

A look from outside: weights, modes of models, and random generators are afterwards what they were before.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from scripts.common.errors import KilnError
from scripts.common.step import log
from scripts.common.trackers import Tracker
from scripts.common.training_state import rng_state, set_rng_state
from scripts.rae import evaluation, fid, pictures, quality
from scripts.rae.autoencoder import Autoencoder
from scripts.rae.autoencoder_training import Fit
from scripts.rae.extractors import load_extractor

SHEET = 16


class Monitor:
    """Called after each step by every process; scores and draws where a step's number says so.

    What cannot be due in this training is not prepared, and needs no weights and no pictures.

    Args:
        fit: the training, all of whose state a step leaves as it is.
        dataset, image_size: folder of the dataset, and the side of its centre crops in pixels.
        extractor, inception: of rFID's features; see `load_extractor`.
        folder: of the sheets, samples/step-0001000.png and rfid/step-0001000.png; those are the main process's.

    Raises:
        KilnError: no such pictures, fewer than two, or no weights of the extractor.
    """

    def __init__(
        self, fit: Fit, dataset: Path, image_size: int, extractor: str, inception: Path | None, folder: Path
    ):  # fmt: skip
        self.accelerator, self.workers, self.folder = fit.accelerator, fit.workers, folder
        self.sample_every, self.rfid = fit.values.sample_every, fit.values.rfid
        own = fit.autoencoder
        self.autoencoder = Autoencoder(own.encoder, fit.ema, 0.0, own.latent_mean, own.latent_var).eval()
        steps = fit.values.epochs * fit.steps_per_epoch
        self.said = False
        with _unchanged():
            if 0 < self.sample_every <= steps:
                with _or_off("rae.autoencoder.sample_every=0"):
                    self.samples = evaluation.open_validation(dataset, image_size, SHEET)
            if 0 < self.rfid.every_n_steps <= steps or self.rfid.every_epoch:
                with _or_off("rae.autoencoder.rfid.every_n_steps=0 and rae.autoencoder.rfid.every_epoch=false"):
                    self.extractor = load_extractor(extractor, inception, self.accelerator.device)
                    self._open(dataset, image_size)

    def _open(self, dataset: Path, image_size: int) -> None:
        name, wanted = "train" if self.rfid.on_train else "validation", self.rfid.num_samples
        self.scored = evaluation.open_split(dataset, name, image_size, wanted)
        found = len(self.scored.pictures)
        if found < wanted:
            log.info("rFID while training: %d of %d pictures, all that split %s has", found, wanted, name)
        self.reference = self._statistics(lambda images: images)

    def __call__(self, fit: Fit, writer: Tracker, pause: Callable = contextlib.nullcontext) -> None:
        """Score and draw what is due after this step, into `writer` and the log, and in a context of `pause`."""
        step, rfid, main = fit.at.step, self.rfid, self.accelerator.is_main_process
        sample = _due(step, self.sample_every)
        score = _due(step, rfid.every_n_steps) or (rfid.every_epoch and fit.at.batch == 0)
        if not (sample or score):
            return
        with pause(), _unchanged():
            if score:
                found = self._statistics(self._reconstruct)
                if main:
                    self._tell(found, writer, step)
            if score and main and rfid.save_samples:
                self._draw("rfid", self.scored, rfid.save_count, writer, step)
            if sample and main:
                self._draw("samples", self.samples, SHEET, writer, step)
        writer.flush()

    def _statistics(self, transform: Callable[[torch.Tensor], torch.Tensor]) -> fid.FeatureStatistics:
        """Of the features of all transformed pictures; whole on the main process, and empty on others.

        Batches are the same for any number of processes, which take them in turn and send their features; the main
        process takes them in, in order. So the number of processes changes no bit.
        """
        ranks, rank, size = self.accelerator.num_processes, self.accelerator.process_index, self.rfid.batch_size
        device, every = self.accelerator.device, range(len(self.scored.pictures))
        own = [row for start in range(rank * size, len(every), ranks * size) for row in every[start : start + size]]
        batches = pictures.batches(self.scored.pictures, own, size, self.workers)
        made = fid.FeatureStatistics(self.extractor.dim, evaluation.origin(self.scored, self.extractor))
        for start in range(0, len(every), ranks * size):
            features = torch.zeros(size, self.extractor.dim, dtype=torch.float64, device=device)
            for images in itertools.islice(batches, 1):
                features[: len(images)] = self.extractor(transform(images))
            # whole batches, of which the last alone is filled up, at its end
            real = self.accelerator.gather(features)[: len(every) - start]
            if self.accelerator.is_main_process:
                for part in real.split(size):
                    made.add(part)
        return made

    @torch.inference_mode()
    def _reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B,3,S,S] to the same, in float32."""
        return quality.to_uint8(self.autoencoder(images.to(self.accelerator.device).float() / 255))

    def _tell(self, found: fid.FeatureStatistics, writer: Tracker, step: int) -> None:
        tag, kind = ("rfid_train", "training") if self.rfid.on_train else ("rfid", "validation")
        score = fid.frechet_distance(self.reference, found)
        writer.scalar(f"{tag}/score", score, step)
        log.info("step %d: rFID %.4f (n = %d %s images, extractor %s)", step, score, found.count, kind,
                 self.extractor.name)  # fmt: skip
        for warning in [] if self.said else fid.warnings(self.reference, found):
            log.warning("rFID while training: %s", warning)
        self.said = True

    def _draw(self, tag: str, split: evaluation.Split, count: int, writer: Tracker, step: int) -> None:
        """A sheet of `count` pictures of a split, spread through it; a disk that is full ends no training."""
        path = self.folder / tag / f"step-{step:07d}.png"
        rows = np.linspace(0, len(split.pictures) - 1, min(count, len(split.pictures))).astype(int).tolist()
        try:
            parts = [(images, self._reconstruct(images).cpu())
                     for images in pictures.batches(split.pictures, rows, self.rfid.batch_size, 0)]  # fmt: skip
            images, made = (torch.cat(side) for side in zip(*parts, strict=True))
            title = f"Step {step}: {len(rows)} {split.name} pictures and their reconstructions"
            pictures.draw_pairs(path, images, made, [split.names[row] for row in rows], title)
        except (OSError, KilnError) as error:
            log.warning("%s: not drawn: %s", path, error)
        else:
            writer.image(f"{tag}/reconstructions", path, step)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def _unchanged() -> Iterator[None]:
    """Leave random generators as they are, and compile nothing: kernels for other shapes would serve training, too."""
    before = rng_state()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        set_rng_state(before)


@contextlib.contextmanager
def _or_off(settings: str) -> Iterator[None]:
    """Errors say how to do without."""
    try:
        yield
    except KilnError as error:
        raise KilnError(error.message, f"{error.hint}; or do without: set {settings}") from None
