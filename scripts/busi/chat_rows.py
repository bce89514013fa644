"""Chat rows of build_conversations, read and checked."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from scripts.common.errors import KilnError

COLUMNS = ("image", "sha256", "label", "group", "prompt", "answer")


def read_rows(path: Path, classes: Sequence[str] | None = None) -> pd.DataFrame:
    """Columns image, sha256, label (int64), group, prompt, answer of a chat file (.jsonl), in its order.

    Args:
        classes: their names, where labels are to be checked.

    Raises:
        KilnError: a missing file, no rows, a line that is no such row, a label that is no class, two rows for an
            image; names file and line.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise KilnError(f"{path}: cannot be read ({error.strerror})", "run rule busi_build_conversations") from None
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            user, assistant = row["messages"]
            prompt, answer = user["content"][1]["text"], assistant["content"][0]["text"]
            rows.append([row["image"], row["sha256"], row["label"], row["group"], prompt, answer])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise KilnError(
                f"{path}, line {number}: no chat row ({type(error).__name__}: {error})",
                "make the file by rule busi_build_conversations",
            ) from None
        label = row["label"]
        known = type(label) is int and label >= 0 and (classes is None or label < len(classes))
        if not known:
            expected = f"expected 0 to {len(classes) - 1}" if classes else "expected the number of a class"
            raise KilnError(
                f"{path}, line {number}: label {label!r} is no class; {expected}",
                "give --classes in the order of busi.list.classes, which the file was made with",
            )
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    if frame.empty:
        raise KilnError(f"{path}: no rows", "look at the split: a side is empty")
    doubled = frame.index[frame["image"].duplicated()]
    if len(doubled):
        raise KilnError(
            f"{path}, line {doubled[0] + 1}: a second row for {frame['image'][doubled[0]]}",
            "keep one row for each image",
        )
    return frame
