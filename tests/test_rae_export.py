"""The exported folder, the published layout both ways, and the model card of an autoencoder."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import workflow
from huggingface_hub import ModelCard
from rae_fixtures import (
    EVALUATE,
    INPUT,
    PERCEPTUAL,
    SIDE,
    SIZES,
    TRAIN,
    build_data,
    draw_images,
    encoder_settings,
    scored,
    train_all,
    training,
)
from safetensors.torch import load_file
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from scripts.common.errors import KilnError
from scripts.rae import checkpoints, describe_model, export, exports, import_published, published, train_autoencoder
from scripts.rae.decoder import DECODERS, Size
from scripts.rae.settings import PublishedSettings, RaeSettings, published_encoders

ROOT = Path(__file__).resolve().parents[1]
MODEL = {
    "dinov2": f"decoders/dinov2/wReg_w32/ViT_1x32x64_h2_n08_i{SIDE}/model.pt",
    "siglip2": f"decoders/siglip2/w32_p8_i32/ViT_1x32x64_h2_n08_i{SIDE}/model.pt",
}
STATS = {
    "dinov2": f"stats/dinov2/wReg_w32/imagenet1k_{SIDE}/stat.pt",
    "siglip2": f"stats/siglip2/w32_p8_i32/ImageNet1k_{SIDE}/stat.pt",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return build_data(tmp_path_factory.mktemp("rae"))


@pytest.fixture(scope="module")
def trained(data) -> dict[str, Path]:
    return train_all(data)


@pytest.fixture(scope="module")
def exported(data, trained) -> dict[str, Path]:
    """{encoder: exported folder}."""
    return {name: do_export(data, trained, name, data / f"export_{name}/model") for name in INPUT}


@pytest.fixture(scope="module")
def metrics(data, trained) -> dict:
    """metrics.json of the trained siglip2; its files lie in data/scored."""
    return scored(data, "siglip2", trained["siglip2"], data / "scored")


def do_export(data: Path, trained: dict, name: str, out: Path, **changed) -> Path:
    options = {
        "checkpoint": trained[name] / "autoencoder.safetensors", "training-meta": trained[name] / "meta.json",
        "encoder": data / name, "output-folder": out, "meta": out.parent / "meta.json",
    }  # fmt: skip
    export.main([text for key, value in (options | changed).items() for text in (f"--{key}", str(value))])
    return out


def do_import(data: Path, decoder: Path, stats: Path, out: Path, name: str = "siglip2", encoder=None, **changed):
    """Facts and tensors of what the step makes of a published pair."""
    values = {"encoder": encoder_settings(name), "image_size": SIDE, "published": {"heads": 2}} | changed
    import_published.main(
        ["--name", name, "--encoder", str(encoder or data / name), "--decoder", str(decoder), "--statistics",
         str(stats), "--output", str(out), "--meta", str(out.with_name("meta.json")), "--settings", json.dumps(values)]
    )  # fmt: skip
    return checkpoints.read(out)


@pytest.mark.parametrize("name", ["dinov2", "siglip2"])
def test_the_folder_holds_the_same_weights_in_both_layouts(trained, exported, name):
    folder, truth = exported[name], load_file(trained[name] / "autoencoder.safetensors")
    decoder, statistics = load_file(folder / "decoder.safetensors"), load_file(folder / "statistics.safetensors")
    model = torch.load(folder / MODEL[name], weights_only=True)
    stat = torch.load(folder / STATS[name], weights_only=True)
    assert type(model) is dict and decoder.keys() == model.keys() and stat.keys() == {"mean", "var"}
    assert {f"decoder.{key}" for key in model} | {"latent_mean", "latent_var"} == truth.keys()
    for key, value in model.items():
        assert torch.equal(value, truth[f"decoder.{key}"]) and torch.equal(decoder[key], value)
    for key, value in stat.items():
        assert torch.equal(value, truth[f"latent_{key}"]) and torch.equal(statistics[key], value)
    # the names of the original's state dict
    assert {"decoder_pos_embed", "trainable_cls_token", "decoder_layers.0.attention.attention.query.weight"} <= set(
        model
    )


def test_the_folder_says_what_it_is(data, trained, exported):
    folder = exported["siglip2"]
    config = json.loads((folder / "config.json").read_text())
    assert config["encoder"] == {"name": "siglip2", "sha256": checkpoints.identity(data / "siglip2"),
                                 "input_size": 32, "patch": 8}  # fmt: skip
    assert config["latents"] == {"dim": 32, "grid": 4} and config["image_size"] == SIDE
    assert config["decoder"] == {"layers": 1, "width": 32, "mlp": 64, "heads": 2, "patch": 8}
    assert (config["tau"], config["steps"]) == (0.8, 32)
    assert config["training"]["settings"]["autoencoder"]["batch_size"] == 24
    assert config["training"]["code"] == json.loads((trained["siglip2"] / "meta.json").read_text())["code"]
    assert str(data) not in (folder / "config.json").read_text()
    listing = json.loads((folder / "files.json").read_text())
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == listing.keys() | {"files.json"}
    for name, one in listing.items():
        content = (folder / name).read_bytes()
        assert one == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_same_checkpoint_gives_the_same_bytes(data, trained, exported, tmp_path):
    again = do_export(data, trained, "siglip2", tmp_path / "model")
    assert (again / "files.json").read_bytes() == (exported["siglip2"] / "files.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "model_type", "dim", "patch", "input_size", "image_size", "size", "tau", "decoder", "stats"),
    [
        ("dinov2", "dinov2_with_registers", 768, 14, 224, 256, "ViT-XL", 0.8,
         "dinov2/wReg_base/ViTXL_n08", "dinov2/wReg_base/imagenet1k"),
        ("dinov2", "dinov2_with_registers", 768, 14, 448, 512, "ViT-XL", 0.8,
         "dinov2/wReg_base/ViTXL_n08_i512", "dinov2/wReg_base/imagenet1k_512"),
        ("siglip2", "siglip_vision_model", 768, 16, 256, 256, "ViT-XL", 0.8,
         "siglip2/base_p16_i256/ViTXL_n08", "siglip2/base_p16_i256/ImageNet1k"),
        ("mae", "vit_mae", 768, 16, 256, 256, "ViT-B", 0.5, "mae/base_p16/ViTB_n05", "mae/base_p16/ImageNet1k"),
        ("siglip_so400m", "siglip_vision_model", 1152, 14, 378, 378, "ViT-L", 0.85,
         "siglip/so400m_p14_i378/ViTL_n085_i378", "siglip/so400m_p14_i378/ImageNet1k_378"),
        ("dinov2", "dinov2", 1024, 14, 224, 256, "ViT-B", 0.0,
         "dinov2/large/ViTB_n0", "dinov2/large/imagenet1k"),
    ],
)  # fmt: skip
def test_names_are_those_of_the_published_collection(
    name, model_type, dim, patch, input_size, image_size, size, tau, decoder, stats
):
    config = SimpleNamespace(model_type=model_type)
    encoder = SimpleNamespace(dim=dim, patch=patch, input_size=input_size, model=SimpleNamespace(config=config))
    found = published.decoder_file(name, encoder, DECODERS[size], tau, image_size)
    assert found == f"decoders/{decoder}/model.pt"
    assert published.statistics_file(name, encoder, image_size) == f"stats/{stats}/stat.pt"


def test_what_is_exported_is_imported_and_scored_alike(data, trained, exported, metrics, tmp_path):
    folder = exported["siglip2"]
    facts, tensors = do_import(data, folder / MODEL["siglip2"], folder / STATS["siglip2"],
                               tmp_path / "autoencoder.safetensors")  # fmt: skip
    first, truth = checkpoints.read(trained["siglip2"] / "autoencoder.safetensors")
    assert facts == first._replace(steps=0)
    assert tensors.keys() == truth.keys() and all(torch.equal(tensors[name], truth[name]) for name in truth)
    assert scored(data, "siglip2", tmp_path, tmp_path / "out") == metrics
    for name in ("features.safetensors", "images.parquet", "reconstructions.png"):
        one, other = tmp_path / "out/reconstruct" / name, data / "scored/reconstruct" / name
        assert one.read_bytes() == other.read_bytes(), name


def edited(exported, tmp_path: Path, edit) -> Path:
    """A model.pt of siglip2 with another state dict."""
    state = torch.load(exported["siglip2"] / MODEL["siglip2"], weights_only=True)
    path = tmp_path / "model.pt"
    torch.save(edit(state), path)
    return path


def test_older_files_of_known_kinds_are_read(data, exported, tmp_path):
    """Without the CLS token, which the original leaves at zero; without the fixed embedding; in half precision."""
    stats, state = exported["siglip2"] / STATS["siglip2"], {}

    def edit(found):
        state.update(found)
        left = ("trainable_cls_token", "decoder_pos_embed")
        return {name: value.half() for name, value in found.items() if name not in left}

    _, tensors = do_import(data, edited(exported, tmp_path, edit), stats, tmp_path / "a.safetensors")
    assert tensors["decoder.trainable_cls_token"].abs().max() == 0 < state["trainable_cls_token"].abs().max()
    assert torch.equal(tensors["decoder.decoder_pos_embed"], state["decoder_pos_embed"])
    weight = tensors["decoder.decoder_pred.weight"]
    assert weight.dtype == torch.float32 and torch.equal(weight, state["decoder_pred.weight"].half().float())


def test_heads_of_a_published_size_need_no_option(data, exported, tmp_path, monkeypatch):
    folder = exported["siglip2"]
    monkeypatch.setitem(DECODERS, "ViT-T", Size(1, 32, 64, 4))
    facts, _ = do_import(data, folder / MODEL["siglip2"], folder / STATS["siglip2"], tmp_path / "a.safetensors",
                         published={})  # fmt: skip
    assert facts.size == (1, 32, 64, 4)


class Code:
    """Pickled, it is a command."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def without(state: dict, name: str) -> dict:
    return {key: value for key, value in state.items() if key != name}


EMBED = "decoder_embed.weight"
BAD = {
    "missing": (lambda state: without(state, "decoder_norm.bias"), "1 missing: decoder_norm.bias"),
    "no layer": (
        lambda state: {key: value for key, value in state.items() if ".0." not in key},
        "no tensor decoder_layers.0.intermediate.dense.weight of 2 dimensions: it has decoder_embed.bias",
    ),
    "unknown": (lambda state: state | {"mask_token": torch.zeros(1)}, "1 unknown: mask_token"),
    "both": (
        lambda state: without(state, "decoder_norm.bias") | {"x": torch.zeros(1), "y": torch.zeros(1)},
        "1 missing: decoder_norm.bias; 2 unknown: x, y",
    ),
    "shape": (
        lambda state: state | {"decoder_norm.bias": torch.zeros(5)},
        r"decoder_norm.bias is \[5\], expected \[32\]",
    ),
    "prefix": (
        lambda state: {f"decoder.{key}": value for key, value in state.items()},
        "no tensor decoder_embed.weight of 2 dimensions: it has decoder.decoder_embed.bias",
    ),
    "another encoder": (
        lambda state: state | {EMBED: torch.zeros(32, 48)},
        "decodes latents of width 48, the encoder gives 32",
    ),
    "another grid": (
        lambda state: state | {"decoder_pos_embed": torch.zeros(1, 26, 32)},
        "decodes 25 latents a picture, the encoder gives 4 x 4",
    ),
    "another image size": (
        lambda state: state | {"decoder_pred.weight": torch.zeros(16 * 16 * 3, 32)},
        "draws 768 values a patch, 64 pixels a side at the encoder's grid of 4; rae.image_size is 32",
    ),
    "training checkpoint": (
        lambda state: {"model": state, "ema": state, "step": 3},
        "no state dict of a decoder, but ema, model, step",
    ),
    "a list": (lambda state: list(state.values()), "no state dict of a decoder, but list"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_decoder_that_does_not_fit_is_refused(data, exported, tmp_path, kind):
    edit, message = BAD[kind]
    path = edited(exported, tmp_path, edit)
    with pytest.raises(KilnError, match=message) as error:
        do_import(data, path, exported["siglip2"] / STATS["siglip2"], tmp_path / "out/autoencoder.safetensors")
    assert str(path) in error.value.message and not (tmp_path / "out").exists()


def test_heads_that_no_shape_shows_are_asked_for(data, exported, tmp_path):
    folder = exported["siglip2"]
    with pytest.raises(KilnError, match="1 layers of width 32 and MLP 64 are none of ViT-B, ViT-L, ViT-XL") as error:
        do_import(data, folder / MODEL["siglip2"], folder / STATS["siglip2"], tmp_path / "out/a.safetensors",
                  published={})  # fmt: skip
    assert "rae.published.<encoder>.heads" in error.value.hint and not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["model.pt", "stat.pt"])
def test_a_pickle_with_code_is_not_run(data, exported, tmp_path, which):
    torch.save({"mean": Code(tmp_path / "ran"), "var": torch.zeros(1)}, tmp_path / which)
    paths = {"model.pt": exported["siglip2"] / MODEL["siglip2"], "stat.pt": exported["siglip2"] / STATS["siglip2"]}
    paths[which] = tmp_path / which
    with pytest.raises(KilnError, match=f"{which}: .*more than tensors") as error:
        do_import(data, *paths.values(), tmp_path / "out/a.safetensors")
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["model.pt", "stat.pt"])
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_named(data, exported, tmp_path, which, share):
    paths = {"model.pt": exported["siglip2"] / MODEL["siglip2"], "stat.pt": exported["siglip2"] / STATS["siglip2"]}
    content = paths[which].read_bytes()
    paths[which] = tmp_path / which
    paths[which].write_bytes(content[: int(share * len(content))])
    with pytest.raises(KilnError, match=re.escape(str(paths[which]))):
        do_import(data, *paths.values(), tmp_path / "out/a.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"mean": torch.zeros(32, 5, 5), "var": torch.ones(32, 5, 5)}, r"shape \[32, 5, 5\], expected \[32, 4, 4\]"),
        ({"mean": torch.zeros(32, 4, 4)}, "expected {mean, var}"),
        ({"mean": torch.zeros(32, 4, 4), "var": -torch.ones(32, 4, 4)}, "impossible values"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(data, exported, tmp_path, stored, message):
    torch.save(stored, tmp_path / "stat.pt")
    with pytest.raises(KilnError, match=message) as error:
        do_import(data, exported["siglip2"] / MODEL["siglip2"], tmp_path / "stat.pt", tmp_path / "out/a.safetensors")
    assert str(tmp_path / "stat.pt") in error.value.message and not (tmp_path / "out").exists()


def test_an_encoder_of_another_width_is_refused(data, exported, tmp_path):
    wide = SiglipVisionConfig(image_size=32, patch_size=8, intermediate_size=64, **SIZES | {"hidden_size": 64})
    SiglipVisionModel(wide).save_pretrained(tmp_path / "wide")
    SiglipImageProcessor().save_pretrained(tmp_path / "wide")
    folder = exported["siglip2"]
    with pytest.raises(KilnError, match="decodes latents of width 32, the encoder gives 64"):
        do_import(data, folder / MODEL["siglip2"], folder / STATS["siglip2"], tmp_path / "out/a.safetensors",
                  encoder=tmp_path / "wide")  # fmt: skip
    with pytest.raises(KilnError, match="missing.pt: no such file"):
        do_import(data, tmp_path / "missing.pt", folder / STATS["siglip2"], tmp_path / "out/a.safetensors")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"encoder": "dinov2"}, "trained on encoder siglip2"),
        ({"training-meta": "arrow/summary.json"}, r"summary\.json: no settings, code, git_commit"),
        ({"checkpoint": "siglip2.pt"}, r"siglip2\.pt: no checkpoint of an autoencoder"),
        ({"checkpoint": "nothing"}, "nothing: no such file"),
    ],
)
def test_a_bad_export_leaves_nothing(data, trained, tmp_path, changed, message):
    changed = {key: data / value for key, value in changed.items()}
    with pytest.raises(KilnError, match=message):
        do_export(data, trained, "siglip2", tmp_path / "out/model", **changed)
    assert not (tmp_path / "out").exists()


def test_the_folder_loads_as_the_checkpoint_does(data, trained, exported):
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    for name in INPUT:
        one, facts = checkpoints.load(trained[name] / "autoencoder.safetensors", data / name)
        other = exports.load(str(exported[name]), str(data / name))
        with torch.no_grad():
            assert torch.equal(one(images), other(images))
        assert other.noise_tau == facts.tau and not other.training


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{}", r"config\.json: not that of an exported autoencoder \(KeyError: 'encoder'\)"),
        ("config.json", b"[", r"config\.json: not JSON"),
        ("decoder.safetensors", b"abc", r"decoder\.safetensors: unreadable weights"),
        ("statistics.safetensors", b"", r"statistics\.safetensors: unreadable weights"),
        ("decoder.safetensors", "statistics.safetensors", "not the decoder that it describes"),
        ("statistics.safetensors", "decoder.safetensors", "no latent statistics"),
    ],
)
def test_a_damaged_folder_is_named(data, exported, tmp_path, file, content, message):
    folder = shutil.copytree(exported["siglip2"], tmp_path / "model")
    (folder / file).write_bytes((folder / content).read_bytes() if isinstance(content, str) else content)
    with pytest.raises(KilnError, match=message) as error:
        exports.load(folder, data / "siglip2")
    assert str(folder) in error.value.message


def test_a_folder_of_the_other_encoder_is_refused(data, exported):
    with pytest.raises(KilnError, match="trained on encoder siglip2"):
        exports.load(exported["siglip2"], data / "dinov2")


def test_an_encoder_is_the_same_with_and_without_a_listing(data, tmp_path):
    """The folder that Kiln retrieves has a files.json, one that a user downloads has none."""
    folder = shutil.copytree(data / "siglip2", tmp_path / "encoder")
    names = ("config.json", "model.safetensors", "preprocessor_config.json")
    listing = {name: {"bytes": 1, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()} for name in names}
    (folder / "files.json").write_text(json.dumps(listing))
    assert checkpoints.identity(folder) == checkpoints.identity(data / "siglip2")
    (folder / "files.json").write_text(json.dumps({name: {} for name in names}))  # as of links, without hashes
    assert checkpoints.identity(folder) == checkpoints.identity(data / "siglip2")
    assert checkpoints.identity(folder) != checkpoints.identity(data / "dinov2")


def test_training_starts_from_a_published_decoder_as_from_ours(data, trained, exported, tmp_path):
    short = {"epochs": 2, "discriminator_start": 2, "gan_start": 2}
    starts = {"ours": trained["siglip2"] / "autoencoder.safetensors", "theirs": exported["siglip2"] / MODEL["siglip2"]}
    for name, path in starts.items():
        train_autoencoder.main(training(data, "siglip2", tmp_path / name, init_from=str(path), **short))
    ours, theirs = ((tmp_path / name / "autoencoder.safetensors").read_bytes() for name in starts)
    assert ours == theirs
    start = json.loads((tmp_path / "ours/metrics.json").read_text())["history"][0]["l1"]
    scratch = json.loads((trained["siglip2"] / "metrics.json").read_text())["history"][0]["l1"]
    assert start < 0.8 * scratch


def describe(data: Path, exported: dict, out: Path, *extra, **changed) -> str:
    """The card's text."""
    options = {
        "metrics": data / "scored/metrics.json", "training-meta": data / "train_siglip2/meta.json",
        "dataset": data / "arrow/summary.json", "sheet": data / "scored/reconstruct/reconstructions.png",
        "weights": exported["siglip2"], "base-name": "siglip2-base-patch16-256", "licence": "Apache-2.0",
        "output-folder": out, "meta": out / "meta.json",
    }  # fmt: skip
    options |= {name.replace("_", "-"): value for name, value in changed.items()}
    describe_model.main([*(str(text) for name, value in options.items() for text in (f"--{name}", value)), *extra])
    return (out / "README.md").read_text(encoding="utf-8")


def test_the_card_states_what_a_reader_needs(data, exported, metrics, tmp_path):
    text = describe(data, exported, tmp_path / "card", hub_name="google/siglip2-base-patch16-256")
    card = ModelCard.load(tmp_path / "card/README.md").data
    assert (card.base_model, card.license) == ("google/siglip2-base-patch16-256", "apache-2.0")
    summary = metrics["summary"]
    psnr, rfid = summary["siglip2_psnr"], summary["siglip2_rfid"]
    row = "| PSNR (dB) | {:.4g} | {:.4g} to {:.4g} | 20 | {:.4g} (constant) |"
    assert row.format(psnr["value"], *psnr["ci95"], psnr["baseline"]) in text
    row = "| rFID (lower is better) | {:.4g} | {:.4g} to {:.4g} | 20 | {:.4g} (shrunk input) |"
    assert row.format(rfid["value"], *rfid["ci95"], rfid["baseline"]) in text
    assert "| SSIM | " in text and "| LPIPS (lower is better) | " in text
    for warning in metrics["warnings"]:
        assert warning in text
    assert "**This rFID compares with no published one**" in text and "**This LPIPS compares with no other**" in text
    assert metrics["features"]["weights"][:12] in text and "0.57" in text
    assert "100 images of 2 classes. Validation: 20 images, a split of its own. Quarantined: 0." in text
    assert "32 x 4 x 4 latents" in text and "tau = 0.8" in text and "Licence of the encoder: Apache-2.0" in text
    assert "batch_size: 24" in text and "![Pictures and their reconstructions](reconstructions.png)" in text
    assert str(data) not in text and str(tmp_path) not in text


def test_the_folder_of_the_card_is_what_one_uploads(data, exported, metrics, tmp_path):
    text = describe(data, exported, tmp_path / "card")
    folder = tmp_path / "card/model"
    listing = json.loads((folder / "files.json").read_text())
    assert listing.keys() == json.loads((exported["siglip2"] / "files.json").read_text()).keys() | {
        "README.md", "reconstructions.png",
    }  # fmt: skip
    for name, one in listing.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == one["sha256"], name
    assert (folder / "README.md").read_text() == text
    assert (folder / MODEL["siglip2"]).resolve() == (exported["siglip2"] / MODEL["siglip2"]).resolve()


def test_the_cards_three_lines_run(data, trained, exported, metrics, tmp_path):
    text = describe(data, exported, tmp_path / "card", hub_name="google/siglip2-base-patch16-256")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippet.count("\n") == 3
    (tmp_path / "rae-siglip2").symlink_to(tmp_path / "card/model")
    (tmp_path / "siglip2-base-patch16-256").symlink_to(data / "siglip2")
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    torch.save(images, tmp_path / "images.pt")
    program = f"import torch\nimages = torch.load('images.pt')\n{snippet}\ntorch.save(reconstructions, 'made.pt')"
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                   check=True, timeout=300)  # fmt: skip
    autoencoder, _ = checkpoints.load(trained["siglip2"] / "autoencoder.safetensors", data / "siglip2")
    with torch.no_grad():
        expected = autoencoder(images)
    torch.testing.assert_close(torch.load(tmp_path / "made.pt"), expected, rtol=1e-4, atol=1e-5)


def test_the_card_tells_of_a_cut_split_and_of_demo_data(data, exported, metrics, tmp_path):
    summary = json.loads((data / "arrow/summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"validation": "cut from train"}))
    text = describe(data, exported, tmp_path / "card", "--demo", dataset=tmp_path / "summary.json",
                    base_name="a model given as a folder", licence="unknown")  # fmt: skip
    assert "**cut from the training images**" in text and "Demo data" in text and "0.57" not in text
    assert "Starting point: a model given as a folder." in text and '"rae-siglip2", "encoder"' in text


def test_scores_by_the_papers_protocol_carry_no_warning(data, exported, metrics, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps(metrics | {"warnings": []}))
    assert "compares with no published one" not in describe(
        data, exported, tmp_path / "card", metrics=tmp_path / "metrics.json"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"metrics": "arrow/summary.json"}, r"summary\.json: no summary, warnings, features"),
        ({"dataset": "scored/metrics.json"}, r"metrics\.json: no splits"),
        ({"weights": "siglip2"}, "files.json: no such file"),
        ({"sheet": "nothing"}, "nothing: no such file"),
        ({"base-name": "/home/x/model"}, "a path"),
        ({"hub-name": "/home/x/model"}, "no name on the Hub"),
    ],
)
def test_a_bad_card_is_not_written(data, exported, metrics, tmp_path, changed, message):
    changed = {key: value if key.endswith("name") else data / value for key, value in changed.items()}
    with pytest.raises(KilnError, match=message):
        describe(data, exported, tmp_path / "card", **changed)
    assert not (tmp_path / "card/README.md").exists() and not (tmp_path / "card/model").exists()


def test_decoder_and_statistics_are_set_together():
    with pytest.raises(ValueError, match="decoder and stats belong together"):
        PublishedSettings(decoder="model.pt")
    own = RaeSettings.model_validate(
        {"published": {"dinov2": {"tau": 0.5}}, "encoders": {"dinov2": {"input_size": 448}}}
    )
    assert own.published.dinov2 == RaeSettings().published.dinov2.model_copy(update={"tau": 0.5})
    assert own.encoders.dinov2 == RaeSettings().encoders.dinov2.model_copy(update={"input_size": 448})
    assert published_encoders(RaeSettings()) == ["dinov2", "siglip2"]
    with pytest.raises(KilnError, match="rae.published.siglip_so400m: no published decoder") as error:
        published_encoders(RaeSettings(use=["dinov2", "siglip_so400m"]))
    assert "rae.published.siglip_so400m.decoder" in error.value.hint


def test_published_decoders_are_planned_without_training(tmp_path):
    draw_images(tmp_path / "run/data/imagenet", 6)
    steps = ("build_arrow", "compute_reference_stats", "import_published", "reconstruct_published", "score_published")
    both = dict.fromkeys(steps, 2) | {"build_arrow": 1, "compute_reference_stats": 1}
    planned = workflow.planned(ROOT, tmp_path / "run", "rae_evaluate_published")
    # two encoders, two decoders, two statistics, VGG16 and Inception
    assert planned == {f"rae_{name}": n for name, n in both.items()} | {"retrieve_model": 8}
    done = workflow.run(ROOT, tmp_path / "run", "--dry-run", "rae_evaluate_published", "--config",
                        "set=rae.use=[siglip_so400m]", check=False)  # fmt: skip
    assert done.returncode and "no published decoder is known for encoder siglip_so400m" in done.stdout + done.stderr


@pytest.mark.slow(minutes=2)
def test_the_rules_evaluate_a_users_decoder_without_training(data, trained, exported, metrics, tmp_path):
    folder, values = exported["siglip2"], ("light", "cpu", "gpu_single")
    rae = {
        "images": str(data / "images"), "use": ["siglip2"], "image_size": SIDE, "perceptual": PERCEPTUAL,
        "encoders": {"siglip2": {"model": str(data / "siglip2"), "input_size": INPUT["siglip2"]}},
        "decoder": TRAIN["decoder"], "dataset": {"images_per_shard": 30}, "evaluate": EVALUATE,
        "resources": "gpu_single",
    }  # fmt: skip
    classes = dict.fromkeys(values, {"threads": 1, "mem_mb": 1000})
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"results": "results", "device": "cpu", "resources": classes, "rae": rae}))
    paths = {"decoder": folder / MODEL["siglip2"], "stats": folder / STATS["siglip2"], "heads": 2}
    own = " ".join(f"rae.published.siglip2.{key}={value}" for key, value in paths.items())
    wanted = ("rae_evaluate_published", "--configfile", str(config), "--config", f"set={own}")
    steps = ("build_arrow", "compute_reference_stats", "import_published", "reconstruct_published", "score_published")
    assert workflow.planned(ROOT, tmp_path, *wanted) == {f"rae_{name}": 1 for name in steps}
    workflow.run(ROOT, tmp_path, *wanted)
    results = tmp_path / "results/rae"
    assert json.loads((results / "evaluate_published/siglip2/metrics.json").read_text()) == metrics
    for name in ("features.safetensors", "images.parquet", "reconstructions.png"):
        one, other = results / "reconstruct_published/siglip2" / name, data / "scored/reconstruct" / name
        assert one.read_bytes() == other.read_bytes(), name
    assert workflow.planned(ROOT, tmp_path, *wanted) == {}
