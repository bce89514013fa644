"""From a pair's bytes to what a batch is stacked of."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from scripts.biomedica.pairs import Pair
from scripts.biomedica.planning import Plan
from scripts.biomedica.settings import HeldOutSettings, IndexSettings, PlanSettings
from scripts.common import images
from scripts.common.artefacts import sha256_text
from scripts.common.data_order import item_seed


class Ready(NamedTuple):
    """A pair with its image decoded and cropped, uint8 [3,S,S]."""

    key: str
    image: Tensor
    caption: str
    caption_id: int


@dataclasses.dataclass(frozen=True)
class Reading:
    """How pairs are read: what stays the same in a whole run. It can be pickled if its functions can.

    Attributes:
        plan: of the run.
        seed: of the order of pairs and of the crops.
        index, held_out: which streamed pairs may be used.
        policy: of which `shortfall` and `unreachable` count.
        prefetch: pairs of a lane that are read ahead of its two blocks.
        transform: (RGB image, seed) -> uint8 [3,S,S]; random by the seed alone.
        tokenize: captions -> int64 [n,T].
        at_least: pixels that a JPEG's sides must keep where it is decoded at 1/2, 1/4 or 1/8; None: every pixel.
        hashes: {streamed shard: sha256}, as far as they are listed.
    """

    plan: Plan
    seed: int
    index: IndexSettings
    held_out: HeldOutSettings
    policy: PlanSettings
    prefetch: int
    transform: Callable[[Image.Image, int], Tensor]
    tokenize: Callable[[Sequence[str]], Tensor]
    at_least: int | None = None
    hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def ready(self, pair: Pair, epoch: int) -> Ready:
        """The pair, its crop drawn by seed, epoch and key, whoever reads it.

        Raises:
            images.ImageError: the image is broken.
        """
        image = images.open_rgb(pair.image, self.index.max_pixels, self.at_least)
        seed = item_seed(self.seed, epoch, int(sha256_text(pair.key)[:16], 16))
        return Ready(pair.key, self.transform(image, seed), pair.caption, pair.caption_id)
