"""rFID, PSNR, SSIM and LPIPS of reconstructions, beside the floor that any autoencoder must beat.

By hand, one command for one checkpoint and a folder of pictures, for one process or, under
`python -m scripts.common.launch`, several; killed, it carries on from whole parts:

    python -m scripts.rae.evaluate --checkpoint autoencoder.safetensors --data DIR --output-dir OUT

Rule `rae_evaluate` scores what rules rae_compute_reference_stats and rae_reconstruct have left.
"""

import argparse
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from scripts.common import artefacts, devices, model_folders, step
from scripts.common.errors import KilnError
from scripts.common.fingerprint import fingerprint
from scripts.common.settings import of_kind
from scripts.rae import checkpoints, compute_reference_stats, evaluation, extractors, reconstruct, scores
from scripts.rae.perceptual import Lpips
from scripts.rae.reconstruct import ReconstructSettings
from scripts.rae.settings import EncodersSettings

LINES = (("rfid", "rFID Score", 4), ("psnr", "PSNR", 2), ("ssim", "SSIM", 4), ("lpips", "LPIPS", 4))


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ReconstructSettings, by_hand=True)
    step.add_device(made)
    hand = made.add_argument_group("by hand, a checkpoint")
    hand.add_argument("--checkpoint", type=Path, help="autoencoder.safetensors of rule rae_train_autoencoder")
    hand.add_argument(
        "--data", type=Path,
        help="pictures to reconstruct: class folders, a folder of images, or what datasets.load_from_disk reads",
    )  # fmt: skip
    hand.add_argument("--output-dir", type=Path, help="metrics.json, images.parquet, reconstructions.png, meta.json")
    hand.add_argument("--num-samples", type=int, help="score so many pictures (default: all, as the paper does)")
    hand.add_argument("--batch-size", type=int, help="pictures at a time; no score depends on it (default: 64)")
    hand.add_argument("--extractor", choices=(extractors.INCEPTION, extractors.RANDOM), help="of rFID's features")
    hand.add_argument("--encoder", type=Path, help="folder of the encoder (default: the retrieved one)")
    hand.add_argument("--inception", type=Path, help="torch-fidelity's Inception weights (default: the retrieved ones)")
    hand.add_argument("--vgg", type=Path, help="VGG16 weights of LPIPS, .pth (default: the retrieved ones)")
    hand.add_argument("--models", type=Path, default=Path("resources/models"), help="folder of retrieved models")
    rule = made.add_argument_group("in the pipeline, finished steps")
    rule.add_argument("--name", help="the encoder's name in the configuration")
    rule.add_argument("--reference", type=Path, help="folder of rule rae_compute_reference_stats")
    rule.add_argument("--reconstructions", type=Path, help="folder of rule rae_reconstruct")
    rule.add_argument("--dataset-summary", type=Path, help="summary.json of rule rae_build_arrow")
    rule.add_argument("--output", type=Path, help="metrics.json")
    args = made.parse_args(argv)
    if (args.checkpoint is None) == (args.reference is None):
        made.error("give either --checkpoint, to score one by hand, or --reference, to score finished steps")
    needed = ("data", "output_dir") if args.checkpoint else ("name", "reconstructions", "output")
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(args, name) is None]
    if missing:
        made.error(f"{' and '.join(missing)} missing beside --{'checkpoint' if args.checkpoint else 'reference'}")
    run(args)


def run(args: argparse.Namespace) -> None:
    """Score what `args` name."""
    if args.checkpoint is None:
        score_steps(args)
    else:
        score_checkpoint(args)


def score_steps(args: argparse.Namespace) -> None:
    """Score the results of finished steps."""
    inputs = {name: args.reference / name for name in scores.REFERENCE_FILES}
    inputs |= {name: args.reconstructions / name for name in scores.RECONSTRUCTION_FILES}
    inputs |= {"dataset": args.dataset_summary} if args.dataset_summary else {}
    values = step.read_settings(args)
    record = step.record(args, "scripts.rae.evaluate", values, inputs)
    validation = artefacts.read_json(args.dataset_summary)["validation"] if args.dataset_summary else None
    metrics = scores.score(args.reference, args.reconstructions, args.name, values.perceptual, validation)
    artefacts.write_json(args.output, metrics)
    report(metrics)
    record.write(step.meta_beside(args, args.output), [args.output], items=metrics["features"]["n"])


def score_checkpoint(args: argparse.Namespace) -> None:
    """Take features of the pictures, reconstruct them by a checkpoint, and score that."""
    given = {"extractor": args.extractor, "max_images": args.num_samples, "batch_size": args.batch_size}
    given = {name: value for name, value in given.items() if value is not None}
    args.settings = [*args.settings, json.dumps({"evaluate": given})]
    values = step.read_settings(args)
    own, out = values.evaluate, args.output_dir
    accelerator = devices.make_accelerator(args.device, own.precision, step.threads(args))
    first = accelerator.is_main_process
    if not first:
        step.log.setLevel(logging.WARNING)
    facts, _ = checkpoints.read(args.checkpoint)
    folder, vgg, inception = find_models(args, values, facts.encoder)
    inputs = {"checkpoint": args.checkpoint} | model_folders.identity(folder)
    inputs |= {name: path for name, path in (("vgg", vgg), ("inception", inception)) if path}
    record = step.record(args, "scripts.rae.evaluate", values, inputs)
    split, record.facts["data"] = evaluation.open_pictures(args.data, facts.image_size, own.max_images)
    if first and len(split.pictures) < (own.max_images or 0):
        step.log.warning("%s: %d pictures, fewer than --num-samples", args.data, len(split.pictures))
    autoencoder, _ = checkpoints.load(args.checkpoint, folder)
    autoencoder.to(accelerator.device)
    lpips = Lpips(vgg, values.perceptual.backbone).to(accelerator.device)
    extractor = extractors.load_extractor(own.extractor, inception, accelerator.device)

    hashes = {name: one["sha256"] for name, one in record.inputs.items()} | {"data": record.facts["data"]}
    key = fingerprint(of_kind(values, "numerics"), hashes, record.code)
    work = out / ".state"
    reference, made = work / key / "reference", work / key / "reconstructions"
    known = (reference / "floor.json").is_file()  # written last
    accelerator.wait_for_everyone()
    if not known:
        compute_reference_stats.compute(split, own, extractor, accelerator, work / "originals", key, reference)
    reconstruct.compute(split, own, autoencoder, lpips, extractor, accelerator, work / "parts", key, made)
    if first:
        metrics = scores.score(reference, made, facts.encoder, values.perceptual)
        artefacts.write_json(out / "metrics.json", metrics)
        outputs = [out / name for name in ("metrics.json", "images.parquet", "reconstructions.png")]
        for path in outputs[1:]:
            os.replace(made / path.name, path)
        report(metrics)
        record.write(args.meta or out / "meta.json", outputs, items=len(split.pictures))
        shutil.rmtree(work)


def find_models(
    args: argparse.Namespace, values: ReconstructSettings, encoder: str
) -> tuple[Path, Path | None, Path | None]:
    """(encoder's folder, VGG16's file, Inception's file), as given or as the rules retrieve them.

    Raises:
        KilnError: one of them is not there.
    """
    known = getattr(EncodersSettings(), encoder, None)
    if args.encoder is None and known is None:
        raise KilnError(f"{args.checkpoint}: encoder {encoder!r} is not one that Kiln retrieves", "give --encoder")
    folder = args.encoder or _retrieved(args.models / known.model, "--encoder")
    vgg, inception = args.vgg, args.inception
    if vgg is None and values.perceptual.backbone is None:
        vgg = _weights(args.models, values.perceptual.weights, "--vgg")
    if inception is None and values.evaluate.extractor != extractors.RANDOM:
        inception = _weights(args.models, values.evaluate.inception, "--inception")
    return folder, vgg, inception


def _retrieved(folder: Path, option: str) -> Path:
    if not folder.is_dir():
        raise KilnError(
            f"{folder}: no such model, and no {option} is given",
            f"give {option}, or retrieve it: snakemake --cores 1 {folder}/files.json",
        )
    return folder


def _weights(models: Path, name: str | None, option: str) -> Path:
    if name is None:
        raise KilnError(f"no weights for {option}", f"give {option}")
    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    folder = _retrieved(models / name, option)
    files = sorted(folder.glob("*.pth"))
    if len(files) != 1:
        raise KilnError(f"{folder}: {len(files)} files of weights (.pth), expected one", f"give {option}")
    return files[0]


def report(metrics: dict) -> None:
    """Print the scores, a line each."""
    found = {name.rpartition("_")[2]: one for name, one in metrics["summary"].items()}
    about = metrics["features"]
    for name, label, digits in LINES:
        one = found[name]
        low, high = one["ci95"]
        line = f"{label}: {one['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
        if one["baseline"] is not None:
            line += f", {one['baseline_kind'].replace('_', ' ')} {one['baseline']:.{digits}f}"
        if name == "rfid":
            line += f" (n = {about['n']}, {about['extractor']} {about['weights'][:12]})"
        print(line)
    for warning in metrics["warnings"]:
        print(f"Warning: rFID: {warning}")


if __name__ == "__main__":
    step.run(main)
