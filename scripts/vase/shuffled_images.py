"""Which row's pictures stand in for a row's own: pictures of another vase, each used once where that is possible."""

import dataclasses
import random
from collections import Counter, defaultdict
from collections.abc import Sequence

from scripts.common.artefacts import sha256_text
from scripts.common.errors import KilnError
from scripts.vase.vqa_rows import VqaRow


def with_other_images(rows: Sequence[VqaRow], seed: int) -> list[VqaRow]:
    """`rows` with the pictures of rows about other vases, of the same dimension where there is one.

    Where a row needs another number of pictures than its donor has, the donor's are repeated or cut.

    Raises:
        KilnError: all rows are about one vase.
    """
    groups: dict[str, list[VqaRow]] = defaultdict(list)
    for row in rows:
        groups[row.dimension].append(row)
    donors: dict[str, VqaRow] = {}
    for dimension, group in groups.items():
        rng = random.Random(int(sha256_text(str(seed), dimension), 16))
        donors |= _rotated(group, rng)
        donors |= _drawn([row for row in group if row.id not in donors], group, rows, rng)
    return [dataclasses.replace(row, images=_fitted(donors[row.id].images, len(row.images))) for row in rows]


def _apart(row: VqaRow, other: VqaRow) -> bool:
    """Whether `other` shows nothing of `row`: another vase, and no picture that compares both."""
    return row.vase != other.vase and not set(row.images) & set(other.images)


def _rotated(group: Sequence[VqaRow], rng: random.Random) -> dict[str, VqaRow]:
    """{id: donor} by a permutation; nothing where one vase has more than half of the rows.

    With each vase's rows side by side, a shift by the largest vase's number of rows leaves every vase. A row that
    shares a picture with the one that it would get is left out.
    """
    most = max(Counter(row.vase for row in group).values())
    if 2 * most > len(group):
        return {}
    vases = sorted({row.vase for row in group})
    rng.shuffle(vases)
    place = {vase: number for number, vase in enumerate(vases)}
    order = sorted(group, key=lambda row: (place[row.vase], row.id))
    shifted = order[most:] + order[:most]
    return {row.id: other for row, other in zip(order, shifted, strict=True) if _apart(row, other)}


def _drawn(left: Sequence[VqaRow], group: Sequence[VqaRow], rows: Sequence[VqaRow], rng) -> dict[str, VqaRow]:
    """{id: donor} for the rows that are `left`, from the rows of their dimension, else from all."""
    found = {}
    for row in sorted(left, key=lambda row: row.id):
        near = [other for other in group if _apart(row, other)]
        others = near or [other for other in rows if _apart(row, other)]
        if not others:
            raise KilnError(
                f"row {row.id}: no other vase than {row.vase}, so no other picture can be shown",
                "put at least two vases on the test side",
            )
        found[row.id] = rng.choice(sorted(others, key=lambda other: other.id))
    return found


def _fitted(images: tuple[str, ...], count: int) -> tuple[str, ...]:
    return tuple(images[number % len(images)] for number in range(count))
