"""What SFT and GRPO will need of a GPU, before one is asked for: counts against real models, sums by hand."""

import json

import pytest
from vase_fixtures import command_line, error_of, run

from scripts.common import tiny_vlm
from scripts.common.errors import KilnError
from scripts.vase import estimate_memory
from scripts.vase.settings import GrpoSettings, SftSettings, TunerSettings, VlmSettings

LORA = {"tuner": "lora", "rank": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory") / "base"
    return folder, tiny_vlm.build(folder, ["What shape?"])[0]


def test_the_skeleton_has_the_models_parameters_and_no_memory(base):
    folder, model = base
    skeleton = estimate_memory.skeleton(folder)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert sum(p.numel() for p in skeleton.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("vit", "aligner"), [(True, True), (False, False), (True, False)])
def test_trained_parameters_of_a_lora_are_pefts(base, vit, aligner):
    from peft import LoraConfig, get_peft_model

    folder, _ = base
    tuner = TunerSettings(**LORA, freeze_vit=vit, freeze_aligner=aligner)
    counted = estimate_memory.trained_parameters(estimate_memory.skeleton(folder), tuner)
    exclude = (
        r".*(visual\.blocks|visual\.patch_embed).*" if vit and not aligner else r".*visual.*" if vit else r".*lm_head"
    )
    config = LoraConfig(r=4, target_modules="all-linear", exclude_modules=exclude)
    adapted = get_peft_model(estimate_memory.skeleton(folder), config)
    assert counted == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_all_weights_but_the_frozen(base):
    folder, model = base
    tuner = TunerSettings(tuner="full")
    counted = estimate_memory.trained_parameters(estimate_memory.skeleton(folder), tuner)
    assert counted == sum(p.numel() for name, p in model.named_parameters() if "visual" not in name)


def test_sums_by_hand(base):
    folder, _ = base
    model = estimate_memory.skeleton(folder)
    total = sum(p.numel() for p in model.parameters())
    values = SftSettings(tuner=LORA)
    found = estimate_memory.estimate(model, values, VlmSettings(), 0, 0, 1)
    assert found["weights"] == 2 * total  # bfloat16
    assert found["gradients"] == 4 * found["trained"] and found["optimiser"] == 8 * found["trained"]
    assert found["tokens"] == 1280 + estimate_memory.QUESTION_TOKENS
    assert found["bytes"] == sum(found[part] for part in ("weights", "gradients", "optimiser", "activations"))
    full = GrpoSettings(deepspeed="zero3")
    spread = estimate_memory.estimate(model, full, VlmSettings(), 256, 1, 8)
    assert spread["weights"] == -(-4 * total // 8)  # with the reference model
    assert spread["optimiser"] == -(-12 * spread["trained"] // 8)  # with ZeRO's master copy
    assert spread["tokens"] == found["tokens"] + 256


def test_more_memory_than_a_gpu_has_stops_with_what_reduces_it(base, tmp_path):
    folder, _ = base
    out, meta = tmp_path / "memory.json", tmp_path / "meta.json"
    run(estimate_memory.main, "--model", folder, "--output", out, "--meta", meta)
    found = json.loads(out.read_text())
    assert set(found) == {"sft", "grpo"} and found["grpo"]["bytes"] > found["sft"]["bytes"]
    with pytest.raises(KilnError, match=r"vase\.sft needs about .* GB") as error:
        run(estimate_memory.main, "--model", folder, "--gpu-gb", 1e-6, "--output", out, "--meta", meta)
    for setting in ("tuner", "gradient_checkpointing", "max_pixels", "batch_size", "deepspeed"):
        assert setting in error.value.hint


def test_a_folder_without_configuration(tmp_path):
    arguments = ("--model", tmp_path, "--output", tmp_path / "m.json", "--meta", tmp_path / "meta.json")
    assert "config.json" in error_of(command_line("estimate_memory", *arguments))
