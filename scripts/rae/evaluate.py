"""rFID, PSNR, SSIM and LPIPS of reconstructions, beside the floor that any autoencoder must beat.

Rule `rae_evaluate`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.common import artefacts, step
from scripts.rae import scores


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--name", required=True, help="the encoder's name in the configuration")
    made.add_argument("--reference", type=Path, required=True, help="folder of rule rae_compute_reference_stats")
    made.add_argument("--reconstructions", type=Path, required=True, help="folder of rule rae_reconstruct")
    made.add_argument("--output", type=Path, required=True, help="metrics.json")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Score what `args` name."""
    inputs = {name: args.reference / name for name in scores.REFERENCE_FILES}
    inputs |= {name: args.reconstructions / name for name in scores.RECONSTRUCTION_FILES}
    record = step.record(args, "scripts.rae.evaluate", None, inputs)
    metrics = scores.score(args.reference, args.reconstructions, args.name)
    artefacts.write_json(args.output, metrics)
    report(metrics)
    record.write(args.meta, [args.output], items=metrics["summary"][f"{args.name}_rfid"]["n"])


def report(metrics: dict) -> None:
    """Print the scores, a line each."""
    found = {name.rpartition("_")[2]: one for name, one in metrics["summary"].items()}
    for name, label, digits in (
        ("rfid", "rFID Score", 4),
        ("psnr", "PSNR", 2),
        ("ssim", "SSIM", 4),
        ("lpips", "LPIPS", 4),
    ):
        one = found[name]
        low, high = one["ci95"]
        line = f"{label}: {one['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
        if one["baseline"] is not None:
            line += f", {one['baseline_kind'].replace('_', ' ')}: {one['baseline']:.{digits}f}"
        print(line)
    about = metrics["features"]
    print(f"n = {found['rfid']['n']}, features of {about['extractor']} (weights {about['weights'][:12]})")
    for warning in metrics["warnings"]:
        print(f"Warning: rFID: {warning}")


if __name__ == "__main__":
    step.run(main)
