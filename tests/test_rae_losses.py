"""RAE's losses against float64 references: LPIPS, the DINO discriminator, augmentation, schedules, averages."""

import copy
import math
import types

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from scripts.common.errors import KilnError
from scripts.common.schedules import learning_rate
from scripts.rae import augment, discriminator, losses
from scripts.rae.discriminator import RECIPES, Discriminator, Recipe
from scripts.rae.perceptual import Lpips

TINY = Recipe(patch=4, dim=16, depth=4, heads=2, taps=(0, 1, 2, 3), size=16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(batch=2, size=32, seed=0, dtype=torch.float32):
    """Images in [-1,1]."""
    return torch.rand(batch, 3, size, size, generator=seeded(seed), dtype=dtype) * 2 - 1


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory):
    """A VGG16 with random weights in torchvision's layout, its classifier cut down to one tensor."""
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=seeded(layer.out_channels))
            nn.init.normal_(layer.bias, std=0.1, generator=seeded(1))
    state = {f"features.{k}": v for k, v in features.state_dict().items()} | {"classifier.0.bias": torch.zeros(3)}
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


# LPIPS


def test_lpips_equals_the_package(vgg16, monkeypatch):
    lpips = pytest.importorskip("lpips")
    with torch.device("meta"):
        published = torchvision.models.vgg16(weights=None).features.state_dict()
    state = {k.removeprefix("features."): v for k, v in torch.load(vgg16, weights_only=True).items()}
    state = {k: state[k] for k in published}
    assert {k: v.shape for k, v in published.items()} == {k: v.shape for k, v in state.items()}
    # the package would fill VGG16's half gigabyte of classifier with random numbers first
    bare = types.SimpleNamespace(features=torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"]))
    monkeypatch.setattr(lpips.pretrained_networks.tv, "vgg16", lambda pretrained: bare)
    package = lpips.LPIPS(net="vgg", pretrained=True, pnet_rand=True, lpips=True, verbose=False)
    for name, parameter in package.net.named_parameters():
        parameter.copy_(state[name.split(".", 1)[1]])
    a, b = pictures(3, 64, 1), pictures(3, 64, 2)
    a.requires_grad_()
    ours, theirs = Lpips(vgg16)(a, b), package(a, b).flatten()
    assert ours.shape == (3,) and ours.min() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(x.sum(), a)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_lpips_of_a_small_stack_by_hand():
    model = Lpips(backbone=(4, 6), seed=3).double()
    a, b = pictures(2, 8, 1, torch.float64), pictures(2, 8, 2, torch.float64)
    weights = [(k, v) for k, v in model.state_dict().items() if k.endswith("weight")]
    assert [tuple(v.shape[:2]) for _, v in weights] == [(4, 3), (4, 4), (6, 4), (6, 6)]

    def stages(x):
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x = (x - shift.double().view(1, 3, 1, 1)) / scale.double().view(1, 3, 1, 1)
        for i, (_, w) in enumerate(weights):
            x = F.max_pool2d(x, 2) if i == 2 else x
            x = torch.clamp(F.conv2d(x, w, padding=1), min=0)
            if i % 2:
                yield x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)

    expected = sum((u - v).pow(2).mean(1).mean((1, 2)) for u, v in zip(stages(a), stages(b), strict=True))
    # the constants of the model are float32
    torch.testing.assert_close(model(a, b), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(model(a, a), torch.zeros(2, dtype=torch.float64), rtol=0, atol=0)
    other = Lpips(backbone=(4, 6), seed=4).double()
    assert not torch.allclose(other(a, b), expected)


def test_lpips_is_frozen_and_its_gradient_finite_where_no_channel_fires():
    model = Lpips(backbone=(4,))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            tensor.fill_(-100.0)
    images = pictures().requires_grad_()
    distance = model(images, pictures(seed=1))
    distance.sum().backward()
    assert distance.abs().max() == 0 and torch.isfinite(images.grad).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("features.0.bias"), "1 tensors missing, such as features.0.bias"),
        (lambda s: s.update({"features.99.bias": torch.zeros(1)}), "1 unknown, such as features.99.bias"),
        (lambda s: s.update({"features.0.bias": torch.zeros(5)}), r"features.0.bias is \[5\], expected \[64\]"),
        (lambda s: s.update({"features.0.bias": "text"}), "no state dict"),
    ],
)
def test_lpips_refuses_other_weights(vgg16, tmp_path, change, message):
    state = torch.load(vgg16, weights_only=True)
    change(state)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(KilnError, match=message) as caught:
        Lpips(tmp_path / "bad.pth")
    assert str(tmp_path / "bad.pth") in str(caught.value)


def test_lpips_refuses_no_file_a_broken_one_code_and_no_choice(tmp_path):
    with pytest.raises(KilnError, match="no such weights"):
        Lpips(tmp_path / "none.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04 not much")
    with pytest.raises(KilnError, match="unreadable weights"):
        Lpips(tmp_path / "broken.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "pickled.pth")
    with pytest.raises(KilnError, match="unreadable weights"):
        Lpips(tmp_path / "pickled.pth")
    for both_or_none in ({}, {"weights": tmp_path, "backbone": (4,)}):
        with pytest.raises(KilnError, match="exactly one"):
            Lpips(**both_or_none)


# the discriminator


def dino_state(recipe, seed=0):
    """A state dict with the names and shapes of the published DINO files, written down from timm's layout."""
    d, shapes = recipe.dim, {}
    shapes |= {"cls_token": (1, 1, d), "pos_embed": (1, (recipe.size // recipe.patch) ** 2 + 1, d)}
    shapes |= {"patch_embed.proj.weight": (d, 3, recipe.patch, recipe.patch), "patch_embed.proj.bias": (d,)}
    for i in range(recipe.depth):
        layers = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        for name, shape in layers.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (d,), f"blocks.{i}.{name}.bias": (d,)}
    shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
    generator = seeded(seed)
    return {k: torch.randn(shape, generator=generator) * 0.3 for k, shape in shapes.items()}


def dino_by_hand(state, recipe, images):
    """Tokens [B,L,D] without CLS after every block, float64, from the ViT's equations; the key bias left in."""
    s = {k: v.double() for k, v in state.items()}
    x = F.interpolate(images.double(), (recipe.size, recipe.size), mode="bilinear", align_corners=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).double(), torch.tensor([0.229, 0.224, 0.225]).double()
    x = ((x + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    p, heads = recipe.patch, recipe.heads
    x = F.unfold(x, p, stride=p).transpose(1, 2) @ s["patch_embed.proj.weight"].flatten(1).T
    x = torch.cat([s["cls_token"].expand(len(x), 1, -1), x + s["patch_embed.proj.bias"]], 1) + s["pos_embed"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    found = []
    for i in range(recipe.depth):
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, -1)
        )
        scores = (q @ k.transpose(2, 3)) / math.sqrt(recipe.dim // heads)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        h = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + linear(h, f"blocks.{i}.mlp.fc2")
        found.append(x[:, 1:])
    return found


def head_by_hand(head, x, kernel):
    """Logits [B,L] of tokens [B,L,D]: exact spectral norms, convolutions as sums over a circle."""
    state = {k: v.double() for k, v in head.state_dict().items()}
    originals = [k for k in state if k.endswith("original")]
    weights = [state[k] / torch.linalg.svdvals(state[k].flatten(1))[0] for k in originals]
    biases = [state[k.split(".parametrizations")[0] + ".bias"] for k in originals]
    affine = [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in ("0.1", "1.inner.1")]

    def convolve(x, w, b):
        half = w.shape[2] // 2
        return b + sum(torch.roll(x, half - j, dims=1) @ w[:, :, j].T for j in range(w.shape[2]))

    def block(x, i):
        x = convolve(x, weights[i], biases[i])
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        x = x * affine[i][0] + affine[i][1]
        return torch.where(x > 0, x, 0.2 * x)

    assert weights[1].shape[2] == kernel
    x = block(x, 0)
    x = (block(x, 1) + x) / math.sqrt(2)
    return convolve(x, weights[2], biases[2])[..., 0]


def trained_head_norms(model):
    """Random affine parameters and converged power iterations."""
    generator = seeded(5)
    for module in model.modules():
        if isinstance(module, discriminator.LocalBatchNorm):
            module.weight.data.normal_(1, 0.3, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
        elif isinstance(module, nn.Conv1d):
            for _ in range(400):
                _ = module.weight
    return model.eval()


def test_discriminator_equals_its_equations(tmp_path):
    state = dino_state(TINY)
    torch.save(state, tmp_path / "dino.pth")
    torch.manual_seed(0)
    model = trained_head_norms(Discriminator(TINY, tmp_path / "dino.pth", kernel=9).double())
    images = pictures(3, 24, 4, torch.float64)
    blocks = dino_by_hand(state, TINY, images)
    tapped = [blocks[3], blocks[0], blocks[1], blocks[2], blocks[3]]
    for ours, theirs in zip(model.dino(images), tapped, strict=True):
        torch.testing.assert_close(ours, theirs.transpose(1, 2), rtol=1e-6, atol=1e-6)
    expected = torch.cat([head_by_hand(h, x, 9) for h, x in zip(model.heads, tapped, strict=True)], dim=1)
    logits = model(images)
    assert logits.shape == (3, 5 * 16) and logits.std() > 0.05
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for block in model.dino.vit.blocks:
        q, k, v = block.attn.qkv.bias.chunk(3)
        assert q.abs().min() > 0 and k.abs().max() == 0 and v.abs().min() > 0


@pytest.mark.parametrize("norm", discriminator.NORMS)
def test_logits_of_a_sample_do_not_depend_on_its_neighbours(norm):
    model = Discriminator(Recipe(4, 32, 2, 2, (0, 1), 16), norm=norm).double().eval()
    images = pictures(5, 16, 1, torch.float64)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, rtol=1e-9, atol=1e-9)
    strange = torch.cat([images[:1], 100 * images[1:]])
    torch.testing.assert_close(model(strange)[:1], alone[:1], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(alone[0], alone[1])


def test_the_norm_is_the_asked_one_and_one_step_of_power_iteration_per_training_pass():
    torch.manual_seed(0)
    groups = Discriminator(Recipe(4, 32, 1, 2, (0,), 16), norm="gn")
    assert [m.num_groups for m in groups.modules() if isinstance(m, nn.GroupNorm)] == [32] * 4
    model = Discriminator(TINY)
    original = copy.deepcopy(model.state_dict())
    model.eval()(pictures())
    assert all(torch.equal(v, original[k]) for k, v in model.state_dict().items())
    model.train()(pictures())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, original[k])}
    assert changed and all(k.endswith(("_u", "_v")) for k in changed)


def test_only_the_heads_learn_and_images_get_gradients():
    model = Discriminator(TINY)
    images = pictures().requires_grad_()
    losses.generator_loss(model(images)).backward()
    assert images.grad.abs().max() > 0
    assert all(p.grad is not None for p in model.heads.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.dino.parameters())


def test_half_precision_stays_close_and_gives_full_precision_numbers():
    model, perceptual = Discriminator(TINY).eval(), Lpips(backbone=(8, 16))
    x, y = pictures(4, 16, 1), pictures(4, 16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        logits, distances = model(x), perceptual(x, y)
    assert logits.dtype == distances.dtype == torch.float32
    torch.testing.assert_close(distances, perceptual(x, y), rtol=0.05, atol=0)
    assert (logits - model(x)).abs().max() < 0.1 * model(x).std() + 0.05


def test_the_heads_separate_two_kinds_of_images():
    torch.manual_seed(0)
    model = Discriminator(TINY)
    optimiser = torch.optim.Adam(model.heads.parameters(), lr=1e-2)

    def smooth(batch, seed):
        return F.interpolate(pictures(batch, 4, seed), size=16, mode="bilinear")

    for i in range(120):
        optimiser.zero_grad()
        losses.discriminator_loss(model(smooth(8, i)), model(pictures(8, 16, i))).backward()
        optimiser.step()
    model.eval()
    real, fake = model(smooth(32, 9999)).mean(1), model(pictures(32, 16, 9999)).mean(1)
    assert (real[:, None] > fake).double().mean() > 0.9


@pytest.mark.parametrize(("name", "tokens", "dim"), [("S_8", 784, 384), ("S_16", 196, 384), ("B_16", 196, 768)])
def test_published_recipes(name, tokens, dim):
    with torch.device("meta"):
        model = Discriminator(RECIPES[name])
        assert model(torch.zeros(2, 3, 256, 256)).shape == (2, 5 * tokens)
    shapes = {k: v.shape for k, v in model.dino.vit.state_dict().items()}
    recipe = Recipe(RECIPES[name].patch, dim, 12, dim // 64, (2, 5, 8, 11))
    assert recipe == RECIPES[name]
    assert shapes == {k: v.shape for k, v in dino_state(recipe).items()}


def test_random_backbones_come_from_their_seed_alone():
    state = torch.get_rng_state()
    one, same, other = (discriminator.DinoFeatures(TINY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (model(pictures())[0] for model in (one, same, other))
    assert torch.equal(a, b) and not torch.allclose(a, c)
    last, *taps = one(pictures())
    assert torch.equal(last, taps[3])
    assert all((x - y).std() > 0.2 for x, y in zip(taps[:3], taps[1:], strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "L_7"}, "expected one of S_8, S_16, B_16"),
        ({"recipe": "S_8"}, "without DINO weights"),
        ({"recipe": TINY, "kernel": 4}, "kernel 4"),
        ({"recipe": TINY, "kernel": 99}, "at most 32"),
        ({"recipe": TINY, "norm": "gn"}, "'gn' at width 16"),
        ({"recipe": TINY, "norm": "sbn"}, "'sbn'"),
        ({"recipe": Recipe(5, 16, 1, 2, (0,), 16)}, "no multiple of patch 5"),
        ({"recipe": Recipe(4, 15, 1, 2, (0,), 16)}, "width 15"),
        ({"recipe": Recipe(4, 16, 1, 2, (0, 1), 16)}, "not within blocks 0 to 0"),
    ],
)
def test_discriminator_refuses(arguments, message):
    with pytest.raises(KilnError, match=message):
        Discriminator(**arguments)


def test_discriminator_refuses_weights_of_another_size(tmp_path):
    torch.save(dino_state(Recipe(4, 16, 4, 2, (0,), 32)), tmp_path / "dino.pth")
    with pytest.raises(KilnError, match=r"dino.pth: .*pos_embed is \[1, 65, 16\], expected \[1, 17, 16\]"):
        Discriminator(TINY, tmp_path / "dino.pth")


# augmentation


def augment_by_hand(images, values):
    """numpy float64, one image at a time."""
    out = images.numpy().astype(np.float64)
    for i, x in enumerate(out):
        if values.shift is not None:
            moved = np.zeros_like(x)
            dy, dx = values.shift[i].tolist()
            for y in range(x.shape[1]):
                for z in range(x.shape[2]):
                    if 0 <= y + dy < x.shape[1] and 0 <= z + dx < x.shape[2]:
                        moved[:, y, z] = x[:, y + dy, z + dx]
            x = moved
        if values.colour is not None:
            brightness, saturation, contrast = values.colour[:, i].double().tolist()
            x = x + brightness
            x = (x - x.mean(0)) * saturation + x.mean(0)
            x = (x - x.mean()) * contrast + x.mean()
        if values.cutout is not None:
            top, bottom, left, right = values.cutout[i].tolist()
            x[:, top:bottom, left:right] = 0
        out[i] = x
    return torch.from_numpy(out)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31), st.integers(1, 4), st.integers(4, 20), st.integers(4, 20), st.floats(0, 1), st.floats(0, 1)
)
def test_augmentation_equals_numpy(seed, batch, height, width, prob, cutout):
    images = torch.randn(batch, 3, height, width, generator=seeded(seed), dtype=torch.float64)
    values = augment.draw(batch, height, width, seeded(seed), prob, cutout)
    torch.testing.assert_close(augment.apply(images, values), augment_by_hand(images, values), rtol=1e-9, atol=1e-9)


def test_draws_are_uniform_over_their_ranges_and_differ_per_sample():
    values = augment.draw(20_000, 64, 32, seeded(), cutout=0.5)
    rows, columns = values.shift.T
    assert rows.unique().tolist() == list(range(-8, 9)) and columns.unique().tolist() == list(range(-4, 5))
    counts = torch.bincount(rows + 8)
    assert counts.min() > 0.85 * 20_000 / 17
    for drawn, (low, high) in zip(values.colour, [(-0.5, 0.5), (0, 2), (0.5, 1.5)], strict=True):
        assert low <= drawn.min() < low + 0.01 and high - 0.01 < drawn.max() <= high
        assert drawn.mean() == pytest.approx((low + high) / 2, abs=0.02)
    top, bottom, left, right = values.cutout.T
    assert (bottom - top).max() == 32 and (right - left).max() == 16
    assert top.min() == 0 and top.max() == 48 and left.max() == 24


def test_gates_are_per_batch_and_default_draws_cut_nothing():
    generator = seeded()
    draws = [augment.draw(2, 16, 16, generator, prob=0.3, cutout=0.5) for _ in range(2000)]
    for kind in ("shift", "colour", "cutout"):
        assert np.mean([getattr(d, kind) is not None for d in draws]) == pytest.approx(0.3, abs=0.04)
    both = np.mean([d.shift is not None and d.colour is not None for d in draws])
    assert both == pytest.approx(0.09, abs=0.025)
    always = [augment.draw(2, 16, 16, generator) for _ in range(200)]
    assert all(d.shift is not None and d.colour is not None and d.cutout is None for d in always)
    images = pictures()
    assert torch.equal(augment.apply(images, augment.draw(2, 32, 32, generator, prob=0, cutout=1)), images)


def test_one_draw_serves_real_and_fake_and_comes_again_from_its_seed():
    real, fake = pictures(3, 16, 1), pictures(3, 16, 2)
    values, again = (augment.draw(3, 16, 16, seeded(7), cutout=0.25) for _ in range(2))
    for name in ("shift", "colour", "cutout"):
        assert torch.equal(getattr(values, name), getattr(again, name))
    # every operation is linear but for the shared brightness, so the difference passes through unchanged in kind
    still = augment.Draw(values.shift, None, values.cutout)
    torch.testing.assert_close(
        augment.apply(real, still) - augment.apply(fake, still), augment.apply(real - fake, still)
    )
    off, on = seeded(3), seeded(3)
    augment.draw(3, 16, 16, off, prob=0)
    augment.draw(3, 16, 16, on, prob=1, cutout=0.5)
    assert torch.equal(off.get_state(), on.get_state())


def test_augmentation_is_differentiable():
    values = augment.draw(2, 8, 8, seeded(2), cutout=0.5)
    images = pictures(2, 8, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: augment.apply(x, values), images)
    for wrong in ({"prob": 1.1}, {"prob": -0.1}, {"cutout": 2}):
        with pytest.raises(ValueError, match="must be in"):
            augment.draw(2, 8, 8, seeded(), **wrong)


# losses


def test_reconstruction_loss():
    x, y = (pictures(3, 16, seed) * 0.5 + 0.5 for seed in (1, 2))
    model = Lpips(backbone=(4,))
    distance = model(2 * x - 1, 2 * y - 1).double().numpy().mean()
    l1 = np.abs(x.double().numpy() - y.double().numpy()).mean()
    found = losses.reconstruction_loss(x, y, model, 0.7)
    assert found.l1.item() == pytest.approx(l1, rel=1e-6) and found.lpips.item() == pytest.approx(distance, rel=1e-5)
    assert found.total.item() == pytest.approx(l1 + 0.7 * distance, rel=1e-5)
    bare = losses.reconstruction_loss(x, y)
    assert bare.total.item() == pytest.approx(l1, rel=1e-6) and bare.lpips.item() == 0


def test_adaptive_weight_against_gradients_by_hand():
    generator = seeded(1)
    hidden, target, direction = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (4, 3, 3))
    layer = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
    output = hidden @ layer.T
    reconstruction, adversarial = (output - target).abs().mean(), -(output * direction).mean()
    h, w, t, d = (v.detach().numpy() for v in (hidden, layer, target, direction))
    by_reconstruction = np.sign(h @ w.T - t).T @ h / 15
    by_adversarial = -d.T @ h / 15
    expected = np.linalg.norm(by_reconstruction) / (np.linalg.norm(by_adversarial) + 1e-6)
    found = losses.adaptive_weight(reconstruction, adversarial, layer)
    assert found.item() == pytest.approx(expected, rel=1e-12) and not found.requires_grad and layer.grad is None
    (reconstruction + 0.75 * found * adversarial).backward()
    np.testing.assert_allclose(layer.grad.numpy(), by_reconstruction + 0.75 * expected * by_adversarial, rtol=1e-12)


def test_adaptive_weight_stays_in_its_bounds():
    layer = nn.Parameter(torch.ones(2))
    loss = layer.sum()
    assert losses.adaptive_weight(loss, 0 * layer.sum(), layer) == 1e4
    assert losses.adaptive_weight(0 * layer.sum(), loss, layer) == 0
    tiny = losses.adaptive_weight(1e-6 * loss, 1e-6 * loss, layer)
    assert tiny.item() == pytest.approx(math.sqrt(2) / (math.sqrt(2) + 1), rel=1e-5)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9), st.lists(st.floats(-5, 5), min_size=1, max_size=9))
def test_hinge_losses(real, fake):
    r, f = (torch.tensor(x, dtype=torch.float64) for x in (real, fake))
    expected = 0.5 * (np.maximum(0, 1 - np.array(real)).mean() + np.maximum(0, 1 + np.array(fake)).mean())
    assert losses.discriminator_loss(r, f).item() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert losses.generator_loss(f).item() == pytest.approx(-np.mean(fake), rel=1e-12, abs=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=50))
def test_quantise_gives_the_nearest_of_256_levels(values):
    x = torch.tensor(values, requires_grad=True)
    found = losses.quantise(x)
    levels = np.arange(256) / 127.5 - 1
    clamped = np.clip(np.array(values, dtype=np.float64), -1, 1)
    nearest = np.abs(clamped[:, None] - levels).min(1)
    distance = np.abs(found.double().numpy() - clamped)
    np.testing.assert_allclose(distance, nearest, atol=1e-6)
    steps = (found.double().numpy() + 1) * 127.5
    np.testing.assert_allclose(steps, steps.round(), atol=1e-4)
    assert torch.equal(losses.quantise(found), found) and not found.requires_grad


def test_pictures_of_a_file_pass_through_quantise():
    levels = torch.arange(256, dtype=torch.float32) / 255 * 2 - 1
    assert ((losses.quantise(levels) + 1) * 127.5).round().tolist() == list(range(256))


def test_schedule():
    published = losses.Schedule()
    on = [(published.lpips(e), published.discriminator(e), published.gan(e)) for e in (0, 5, 6, 7, 8, 15)]
    assert on == [(True, False, False)] * 2 + [(True, True, False)] * 2 + [(True, True, True)] * 2
    late = losses.Schedule(lpips_start=2, discriminator_start=0, gan_start=0)
    assert not late.lpips(1) and late.lpips(2) and late.gan(0)
    for wrong in ({"gan_start": 5}, {"lpips_start": -1}, {"discriminator_start": -1}):
        with pytest.raises(KilnError, match="expected starts"):
            losses.Schedule(**wrong)


@settings(deadline=None)
@given(st.data())
def test_learning_rate(data):
    steps = data.draw(st.integers(2, 500))
    warmup = data.draw(st.integers(0, steps - 2))
    rates = np.array([learning_rate(step, steps, warmup, 2e-4, 2e-5) for step in range(steps)])
    np.testing.assert_allclose(rates[:warmup], 2e-4 * np.arange(1, warmup + 1) / max(warmup, 1), rtol=1e-12)
    angles = np.linspace(0, np.pi, steps - warmup)
    np.testing.assert_allclose(rates[warmup:], 2e-5 + 0.9e-4 * (1 + np.cos(angles)), rtol=1e-9)
    assert rates[-1] == pytest.approx(2e-5, rel=1e-9) and (np.diff(rates[warmup:]) < 0).all()
    assert learning_rate(steps + 100, steps, warmup, 2e-4, 2e-5) == rates[-1]


def test_learning_rate_at_its_edges():
    assert learning_rate(0, 1, 0, 2e-4, 2e-5) == pytest.approx(2e-5)
    assert learning_rate(1, 2, 1, 2e-4, 2e-5) == pytest.approx(2e-5)
    for steps, warmup in ((5, 5), (5, 6), (5, -1), (0, 0)):
        with pytest.raises(KilnError, match="warm-up"):
            learning_rate(0, steps, warmup, 2e-4, 2e-5)


def test_ema_is_the_weighted_sum_of_all_that_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average = copy.deepcopy(model)
    seen = [[p.detach().numpy().copy() for p in model.parameters()]]
    for _ in range(30):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        losses.update_ema(average, model)
        seen.append([p.detach().numpy().copy() for p in model.parameters()])
    weights = np.array([0.9978**30] + [0.0022 * 0.9978 ** (30 - i) for i in range(1, 31)])
    for i, found in enumerate(average.parameters()):
        expected = sum(w * s[i] for w, s in zip(weights, seen, strict=True))
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
        assert found.requires_grad and found.grad_fn is None
        np.testing.assert_array_equal(list(model.parameters())[i].detach().numpy(), seen[-1][i])
    with pytest.raises(ValueError, match="different architectures"):
        losses.update_ema(average, nn.Linear(3, 2))
