"""The Perceiver against a float64 reference written from the published description, its masks, chunks and weights."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from scripts.coca.perceiver import Perceiver
from scripts.common.errors import KilnError

SHAPE = {"tile_dim": 10, "dim": 12, "latents": 5, "depth": 4, "transformer_depth": 2, "heads": 3, "mlp_ratio": 2}


def randomised(module, scale=0.4):
    """Every parameter drawn anew, norms and biases too, so that none may be left out unnoticed."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


@pytest.fixture(scope="module")
def encoder():
    return randomised(Perceiver(**SHAPE)).eval()


def slides(lengths=(9, 4, 6), seed=0):
    """Tiles [B,N,10] float32 and their mask; padding is not zero, so that it must be masked."""
    tiles = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(lengths), max(lengths), 10))).float()
    return tiles, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


# Reference, float64, one slide at a time, without padding


def norm(x, w, name):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def attend(q, k, v):
    scores = torch.exp(q @ k.T / math.sqrt(q.shape[-1]))
    return scores / scores.sum(-1, keepdim=True) @ v


def feed_forward(x, w, name):
    inner = norm(x, w, f"{name}.norm") @ w[f"{name}.net.0.weight"].T + w[f"{name}.net.0.bias"]
    value, gate = inner[:, : inner.shape[1] // 2], inner[:, inner.shape[1] // 2 :]
    opened = value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    return opened @ w[f"{name}.net.2.weight"].T + w[f"{name}.net.2.bias"]


def reference(w, tiles):
    """(slide [dim], latents [latents,dim]) of tiles [N,tile_dim], all float64."""
    dim, heads = SHAPE["dim"], SHAPE["heads"]
    x = w["perceiver.latents"]
    for layer in range(SHAPE["depth"]):
        cross = f"perceiver.layers.{0 if layer == 0 else 1}.xattn"
        q = norm(x, w, f"{cross}.xattn.x_norm") @ w[f"{cross}.xattn.to_q.weight"].T
        both = tiles @ w[f"{cross}.xattn.to_kv.weight"].T
        x = x + attend(q, both[:, :dim], both[:, dim:]) @ w[f"{cross}.xattn.to_out.weight"].T
        x = x + feed_forward(x, w, f"{cross}.ff")
        for block in (f"perceiver.layers.0.tf.{i}" for i in range(SHAPE["transformer_depth"])):
            projected = norm(x, w, f"{block}.mhsa.norm") @ w[f"{block}.mhsa.mha.in_proj_weight"].T
            q, k, v = (projected[:, i * dim : (i + 1) * dim] for i in range(3))
            width = dim // heads
            parts = [slice(i * width, (i + 1) * width) for i in range(heads)]
            attended = torch.cat([attend(q[:, part], k[:, part], v[:, part]) for part in parts], dim=1)
            x = x + attended @ w[f"{block}.mhsa.mha.out_proj.weight"].T
            x = x + feed_forward(x, w, f"{block}.ff")
    return norm(x[0], w, "cls_norm"), norm(x[1:], w, "img_norm")


@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
def test_agrees_with_the_description(encoder, chunk):
    tiles, mask = slides()
    w = {name: value.double() for name, value in encoder.state_dict().items()}
    with torch.no_grad():
        found = encoder(tiles, mask, chunk)
    for row, length in enumerate(mask.sum(dim=1)):
        for one, expected in zip(found, reference(w, tiles[row, :length].double()), strict=True):
            torch.testing.assert_close(one[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_weight_and_no_padding(encoder):
    tiles, mask = slides()
    tiles.requires_grad_()
    slide, latents = encoder(tiles, mask)
    (slide.square().sum() + latents.sin().sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())
    assert tiles.grad[mask].abs().sum() > 0
    assert tiles.grad[~mask].abs().sum() == 0


@settings(deadline=None, max_examples=20)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4), seed=st.integers(0, 99), chunk=st.integers(0, 5))
def test_padding_and_order_change_nothing(encoder, lengths, seed, chunk):
    tiles, mask = slides(lengths, seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(max(lengths)))
    with torch.no_grad():
        found = encoder(tiles, mask, chunk or None)
        shuffled = encoder(tiles[:, order], mask[:, order], chunk or None)
        for row, length in enumerate(lengths):
            alone = encoder(tiles[row : row + 1, :length])
            for one, other, expected in zip(found, shuffled, alone, strict=True):
                torch.testing.assert_close(one[row], expected[0], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(other[row], expected[0], rtol=1e-4, atol=1e-4)


def test_tiles_as_stored_are_taken(encoder):
    tiles, _ = slides((9,))
    with torch.no_grad():
        expected = encoder(tiles.half().float())
        for chunk in (None, 4):
            torch.testing.assert_close(encoder(tiles.half(), chunk=chunk), expected, rtol=1e-4, atol=1e-4)


def test_published_size():
    with torch.device("meta"):
        made = Perceiver()
        slide, latents = made(torch.empty(2, 30, 2560))
    assert (slide.shape, latents.shape) == ((2, 1280), (2, 512, 1280))
    # by hand: latents; attention to tiles and its feed-forward, twice; six blocks; two norms
    cross = 2 * 1280 + 2 * 1280 * 1280 + 2560 * 2560
    feed = 2 * 1280 + (1280 + 1) * 2560 + (1280 + 1) * 1280
    block = 2 * 1280 + 4 * 1280 * 1280 + feed
    expected = 513 * 1280 + 2 * (cross + feed) + 6 * block + 4 * 1280
    assert sum(p.numel() for p in made.parameters()) == expected
    assert 98.5e6 < expected < 99.5e6


@pytest.mark.parametrize(
    ("tiles", "mask", "message"),
    [
        (torch.zeros(1, 3, 9), None, r"\[1, 3, 9\], expected \[B, N, 10\]"),
        (torch.zeros(1, 0, 10), None, "N > 0"),
        (torch.zeros(3, 10), None, "expected"),
        (torch.zeros(1, 3, 10), torch.ones(1, 3), "float32"),
        (torch.zeros(1, 3, 10), torch.ones(1, 4, dtype=torch.bool), r"\[1, 4\]"),
    ],
)
def test_other_shapes_are_refused(encoder, tiles, mask, message):
    with pytest.raises(KilnError, match=message):
        encoder(tiles, mask)


# Weights


def published(encoder, prefix="image_resampler.", repeated=True):
    """The state dict under the names of a model that holds each layer, shared or not, and other networks."""
    tensors = {"text_decoder.embed.weight": torch.ones(2, 2)} if prefix else {}
    for name, value in encoder.state_dict().items():
        tensors[prefix + name] = value
        for layer in range(1, SHAPE["depth"]) if repeated else ():
            if layer > 1 and "layers.1." in name:
                tensors[prefix + name.replace("layers.1.", f"layers.{layer}.")] = value.clone()
            elif ".tf." in name:
                tensors[prefix + name.replace("layers.0.", f"layers.{layer}.")] = value.clone()
    return tensors


@pytest.mark.parametrize("prefix", ["", "image_resampler."])
@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_published_weights_load(encoder, tmp_path, prefix, repeated, ending):
    path = tmp_path / f"weights.{ending}"
    tensors = published(encoder, prefix, repeated)
    save_file(tensors, path) if ending == "safetensors" else torch.save(tensors, path)
    other = Perceiver(**SHAPE)
    other.load_weights(path)
    tiles, mask = slides()
    with torch.no_grad():
        for one, expected in zip(other(tiles, mask), encoder(tiles, mask), strict=True):
            torch.testing.assert_close(one, expected, rtol=0, atol=0)


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


LATENTS, NORM = "image_resampler.perceiver.latents", "image_resampler.cls_norm.weight"
QUERY = "image_resampler.perceiver.layers.3.xattn.xattn.to_q.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: without(t, LATENTS), "0 tensors named perceiver.latents"),
        (lambda t: t | {"again.perceiver.latents": t[LATENTS]}, "2 tensors named perceiver.latents"),
        (lambda t: without(t, NORM), "lacks 1 tensors, such as cls_norm.weight"),
        (lambda t: t | {"image_resampler.extra": t[NORM]}, "also holds 1 tensors, such as extra"),
        (lambda t: t | {NORM: torch.ones(13)}, r"cls_norm.weight has shape \[13\], expected \[12\]"),
        (lambda t: t | {QUERY: t[QUERY] + 1}, "layers.3.xattn.xattn.to_q.weight differs"),
        (lambda t: t | {QUERY.replace("3", "4"): t[QUERY]}, "5 layers, expected 4"),
        (lambda t: {k: v for k, v in t.items() if "layers.3" not in k}, "3 layers, expected 4"),
        (lambda t: [*t.values()], "no state dict"),
        (lambda t: t | {"step": 3}, "no state dict"),
        (lambda t: t | {"code": pytest.fail}, "more than tensors"),
    ],
)
def test_other_weights_are_refused(encoder, tmp_path, change, message):
    path = tmp_path / "weights.bin"
    torch.save(change(published(encoder)), path)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(KilnError, match=message):
        encoder.load_weights(path)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("name", ["absent.bin", "absent.safetensors", "damaged.bin", "damaged.safetensors"])
def test_unreadable_weights_are_refused(encoder, tmp_path, name):
    (tmp_path / "damaged.bin").write_bytes(b"no weights")
    (tmp_path / "damaged.safetensors").write_bytes(b"no weights")
    with pytest.raises(KilnError, match="no such file" if "absent" in name else "unreadable"):
        encoder.load_weights(tmp_path / name)


# 100,000 tiles of the published width

LARGE = """
import resource, sys, torch
from scripts.coca.perceiver import Perceiver
torch.set_num_threads(1)
torch.manual_seed(0)
encoder = Perceiver(depth=3, transformer_depth=1, latents=64).eval()
count = int(sys.argv[1])
tiles = torch.randn(1, count, 2560, dtype=torch.float16)
with torch.inference_mode():
    found = encoder(tiles, chunk=4096)[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    whole = encoder(tiles)[1]
print(peak, (found - whole).abs().max().item(), torch.isfinite(found).all().item())
"""


@pytest.mark.slow(minutes=2)
def test_a_hundred_thousand_tiles_take_the_memory_of_the_tiles(root):
    peaks = {}
    for count in (20_000, 100_000):
        command = [sys.executable, "-c", LARGE, str(count)]
        peak, difference, finite = subprocess.check_output(command, cwd=root, text=True).split()
        assert float(difference) <= 1e-4
        assert finite == "True"
        peaks[count] = int(peak)
    stored = 80_000 * 2560 * 2
    assert peaks[100_000] - peaks[20_000] < 1.25 * stored
