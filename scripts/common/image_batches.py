"""Image files as batches of one fixed size, so that a result does not depend on its neighbours' number."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from scripts.common import progress
from scripts.common.errors import KilnError
from scripts.common.images import ImageError, open_rgb


class ImageFiles(Dataset):
    """index -> transformed image, or the error if a file that a manifest calls readable is not.

    The error is handed over, not raised: a data loader's worker can only raise one of a single argument.
    """

    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], torch.Tensor], at_least: int | None):
        self.paths, self.transform, self.at_least = paths, transform, at_least

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor | KilnError:
        path = self.paths[index]
        try:
            return self.transform(open_rgb(path, 2**62, self.at_least))
        except (ImageError, FileNotFoundError) as error:
            return KilnError(
                f"{path}: readable when it was listed, now: {error}",
                "run again: the folder is scanned anew, and what is done stays done",
            )


def _stack(images: list[torch.Tensor | KilnError]) -> torch.Tensor | KilnError:
    errors = [image for image in images if isinstance(image, KilnError)]
    return errors[0] if errors else default_collate(images)


def batches(
    paths: Sequence[Path],
    transform: Callable[[Image.Image], torch.Tensor],
    batch_size: int,
    workers: int,
    device: torch.device,
    at_least: int | None = None,
    name: str = "images",
) -> Iterator[tuple[torch.Tensor, int]]:
    """([batch_size,3,H,W] float32 on `device`, how many of its rows count), in the order of `paths`.

    The last batch is filled up with copies of its last image: matrix kernels pick their order of
    summation by batch size, so a row's last digits would otherwise depend on the file count.

    Raises:
        KilnError: a file is gone or no longer readable.
    """
    data = ImageFiles(paths, transform, at_least)
    pin = device.type == "cuda"
    loader = DataLoader(data, batch_size=batch_size, num_workers=workers, pin_memory=pin, collate_fn=_stack)
    layout = torch.channels_last if pin else torch.contiguous_format
    for images in progress.bar(loader, f"{name} (batches of {batch_size})"):
        if isinstance(images, KilnError):
            raise images
        real = len(images)
        if real < batch_size:
            images = torch.cat([images, images[-1:].expand(batch_size - real, -1, -1, -1)])
        yield images.to(device, non_blocking=True, memory_format=layout), real
