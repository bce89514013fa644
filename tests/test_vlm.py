"""Vision-language models behind one interface: what a batch holds, and what an adapter touches."""

import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from vase_fixtures import picture
from vlm_fixtures import tiny_base

from scripts.busi import lora
from scripts.busi.settings import PROMPT, LoraSettings
from scripts.common import vlm
from scripts.common.errors import KilnError
from scripts.common.vlm import IGNORED

FAMILY = vlm.family("qwen")
ANSWERS = ("Normal", "Benign", "Malignant")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("vlm") / "base")


@pytest.fixture(scope="module")
def processor(base):
    return FAMILY.load_processor(base)


@pytest.fixture
def model(base):
    return FAMILY.load_model(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    return picture(tmp_path_factory.mktemp("image") / "one.png", 1, 96)


def test_only_the_answer_and_its_end_token_are_learned(processor, image):
    example = FAMILY.example(processor, image, PROMPT, "Benign")
    taught = example.labels != IGNORED
    text = processor.tokenizer.decode(example.input_ids[taught])
    assert text == "Benign<|im_end|>"
    assert torch.equal(example.input_ids[taught], example.labels[taught])
    before = processor.tokenizer.decode(example.input_ids[~taught])
    assert before.endswith("<|im_start|>assistant\n")
    assert PROMPT in before


@pytest.mark.parametrize("answer", ANSWERS)
def test_tokens_are_those_of_the_whole_chat(processor, image, answer):
    example = FAMILY.example(processor, image, PROMPT, answer)
    chat = processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    )
    from PIL import Image

    whole = processor(text=[chat], images=[Image.open(image).convert("RGB")], return_tensors="pt")["input_ids"][0]
    assert torch.equal(whole[: len(example.input_ids)], example.input_ids)
    assert processor.tokenizer.decode(whole[len(example.input_ids) :]) == "\n"


def test_the_mask_follows_lengths_and_not_the_padding_id(model, processor, image):
    pad = processor.tokenizer.convert_tokens_to_ids("!")  # as in the original: a real token as padding
    long = FAMILY.example(processor, image, "Look here! " + PROMPT + "!!", "Normal")
    short = FAMILY.example(processor, image, "What?", "Normal")
    batch = FAMILY.collate(model.config, [long, short], pad)
    assert (batch["input_ids"][0] == pad).any()
    assert batch["attention_mask"][0].all()
    assert batch["attention_mask"].sum(1).tolist() == [len(long.input_ids), len(short.input_ids)]
    assert (batch["labels"][1][len(short.input_ids) :] == IGNORED).all()


def test_pictures_are_concatenated_on_dimension_0(model, processor, image, tmp_path):
    wide = tmp_path / "wide.png"
    from PIL import Image

    Image.open(image).resize((160, 70)).save(wide)
    one, two = (FAMILY.example(processor, path, PROMPT) for path in (image, wide))
    batch = FAMILY.collate(model.config, [one, two], 0)
    patches = [len(e.vision["pixel_values"]) for e in (one, two)]
    assert batch["pixel_values"].shape[0] == sum(patches)
    assert batch["image_grid_thw"].prod(1).tolist() == patches


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_answers_as_each_alone(model, processor, image, side):
    examples = [FAMILY.example(processor, image, text) for text in (PROMPT, "What is it?")]
    batch = FAMILY.collate(model.config, examples, processor.tokenizer.pad_token_id, side)
    batch.pop("labels")
    with torch.no_grad():
        together = model(**batch).logits
        for row, example in enumerate(examples):
            alone = FAMILY.collate(model.config, [example], 0)
            alone.pop("labels")
            expected = model(**alone).logits[0]
            kept = together[row][batch["attention_mask"][row].bool()]
            torch.testing.assert_close(kept, expected, atol=1e-4, rtol=1e-4)


def test_an_unreadable_image_is_an_error_and_never_a_black_picture(processor, tmp_path):
    broken = tmp_path / "benign (1).png"
    broken.write_text("this is no picture")
    with pytest.raises(KilnError, match=re.escape("benign (1).png")):
        FAMILY.example(processor, broken, PROMPT)


def test_an_empty_answer_is_refused(processor, image):
    with pytest.raises(KilnError, match="0 tokens"):
        FAMILY.example(processor, image, PROMPT, "")


def adapted(model, **settings):
    values = LoraSettings(rank=4, alpha=8, **settings)
    return lora.add_adapters(model, FAMILY, values, quantised=False, checkpointing=False, init_from=None)


def test_adapters_lie_on_the_language_model_alone(model):
    names = {name for name, p in adapted(model).named_parameters() if p.requires_grad}
    layers = len(model.model.language_model.layers)
    assert len(names) == layers * 7 * 2
    assert not [name for name in names if "visual" in name or "lm_head" in name]


def test_the_projector_is_trained_in_full_when_asked(model):
    plain = model.model.visual.merger
    names = {name for name, p in adapted(model, train_projector=True).named_parameters() if p.requires_grad}
    merger = [name for name in names if "visual.merger.modules_to_save" in name]
    assert len(merger) == len(list(plain.parameters()))
    assert not [name for name in names - set(merger) if "visual" in name]


def test_excluded_layers_get_no_adapter(model):
    names = list(get_peft_model_state_dict(adapted(model, exclude_modules=r".*layers\.0\..*")))
    assert names
    assert not [name for name in names if "layers.0." in name]


def test_a_target_that_the_model_lacks_is_named_with_those_it_has(model):
    with pytest.raises(KilnError, match=r"no wqkv; its linear layers end in down_proj, gate_proj, k_proj"):
        adapted(model, target_modules=("q_proj", "wqkv"))


def test_excluding_every_layer_is_an_error(model):
    with pytest.raises(KilnError, match="leaves no layer"):
        adapted(model, exclude_modules=".*")


@pytest.mark.slow
@pytest.mark.parametrize("vision", [True, False])
def test_qlora_holds_the_base_in_four_bits_and_the_head_as_it_is(base, vision):
    values = LoraSettings(rank=4, alpha=8, quantise_vision=vision)
    quantised = FAMILY.load_model(
        base, dtype=torch.float32, device_map={"": "cpu"},
        quantization_config=lora.quantisation(values, FAMILY, torch.float32),
    )  # fmt: skip
    kinds = {name: type(module).__name__ for name, module in quantised.named_modules()}
    text = [kind for name, kind in kinds.items() if "language_model" in name and name.endswith("_proj")]
    seen = [kind for name, kind in kinds.items() if "visual.blocks" in name and name.endswith("_proj")]
    assert set(text) == {"Linear4bit"}
    assert set(seen) == ({"Linear4bit"} if vision else {"Linear"})
    assert kinds["lm_head"] == "Linear"
    weight = quantised.model.language_model.layers[0].self_attn.q_proj.weight
    assert weight.quant_type == "nf4"
    assert weight.quant_state.nested  # double quantisation
    model = lora.add_adapters(quantised, FAMILY, values, quantised=True, checkpointing=True, init_from=None)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
