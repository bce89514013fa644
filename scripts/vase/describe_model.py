"""Write the model card of the final vase model: what it is, how good, and how far its numbers reach.

Rule `vase_describe_model`. `model/` holds links to the weights and, beside them, the card: what one uploads.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.common import artefacts, cards, step
from scripts.common.errors import KilnError

HOW = {
    "sft": "supervised fine-tuning on questions and captions about vases",
    "grpo": "supervised fine-tuning, then group relative policy optimisation (GRPO, Shao et al. 2024) on the same kind "
    "of questions",
}
INTENDED_USE = (
    "Research on vision-language models for cultural heritage: cataloguing aids whose every answer a specialist "
    "checks. Not for authenticating, dating or valuing objects."
)
PUBLISHED = (
    "The published table of VaseVQA-3D rests on about 96 items, where one item is one percentage point; these scores "
    "rest on the n beside them, on another split, and are not comparable with it digit by digit."
)
DRAWN = (
    "Demo data: the vases are drawn by a rule, and the base is a tiny model trained on drawings. The scores say that "
    "the pipeline learns, and nothing about ancient pottery."
)
MEASURES = {
    "accuracy": "accuracy",
    "anls": "ANLS",
    "date_overlap": "overlap of date ranges",
    "bleu1": "BLEU-1",
    "lexical_overlap": "lexical overlap",
}


def scores(model: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the card's table: each measure over all questions, and accuracy by dimension."""
    rows = {}
    for dimension, found in model["greedy"].items():
        wanted = MEASURES if dimension in ("single", "caption") else ("accuracy", "date_overlap")
        for measure in wanted:
            if measure in found:
                rows[f"{MEASURES[measure]}, {'all questions' if dimension == 'single' else dimension}"] = found[measure]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--metrics", type=Path, required=True, help="metrics.json of rule vase_evaluate")
    made.add_argument("--training-meta", type=Path, required=True, help="meta.json of the last training")
    made.add_argument("--dataset", type=Path, required=True, help="summary.json of rule vase_build_dataset")
    made.add_argument("--parity", type=Path, help="parity.json, where an adapter was merged")
    made.add_argument("--model", choices=HOW, required=True, help="its name in metrics.json")
    made.add_argument("--base-name", required=True, help="the base in words, such as its name in config/models.csv")
    made.add_argument("--hub-name", help="owner/name of the base on the Hugging Face Hub, if it is there")
    made.add_argument("--licence", required=True, help="licence of the base; 'unknown' if so")
    made.add_argument("--demo", action="store_true", help="the vases are the demo's drawings")
    made.add_argument("--weights", type=Path, required=True, help="folder of the final model")
    made.add_argument("--output-folder", type=Path, required=True, help="README.md and model/")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Describe what `args` name.

    Raises:
        KilnError: the metrics hold no scores of the model.
    """
    inputs = {"metrics": args.metrics, "training": args.training_meta, "dataset": args.dataset}
    inputs |= {"weights": args.weights / "files.json"} | ({"parity": args.parity} if args.parity else {})
    record = step.record(args, "scripts.vase.describe_model", None, inputs)
    metrics, trained, dataset = (artefacts.read_json(inputs[name]) for name in ("metrics", "training", "dataset"))
    if args.model not in metrics["models"]:
        raise KilnError(
            f"{args.metrics}: no scores of {args.model}; it has {', '.join(metrics['models'])}",
            "give the metrics of a run that evaluated this model",
        )
    licence = args.licence.strip()
    limits = [DRAWN if args.demo else PUBLISHED, f"Licence of the base: {licence}. That of the images is theirs."]
    if args.parity:
        parity = artefacts.read_json(args.parity)
        limits.append(
            f"Merged in {parity['dtype']}: on {parity['prompts']} prompts the logits differ from base + adapter by a "
            f"relative error of {parity['relative_error']:.2g} (tolerance {parity['tolerance']:g})."
        )
    card = args.output_folder / "README.md"
    cards.write_card(
        card,
        name=f"vase-{args.model}",
        summary=f"Answers questions about photographs of ancient vases; {args.base_name} after {HOW[args.model]}.",
        task="image-text-to-text",
        license=licence.lower() if re.fullmatch(r"[A-Za-z0-9.-]+", licence) else "other",
        data=data_text(dataset),
        evaluated_on=f"questions about {metrics['data']['test']['vases']:,} vases that no training saw",
        metrics=scores(metrics["models"][args.model]),
        intended_use=INTENDED_USE,
        limits="\n".join(f"- {one}" for one in limits),
        settings=cards.without_paths(trained["settings"]),
        code_key=trained["code"],
        git_commit=trained["git_commit"],
        base_model=args.hub_name,
        starting_point=args.base_name,
        library="transformers",
        tags=["visual-question-answering", "cultural-heritage", args.model],
    )
    files = artefacts.read_json(args.weights / "files.json")
    links = {name: args.weights / name for name in files} | {"README.md": card}
    artefacts.link_folder(args.output_folder / "model", links, files)
    record.write(args.meta, [card, args.output_folder / "model/files.json"])


def data_text(dataset: Mapping[str, Any]) -> str:
    """How many rows of how many vases were trained on."""
    sides = dataset["sides"]
    return ", ".join(f"{side}: {one['rows']:,} rows of {one['vases']:,} vases" for side, one in sides.items()) + "."


if __name__ == "__main__":
    step.run(main)
