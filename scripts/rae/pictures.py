"""Centre crops of a split's pictures, in batches."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from scripts.common.listed_images import collate, unwrapped
from scripts.rae import arrow, crops


class CentreCrop:
    """PIL picture -> uint8 [3,size,size], by ADM's centre crop; picklable, for loader processes."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image) -> torch.Tensor:
        return torch.from_numpy(np.array(crops.center_crop_arr(image, self.size))).permute(2, 0, 1).contiguous()


def batches(pictures: arrow.Pictures, rows: range, batch_size: int, workers: int) -> Iterator[torch.Tensor]:
    """Pictures of `rows`, in order, as `pictures` transforms them, [B,3,S,S]."""
    loader = DataLoader(Subset(pictures, rows), batch_size=batch_size, num_workers=workers, collate_fn=collate)
    for batch in loader:
        yield unwrapped(batch)[0]
