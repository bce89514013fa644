"""The second half through Snakemake: what a run of the paper's size plans, and what is left out by configuration."""

import json
import re
from pathlib import Path

import pytest
import workflow
import yaml

pytestmark = pytest.mark.slow
VASES, VIEWS = 664, 46  # the paper: more than 30,000 raw pictures, 664 vases, 4,460 questions
QUESTIONS = 4460
FILES = ("config.json", "tokenizer.json", "preprocessor_config.json")


@pytest.fixture(scope="module")
def paper(tmp_path_factory) -> tuple[Path, Path]:
    """A checkout, and a run folder with empty files in place of pictures and weights."""
    base = tmp_path_factory.mktemp("paper")
    checkout, run = workflow.copy_checkout(base / "checkout"), base / "run"
    raw = run / "data/raw"
    raw.mkdir(parents=True)
    for vase in range(VASES):
        for view in range(1, VIEWS + 1):
            (raw / f"{vase:08X}_{view}_ac001001.jpg").touch()
    for label in "01":
        (run / "data/labelled" / label).mkdir(parents=True)
        (run / "data/labelled" / label / f"{label}.jpg").touch()
    rows = [
        {"vase": f"{i % VASES:08X}", "question": "q", "answer": "a", "dimension": "shape"} for i in range(QUESTIONS)
    ]
    (run / "data/questions.json").write_text(json.dumps(rows))
    settings = {
        "vase": {
            "images": "data/raw",
            "labelled": "data/labelled",
            "dataset": {"questions": "data/questions.json"},
        }
    }
    (run / "config").mkdir()
    (run / "config/config.yaml").write_text(yaml.safe_dump(settings))
    return checkout, run


def test_a_run_of_the_papers_size_is_planned_with_the_published_values(paper):
    jobs = workflow.planned(*paper, "vase")
    shards = -(-VASES * VIEWS // 4096)
    assert VASES * VIEWS > 30_000 and shards == 8
    once = (
        "build_dataset", "estimate_memory", "train_sft", "merge_sft", "check_reward", "train_grpo", "predict",
        "evaluate", "describe_model", "list_images", "list_labelled", "split", "split_labelled", "train_classifier",
        "link_classes", "score_images", "choose_threshold", "accept_images", "select_views", "audit_split",
        "draw_classifier",
    )  # fmt: skip
    expected = {f"vase_{name}": 1 for name in once}
    expected |= {f"vase_{name}": shards for name in ("inspect_images", "classify_images", "embed_images")}
    expected["vase_draw_curves"] = 2  # of SFT and of GRPO
    models = {"retrieve_model": 3}  # ResNet50, CLIP, Qwen2.5-VL-7B
    assert jobs == expected | models
    # all weights are trained by GRPO as published, so nothing is merged after it
    assert "vase_merge_grpo" not in jobs


def test_what_is_merged_and_exported_follows_from_the_configuration(paper):
    jobs = workflow.planned(*paper, "vase", "--config", "set=vase.grpo.tuner.tuner=lora vase.megatron.export=true")
    assert jobs["vase_merge_sft"] == jobs["vase_merge_grpo"] == jobs["vase_export_megatron"] == 1
    jobs = workflow.planned(*paper, "vase", "--config", "set=vase.sft.tuner.tuner=full")
    assert "vase_merge_sft" not in jobs and "vase_merge_grpo" not in jobs and jobs["vase_train_grpo"] == 1


FROM_CLASSIFIER = (
    "train_classifier", "classify_images", "link_classes", "choose_threshold", "accept_images", "select_views",
    "audit_split", "build_dataset", "draw_classifier",
)  # fmt: skip
FROM_SFT = ("train_sft", "merge_sft")
FROM_GRPO = ("estimate_memory", "check_reward", "train_grpo", "predict", "evaluate", "describe_model")


def test_a_variant_is_made_anew_from_its_first_change_on(paper):
    """One variant of each training, and one of what decides no number."""
    changes = "low.grpo.lr=1e-7", "slow.sft.lr=1e-5", "other.classifier.lr=1e-4", "same.grpo.workers=3"
    once = workflow.planned(*paper, "vase")
    jobs = workflow.planned(*paper, "vase", "--config", "set=" + " ".join(f"vase.variants.{one}" for one in changes))
    runs = dict.fromkeys(FROM_CLASSIFIER, 2) | dict.fromkeys(FROM_SFT, 3) | dict.fromkeys(FROM_GRPO, 4)
    expected = {rule: n * runs.get(rule.removeprefix("vase_"), 1) for rule, n in once.items()}
    assert jobs == expected | {"vase_draw_curves": runs["train_sft"] + runs["train_grpo"]}
    assert {f"vase_{name}" for name in runs} <= set(jobs)


def commands(paper: tuple[Path, Path], *variants: str) -> dict[tuple[str, str], str]:
    """{(step, run): its command line} of what a dry run plans."""
    override = "set=" + " ".join(f"vase.variants.{one}" for one in variants)
    done = workflow.run(*paper, "vase", "--dry-run", "--printshellcmds", "--config", override)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if " -m scripts." in line and "--meta" in line]
    found = {}
    for line in lines:
        step = re.findall(r" scripts\.vase\.(\w+) ", line)
        meta = re.search(r"--meta \S*results/vase/(\w+)/(\w+)/meta.json", line)
        if step and meta:
            found[meta[1], meta[2]] = line
    return found


def test_a_run_takes_the_models_of_its_own_tuners_and_what_serves_it(paper):
    found = commands(paper, "all.sft.tuner.tuner=full", "small.grpo.tuner.tuner=lora")
    results = "results/vase"
    assert f"--model {results}/merge_sft/main/model " in found["train_grpo", "main"]
    assert f"--model {results}/merge_sft/main/model " in found["train_grpo", "small"]
    assert f"--model {results}/train_sft/all/best " in found["train_grpo", "all"]
    assert f"--base {results}/merge_sft/main/model " in found["merge_grpo", "small"]
    assert f"--model grpo={results}/merge_grpo/small/model " in found["predict", "small"]
    assert f"--model grpo={results}/train_grpo/all/last " in found["predict", "all"]
    assert "--parity" in found["describe_model", "small"] and "--parity" not in found["describe_model", "all"]
    assert ("merge_sft", "small") not in found and ("merge_sft", "all") not in found
    rows = f"{results}/build_dataset/main/test.jsonl"
    assert all(f"--rows {rows} " in found["predict", name] for name in ("main", "all", "small"))
    for training in ("train_sft", "train_grpo"):
        assert f"--state-folder results/state/vase/{training}/all " in found[training, "all"]


def test_all_runs_are_scored_by_one_reward_each_in_its_own_format(paper):
    found = commands(paper, "shaped.reward.bonus=0.37", "plain.reward.format=plain")
    assert '"bonus":0.37' in found["train_grpo", "shaped"] and '"bonus":0.37' in found["check_reward", "shaped"]
    assert '"bonus":0.1' in found["evaluate", "shaped"] and '"bonus":0.37' not in found["evaluate", "shaped"]
    assert '"format":"plain"' in found["evaluate", "plain"] and '"format":"think_answer"' in found["evaluate", "main"]
    for step in ("check_reward", "train_grpo", "predict"):
        assert "think_answer.txt" in found[step, "main"] and "--system" not in found[step, "plain"]


def test_without_questions_only_the_first_half_is_built_by_default(paper):
    jobs = workflow.planned(*paper, "vase_images")
    assert "vase_train_sft" not in jobs


def test_a_flag_of_an_older_ms_swift_stops_before_any_job(paper):
    done = workflow.run(
        *paper, "--dry-run", "vase", "--config", "set=vase.sft.extra_args=[--train_type,lora]", check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode and "--tuner_type" in said and "Hint:" in said
    assert "Job stats" not in said
