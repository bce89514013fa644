"""The published CLIP scores of all images, from their stored embeddings.

Rule `vase_score_images`. With unit vectors e (image), p and n (positive and negative prompts, see
`clip.text_direction`): similarity to either side is e.p and e.n, the acceptance score e.p - e.n, in
[-2, 2] (VaseVQA-3D, clipfilter1); views are ranked by e.p alone (clipfilter2).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from scripts.common import step, tables
from scripts.common.errors import KilnError
from scripts.vase import clip
from scripts.vase.embed_images import read_embeddings
from scripts.vase.settings import PromptSettings

COLUMNS = ["path", "high_quality_similarity", "low_quality_similarity", "score"]


def score(embeddings: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """[N,3] float64: similarity to the positive side, to the negative side, and their difference.

    Args:
        embeddings: [N,D], rows of unit length.
        positive, negative: [D], unit length.
    """
    # einsum sums each row by itself; a matrix product's order of summation depends on N
    sides = [
        np.einsum("nd,d->n", embeddings.astype(np.float64), side.astype(np.float64)) for side in (positive, negative)
    ]
    return np.stack([*sides, sides[0] - sides[1]], axis=1)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, PromptSettings)
    made.add_argument("--embeddings", type=Path, nargs="+", required=True, help="files of rule vase_embed_images")
    made.add_argument("--model", type=Path, required=True, help="folder of the same CLIP model")
    made.add_argument("--output", type=Path, required=True, help="scores of all images (.parquet)")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Score the images of `args.embeddings`."""
    values = step.read_settings(args)
    torch.set_num_threads(step.threads(args))
    inputs = {"model": args.model / clip.WEIGHTS} | {p.stem: p for p in args.embeddings}
    record = step.record(args, "scripts.vase.score_images", values, inputs)
    loaded = clip.load(args.model)
    positive, negative = (clip.text_direction(loaded, side).numpy() for side in (values.positive, values.negative))
    parts = []
    for path in args.embeddings:
        names, embeddings = read_embeddings(path)
        if embeddings.shape[1] != len(positive):
            raise KilnError(
                f"{path}: {embeddings.shape[1]} dimensions, but {args.model} gives {len(positive)}",
                "delete the embeddings of the other model and run again",
            )
        scores = score(embeddings, positive, negative)
        parts.append(pd.DataFrame(dict(zip(COLUMNS, [names, *scores.T], strict=True))))
    frame = pd.concat(parts, ignore_index=True)
    tables.write_table(args.output, frame, ["path"])
    step.log.info("%d images, mean score %.4f, sd %.4f", len(frame), frame["score"].mean(), frame["score"].std())
    record.write(args.meta, [args.output], items=len(frame))


if __name__ == "__main__":
    step.run(main)
