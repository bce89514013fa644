"""Score retrieval and zero-shot panel types on the test side, before and after training, and compare arms.

Rule `biomedica_evaluate`. Intervals resample articles, since figures of one article are alike.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.biomedica import arms, checkpoints, embedding, held_out, pictures, scores
from scripts.biomedica import model as models
from scripts.biomedica.embedding import Embedder
from scripts.biomedica.held_out import Side
from scripts.biomedica.settings import EvaluateSettings, ModelSettings
from scripts.common import artefacts, classification, devices, retrieval, step, trivial
from scripts.common.errors import KilnError
from scripts.common.settings import Settings

TEXT_FEATURES = ("characters", "words")


class EvaluateStepSettings(Settings):
    """Settings of this step."""

    evaluate: EvaluateSettings = EvaluateSettings()
    model: ModelSettings = ModelSettings()


def class_prompts(classes: Sequence[str], own: EvaluateSettings) -> dict[str, list[str]]:
    """{panel type: its prompts}.

    Raises:
        KilnError: two panel types have one name.
    """
    names = {one: own.names.get(one, one.replace("_", " ")) for one in classes}
    for name in sorted(set(own.names) - set(classes)):
        step.log.info("no held-out figure is of panel type %r, which biomedica.evaluate.names has", name)
    seen: dict[str, str] = {}
    for one, name in names.items():
        if name in seen:
            raise KilnError(f"panel types {seen[name]!r} and {one!r} are both named {name!r}", "give each its own name")
        seen[name] = one
    return {one: [template.format(name) for template in own.prompts] for one, name in names.items()}


def why_no_classes(classes: Sequence[str], test: Side) -> str | None:
    """Why panel types cannot be scored, or None."""
    if len(classes) < 2:
        return f"held-out figures are of {len(classes)} known panel types"
    return None if (test.labels >= 0).any() else "no test figure's panel type is known"


def untrained(facts: checkpoints.Facts, settings: ModelSettings, weights: Path | None) -> models.Clip:
    """The model as it was before the training that made a checkpoint.

    Raises:
        KilnError: the settings, or the folder of weights, are not those of that training.
    """
    if (settings.weights is None) != (weights is None):
        raise KilnError(
            f"biomedica.model.weights is {settings.weights!r}, --weights {weights}", "give the folder of these weights"
        )
    made = models.build(settings, facts.seed, weights)
    if made.model_cfg != facts.model_cfg:
        raise KilnError(
            f"the checkpoint is of a model {facts.name}, and biomedica.model makes another one, {made.name}",
            "take the settings that it was trained with, or train again",
        )
    return made


def score(
    model: Embedder, test: Side, prompts: Mapping[str, list[str]] | None, own: EvaluateSettings, name: str
) -> tuple[dict[str, Any], np.ndarray]:
    """Sections retrieval and, with prompts, zero_shot of a model; and its similarities."""
    similarity, images = embedding.similarities(model, test, own.batch_size, name)
    retrieved = retrieval.retrieval_scores(similarity, test.captions, test.articles, own.ks, scores.UNIT)
    made = {"retrieval": retrieved | {"full_captions": model.full(test.captions)}}
    if prompts is not None:
        vectors = model.texts([one for many in prompts.values() for one in many], own.batch_size)
        vectors = scores.class_vectors(vectors.reshape(len(prompts), -1, vectors.shape[1]))
        shares = scores.zero_shot(images, vectors, model.scale())
        made["zero_shot"] = scores.class_scores(test.labels, shares, test.articles, list(prompts))
    return made, similarity


def trivial_section(validation: Side, test: Side, classes: Sequence[str] | None, own: EvaluateSettings):
    """Section trivial of metrics.json: what mean colour, size and text length reach, taught on validation.

    `retrieval` is the greater of recall by pairs of image and text length and, with classes, by panel type.
    """
    k, captions = scores.HEADLINE_K, test.captions
    images = [
        np.concatenate([trivial.image_features(files) for files in held_out.batches(side.path, own.batch_size)])
        for side in (validation, test)
    ]
    texts = [scores.text_features(side.captions) for side in (validation, test)]
    by_length = scores.pair_scores((images[0], texts[0]), validation.captions, (images[1], texts[1]))
    found: dict[str, Any] = {
        "features": [*trivial.NAMES, *TEXT_FEATURES],
        "taught_on": len(validation.table),
        "retrieval_by_text_length": scores.recall_of_ties(by_length, captions, k),
    }
    if classes is not None and (validation.labels >= 0).any():
        shares = classification.trivial_probabilities(images[0], validation.labels, images[1], len(classes))
        reached = scores.trivial_classes(shares, test.labels, captions, k)
        taught, asked = validation.labels >= 0, test.labels >= 0
        balanced = classification.trivial_baseline(
            images[0][taught], validation.labels[taught], images[1][asked], test.labels[asked], "balanced_accuracy"
        )
        found |= {
            "accuracy": reached["panel_type"], "balanced_accuracy": balanced,
            "retrieval_by_panel_type": reached["retrieval"],
        }  # fmt: skip
    recalls = [one for name, one in found.items() if name.startswith("retrieval_") and one is not None]
    return found | {"retrieval": max(recalls, default=None)}


def class_floors(validation: Side, test: Side, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy of the most frequent panel type, of validation where one is known there; and balanced accuracy's
    chance, over the types that occur."""
    known = test.labels[test.labels >= 0]
    seen = validation.labels[validation.labels >= 0]
    frequent = int(np.bincount(seen if len(seen) else known).argmax())
    return {
        "most_frequent_class": classes[frequent],
        "most_frequent": float((known == frequent).mean()),
        "chance": 1 / len(np.unique(known)),
    }


def side_counts(side: Side) -> dict[str, Any]:
    """Pairs, articles, sources, distinct captions, pairs whose caption another one has too, and panel types."""
    local = int((side.table["source"] == held_out.LOCAL).sum())
    return {
        "pairs": len(side.table),
        "articles": int(side.table["article"].nunique()),
        "local": local,
        "streamed": len(side.table) - local,
        "distinct_captions": int(side.table["caption_id"].nunique()),
        "repeated_captions": int(side.table["caption_id"].duplicated(keep=False).sum()),
        "panel_types": {name: int(n) for name, n in sorted(side.table["panel_type"].value_counts().items())},
    }


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, EvaluateStepSettings)
    step.add_device(made)
    made.add_argument("--held-out", type=Path, required=True, help="folder of rule biomedica_hold_out")
    made.add_argument("--checkpoint", type=Path, required=True, help="model.safetensors of rule biomedica_train_clip")
    made.add_argument("--weights", type=Path, help="folder of weights that training started from, if any")
    made.add_argument(
        "--runs", type=arms.parse_run, nargs="*", default=[], metavar="ARM-SEED=CHECKPOINT",
        help="last.safetensors of runs of both arms with the same seeds and as many steps, to be compared",
    )  # fmt: skip
    made.add_argument(
        "--output-folder", type=Path, required=True,
        help="metrics.json, scores.png, retrieval.png, confusion.png and, with runs, runs.png",
    )  # fmt: skip
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Score what `args` name.

    Raises:
        KilnError: bad held-out files or checkpoints, or runs that do not compare.
    """
    values = step.read_settings(args)
    own = values.evaluate
    device = devices.make_accelerator(args.device, "fp32", step.threads(args)).device
    inputs = {side: args.held_out / f"{side}.parquet" for side in held_out.SIDES} | {"checkpoint": args.checkpoint}
    inputs |= {f"weights {path.name}": path for path in (models.weight_files(args.weights) if args.weights else ())}
    inputs |= {one.name: one.checkpoint for one in args.runs}
    record = step.record(args, "scripts.biomedica.evaluate", values, inputs)
    arms.check_runs(args.runs)
    validation, test, classes = held_out.read_sides(args.held_out)
    why = why_no_classes(classes, test)
    prompts = None if why else class_prompts(classes, own)

    compared = arms.compare_runs(args.runs, test, own.batch_size, args.weights, device) if args.runs else None
    trained, facts = embedding.load(args.checkpoint, args.weights, device)
    early = untrained(facts, values.model, args.weights)
    before = Embedder(early.model.eval().to(device), trained.transform, early.tokenizer, facts.preprocess_cfg, device)
    sections, similarity = score(trained, test, prompts, own, "after")
    floors = trivial_section(validation, test, None if why else classes, own)
    made, left_out = scores.summary(
        sections["retrieval"], compared, floors["retrieval"], test.table["article"].nunique()
    )
    metrics = {
        "summary": made,
        "left_out": left_out | ({"zero_shot": why} if why else {}),
        "data": {"validation": side_counts(validation), "test": side_counts(test)},
        "model": {key: value for key, value in facts._asdict().items() if not key.endswith("_cfg")},
        "before": score(before, test, prompts, own, "before")[0],
        "after": sections,
        "trivial": floors,
    }
    if prompts is not None:
        metrics |= {"prompts": prompts, "floors": class_floors(validation, test, classes)}
    if compared is not None:
        metrics["runs"] = compared
    outputs = [args.output_folder / name for name in ("metrics.json", "scores.png", "retrieval.png")]
    pictures.draw_scores(outputs[1], metrics)
    pictures.draw_retrieval(outputs[2], test, similarity, own.batch_size)
    outputs.append(args.output_folder / "confusion.png")
    if prompts is not None:
        pictures.draw_confusion(outputs[-1], sections["zero_shot"])
    else:
        pictures.draw_panel_types(outputs[-1], metrics["data"], why)
    if compared is not None:
        outputs.append(args.output_folder / "runs.png")
        pictures.draw_runs(outputs[-1], compared)
    artefacts.write_json(outputs[0], metrics)
    for name, one in made.items():
        step.log.info("%s %.3f, %s %.3f, n = %d", name, one["value"], one["baseline_kind"], one["baseline"], one["n"])
    for name, reason in metrics["left_out"].items():
        step.log.info("%s left out: %s", name, reason)
    record.write(args.meta, outputs, items=len(test.table))


if __name__ == "__main__":
    step.run(main)
