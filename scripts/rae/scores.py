"""From what the steps kept of originals, reconstructions and poor copies to metrics with intervals."""

from pathlib import Path

import numpy as np
import pandas as pd

from scripts.common import artefacts, statistics, tables
from scripts.common.errors import KilnError
from scripts.rae import fid
from scripts.rae.extractors import RANDOM_LABEL
from scripts.rae.quality import COLUMNS, HIGHER_IS_BETTER, SCORED
from scripts.rae.settings import CUT_FROM_TRAIN, PerceptualSettings

REFERENCE_FILES = ("reference.safetensors", "shrunk.safetensors", "colour.safetensors", "floor.json")
RECONSTRUCTION_FILES = ("features.safetensors", "images.parquet")


CUT = "validation is a share cut from train, not a split of its own"


def score(
    reference: Path, reconstructions: Path, name: str, perceptual: PerceptualSettings, validation: str | None = None
) -> dict:
    """metrics.json: {summary, warnings, features}.

    Args:
        reference: folder that rule rae_compute_reference_stats wrote.
        reconstructions: folder that rule rae_reconstruct wrote.
        name: the encoder's, in front of each metric's own.
        perceptual: what LPIPS was taken with; a random backbone is said beside it.
        validation: where the pictures come from, as the dataset's summary says; None: not known.

    Raises:
        KilnError: a file is missing or damaged, or the two folders are not of the same images.
    """
    originals, features = (
        fid.load_groups(path) for path in (reference / REFERENCE_FILES[0], reconstructions / RECONSTRUCTION_FILES[0])
    )
    table = tables.read_table(reconstructions / "images.parquet", ["row", *SCORED])
    counts = [sum(one.count for one in side) for side in (originals, features)]
    if [len(table), len(table)] != counts:
        raise KilnError(
            f"{reconstructions}: {len(table)} scored pictures, {counts[1]} reconstructions and {counts[0]} references",
            "make all three from one dataset: delete the older ones and run again",
        )
    floor = artefacts.read_json(reference / "floor.json")
    made = picture_scores(table)
    for metric in ("psnr", "ssim"):
        constant = {"baseline": floor[f"constant_{metric}"], "baseline_kind": "constant"}
        made[metric] |= constant | {"trivial": floor[f"colour_{metric}"]}
    made["lpips"] |= {"baseline": float(table["shrunk_lpips"].mean()), "baseline_kind": "shrunk_input"}
    made["rfid"] = rfid(originals, features, reference)
    if perceptual.backbone is not None:
        made["lpips"]["label"] = RANDOM_LABEL
    whole = [fid.merge(side) for side in (originals, features)]
    origin = whole[0].origin
    return {
        "summary": {f"{name}_{metric}": one for metric, one in made.items()},
        "warnings": fid.warnings(*whole) + [CUT] * (validation == CUT_FROM_TRAIN),
        "features": {
            "extractor": origin.extractor, "weights": origin.weights, "reference_images": origin.images,
            "preprocessing": origin.preprocessing, "split": origin.split, "n": counts[1],
        },
    }  # fmt: skip


def picture_scores(table: pd.DataFrame) -> dict[str, dict]:
    """{column: metric} of images.parquet: mean over pictures, n, bootstrap interval."""
    made = {}
    for name in COLUMNS:
        values = table[name].to_numpy()
        interval = statistics.bootstrap_interval(values)
        made[name] = statistics.metric(
            float(values.mean()), len(values), interval, higher_is_better=HIGHER_IS_BETTER[name]
        )
    return made


def rfid(originals: list[fid.FeatureStatistics], features: list[fid.FeatureStatistics], reference: Path) -> dict:
    """The metric rFID of `features`, with jackknife intervals over groups of pictures.

    `baseline` is the distance of copies made 8 times smaller and large again; `difference` is that to it, which the
    same groups left out of both make a paired one; `trivial` is the distance of each picture's mean colour. All are
    of the same number of pictures, on which a Fréchet distance depends: it is too large by a term in 1/n.
    """
    value, left_out = fid.distance_with_leave_outs(originals, features, "reconstructions")
    copies = fid.load_groups(reference / "shrunk.safetensors")
    bound, bounds_left_out = fid.distance_with_leave_outs(originals, copies, "shrunk copies")
    colours = fid.merge(fid.load_groups(reference / "colour.safetensors"))
    origin = originals[0].origin
    label = {"label": origin.label} if origin.label else {}
    error, interval = statistics.jackknife_interval(value, left_out, least=0)
    _, of_difference = statistics.jackknife_interval(value - bound, np.subtract(left_out, bounds_left_out))
    return statistics.metric(
        value, sum(one.count for one in features), interval, bound, "shrunk_input", higher_is_better=False,
        trivial=fid.frechet_distance(fid.merge(originals), colours), interval_of="delete-a-group jackknife",
        groups=len(features), standard_error=error,
        difference={"value": value - bound, "ci95": list(of_difference)},
        extractor=origin.extractor, weights=origin.weights, **label,
    )  # fmt: skip
