"""Draw the demo's breast ultrasound pictures, with twins planted among them.

Rule `demo_draw_ultrasound`. Writes, named as in BUSI, `images/{normal,benign,malignant}/benign (12).png`
with `benign (12)_mask.png` (and `_mask_1.png`) beside each; `published/{train,test}.json`, a split
that pays no heed to twins; `planted.parquet` (first, second, kind, conflict), all pairs of twins; and
`files.json`. Equal settings give equal bytes.
"""

import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
from PIL import Image

from scripts.busi.settings import PROMPT
from scripts.common import artefacts, progress, step, tables, workers
from scripts.common.errors import KilnError
from scripts.demo.settings import UltrasoundSettings
from scripts.demo.ultrasound import CLASSES, Frame, draw_frame, near_twin

_PER_SOURCE = 5  # of so many twins in a class one is of a picture that has a twin already
_NAMING, _SPLIT = 1, 2  # further random streams; a picture's own has a class and a number


class Twin(NamedTuple):
    """A copy of a picture: "identical", "resaved" (the same pixels in other bytes) or "near"."""

    kind: str
    shown_as: str  # the class whose folder it is in


class Picture(NamedTuple):
    """A finished picture and its masks, as PNG bytes."""

    kind: str  # "original", or as in `Twin`
    shown_as: str
    png: bytes
    masks: tuple[bytes, ...]


def plan(values: UltrasoundSettings) -> list[tuple[str, int, list[Twin]]]:
    """(class, number in its class, twins) of every original picture.

    Raises:
        KilnError: more twins than there are pictures to copy.
    """
    wanted = {name: getattr(values, name) for name in CLASSES}
    kinds = ["resaved" if i % 3 == 0 else "identical" for i in range(values.identical)] + ["near"] * values.near
    inside = {name: kinds[i :: len(CLASSES)] for i, name in enumerate(CLASSES)}
    sides = ("benign", "malignant")
    across = [(sides[i % 2], sides[1 - i % 2]) for i in range(values.conflicts)]
    groups = []
    for name in CLASSES:
        originals = wanted[name] - len(inside[name]) - sum(shown == name for _, shown in across)
        twins: dict[int, list[Twin]] = {}
        source = -1
        for i, kind in enumerate(inside[name]):
            source += i == 0 or i % _PER_SOURCE > 0
            twins.setdefault(source, []).append(Twin(kind, name))
        for _, shown in [pair for pair in across if pair[0] == name]:
            source += 1
            twins[source] = [Twin("near", shown)]
        if source >= originals:
            raise KilnError(
                f"demo.ultrasound.{name} = {wanted[name]} pictures are too few for {values.identical} identical and "
                f"{values.near} near twins and {values.conflicts} conflicts",
                f"set demo.ultrasound.{name} higher, or identical, near or conflicts lower",
            )
        groups += [(name, number, twins.get(number, [])) for number in range(originals)]
    return groups


def draw_group(name: str, number: int, twins: Sequence[Twin], values: UltrasoundSettings) -> list[Picture]:
    """An original picture of class `name`, and its twins."""
    rng = np.random.default_rng([values.seed, CLASSES.index(name), number])
    conflict = any(twin.shown_as != name for twin in twins)
    ambiguous, second = rng.random() < values.ambiguous or conflict, rng.random() < values.second_lesion
    frames = [draw_frame(name, ambiguous, second, values.image_size, rng)]
    effort = int(rng.integers(1, 10))  # zlib's level: files of equal pixels differ in size
    made = [Picture("original", name, _png(frames[0], effort), _masks(frames[0]))]
    for twin in twins:
        if twin.kind == "near":
            frames.append(near_twin(frames[0], frames[1:], rng))
            made.append(Picture(*twin, _png(frames[-1], int(rng.integers(1, 10))), _masks(frames[-1])))
        else:
            other = 9 if effort < 5 else 1
            png = _png(frames[0], other) if twin.kind == "resaved" else made[0].png
            made.append(Picture(*twin, png, made[0].masks))
    return made


def _png(frame: Frame, effort: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame.pixels).convert("RGB").save(buffer, "PNG", compress_level=effort)
    return buffer.getvalue()


def _masks(frame: Frame) -> tuple[bytes, ...]:
    made = []
    for mask in frame.masks or (np.zeros(frame.pixels.shape, bool),):
        buffer = io.BytesIO()
        Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))).save(buffer, "PNG")
        made.append(buffer.getvalue())
    return tuple(made)


def draw_all(values: UltrasoundSettings, processes: int) -> Iterator[list[Picture]]:
    """Each original picture with its twins, in the plan's order."""
    groups = plan(values)
    work = workers.pool(processes, return_as="generator")(
        joblib.delayed(draw_group)(*group, values) for group in groups
    )
    yield from progress.bar(work, "draw", len(groups))


def write_demo(folder: Path, values: UltrasoundSettings, processes: int) -> int:
    """Fill an existing empty `folder`; the number of pictures written."""
    names = {}
    for label, name in enumerate(CLASSES):
        (folder / "images" / name).mkdir(parents=True)
        order = np.random.default_rng([values.seed, label, 0, _NAMING]).permutation(getattr(values, name))
        names[name] = iter([f"{name}/{name} ({i + 1})" for i in order])
    paths, pairs = [], []
    for group in draw_all(values, processes):
        members = []
        for picture in group:
            stem = next(names[picture.shown_as])
            (folder / "images" / f"{stem}.png").write_bytes(picture.png)
            for i, mask in enumerate(picture.masks):
                (folder / "images" / f"{stem}_mask{f'_{i}' if i else ''}.png").write_bytes(mask)
            members.append((f"{stem}.png", picture))
        paths += [path for path, _ in members]
        pairs += [_pair(*two) for two in itertools.combinations(members, 2)]
    tables.write_table(folder / "planted.parquet", _planted(pairs), ["first", "second"])
    _write_published(folder / "published", sorted(paths), values)
    artefacts.write_listing(folder)
    return len(paths)


def _pair(one: tuple[str, Picture], other: tuple[str, Picture]) -> dict:
    (first, a), (second, b) = sorted((one, other))
    return {
        "first": first,
        "second": second,
        "kind": "near" if "near" in (a.kind, b.kind) else "identical",
        "conflict": a.shown_as != b.shown_as,
    }


def _planted(pairs: list[dict]) -> pd.DataFrame:
    types = {"first": str, "second": str, "kind": str, "conflict": bool}
    return pd.DataFrame(pairs, columns=list(types)).astype(types)


def _write_published(folder: Path, paths: list[str], values: UltrasoundSettings) -> None:
    """Rows in the form of the published split of BUSI: class folders in capitals, sides drawn image by image."""
    folder.mkdir()
    order = np.random.default_rng([values.seed, len(CLASSES), 0, _SPLIT]).permutation(len(paths))
    tested = set(order[: round(values.published_test * len(paths))])
    for side in ("train", "test"):
        chosen = [path for i, path in enumerate(paths) if (i in tested) == (side == "test")]
        rows = [
            {
                "image": path.capitalize(),
                "text": PROMPT,
                "answer": path.split("/")[0].capitalize(),
                "label": CLASSES.index(path.split("/")[0]),
            }
            for path in chosen
        ]
        artefacts.write_json(folder / f"{side}.json", rows)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, UltrasoundSettings)
    made.add_argument("--output-folder", type=Path, required=True, help="folder to make or replace")
    args = made.parse_args(argv)
    values = step.read_settings(args)
    record = step.record(args, "scripts.demo.draw_ultrasound", values, {})
    folder = args.output_folder
    with artefacts.atomic_folder(folder) as temporary:
        count = write_demo(temporary, values, step.threads(args))
    outputs = [folder / "files.json", folder / "planted.parquet"]
    outputs += [folder / "published" / f"{side}.json" for side in ("train", "test")]
    record.write(args.meta, outputs, items=count)


if __name__ == "__main__":
    step.run(main)
