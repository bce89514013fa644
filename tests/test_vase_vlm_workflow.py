"""The second half through Snakemake: what a run of the paper's size plans, and what is left out by configuration."""

import json
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
    )  # fmt: skip
    expected = {f"vase_{name}": 1 for name in once}
    expected |= {f"vase_{name}": shards for name in ("inspect_images", "classify_images", "embed_images")}
    models = {"retrieve_model": 3}  # ResNet50, CLIP, Qwen2.5-VL-7B
    assert jobs == expected | models
    # all weights are trained by GRPO as published, so nothing is merged after it
    assert "vase_merge_grpo" not in jobs


def test_what_is_merged_and_exported_follows_from_the_configuration(paper):
    jobs = workflow.planned(*paper, "vase", "--config", "set=vase.grpo.tuner.tuner=lora vase.megatron.export=true")
    assert jobs["vase_merge_sft"] == jobs["vase_merge_grpo"] == jobs["vase_export_megatron"] == 1
    jobs = workflow.planned(*paper, "vase", "--config", "set=vase.sft.tuner.tuner=full")
    assert "vase_merge_sft" not in jobs and "vase_merge_grpo" not in jobs and jobs["vase_train_grpo"] == 1


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
