"""The published architectures in the real classes, without memory (device meta): shapes, and how many parameters.

Sources of counts: those that say so are published; `computed` ones are repeated here by their arithmetic. The decoders
of rae are counted in test_rae_model.py, their multiplications in test_rae_shapes.py.
"""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torchvision.models import ResNet50_Weights, VGG16_Weights, inception_v3
from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from scripts import config
from scripts.biomedica import model as biomedica_model
from scripts.biomedica.settings import ModelSettings as ClipSettings
from scripts.busi import lora
from scripts.busi.settings import LoraSettings
from scripts.coca import slide_model
from scripts.coca.settings import EncoderSettings, ModelSettings
from scripts.common import hulumed, vlm
from scripts.demo import initialise_clip, initialise_encoder, initialise_vlm, initialise_weights
from scripts.demo.settings import PublishedClipSettings, PublishedVlmSettings
from scripts.rae.discriminator import RECIPES, DinoFeatures
from scripts.vase import classifier
from scripts.vase.settings import ClassifierSettings

ROOT = Path(__file__).resolve().parents[1]
SMOKE = config.load(yaml.safe_load((ROOT / "config/smoke.yaml").read_text(encoding="utf-8")), Path("none"))
DEFAULT = config.Config()


@pytest.fixture(autouse=True)
def meta():
    """All tensors of a test are shapes alone."""
    with torch.device("meta"):
        yield


def count(model: nn.Module) -> int:
    """Parameters, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def trained(model: nn.Module) -> int:
    """Parameters that a training moves."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# ---- the smoke's settings are the published ones --------------------------------------------------------------------


def test_the_smoke_leaves_every_architecture_as_it_is():
    for section in ("classifier", "clip", "vlm", "sft", "grpo"):
        ours, published = (getattr(one.vase, section).model_dump() for one in (SMOKE, DEFAULT))
        changed = {name for name in ours if ours[name] != published[name]}
        assert changed <= {
            "weights", "epochs", "model", "max_steps", "accumulation", "logging_steps", "max_completion_length"
        }, section  # fmt: skip
    assert SMOKE.busi.lora == DEFAULT.busi.lora
    assert (SMOKE.coca.model, SMOKE.coca.encoder) == (DEFAULT.coca.model, DEFAULT.coca.encoder)
    assert SMOKE.biomedica.model == DEFAULT.biomedica.model
    assert (SMOKE.rae.decoder, SMOKE.rae.image_size) == (DEFAULT.rae.decoder, DEFAULT.rae.image_size)
    free, recipe = SMOKE.rae.discriminator, RECIPES[DEFAULT.rae.discriminator.recipe]
    assert {name: getattr(free, name) for name in recipe.__dict__} == recipe.__dict__
    for name in SMOKE.rae.use:
        ours, published = (getattr(one.rae.encoders, name) for one in (SMOKE, DEFAULT))
        assert ours.input_size == published.input_size
    ours, published = SMOKE.demo.published.vlm.model_dump(), PublishedVlmSettings().model_dump()
    assert {name for name in ours if ours[name] != published[name]} == {"layers", "vision_depth"}


def test_every_training_of_the_smoke_is_asked_for_five_steps():
    """The others' steps follow from how much is drawn; the workflow tests count them."""
    assert SMOKE.vase.sft.max_steps == SMOKE.vase.grpo.max_steps == SMOKE.busi.train.max_steps == 5
    plan = SMOKE.biomedica.plan
    assert plan.samples * plan.epochs == 5 * plan.batch_size
    assert SMOKE.rae.autoencoder.epochs == SMOKE.vase.classifier.epochs == 5


# ---- vase, busi -----------------------------------------------------------------------------------------------------


def test_qwen_has_the_published_parameters():
    """Bytes of the published bfloat16 weights (model.safetensors.index.json: total_size), halved."""
    seven = initialise_vlm.build(PublishedVlmSettings())
    assert count(seven) == 16_584_333_312 // 2
    three = PublishedVlmSettings(hidden=2048, layers=36, heads=16, kv_heads=2, mlp=11008, vocabulary=151936, tied=True)
    assert count(initialise_vlm.build(three)) == 7_509_245_952 // 2
    assert {parameter.dtype for parameter in seven.parameters()} == {torch.bfloat16}


def test_the_smokes_qwen_lacks_layers_alone():
    """computed: 26 layers of width 3584 and 24 vision blocks of width 1280 fewer than 8,292,166,656 parameters."""
    kv, mlp = 4 * 128, 18944
    layer = 2 * 3584**2 + 3584 + 2 * (3584 * kv + kv) + 3 * 3584 * mlp + 2 * 3584  # q, o; k, v; SwiGLU; norms
    block = 4 * 1280**2 + 4 * 1280 + 3 * 1280 * 3420 + 2 * 3420 + 1280 + 2 * 1280  # qkv, proj; SwiGLU; norms
    assert count(initialise_vlm.build(SMOKE.demo.published.vlm)) == 8_292_166_656 - 26 * layer - 24 * block


def test_qwens_shapes():
    model = initialise_vlm.build(PublishedVlmSettings())
    visual, text = model.model.visual, model.model.language_model
    patches = visual.patch_embed(torch.zeros(1024, 3 * 2 * 14 * 14, dtype=torch.bfloat16))
    assert patches.shape == (1024, 1280) and len(visual.blocks) == 32
    assert visual.config.fullatt_block_indexes == [7, 15, 23, 31]
    assert visual.merger(patches).shape == (256, 3584)  # 448 x 448 pixels
    hidden = text(
        inputs_embeds=torch.zeros(2, 300, 3584, dtype=torch.bfloat16),
        position_ids=torch.zeros(3, 2, 300, dtype=torch.long),
    ).last_hidden_state
    assert model.lm_head(hidden).shape == (2, 300, 152064)


def test_special_tokens_have_qwens_numbers():
    """Of the published tokenizer: <|endoftext|> 151643, <|im_end|> 151645, <|image_pad|> 151655."""
    with torch.device("cpu"):
        for values in (PublishedVlmSettings(), PublishedVlmSettings(vocabulary=2000)):
            made, wanted = initialise_vlm.tokenizer(values), initialise_vlm.config(values)
            for name, number in (
                ("<|endoftext|>", wanted.text_config.pad_token_id),
                ("<|im_end|>", wanted.text_config.eos_token_id),
                ("<|image_pad|>", wanted.image_token_id),
                ("<|video_pad|>", wanted.video_token_id),
            ):
                assert made.convert_tokens_to_ids(name) == number, name
            text = "What shape? black-figure amphora<|im_end|>"
            assert made.decode(made(text)["input_ids"]) == text
            assert len(made) <= values.vocabulary
        assert (made := initialise_vlm.config(PublishedVlmSettings())).image_token_id == 151655
        assert made.text_config.eos_token_id == 151645


def test_the_quality_classifier_is_a_resnet50_with_the_published_head():
    """torchvision publishes 25,557,032, its own head of 1,000 classes included; the head is computed."""
    model = classifier.build(ClassifierSettings())
    published = ResNet50_Weights.IMAGENET1K_V1.meta["num_params"]
    head = 2048 * 512 + 512 + 512 * 256 + 256 + 256 * 2 + 2
    assert count(model) == published - (2048 * 1000 + 1000) + head == 24_688_962
    assert model(torch.zeros(2, 3, 224, 224)).shape == (2, 2)


def test_the_adapters_of_busi_at_hulu_meds_size():
    """Hulu-Med's code lies on the hub; its language model is Qwen3's, 4,022,468,096 parameters as published for 4B.

    computed: rank 64 times inputs and outputs of the seven layers, 36 times: 132.1 million.
    """
    settings = {
        "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 9728, "vocab_size": 151936, "tie_word_embeddings": True,
    }  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(**settings))
    assert count(model) == 8_044_936_192 // 2
    model = lora.add_adapters(model, hulumed.HuluMed(), LoraSettings(), False, False, None)
    ends = 2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728)
    assert trained(model) == 64 * ends * 36 == 132_120_576


def test_the_adapters_of_busi_on_the_smokes_model_leave_the_vision_encoder_out():
    model = initialise_vlm.build(PublishedVlmSettings())
    model = lora.add_adapters(model, vlm.Qwen(), LoraSettings(), False, False, None)
    ends = 2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)
    assert trained(model) == 64 * ends * 28
    assert not [name for name, one in model.named_parameters() if one.requires_grad and ".visual." in name]


# ---- rae ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions", "side", "tokens"),
    [
        ("dinov2", 86.6, 224, 261),  # DINOv2's model card: ViT-B/14 distilled, with registers, 86 M; 16 x 16, CLS, 4
        ("siglip2", 92.93, 256, 256),  # open_clip's docs/model_profile.csv: ViT-B-16-SigLIP-256, image_mparams
    ],
)
def test_encoders(name, millions, side, tokens):
    model, _ = initialise_encoder.build(name, getattr(SMOKE.demo.encoders, name))
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.05)
    assert model(pixel_values=torch.zeros(1, 3, side, side)).last_hidden_state.shape == (1, tokens, 768)


def test_the_third_encoder():
    """open_clip's docs/model_profile.csv: ViT-SO400M-14-SigLIP-384, image_mparams."""
    config = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14,
        image_size=384,
    )  # fmt: skip
    model = SiglipVisionModel(config)
    assert round(count(model) / 1e6, 2) == 428.23
    assert model(pixel_values=torch.zeros(1, 3, 378, 378)).last_hidden_state.shape == (1, 27**2, 1152)


def test_frozen_networks():
    """torchvision publishes VGG16's; DINO its ViT-S/8 with 21 M; computed: Inception of 1,008 classes."""
    assert count(initialise_weights.build("vgg16", 0)) == VGG16_Weights.IMAGENET1K_V1.meta["num_params"]
    assert int(count(DinoFeatures(RECIPES["S_8"]).vit) / 1e6) == 21
    plain = inception_v3(weights=None, aux_logits=False, init_weights=False)  # of 1,000
    assert count(initialise_weights.build("inception", 0)) == count(plain) + 8 * 2049


# ---- coca -----------------------------------------------------------------------------------------------------------


def test_coca_and_its_slide_encoder(monkeypatch):
    """computed: 259.7 M and 1,024 for each token of the vocabulary; the encoder in Prism's layout, 99.0 M."""
    model = slide_model.assemble(ModelSettings(), slide_model.encoder_shape(EncoderSettings()), 2560, 8000, 0)
    block = 1024 + 1024 * (8 * 64 + 2 * 64 + 2 * 4 * 1024) + 8 * 64 * 1024 + 4 * 1024 * 1024  # norm; fused; two outputs
    for layers in (model.coca.unimodal_layers, [block for block, _ in model.coca.multimodal_layers]):
        assert [count(layer) for layer in layers] == [block] * 6
    assert count(model.coca) == 259_712_257 + 8000 * 1024
    assert count(model.encoder) == 99_037_440
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # it knows no device meta
    made = model(torch.ones(2, 64, dtype=torch.long), torch.zeros(2, 1000, 2560), torch.ones(2, 1000, dtype=torch.bool))
    assert [tuple(one.shape) for one in made] == [(2, 5120), (2, 5120), (2, 64, 8000)]


# ---- biomedica, vase's filter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions", "image_millions", "width"),
    [("ViT-B-32", 151.28, 87.85, 512), ("ViT-L-14", 427.62, 303.97, 768)],  # open_clip's docs/model_profile.csv
)
def test_clip_models(name, millions, image_millions, width):
    settings = ClipSettings(name=name)
    model = biomedica_model.assemble(biomedica_model._by_name(settings.name), name)
    assert (round(count(model) / 1e6, 2), round(count(model.visual) / 1e6, 2)) == (millions, image_millions)
    images, texts, _ = model(torch.zeros(2, 3, 224, 224), torch.zeros(2, 77, dtype=torch.long))
    assert images.shape == texts.shape == (2, width)


def test_the_presets_and_defaults_name_these_clip_models():
    preset = yaml.safe_load((ROOT / "config/bmc_clip.yaml").read_text(encoding="utf-8"))["biomedica"]["model"]["name"]
    assert (DEFAULT.biomedica.model.name, preset) == ("ViT-B-32", "ViT-L-14")
    assert round(count(initialise_clip.build(PublishedClipSettings())) / 1e6, 2) == 151.28
