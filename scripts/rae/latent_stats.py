"""Exact mean and variance of latents, in one pass, mergeable over shards.

Each shard's moments are computed alone and merged in the order of shards, so that the result has the same bytes
however the shards were spread over processes.
Formula: Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from scripts.common import artefacts
from scripts.common.errors import KilnError

AGAIN = "delete it and compute the latent statistics again"


class Moments:
    """Count, mean [C,H,W] and sum of squared deviations `m2` [C,H,W], float64 on the CPU; empty at first.

    Args:
        shape: that of one latent.
    """

    def __init__(self, shape: Sequence[int]):
        self.count = 0
        self.mean = torch.zeros(*shape, dtype=torch.float64)
        self.m2 = torch.zeros(*shape, dtype=torch.float64)

    def add(self, batch: torch.Tensor) -> None:
        """Take in latents [B,C,H,W] of any float type and device.

        Raises:
            KilnError: they have another shape, or are not finite.
        """
        if list(batch.shape[1:]) != list(self.mean.shape):
            raise KilnError(
                f"latents of shape {list(batch.shape)}, expected [B, {', '.join(map(str, self.mean.shape))}]",
                "one set of statistics takes latents of one encoder and input size",
            )
        if not len(batch):
            return
        values = batch.detach().double()
        bad = (~torch.isfinite(values)).flatten(1).any(dim=1).nonzero().flatten()
        if len(bad):
            raise KilnError(
                f"latent {self.count + int(bad[0])} (counted from 0) is not finite",
                "look at that image; if all are so, encode in float32",
            )
        mean = values.mean(dim=0)
        self._merge(len(values), mean.cpu(), (values - mean).square().sum(dim=0).cpu())

    def _merge(self, count: int, mean: torch.Tensor, m2: torch.Tensor) -> None:
        if list(mean.shape) != list(self.mean.shape):
            raise KilnError(
                f"moments of shape {list(mean.shape)}, expected {list(self.mean.shape)}",
                "merge moments of one encoder and input size",
            )
        if not count:
            return
        total = self.count + count
        delta = mean - self.mean
        self.m2 += m2 + delta.square() * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def variance(self) -> torch.Tensor:
        """Population variance [C,H,W] float64.

        Raises:
            KilnError: nothing was added.
        """
        if not self.count:
            raise KilnError("statistics of no latents at all", "give at least one image")
        return self.m2 / self.count

    def save(self, path: Path) -> None:
        """Store as safetensors, atomically."""
        from safetensors.torch import save_file

        with artefacts.atomic_path(path) as temporary:
            count = torch.tensor(self.count, dtype=torch.int64)
            save_file({"count": count, "mean": self.mean, "m2": self.m2}, temporary)

    @classmethod
    def load(cls, path: Path) -> "Moments":
        """What `save` stored.

        Raises:
            KilnError: the file is missing, damaged, or of another kind.
        """
        from safetensors.torch import load_file

        try:
            stored = load_file(path)
        except Exception as error:  # safetensors raises an error class of its own
            raise KilnError(f"{path}: unreadable moments: {error}", AGAIN) from None
        if set(stored) != {"count", "mean", "m2"} or stored["mean"].shape != stored["m2"].shape:
            shapes = {name: list(value.shape) for name, value in sorted(stored.items())}
            raise KilnError(f"{path}: holds {shapes}, expected count, and mean and m2 of one shape", AGAIN)
        moments = cls(stored["mean"].shape)
        moments.count, moments.mean, moments.m2 = int(stored["count"]), stored["mean"].double(), stored["m2"].double()
        return moments


def merge(parts: Iterable[Moments]) -> Moments:
    """Moments of all parts together, merged from first to last; the parts stay as they are.

    Raises:
        KilnError: there are no parts, or their shapes differ.
    """
    parts = list(parts)
    if not parts:
        raise KilnError("no moments to merge", "give those of at least one shard")
    merged = Moments(parts[0].mean.shape)
    for part in parts:
        merged._merge(part.count, part.mean, part.m2)
    return merged


def write_statistics(path: Path, mean: torch.Tensor, var: torch.Tensor) -> None:
    """Store mean and var [C,H,W] in the published layout, {"mean", "var"} float32 by torch.save, atomically."""
    buffer = io.BytesIO()  # torch.save names its archive after a file, and the temporary name is never the same
    torch.save({"mean": mean.float().contiguous().cpu(), "var": var.float().contiguous().cpu()}, buffer)
    with artefacts.atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def read_statistics(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, var), each [C,H,W] float32 on the CPU, of a published file or of `write_statistics`.

    Raises:
        KilnError: the file is missing, damaged, holds more than tensors, or lacks one of the two.
    """
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, and advises to run a stranger's code
        raise KilnError(
            f"{path}: unreadable statistics, damaged or more than tensors ({type(error).__name__})",
            "give a stat.pt with mean and var",
        ) from None
    values = [stored.get(name) for name in ("mean", "var")] if isinstance(stored, dict) else []
    if not values or not all(torch.is_tensor(v) and v.ndim == 3 and v.shape == values[0].shape for v in values):
        raise KilnError(
            f"{path}: expected {{mean, var}}, two tensors of one shape [C, H, W], "
            f"found {_described(stored) if isinstance(stored, dict) else type(stored).__name__}",
            "give a stat.pt with mean and var",
        )
    return values[0].float(), values[1].float()


def _described(stored: dict) -> dict:
    return {name: list(v.shape) if torch.is_tensor(v) else type(v).__name__ for name, v in stored.items()}
