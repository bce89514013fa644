"""The autoencoder's parts against float64 references written from the published equations."""

import io
import json
import math
import pickle

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from scripts.common.errors import KilnError
from scripts.rae.autoencoder import Autoencoder, add_noise
from scripts.rae.decoder import DECODERS, Decoder, Size, position_embedding, unpatchify
from scripts.rae.encoder import Encoder
from scripts.rae.latent_stats import Moments, merge, read_statistics, write_statistics

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "image_size": 20}
TINY = Size(layers=2, width=24, mlp=40, heads=3)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def randomised(module, scale=0.3):
    """Every parameter drawn anew, norms and tokens too, so that none may be left out unnoticed."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def tiny_model(kind):
    dino = {**SHAPE, "mlp_ratio": 2, "layer_norm_eps": 1e-3}
    siglip = {**SHAPE, "intermediate_size": 32, "layer_norm_eps": 1e-3}
    text = {**SHAPE, "intermediate_size": 32, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    match kind:
        case "registers":
            config = transformers.Dinov2WithRegistersConfig(**dino, num_register_tokens=3)
            return transformers.Dinov2WithRegistersModel(config)
        case "dinov2":
            return transformers.Dinov2Model(transformers.Dinov2Config(**dino))
        case "siglip":
            return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**siglip))
        case "siglip_full":
            return transformers.SiglipModel(transformers.SiglipConfig(vision_config=siglip, text_config=text))
        case "mae":
            decoder = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32}
            decoder = {f"decoder_{name}": value for name, value in decoder.items()}
            return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**siglip, **decoder))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder} of tiny random models with their image processors."""
    made = {}
    for kind in ("registers", "dinov2", "siglip", "siglip_full", "mae"):
        made[kind] = tmp_path_factory.mktemp("models") / kind
        randomised(tiny_model(kind)).save_pretrained(made[kind])
        processor = transformers.SiglipImageProcessor if "siglip" in kind else transformers.BitImageProcessor
        processor(image_mean=MEAN, image_std=STD).save_pretrained(made[kind])
    return made


def pictures(count=2, size=20, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((count, 3, size, size)))


# References, float64


def norm(x, weight=1.0, bias=0.0, eps=1e-3):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def gelu_erf(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attend(q, k, v, heads):
    outputs = []
    for q1, k1, v1 in zip(*(x.chunk(heads, dim=-1) for x in (q, k, v)), strict=True):
        scores = torch.exp(q1 @ k1.transpose(1, 2) / math.sqrt(q1.shape[-1]))
        outputs.append(scores / scores.sum(-1, keepdim=True) @ v1)
    return torch.cat(outputs, dim=-1)


def kernel_matrix(source, target, kernel, reach):
    """[target, source] weights of a resize by `kernel`, pixel centres aligned, edges repeated, no antialiasing."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        if reach == 1:
            centre = min(max(centre, 0.0), source - 1.0)
        for tap in range(math.floor(centre) - reach + 1, math.floor(centre) + reach + 1):
            matrix[row, min(max(tap, 0), source - 1)] += kernel(abs(centre - tap))
    return matrix


def cubic(distance, a=-0.75):
    """Keys, Cubic convolution interpolation for digital image processing, 1981."""
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0


def resized(x, size, kernel, reach):
    matrix = kernel_matrix(x.shape[-1], size, kernel, reach)
    return matrix @ x @ matrix.T


def linear(w, name):
    return lambda x: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def patch_tokens(w, name, images):
    """Each 4 x 4 patch times the kernel, row by row: [B,N,16]."""
    normalised = (images - torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1)) / torch.tensor(
        STD, dtype=torch.float64
    ).view(3, 1, 1)
    grid = images.shape[-1] // 4
    weight = w[f"{name}.weight"].flatten(1)
    columns = []
    for row in range(grid):
        for column in range(grid):
            part = normalised[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            columns.append(part.flatten(1) @ weight.T + w[f"{name}.bias"])
    return torch.stack(columns, dim=1)


def encode_dino(w, images, registers):
    x = patch_tokens(w, "embeddings.patch_embeddings.projection", images)
    x = torch.cat([w["embeddings.cls_token"].expand(len(x), -1, -1), x], dim=1) + w["embeddings.position_embeddings"]
    if registers:
        x = torch.cat([x[:, :1], w["embeddings.register_tokens"].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    for i in range(2):
        block = f"encoder.layer.{i}"
        h = norm(x, w[f"{block}.norm1.weight"], w[f"{block}.norm1.bias"])
        q, k, v = (linear(w, f"{block}.attention.{name}_proj")(h) for name in "qkv")
        x = x + w[f"{block}.layer_scale1.lambda1"] * linear(w, f"{block}.attention.o_proj")(attend(q, k, v, 2))
        h = norm(x, w[f"{block}.norm2.weight"], w[f"{block}.norm2.bias"])
        h = linear(w, f"{block}.mlp.fc2")(gelu_erf(linear(w, f"{block}.mlp.fc1")(h)))
        x = x + w[f"{block}.layer_scale2.lambda1"] * h
    return norm(x)[:, 1 + registers :]


def encode_siglip(w, images):
    x = patch_tokens(w, "embeddings.patch_embedding", images) + w["embeddings.position_embedding.weight"]
    for i in range(2):
        block = f"encoder.layers.{i}"
        h = norm(x, w[f"{block}.layer_norm1.weight"], w[f"{block}.layer_norm1.bias"])
        q, k, v = (linear(w, f"{block}.self_attn.{name}_proj")(h) for name in "qkv")
        x = x + linear(w, f"{block}.self_attn.out_proj")(attend(q, k, v, 2))
        h = norm(x, w[f"{block}.layer_norm2.weight"], w[f"{block}.layer_norm2.bias"])
        x = x + linear(w, f"{block}.mlp.fc2")(gelu_tanh(linear(w, f"{block}.mlp.fc1")(h)))
    return norm(x)


def encode_mae(w, images):
    position = w["embeddings.position_embeddings"]
    x = patch_tokens(w, "embeddings.patch_embeddings.projection", images) + position[:, 1:]
    x = torch.cat([(w["embeddings.cls_token"] + position[:, :1]).expand(len(x), -1, -1), x], dim=1)
    for i in range(2):
        block = f"layers.{i}"
        h = norm(x, w[f"{block}.layernorm_before.weight"], w[f"{block}.layernorm_before.bias"])
        q, k, v = (linear(w, f"{block}.attention.{name}_proj")(h) for name in "qkv")
        x = x + linear(w, f"{block}.attention.o_proj")(attend(q, k, v, 2))
        h = norm(x, w[f"{block}.layernorm_after.weight"], w[f"{block}.layernorm_after.bias"])
        x = x + linear(w, f"{block}.mlp.fc2")(gelu_erf(linear(w, f"{block}.mlp.fc1")(h)))
    return norm(x)[:, 1:]


def reference_latents(kind, images):
    """Tokens in rows of the image, from weights that transformers itself loads: [B,16,5,5]."""
    model = tiny_model(kind)
    w = {name: value.double() for name, value in randomised(model).state_dict().items()}
    for tower in ("vision_model.", "vit."):
        w |= {name.removeprefix(tower): value for name, value in w.items() if name.startswith(tower)}
    if "siglip" in kind:
        tokens = encode_siglip(w, images)
    else:
        tokens = encode_mae(w, images) if kind == "mae" else encode_dino(w, images, 3 * (kind == "registers"))
    return tokens.transpose(1, 2).unflatten(2, (5, 5))


def decode_reference(w, latents, grid, size=TINY):
    """[B,grid*grid,patch*patch*3] from weights named as published."""
    if latents.shape[-1] != grid:
        latents = resized(latents, grid, lambda distance: max(0.0, 1 - distance), 1)
    x = linear(w, "decoder_embed")(latents.flatten(2).transpose(1, 2))
    x = torch.cat([w["trainable_cls_token"].expand(len(x), -1, -1), x], dim=1) + w["decoder_pos_embed"]
    for i in range(size.layers):
        block = f"decoder_layers.{i}"
        h = norm(x, w[f"{block}.layernorm_before.weight"], w[f"{block}.layernorm_before.bias"], 1e-12)
        q, k, v = (linear(w, f"{block}.attention.attention.{name}")(h) for name in ("query", "key", "value"))
        x = x + linear(w, f"{block}.attention.output.dense")(attend(q, k, v, size.heads))
        h = norm(x, w[f"{block}.layernorm_after.weight"], w[f"{block}.layernorm_after.bias"], 1e-12)
        x = x + linear(w, f"{block}.output.dense")(gelu_erf(linear(w, f"{block}.intermediate.dense")(h)))
    x = norm(x, w["decoder_norm.weight"], w["decoder_norm.bias"], 1e-12)
    return linear(w, "decoder_pred")(x)[:, 1:]


def assert_near(got, expected, tolerance=1e-10):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# Encoder


@pytest.mark.parametrize(
    "kind, prefix", [("registers", 4), ("dinov2", 1), ("siglip", 0), ("siglip_full", 0), ("mae", 1)]
)
def test_encoder_equals_its_equations(folders, kind, prefix):
    encoder = Encoder(folders[kind])
    assert (encoder.dim, encoder.patch, encoder.prefix_tokens, encoder.grid) == (16, 4, prefix, 5)
    images = pictures()
    single = encoder(images.float())
    assert encoder.mean.equal(torch.tensor(MEAN)) and encoder.std.equal(torch.tensor(STD))
    encoder.double()
    encoder.mean, encoder.std = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, STD))
    expected = reference_latents(kind, images)
    assert_near(encoder(images), expected)
    assert_near(single, expected.float(), 1e-4)


def test_encoder_resizes_bicubically_without_antialiasing(folders):
    encoder = Encoder(folders["siglip"]).double()
    for size in (13, 31, 40):
        images = pictures(size=size)
        expected = encoder(resized(images, 20, cubic, 2))
        assert_near(encoder(images), expected)


@pytest.mark.parametrize("kind", ["registers", "dinov2", "siglip", "siglip_full", "mae"])
def test_another_input_size_gives_another_grid(folders, kind):
    for size, grid in ((24, 6), (12, 3)):
        encoder = Encoder(folders[kind], input_size=size)
        latents = encoder(pictures().float())
        assert encoder.grid == grid and latents.shape == (2, 16, grid, grid)
        assert_near(latents.mean(1), torch.zeros(2, grid, grid), 1e-5)


def test_encoder_is_frozen_and_stays_in_evaluation_mode(folders):
    encoder = Encoder(folders["registers"])
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    images = pictures().float().requires_grad_()
    assert not encoder(images).requires_grad and not any(p.requires_grad for p in encoder.parameters())


def broken(folders, tmp_path, change, kind="registers"):
    """The error of an encoder whose folder `change` has altered."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in folders[kind].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    with pytest.raises(KilnError) as caught:
        Encoder(folder)
    assert str(folder) in caught.value.message
    return caught.value


def edit_json(name, **changes):
    def change(folder):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(values | changes))

    return change


def drop_tensor(folder):
    state = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(state) if "layer.1" in name)
    save_file({k: v for k, v in state.items() if k != name}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "no image processor"),
        (edit_json("preprocessor_config.json", image_std=[0.2, 0.0, 0.2]), "std"),
        (edit_json("config.json", model_type="resnet"), "'resnet' is no encoder; known are dinov2,"),
        (edit_json("config.json", model_type="nosuchthing"), "known are dinov2,"),
        (edit_json("config.json", hidden_size=32), "do not load"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"nonsense"), "do not load"),
        (drop_tensor, "lack 1 tensors"),
    ],
)
def test_a_damaged_model_is_refused(folders, tmp_path, change, said):
    assert said in broken(folders, tmp_path, change).message


@pytest.mark.parametrize("size, near", [(22, "20 or 24"), (3, "4"), (0, "4")])
def test_an_input_size_off_the_patch_names_those_that_fit(folders, size, near):
    with pytest.raises(KilnError) as caught:
        Encoder(folders["siglip"], input_size=size)
    assert f"size {size} is no multiple of the model's patch 4" in caught.value.message
    assert caught.value.hint.endswith(f"to {near}")


@pytest.mark.parametrize("shape", [(3, 20, 20), (1, 1, 20, 20), (1, 3, 20, 24)])
def test_encoder_refuses_what_is_no_square_rgb_batch(folders, shape):
    with pytest.raises(KilnError, match=r"expected \[B, 3, S, S\]"):
        Encoder(folders["siglip"])(torch.rand(shape))


# Decoder


@pytest.mark.parametrize("latent_grid", [4, 3, 7])
def test_decoder_equals_its_equations(latent_grid):
    decoder = randomised(Decoder(6, grid=4, image_size=20, size=TINY)).double()
    latents = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 6, latent_grid, latent_grid)))
    patches = decoder(latents)
    assert patches.shape == (2, 16, 75)
    assert_near(patches, decode_reference(decoder.state_dict(), latents, 4))


def test_decoder_equals_the_installed_mae_decoder():
    """transformers' own, whose CLS comes from the latents: with a latent of zeros it is the embedding's bias."""
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder

    config = transformers.ViTMAEConfig(
        hidden_size=6, patch_size=5, layer_norm_eps=1e-12, decoder_hidden_size=24, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3, decoder_intermediate_size=40, attn_implementation="eager",
    )  # fmt: skip
    ours, theirs = randomised(Decoder(6, 4, 20, TINY)), ViTMAEDecoder(config, num_patches=16).eval()
    ours.trainable_cls_token.data = ours.decoder_embed.bias.data[None, None].clone()
    names = {
        "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
    }  # fmt: skip
    state = {"mask_token": theirs.mask_token, "decoder_pos_embed": theirs.decoder_pos_embed.clone()}
    for name, value in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(f".{old}.", f".{new}.")
        state.setdefault(name, value)
    del state["trainable_cls_token"]
    theirs.load_state_dict(state)
    latents = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    tokens = torch.cat([torch.zeros(2, 1, 6), latents.flatten(2).transpose(1, 2)], dim=1)
    expected = theirs(tokens, ids_restore=torch.arange(16).expand(2, -1)).logits
    assert_near(ours(latents), expected, 1e-4)


@pytest.mark.parametrize("name, millions", [("ViT-B", 86.2), ("ViT-L", 303.9), ("ViT-XL", 415.1)])
def test_decoders_have_the_published_parameter_counts(name, millions):
    with torch.device("meta"):
        decoder = Decoder(768, grid=16, image_size=256, size=DECODERS[name])
    assert decoder.patch == 16
    assert round(sum(p.numel() for p in decoder.parameters()) / 1e6, 1) == millions


def test_decoder_names_are_those_of_published_checkpoints():
    layers = ("decoder_embed", "decoder_norm", "decoder_pred")
    parts = (
        "attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense",
        "intermediate.dense", "output.dense", "layernorm_before", "layernorm_after",
    )  # fmt: skip
    layers += tuple(f"decoder_layers.{i}.{part}" for i in range(2) for part in parts)
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    decoder = Decoder(6, 4, 20, TINY)
    assert set(decoder.state_dict()) == expected | {"trainable_cls_token", "decoder_pos_embed"}
    assert set(dict(decoder.named_parameters())) == expected | {"trainable_cls_token"}
    assert decoder.decoder_pos_embed.shape == (1, 17, 24) and not decoder.trainable_cls_token.any()


@pytest.mark.parametrize("width, grid", [(4, 1), (12, 3), (24, 5)])
def test_position_embedding_by_its_formula(width, grid):
    table = position_embedding(width, grid)
    assert table.shape == (1, 1 + grid * grid, width) and not table[0, 0].any()
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                rate = 1 / 10000 ** (i / quarter)
                expected = [f(at * rate) for at in (column, row) for f in (math.sin, math.cos)]
                got = table[0, 1 + row * grid + column, i::quarter]
                assert got.tolist() == pytest.approx(expected, abs=1e-7)


def test_unpatchify_puts_every_value_in_its_place():
    patches = torch.arange(2 * 9 * 12).reshape(2, 9, 12)
    images = unpatchify(patches, 2)
    assert images.shape == (2, 3, 6, 6)
    for y in range(6):
        for x in range(6):
            for colour in range(3):
                expected = patches[:, y // 2 * 3 + x // 2, (y % 2 * 2 + x % 2) * 3 + colour]
                assert images[:, colour, y, x].equal(expected)


@pytest.mark.parametrize(
    "grid, image_size, hint", [(16, 250, "240 or 256"), (27, 378, None), (16, 5, "16"), (5, 0, "5")]
)
def test_the_patch_is_derived_or_refused(grid, image_size, hint):
    if hint is None:
        assert Decoder(6, grid, image_size, TINY).patch == 14
        return
    with pytest.raises(KilnError, match=f"image size {image_size} is no multiple") as caught:
        Decoder(6, grid, image_size, TINY)
    assert f"image_size to {hint}," in caught.value.hint


def test_decoder_refuses_other_shapes():
    for size in (TINY._replace(width=26, heads=2), TINY._replace(heads=5)):
        with pytest.raises(KilnError, match=f"width {size.width} is no multiple"):
            Decoder(6, 4, 20, size)
    with pytest.raises(KilnError, match=r"shape \[1, 7, 4, 4\], expected \[B, 6, h, w\]"):
        Decoder(6, 4, 20, TINY)(torch.zeros(1, 7, 4, 4))


# Autoencoder


def autoencoder(folder, tau=0.0, with_statistics=True, image_size=40):
    encoder = Encoder(folder)
    rng = np.random.default_rng(3)
    mean, var = torch.from_numpy(rng.normal(size=(16, 5, 5))), torch.from_numpy(rng.random((16, 5, 5)) * 3)
    var[0, 0, 0] = 0.0  # a constant latent stays finite
    statistics = (mean.float(), var.float()) if with_statistics else ()
    return Autoencoder(encoder, randomised(Decoder(16, 5, image_size, TINY), 0.5), tau, *statistics).double()


@pytest.mark.parametrize("with_statistics", [True, False])
def test_autoencoder_equals_its_equations(folders, with_statistics):
    model = autoencoder(folders["registers"], with_statistics=with_statistics).eval()
    images = pictures()
    raw = model.encoder(images)
    scaled = (raw - model.latent_mean) / (model.latent_var + 1e-5) ** 0.5 if with_statistics else raw
    assert_near(model.encode(images), scaled)
    patches = decode_reference(model.decoder.state_dict(), raw, 5)
    expected = unpatchify(patches, 8) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert expected.min() < -0.1 and expected.max() > 1.1  # nothing is clamped
    assert_near(model.decode(scaled), expected, 1e-8)
    assert_near(model(images), expected, 1e-8)
    assert model(images).shape == (2, 3, 40, 40)


def test_golden_shapes_of_the_published_grid(tmp_path, folders):
    """224 px and patch 14 give a grid of 16, and a decoder of patch 16 gives 256 px."""
    config = {**SHAPE, "patch_size": 14, "image_size": 518, "mlp_ratio": 2}
    model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**config))
    model.save_pretrained(tmp_path)
    transformers.BitImageProcessor().save_pretrained(tmp_path)
    encoder = Encoder(tmp_path, input_size=224)
    model = Autoencoder(encoder, Decoder(encoder.dim, encoder.grid, 256, TINY)).eval()
    images = pictures(1, 256).float()
    assert (encoder.grid, encoder.prefix_tokens, model.decoder.patch) == (16, 5, 16)
    assert model.encode(images).shape == (1, 16, 16, 16) and model(images).shape == images.shape
    with pytest.raises(KilnError, match="image size 256 is no multiple of the encoder's grid of 37"):
        Decoder(encoder.dim, Encoder(tmp_path).grid, 256, TINY)


def test_noise_comes_in_training_only_and_before_the_statistics(folders):
    model = autoencoder(folders["siglip"], tau=0.8)
    images = pictures(3)
    clean = model.eval().encode(images, torch.Generator().manual_seed(5))
    noisy = model.train().encode(images, torch.Generator().manual_seed(5))
    assert noisy.equal(model.encode(images, torch.Generator().manual_seed(5)))
    assert not noisy.equal(model.encode(images, torch.Generator().manual_seed(6)))
    noise = add_noise(torch.zeros(3, 16, 5, 5, dtype=torch.float64), 0.8, torch.Generator().manual_seed(5))
    assert_near(noisy, clean + noise / (model.latent_var + 1e-5).sqrt())
    model.noise_tau, generator = 0.0, torch.Generator().manual_seed(5)
    before = generator.get_state()
    assert model.encode(images, generator).equal(clean) and generator.get_state().equal(before)


def test_noise_is_normal_with_a_uniform_scale_per_sample():
    noise = add_noise(torch.full((600, 8, 16, 16), 3.0), 0.8, torch.Generator().manual_seed(0)).double() - 3
    sigma = noise.flatten(1).std(dim=1)
    assert scipy.stats.kstest(sigma, scipy.stats.uniform(0, 0.8).cdf).pvalue > 0.01
    assert noise.square().mean() == pytest.approx(0.8**2 / 3, rel=0.1)
    one_each = (noise / sigma[:, None, None, None])[:, 0, 0, 0]
    assert scipy.stats.kstest(one_each, "norm").pvalue > 0.01
    scales = noise.flatten(1).chunk(2, dim=1)
    assert_near(scales[0].std(dim=1), scales[1].std(dim=1), 0.15)  # one scale for all of a sample


def test_noise_without_a_generator_follows_the_global_seed():
    torch.manual_seed(3)
    first = add_noise(torch.zeros(2, 1, 2, 2), 1.0)
    torch.manual_seed(3)
    assert first.equal(add_noise(torch.zeros(2, 1, 2, 2), 1.0)) and first.any()


def test_gradients_reach_the_whole_decoder_and_nothing_else(folders):
    model = autoencoder(folders["registers"], tau=0.8).train()
    model(pictures(), torch.Generator().manual_seed(0)).square().mean().backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if name.startswith("decoder."):
            assert grad is not None and grad.any(), name
        else:
            assert grad is None and not parameter.requires_grad, name


def test_statistics_travel_with_the_state(folders):
    model = autoencoder(folders["siglip"]).eval()
    other = Autoencoder(
        Encoder(folders["siglip"]), Decoder(16, 5, 40, TINY), 0, torch.zeros(16, 5, 5), torch.ones(16, 5, 5)
    )
    assert not other.eval().double()(pictures()).equal(model(pictures()))
    other.load_state_dict(model.state_dict())
    assert other(pictures()).equal(model(pictures()))
    assert "latent_mean" not in autoencoder(folders["siglip"], with_statistics=False).state_dict()


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"mean": torch.zeros(16, 5, 5)}, "both mean and var"),
        ({"var": torch.zeros(16, 5, 5)}, "both mean and var"),
        (
            {"mean": torch.zeros(16, 4, 5), "var": torch.ones(16, 5, 5)},
            r"mean has shape \[16, 4, 5\], expected",
        ),
        ({"mean": torch.zeros(16, 5, 5), "var": torch.ones(16, 1, 1)}, r"var has shape \[16, 1, 1\]"),
        ({"mean": torch.zeros(16, 5, 5), "var": -torch.ones(16, 5, 5)}, "var has impossible"),
        ({"mean": torch.full((16, 5, 5), torch.nan), "var": torch.ones(16, 5, 5)}, "mean has impossible"),
        ({"noise_tau": -0.1}, "noise_tau is -0.1"),
        ({"noise_tau": math.nan}, "noise_tau is nan"),
        ({"decoder": Decoder(8, 5, 40, TINY)}, "decoder takes 8 x 5 x 5 latents, the encoder gives 16 x 5 x 5"),
        ({"decoder": Decoder(16, 4, 40, TINY)}, "decoder takes 16 x 4 x 4"),
    ],
)
def test_parts_that_do_not_fit_are_refused(folders, arguments, said):
    with pytest.raises(KilnError, match=said):
        Autoencoder(**{"encoder": Encoder(folders["siglip"]), "decoder": Decoder(16, 5, 40, TINY), **arguments})


# Latent statistics


def moments_of(latents, cuts=()):
    moments = Moments(latents.shape[1:])
    for part in np.split(latents, sorted(cuts)):
        moments.add(torch.from_numpy(part))
    return moments


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_moments_of_any_partition_are_exact(data):
    count = data.draw(st.integers(1, 40))
    seed, offset, spread = data.draw(st.tuples(st.integers(0, 2**32 - 1), st.floats(-100, 100), st.floats(0, 10)))
    latents = np.random.default_rng(seed).normal(offset, spread, size=(count, 2, 3, 2))
    cuts = data.draw(st.lists(st.integers(0, count), max_size=8))
    shards = [moments_of(part, data.draw(st.lists(st.integers(0, len(part)), max_size=3)))
              for part in np.split(latents, sorted(cuts))]  # fmt: skip
    before = [(part.count, part.mean.clone()) for part in shards]
    merged = merge(shards)
    assert merged.count == count and merged.mean.dtype == torch.float64
    scale = max(1.0, float(np.abs(latents).max()))
    np.testing.assert_allclose(merged.mean, latents.mean(axis=0), rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(merged.variance(), latents.var(axis=0), rtol=1e-12, atol=1e-12 * scale)
    assert all(part.count == c and part.mean.equal(m) for part, (c, m) in zip(shards, before, strict=True))


def test_a_large_offset_costs_no_digits():
    latents = np.random.default_rng(0).normal(size=(500, 1, 2, 2)) + 1e6
    got = merge([moments_of(part, (10, 30)) for part in np.array_split(latents, 7)]).variance()
    np.testing.assert_allclose(got, (latents - 1e6).var(axis=0), rtol=1e-8)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_bytes_do_not_depend_on_which_process_took_a_shard(tmp_path_factory, ranks):
    folder = tmp_path_factory.mktemp("moments")
    latents = np.random.default_rng(2).normal(size=(6, 9, 4, 2, 2)).astype(np.float32)
    for rank in reversed(range(4)):
        for shard in (i for i in range(6) if ranks[i] == rank):
            moments_of(latents[shard], (4,)).save(folder / f"{shard}.safetensors")
    merge(Moments.load(folder / f"{i}.safetensors") for i in range(6)).save(folder / "all.safetensors")
    merge(moments_of(latents[i], (4,)) for i in range(6)).save(folder / "alone.safetensors")
    assert (folder / "all.safetensors").read_bytes() == (folder / "alone.safetensors").read_bytes()


def test_moments_come_back_as_saved(tmp_path):
    moments = moments_of(np.random.default_rng(0).normal(size=(7, 2, 3, 3)))
    moments.save(tmp_path / "new/moments.safetensors")
    loaded = Moments.load(tmp_path / "new/moments.safetensors")
    assert loaded.count == 7 and loaded.mean.equal(moments.mean) and loaded.m2.equal(moments.m2)
    loaded.add(torch.ones(1, 2, 3, 3))
    assert loaded.count == 8 and moments.count == 7


def test_moments_refuse_what_is_not_theirs(tmp_path):
    moments = moments_of(np.zeros((3, 2, 2, 2)))
    with pytest.raises(KilnError, match=r"shape \[1, 2, 3, 2\], expected \[B, 2, 2, 2\]"):
        moments.add(torch.zeros(1, 2, 3, 2))
    bad = torch.zeros(3, 2, 2, 2)
    bad[1, 0, 0, 0], bad[2, 0, 0, 0] = torch.inf, torch.nan
    with pytest.raises(KilnError, match="latent 4 .* not finite"):
        moments.add(bad)
    assert moments.count == 3 and not moments.mean.any()
    with pytest.raises(KilnError, match="merge"):
        merge([moments, Moments((2, 3, 2))])
    with pytest.raises(KilnError, match="no moments"):
        merge([])
    with pytest.raises(KilnError, match="no latents"):
        merge([Moments((2, 2, 2))]).variance()
    path = tmp_path / "moments.safetensors"
    for damage in (b"", b"nonsense"):
        path.write_bytes(damage)
        with pytest.raises(KilnError, match="unreadable moments"):
            Moments.load(path)
    with pytest.raises(KilnError, match="unreadable moments"):
        Moments.load(tmp_path / "absent")
    for tensors in ({"mean": torch.zeros(2)}, {"count": torch.tensor(1), "mean": torch.zeros(2), "m2": torch.zeros(3)}):
        save_file(tensors, path)
        with pytest.raises(KilnError, match="expected count"):
            Moments.load(path)


def test_statistics_in_the_published_layout(tmp_path):
    mean, var = torch.randn(4, 3, 3, dtype=torch.float64), torch.rand(4, 3, 3, dtype=torch.float64)
    for name in ("a.pt", "another.pt"):
        write_statistics(tmp_path / name, mean, var)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()
    stored = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(stored) == ["mean", "var"] and stored["var"].dtype == torch.float32
    assert all(a.equal(b.float()) for a, b in zip(read_statistics(tmp_path / "a.pt"), (mean, var), strict=True))
    torch.save({"var": var, "mean": mean, "count": 3}, tmp_path / "published.pt")
    assert read_statistics(tmp_path / "published.pt")[0].equal(mean.float())


class Dangerous:
    """Would run code if it were unpickled."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was run",)


def test_statistics_refuse_other_files(tmp_path):
    path = tmp_path / "stat.pt"
    for stored in (
        {"mean": torch.zeros(1, 2, 2)}, {"mean": torch.zeros(2), "var": torch.zeros(2)}, [torch.zeros(1, 2, 2)],
        {"mean": torch.zeros(1, 2, 2), "var": torch.zeros(1, 2, 3)}, {"mean": torch.zeros(1, 2, 2), "var": None},
    ):  # fmt: skip
        torch.save(stored, path)
        with pytest.raises(KilnError, match="expected {mean, var}"):
            read_statistics(path)
    buffer = io.BytesIO()
    torch.save({"mean": Dangerous(), "var": torch.zeros(1, 2, 2)}, buffer)
    for content in (b"nonsense", pickle.dumps(Dangerous(), protocol=2), buffer.getvalue()):
        path.write_bytes(content)
        with pytest.raises(KilnError, match="unreadable statistics"):
            read_statistics(path)
    with pytest.raises(KilnError, match="unreadable statistics"):
        read_statistics(tmp_path / "absent.pt")
