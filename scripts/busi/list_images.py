"""The images and masks below the class folders: every file is listed or accounted for.

Rule `busi_list_images`. The folder holds one folder per class, in any letter case and any depth below.
`benign (12)_mask.png`, `benign (12)_mask_1.png`, ... are masks of the image `benign (12)` beside them; so is any file
with `_mask` and no letter after it in its name, such as a copy, `benign (12)_mask (2).png`.
"""

import argparse
import collections
import difflib
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import pyarrow as pa

from scripts.busi.settings import ListSettings
from scripts.common import artefacts, images, shards, step, tables
from scripts.common.errors import KilnError
from scripts.common.inspection import inspect_files

MASK = re.compile(r"(?P<image>.*)_mask([\W\d_].*)?", re.IGNORECASE | re.DOTALL)
MANIFEST = pa.schema(
    [
        ("path", pa.string()), ("sha256", pa.string()), ("bytes", pa.int64()), ("width", pa.int64()),
        ("height", pa.int64()), ("mode", pa.string()), ("format", pa.string()), ("status", pa.string()),
        ("reason", pa.string()), ("label", pa.int64()),
    ]
)  # fmt: skip
MASKS = pa.schema([("path", pa.string()), ("image", pa.string()), ("sha256", pa.string()), ("bytes", pa.int64())])


def labels_of(paths: Sequence[str], classes: Sequence[str], folder: Path) -> dict[str, int]:
    """{path: label} of relative paths, from their first folder in any letter case.

    Raises:
        KilnError: a file lies in no class folder, or two paths differ in their folders' letter case alone.
    """
    numbers = {name.casefold(): label for label, name in enumerate(classes)}
    labels, seen = {}, {}
    for path in paths:
        top = path.partition("/")[0] if "/" in path else None
        if top is None or top.casefold() not in numbers:
            raise _no_class(path, top, classes, folder)
        parent, _, name = path.rpartition("/")
        other = seen.setdefault((parent.casefold(), name), path)
        if other != path:
            raise KilnError(
                f"{folder}: {other} and {path} differ in the letter case of a folder alone",
                "published splits name images by class folders in any letter case: merge the two folders into one, "
                "and rename one of the two files where they are not the same",
            )
        labels[path] = numbers[top.casefold()]
    return labels


def _no_class(path: str, top: str | None, classes: Sequence[str], folder: Path) -> KilnError:
    wanted = f"the class folders are {', '.join(classes)} (busi.list.classes), in any letter case"
    known = {name.casefold(): name for name in classes}
    if top is None:
        hint = "move it into one, or out of the folder"
        if folder.name.casefold() in known:
            hint = f"set busi.images to {folder.parent}, which holds the class folders"
        return KilnError(f"{folder / path}: not in a class folder; {wanted}", hint)
    near = difflib.get_close_matches(top.casefold(), known, n=1)
    below = path.split("/")[1].casefold() in known
    if near:
        hint = f"did you mean {known[near[0]]}? Rename the folder"
    elif below:
        hint = f"set busi.images to {folder / top}"
    else:
        hint = "move it out of the folder of images, or add its name to busi.list.classes"
    return KilnError(f"{folder / path}: folder {top!r} is no class; {wanted}", hint)


def image_of_mask(path: str) -> str | None:
    """The path, without its ending, of the image that a mask's name belongs to; None for a file that is no mask."""
    place = PurePosixPath(path)
    match = MASK.fullmatch(place.stem)
    return match and f"{place.parent}/{match['image']}"


def find_images(masks: Sequence[str], listed: Sequence[str]) -> dict[str, str]:
    """{mask: its image} for the masks that have one; letter case does not matter.

    Of images that differ in their ending alone, the one with the mask's ending is meant, else the first.
    """
    by_name = collections.defaultdict(list)
    for path in sorted(listed):
        by_name[str(PurePosixPath(path).with_suffix("")).casefold()].append(path)
    found = {}
    for mask in masks:
        ending = PurePosixPath(mask).suffix.casefold()
        candidates = by_name.get(image_of_mask(mask).casefold(), [])
        if candidates:
            found[mask] = min(candidates, key=lambda path: PurePosixPath(path).suffix.casefold() != ending)
    return found


def check_classes(frame: pd.DataFrame, masks: Sequence[str], classes: Sequence[str], folder: Path) -> None:
    """Every class needs a readable image, and one that is more than black and white.

    Raises:
        KilnError: names the class and what its folder holds instead.
    """
    for label, name in enumerate(classes):
        own = frame[frame["label"] == label]
        ok = own.loc[own["status"] == "ok", "path"]
        masked = sum(path.partition("/")[0].casefold() == name.casefold() for path in masks)
        if ok.empty:
            held = f"{len(own)} unreadable images, {masked} masks"
            first = f"; the first, {own['path'].iloc[0]}: {own['reason'].iloc[0]}" if len(own) else ""
            hint = (
                "these are masks alone: set busi.images to the folder that has the images"
                if masked and own.empty
                else f"all classes need images: fill the folder {name}, or take it out of busi.list.classes"
            )
            raise KilnError(f"{folder}: no readable image of class {name} ({held}){first}", hint)
        if all(_is_black_and_white(folder / path) for path in ok):
            raise KilnError(
                f"{folder}: all {len(ok)} images of class {name} are black and white only, such as {ok.iloc[0]}: "
                "these look like masks",
                "set busi.images to the folder that has the images; masks among them are known by names that end in "
                "_mask or _mask_1",
            )


def _is_black_and_white(path: Path) -> bool:
    """Whether nearly all pixels are black or white, as in a mask, be it resized or a JPEG."""
    shades = np.array(images.open_rgb(path, max_pixels=2**62).convert("L").histogram())
    return shades[16:240].sum() < 0.02 * shades.sum()


def summarise(frame: pd.DataFrame, masks: pd.DataFrame, bad: pd.DataFrame, found: shards.Scan, classes) -> dict:
    """Counts of the listing.

    Raises:
        KilnError: files do not add up.
    """
    ok = frame[frame["status"] == "ok"]
    counts = tables.reconcile("busi_list_images", len(found.items), ok=len(ok), masks=len(masks), quarantined=len(bad))
    per_image = masks["image"].value_counts()
    return {
        **counts,
        "not_images_by_name": found.ignored,
        "reasons": bad["reason"].str.split(":").str[0].value_counts().sort_index().to_dict(),
        "by_class": {name: int((ok["label"] == label).sum()) for label, name in enumerate(classes)},
        "images_with_masks": len(per_image),
        "images_with_several_masks": int((per_image > 1).sum()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ListSettings)
    made.add_argument("--images", type=Path, required=True, help="folder with one folder per class")
    made.add_argument("--output-folder", type=Path, required=True, help="where the manifest and its companions go")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """List what is below `args.images`."""
    values = step.read_settings(args)
    record = step.record(args, "scripts.busi.list_images", values, {})
    found = shards.scan(args.images, images.EXTENSIONS)
    paths = [item.path for item in found.items]
    labels = labels_of(paths, values.classes, args.images)
    masks = [path for path in paths if image_of_mask(path) is not None]
    listed = [path for path in paths if image_of_mask(path) is None]
    inspected = pd.DataFrame(inspect_files(args.images, paths, values.max_pixels, step.threads(args)))
    everything = inspected.assign(
        label=inspected["path"].map(labels), image=inspected["path"].map(find_images(masks, listed))
    )
    is_mask = everything["path"].isin(masks)
    orphan = is_mask & everything["image"].isna()
    everything.loc[orphan, "reason"] = "mask without an image: no " + everything["path"][orphan].map(image_of_mask)
    everything.loc[orphan, "status"] = "quarantined"
    bad = everything[everything["status"] == "quarantined"].sort_values("path")
    frame, kept = everything[~is_mask], everything[is_mask & (everything["status"] == "ok")]
    check_classes(frame, masks, values.classes, args.images)
    summary = summarise(frame, kept, bad, found, values.classes)
    folder = args.output_folder
    outputs = [folder / name for name in ("manifest.parquet", "masks.parquet", "quarantine.tsv", "summary.json")]
    tables.write_table(outputs[0], frame[MANIFEST.names], ["path"], MANIFEST)
    tables.write_table(outputs[1], kept[MASKS.names], ["path"], MASKS)
    artefacts.write_text(outputs[2], bad[["path", "reason"]].to_csv(sep="\t", index=False))
    artefacts.write_json(outputs[3], summary)
    step.log.info("%s", summary)
    record.write(args.meta, outputs, items=len(paths))


if __name__ == "__main__":
    step.run(main)
