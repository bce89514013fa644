"""Chat rows as examples for a model: the data set of training, merging and predicting."""

from pathlib import Path

import pandas as pd
from torch.utils.data import Dataset

from scripts.common.errors import KilnError
from scripts.common.vlm import Example, Family


class ChatExamples(Dataset):
    """Rows as examples; images are read when they are asked for.

    Args:
        folder: images folder.
        rows: from `read_rows`.
        taught: with answers and labels; else prompts alone.
    """

    def __init__(self, folder: Path, rows: pd.DataFrame, family: Family, processor, taught: bool = True):
        self.paths = [folder / image for image in rows["image"]]
        self.prompts, self.answers = list(rows["prompt"]), list(rows["answer"])
        self.family, self.processor, self.taught = family, processor, taught

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example | KilnError:
        answer = self.answers[index] if self.taught else None
        try:
            return self.family.example(self.processor, self.paths[index], self.prompts[index], answer)
        except KilnError as error:
            return error  # raised in the main process: a worker's exception would lose its hint
