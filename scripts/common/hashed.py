"""Numbers that follow from names alone, so that no order and no other item moves them."""

from scripts.common import artefacts


def unit(seed: int, *names: str) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    return int(artefacts.sha256_text(str(seed), *names)[:13], 16) / 16**13
