"""Write the model card of a fine-tuned model: what it is, how good, and what it must not be used for.

Rule `busi_describe_model`.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.common import cards, step
from scripts.common.errors import KilnError

METHODS = {
    "lora": "low-rank adapters (LoRA, Hu et al. 2021)",
    "qlora": "low-rank adapters on a 4-bit base (QLoRA, Dettmers et al. 2023)",
}
INTENDED_USE = (
    "Research on vision-language models and on their evaluation. **Not for diagnosis**: not for any decision about a "
    "person, nor as a second opinion. It is no medical device and was tested on no patients."
)
ORIGIN = (
    "The images are those of BUSI (Al-Dhabyani et al. 2020), or of a folder laid out like it. BUSI comes from one "
    "hospital and one make of scanner, in 2018: other scanners, operators and populations will lower the scores."
)
DRAWN = (
    "Demo data: the images are drawn by a rule, and the base is a tiny model trained on drawings. The scores say that "
    "the pipeline learns, and nothing about ultrasound."
)
NO_PATIENTS = (
    "No patient identifiers exist: images are kept together only as near-duplicates. Different images of one patient "
    "may lie on both sides, which raises the scores and narrows the intervals."
)


def counted(side: Mapping[str, Any]) -> str:
    """ "630 images in 500 duplicate groups (107 Normal, ...)"."""
    classes = ", ".join(f"{count:,} {name}" for name, count in side["per_class"].items())
    return f"{side['images']:,} images in {side['groups']:,} duplicate groups ({classes})"


def split_text(metrics: Mapping[str, Any], leakage: Mapping[str, Any], method: str) -> str:
    """How the sides relate: counts of near-twins, and, where the split leaks, the scores apart."""
    n = metrics["data"]["test"]["images"]
    twins = ", ".join(f"{one['test_with_twin_in_train']:,} at {t}" for t, one in leakage["thresholds"].items())
    audit = f"Test images with a near-twin in train, by least correlation of thumbnails: {twins} (of {n:,})."
    shared = f"{metrics['data']['groups_on_both_sides']:,} duplicate groups lie on both sides"
    leak = metrics["leak"]
    if not leak["test_with_twin_in_train"]:
        return f"The split does not leak: {shared}. {audit}"
    parts = leak["models"][method]
    scores = [
        f"{parts[side]['n']:,} {words}: accuracy {said(parts[side]['accuracy'])}"
        for side, words in (("with_twin", "with a near-twin in train"), ("without_twin", "without one"))
        if parts[side]["n"]
    ]
    return (
        f"**The split leaks**: {shared}, which flatters the scores above. {audit} Scored "
        f"apart at {leak['threshold']}: {'; '.join(scores)}; difference {said(parts['difference']['accuracy'])}."
    )


def said(entry: Mapping[str, Any]) -> str:
    """A score with its interval, or why there is none."""
    if entry["value"] is None:
        return f"none ({entry['reason']})"
    if entry["ci95"] is None:
        return f"{entry['value']:.3f} (no interval: {entry['reason']})"
    low, high = entry["ci95"]
    return f"{entry['value']:.3f} ({low:.3f} to {high:.3f})"


def parity_text(parity: Mapping[str, Any]) -> str:
    """How near the merged model is to base + adapter."""
    return (
        f"Merged in {parity['dtype']}. On {parity['prompts']} prompts the merged model's logits differ from those of "
        f"base + adapter by a relative error of {parity['relative_error']:.2g} (tolerance {parity['tolerance']:g}; "
        f"largest difference {parity['largest_difference']:.2g}), where the adapter itself changes them by "
        f"{parity['adapter_effect']:.2g}; the likeliest token is the same on {100 * parity['top1_agreement']:.0f} %."
    )


def scores(metrics: Mapping[str, Any], method: str) -> dict[str, dict[str, Any]]:
    """The rows of the card's table."""
    models = metrics["models"]
    one, majority, chance = models[method], models["majority"], 1 / len(metrics["classes"])
    rows = {
        "balanced accuracy": one["balanced_accuracy"] | {"baseline": chance, "baseline_kind": "chance"},
        "accuracy": one["accuracy"] | {"baseline": majority["accuracy"]["value"], "baseline_kind": "majority"},
        "macro F1": one["macro_f1"],
        "AUROC": one["roc_auc"],
    }
    for name in metrics["classes"]:
        rows[f"sensitivity, {name}"] = one["per_class"][name]["recall"]
        rows[f"specificity, {name}"] = one["per_class"][name]["specificity"]
    rows["expected calibration error"] = one["calibration"]["expected_calibration_error"]
    rows["Brier score"] = one["calibration"]["brier_score"]
    rows["negative log-likelihood"] = one["calibration"]["negative_log_likelihood"]
    rows["accuracy of the greedy text"] = one["text"]["accuracy"]
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--adapter-meta", type=Path, required=True, help="meta.json of rule busi_train_lora")
    made.add_argument("--metrics", type=Path, required=True, help="metrics.json of rule busi_evaluate")
    made.add_argument("--leakage", type=Path, required=True, help="leakage_report.json of rule busi_audit_split")
    made.add_argument("--parity", type=Path, required=True, help="parity.json of rule busi_merge")
    made.add_argument("--method", choices=METHODS, required=True, help="how it was trained; its name in metrics.json")
    made.add_argument("--base-name", required=True, help="the base in words, such as its name in config/models.csv")
    made.add_argument("--hub-name", help="owner/name of the base on the Hugging Face Hub, if it is there")
    made.add_argument("--licence", required=True, help="licence of the base; 'unknown' if so")
    made.add_argument("--demo", action="store_true", help="the images are the demo's drawings")
    made.add_argument("--output", type=Path, required=True, help="README.md")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Describe what `args` name.

    Raises:
        KilnError: an input lacks what the card states, or a name is a path of this disk.
    """
    inputs = {name: getattr(args, name) for name in ("adapter_meta", "metrics", "leakage", "parity")}
    record = step.record(args, "scripts.busi.describe_model", None, inputs)
    if cards.without_paths(args.base_name) != args.base_name:
        raise KilnError(f"--base-name {args.base_name}: a path", "cards tell nothing of your disk: name it in words")
    trained = cards.read_facts(args.adapter_meta, "settings", "code", "git_commit")
    metrics = cards.read_facts(args.metrics, "models", "data", "classes", "leak")
    leakage = cards.read_facts(args.leakage, "thresholds")
    keys = ("dtype", "relative_error", "tolerance", "largest_difference", "top1_agreement", "adapter_effect", "prompts")
    parity = cards.read_facts(args.parity, *keys)
    if args.method not in metrics["models"]:
        raise KilnError(
            f"{args.metrics}: no scores of {args.method}; it has {', '.join(metrics['models'])}",
            "give the metrics of a run that evaluated this method",
        )
    if trained.get("method", args.method) != args.method:
        raise KilnError(f"{args.adapter_meta}: an adapter by {trained['method']}", f"give that of {args.method}")
    data, text = metrics["data"], metrics["models"][args.method]["text"]
    licence = args.licence.strip()
    identifier = licence.lower() if re.fullmatch(r"[A-Za-z0-9.-]*", licence) else "other"
    greedy = (
        f"{text['unanswerable']:,} of {data['test']['images']:,} greedy texts name no class and count as wrong; the "
        "other scores compare the likelihoods of the answers, and always name one."
    )
    limits = [
        *((DRAWN,) if args.demo else (ORIGIN, NO_PATIENTS)),
        split_text(metrics, leakage, args.method),
        greedy,
        f"Licence of the base: {licence}. The licence of the images is for their user to check.",
    ]
    cards.write_card(
        args.output,
        name=f"busi-{args.method}",
        summary=f"Tells breast-ultrasound images apart ({', '.join(metrics['classes'])}); fine-tuned from "
        f"{args.base_name} by {METHODS[args.method]}. For research only.\n\nBefore fine-tuning, the balanced accuracy "
        f"on the same images is {said(metrics['models']['base']['balanced_accuracy'])}.\n\n{parity_text(parity)}",
        task="image-text-to-text",
        license=identifier,
        data=f"{counted(data['train'])}. The test side: {counted(data['test'])}.",
        evaluated_on=f"a test side of {data['test']['images']:,} images in {data['test']['groups']:,} duplicate groups",
        metrics=scores(metrics, args.method),
        intended_use=INTENDED_USE,
        limits="\n".join(f"- {one}" for one in limits),
        settings=cards.without_paths(trained["settings"]),
        code_key=trained["code"],
        git_commit=trained["git_commit"],
        base_model=args.hub_name,
        starting_point=args.base_name,
        library="transformers",
        tags=["medical", "ultrasound", args.method],
    )
    record.write(args.meta, [args.output])


if __name__ == "__main__":
    step.run(main)
