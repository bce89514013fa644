"""Rows of questions, prompts with pictures, generation in batches, other vases' pictures, and the step that resumes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vase_fixtures import ROOT, files_below, picture
from vlm_fixtures import tiny_base

from scripts.common import tiny_vlm, vlm
from scripts.common.errors import KilnError
from scripts.vase import generation, predict
from scripts.vase.settings import CAPTION, DIMENSIONS
from scripts.vase.shuffled_images import with_other_images
from scripts.vase.vqa_rows import VqaRow, read_rows

CPU = torch.device("cpu")
WORDS = "What technique? black-figure red-figure What shape? amphora kylix Describe the vase. fabric Athenian"
VASES = ["A-1", "B-2", "C-3", "D-4", "E-5"]


def entry(number: int, vase: str, dimension: str, question: str, answer: str, images: list[str]) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {
        "id": f"{vase}/{dimension}/{number}", "vase": vase, "dimension": dimension, "messages": messages,
        "images": images, "reference": answer, "facts": "",
    }  # fmt: skip


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two tiny models, pictures, and rows of one and of two pictures, of one turn and of two."""
    root = tmp_path_factory.mktemp("vase predict")
    tiny_base(root / "base")
    tiny_vlm.build(root / "sft", [WORDS] * 3, seed=5)
    rows = []
    for number, vase in enumerate(VASES):
        views = [f"{vase}/front.png", f"{vase}/back view.png"]
        for view, name in enumerate(views):
            picture(root / "images" / name, 10 * number + view, 112)
        rows.append(entry(0, vase, "technique", "<image>What technique?", "red-figure", views[:1]))
        rows.append(entry(0, vase, "shape", "<image>What shape?", "kylix", views[1:]))
        rows.append(entry(0, vase, CAPTION, "<image><image>Describe the vase.", "red-figure kylix", views))
    rows[3]["messages"][:0] = [
        {"role": "user", "content": "<image>What is it?"},
        {"role": "assistant", "content": "a vase"},
    ]
    rows[3]["messages"][2]["content"] = "What technique?"
    write_rows(root / "test.jsonl", rows)
    (root / "prompt.txt").write_text("Answer shortly.\n")
    return root


@pytest.fixture(scope="module")
def loaded(data):
    return *generation.load(data / "sft", CPU, torch.float32, 1_003_520), read_rows(data / "test.jsonl")


# rows


def test_rows_are_read_up_to_the_turn_that_is_to_be_answered(data):
    rows = read_rows(data / "test.jsonl")
    assert len(rows) == 15
    assert rows[0] == VqaRow(
        "A-1/technique/0", "A-1", "technique", (("user", "<image>What technique?"),), ("A-1/front.png",),
        "red-figure", "",
    )  # fmt: skip
    assert [role for role, _ in rows[3].turns] == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dimension": "colour"}, "dimension 'colour' is unknown; these are fabric"),
        ({"images": ["a.png", "b.png"]}, "2 images, but 1 <image>"),
        ({"images": []}, "expected at least one path"),
        ({"images": ["../a.png"]}, "not inside the images folder"),
        ({"reference": " "}, "reference is ' '"),
        ({"vase": 7}, "vase is 7"),
        ({"facts": "{"}, "which is not JSON"),
        ({"facts": '{"colour": "red"}'}, "'colour' is no dimension"),
        ({"messages": []}, "roles none"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "roles user, user"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages must be a list"),
        ({"id": "A-1/shape/0"}, "stands in line 1 already"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, change, said):
    good = entry(0, "A-1", "shape", "<image>What shape?", "kylix", ["a.png"])
    path = write_rows(tmp_path / "rows.jsonl", [good, {**good, "id": "other", **change}])
    with pytest.raises(KilnError) as caught:
        read_rows(path)
    assert caught.value.message.startswith(f"{path}, line 2: ")
    assert said in caught.value.message


def test_other_bad_files_of_rows(tmp_path):
    with pytest.raises(KilnError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(KilnError, match="no rows"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(KilnError, match="line 1: no key 'vase'"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("[]\n")
    with pytest.raises(KilnError, match="line 1: expected an object"):
        read_rows(tmp_path / "rows.jsonl")


# other vases' pictures


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(DIMENSIONS[:2])), min_size=2, max_size=25), st.integers())
@settings(max_examples=200, deadline=None)
def test_no_row_ever_sees_its_own_vase(drawn, seed):
    rows = [
        VqaRow(str(n), f"v{vase}", dimension, (), (f"v{vase}/{dimension}/{n}.png",), "x", "")
        for n, (vase, dimension) in enumerate(drawn)
    ]
    if len({row.vase for row in rows}) == 1:
        with pytest.raises(KilnError, match="no other vase than"):
            with_other_images(rows, seed)
        return
    made = with_other_images(rows, seed)
    assert [row.id for row in made] == [row.id for row in rows]
    for row in made:
        vase, dimension, _ = row.images[0].split("/")
        assert vase != row.vase
        group = [one for one in rows if one.dimension == row.dimension]
        assert dimension == row.dimension or {one.vase for one in group} == {row.vase}
    assert made == with_other_images(rows, seed)
    assert made == sorted(with_other_images(rows[::-1], seed), key=lambda row: int(row.id))
    for dimension in DIMENSIONS[:2]:
        group = [row for row in rows if row.dimension == dimension]
        most = max([[row.vase for row in group].count(row.vase) for row in group], default=0)
        if 2 * most <= len(group):  # a permutation: each picture once
            used = [row.images for row in made if row.dimension == dimension]
            assert sorted(used) == sorted(row.images for row in group)


def test_the_seed_changes_who_lends_the_picture():
    rows = [VqaRow(str(n), f"v{n}", "shape", (), (f"{n}.png",), "x", "") for n in range(20)]
    assert with_other_images(rows, 0) != with_other_images(rows, 1)


def test_a_donor_of_fewer_pictures_lends_them_twice():
    rows = [
        VqaRow("a", "va", "shape", (), ("a1.png", "a2.png", "a3.png"), "x", ""),
        VqaRow("b", "vb", "shape", (), ("b1.png",), "x", ""),
    ]
    assert [row.images for row in with_other_images(rows, 0)] == [("b1.png",) * 3, ("a1.png",)]


def test_a_picture_that_compares_two_vases_is_lent_to_neither():
    pictures = {"a": ("both.png",), "b": ("both.png",), "c": ("c.png",), "d": ("d.png",)}
    rows = [VqaRow(name, f"v{name}", "shape", (), images, "x", "") for name, images in pictures.items()]
    for seed in range(20):
        made = {row.id: row.images for row in with_other_images(rows, seed)}
        assert all(made[name] != images for name, images in pictures.items())


# prompts and generation


def test_prompts_follow_the_chat_template(loaded, data):
    model, processor, rows = loaded
    batch = generation.encode(processor, data / "images", [rows[2], rows[3]], "Be brief.", model.config)
    assert (batch["attention_mask"].diff(dim=1) >= 0).all()  # padding is on the left
    texts = processor.tokenizer.batch_decode(batch["input_ids"])
    picture_ = "<|vision_start|>" + "<|image_pad|>" * 9 + "<|vision_end|>"
    start = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    assert texts[0].endswith(start + picture_ * 2 + "Describe the vase." + end)
    assert texts[1].endswith(
        start + picture_ + "What is it?" + end + "a vase<|im_end|>\n<|im_start|>user\nWhat technique?" + end
    )
    assert batch["image_grid_thw"].tolist() == [[1, 6, 6]] * 3
    plain = generation.encode(processor, data / "images", [rows[0]], None, model.config)
    assert "You are a helpful assistant." in processor.tokenizer.decode(plain["input_ids"][0])


def test_a_rows_own_system_prompt_stays():
    row = VqaRow("a", "v", "shape", (("system", "Own."), ("user", "<image>What?")), ("a.png",), "x", "")
    assert generation.chat_of(row, "Other.")[0] == {"role": "system", "content": "Own."}


def test_pictures_are_made_smaller_but_never_larger(data):
    for most, side in ((56 * 56, 4), (10**6, 6)):
        _, processor = generation.load(data / "sft", CPU, torch.float32, most)
        row = read_rows(data / "test.jsonl")[0]
        batch = generation.encode(
            processor, data / "images", [row], None, vlm.family("qwen").load_model(data / "sft").config
        )
        assert batch["image_grid_thw"].tolist() == [[1, side, side]]


def test_a_batch_answers_as_each_row_alone(loaded, data):
    model, processor, rows = loaded
    for system in (None, "Answer shortly."):
        together = generation.generate(model, processor, data / "images", rows, max_new_tokens=8, system=system)
        alone = [
            generation.generate(model, processor, data / "images", [row], max_new_tokens=8, system=system)[0]
            for row in rows
        ]
        assert together == alone
    assert len({one.text for one in together}) > 1
    assert all(1 <= one.tokens <= 8 for one in together)


def test_greedy_is_the_likeliest_token_whatever_the_stored_configuration_says(loaded, data):
    model, processor, rows = loaded
    batch = generation.encode(processor, data / "images", [rows[0]], None, model.config)
    forbidden = torch.tensor(model.generation_config.suppress_tokens)
    made: list[int] = []
    for _ in range(5):
        with torch.no_grad():
            logits = model(**batch).logits[0, -1]
        logits[forbidden] = -torch.inf
        token = logits.argmax().view(1, 1)
        made.append(int(token))
        if made[-1] in model.generation_config.eos_token_id:
            break
        for name, new in (("input_ids", token), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            batch[name] = torch.cat([batch[name], torch.as_tensor(new).view(1, 1)], 1)
    expected = processor.tokenizer.decode(made, skip_special_tokens=True).strip(), len(made)
    stored = model.generation_config
    for name, value in {"temperature": 0.1, "top_k": 1, "repetition_penalty": 5.0, "min_new_tokens": 7}.items():
        setattr(stored, name, value)
        try:
            found = generation.generate(model, processor, data / "images", rows[:1], max_new_tokens=5)
        finally:
            setattr(stored, name, 1.0 if name == "temperature" else None)
        assert tuple(found[0]) == expected
    assert model.generation_config is stored


def test_tokens_are_counted_up_to_the_end_token(loaded):
    tokenizer = loaded[1].tokenizer
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert generation._answer([40, 41, end, pad, pad], [end, pad], tokenizer).tokens == 3
    assert generation._answer([40, 41], [end], tokenizer).tokens == 2


def test_samples_are_drawn_from_the_models_own_distribution(loaded, data):
    """Also where the stored configuration would keep to the likeliest tokens."""
    model, processor, rows = loaded
    batch = generation.encode(processor, data / "images", [rows[0]], None, model.config)
    with torch.no_grad():
        logits = model(**batch).logits[0, -1].double()
    logits[torch.tensor(model.generation_config.suppress_tokens)] = -torch.inf
    likely = logits.softmax(0)
    count = 1500
    many = [rows[0]] * 50
    model.generation_config.top_k = 1
    drawn = []
    for seed in range(count // 50):
        real = model.generate

        def first_tokens(real=real, **kwargs):
            made = real(**kwargs)
            drawn.extend(made[:, -1].tolist())
            return made

        model.generate = first_tokens
        generation.generate(
            model, processor, data / "images", many, max_new_tokens=1, sampling=generation.Sampling(), seed=seed
        )
        del model.generate
    model.generation_config.top_k = None
    found = torch.bincount(torch.tensor(drawn), minlength=len(likely)) / count
    assert not found[torch.tensor(model.generation_config.suppress_tokens)].any()
    distance = (found - likely).abs().sum() / 2
    # what as many independent draws give, plus four standard deviations of it
    expected = (2 * likely * (1 - likely) / torch.pi / count).sqrt().sum() / 2
    assert distance < expected + 4 / (2 * count**0.5)
    assert (found > 0).sum() > 20


def test_a_seed_gives_the_same_samples_and_leaves_torchs_own_state(loaded, data):
    model, processor, rows = loaded

    def drawn(seed):
        return generation.generate(
            model, processor, data / "images", rows[:4], max_new_tokens=6, sampling=generation.Sampling(), seed=seed
        )

    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = drawn(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert one == drawn(3) != drawn(4)


def test_logits_that_are_no_numbers_stop(loaded, data):
    model, processor, rows = loaded
    weight = model.model.language_model.norm.weight
    kept = weight.data.clone()
    try:
        weight.data[0] = torch.nan
        for sampling in (None, generation.Sampling()):
            with pytest.raises(KilnError, match="logits are not numbers"):
                generation.generate(
                    model, processor, data / "images", rows[:1], max_new_tokens=2, sampling=sampling
                )  # fmt: skip
    finally:
        weight.data.copy_(kept)


def test_a_missing_picture_is_named(loaded, data, tmp_path):
    model, processor, rows = loaded
    with pytest.raises(KilnError, match="front.png"):
        generation.generate(model, processor, tmp_path, rows[:1], max_new_tokens=2)


# the step


def arguments(data: Path, out: Path, models=("base", "sft"), extra=(), **settings_) -> list[str]:
    values = {"predict": {"batch_size": 4, "max_new_tokens": 6, "samples": 2, **settings_}}
    named = [part for name in models for part in ("--model", f"{name}={data / name}")]
    return [
        *named, *extra, "--images", str(data / "images"), "--rows", str(data / "test.jsonl"), "--state-folder",
        str(out / "state"), "--output", str(out / "predictions.parquet"), "--meta", str(out / "meta.json"),
        "--settings", json.dumps(values), "--threads", "1", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def predicted(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("predicted")
    predict.main(arguments(data, out))
    return out


def test_the_table_holds_every_model_mode_and_draw_once(predicted, data):
    made = pd.read_parquet(predicted / "predictions.parquet")
    assert list(made.columns) == ["model", "mode", "id", "vase", "dimension", "draw", "text", "tokens"]
    counts = made.groupby(["model", "mode"]).size().to_dict()
    assert counts == {
        ("base", "greedy"): 15, ("base", "shuffled"): 10, ("sft", "greedy"): 15, ("sft", "shuffled"): 10,
        ("sft", "sampled"): 30,
    }  # fmt: skip
    assert not made.duplicated(["model", "mode", "id", "draw"]).any()
    assert made.equals(made.sort_values(["model", "mode", "id", "draw"], ignore_index=True))
    assert set(made.loc[made["mode"] == "sampled", "draw"]) == {0, 1}
    assert not (made.loc[made["mode"] == "shuffled", "dimension"] == CAPTION).any()
    assert not (predicted / "state").exists()
    meta = json.loads((predicted / "meta.json").read_text())
    assert {"rows", "base: model config.json", "sft: model model.safetensors"} <= meta["inputs"].keys()


def test_greedy_answers_are_those_of_each_row_alone(predicted, loaded, data):
    model, processor, rows = loaded
    made = pd.read_parquet(predicted / "predictions.parquet")
    found = made[(made["model"] == "sft") & (made["mode"] == "greedy")].set_index("id")
    for row in rows:
        one = generation.generate(model, processor, data / "images", [row], max_new_tokens=6)[0]
        assert (found["text"][row.id], found["tokens"][row.id]) == one
    single = [row for row in rows if row.dimension != CAPTION]
    shuffled = made[(made["model"] == "sft") & (made["mode"] == "shuffled")].set_index("id")
    for row in with_other_images(single, 0):
        one = generation.generate(model, processor, data / "images", [row], max_new_tokens=6)[0]
        assert shuffled["text"][row.id] == one.text


def test_draws_differ_and_the_seed_changes_samples_alone(predicted, data, tmp_path):
    predict.main(arguments(data, tmp_path, models=("sft",), seed=1))
    key = ["model", "mode", "id", "draw"]
    old = pd.read_parquet(predicted / "predictions.parquet").set_index(key)["text"]
    new = pd.read_parquet(tmp_path / "predictions.parquet").set_index(key)["text"]
    assert new.xs("greedy", level="mode").equals(old.loc[["sft"]].xs("greedy", level="mode"))
    assert not new.xs("sampled", level="mode").equals(old.xs("sampled", level="mode"))
    sampled = old.xs("sampled", level="mode").unstack("draw")
    assert (sampled[0] != sampled[1]).any()


def test_a_system_prompt_is_that_models_alone(predicted, data, tmp_path):
    predict.main(arguments(data, tmp_path, extra=["--system", f"sft={data / 'prompt.txt'}"], samples=0))
    old, new = (pd.read_parquet(folder / "predictions.parquet") for folder in (predicted, tmp_path))
    of = {"base": [], "sft": []}
    for name, found in of.items():
        found += [t[(t["model"] == name) & (t["mode"] == "greedy")]["text"].to_list() for t in (old, new)]
    assert of["base"][0] == of["base"][1]
    assert of["sft"][0] != of["sft"][1]


def test_samples_of_every_model_are_drawn_under_grpos_system_prompt(predicted, data, tmp_path):
    extra = ["--system", f"grpo={data / 'prompt.txt'}"]
    predict.main(arguments(data, tmp_path, models=("sft",), extra=extra))
    old, new = (pd.read_parquet(folder / "predictions.parquet") for folder in (predicted, tmp_path))
    same = {
        mode: old[(old["model"] == "sft") & (old["mode"] == mode)]["text"].to_list() for mode in ("greedy", "sampled")
    }
    assert new[new["mode"] == "greedy"]["text"].to_list() == same["greedy"]
    assert new[new["mode"] == "sampled"]["text"].to_list() != same["sampled"]


def test_killed_it_ends_with_the_same_bytes(predicted, data, tmp_path, after=9):
    """SIGKILL after some batches of the second model; then the same command, which answers only what is missing."""
    code = (
        "import os, signal, sys\nfrom scripts.vase import generation, predict\n"
        "real, calls = generation.generate, []\n"
        "def counted(*args, **kwargs):\n"
        f"    if len(calls) == {after}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    calls.append(1)\n    return real(*args, **kwargs)\n"
        "generation.generate = counted\npredict.main(sys.argv[1:])\n"
    )
    command = arguments(data, tmp_path, save_minutes=0)
    killed = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120,
        capture_output=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "predictions.parquet").exists()
    states = [name for name in files_below(tmp_path / "state") if name.endswith("answers.jsonl")]
    assert len(states) == 1
    lines = (tmp_path / "state" / states[0]).read_text().splitlines()
    assert len(lines) == after
    answered = []
    real = generation.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "generate", lambda *a, **k: answered.append(1) or real(*a, **k))
        predict.main(command)
    total = 4 + 3 + 4 + 3 + 2 * 4
    assert len(answered) == total - after
    assert (tmp_path / "predictions.parquet").read_bytes() == (predicted / "predictions.parquet").read_bytes()
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("after", [0, 6, 7, 21])
def test_interrupted_anywhere_it_ends_with_the_same_bytes(predicted, data, tmp_path, monkeypatch, after):
    real, calls = generation.generate, []

    def fails(*args, **kwargs):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(generation, "generate", fails)
    with pytest.raises(KeyboardInterrupt):
        predict.main(arguments(data, tmp_path, save_minutes=0))
    monkeypatch.setattr(generation, "generate", real)
    predict.main(arguments(data, tmp_path, save_minutes=3))
    assert (tmp_path / "predictions.parquet").read_bytes() == (predicted / "predictions.parquet").read_bytes()


def test_another_setting_does_not_resume(data, tmp_path, monkeypatch):
    real, calls = generation.generate, []

    def fails(*args, **kwargs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(generation, "generate", fails)
    with pytest.raises(KeyboardInterrupt):
        predict.main(arguments(data, tmp_path, models=("base",), save_minutes=0))
    calls.clear()
    monkeypatch.setattr(generation, "generate", lambda *a, **k: calls.append(1) or real(*a, **k))
    predict.main(arguments(data, tmp_path, models=("base",), max_new_tokens=3))
    assert len(calls) == 4 + 3


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["teacher=X"], "--model teacher=X: expected NAME=PATH"),
        (["base"], "--model base: expected NAME=PATH"),
        (["base=X", "base=Y"], "base is given twice"),
        (["base=nowhere"], "no model"),
    ],
)
def test_bad_names_of_models(data, tmp_path, models, said):
    command = arguments(data, tmp_path, models=())
    with pytest.raises(KilnError, match=said):
        predict.main([part for one in models for part in ("--model", one)] + command)


def test_a_system_prompt_without_its_model(data, tmp_path):
    with pytest.raises(KilnError, match="there is no --model base"):
        predict.main(arguments(data, tmp_path, models=("sft",), extra=["--system", f"base={data / 'prompt.txt'}"]))


def test_a_second_writer_is_refused(data, tmp_path, monkeypatch):
    """Two processes with one state folder would answer everything twice."""
    command = arguments(data, tmp_path, models=("base",))
    said = []

    def meanwhile(*args, **kwargs):
        with pytest.raises(KilnError, match="another process writes here") as caught:
            predict.main(command)
        said.append(caught.value)
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "generate", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        predict.main(command)
    assert len(said) == 1
