"""What the tests of the busi steps share."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from vase_fixtures import picture, run

from scripts.busi import evaluate, find_duplicates, list_images, split

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


def scan(path: Path, seed: int, like: Path | None = None, correlation: float = 1.0) -> Path:
    """A grey picture of 64x64 pixels, so that it is its own thumbnail; or one that correlates with `like` just so."""
    rng = np.random.default_rng(seed)
    made = np.kron(rng.normal(size=(8, 8)), np.ones((8, 8)))
    if like is not None:
        old = np.asarray(Image.open(like).convert("L"), float)
        old, noise = old - old.mean(), rng.normal(size=(64, 64))
        noise -= noise.mean() + old * (noise * old).sum() / (old**2).sum()
        made = correlation * old / old.std() + np.sqrt(1 - correlation**2) * noise / noise.std()
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(np.rint(128 + 28 * (made - made.mean()) / made.std()), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def published(path: Path, rows: list[tuple[str, int]], classes=CLASSES, text: str = "Which?") -> Path:
    """A split as others publish it, from (image, label), in the form that the file's ending says."""
    made = [{"image": image, "text": text, "answer": classes[label], "label": label} for image, label in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        pd.DataFrame(made).to_csv(path, index=False)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in made)
        path.write_text(json.dumps(made) if path.suffix == ".json" else lines, encoding="utf-8")
    return path


class Scans:
    """A folder of drawn scans in class folders of odd letter case, listed, searched for duplicates and split.

    In each class 15 images are unlike; `normal (20)` and `(21)`, `benign (20)` to `(22)` are near-twins, `benign (30)`
    has the pixels of `benign (1)` in other bytes, `malignant (40)` those of `normal (5)`. There are masks beside some.
    """

    folders = ("Normal", "benign", "MALIGNANT")

    def __init__(self, folder: Path):
        self.folder, self.images = folder, folder / "images"
        for label, name in enumerate(self.folders):
            for i in range(1, 16):
                scan(self.path(label, i), seed=100 * label + i)
            picture(self.images / name / f"{name.lower()} (1)_mask.png", seed=label)
        for label, i, like, correlation in ((0, 21, 20, 0.985), (1, 21, 20, 0.99), (1, 22, 21, 0.99)):
            if like == 20:
                scan(self.path(label, 20), seed=100 * label + 20)
            scan(self.path(label, i), 1000 + i, self.path(label, like), correlation)
        for copy, source in ((self.path(1, 30), self.path(1, 1)), (self.path(2, 40), self.path(0, 5))):
            Image.open(source).convert("RGB").save(copy)
        self.manifest, self.groups = folder / "list/manifest.parquet", folder / "find/groups.parquet"
        self.splits = folder / "split/splits.csv"
        out = ("--output-folder", folder / "list", "--meta", folder / "list/meta.json")
        run(list_images.main, "--images", self.images, *out)
        out = ("--output-folder", folder / "find", "--meta", folder / "find/meta.json")
        given = ("--images", self.images, "--manifest", self.manifest, "--classes", *CLASSES)
        run(find_duplicates.main, *given, *out)
        out = ("--output-folder", folder / "split", "--meta", folder / "split/meta.json")
        run(split.main, "--groups", self.groups, "--classes", *CLASSES, *out)

    def path(self, label: int, number: int) -> Path:
        name = self.folders[label]
        return self.images / name / f"{name.lower()} ({number}).png"

    def rows(self) -> list[tuple[str, int]]:
        """(path, label) of every image, sorted by path."""
        frame = pd.read_parquet(self.manifest)
        return list(zip(frame["path"], frame["label"].tolist(), strict=True))

    def thumbnails(self, paths) -> np.ndarray:
        """float [n, 4096], read by Pillow alone."""
        return np.stack([np.asarray(Image.open(self.images / p).convert("L"), float).ravel() for p in paths])
