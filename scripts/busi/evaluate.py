"""Score predictions on the test side: zero-shot base, fine-tuned models, and what needs no model at all.

Rule `busi_evaluate`. Intervals resample duplicate groups, since near-twins are not independent. Where the split
leaks, every model is also scored apart on test images with and without a near-twin in train: the difference,
beside the base's own, which never saw train, is what the leak adds.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from scripts.busi.chat_rows import read_rows
from scripts.busi.settings import EvaluateSettings
from scripts.common import artefacts, classification, plots, statistics, step, tables, trivial
from scripts.common.errors import KilnError
from scripts.common.images import ImageError

BASE, MAJORITY = "base", "majority"
SIDES = {"with_twin": True, "without_twin": False}


def read_predictions(path: Path, test: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """predictions.csv as columns p_NAME (float64), predicted and parsed (int64; -1 is no answer), in test's order.

    Raises:
        KilnError: names file and row of what does not fit the test rows, or cannot be.
    """
    shares = [f"p_{name}" for name in classes]
    table = tables.read_table(path, ["path", "label", *shares, "predicted", "parsed"])
    own = ("p_", "loglik_", "tokens_")
    header = pd.read_csv(path, nrows=0).columns
    unknown = [c for c in header if c.startswith(own) and c.partition("_")[2] not in classes]
    if unknown:
        raise KilnError(
            f"{path}: column {unknown[0]} is of no class; the classes are {', '.join(classes)}",
            "these predictions were made with other classes: predict again",
        )

    def refuse(bad: pd.Series, says, hint: str) -> None:
        if bad.any():
            i = int(np.argmax(bad))
            raise KilnError(f"{path}, row {i + 2} ({table['path'][i]}): {says(table.iloc[i])}", hint)

    stale = "predictions and test rows are not of one run: predict again"
    truth = test.set_index("image")["label"]
    refuse(table["path"].duplicated(), lambda row: "a second row for this image", "keep one row for each image")
    refuse(~table["path"].isin(truth.index), lambda row: "no image of the test rows", stale)
    missing = test.loc[~test["image"].isin(table["path"]), "image"]
    if len(missing):
        raise KilnError(f"{path}: no row for {len(missing)} test images, such as {missing.iloc[0]}", stale)

    expected = table["path"].map(truth)
    refuse(
        pd.to_numeric(table["label"], errors="coerce") != expected,
        lambda row: f"label {row['label']}, but {truth[row['path']]} in the test rows",
        stale,
    )
    p = table[shares].apply(pd.to_numeric, errors="coerce")
    wrong = ~np.isfinite(p).all(axis=1) | (p < 0).any(axis=1) | ((p.sum(axis=1) - 1).abs() > 1e-3)
    found = "probabilities {}, which are not numbers from 0 to 1 that add up to 1"
    refuse(wrong, lambda row: found.format(", ".join(str(row[c]) for c in shares)), "predict again")
    numbers = range(len(classes))
    decided = pd.to_numeric(table["predicted"], errors="coerce")
    refuse(~decided.isin(numbers), lambda row: f"predicted {row['predicted']} is no class", "predict again")
    decided = decided.astype(np.int64)
    short = p.max(axis=1) - p.to_numpy()[np.arange(len(p)), decided] > 1e-6
    refuse(short, lambda row: f"predicted {row['predicted']} is not the likeliest class", "predict again")
    parsed = pd.to_numeric(table["parsed"], errors="coerce")
    odd = table["parsed"].notna() & ~parsed.isin(numbers)
    refuse(odd, lambda row: f"parsed {row['parsed']} is no class; empty is no answer", "predict again")
    made = p.astype(float).assign(predicted=decided, parsed=parsed.fillna(-1).astype(np.int64))
    return made.set_axis(table["path"]).loc[test["image"]].reset_index(drop=True)


def twins_in_train(path: Path, threshold: float, train: pd.DataFrame, test: pd.DataFrame) -> tuple[np.ndarray, int]:
    """(whether each test image has a near-twin in `train`, how many have theirs on a side not trained on).

    Of a published split part of the train side is cut off for validation: twins there taught nothing.

    Raises:
        KilnError: the report has no such threshold, contradicts itself, or is of another split.
    """
    try:
        found = {float(key): one for key, one in artefacts.read_json(path)["thresholds"].items()}
        if threshold not in found:
            raise KilnError(
                f"{path}: nothing for threshold {threshold}; it has {', '.join(map(str, found))}",
                "name the value of busi.evaluate.leak_threshold in busi.audit.thresholds too",
            )
        items = found[threshold]["items"]
        pairs = pd.DataFrame([(one["test"], one["train"]) for one in items], columns=["test", "train"])
        stated = found[threshold]["test_with_twin_in_train"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KilnError(
            f"{path}: no leakage report ({type(error).__name__}: {error})", "make it by rule busi_audit_split"
        ) from None
    if pairs["test"].nunique() != stated:
        raise KilnError(
            f"{path}: {stated} test images with a near-twin at {threshold}, but {pairs['test'].nunique()} listed",
            "make it anew by rule busi_audit_split",
        )
    strays = pairs.loc[~pairs["test"].isin(test["image"]), "test"]
    if len(strays):
        raise KilnError(f"{path}: {strays.iloc[0]} is no image of the test rows", "give the audit of this very split")
    trained = test["image"].isin(pairs.loc[pairs["train"].isin(train["image"]), "test"])
    listed = test["image"].isin(pairs["test"])
    tables.reconcile(
        str(path), len(test), with_twin=int(trained.sum()), elsewhere=int((listed & ~trained).sum()),
        without_twin=int((~listed).sum()),
    )  # fmt: skip
    return trained.to_numpy(), int((listed & ~trained).sum())


def text_scores(labels: np.ndarray, made: pd.DataFrame, groups: np.ndarray, classes, seed: int) -> dict:
    """What the greedy texts say: unanswerable ones are wrong, and agree with no likelihood."""
    parsed, decided = made["parsed"].to_numpy(), made["predicted"].to_numpy()
    report = classification.classification_report(
        labels, None, groups, seed, classes=classes, predictions=parsed
    )  # fmt: skip
    same = (parsed == decided).astype(float)
    agreement = statistics.metric(same.mean(), len(same), statistics.bootstrap_interval(same, groups=groups, seed=seed))
    unanswerable = int((parsed < 0).sum())
    counts = tables.reconcile("greedy texts", len(made), parsed=int((parsed >= 0).sum()), unanswerable=unanswerable)
    scores = {name: report[name] for name in ("accuracy", "balanced_accuracy")}
    return {"counts": counts, "unanswerable": unanswerable, **scores, "agreement_with_likelihood": agreement}


def model_scores(test: pd.DataFrame, made: pd.DataFrame, classes: Sequence[str], values: EvaluateSettings) -> dict:
    """Everything that is said of one model."""
    labels, groups = test["label"].to_numpy(), test["group"].to_numpy()
    p, decided = made[[f"p_{name}" for name in classes]].to_numpy(), made["predicted"].to_numpy()
    report = classification.classification_report(
        labels, p, groups, values.seed, classes=classes, predictions=decided
    )  # fmt: skip
    right = int(np.trace(report["confusion_matrix"]))
    report["counts"] = tables.reconcile("test images", len(test), right=right, wrong=int((decided != labels).sum()))
    report["calibration"] = classification.calibration(
        labels, p, groups, values.seed, bins=values.calibration_bins, predictions=decided
    )  # fmt: skip
    if "parsed" in made:
        report["text"] = text_scores(labels, made, groups, classes, values.seed)
    return report


def majority_predictions(train: pd.DataFrame, test: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """The shares of the classes in train as everyone's probabilities: the most frequent class decides."""
    shares = np.bincount(train["label"], minlength=len(classes)) / len(train)
    made = pd.DataFrame(np.tile(shares, (len(test), 1)), columns=[f"p_{name}" for name in classes])
    return made.assign(predicted=int(shares.argmax()))


def trivial_score(images: Path, train: pd.DataFrame, test: pd.DataFrame) -> float:
    """Balanced accuracy of a logistic regression on trivial features, fitted on train.

    Raises:
        KilnError: an image is missing or unreadable.
    """
    features = []
    for side in (train, test):
        for path in side["image"]:
            try:
                features.append(trivial.image_features([images / path])[0])
            except (ImageError, FileNotFoundError) as error:
                raise KilnError(
                    f"{images / path}: readable when it was listed, now: {error}", "check --images, or list anew"
                ) from None
    n = len(train)
    return classification.trivial_baseline(
        features[:n], train["label"], features[n:], test["label"], score="balanced_accuracy"
    )  # fmt: skip


def split_by_twin(made: pd.DataFrame, test: pd.DataFrame, twin: np.ndarray, classes, seed: int) -> dict:
    """One model's report on test images with and without a near-twin in train, and the difference."""
    labels, groups = test["label"].to_numpy(), test["group"].to_numpy()
    p, decided = made[[f"p_{name}" for name in classes]].to_numpy(), made["predicted"].to_numpy()
    sides = {}
    for name, wanted in SIDES.items():
        chosen = twin == wanted
        n_groups = len(np.unique(groups[chosen]))
        if not chosen.any():
            sides[name] = {"n": 0, "n_groups": 0, "reason": "no such test image"}
            continue
        few = n_groups < 2
        sides[name] = classification.classification_report(
            labels[chosen], p[chosen], groups[chosen], seed, classes=classes, predictions=decided[chosen],
            n_resamples=0 if few else 2000,
        )  # fmt: skip
        if few:
            sides[name]["reason"] = "one duplicate group: no intervals"
    difference = classification.part_difference(labels, decided, twin, groups, len(classes), seed)
    return {**sides, "difference": difference}


def leak_scores(models: dict[str, pd.DataFrame], test, twin: np.ndarray, elsewhere: int, classes, values) -> dict:
    """How much a leak adds, per model; the base is the control."""
    if not twin.any():
        return {"test_with_twin_in_train": 0}
    return {
        "test_with_twin_in_train": int(twin.sum()),
        "test_without": int((~twin).sum()),
        "twin_not_trained_on": elsewhere,
        "threshold": values.leak_threshold,
        "models": {name: split_by_twin(made, test, twin, classes, values.seed) for name, made in models.items()},
    }


def against_base(models: dict[str, pd.DataFrame], test: pd.DataFrame, seed: int) -> dict:
    """Accuracy of each fine-tuned model minus the base's on the same images."""
    labels, groups = test["label"].to_numpy(), test["group"].to_numpy()
    right = {name: (made["predicted"].to_numpy() == labels).astype(float) for name, made in models.items()}
    found = {}
    for name in models:
        if name != BASE:
            interval = statistics.paired_difference_interval(right[name], right[BASE], groups, seed=seed)
            value = float((right[name] - right[BASE]).mean())
            found[name] = {"accuracy_difference": statistics.metric(value, len(labels), interval)}
    return found


def counts_of(rows: pd.DataFrame, classes: Sequence[str]) -> dict:
    """Images, duplicate groups, and images per class of a side."""
    per_class = np.bincount(rows["label"], minlength=len(classes)).tolist()
    return {
        "images": len(rows),
        "groups": int(rows["group"].nunique()),
        "per_class": dict(zip(classes, per_class, strict=True)),
    }


def draw(folder: Path, metrics: dict) -> list[Path]:
    """confusion.png, calibration.png, scores.png; returns their paths."""
    made = [folder / f"{name}.png" for name in ("confusion", "calibration", "scores")]
    models, headline, leak = metrics["models"], metrics["headline"], metrics["leak"]
    images = metrics["data"]["test"]["images"]
    n = f"test side (n = {images})"
    matrix = models[headline]["confusion_matrix"]
    plots.confusion_matrix(made[0], matrix, metrics["classes"], f"Confusion matrix of {headline}, {n}")
    shown = {}
    for name, label in ((headline, headline), (BASE, "base, zero-shot")):
        found = models[name]["calibration"]
        shown[label] = found["bins"], found["expected_calibration_error"]["value"]
    plots.reliability(made[1], shown, f"Can the probabilities be trusted? {n[0].upper()}{n[1:]}")
    names = {BASE: "base, zero-shot", MAJORITY: "majority answer"}
    scored = {f"all images (n = {images})": models}
    for side, words in (("with_twin", "a near-twin in train"), ("without_twin", "no near-twin in train")):
        parts = {name: sides[side] for name, sides in leak.get("models", {}).items()}
        n_of_side = next((part["n"] for part in parts.values()), 0)
        if n_of_side:
            scored[f"{words} (n = {n_of_side})"] = parts
    groups = {
        heading: {
            names.get(name, name): (part["balanced_accuracy"]["value"], part["balanced_accuracy"]["ci95"])
            for name, part in parts.items()
        }
        for heading, parts in scored.items()
    }
    floors = {"chance": 1 / len(metrics["classes"]), "trivial features": metrics["trivial"]["balanced_accuracy"]}
    label, title = "balanced accuracy, 95 % interval", "Balanced accuracy on the test side"
    plots.intervals(made[2], groups, label, title, floors, list(names.values()))
    return made


def named_predictions(given: Sequence[str]) -> dict[str, Path]:
    """{name: path} of NAME=PATH.

    Raises:
        KilnError: another form, a name given twice or reserved, no base, or nothing but it.
    """
    found: dict[str, Path] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise KilnError(f"--predictions {one}: expected NAME=predictions.csv", "such as base=base/predictions.csv")
        if name in found or name == MAJORITY:
            raise KilnError(f"--predictions {one}: the name {name} is taken", "give each model a name of its own")
        found[name] = Path(path)
    if BASE not in found or len(found) < 2:
        raise KilnError(
            f"--predictions names {', '.join(found)}; expected {BASE} and at least one fine-tuned model",
            "add the predictions of the model before fine-tuning as base=PATH, and of one after",
        )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, EvaluateSettings)
    made.add_argument(
        "--predictions", action="append", required=True, metavar="NAME=CSV",
        help="predictions.csv of rule busi_predict, repeatable; one is base, the first other one is the headline",
    )  # fmt: skip
    made.add_argument("--train", type=Path, required=True, help="train.jsonl of rule busi_build_conversations")
    made.add_argument("--test", type=Path, required=True, help="test.jsonl of rule busi_build_conversations")
    made.add_argument("--images", type=Path, required=True, help="folder of the images, for trivial features")
    made.add_argument("--leakage", type=Path, required=True, help="leakage_report.json of rule busi_audit_split")
    made.add_argument("--classes", nargs="+", required=True, help="names of the classes 0, 1, ...")
    made.add_argument("--output-folder", type=Path, required=True, help="metrics.json and pictures")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Score what `args` name."""
    values = step.read_settings(args)
    files = named_predictions(args.predictions)
    inputs = {"train": args.train, "test": args.test, "leakage": args.leakage}
    inputs |= {f"predictions of {name}": path for name, path in files.items()}
    record = step.record(args, "scripts.busi.evaluate", values, inputs)
    classes = args.classes
    train, test = read_rows(args.train, classes), read_rows(args.test, classes)
    models = {name: read_predictions(path, test, classes) for name, path in files.items()}
    twin, elsewhere = twins_in_train(args.leakage, values.leak_threshold, train, test)

    everyone = {**models, MAJORITY: majority_predictions(train, test, classes)}
    reports = {name: model_scores(test, made, classes, values) for name, made in everyone.items()}
    by_trivial = trivial_score(args.images, train, test)
    headline = next(name for name in models if name != BASE)
    score = reports[headline]["balanced_accuracy"]
    metrics = {
        "summary": {
            "balanced_accuracy": statistics.metric(
                score["value"], score["n"], score["ci95"], 1 / len(classes), "chance",
                groups=reports[headline]["n_groups"], grouped_by="near-twin group", about=f"model {headline}",
                trivial=by_trivial,
                majority=reports[MAJORITY]["balanced_accuracy"]["value"],
                zero_shot=reports[BASE]["balanced_accuracy"]["value"],
                accuracy=reports[headline]["accuracy"]["value"],
            )
        },
        "headline": headline,
        "classes": list(classes),
        "data": {
            "train": counts_of(train, classes),
            "test": counts_of(test, classes),
            "groups_on_both_sides": len(set(train["group"]) & set(test["group"])),
        },
        "models": reports,
        "trivial": {"features": list(trivial.NAMES), "balanced_accuracy": by_trivial},
        "against_base": against_base(models, test, values.seed),
        "leak": leak_scores(models, test, twin, elsewhere, classes, values),
    }  # fmt: skip
    args.output_folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(args.output_folder, metrics)
    output = args.output_folder / "metrics.json"
    artefacts.write_json(output, metrics)
    for name, report in reports.items():
        one = report["balanced_accuracy"]
        step.log.info("%s: balanced accuracy %.3f %s", name, one["value"], np.round(one["ci95"], 3))
    if twin.any():
        step.log.warning("%d of %d test images have a near-twin in train", twin.sum(), len(test))
    record.write(args.meta, [output, *pictures], items=len(test))


if __name__ == "__main__":
    step.run(main)
