"""Score the answers of base, SFT and GRPO model on the test side, beside what needs no model.

Rule `vase_evaluate`. Intervals resample vases, since the questions about one vase are alike. Differences between
models are taken row by row. `metrics.json` says how many questions and vases it all rests on.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from scripts.common import artefacts, devices, plots, statistics, step, tables, trivial
from scripts.common.errors import KilnError
from scripts.common.settings import Settings
from scripts.vase import vqa_scores
from scripts.vase.reward_plugin import load_scorer
from scripts.vase.rewards import Reward
from scripts.vase.settings import CAPTION, DIMENSIONS, ClipSettings, RewardSettings, VqaEvaluateSettings
from scripts.vase.trivial_answers import majority_answers, trivial_answers
from scripts.vase.vqa_rows import VqaRow, read_rows
from scripts.vase.vqa_scores import SINGLE

BASE, SFT, GRPO = MODELS = ("base", "sft", "grpo")
GROUNDED = "technique"
PUBLISHED_ITEMS = 96  # nearly all percentages of VaseVQA-3D's table are multiples of 1/96
COLUMNS = ("model", "mode", "id", "vase", "dimension", "draw", "text", "tokens")


class EvaluateStepSettings(Settings):
    """Settings of this step."""

    evaluate: VqaEvaluateSettings = VqaEvaluateSettings()
    reward: RewardSettings = RewardSettings()
    clip: ClipSettings = ClipSettings()


def read_predictions(path: Path, rows: Sequence[VqaRow]) -> dict[tuple[str, str], pd.DataFrame]:
    """{(model, mode): table}, each with a row for each row of `rows` that the mode asks, for each draw.

    Raises:
        KilnError: a model, mode or row that is unknown, doubled, missing, or not of these test rows.
    """
    frame = tables.read_table(path, COLUMNS)
    stale = "predictions and test rows are not of one run: predict again"
    known = {row.id: row for row in rows}
    for number, one in enumerate(frame.itertuples(index=False)):
        row = known.get(one.id)
        if row is None or (row.vase, row.dimension) != (one.vase, one.dimension):
            said = "no such test row" if row is None else f"the test row is of {row.vase}, {row.dimension}"
            raise KilnError(f"{path}, row {number}: id {one.id} ({one.vase}, {one.dimension}): {said}", stale)
        if one.model not in MODELS or one.mode not in ("greedy", "shuffled", "sampled"):
            raise KilnError(f"{path}, row {number}: unknown model {one.model} or mode {one.mode}", "predict again")
        if not isinstance(one.text, str):
            raise KilnError(f"{path}, row {number}: text is {one.text!r}, expected a text", "predict again")
    doubled = frame[frame.duplicated(["model", "mode", "id", "draw"])]
    if len(doubled):
        first = doubled.iloc[0]
        raise KilnError(f"{path}: two answers of {first['model']} ({first['mode']}) to {first['id']}", "predict again")
    found = dict(list(frame.groupby(["model", "mode"], sort=True)))
    for (model, mode), part in found.items():
        wanted = {row.id for row in rows if mode != "shuffled" or row.dimension != CAPTION}
        for draw, of_draw in part.groupby("draw"):
            missing = sorted(wanted - set(of_draw["id"]))
            if missing:
                raise KilnError(
                    f"{path}: {model} ({mode}, draw {draw}) has no answer to {len(missing)} test rows, such as "
                    f"{missing[0]}",
                    stale,
                )
    models = {model for model, _ in found}
    for model in sorted(models):
        if (model, "greedy") not in found:
            raise KilnError(f"{path}: {model} has no greedy answers", "predict again")
    if SFT not in models:
        raise KilnError(f"{path}: no answers of {SFT}; it has {', '.join(sorted(models)) or 'none'}", "predict again")
    return found


class Scores:
    """All that is known of the answers, as tables in the order of `rows`."""

    def __init__(self, rows: Sequence[VqaRow], found: Mapping[tuple[str, str], pd.DataFrame], reward: Reward, scorer):
        self.rows, self.reward, self.scorer = rows, reward, scorer
        self.row = {row.id: row for row in rows}
        self.models = [name for name in MODELS if (name, "greedy") in found]
        self.answers = {key: self._answers(part) for key, part in found.items() if key[1] != "sampled"}
        self.tables = {key: self.of(one) for key, one in self.answers.items()}
        self.samples = {name: self._samples(part) for (name, mode), part in found.items() if mode == "sampled"}
        self.tokens = {name: float(found[name, "greedy"]["tokens"].mean()) for name in self.models}

    def _answers(self, part: pd.DataFrame) -> dict[str, str]:
        return {one.id: self.reward.extract(one.text) for one in part.itertuples()}

    def _samples(self, part: pd.DataFrame) -> pd.DataFrame:
        asked = [self.row[name] for name in part["id"]]
        return vqa_scores.score_samples(asked, part["text"].to_list(), self.reward, self.scorer)

    def of(self, answers: Mapping[str, str]) -> pd.DataFrame:
        """Measures of answers by id; a row without one got it wrong."""
        asked = [row for row in self.rows if row.id in answers]
        return vqa_scores.score_answers(asked, [answers[row.id] for row in asked], self.reward.settings.synonyms)

    def content_of(self, answers: Mapping[str, str]) -> float:
        """Mean content reward of answers that are written as the format asks for."""
        think = self.reward.settings.format == "think_answer"
        written = [answers.get(row.id, "") for row in self.rows]
        texts = [f"<think></think><answer>{text}</answer>" if think else text for text in written]
        return float(vqa_scores.score_samples(self.rows, texts, self.reward, self.scorer)["content"].mean())


def accuracy_of(frame: pd.DataFrame, dimension: str | None = None) -> pd.DataFrame:
    """Rows of one dimension, or of all but captions, with the id as index in order."""
    wanted = frame["dimension"] == dimension if dimension else frame["dimension"] != CAPTION
    return frame[wanted].set_index("id").sort_index()


def sampled_scores(samples: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Mean rewards of a model's samples; a row counts once, with the mean over its draws."""
    rows = vqa_scores.by_row(samples)
    means = {name: vqa_scores.entry(rows[name], rows["vase"], seed) for name in vqa_scores.REWARDS}
    parts = samples.groupby("dimension")["content"].mean()
    kinds = [name for name in (*DIMENSIONS, CAPTION) if name in parts.index]
    return {
        "prompts": len(rows),
        "vases": int(rows["vase"].nunique()),
        "completions": len(samples),
        **means,
        "content_by_dimension": {name: float(parts[name]) for name in kinds},
    }


def model_scores(scores: Scores, name: str, captions: Sequence[VqaRow], retrieval, seed: int) -> dict[str, Any]:
    """Everything that is said of one model."""
    found: dict[str, Any] = {"greedy": vqa_scores.by_dimension(scores.tables[name, "greedy"], seed)}
    found["mean_tokens"] = scores.tokens[name]
    if (name, "shuffled") in scores.tables:
        shuffled = vqa_scores.by_dimension(scores.tables[name, "shuffled"], seed)
        found["shuffled"] = {kind: {"n": one["n"], "accuracy": one["accuracy"]} for kind, one in shuffled.items()}
    if name in scores.samples:
        found["sampled"] = sampled_scores(scores.samples[name], seed)
    if retrieval is not None:
        answers = scores.answers[name, "greedy"]
        found["retrieval"] = retrieval.scores([answers[row.id] for row in captions])
    return found


def differences(scores: Scores, seed: int) -> dict[str, Any]:
    """Each model against the one before it, on the same rows."""
    found = {}
    for before, after in ((BASE, SFT), (SFT, GRPO)):
        if before not in scores.models or after not in scores.models:
            continue
        one: dict[str, Any] = {}
        a, b = (accuracy_of(scores.tables[name, "greedy"]) for name in (after, before))
        if len(a):
            one["accuracy"] = vqa_scores.difference(a["accuracy"], b["accuracy"], a["vase"], seed)
        if after in scores.samples and before in scores.samples:
            a, b = (vqa_scores.by_row(scores.samples[name]) for name in (after, before))
            one |= {
                part: vqa_scores.difference(a[part], b[part], a["vase"], seed) for part in vqa_scores.REWARDS
            }  # fmt: skip
        found[f"{after} - {before}"] = one
    return found


def summary(scores: Scores, floors: Mapping[str, Mapping[str, str]], found: Mapping[str, Any]) -> tuple[dict, dict]:
    """(headline metrics, {headline that does not exist here: why}).

    Args:
        floors: answers by id of `majority` and `trivial`.
        found: the other sections of metrics.json.
    """
    made, left_out = {}, {}
    majority, guessed = (scores.of(floors[name]) for name in ("majority", "trivial"))

    def mean(frame: pd.DataFrame, asked: pd.DataFrame, dimension: str | None = None) -> float:
        return float(accuracy_of(frame, dimension)["accuracy"].reindex(asked.index, fill_value=0.0).mean())

    def vases_of(model: str, dimension: str) -> dict[str, Any]:
        return {"groups": found["models"][model]["greedy"][dimension]["vases"], "grouped_by": "vase"}

    sft = scores.tables[SFT, "greedy"]
    one, rows = found["models"][SFT]["greedy"].get(SINGLE, {}).get("accuracy"), accuracy_of(sft)
    if one is None or one["ci95"] is None:
        left_out["sft_accuracy"] = "no questions of a single dimension about two vases or more"
    else:
        kinds = [name for name in DIMENSIONS if name in found["models"][SFT]["greedy"]]
        parts = {}
        for name in kinds:
            part, asked = found["models"][SFT]["greedy"][name]["accuracy"], accuracy_of(sft, name)
            floor = {"baseline": mean(majority, asked, name), "baseline_kind": "majority", "higher_is_better": True}
            parts[name] = {**part, **floor, **vases_of(SFT, name), "trivial": mean(guessed, asked, name)}
        made["sft_accuracy"] = statistics.metric(
            one["value"], one["n"], one["ci95"], mean(majority, rows), "majority", trivial=mean(guessed, rows),
            **vases_of(SFT, SINGLE), parted_by="dimension", parts=parts,
        )  # fmt: skip
    one, rows = found["models"][SFT]["greedy"].get(GROUNDED, {}).get("accuracy"), accuracy_of(sft, GROUNDED)
    shuffled = found["models"][SFT].get("shuffled", {}).get(GROUNDED)
    if one is None or one["ci95"] is None or shuffled is None:
        left_out["image_grounding"] = f"no questions of {GROUNDED} about two vases or more, with shuffled images too"
    else:
        made["image_grounding"] = statistics.metric(
            one["value"], one["n"], one["ci95"], shuffled["accuracy"]["value"], "shuffled_images",
            trivial=mean(guessed, rows, GROUNDED), about=GROUNDED, **vases_of(SFT, GROUNDED),
        )  # fmt: skip
    gain = found["differences"].get(f"{GRPO} - {SFT}", {}).get("content")
    if gain is None or gain["ci95"] is None:
        left_out["grpo_reward"] = "no sampled answers of sft and grpo about two vases or more"
    else:
        before, after = (found["models"][name]["sampled"]["content"] for name in (SFT, GRPO))
        made["grpo_reward"] = statistics.metric(
            after["value"], after["n"], [before["value"] + bound for bound in gain["ci95"]], before["value"],
            "before_grpo", trivial=scores.content_of(floors["trivial"]), interval_of="baseline + paired difference",
            about="content part, sampled answers", groups=found["models"][GRPO]["sampled"]["vases"], grouped_by="vase",
            completions=found["models"][GRPO]["sampled"]["completions"],
            greedy_accuracy={
                name: found["models"][name]["greedy"].get(SINGLE, {}).get("accuracy", {}).get("value")
                for name in (SFT, GRPO)
            },
        )  # fmt: skip
    gain = found["differences"].get(f"{GRPO} - {SFT}", {}).get("accuracy")
    if gain is None or gain["ci95"] is None:
        left_out["grpo_accuracy"] = "no greedy answers of sft and grpo about two vases or more"
    else:  # a reward may rise while answers get no better
        before, after = (found["models"][name]["greedy"][SINGLE]["accuracy"] for name in (SFT, GRPO))
        made["grpo_accuracy"] = statistics.metric(
            after["value"], after["n"], [before["value"] + bound for bound in gain["ci95"]], before["value"],
            "before_grpo", trivial=mean(guessed, accuracy_of(sft)), interval_of="baseline + paired difference",
            about="greedy answers", **vases_of(GRPO, SINGLE),
        )  # fmt: skip
    return made, left_out


def counts_of(rows: Sequence[VqaRow]) -> dict[str, Any]:
    """Rows, vases, and rows by dimension."""
    kinds = [row.dimension for row in rows]
    per_dimension = {name: kinds.count(name) for name in (*DIMENSIONS, CAPTION) if name in kinds}
    return {"rows": len(rows), "vases": len({row.vase for row in rows}), "per_dimension": per_dimension}


def size_of(test: Mapping[str, Any]) -> str:
    """How much the numbers rest on."""
    captions = test["per_dimension"].get(CAPTION, 0)
    return (
        f"VaseVQA-3D's published table rests on about {PUBLISHED_ITEMS} items, where one more right answer is "
        f"{100 / PUBLISHED_ITEMS:.1f} points; this one rests on {test['rows'] - captions} questions and {captions} "
        f"captions of {test['vases']} vases."
    )


def draw(path: Path, metrics: Mapping[str, Any]) -> None:
    """scores.png: accuracy by dimension and model, beside what needs no model; without questions BLEU-1 of captions."""
    everyone = {name: one["greedy"] for name, one in metrics["models"].items()}
    floors = {"majority answer": metrics["majority"]["greedy"], "trivial features": metrics["trivial"]["greedy"]}
    everyone |= floors
    asked = [kind for kind in (SINGLE, *DIMENSIONS) if any(kind in found for found in everyone.values())]
    measure = "accuracy" if asked else "bleu1"
    groups = {}
    for kind in asked or [CAPTION]:
        scored = {name: found[kind][measure] for name, found in everyone.items() if kind in found}
        if scored:
            heading = {SINGLE: "all questions", CAPTION: "captions"}.get(kind, kind)
            counts = _counts({name: one["n"] for name, one in scored.items()})
            groups[f"{heading} ({counts})"] = {name: (one["value"], one["ci95"]) for name, one in scored.items()}
    words = {"accuracy": "share of right answers", "bleu1": "BLEU-1"}[measure]
    vases = metrics["data"]["test"]["vases"]
    title = f"Greedy answers about {vases} vases of the test side"
    plots.intervals(path, groups, f"{words}, 95 % interval", title, baselines=list(floors))


def _counts(counts: Mapping[str, int]) -> str:
    """n, and which of `counts` differ from the first: trivial features leave out what they were not taught."""
    n = next(iter(counts.values()))
    return ", ".join([f"n = {n}", *(f"{name} {one}" for name, one in counts.items() if one != n)])


def caption_retrieval(args, values: EvaluateStepSettings, captions: Sequence[VqaRow]):
    """Retrieval by CLIP, or None without captions or a model."""
    if not captions or args.clip_model is None:
        return None
    from scripts.vase.caption_retrieval import CaptionRetrieval  # open_clip, which nothing else needs

    accelerator = devices.make_accelerator(args.device, values.clip.precision, step.threads(args))
    return CaptionRetrieval(
        captions, args.images, args.clip_model, values.clip, values.evaluate.retrieval_ks, values.evaluate.seed,
        accelerator,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, EvaluateStepSettings)
    step.add_device(made)
    made.add_argument("--predictions", type=Path, required=True, help="predictions.parquet of rule vase_predict")
    made.add_argument("--rows", type=Path, required=True, help="test.jsonl of rule vase_build_dataset")
    made.add_argument("--train", type=Path, required=True, help="sft_train.jsonl of rule vase_build_dataset")
    made.add_argument("--images", type=Path, required=True, help="folder of the images")
    made.add_argument("--clip-model", type=Path, help="folder of the CLIP model; without it no retrieval")
    made.add_argument("--output-folder", type=Path, required=True, help="metrics.json and scores.png")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Score what `args` name."""
    values = step.read_settings(args)
    seed = values.evaluate.seed
    inputs = {"predictions": args.predictions, "rows": args.rows, "train": args.train}
    if args.clip_model is not None:
        inputs["clip"] = args.clip_model / "open_clip_model.safetensors"
    if values.reward.plugin:
        inputs["reward plugin"] = Path(values.reward.plugin)
    record = step.record(args, "scripts.vase.evaluate", values, inputs)
    test, train = read_rows(args.rows), read_rows(args.train)
    scores = Scores(
        test, read_predictions(args.predictions, test), Reward(values.reward), load_scorer(values.reward)
    )  # fmt: skip
    frequent = majority_answers(train, values.reward.synonyms)
    floors = {
        "majority": {row.id: frequent[row.dimension] for row in test if row.dimension in frequent},
        "trivial": trivial_answers(args.images, train, test, values.reward.synonyms),
    }
    captions = [row for row in test if row.dimension == CAPTION]
    retrieval = caption_retrieval(args, values, captions)
    metrics: dict[str, Any] = {
        "data": {"test": counts_of(test), "train": counts_of(train)},
        "models": {name: model_scores(scores, name, captions, retrieval, seed) for name in scores.models},
        "differences": differences(scores, seed),
        "majority": {
            "answers": frequent,
            "greedy": vqa_scores.by_dimension(scores.of(floors["majority"]), seed),
        },
        "trivial": {
            "features": list(trivial.NAMES),
            "greedy": vqa_scores.by_dimension(scores.of(floors["trivial"]), seed),
        },
    }
    made, left_out = summary(scores, floors, metrics)
    if captions and retrieval is None:
        left_out["retrieval"] = "no --clip-model"
    metrics = {"summary": made, "left_out": left_out, "size": size_of(metrics["data"]["test"]), **metrics}
    output, picture = args.output_folder / "metrics.json", args.output_folder / "scores.png"
    draw(picture, metrics)
    artefacts.write_json(output, metrics)
    for name, one in made.items():
        step.log.info("%s %.3f, %s %.3f, n = %d", name, one["value"], one["baseline_kind"], one["baseline"], one["n"])
    for name, reason in left_out.items():
        step.log.info("%s left out: %s", name, reason)
    record.write(args.meta, [output, picture], items=len(test))


if __name__ == "__main__":
    step.run(main)
