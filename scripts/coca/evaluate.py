"""Score captions, retrieval and zero-shot classes on the test side, beside chance and what needs no model.

Rule `coca_evaluate`. Intervals resample patients, since slides of one patient are alike.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from scripts.coca import checkpoints, embedding, scores, sides, texts
from scripts.coca.latents import Latents
from scripts.coca.settings import EvaluateSettings
from scripts.coca.texts import Texts
from scripts.common import artefacts, classification, devices, plots, progress, retrieval, step, tables
from scripts.common.errors import KilnError
from scripts.common.settings import Settings

TRIVIAL = ("tiles", "norm")  # columns of the manifest that need no model
PICTURED = 400  # slides in the picture of similarities
WORDS = {"image_to_text": "slide to text", "text_to_image": "text to slide"}
MEASURES = {"bleu": ("BLEU", 100), "chrf": ("chrF", 100), "rouge_l": ("ROUGE-L", 1), "exact": ("equal text", 1)}


class EvaluateStepSettings(Settings):
    """Settings of this step."""

    evaluate: EvaluateSettings = EvaluateSettings()
    max_seq_len: int = Field(512, gt=2, description="tokens of a text with its two marks")


def labels_of(strings: Sequence[str], classes: Mapping[str, Sequence[str]]) -> np.ndarray:
    """[N] number of each text's class, -1 where it names none, or several."""
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers.get(texts.class_of(one, classes), -1) for one in strings], dtype=np.int64)


def read_captions(path: Path, test: pd.DataFrame) -> list[str]:
    """Captions of the test side, in the order of `test`.

    Raises:
        KilnError: captions of other slides, or of other texts.
    """
    table = tables.read_table(path, ["slide", "side", "text", "caption"])
    table = table[table["side"] == "test"].set_index("slide")
    stale = "captions and slides are not of one run: run coca_caption again"
    doubled = table.index[table.index.duplicated()]
    if len(doubled):
        raise KilnError(f"{path}: two captions of slide {doubled[0]}", stale)
    strays = sorted(set(table.index) - set(test["slide"]))
    if strays:
        raise KilnError(f"{path}: slide {strays[0]} is not on the test side ({len(strays)} such)", stale)
    missing = sorted(set(test["slide"]) - set(table.index))
    if missing:
        raise KilnError(f"{path}: no caption of slide {missing[0]} ({len(missing)} such)", stale)
    table = table.loc[test["slide"]]
    other = table.index[table["text"].to_numpy() != test["text"].to_numpy()]
    if len(other):
        raise KilnError(f"{path}: slide {other[0]} has another text than in the manifest", stale)
    return table["caption"].to_list()


def embed_slides(coca, latents: Latents, slides: Sequence[str], accelerator) -> np.ndarray:
    """Unit vectors [N, dim_latents] float32 of slides, in order."""
    made = latents.batches(slides, embedding.BATCH)
    count = -(-len(slides) // embedding.BATCH)
    return np.concatenate(
        [embedding.embed_images(coca, one, accelerator) for one in progress.bar(made, "embed", count)]
    )


class Model:
    """A checkpoint's model with its tokenizer, which embeds."""

    def __init__(self, checkpoint: Path, tokenizer: Path, max_seq_len: int, accelerator):
        self.texts, self.max_seq_len, self.accelerator = Texts.load(tokenizer), max_seq_len, accelerator
        model, self.facts = checkpoints.load(checkpoint, tokenizer)
        self.coca = model.coca.to(accelerator.device)

    def embed(self, strings: Sequence[str]) -> np.ndarray:
        """Unit vectors [N, dim_latents] float32 of texts."""
        return embedding.embed_texts(self.coca, self.texts, strings, self.max_seq_len, self.accelerator)

    def cut(self, strings: Sequence[str]) -> int:
        """How many texts are too long, so that their ends are not seen."""
        return sum(self.texts.encode(one, self.max_seq_len)[1] for one in strings)


def class_sections(
    model: Model, images: np.ndarray, captions: Sequence[str], test: pd.DataFrame, train: pd.DataFrame,
    own: EvaluateSettings,
) -> dict[str, Any]:  # fmt: skip
    """Sections diagnosis, zero_shot and trivial of metrics.json.

    Both are compared with the most frequent class of the test side, as no constant answer scores more there; that of
    the training side stands beside it.

    Raises:
        KilnError: no text of train, or of the test side, names exactly one class.
    """
    names = list(own.classes)
    patients, strings = test["patient"].to_numpy(), test["text"].to_list()
    labels, taught = labels_of(strings, own.classes), labels_of(train["text"], own.classes)
    diagnosis = scores.class_scores(labels, labels_of(captions, own.classes), patients, names)
    if not (taught >= 0).any():
        raise KilnError("no training text names exactly one class", "set coca.evaluate.classes to terms of the texts")
    known = labels[labels >= 0]
    for key, numbers in (("most_frequent", known), ("most_frequent_in_training", taught[taught >= 0])):
        frequent = scores.most_frequent(numbers.tolist())
        diagnosis |= {f"{key}_class": names[frequent], key: float((known == frequent).mean())}
    prompts = {name: own.prompts.get(name) or terms for name, terms in own.classes.items()}
    numbers = [number for number, name in enumerate(names) for _ in prompts[name]]
    embedded = model.embed([one for name in names for one in prompts[name]])
    shares = scores.zero_shot(images, embedded, numbers, embedding.scale(model.coca))
    zero_shot = scores.class_scores(labels, None, patients, names, shares)
    features = [side[list(TRIVIAL)].to_numpy(np.float64) for side in (train, test)]
    guessed = classification.trivial_probabilities(features[0], taught, features[1], len(names))
    return {
        "diagnosis": diagnosis,
        "zero_shot": {"prompts": prompts, "most_frequent": diagnosis["most_frequent"], **zero_shot},
        "trivial": {
            "features": list(TRIVIAL), **scores.trivial_scores(guessed, labels, strings, scores.HEADLINE_K)
        },
    }  # fmt: skip


def side_counts(side: pd.DataFrame) -> dict[str, int]:
    """Slides, patients, distinct texts, and slides whose text another one has too."""
    return {
        "slides": len(side),
        "patients": int(side["patient"].nunique()),
        "distinct_texts": int(side["text"].nunique()),
        "repeated_texts": int(side["text"].duplicated(keep=False).sum()),
    }


def draw_scores(path: Path, metrics: Mapping[str, Any]) -> None:
    """scores.png: every score with its interval, and below it the baseline that it is compared with."""
    retrieved, written = metrics["retrieval"], metrics["captions"]
    shown = {
        f"R@{k}, {words}": (one, 1)
        for key, words in WORDS.items()
        for k, one in retrieved.get(key, {}).get("recall", {}).items()
    }
    for name, (label, highest) in MEASURES.items():
        shown[f"captions: {label}" + (f" / {highest}" if highest > 1 else "")] = written[name], highest
    for key, label in (("diagnosis", "class of the caption"), ("zero_shot", "class by prompts")):
        if key in metrics:
            floor = {"baseline": metrics[key]["most_frequent"], "baseline_kind": "most_frequent"}
            shown[f"{label}: accuracy"] = metrics[key]["accuracy"] | floor, 1
    groups, baselines = {}, set()
    for label, (one, highest) in shown.items():
        interval = one["ci95"] and [bound / highest for bound in one["ci95"]]
        baseline = one["baseline_kind"].replace("_", " ")
        groups[label] = {"model": (one["value"] / highest, interval), baseline: (one["baseline"] / highest, None)}
        baselines.add(baseline)
    counts = metrics["data"]["test"]
    title = f"Test side: {counts['slides']} slides of {counts['patients']} patients"
    plots.intervals(path, groups, "score, 95 % interval over patients", title, baselines=baselines)


def draw_similarity(
    path: Path, similarity: np.ndarray, strings: Sequence[str], labels: np.ndarray, names: Sequence[str]
) -> None:
    """similarity.png: cosines of slides and texts, ordered by the class of the text, then by the text."""
    order = np.lexsort((strings, np.where(labels < 0, len(names), labels)))
    order = order[np.linspace(0, len(order) - 1, min(PICTURED, len(order))).astype(int)]
    groups = [(*names, "none or several")[label] for label in labels[order]] if len(names) else None
    of_all = f"{len(order)} of {len(similarity)} " if len(order) < len(similarity) else ""
    plots.heat_map(
        path, similarity[np.ix_(order, order)], f"Cosine of {of_all}test slides and texts", "texts", "slides", groups
    )  # fmt: skip


def draw_confusion(path: Path, diagnosis: Mapping[str, Any]) -> None:
    """confusion.png: the class that captions name against the class of the text."""
    names = diagnosis["classes"]
    matrix = np.column_stack([diagnosis["confusion_matrix"], diagnosis["unanswered"]])
    title = f"Class that the caption names (n = {diagnosis['n']})"
    plots.confusion_matrix(path, matrix, names, title, [*names, "none or several"])


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, EvaluateStepSettings)
    step.add_device(made)
    made.add_argument("--captions", type=Path, required=True, help="captions.parquet of rule coca_caption")
    made.add_argument("--manifest", type=Path, required=True, help="manifest.parquet of rule coca_list_slides")
    made.add_argument("--splits", type=Path, required=True, help="splits.csv of rule coca_split")
    made.add_argument("--tokenizer", type=Path, required=True, help="folder of rule coca_train_tokenizer")
    made.add_argument("--latents", type=Path, required=True, help="folder of rule coca_encode_slides")
    made.add_argument("--checkpoint", type=Path, required=True, help="model.safetensors of rule coca_train")
    made.add_argument(
        "--output-folder", type=Path, required=True,
        help="metrics.json, scores.png, similarity.png and, with classes, confusion.png",
    )  # fmt: skip
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Score what `args` name."""
    values = step.read_settings(args)
    own = values.evaluate
    accelerator = devices.make_accelerator(args.device, "fp32", step.threads(args))
    inputs = {name: getattr(args, name) for name in ("captions", "manifest", "splits", "checkpoint")}
    inputs |= {"latents": args.latents / "index.parquet"} | texts.identity(args.tokenizer)
    record = step.record(args, "scripts.coca.evaluate", values, inputs)
    slides = sides.read(args.manifest, args.splits, TRIVIAL)
    train, test = (sides.only(slides, side) for side in ("train", "test"))
    captions = read_captions(args.captions, test)
    strings, patients = test["text"].to_list(), test["patient"].to_numpy()

    model = Model(args.checkpoint, args.tokenizer, values.max_seq_len, accelerator)
    asked = test["slide"].to_list()
    encoder = checkpoints.encoder_sha256(args.checkpoint, model.facts)
    latents = Latents(args.latents, model.facts.encoder["dim"], asked, encoder)
    images = embed_slides(model.coca, latents, asked, accelerator)
    similarity = images @ model.embed(strings).T
    retrieved = retrieval.retrieval_scores(similarity, strings, patients, own.ks, "patient")
    by_class = class_sections(model, images, captions, test, train, own) if own.classes else {}
    counts = {"train": side_counts(train), "test": side_counts(test)}
    by_trivial, patients_of_test = by_class.get("trivial", {}), counts["test"]["patients"]
    made, left_out = scores.summary(retrieved, by_class.get("diagnosis"), by_trivial, patients_of_test)
    metrics = {
        "summary": made,
        "left_out": left_out,
        "data": counts,
        "retrieval": {"cut_texts": model.cut(strings), **retrieved},
        "captions": scores.caption_scores(captions, strings, train["text"].to_list(), patients),
        **by_class,
    }
    output = args.output_folder / "metrics.json"
    outputs = [output, *(args.output_folder / f"{name}.png" for name in ("scores", "similarity"))]
    draw_scores(outputs[1], metrics)
    draw_similarity(outputs[2], similarity, strings, labels_of(strings, own.classes), list(own.classes))
    if own.classes:
        outputs.append(args.output_folder / "confusion.png")
        draw_confusion(outputs[3], metrics["diagnosis"])
    artefacts.write_json(output, metrics)
    for name, one in made.items():
        step.log.info("%s %.3f, %s %.3f, n = %d", name, one["value"], one["baseline_kind"], one["baseline"], one["n"])
    for name, reason in left_out.items():
        step.log.info("%s left out: %s", name, reason)
    record.write(args.meta, outputs, items=len(test))


if __name__ == "__main__":
    step.run(main)
