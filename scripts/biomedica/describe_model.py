"""Write the model card of a CLIP model: what it is, what it saw, how good, how far its numbers reach, whose data.

Rule `biomedica_describe_model`. `model/` holds links to the exported folder and, beside them, the card: what one may
upload, where the licences of figures and starting weights let it.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.common import artefacts, cards, step
from scripts.common.errors import KilnError

NAME = "biomedica-clip"
INTENDED_USE = (
    "Research on search in biomedical figures, on zero-shot classification of them, and as a starting point of further "
    "training. **Not for diagnosis**: not for any decision about a person. It is no medical device and was tested on "
    "no patients."
)
ORIGIN = (
    "Figures and captions come from open-access articles: other journals, kinds of figures and languages will lower "
    "the scores. Captions name what authors found worth saying, not all that a figure shows."
)
DRAWN = (
    "Demo data: figures are drawn by a rule, and captions are put together from a few words. The scores say that the "
    "pipeline learns, and nothing about biomedicine."
)
LICENCES = (
    "The articles behind BIOMEDICA have licences of three kinds, which its subsets are named after: commercial use "
    "allowed (such as CC0, CC BY), noncommercial use alone (such as CC BY-NC), and other, which includes no licence at "
    "all. The set of 24 million pairs holds all three: train on the subset `commercial` for any use that needs it. The "
    "licence of each article stands in the json of its figures."
)
LOCAL_LICENCES = "The licences of the local figures and captions are for their user to check."
WORDS = {"image_to_text": "image to text", "text_to_image": "text to image"}
CLASSES = {"accuracy": "most_frequent", "balanced_accuracy": "chance"}
KEYS = {
    "metrics": ("summary", "data", "model", "before", "after", "trivial"),
    "training_meta": ("settings", "code", "git_commit"),
    "index": ("in", "samples", "rejected", "quarantined", "shards", "reasons"),
    "remote": ("repo", "revision", "shards", "needed"),
    "held_out": ("sides",),
    "plan": ("arm", "samples", "local_per_epoch", "streamed_per_epoch", "local_share", "streamed_share"),
    "config": ("model_cfg", "preprocess_cfg"),
}


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--metrics", type=Path, required=True, help="metrics.json of rule biomedica_evaluate")
    made.add_argument("--training-meta", type=Path, required=True, help="meta.json of rule biomedica_train_clip")
    made.add_argument("--index-summary", type=Path, required=True, help="summary.json of rule biomedica_index_local")
    made.add_argument("--remote-summary", type=Path, required=True, help="summary.json of rule biomedica_list_remote")
    made.add_argument("--held-out-summary", type=Path, required=True, help="summary.json of rule biomedica_hold_out")
    made.add_argument("--plan", type=Path, required=True, help="plan.json of rule biomedica_plan")
    made.add_argument("--weights", type=Path, required=True, help="folder of rule biomedica_export")
    made.add_argument("--base-name", help="weights that training started from, in words; none: random ones")
    made.add_argument("--hub-name", help="owner/name of those weights on the Hugging Face Hub, if they are there")
    made.add_argument("--licence", default="unknown", help="licence of those weights")
    made.add_argument("--demo", action="store_true", help="the figures are the demo's")
    made.add_argument("--output-folder", type=Path, required=True, help="README.md and model/")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Describe what `args` name.

    Raises:
        KilnError: an input lacks what the card states, or a name is a path of this disk.
    """
    listing = args.weights / "files.json"
    paths = {
        "metrics": args.metrics, "training_meta": args.training_meta, "index": args.index_summary,
        "remote": args.remote_summary, "held_out": args.held_out_summary, "plan": args.plan,
        "config": args.weights / "open_clip_config.json",
    }  # fmt: skip
    record = step.record(args, "scripts.biomedica.describe_model", None, paths | {"weights": listing})
    if args.base_name and cards.without_paths(args.base_name) != args.base_name:
        raise KilnError(f"--base-name {args.base_name}: a path", "cards tell nothing of your disk: name it in words")
    facts = {name: cards.read_facts(path, *KEYS[name]) for name, path in paths.items()}
    metrics, settings = facts["metrics"], facts["training_meta"]["settings"]
    given = settings["model"]["weights"] is not None
    if given != bool(args.base_name):
        raise KilnError(
            f"training {'started from weights' if given else 'started from random weights'}, --base-name "
            f"{args.base_name}", "name the weights that biomedica.model.weights gives, and no others",
        )  # fmt: skip
    licence = args.licence.strip() if given else "unknown"
    repo = facts["remote"]["repo"] if streamed(facts) else None
    card = args.output_folder / "README.md"
    cards.write_card(
        card,
        name=NAME,
        summary=summary(facts),
        usage=usage(),
        task="zero-shot-image-classification",
        license=licence.lower() if re.fullmatch(r"[A-Za-z0-9.-]+", licence) else "other",
        data=data_text(facts),
        evaluated_on=f"a test side of {counted(metrics['data']['test'])}",
        metrics=rows(metrics),
        intended_use=INTENDED_USE,
        limits="\n".join(f"- {one}" for one in limits(facts, args, licence if given else None)),
        settings=cards.without_paths(settings),
        code_key=facts["training_meta"]["code"],
        git_commit=facts["training_meta"]["git_commit"],
        base_model=args.hub_name,
        starting_point=args.base_name,
        hub_datasets=[repo] if repo and not args.demo else [],
        library="open_clip",
        languages=["en"],
        tags=["clip", "biomedical", "figures"],
    )
    files = artefacts.read_json(listing)
    links = {name: args.weights / name for name in files} | {card.name: card}
    artefacts.link_folder(args.output_folder / "model", links, files | artefacts.describe_files([card]))
    record.write(args.meta, [card, args.output_folder / "model/files.json"])


def streamed(facts: Mapping[str, Any]) -> bool:
    """Whether a pair of training came from the repo."""
    return facts["metrics"]["model"]["samples_streamed"] > 0


def summary(facts: Mapping[str, Any]) -> str:
    """What it is, with its sizes."""
    config, model, plan = facts["config"]["model_cfg"], facts["metrics"]["model"], facts["plan"]
    size = config["vision_cfg"].get("image_size", 224)
    return (
        f"A CLIP model ({model['name']}, open_clip): figures of {size} pixels a side and captions of up to "
        f"{config['text_cfg'].get('context_length', 77)} tokens become vectors of {config['embed_dim']:,} to be "
        f"compared. Trained for {model['step']:,} steps in batches of {plan['batch_size']:,} pairs, up to epoch "
        f"{model['epoch']} of {plan['epochs']}, which validation chose."
    )


def usage() -> str:
    """How to load and call it."""
    return (
        f"With this folder as `{NAME}`:\n\n"
        "```python\n"
        "import open_clip, torch\n"
        "from PIL import Image\n\n"
        f'model, _, transform = open_clip.create_model_and_transforms("local-dir:{NAME}")\n'
        f'tokenizer = open_clip.get_tokenizer("local-dir:{NAME}")\n'
        "model.eval()\n"
        "with torch.inference_mode():\n"
        '    image = model.encode_image(transform(Image.open("figure.jpg"))[None], normalize=True)\n'
        '    texts = model.encode_text(tokenizer(["a bar chart", "a western blot"]), normalize=True)\n'
        "    print(image @ texts.T)\n"
        "```"
    )


def counted(side: Mapping[str, Any]) -> str:
    """Pairs, articles and captions of a side."""
    return (
        f"{side['pairs']:,} figures of {side['articles']:,} articles, with {side['distinct_captions']:,} distinct "
        "captions"
    )


def data_text(facts: Mapping[str, Any]) -> str:
    """Local and streamed pairs, where they are from, what was dropped, and what was held out."""
    plan, index, remote, model = facts["plan"], facts["index"], facts["remote"], facts["metrics"]["model"]
    settings = facts["training_meta"]["settings"]
    rules, held = settings["index"], settings["held_out"]
    lines = [
        f"{model['samples_local'] + model['samples_streamed']:,} pairs were seen, {model['samples_local']:,} of them "
        f"local and {model['samples_streamed']:,} streamed; an epoch was planned with {plan['samples']:,} pairs, "
        f"{plan['local_per_epoch']:,} local ({plan['local_share']:.1f} %) and {plan['streamed_per_epoch']:,} streamed "
        f"({plan['streamed_share']:.1f} %), mixed in each batch."
    ]
    if streamed(facts):
        lines.append(f"Streamed from data set `{remote['repo']}` at commit `{remote['revision']}`.")
    quoted = ", ".join(f'"{one}"' for one in rules["no_caption"])
    lines.append(
        f"Of {index['in']:,} local pairs in {index['shards']:,} shards, {index['rejected']:,} were rejected and "
        f"{index['quarantined']:,} quarantined as broken; streamed ones were held to the same rules. Rejected: empty "
        f"captions, captions {quoted}, and images with a side under {rules['min_side']} pixels."
    )
    sides = facts["held_out"]["sides"]
    validation, test = (f"{100 * held[side]:g} % of articles for {side}" for side in ("validation", "test"))
    lines.append(
        f"Held out by article, wherever its pairs lie: {validation} (the best epoch is chosen on "
        f"{sides['validation']['pairs']:,} pairs) and {test} ({sides['test']['pairs']:,} pairs)."
    )
    return " ".join(lines)


def rows(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The card's table: scores after training and, where it says so, before it."""
    made: dict[str, Mapping[str, Any]] = {}
    for when, label in (("after", ""), ("before", ", before training")):
        found = metrics[when]
        for way, words in WORDS.items():
            one = found["retrieval"].get(way, {"recall": {}})
            made |= {f"R@{k}, {words}{label}": entry for k, entry in one["recall"].items()}
            made |= {f"median rank, {words}{label}": one["median_rank"]} if "median_rank" in one else {}
        if "zero_shot" in found:
            for name, kind in CLASSES.items():
                floor = {"baseline": metrics["floors"][kind], "baseline_kind": kind}
                words = f"{name.replace('_', ' ')} of the panel type by prompts, zero-shot{label}"
                made[words] = found["zero_shot"][name] | floor
    if "hybrid_over_local" in metrics["summary"]:
        one = metrics["summary"]["hybrid_over_local"]
        made[f"R@5, both ways, hybrid less local, mean of {one['seeds']} runs of {one['steps']:,} steps"] = one
    return made


def limits(facts: Mapping[str, Any], args: argparse.Namespace, licence: str | None) -> list[str]:
    """How far the numbers reach, and who may use the weights; `licence` is that of the weights that were given."""
    metrics = facts["metrics"]
    test, trivial = metrics["data"]["test"], metrics["trivial"]["retrieval"]
    lines = [DRAWN if args.demo else ORIGIN]
    lines.append(
        f"{test['repeated_captions']:,} of {test['pairs']:,} test figures share their caption with another one; any of "
        f"these counts as found. {metrics['after']['retrieval']['full_captions']:,} captions fill the model's context, "
        "so that their ends may not be seen. Recall falls as candidates grow in number: compare only the same n."
    )
    if trivial is not None:
        lines.append(f"Mean colour, size and text length alone reach R@5 of {trivial:.3f}, both ways.")
    if licence is not None:
        lines.append(f"Licence of the weights that training started from ({args.base_name}): {licence}.")
    if not args.demo:
        if streamed(facts):
            lines.append(LICENCES)
        if metrics["model"]["samples_local"]:
            lines.append(LOCAL_LICENCES)
    return lines


if __name__ == "__main__":
    step.run(main)
