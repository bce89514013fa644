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
    ordered = rows[["name", "path", "bytes", "sha256"]].sort_values("name")
    linked = (
        (row.name, f"{images}/{row.path}", {"bytes": int(row.bytes), "sha256": row.sha256})
        for row in ordered.itertuples(index=False)
    )
    artefacts.link_rows(folder, linked)
