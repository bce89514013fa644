"""Folders of relative links to raw images."""

from pathlib import Path

import pandas as pd

from scripts.common import artefacts


def link_images(folder: Path, rows: pd.DataFrame, images: Path) -> None:
    """Make `folder` hold `rows.name` -> link to the raw image `rows.path`, with a `files.json`.

    Args:
        folder: replaced whole.
        rows: columns name, path, bytes, sha256; names are unique.
        images: folder that the paths are relative to.
    """
    links = {name: images / path for name, path in zip(rows["name"], rows["path"], strict=True)}
    facts = zip(rows["name"], rows["bytes"], rows["sha256"], strict=True)
    records = {name: {"bytes": int(size), "sha256": digest} for name, size, digest in facts}
    artefacts.link_folder(folder, links, records)
