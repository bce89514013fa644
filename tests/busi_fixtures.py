"""What the tests of the busi steps share."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from vase_fixtures import picture, run

from scripts.busi import evaluate

CLASSES = ("Normal", "Benign", "Malignant")


def chat_rows(path: Path, rows: list[tuple[str, int, str]], classes=CLASSES) -> Path:
    """A chat file as of build_conversations, from (image, label, group)."""
    lines = [
        {
            "image": image, "sha256": "0" * 64, "label": label, "group": group,
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": classes[label]}]},
            ],
        }
        for image, label, group in rows
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def predictions(rows: list[tuple[str, int, str]], skill: float, seed: int, classes=CLASSES) -> pd.DataFrame:
    """The columns of predictions.csv of a made-up model; the more skill, the more often it is right."""
    rng = np.random.default_rng(seed)
    labels = np.array([label for _, label, _ in rows])
    scores = rng.normal(size=(len(rows), len(classes))) + skill * np.eye(len(classes))[labels]
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    made = pd.DataFrame(rows, columns=["path", "label", "group"])
    for number, name in enumerate(classes):
        made[f"loglik_{name}"], made[f"tokens_{name}"], made[f"p_{name}"] = scores[:, number], 1, p[:, number]
    made["predicted"] = p.argmax(axis=1)
    made["text"] = [classes[i] for i in made["predicted"]]
    made["parsed"] = pd.array(made["predicted"], dtype="Int64")
    silent = rng.random(len(made)) < 0.1
    made.loc[silent, "text"], made.loc[silent, "parsed"] = "I cannot say.", pd.NA
    return made


def leakage(path: Path, pairs: list[tuple[str, str]], thresholds=(0.97, 0.98, 0.99)) -> Path:
    """A leakage report with the same (test, train) pairs at each threshold."""
    one = {
        "test_with_twin_in_train": len({test for test, _ in pairs}),
        "pairs": len(pairs),
        "cross_class_pairs": 0,
        "items": [{"test": test, "train": train, "similarity": 0.995} for test, train in pairs],
    }
    path.write_text(json.dumps({"thresholds": {str(t): one for t in thresholds}, "missing": [], "unlisted": []}))
    return path


class Evaluation:
    """Made-up inputs of step evaluate in a folder: 60 test images in 45 groups, three models."""

    def __init__(self, folder: Path, n_test: int = 60, n_train: int = 60, leaks: int = 0):
        self.folder, self.images, self.out = folder, folder / "images", folder / "out"
        rng = np.random.default_rng(0)
        self.rows = {}
        for side, n in (("train", n_train), ("test", n_test)):
            labels = rng.choice(3, n, p=[0.2, 0.5, 0.3])
            labels[:3] = 0, 1, 2
            names = [f"{CLASSES[label]}/{side} ({i}).png" for i, label in enumerate(labels)]
            firsts = [names[i - 1 if i % 4 == 3 else i] for i in range(n)]  # every fourth is a twin of the one before
            self.rows[side] = list(zip(names, labels.tolist(), firsts, strict=True))
            for i, name in enumerate(names):
                picture(self.images / name, seed=i)
        self.models = {
            name: predictions(self.rows["test"], skill, seed)
            for seed, (name, skill) in enumerate({"base": 0.3, "lora": 3.0, "qlora": 2.0}.items())
        }
        pairs = list(zip(self.rows["test"][:leaks], self.rows["train"][:leaks], strict=True))
        self.rows["test"][:leaks] = [(image, label, group) for (image, label, _), (_, _, group) in pairs]
        self.pairs = [(test, train) for (test, _, _), (train, _, _) in pairs]

    def run(self, models=("base", "lora", "qlora"), classes=CLASSES, **settings) -> dict:
        """Write what there is, run the step, and return metrics.json."""
        sides = {side: chat_rows(self.folder / f"{side}.jsonl", rows) for side, rows in self.rows.items()}
        given = []
        for name in models:
            table = self.folder / f"{name}.csv"
            self.models[name].to_csv(table, index=False)
            given += ["--predictions", f"{name}={table}"]
        report = leakage(self.folder / "leakage_report.json", self.pairs)
        run(
            evaluate.main, *given, "--train", sides["train"], "--test", sides["test"], "--images", self.images,
            "--leakage", report, "--classes", *classes, "--output-folder", self.out,
            "--meta", self.out / "meta.json", settings=settings,
        )  # fmt: skip
        return json.loads((self.out / "metrics.json").read_text())
