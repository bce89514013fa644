"""The check before GRPO: what it samples, what it writes, and when it refuses to train."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from vase_fixtures import command_line, error_of, picture
from vlm_fixtures import tiny_base

from scripts.common.errors import KilnError
from scripts.vase import check_reward, generation
from scripts.vase.settings import GrpoSettings, RewardSettings
from scripts.vase.vqa_rows import VqaRow, read_rows

GROUP = {"generations": 4, "batch_size": 4, "accumulation": 1, "max_completion_length": 6}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A tiny model, and rows as GRPO's: without an assistant's turn."""
    root = tmp_path_factory.mktemp("check reward")
    tiny_base(root / "model")
    lines = []
    for number in range(6):
        picture(root / "images" / f"{number}.png", number, 84)
        row = {
            "id": f"v{number}-shape", "vase": f"v{number}", "dimension": "shape", "reference": "kylix", "facts": "",
            "messages": [{"role": "user", "content": "<image>What shape?"}], "images": [f"{number}.png"],
        }  # fmt: skip
        lines.append(json.dumps(row) + "\n")
    (root / "grpo_train.jsonl").write_text("".join(lines))
    (root / "prompt.txt").write_text("Be brief.\n")
    return root


def plugin(folder: Path, value: str) -> str:
    path = folder / "plugin.py"
    path.write_text(f"def external_vase_acc(responses, references):\n    return [{value} for text in responses]\n")
    return str(path)


def arguments(data: Path, out: Path, grpo=None, **reward) -> list[str]:
    values = {"grpo": {**GROUP, **(grpo or {})}, "reward": {"format": "plain", "check_prompts": 5, **reward}}
    return [
        "--model", str(data / "model"), "--rows", str(data / "grpo_train.jsonl"), "--images", str(data / "images"),
        "--output", str(out / "reward_check.json"), "--meta", str(out / "meta.json"), "--threads", "1", "--device",
        "cpu", "--settings", json.dumps(values),
    ]  # fmt: skip


def test_a_reward_that_varies_passes_and_its_distribution_is_written(data, tmp_path):
    reward = plugin(tmp_path, "len(text) / 10")
    check_reward.main(arguments(data, tmp_path, plugin=reward, format_weight=0))
    made = json.loads((tmp_path / "reward_check.json").read_text())
    assert (made["prompts"], made["generations"]) == (5, 4)
    groups = made["groups"]
    assert all(len(group["completions"]) == len(group["rewards"]) == 4 for group in groups)
    values = np.array([[len(text) / 10 for text in group["completions"]] for group in groups])
    assert values == pytest.approx(np.array([group["rewards"] for group in groups]))
    assert made["sum"]["mean"] == pytest.approx(values.mean())
    assert made["sum"]["std"] == pytest.approx(values.std())
    assert made["sum"]["groups_with_variance"] == np.mean([len(set(row)) > 1 for row in values.tolist()]) > 0
    assert made["sum"]["mean_std_within_groups"] == pytest.approx(np.mean([row.std() for row in values]))
    assert made["sum"]["quantiles"]["0.5"] == pytest.approx(np.median(values))
    assert [group["mean"] for group in groups] == pytest.approx(list(values.mean(1)))
    assert made["content"] == made["sum"]
    assert json.loads((tmp_path / "meta.json").read_text())["inputs"].keys() >= {"rows", "reward plugin"}


def test_a_reward_without_variance_is_refused_with_its_distribution(data, tmp_path):
    done = command_line("check_reward", *arguments(data, tmp_path, plugin=plugin(tmp_path, "0.25"), format_weight=0))
    said = error_of(done)
    assert "none of 5 groups of 4 completions has any variance" in said
    assert "0 %: 0.250, 10 %: 0.250" in said
    assert "content mean 0.250, std 0.000" in said
    assert "means of the groups: 0.250, 0.250, 0.250, 0.250, 0.250" in said
    assert "(shape, right: 'kylix') got" in said
    assert "generations" in said.split("Hint: ")[1]
    assert not (tmp_path / "reward_check.json").exists()


def test_the_format_part_alone_may_vary():
    rows = [VqaRow(str(n), "v", "shape", (), ("a.png",), "kylix", "") for n in range(2)]
    good = "<think>It is a cup.</think>\n<answer>zzzz</answer>"
    texts = [[good, "zzzz"], ["zzzz", "zzzz"]]
    made = {}
    for weight in (0.5, 0.0):
        found = check_reward.score(rows, texts, RewardSettings(format_weight=weight, penalty=0))
        made[weight] = check_reward.report(rows, texts, found)
        assert found["sum"] == pytest.approx(found["content"] + weight * found["format"])
    check_reward.require_variance(made[0.5])
    assert made[0.5]["sum"]["groups_with_variance"] == 0.5
    assert made[0.5]["format"]["groups_with_variance"] == 0.5
    with pytest.raises(KilnError, match="none of 2 groups of 2"):
        check_reward.require_variance(made[0.0])


def test_groups_that_differ_from_each_other_only_do_not_vary():
    rows = [VqaRow(str(n), "v", "shape", (), ("a.png",), word, "") for n, word in enumerate(["kylix", "amphora"])]
    texts = [["kylix"] * 3, ["kylix"] * 3]
    made = check_reward.report(rows, texts, check_reward.score(rows, texts, RewardSettings(format="plain")))
    assert made["sum"]["std"] > 0
    with pytest.raises(KilnError, match="none of 2 groups"):
        check_reward.require_variance(made)


def test_prompts_are_drawn_by_seed_whatever_the_order(data):
    rows = read_rows(data / "grpo_train.jsonl")
    one = check_reward.chosen(rows, 3, 0)
    assert len({row.id for row in one}) == 3
    assert one == check_reward.chosen(rows[::-1], 3, 0)
    assert any(one != check_reward.chosen(rows, 3, seed) for seed in range(1, 5))
    assert sorted(row.id for row in check_reward.chosen(rows, 99, 0)) == [row.id for row in rows]


def test_it_samples_as_grpo_will(data, monkeypatch):
    calls = []
    real = generation.generate
    monkeypatch.setattr(generation, "generate", lambda *a, **k: calls.append((a, k)) or real(*a, **k))
    model, processor = generation.load(data / "model", torch.device("cpu"), torch.float32, 10**6)
    rows = read_rows(data / "grpo_train.jsonl")
    values = GrpoSettings(**GROUP, temperature=0.7, top_k=-1)
    texts = check_reward.sample(model, processor, data / "images", rows, values, "Be brief.")
    assert len(calls) == 4
    assert len({k["seed"] for _, k in calls}) == 4
    for _, one in calls:
        assert one["sampling"] == (0.7, 1.0, -1)
        assert (one["max_new_tokens"], one["system"]) == (6, "Be brief.")
    assert any(len(set(group)) > 1 for group in texts)
    assert texts == check_reward.sample(model, processor, data / "images", rows, values, "Be brief.")


def test_a_reward_that_is_no_number_is_named(data, tmp_path):
    with pytest.raises(KilnError, match="nan|finite"):
        check_reward.main(arguments(data, tmp_path, plugin=plugin(tmp_path, "float('nan')")))


def test_the_system_prompt_is_an_input(data, tmp_path):
    extra = ["--system", str(data / "prompt.txt")]
    check_reward.main(arguments(data, tmp_path, plugin=plugin(tmp_path, "len(text)")) + extra)
    assert "system" in json.loads((tmp_path / "meta.json").read_text())["inputs"]
    with pytest.raises(KilnError, match="no such file"):
        check_reward.main(arguments(data, tmp_path) + ["--system", str(data / "none.txt")])
