"""Sizes in pixels that must be whole multiples."""

from scripts.common.errors import KilnError


def neighbours(size: int, step: int) -> str:
    """The multiples of `step` around `size`, for hints."""
    below = size // step * step
    return " or ".join(str(fitting) for fitting in (below, below + step) if fitting > 0)


def decoder_patch(image_size: int, grid: int) -> int:
    """Side of the decoder's patches in pixels, for images of `image_size` pixels and `grid` latents per side.

    Raises:
        KilnError: the image's side is no multiple of the grid; names those that are.
    """
    if image_size < 1 or image_size % grid:
        raise KilnError(
            f"image size {image_size} is no multiple of the encoder's grid of {grid} x {grid} patches",
            f"set rae.image_size to {neighbours(image_size, grid)}, or the encoder's input_size so that it gives "
            "another grid",
        )
    return image_size // grid
