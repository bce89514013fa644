"""Score retrieval and zero-shot panel types on the test side, before and after training, and compare arms.

Rule `biomedica_evaluate`. Intervals resample articles, since figures of one article are alike.
"""

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scripts.biomedica import checkpoints, held_out, scores
from scripts.biomedica import model as models
from scripts.biomedica.embedding import Embedder
from scripts.biomedica.pairs import UNKNOWN
from scripts.biomedica.settings import ARMS, EvaluateSettings, ModelSettings
from scripts.common import artefacts, classification, devices, plots, progress, retrieval, sheets, statistics, step
from scripts.common import trivial
from scripts.common.errors import KilnError
from scripts.common.settings import Settings

WORDS = {"image_to_text": "image to text", "text_to_image": "text to image"}
SHOWN = (6, 4)  # panel types in the sheet of figures, and figures of each
TEXT_FEATURES = ("characters", "words")


class EvaluateStepSettings(Settings):
    """Settings of this step."""

    evaluate: EvaluateSettings = EvaluateSettings()
    model: ModelSettings = ModelSettings()


class Side(NamedTuple):
    """A held-out side: its file, its rows without images, and [N] numbers of their panel types, -1 where unknown."""

    path: Path
    table: pd.DataFrame
    labels: np.ndarray

    @property
    def captions(self) -> list[str]:
        """Captions, in order."""
        return self.table["caption"].to_list()

    @property
    def articles(self) -> np.ndarray:
        """Articles, in order."""
        return self.table["article"].to_numpy()

    def images(self, size: int):
        """Batches of up to `size` RGB images, in order."""
        keys = self.table["key"].to_list()
        for number, files in enumerate(held_out.batches(self.path, size)):
            yield held_out.decoded(files, keys[number * size :])


def read_sides(folder: Path) -> tuple[Side, Side, list[str]]:
    """Validation and test, and the panel types of both, sorted."""
    tables = [held_out.read(folder / f"{side}.parquet") for side in held_out.SIDES]
    classes = sorted(set().union(*(one["panel_type"] for one in tables)) - {UNKNOWN})
    numbers = {name: number for number, name in enumerate(classes)}
    made = [
        Side(folder / f"{side}.parquet", table, table["panel_type"].map(lambda one: numbers.get(one, -1)).to_numpy())
        for side, table in zip(held_out.SIDES, tables, strict=True)
    ]
    return *made, classes


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


def similarities(model: Embedder, test: Side, own: EvaluateSettings, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Cosines [N, N] of test images (rows) and captions, and unit vectors [N, D] of images."""
    count = -(-len(test.table) // own.batch_size)
    images = model.images(progress.bar(test.images(own.batch_size), name, count))
    return images @ model.texts(test.captions, own.batch_size).T, images


def score(
    model: Embedder, test: Side, prompts: Mapping[str, list[str]] | None, own: EvaluateSettings, name: str
) -> tuple[dict[str, Any], np.ndarray]:
    """Sections retrieval and, with prompts, zero_shot of a model; and its similarities."""
    similarity, images = similarities(model, test, own, name)
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
        trivial.image_features([one for files in held_out.batches(side.path, own.batch_size) for one in files])
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


class Run(NamedTuple):
    """A run of the comparison of arms."""

    arm: str
    seed: int
    checkpoint: Path

    @property
    def name(self) -> str:
        """ARM-SEED."""
        return f"{self.arm}-{self.seed}"


def parse_run(text: str) -> Run:
    """ARM-SEED=CHECKPOINT."""
    name, _, path = text.partition("=")
    arm, _, seed = name.rpartition("-")
    if arm not in ARMS or not seed.isdecimal() or not path:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ARM-SEED=CHECKPOINT, with ARM of {', '.join(ARMS)}")
    return Run(arm, int(seed), Path(path))


def check_runs(runs: Sequence[Run]) -> list[int]:
    """Seeds of the runs, sorted, each of which has one run of each arm.

    Raises:
        KilnError: one is missing or doubled.
    """
    names = [one.name for one in runs]
    for name in names:
        if names.count(name) > 1:
            raise KilnError(f"--runs: {name} is given twice", "give each seed one run of each arm")
    seeds = sorted({one.seed for one in runs})
    missing = [f"{arm}-{seed}" for seed in seeds for arm in ARMS if f"{arm}-{seed}" not in names]
    if missing:
        raise KilnError(f"--runs: no {', '.join(missing)}", "give each seed one run of each arm")
    return seeds


def load(checkpoint: Path, weights: Path | None, device) -> tuple[Embedder, checkpoints.Facts]:
    """The model of a checkpoint, on `device`, and its facts; `weights` may hold its tokenizer."""
    model, transform, tokenizer, facts = checkpoints.load(checkpoint, weights)
    return Embedder(model.to(device), transform, tokenizer, facts.preprocess_cfg, device), facts


def compare_runs(
    runs: Sequence[Run], test: Side, own: EvaluateSettings, weights: Path | None, device
) -> dict[str, Any]:
    """Section runs of metrics.json: recall at 5, the mean of both ways, of every run, and how far the arms differ.

    Raises:
        KilnError: a checkpoint is of another arm or seed than is said, or they differ in steps or architecture; too
            few test pairs.
    """
    k, seeds = scores.HEADLINE_K, check_runs(runs)
    if len(test.table) < k:
        raise KilnError(
            f"runs cannot be compared on {len(test.table)} test pairs: recall at {k} needs as many",
            "hold more articles out (biomedica.held_out.test)",
        )
    found, facts = {}, {}
    for run in runs:
        model, facts[run.name] = load(run.checkpoint, weights, device)
        check_same(run, facts[run.name], runs[0], facts[runs[0].name])
        similarity, _ = similarities(model, test, own, run.name)
        found[run.name] = scores.hits(similarity, test.captions, k)
    arms = {arm: np.stack([found[f"{arm}-{seed}"] for seed in seeds]) for arm in ARMS}
    entries = {name: statistics.entry(one, test.articles, unit=scores.UNIT) for name, one in found.items()}
    per_seed = {
        seed: {arm: entries[f"{arm}-{seed}"] for arm in ARMS}
        | {"difference": statistics.entry(arms["hybrid"][i] - arms["local"][i], test.articles, unit=scores.UNIT)}
        for i, seed in enumerate(seeds)
    }
    return {
        "k": k,
        "steps": facts[runs[0].name].step,
        "per_seed": per_seed,
        "mean": {arm: float(one.mean()) for arm, one in arms.items()},
        **scores.compare_arms(arms["hybrid"], arms["local"], test.articles),
    }


def check_same(run: Run, facts: checkpoints.Facts, first: Run, wanted: checkpoints.Facts) -> None:
    """Refuse a checkpoint that is not of `run`, or is no match for the first one's."""
    if (facts.arm, facts.seed) != (run.arm, run.seed):
        raise KilnError(
            f"{run.checkpoint}: of {facts.arm}-{facts.seed}, given as {run.name}", "give each run its own name"
        )
    hint = "compare last.safetensors of runs that differ in arm and seed alone"
    if facts.step != wanted.step:
        raise KilnError(f"{run.name} had {facts.step:,} steps, {first.name} {wanted.step:,}: no fair comparison", hint)
    if (facts.model_cfg, facts.preprocess_cfg) != (wanted.model_cfg, wanted.preprocess_cfg):
        raise KilnError(f"{run.name} and {first.name} are of different models: no fair comparison", hint)


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


def draw_scores(path: Path, metrics: Mapping[str, Any]) -> None:
    """scores.png: every score after and before training, and the floor that it is compared with."""
    shown: dict[str, tuple[dict, dict, dict[str, float]]] = {}
    before, after = metrics["before"], metrics["after"]
    for way, words in WORDS.items():
        for k, one in after["retrieval"].get(way, {}).get("recall", {}).items():
            shown[f"R@{k}, {words}"] = one, before["retrieval"][way]["recall"][k], {"chance": one["baseline"]}
    if "zero_shot" in after:
        for name, floor in (("accuracy", "most_frequent"), ("balanced_accuracy", "chance")):
            floors = {floor.replace("_", " "): metrics["floors"][floor]}
            if name in metrics["trivial"]:
                floors["trivial features"] = metrics["trivial"][name]
            shown[f"panel type: {name.replace('_', ' ')}"] = after["zero_shot"][name], before["zero_shot"][name], floors
    if "mean" in after["retrieval"] and scores.HEADLINE_K in after["retrieval"]["mean"]:
        k, reached = scores.HEADLINE_K, metrics["trivial"]["retrieval"]
        own, earlier = (one["retrieval"]["mean"][k] for one in (after, before))
        shown[f"R@{k}, mean of both"] = own, earlier, {"chance": own["baseline"], "trivial features": reached}
    rows, groups = {}, {}
    for label, (own, earlier, floors) in shown.items():
        for name, one in (("after", own), ("before", earlier)):
            rows[f"{label}: {name}"], groups[f"{label}: {name}"] = (one["value"], one["ci95"]), name
        for name, value in floors.items():
            rows[f"{label}: {name}"], groups[f"{label}: {name}"] = (value, None), "floor"
    counts = metrics["data"]["test"]
    title = f"Test side: {counts['pairs']:,} figures of {counts['articles']:,} articles"
    plots.intervals(path, rows, "score, 95 % interval over articles", title, groups=groups)


def draw_confusion(path: Path, zero_shot: Mapping[str, Any]) -> None:
    """confusion.png: the panel type by prompts against that of the metadata."""
    title = f"Panel type by prompts, zero-shot (n = {zero_shot['n']:,})"
    plots.confusion_matrix(path, zero_shot["confusion_matrix"], zero_shot["classes"], title)


def draw_runs(path: Path, runs: Mapping[str, Any]) -> None:
    """runs.png: recall of every run, and of both arms, with the interval of their difference."""
    rows, groups = {}, {}
    for seed, one in runs["per_seed"].items():
        for arm in ARMS:
            rows[f"seed {seed}: {arm}"], groups[f"seed {seed}: {arm}"] = (one[arm]["value"], one[arm]["ci95"]), arm
    mean = runs["mean"]
    interval = runs["ci95"] and [mean["local"] + bound for bound in runs["ci95"]]
    rows["mean: hybrid"], groups["mean: hybrid"] = (mean["hybrid"], interval), "hybrid"
    rows["mean: local"], groups["mean: local"] = (mean["local"], None), "local"
    found = f"{runs['difference']:+.3f}"
    if runs["ci95"]:
        found += " [{:+.3f}, {:+.3f}]".format(*runs["ci95"])
    title = f"Hybrid - local: {found} in recall at {runs['k']}, {runs['seeds']} seeds, {runs['steps']:,} steps each"
    label = f"recall at {runs['k']}, 95 % interval over articles; of the mean's difference, over articles and seeds"
    plots.intervals(path, rows, label, title, floors={"mean: local": mean["local"]}, groups=groups)


def draw_retrieval(path: Path, test: Side, similarity: np.ndarray, batch_size: int) -> None:
    """retrieval.png: figures of the most frequent panel types, with the caption ranked first and the right one."""
    types = test.table["panel_type"]
    kinds = types.value_counts().sort_index().sort_values(ascending=False, kind="stable").index[: SHOWN[0]]
    chosen = {kind: np.flatnonzero(types == kind)[: SHOWN[1]] for kind in kinds}
    wanted = set(np.concatenate(list(chosen.values())).tolist())
    keys = test.table["key"].to_list()
    files = (one for batch in held_out.batches(test.path, batch_size) for one in batch)
    images = {i: held_out.decoded([one], keys[i:][:1])[0] for i, one in enumerate(files) if i in wanted}
    codes = pd.factorize(test.table["caption"])[0]
    ranks = retrieval.recall_at_k(similarity, [1], (codes, codes))["row_to_column"]["ranks"]
    rows = [(kind, [tile(images[i], test, similarity[i], ranks[i], i) for i in chosen[kind]]) for kind in kinds]
    title = f"Figures and the caption that is ranked first among {len(test.table):,}"
    sheets.contact_sheet(path, rows, title, columns=SHOWN[1], size=230, caption_lines=7)


def tile(image, test: Side, similarity: np.ndarray, rank: int, own: int) -> sheets.Tile:
    """A figure with the caption that is ranked first and, where it is another one, its own with its rank."""
    first = test.table["caption"].iloc[int(similarity.argmax())]
    if rank == 1:
        return sheets.Tile(image, f"1st, right: {textwrap.shorten(first, 180, placeholder='…')}", "good")
    right = textwrap.shorten(test.table["caption"].iloc[own], 85, placeholder="…")
    first = textwrap.shorten(first, 85, placeholder="…")
    return sheets.Tile(image, f"1st: {first} — right, at rank {rank}: {right}", "bad")


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, EvaluateStepSettings)
    step.add_device(made)
    made.add_argument("--held-out", type=Path, required=True, help="folder of rule biomedica_hold_out")
    made.add_argument("--checkpoint", type=Path, required=True, help="model.safetensors of rule biomedica_train_clip")
    made.add_argument("--weights", type=Path, help="folder of weights that training started from, if any")
    made.add_argument(
        "--runs", type=parse_run, nargs="*", default=[], metavar="ARM-SEED=CHECKPOINT",
        help="last.safetensors of runs of both arms with the same seeds and as many steps, to be compared",
    )  # fmt: skip
    made.add_argument(
        "--output-folder", type=Path, required=True,
        help="metrics.json, scores.png, retrieval.png; with known panel types confusion.png, with runs runs.png",
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
    check_runs(args.runs)
    validation, test, classes = read_sides(args.held_out)
    why = why_no_classes(classes, test)
    prompts = None if why else class_prompts(classes, own)

    trained, facts = load(args.checkpoint, args.weights, device)
    early = untrained(facts, values.model, args.weights)
    before = Embedder(early.model.eval().to(device), trained.transform, early.tokenizer, facts.preprocess_cfg, device)
    sections, similarity = score(trained, test, prompts, own, "after")
    floors = trivial_section(validation, test, None if why else classes, own)
    compared = compare_runs(args.runs, test, own, args.weights, device) if args.runs else None
    made, left_out = scores.summary(sections["retrieval"], compared, floors["retrieval"])
    metrics = {
        "summary": made,
        "left_out": left_out | ({"zero_shot": why} if why else {}),
        "data": {"validation": side_counts(validation), "test": side_counts(test)},
        "model": {"name": facts.name, "arm": facts.arm, "seed": facts.seed, "step": facts.step, "epoch": facts.epoch},
        "before": score(before, test, prompts, own, "before")[0],
        "after": sections,
        "trivial": floors,
    }  # fmt: skip
    if prompts is not None:
        metrics |= {"prompts": prompts, "floors": class_floors(validation, test, classes)}
    if compared is not None:
        metrics["runs"] = compared
    outputs = [args.output_folder / name for name in ("metrics.json", "scores.png", "retrieval.png")]
    draw_scores(outputs[1], metrics)
    draw_retrieval(outputs[2], test, similarity, own.batch_size)
    if prompts is not None:
        outputs.append(args.output_folder / "confusion.png")
        draw_confusion(outputs[-1], sections["zero_shot"])
    if compared is not None:
        outputs.append(args.output_folder / "runs.png")
        draw_runs(outputs[-1], compared)
    artefacts.write_json(outputs[0], metrics)
    for name, one in made.items():
        step.log.info("%s %.3f, %s %.3f, n = %d", name, one["value"], one["baseline_kind"], one["baseline"], one["n"])
    for name, reason in metrics["left_out"].items():
        step.log.info("%s left out: %s", name, reason)
    record.write(args.meta, outputs, items=len(test.table))


if __name__ == "__main__":
    step.run(main)
