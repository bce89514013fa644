"""Write the model card of a CoCa model: what it is, how good, how far its numbers reach, and whose weights are in it.

Rule `coca_describe_model`. `model/` holds links to the weights and the tokenizer and, beside them, the card: what one
may upload, where the licence of the slide encoder's weights lets it.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.common import artefacts, cards, step
from scripts.common.errors import KilnError

NAME = "coca"
INTENDED_USE = (
    "Research on vision-language models of pathology slides, and on their evaluation. **Not for diagnosis**: not for "
    "any decision about a person, nor as a second opinion. Captions may state what no slide shows. It is no medical "
    "device and was tested on no patients."
)
ORIGIN = (
    "Slides and texts come from one source: other laboratories, stains, scanners, tile encoders and ways of reporting "
    "will lower the scores."
)
DRAWN = (
    "Demo data: tiles are drawn by a rule, and texts are put together from a few words. The scores say that the "
    "pipeline learns, and nothing about pathology."
)
NO_PATIENTS = (
    "Each slide counts as a patient of its own. If no patient identifiers were given, slides of one patient may lie on "
    "both sides, which raises the scores and narrows the intervals."
)
PRISM = (
    "Prism's weights are CC BY-NC-ND 4.0 and gated: no commercial use, no redistribution, and models trained on their "
    "outputs count as derivatives, which may not be shared. This card gives no right to publish these files."
)
WORDS = {"image_to_text": "slide to text", "text_to_image": "text to slide"}
MEASURES = {
    "bleu": "BLEU (0 to 100)", "chrf": "chrF (0 to 100)", "rouge_l": "ROUGE-L", "exact": "caption equals text",
    "exact_seen": "caption equals text, texts of train",
}  # fmt: skip
KEYS = {
    "metrics": ("data", "retrieval", "captions"),
    "training_meta": ("settings", "code", "git_commit"),
    "listing": ("files", "texts"),
}


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--metrics", type=Path, required=True, help="metrics.json of rule coca_evaluate")
    made.add_argument("--training-meta", type=Path, required=True, help="meta.json of rule coca_train")
    made.add_argument("--manifest-summary", type=Path, required=True, help="summary.json of rule coca_list_slides")
    made.add_argument("--checkpoint", type=Path, required=True, help="model.safetensors of rule coca_train")
    made.add_argument("--tokenizer", type=Path, required=True, help="folder of rule coca_train_tokenizer")
    made.add_argument("--encoder-name", default="Prism", help="slide encoder whose weights were given, in words")
    made.add_argument("--encoder-licence", default="CC-BY-NC-ND-4.0", help="licence of those weights")
    made.add_argument("--demo", action="store_true", help="the slides are the demo's")
    made.add_argument("--output-folder", type=Path, required=True, help="README.md and model/")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Describe what `args` name.

    Raises:
        KilnError: an input lacks what the card states, or a name is a path of this disk.
    """
    listing = args.tokenizer / "files.json"
    paths = {"metrics": args.metrics, "training_meta": args.training_meta, "listing": args.manifest_summary}
    record = step.record(
        args, "scripts.coca.describe_model", None, paths | {"checkpoint": args.checkpoint, "tokenizer": listing}
    )
    if cards.without_paths(args.encoder_name) != args.encoder_name:
        raise KilnError(f"--encoder-name {args.encoder_name}: a path", "cards tell nothing of your disk: name it")
    metrics, trained, listed = (cards.read_facts(path, *KEYS[name]) for name, path in paths.items())
    settings, data = trained["settings"], metrics["data"]
    given = settings["encoder"]["weights"] is not None
    licence = args.encoder_licence.strip() if given else "unknown"
    card = args.output_folder / "README.md"
    cards.write_card(
        card,
        name=NAME,
        summary=summary(settings, args.encoder_name if given else None),
        usage=usage(frozen(settings)),
        task="image-to-text",
        license=licence.lower() if re.fullmatch(r"[A-Za-z0-9.-]+", licence) else "other",
        data=f"{counted(data['train'])}. Of {listed['files']['in']:,} files and {listed['texts']['in']:,} texts, "
        f"{listed['files']['quarantined']:,} files and {listed['texts']['quarantined']:,} texts were quarantined.",
        evaluated_on=f"a test side of {counted(data['test'])}",
        metrics=rows(metrics),
        intended_use=INTENDED_USE,
        limits="\n".join(f"- {one}" for one in limits(metrics, args, licence if given else None)),
        settings=cards.without_paths(settings),
        code_key=trained["code"],
        git_commit=trained["git_commit"],
        starting_point=starting_point(settings, args.encoder_name if given else None),
        tags=["pathology", "whole-slide-image", "contrastive-captioner"],
    )
    files = artefacts.read_json(listing)
    links = {card.name: card, "model.safetensors": args.checkpoint}
    links |= {f"tokenizer/{name}": args.tokenizer / name for name in files}
    records = {f"tokenizer/{name}": one for name, one in files.items()} | artefacts.describe_files([card])
    weights = {"bytes": args.checkpoint.stat().st_size, "sha256": record.inputs["checkpoint"]["sha256"]}
    artefacts.link_folder(args.output_folder / "model", links, records | {"model.safetensors": weights})
    record.write(args.meta, [card, args.output_folder / "model/files.json"])


def frozen(settings: Mapping[str, Any]) -> bool:
    """Whether the slide encoder was frozen, and so is not among the weights."""
    encoder = settings["encoder"]
    return encoder["weights"] is not None if encoder["frozen"] is None else encoder["frozen"]


def counted(side: Mapping[str, int]) -> str:
    """Slides, patients and texts of a side."""
    return f"{side['slides']:,} slides of {side['patients']:,} patients, with {side['distinct_texts']:,} distinct texts"


def summary(settings: Mapping[str, Any], encoder: str | None) -> str:
    """What it is, with its sizes."""
    model, perceiver = settings["model"], settings["encoder"]
    origin = (
        "trained with it" if encoder is None
        else f"{encoder}, frozen, which is not among these files" if frozen(settings)
        else f"trained with it from the weights of {encoder}"
    )  # fmt: skip
    return (
        "A contrastive captioner (CoCa, Yu et al. 2022) of whole slides: tile embeddings become "
        f"{perceiver['latents']:,} vectors of {perceiver['dim']:,} by a slide encoder in Prism's layout ({origin}), "
        f"and these a caption, or a vector of {model['dim_latents']:,} to be compared with that of a text. "
        f"Text layers: {model['unimodal_depth']} + {model['multimodal_depth']} of width {model['dim']:,}. Trained for "
        f"{settings['train']['epochs']} epochs in batches of {settings['train']['batch_size']} pairs."
    )


def starting_point(settings: Mapping[str, Any], encoder: str | None) -> str | None:
    """What was not trained from scratch, in words."""
    own = "an earlier checkpoint of this kind" if settings["train"]["init_from"] else "random weights"
    if encoder is None:
        return own if settings["train"]["init_from"] else None
    return f"the slide encoder {encoder}, and {own}"


def usage(needs_encoder: bool) -> str:
    """How to call it."""
    encoder = " --encoder-weights ENCODER.safetensors" if needs_encoder else ""
    return (
        f"From a checkout of Kiln, with this folder as `{NAME}` and `.h5` files of tile embeddings in `SLIDES`:\n\n"
        "```bash\n"
        f"python -m scripts.coca.predict --checkpoint {NAME}/model.safetensors \\\n"
        f"    --tokenizer {NAME}/tokenizer{encoder} \\\n"
        '    --slides SLIDES --text "a text to compare with" --output predictions.jsonl\n'
        "```"
    )


def rows(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The card's table."""
    made, retrieved = {}, metrics["retrieval"]
    for key, words in WORDS.items():
        one = retrieved.get(key, {"recall": {}})
        made |= {f"R@{k}, {words}": entry for k, entry in one["recall"].items()}
        made |= {f"median rank, {words}": one["median_rank"]} if "median_rank" in one else {}
    made |= {words: metrics["captions"][name] for name, words in MEASURES.items()}
    for key, words in (("diagnosis", "of the caption"), ("zero_shot", "by prompts, zero-shot")):
        if key in metrics:
            floor = {"baseline": metrics[key]["most_frequent"], "baseline_kind": "most_frequent"}
            made[f"accuracy of the class {words}"] = metrics[key]["accuracy"] | floor
            made[f"balanced accuracy of the class {words}"] = metrics[key]["balanced_accuracy"]
    return made


def limits(metrics: Mapping[str, Any], args: argparse.Namespace, licence: str | None) -> list[str]:
    """How far the numbers reach, and who may use the weights; `licence` is that of the weights that were given."""
    lines = [DRAWN if args.demo else ORIGIN]
    sides = metrics["data"].values()
    if all(side["slides"] == side["patients"] for side in sides):
        lines.append(NO_PATIENTS)
    written, test = metrics["captions"], metrics["data"]["test"]
    lines.append(
        f"{test['repeated_texts']:,} of {test['slides']:,} test slides share their text with another one; any of these "
        f"counts as found. {written['distinct']:,} of the captions are distinct, {written['empty']:,} are empty."
    )
    if "diagnosis" in metrics:
        one = metrics["diagnosis"]
        lines.append(
            f"{sum(one['unanswered']):,} of {one['n']:,} captions name none of the classes "
            f"{', '.join(one['classes'])}, or several, and count as wrong. "
            f"{one['left_out']:,} texts name none or several, and are left out."
        )
    if licence is not None:
        lines.append(f"Licence of the slide encoder's weights ({args.encoder_name}): {licence}.")
        if args.encoder_name == "Prism":
            lines.append(PRISM)
    lines.append("The licences of the tile embeddings and of the texts are for their user to check.")
    return lines


if __name__ == "__main__":
    step.run(main)
