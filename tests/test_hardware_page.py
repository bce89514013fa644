"""What docs/hardware.md calls calculated (C) is what the code calculates."""

import re
from pathlib import Path

import pytest
import torch

from scripts import needs
from scripts.coca.settings import EncoderSettings
from scripts.common import preflight
from scripts.config import Config
from scripts.vase import classifier, estimate_memory
from scripts.vase.settings import TunerSettings, VaseSettings

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/hardware.md").read_text(encoding="utf-8")
STATE = needs.SAVES * (needs.ADAM + 1) * needs.FLOAT32  # bytes of a trained parameter
CONFIG = Config()


def cells(start: str) -> list[str]:
    """The cells of the one row that begins so."""
    (line,) = [one for one in PAGE.splitlines() if one.startswith(f"| {start}")]
    return line.strip("| ").split(" | ")


def gb(number: float, digits: int = 1) -> str:
    return f"{number / 1e9:.{digits}f} GB"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Qwen2.5-VL-7B by its published shape, without weights."""
    from transformers import Qwen2_5_VLConfig

    text = {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584}
    folder = tmp_path_factory.mktemp("qwen")
    made = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    made.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    made.save_pretrained(folder)
    return estimate_memory.skeleton(folder)


@pytest.mark.parametrize(
    "row,section,tuner,references",
    [
        ("SFT, LoRA", "sft", "lora", 0),
        ("SFT, full", "sft", "full", 0),
        ("GRPO, LoRA", "grpo", "lora", 0),
        ("GRPO, full", "grpo", "full", 1),
    ],
)
def test_memory_of_7b(qwen, row, section, tuner, references):
    values = getattr(VaseSettings(), section).model_copy(update={"tuner": TunerSettings(tuner=tuner)})
    answer = values.max_completion_length if section == "grpo" else 0
    found = estimate_memory.estimate(qwen, values, VaseSettings().vlm, answer, references, 1)
    said = cells(row)
    trained = found["trained"]
    assert said[1] == (f"{trained / 1e9:.1f}e9" if trained > 1e9 else f"{trained / 1e6:.0f} M")
    assert said[2:6] == [gb(found[part]) for part in ("weights", "gradients", "optimiser", "activations")]
    assert said[6] == gb(found["bytes"], 0)


def test_memory_of_the_classifier():
    with torch.device("meta"):
        model = classifier.build(VaseSettings().classifier)
    parameters = sum(one.numel() for one in model.parameters())
    kept = preflight.activation_bytes(model, (256, 3, 224, 224))
    needed = preflight.estimate_training_memory(parameters, parameters, activation_bytes=kept)
    said = cells("`vase_train_classifier`")
    assert said[2] == f"{gb(needed, 0)} (C)"
    assert f"{parameters / 1e6:.1f} M x 16 bytes + {gb(kept)} kept" in said[4]


def test_states():
    decoder = needs.decoder_parameters(CONFIG.rae.decoder, 768, 16)
    assert cells("`rae` state")[1].startswith(gb(decoder * STATE))
    frozen = CONFIG.coca.model_copy(update={"encoder": EncoderSettings(weights="x")})
    sizes = [needs.coca_parameters(one) for one in (frozen, CONFIG.coca)]
    assert re.findall(r"[\d.]+ GB", cells("`coca` state")[1]) == [gb(one * STATE) for one in sizes]
    assert re.findall(r"[\d.]+ GB", cells("`coca_train`, frozen")[2]) == [gb(sizes[0] * 16)]
    assert re.findall(r"[\d.]+ GB", cells("`coca_train`, encoder")[2]) == [gb(sizes[1] * 16)]


def test_tables_of_features_and_latents():
    def bytes_of(rule: str, measured: int) -> list[str]:
        return [gb(one.bytes) for one in needs.of_rule(rule, needs.Job(CONFIG, {}, lambda name: name, measured))]

    held = bytes_of("rae_compute_reference_stats", 50_000)
    assert re.findall(r"[\d.]+ GB", cells("`rae` features")[1]) == held[::-1]
    assert re.findall(r"[\d.]+ GB", cells("`coca` latents")[1]) == bytes_of("coca_encode_slides", 10_000)


def test_every_step_that_asks_for_a_gpu_is_there():
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "rules").glob("*.smk") if path.stem != "demo")
    rules = re.findall(r"^rule (\w+):\n(.*?)(?=^\S)", f"{text}\n.", flags=re.MULTILINE | re.DOTALL)
    asking = {name for name, body in rules if re.search(r"class_resources\((\"gpu|CONFIG|\w+_CLASS)", body)}
    assert len(asking) > 15
    assert asking - set(re.findall(r"`(\w+)`", PAGE)) == set()


def test_every_row_of_a_step_says_where_its_figures_come_from():
    for line in PAGE.splitlines():
        if re.match(r"\| `\w+_\w+`", line):
            for cell in line.strip("| ").split(" | ")[2:4]:
                assert re.search(r"\((P|M|C|E)\b|\?", cell), line
