"""Images that a manifest calls readable, in data loaders: what happens when one no longer is.

The error is handed over as an item, not raised: torch re-raises a worker's exception with one argument,
which would lose its hint.
"""

import hashlib
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import default_collate

from scripts.common.errors import KilnError
from scripts.common.images import ImageError, open_rgb

NO_LIMIT = 2**62  # the listing has refused over-large files already


def open_listed(path: Path, at_least: int | None, sha256: str | None = None) -> Image.Image:
    """The image as `images.open_rgb` gives it.

    Args:
        sha256: of the file as it was listed; None: not checked.

    Raises:
        KilnError: the file is gone, no longer readable, or no longer what was listed.
    """
    try:
        if sha256 is None:
            return open_rgb(path, NO_LIMIT, at_least)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise KilnError(
                f"{path}: changed since it was listed",
                "run again: the folder is scanned anew, and what is done stays done",
            )
        return open_rgb(data, NO_LIMIT, at_least)
    except (ImageError, FileNotFoundError) as error:
        raise KilnError(
            f"{path}: readable when it was listed, now: {error}",
            "run again: the folder is scanned anew, and what is done stays done",
        ) from None


def collate(items: list[Any]) -> Any:
    """torch's default batch of items, or the first error among them."""
    errors = [item for item in items if isinstance(item, KilnError)]
    return errors[0] if errors else default_collate(items)


def unwrapped(batch: Any) -> Any:
    """A batch that `collate` made.

    Raises:
        KilnError: it is one.
    """
    if isinstance(batch, KilnError):
        raise batch
    return batch
