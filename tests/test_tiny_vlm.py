"""The tiny Qwen2.5-VL: it loads as a published one does, and its pre-training pictures are what they are said to be."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, Qwen2Tokenizer
from vase_fixtures import files_below, run

from scripts.busi.settings import PROMPT, BusiSettings
from scripts.common import artefacts, tiny_vlm
from scripts.demo import shapes, train_vlm
from scripts.demo.settings import DemoVlmSettings
from scripts.demo.vases import describe

TEXTS = [PROMPT, "Normal Benign Malignant", "Say Normal.", "Say Benign.", "Say Malignant."]
SMALL = {"pictures": 24, "held_out": 20, "steps": 3, "batch_size": 4, "image_side": 56}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return folder, *tiny_vlm.build(folder, TEXTS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained") / "vlm")


def train(folder, **changes):
    meta = folder / "meta.json"
    run(train_vlm.main, "--output-folder", folder, "--meta", meta, settings={**SMALL, **changes})
    return folder


def asked(processor, picture, text):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[chat], images=[picture], return_tensors="pt")


def noise(width=160, height=120, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# the builder


def test_what_is_built_loads_back_and_answers_alike(built):
    folder, model, processor = built
    loaded, again = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(loaded) is type(model) and type(again.tokenizer) is Qwen2Tokenizer
    batch = asked(processor, noise(), PROMPT)
    other = asked(again, noise(), PROMPT)
    assert {name: t.tolist() for name, t in batch.items()} == {name: t.tolist() for name, t in other.items()}
    made = [m.generate(**batch, max_new_tokens=6, do_sample=False) for m in (model, loaded)]
    assert made[0].tolist() == made[1].tolist() and made[0].shape[1] > batch["input_ids"].shape[1]
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)


def test_the_picture_counts(built):
    _, model, processor = built
    first, second = (model(**asked(processor, noise(seed=seed), PROMPT)).logits[0, -1] for seed in (0, 1))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(("size", "grid"), [((300, 300), (6, 6)), ((400, 260), (4, 6)), ((260, 400), (6, 4))])
def test_pictures_keep_their_proportions(built, size, grid):
    batch = asked(built[2], noise(*size), PROMPT)
    assert batch["image_grid_thw"].tolist() == [[1, *grid]]
    token = built[2].tokenizer.convert_tokens_to_ids(tiny_vlm.IMAGE)
    assert (batch["input_ids"] == token).sum() == grid[0] * grid[1] // 4


def test_words_of_the_corpus_are_single_tokens_and_any_text_survives(built):
    tokenizer = built[2].tokenizer
    for word in ("Normal", "Benign", "Malignant", " breast", " diagnostic"):
        assert len(tokenizer.tokenize(word)) == 1, word
    text = "Zwölf Boxkämpfer 走 \U0001f3fa <b>\n\t'x'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) < 1024 + len(tiny_vlm.SPECIAL)
    for special in tiny_vlm.SPECIAL:
        assert len(tokenizer(special)["input_ids"]) == 1


def test_special_tokens_are_never_generated_but_for_the_end(built):
    folder, _, processor = built
    suppressed = json.loads((folder / "generation_config.json").read_text())["suppress_tokens"]
    names = set(processor.tokenizer.convert_ids_to_tokens(suppressed))
    assert names == set(tiny_vlm.SPECIAL) - {"<|im_end|>", "<|endoftext|>"}


def test_equal_seeds_give_equal_bytes_and_leave_the_random_state_alone(built, tmp_path):
    before = torch.get_rng_state()
    tiny_vlm.build(tmp_path / "again", TEXTS)
    assert torch.equal(torch.get_rng_state(), before)
    tiny_vlm.build(tmp_path / "other", TEXTS, seed=1)
    names = files_below(built[0])
    assert names == files_below(tmp_path / "again")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (built[0] / name).read_bytes(), name
    assert (tmp_path / "other/model.safetensors").read_bytes() != (built[0] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("sizes", [{"hidden": 96}, {"vision_hidden": 32}, {"image_side": 50}, {"hidden": 0}])
def test_sizes_that_do_not_fit_are_refused(tmp_path, sizes):
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} = {next(iter(sizes.values()))}: expected a multiple of"):
        tiny_vlm.build(tmp_path / "model", TEXTS, **sizes)
    assert not (tmp_path / "model").exists()


def test_larger_models_are_built_as_asked(tmp_path):
    model, _ = tiny_vlm.build(tmp_path, TEXTS, hidden=128, layers=3, vision_hidden=128, vision_depth=1)
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.hidden_size, text.num_hidden_layers) == (128, 3)
    assert (vision.hidden_size, vision.depth, vision.out_hidden_size) == (128, 1, 128)


@pytest.mark.slow
def test_it_loads_in_four_bits(built):
    folder, model, processor = built
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )
    small = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
    linear = [name for name, module in small.named_modules() if type(module).__name__ == "Linear4bit"]
    assert any("visual" in name for name in linear) and any("language_model" in name for name in linear)
    batch = asked(processor, noise(), PROMPT)
    exact, near = model(**batch).logits, small(**batch).logits
    assert torch.nn.functional.cosine_similarity(exact.flatten(), near.flatten(), dim=0) > 0.9
    assert not torch.equal(exact, near)


# the pictures to learn from


def pixels(sample):
    return np.asarray(sample.picture, dtype=np.float64)


def grey(count, seed=0, size=(140, 140)):
    rng = np.random.default_rng(seed)
    return [shapes.draw(rng, "grey", size) for _ in range(count)]


@pytest.mark.parametrize("sort", shapes.QUESTIONS)
def test_pictures_follow_from_their_random_stream(sort):
    def drawn(seed):
        return shapes.draw(np.random.default_rng(seed), sort, (112, 84))

    assert drawn(3).picture.size == (112, 84) and drawn(3).picture.mode == "RGB"
    assert np.array_equal(pixels(drawn(3)), pixels(drawn(3))) and drawn(3).answers == drawn(3).answers
    assert not np.array_equal(pixels(drawn(3)), pixels(drawn(4)))


@pytest.mark.parametrize("sort", shapes.QUESTIONS)
def test_every_question_has_an_answer_and_every_answer_occurs(sort):
    rng = np.random.default_rng(0)
    samples = [shapes.draw(rng, sort, (84, 84)) for _ in range(200)]
    for sample in samples:
        assert set(sample.answers) == set(shapes.QUESTIONS[sort])
    for (known_sort, kind), answers in shapes.answers().items():
        if known_sort == sort:
            assert {sample.answers[kind] for sample in samples} == set(answers)


def test_forms_have_the_colour_that_is_said():
    rng = np.random.default_rng(1)
    for _ in range(60):
        sample = shapes.draw(rng, "coloured", (84, 84))
        words = sample.answers["describe"].split()
        assert (
            words[1:3] == [sample.answers["colour"], sample.answers["shape"]] and words[5] == sample.answers["pattern"]
        )
        colours = np.array(list(shapes.COLOURS.values()))
        nearest = np.abs(pixels(sample)[:, :, None] - colours).max(3)
        near = {name: int((nearest[:, :, i] <= 20).sum()) for i, name in enumerate(shapes.COLOURS)}
        assert near[sample.answers["colour"]] > 40 and near[words[4]] > 8


def test_blobs_are_dark_and_as_wide_or_tall_as_said():
    plain = [s for s in grey(150) if (s.answers["below"], s.answers["outline"]) == ("nothing", "smooth")]
    right = []
    for sample in plain:
        smooth = ndimage.gaussian_filter(pixels(sample)[:, :, 0], 3)
        y, x = np.nonzero(smooth < np.percentile(smooth, 4))
        right.append((np.std(x) > np.std(y)) == (sample.answers["extent"] == "wide"))
    assert len(right) > 10 and np.mean(right) > 0.85


def test_what_lies_below_is_brighter_or_darker_than_beside():
    differences = {"bright": [], "dark": [], "nothing": []}
    for sample in grey(200, seed=2):
        if sample.answers["outline"] == "none":
            assert sample.answers["below"] == "nothing" and sample.answers["describe"] == "no blob"
            continue
        last = ndimage.gaussian_filter1d(pixels(sample)[-12:, :, 0].mean(0), 4)
        change = last - np.median(last)
        differences[sample.answers["below"]].append(change.max() + change.min())
    means = {name: np.mean(found) for name, found in differences.items()}
    assert means["bright"] > 10 and means["dark"] < -10 and abs(means["nothing"]) < 6


def test_jagged_outlines_are_longer_for_their_area():
    def compactness(jagged, seed):
        blob = shapes._blob(np.random.default_rng(seed), (120, 120), (60, 60), (26, 20), jagged)
        return np.hypot(*np.gradient(blob)).sum() ** 2 / blob.sum() / (4 * np.pi)

    smooth = [compactness(False, seed) for seed in range(20)]
    jagged = [compactness(True, seed) for seed in range(20)]
    assert max(smooth) < 1.25 and min(jagged) > 1.5


# the step


def test_the_settings_hold_every_word_of_the_pipelines_answers():
    words = " ".join(DemoVlmSettings().words).split()
    rng = np.random.default_rng(0)
    for _ in range(100):
        facts = describe(rng, ["amphora", "krater", "kylix", "hydria", "oinochoe", "lekythos"])
        said = [str(value) for key, value in facts.items() if not key.startswith("date")]
        assert set(" ".join(said).split()) <= set(words)
    assert set(BusiSettings().list.classes) <= set(words)
    assert set(BusiSettings().conversations.prompts) <= set(DemoVlmSettings().texts)


def test_conversations_are_the_chat_templates(built):
    processor = built[2]
    chat = train_vlm.Chat(processor)
    turns = [("Which outline?", "jagged"), ("Say Benign.", "Benign")]
    ids, labels = chat.encode(9, turns)
    content = [{"type": "image"}, {"type": "text", "text": turns[0][0]}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": turns[0][1]}]
    messages += [{"role": "user", "content": turns[1][0]}, {"role": "assistant", "content": turns[1][1]}]
    whole = processor(text=[processor.apply_chat_template(messages)], images=[noise(300, 300)])["input_ids"][0]
    assert ids.tolist() == list(whole)[:-1]  # the template ends a turn with a line break, which nobody generates
    assert processor.tokenizer.decode(ids[labels != train_vlm.IGNORED]) == "jagged<|im_end|>Benign<|im_end|>"


def test_patches_of_a_pool_are_the_processors(built):
    processor = built[2]
    values = DemoVlmSettings(pictures=10, image_side=84)
    pools = train_vlm.draw_pools(processor, values, 10, 0)
    assert sum(len(pool.samples) for pool in pools) == 10
    for pool in pools:
        made = processor.image_processor(images=[s.picture for s in pool.samples], return_tensors="pt")
        assert torch.equal(train_vlm.pixel_values(pool.patches), made["pixel_values"])
        assert made["image_grid_thw"].tolist() == [list(pool.grid)] * len(pool.samples)


def test_right_answers_are_those_that_greedy_generation_gives(trained):
    model, processor = AutoModelForImageTextToText.from_pretrained(trained), AutoProcessor.from_pretrained(trained)
    chat = train_vlm.Chat(processor)
    pool = train_vlm.draw_pools(processor, DemoVlmSettings(**SMALL), 3, 0)[0]
    question = "What colour?"
    batch = asked(processor, pool.samples[0].picture, question)
    made = model.generate(**batch, max_new_tokens=3, do_sample=False, suppress_tokens=None)
    tokens = made[0, batch["input_ids"].shape[1] :]
    answer = processor.tokenizer.decode(tokens)
    ids, labels = chat.encode(int(np.prod(pool.grid)) // 4, [(question, answer)])
    logits = model(**train_vlm.make_batch(model, chat, pool, [0], [[(question, answer)]])).logits[0, :-1].argmax(-1)
    taught = labels[1:] != train_vlm.IGNORED
    assert logits[taught][: len(tokens)].tolist() == tokens.tolist()
    expected = logits[taught].tolist() == ids[1:][taught].tolist()
    one = pool._replace(patches=pool.patches[:1], samples=pool.samples[:1])
    assert train_vlm.right_answers(model, chat, one, [(question, answer)]).tolist() == [expected]
    assert not train_vlm.right_answers(model, chat, one, [(question, "zigzag zigzag")]).any()


def test_descriptions_stand_alone_and_say_asks_for_a_word():
    rng = np.random.default_rng(0)
    sample = shapes.draw(rng, "grey", (84, 84))
    seen = [train_vlm.choose_turns(sample, ["kylix"], 0.3, rng) for _ in range(300)]
    questions = shapes.QUESTIONS["grey"]
    known = {questions[kind]: answer for kind, answer in sample.answers.items()} | {"Say kylix.": "kylix"}
    assert all(known[question] == answer for turns in seen for question, answer in turns)
    said = [sum(question == "Say kylix." for question, _ in turns) for turns in seen]
    about = [[question for question, _ in turns if question != "Say kylix."] for turns in seen]
    alone = [kinds == [questions["describe"]] for kinds in about]
    assert 0.25 < np.mean(alone) < 0.42
    rest = [sorted(kinds) for kinds, one in zip(about, alone, strict=True) if not one]
    assert all(kinds == sorted(questions[k] for k in ("outline", "below", "extent")) for kinds in rest)
    assert 0.24 < sum(said) / sum(map(len, about)) < 0.36
    assert {turns[0][0] for turns in seen} == {*questions.values(), "Say kylix."}  # any of them comes first


def test_the_step_writes_a_model_and_what_it_is(trained):
    listing = json.loads((trained / "files.json").read_text())
    assert set(listing) | {"files.json", "meta.json"} == set(files_below(trained))
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= set(listing)
    assert listing == artefacts.describe_files(trained / name for name in listing)
    record = json.loads((trained / "meta.json").read_text())
    assert record["step"] == "scripts.demo.train_vlm" and set(record["outputs"]) == set(listing) | {"files.json"}
    assert record["settings"] == json.loads(DemoVlmSettings(**SMALL).model_dump_json())
    metrics = json.loads((trained / "metrics.json").read_text())
    held_out = metrics["held_out"]
    assert {sort: set(kinds) for sort, kinds in held_out.items() if sort != "words"} == {
        sort: set(kinds) for sort, kinds in shapes.QUESTIONS.items()
    }
    for kinds in held_out.values():
        for found in kinds.values():
            assert 0 <= found["accuracy"] <= 1 and 0 < found["most_frequent"] <= 1 and found["n"] > 0
    assert len(metrics["train_loss"]) == SMALL["steps"]
    assert held_out["coloured"]["colour"]["n"] + held_out["grey"]["outline"]["n"] == SMALL["held_out"]


def test_equal_settings_give_equal_models_and_training_changes_weights(trained, tmp_path):
    again = train(tmp_path / "again")
    assert (again / "files.json").read_bytes() == (trained / "files.json").read_bytes()
    other = train(tmp_path / "other", lr=1e-3)
    assert (other / "model.safetensors").read_bytes() != (trained / "model.safetensors").read_bytes()


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vlm, "measure", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "vlm")
    assert not (tmp_path / "vlm").exists() and files_below(tmp_path) == []


@pytest.mark.slow
def test_the_default_training_teaches_to_see_and_to_say(tmp_path):
    folder = train(tmp_path / "vlm", **{name: DemoVlmSettings.model_fields[name].default for name in SMALL})
    held_out = json.loads((folder / "metrics.json").read_text())["held_out"]
    for sort, kind in (("coloured", "colour"), ("grey", "below"), ("grey", "extent"), ("grey", "outline")):
        found = held_out[sort][kind]
        assert found["accuracy"] > found["most_frequent"] + 0.2, (kind, found)
    said = held_out["words"]["say"]
    assert said["accuracy"] > 0.5 > 10 * said["most_frequent"], said
