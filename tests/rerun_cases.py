"""What reruns what: the cases of the workflow tests, and the table in docs/reruns.md, which is made of them.

python tests/rerun_cases.py --write    makes the table anew
python tests/rerun_cases.py --check    fails, with a diff, when it is stale
"""

import argparse
import difflib
import sys
from collections.abc import Collection
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs/reruns.md"
BEGIN, END = "<!-- table: make config -->", "<!-- end of table -->"
NOTHING: dict[str, int] = {}


def named(pipeline: str, jobs: dict[str, int]) -> dict[str, int]:
    """Jobs of a pipeline under the names that Snakemake plans."""
    return {f"{pipeline}_{rule}": n for rule, n in jobs.items()}


# --- settings: what is set, and what is planned; of vase the rules alone --------------------------------------------

VASE_FILTER = {
    "vase_choose_threshold",
    "vase_accept_images",
    "vase_select_views",
    "vase_audit_split",
    "vase_evaluate_filter",
}
FOLLOWS = ", then the second half, if it is made"  # what a change of the first half reruns besides
VASE = [
    ("vase.classifier.workers=1 vase.classifier.save_minutes=3", set()),
    ("device=auto", set()),
    ("resources.cpu.threads=2", set()),
    ("vase.threshold.percentile=40", VASE_FILTER),
    ("vase.prompts.positive=[one]", {"vase_score_images", *VASE_FILTER}),
]

BUSI_TRAINING = {"busi_train_lora": 1, "busi_draw_curves": 1}
BUSI_AFTER_TRAINING = {"busi_merge": 1, "busi_predict": 1, "busi_evaluate": 1, "busi_describe_model": 1}
BUSI_EXECUTION = [
    ("busi.train.workers=2", NOTHING),
    ("busi.train.save_minutes=1", NOTHING),
    ("busi.predict.workers=1", NOTHING),
    ("busi.duplicates.block=64", NOTHING),
    ("resources.gpu_single.threads=2", NOTHING),
    ("busi.train.tracker=none", NOTHING),
]
BUSI = [
    ("busi.train.lr=1e-3", {**BUSI_TRAINING, **BUSI_AFTER_TRAINING}),
    ("busi.lora.rank=8", {**BUSI_TRAINING, **BUSI_AFTER_TRAINING}),
    ("busi.merge.prompts=4", BUSI_AFTER_TRAINING),
    ("busi.predict.normalisation=sum", {"busi_predict": 2, "busi_evaluate": 1, "busi_describe_model": 1}),
    ("busi.evaluate.seed=1", {"busi_evaluate": 1, "busi_describe_model": 1}),
    ("busi.variants.low.train.lr=1e-3", {**BUSI_TRAINING, **BUSI_AFTER_TRAINING}),
    ("busi.methods=[lora,qlora]", {**BUSI_TRAINING, **BUSI_AFTER_TRAINING, "busi_describe_model": 2}),
]

COCA_TRAINING = {"train": 1, "draw_curves": 1}
COCA_AFTER_TRAINING = dict.fromkeys(("encode_slides", "caption", "evaluate", "describe_model", "predict"), 1)
COCA = [
    ("coca.tokenizer.vocabulary=280", {"train_tokenizer": 1, **COCA_TRAINING, **COCA_AFTER_TRAINING}),
    ("coca.train.encoder_lr=1e-4", {**COCA_TRAINING, **COCA_AFTER_TRAINING}),
    ("coca.encode.dtype=float32", {"encode_slides": 1, "caption": 1, "evaluate": 1, "describe_model": 1}),
    ("coca.caption.max_length=9", {"caption": 1, "evaluate": 1, "describe_model": 1, "predict": 1}),
    ("coca.evaluate.ks=[1,5]", {"evaluate": 1, "describe_model": 1}),
    ("coca.predict.texts=[淋巴瘤]", {"predict": 1}),
    ("coca.variants.main.seeds=[42,7]", {**COCA_TRAINING, **COCA_AFTER_TRAINING}),
    ("coca.variants.same.train.lr=1e-3", NOTHING),
]

RAE_TRAINING = {"train_autoencoder": 1, "draw_curves": 1}
RAE_AFTER_TRAINING = {"reconstruct": 1, "evaluate": 1, "export": 1, "describe_model": 1}
RAE_SCORING = {"compute_reference_stats": 1, "reconstruct": 1, "evaluate": 1, "describe_model": 1}
RAE = [
    ("rae.evaluate.max_images=10", RAE_SCORING),
    ("rae.evaluate.workers=2 rae.autoencoder.save_minutes=1", NOTHING),
    (
        "rae.autoencoder.sample_every=0 rae.autoencoder.rfid.every_n_steps=0 rae.autoencoder.rfid.on_train=true",
        NOTHING,
    ),
    ("rae.evaluate.extractor=inception-v3-compat", RAE_SCORING),
    ("rae.autoencoder.lr=1e-3", {**RAE_TRAINING, **RAE_AFTER_TRAINING}),
    ("rae.variants.main.seeds=[42,7]", {**RAE_TRAINING, **RAE_AFTER_TRAINING}),
    ("rae.variants.same.autoencoder.lr=5e-3", NOTHING),
]

BIOMEDICA_TRAININGS = {"train_clip": 4, "draw_curves": 4}
BIOMEDICA_AFTER_TRAINING = dict.fromkeys(("evaluate", "export", "describe_model"), 1)
BIOMEDICA = [
    ("biomedica.train.lr=2e-3", {**BIOMEDICA_TRAININGS, **BIOMEDICA_AFTER_TRAINING}),
    ("biomedica.plan.epochs=3", {"plan": 2, **BIOMEDICA_TRAININGS, **BIOMEDICA_AFTER_TRAINING}),
    ("biomedica.evaluate.ks=[1,5]", {"evaluate": 1, "describe_model": 1}),
    ("biomedica.compare_seeds=[0]", {"evaluate": 1, "describe_model": 1}),
    ("biomedica.compare_seeds=[0,1,2]", {"train_clip": 2, "draw_curves": 2, "evaluate": 1, "describe_model": 1}),
    ("biomedica.variants.low.train.lr=2e-3", {**BIOMEDICA_TRAININGS, **BIOMEDICA_AFTER_TRAINING}),
    ("biomedica.variants.long.plan.epochs=3", {"plan": 2, **BIOMEDICA_TRAININGS, **BIOMEDICA_AFTER_TRAINING}),
    ("biomedica.variants.main.seeds=[0,1]", BIOMEDICA_AFTER_TRAINING),  # both are trained already, for the comparison
]

# --- code: what is edited, (file, old text, new text), and what reruns ----------------------------------------------

CODE = [
    (
        "comments, docstrings, log messages",
        [
            ("scripts/common/images.py", "import hashlib", "# a comment\nimport hashlib"),
            ("scripts/vase/clip.py", '"""The CLIP model', '"""Another text: the CLIP model'),
            ("scripts/vase/train_classifier.py", '"epoch %d/%d: %s"', '"done with epoch %d/%d: %s"'),
            ("scripts/common/training_state.py", '"resumed from %s"', '"going on from %s"'),
        ],
        set(),
    ),
    (
        "the look of pictures (scripts/common/plots.py)",
        [("scripts/common/plots.py", "DPI = 110", "DPI = 120")],
        {"vase_draw_classifier"},
    ),
    (
        "how an embedding is computed (scripts/vase/clip.py)",
        [("scripts/vase/clip.py", "embeddings.mean(0)", "embeddings.sum(0)")],
        {"vase_embed_images", "vase_score_images", *VASE_FILTER},
    ),
    (
        "how a classifier is trained (scripts/vase/classifier_training.py)",
        [("scripts/vase/classifier_training.py", "zero_grad(set_to_none=True)", "zero_grad(set_to_none=False)")],
        {"vase_train_classifier", "vase_draw_classifier", "vase_classify_images", "vase_link_classes", *VASE_FILTER},
    ),
]

# --- environments of the short run in tests/test_rerun_faults.py ----------------------------------------------------

PINS = [
    ("vlm", NOTHING),
    ("vision", {"busi_find_duplicates": 1, "busi_split": 1}),
    ("tables", {"busi_list_images": 1, "busi_find_duplicates": 1, "busi_split": 1}),
]

# --- what happens to results from outside, what then, and the test that shows it, of tests/test_rerun_faults.py ------

FAULTS = [
    (
        "a second run starts in the same results folder, from another working directory",
        "it stops before any job and names who holds the folder: user, host, pid, since when",
        "test_a_second_run_in_one_results_folder_stops_and_names_the_first",
    ),
    (
        "another user runs in a results folder after you",
        "nothing, for either: the records lie with the results",
        "test_a_second_users_older_records_give_way",
    ),
    (
        "a result that a job would read is edited by hand",
        "no job starts; the file, what was expected and what to delete are named",
        "test_a_manifest_edited_by_hand_is_not_used",
    ),
    (
        "a result is deleted",
        "nothing as long as nobody needs it, then the rule that makes it",
        "test_once_deleted_it_is_made_anew_for_who_needs_it",
    ),
    (
        "the clock jumps back",
        "nothing: results that lie in the future get the present time when a run starts",
        "test_results_from_the_future_make_nothing_look_old",
    ),
    (
        "the results are copied elsewhere, with other times, with or without `.snakemake`",
        "nothing; later changes rerun what they would have",
        "test_a_copy_with_other_times_reruns_nothing_and_later_what_it_should",
    ),
    (
        "the table of shards is lost or damaged",
        "nothing: it is made anew from the tables of the shards",
        "test_reuse.py::test_a_lost_table_is_made_from_those_of_the_shards",
    ),
    (
        "the results folder gets another name",
        "nothing",
        "test_results_under_another_name_are_known_too",
    ),
    (
        "a copy is not whole",
        "no job starts; the files are named",
        "test_a_copy_that_is_not_whole_stops",
    ),
    (
        "the Python interpreter or virtual environment lies elsewhere, or is of another minor version",
        "nothing",
        "test_another_interpreter_reruns_nothing",
    ),
    (
        "conda is switched on or off, or its environments move",
        "nothing",
        "test_conda_is_switched_on_and_nothing_reruns",
    ),
]


def table() -> str:
    """The table of the page: what is changed, and what reruns."""
    rows = [("You change", "What reruns")]
    for pipeline, cases in (("vase", VASE), ("busi", BUSI_EXECUTION + BUSI), ("coca", COCA), ("rae", RAE),
                            ("biomedica", BIOMEDICA)):  # fmt: skip
        more = FOLLOWS if pipeline == "vase" else ""
        rows += [(f"`{override}`", _rules(jobs, pipeline) + (more if jobs else "")) for override, jobs in cases]
    rows += [(what, _rules(jobs)) for what, _, jobs in CODE]
    rows += [(f"a package's version in `envs/{family}.yaml`", _of_short_run(jobs)) for family, jobs in PINS]
    rows += [(what, then) for what, then, _ in FAULTS]
    lines = [f"| {left} | {right} |" for left, right in rows]
    return "\n".join([lines[0], "|---|---|", *lines[1:]])


def _rules(jobs: Collection[str], pipeline: str = "") -> str:
    full = [name if not pipeline or name.startswith(f"{pipeline}_") else f"{pipeline}_{name}" for name in sorted(jobs)]
    return ", ".join(f"`{name}`" for name in full) or "nothing"


def _of_short_run(jobs: Collection[str]) -> str:
    return f"the rules that name it and what follows: in a run of `busi` up to its split, {_rules(jobs)}"


def page(text: str) -> str:
    """The page with its table as it should be.

    Raises:
        ValueError: the marks of the table are not in the page.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE}: {BEGIN} and {END} are not there")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def stale() -> str:
    """How the page differs from what it should be; empty if it does not."""
    have = PAGE.read_text(encoding="utf-8")
    lines = (text.splitlines(keepends=True) for text in (have, page(have)))
    return "".join(difflib.unified_diff(*lines, "docs/reruns.md", "docs/reruns.md (expected)"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true")
    action.add_argument("--check", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    elif difference := stale():
        sys.exit(f"{difference}\nHint: make config")


if __name__ == "__main__":
    main()
