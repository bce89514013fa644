"""Write the model card of an autoencoder: what it is, how good, how far its numbers compare, and how to load it.

Rule `rae_describe_model`. `model/` holds links to the exported folder and, beside its files, the card and the sheet of
reconstructions: what one uploads.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.common import artefacts, cards, step
from scripts.common.errors import KilnError
from scripts.rae import exports
from scripts.rae.settings import CUT_FROM_TRAIN

NAMES = {"rfid": "rFID", "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
INTENDED_USE = (
    "Research on image reconstruction and on generative models in the latents of a representation encoder. Faces, text "
    "and fine detail are not kept: not for compression, nor for anything that depends on them."
)
PUBLISHED = (
    "Published for comparison (ViT-XL decoder, DINOv2-B, ImageNet's 50,000 validation images at 256 pixels): rFID "
    "0.57, or 0.54 as reproduced, when trained with noise of tau = 0.8, and 0.49 without noise (arXiv:2510.11690)."
)
DRAWN = (
    "Demo data: small made pictures, and tiny encoders. The scores say that the pipeline learns, and nothing about "
    "photographs."
)
KEYS = {
    "metrics": ("summary", "warnings", "features"),
    "training_meta": ("settings", "code", "git_commit"),
    "dataset": ("splits", "classes", "validation", "source"),
    "config": ("encoder", "latents", "decoder", "image_size", "tau", "steps"),
}


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--metrics", type=Path, required=True, help="metrics.json of rule rae_evaluate")
    made.add_argument("--training-meta", type=Path, required=True, help="meta.json of rule rae_train_autoencoder")
    made.add_argument("--dataset", type=Path, required=True, help="summary.json of rule rae_build_arrow")
    made.add_argument("--sheet", type=Path, required=True, help="reconstructions.png of rule rae_reconstruct")
    made.add_argument("--weights", type=Path, required=True, help="folder of rule rae_export")
    made.add_argument("--base-name", required=True, help="the encoder in words, such as its name in config/models.csv")
    made.add_argument("--hub-name", help="owner/name of the encoder on the Hugging Face Hub, if it is there")
    made.add_argument("--licence", required=True, help="licence of the encoder; 'unknown' if so")
    made.add_argument("--demo", action="store_true", help="the images are the demo's")
    made.add_argument("--output-folder", type=Path, required=True, help="README.md, reconstructions.png and model/")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Describe what `args` name.

    Raises:
        KilnError: an input lacks what the card states, or a name is a path of this disk.
    """
    config, listing = args.weights / exports.CONFIG, args.weights / "files.json"
    paths = {"metrics": args.metrics, "training_meta": args.training_meta, "dataset": args.dataset, "config": config}
    record = step.record(args, "scripts.rae.describe_model", None, paths | {"sheet": args.sheet, "weights": listing})
    if cards.without_paths(args.base_name) != args.base_name:
        raise KilnError(f"--base-name {args.base_name}: a path", "cards tell nothing of your disk: name it in words")
    metrics, trained, dataset, model = (cards.read_facts(path, *KEYS[name]) for name, path in paths.items())
    licence = args.licence.strip()
    encoder = model["encoder"]["name"]
    name, scores = f"rae-{encoder}", {key.removeprefix(f"{encoder}_"): v for key, v in metrics["summary"].items()}
    sheet, card = args.output_folder / args.sheet.name, args.output_folder / "README.md"
    with artefacts.atomic_path(sheet) as temporary:
        temporary.write_bytes(args.sheet.read_bytes())
    cards.write_card(
        card,
        name=name,
        summary=f"{summary(model, args.base_name)}\n\n![Pictures and their reconstructions]({sheet.name})",
        usage=usage(name, args.hub_name or args.base_name, model),
        task="image-to-image",
        license=licence.lower() if re.fullmatch(r"[A-Za-z0-9.-]*", licence) else "other",
        data=data_text(dataset),
        evaluated_on=f"{scores['psnr']['n']:,} validation images, centre-cropped to {model['image_size']} pixels",
        metrics={label: scores[key] for key, label in NAMES.items()},
        intended_use=INTENDED_USE,
        limits="\n".join(f"- {one}" for one in limits(metrics, trained["settings"], licence, args.demo)),
        settings=cards.without_paths(trained["settings"]),
        code_key=trained["code"],
        git_commit=trained["git_commit"],
        base_model=args.hub_name,
        starting_point=args.base_name,
        tags=["representation-autoencoder", encoder],
    )
    files = artefacts.read_json(listing)
    links = {one: args.weights / one for one in files} | {card.name: card, sheet.name: sheet}
    artefacts.link_folder(args.output_folder / "model", links, files | artefacts.describe_files([card, sheet]))
    record.write(args.meta, [card, sheet, args.output_folder / "model/files.json"])


def summary(model: Mapping[str, Any], base: str) -> str:
    """What it is, with its sizes."""
    decoder, latents = model["decoder"], model["latents"]
    return (
        f"A representation autoencoder (Zheng et al. 2025): a frozen encoder ({base}), which is not among these files, "
        f"and a decoder (layers {decoder['layers']}, width {decoder['width']}), trained for {model['steps']:,} steps. "
        f"Pictures of {model['image_size']} pixels a side become {latents['dim']} x {latents['grid']} x "
        f"{latents['grid']} latents, normalised by statistics of the training images, and pictures again. Noise of up "
        f"to tau = {model['tau']:g} was added to the latents in training."
    )


def usage(name: str, encoder: str, model: Mapping[str, Any]) -> str:
    """How to load and call it, in three lines."""
    folder = encoder.rpartition("/")[2] if re.fullmatch(r"[\w./-]+", encoder) else "encoder"
    side = model["image_size"]
    return (
        f"From a checkout of Kiln, with this folder as `{name}` and that of the encoder (`config.json`, "
        f"`preprocessor_config.json`, `*.safetensors`) as `{folder}`:\n\n"
        "```python\n"
        "from scripts.rae import exports\n"
        f'autoencoder = exports.load("{name}", "{folder}")\n'
        f"reconstructions = autoencoder(images)  # float [B, 3, {side}, {side}] in [0, 1]\n"
        "```\n\n"
        "`autoencoder.encode` and `autoencoder.decode` are its halves. `decoders/` and `stats/` hold the same weights "
        "in the layout of the original code, https://github.com/bytetriper/RAE."
    )


def data_text(dataset: Mapping[str, Any]) -> str:
    """How many images of how many classes, and where validation came from."""
    train, held = dataset["splits"]["train"], dataset["splits"]["validation"]
    bad = sum(one.get("quarantined", 0) for one in (train, held))
    origin = (
        "**cut from the training images**, as there is no validation split of its own"
        if dataset["validation"] == CUT_FROM_TRAIN
        else "a split of its own"
    )
    return (
        f"{train['ok']:,} images of {dataset['classes']:,} classes. Validation: {held['ok']:,} images, {origin}. "
        f"Quarantined: {bad:,}."
    )


def limits(metrics: Mapping[str, Any], settings: Mapping[str, Any], licence: str, demo: bool) -> list[str]:
    """How far the numbers reach."""
    features = metrics["features"]
    lines = [DRAWN] if demo else [PUBLISHED]
    if metrics["warnings"]:
        lines.append(f"**This rFID compares with no published one**: {'; '.join(metrics['warnings'])}.")
    lines.append(
        f"Features of rFID: {features['extractor']}, weights `{features['weights'][:12]}`, "
        f"{features['preprocessing']}; reference images `{features['reference_images'][:12]}`. "
        "Compare only numbers with the same four, and the same n."
    )
    if settings["perceptual"].get("backbone"):
        lines.append("**This LPIPS compares with no other**: it rests on random features in place of VGG16's.")
    lines.append(f"Licence of the encoder: {licence}. The licence of the images is for their user to check.")
    return lines


if __name__ == "__main__":
    step.run(main)
