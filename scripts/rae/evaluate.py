"""rFID, PSNR, SSIM and LPIPS of reconstructions, beside the floor that any autoencoder must beat.

Rule `rae_evaluate`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.common import artefacts, statistics, step, tables
from scripts.common.errors import KilnError
from scripts.rae import fid
from scripts.rae.quality import COLUMNS, HIGHER_IS_BETTER


def scores(table, seed: int) -> dict[str, dict]:
    """{column: metric} of images.parquet: mean over pictures, n, bootstrap interval."""
    made = {}
    for name in COLUMNS:
        values = table[name].to_numpy()
        interval = statistics.bootstrap_interval(values, seed=seed)
        made[name] = statistics.metric(
            float(values.mean()), len(values), interval, higher_is_better=HIGHER_IS_BETTER[name]
        )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--reference", type=Path, required=True, help="reference.safetensors of the validation split")
    made.add_argument("--shrunk", type=Path, required=True, help="shrunk.safetensors: pictures made small and large")
    made.add_argument("--floor", type=Path, required=True, help="floor.json: PSNR of one constant picture")
    made.add_argument("--features", type=Path, required=True, help="features.safetensors of the reconstructions")
    made.add_argument("--images", type=Path, required=True, help="images.parquet: scores by picture")
    made.add_argument("--output", type=Path, required=True, help="metrics.json")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Score what `args` name."""
    names = ("reference", "shrunk", "floor", "features", "images")
    record = step.record(args, "scripts.rae.evaluate", None, {name: getattr(args, name) for name in names})
    reference, shrunk, features = (
        fid.FeatureStatistics.load(path) for path in (args.reference, args.shrunk, args.features)
    )
    table = tables.read_table(args.images, ["row", *COLUMNS])
    if not len(table) == features.count == reference.count:
        raise KilnError(
            f"{args.images}: {len(table)} pictures, {features.count} reconstructions and {reference.count} references",
            "make all three from one dataset: delete the older ones and run again",
        )
    floor = artefacts.read_json(args.floor)
    rfid, bound = fid.frechet_distance(reference, features), fid.frechet_distance(reference, shrunk)
    found = fid.warnings(reference, features)
    made = scores(table, seed=0)
    made["psnr"] |= {"baseline": floor["constant_psnr"], "baseline_kind": "constant"}
    made["rfid"] = {
        "value": rfid, "n": features.count, "ci95": None, "higher_is_better": False,
        "baseline": bound, "baseline_kind": "shrunk_input",
        "reason": "a distance of two sets has no interval over pictures",
    }  # fmt: skip
    about = {"extractor": reference.origin.extractor, "weights": reference.origin.weights,
             "reference_images": reference.origin.images, "preprocessing": reference.origin.preprocessing}  # fmt: skip
    artefacts.write_json(args.output, {"summary": made, "warnings": found, "features": about})
    for warning in found:
        step.log.warning("rFID: %s", warning)
    step.log.info("rFID Score: %.4f (n = %d, extractor %s)", rfid, features.count, about["extractor"])
    step.log.info("PSNR %.2f dB, constant picture %.2f dB", made["psnr"]["value"], floor["constant_psnr"])
    record.write(args.meta, [args.output], items=features.count)


if __name__ == "__main__":
    step.run(main)
