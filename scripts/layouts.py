"""What the folders and files of a user's own data are to hold, looked at while Snakemake plans: before any job.

The steps look again, at every file, as the user may call them by hand.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from scripts.common.errors import KilnError
from scripts.vase.settings import DatasetSettings

PAGE = "docs/your-data.md"
_SLIDES = "a folder of *.h5 or *.hdf5 at any depth, the tile embeddings of a slide in each"
LAYOUTS: Mapping[str, str] = {
    "vase.images": "a folder of photographs at any depth, named <vase>_<view>_ac001001.jpg (vase.list.view_pattern)",
    "vase.labelled": "a folder that holds 0/ (images of low quality) and 1/ (of high quality)",
    "vase.attributes": "a table (.csv, .parquet) by vase",
    "vase.truth": "a table path, quality, view_quality",
    "vase.dataset.captions": 'JSON: [{"images": [..], "caption": .., "conversations": [..]}, ..]',
    "vase.dataset.questions": 'JSON: [{"vase": .., "question": .., "answer": .., "dimension": ..}, ..]',
    "busi.images": "a folder that holds a folder of images for each of busi.list.classes, masks beside the images",
    "rae.images": "a folder that holds train/CLASS/*.JPEG and val/CLASS/*.JPEG, or CLASS/*.JPEG alone",
    "rae.dataset.labels": "a file of lines `name label`",
    "coca.slides": _SLIDES,
    "coca.predict.slides": _SLIDES,
    "coca.labels": 'JSON: {"slide": "text", ..}, a slide being its file name without the ending',
    "coca.list.patients": "a table slide,patient",
    "biomedica.shards": "a folder of *.tar at any depth; null streams all",
}


def explained(
    error: KilnError, path: str, keys: Sequence[str], aside: str = "", pipelines: Sequence[str] = ()
) -> KilnError:
    """The error with the keys of the configuration that hold `path`, what they are to be, and where to read on.

    Args:
        pipelines: those that targets of all pipelines are of.
    """
    if not keys:
        return error
    named = " and ".join(keys)
    hint = error.hint if Path(path).exists() else f"set {named} to where your data are"
    if path.startswith("~"):
        hint += ", as a whole path: ~ stands for no folder here"
    wanted = [f"{key} is {LAYOUTS[key]} ({PAGE}, section {key.partition('.')[0]})" for key in keys if key in LAYOUTS]
    without = [name for name in pipelines if not any(key.startswith(f"{name}.") for key in keys)]
    if without and len(without) < len(pipelines) and not Path(path).exists():
        wanted.append("or set `pipelines` to those that you use, which is what `all`, `report` and `paper` are of")
    return KilnError(f"{error.message} (the value of {named}{aside})", "; ".join([hint, *wanted]))


def captions_of(dataset: DatasetSettings) -> str | None:
    """The file of captions, if there is one, of a second half of `vase`.

    Raises:
        KilnError: neither captions nor questions are given, so there is nothing to ask.
    """
    if dataset.captions is None and dataset.questions is None:
        raise KilnError(
            "vase.dataset.captions and vase.dataset.questions are not given, so there is nothing to fine-tune on",
            f"set one of them to a file ({PAGE}, section vase), or ask for `vase_images`, the first half alone",
        )
    return dataset.captions


def require_file(path: str) -> None:
    """Refuse a file that is not there.

    Raises:
        KilnError: it is not.
    """
    if not Path(path).is_file():
        raise KilnError(f"{path}: no such file", "give a file")


def require_classes(folder: Path, tops: Iterable[str], classes: Sequence[str], key: str | None = None) -> None:
    """Refuse a folder that lacks one of its class folders, in any letter case.

    Args:
        tops: names of the folders in `folder` that hold images; an empty one stands for images in no folder.
        key: where the configuration has `classes`, if it does.

    Raises:
        KilnError: says which classes were expected, which are missing, and which folders there are.
    """
    found = sorted(top for top in tops if top)
    known = {name.casefold() for name in found}
    missing = [name for name in classes if name.casefold() not in known]
    if missing:
        named = f" ({key}, in any letter case)" if key else ""
        raise KilnError(
            f"{folder}: no images of class {', '.join(missing)}: expected a folder of images for each of "
            f"{', '.join(classes)}{named}; the folders with images are {', '.join(found) or 'none'}",
            _mend(folder, found, missing, classes, key),
        )


def _mend(folder: Path, found: Sequence[str], missing: Sequence[str], classes: Sequence[str], key: str | None) -> str:
    names = {name.casefold() for name in classes}
    if folder.name.casefold() in names:
        return f"give the folder above, {folder.parent}"
    for top in found:
        if any(below.name.casefold() in names for below in (folder / top).iterdir() if below.is_dir()):
            return f"give {folder / top}, which holds class folders"
    unknown = [name for name in found if name.casefold() not in names]
    near = difflib.get_close_matches(missing[0].casefold(), [name.casefold() for name in unknown], n=1)
    if near:
        return f"rename the folder {next(name for name in unknown if name.casefold() == near[0])} to {missing[0]}"
    own = f", or set {key} to [{', '.join(found)}] if these are all your classes" if key and found else ""
    return f"add a folder with images for {', '.join(missing)}{own}"


def require_class_folders(folder: Path, tops: Iterable[str], train_split: str) -> None:
    """Refuse a folder for `rae` without a folder for each class.

    Args:
        tops: of `require_classes`; not looked at.

    Raises:
        KilnError: neither its folder of training images nor it itself holds folders.
    """
    train = folder / train_split if (folder / train_split).is_dir() else folder
    if not any(one.is_dir() and not one.name.startswith(".") for one in train.iterdir()):
        raise KilnError(
            f"{train}: no class folders", "expected a folder of images for each class; for an Arrow folder set "
            "rae.dataset.source to arrow",
        )  # fmt: skip


def arrow_splits(folder: Path) -> list[str]:
    """state.json of each split of what `DatasetDict.save_to_disk` wrote.

    Raises:
        KilnError: there is none.
    """
    found = sorted(map(str, folder.glob("*/state.json")))
    if not folder.is_dir():
        raise KilnError(f"{folder}: no such folder", "give an Arrow folder")
    if not found:
        raise KilnError(
            f"{folder}: no Arrow data set: no */state.json",
            "give what DatasetDict.save_to_disk wrote, with a folder for each split; for folders of images set "
            "rae.dataset.source to folders",
        )
    return found


def require_shards(folder: Path, tops: Mapping[str, int], default: str, say: Callable[[str], None]) -> None:
    """Say that all will be streamed where there are no shards, or refuse that.

    Args:
        tops: {folder: shards in it}.
        say: gets the line.

    Raises:
        KilnError: the folder is not there, although the user named it: it is not the default.
    """
    there = folder.is_dir()
    if not there and str(folder) != default:
        raise KilnError(f"{folder}: no such folder", "give a folder")
    if not tops:
        say(f"{folder}: {'no .tar in it' if there else 'no such folder'} (biomedica.shards), so all is streamed")
