"""CoCa against the package CoCa-pytorch on shared weights, and where it must differ from it."""

import json

import coca_pytorch
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from benchmarks.measure import kept_bytes
from scripts.coca import checkpoints
from scripts.coca.layers import gated_linear, split_linear
from scripts.coca.losses import caption_loss, contrastive_loss, loss_terms
from scripts.coca.model import CoCa
from scripts.coca.settings import EncoderSettings, ModelSettings
from scripts.coca.slide_model import SlideModel, build, encoder_shape
from scripts.common.errors import KilnError

SHAPE = {"dim": 24, "unimodal_depth": 2, "multimodal_depth": 3, "dim_latents": 40, "image_dim": 20}
SHAPE |= {"dim_head": 8, "heads": 3, "ff_mult": 2}
VOCABULARY, QUERIES = 50, 7


def original(**options):
    """The package's model, every parameter drawn anew, norms and temperature too."""
    model = coca_pytorch.CoCa(**(SHAPE | options), num_tokens=VOCABULARY, num_img_queries=QUERIES)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def ours(state, **options):
    model = CoCa(**(SHAPE | options), num_tokens=VOCABULARY, image_queries=QUERIES)
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def pair():
    theirs = original()
    return theirs, ours(theirs.state_dict())


def texts(lengths=(9, 9, 9, 9), seed=0, width=None):
    """Ids [B,width] of texts of these lengths, padded at the end."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), width or max(lengths)), dtype=np.int64)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = rng.integers(1, VOCABULARY, length)
    return torch.from_numpy(ids)


def images(count=4, tokens=11, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, tokens, 20))).float()


def test_state_dict_is_the_packages(pair):
    theirs, mine = (model.state_dict() for model in pair)
    assert {name: value.shape for name, value in mine.items()} == {name: value.shape for name, value in theirs.items()}
    assert pair[1].to_logits[1].weight is pair[1].token_emb.weight


@pytest.mark.parametrize("lengths", [(9, 9, 9, 9), (9, 3, 1, 6)])
def test_logits_are_the_packages(pair, lengths):
    theirs, mine = pair
    ids, tokens = texts(lengths), images()
    expected = theirs(ids, image_tokens=tokens)
    found = mine(ids, tokens).logits
    real = ids != 0
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-5)


def test_embeddings_are_the_packages(pair):
    theirs, mine = pair
    ids, tokens = texts(), images()
    for found, expected in zip(mine.embed_text(ids), theirs.embed_text(ids), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for found, expected in zip(mine.embed_image(tokens), theirs.embed_image(image_tokens=tokens), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [(10, 10, 10, 10), (10, 4, 2, 7)])
def test_losses_and_gradients_are_the_packages(lengths):
    ids, tokens = texts(lengths), images()
    found, expected = {}, {}
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        theirs = original(caption_loss_weight=weights[0], contrastive_loss_weight=weights[1])
        mine = ours(theirs.state_dict())
        if weights[1] and min(lengths) < 10:
            continue  # the package's contrastive loss depends on padding
        loss = theirs(ids, image_tokens=tokens, return_loss=True)
        inner = mine(ids[:, :-1], tokens)
        if weights[0]:
            logits = torch.nn.functional.pad(inner.logits, (0, 0, 0, 1))
            total, count = caption_loss(logits, ids, 0)
            mine_loss = total / count
        else:
            mine_loss = contrastive_loss(inner.text_latents, inner.image_latents, mine.temperature)
        torch.testing.assert_close(mine_loss, loss, rtol=1e-5, atol=1e-5)
        (mine_loss + 0 * inner.logits.sum()).backward()
        loss.backward()
        found = {name: p.grad for name, p in mine.named_parameters() if p.grad is not None}
        expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
        for name, grad in expected.items():
            torch.testing.assert_close(found.get(name, torch.zeros_like(grad)), grad, rtol=1e-4, atol=1e-5, msg=name)


def test_size_and_names_at_the_published_size():
    vocabulary = 8000
    options = {"dim": 1024, "unimodal_depth": 6, "multimodal_depth": 6, "dim_latents": 5120, "image_dim": 1280}
    with torch.device("meta"):
        mine = CoCa(vocabulary, **options)
        theirs = coca_pytorch.CoCa(num_tokens=vocabulary, num_img_queries=256, **options)
    assert sum(p.numel() for p in mine.parameters()) == sum(p.numel() for p in theirs.parameters())
    without_words = sum(p.numel() for p in mine.parameters()) - vocabulary * 1024
    assert without_words == pytest.approx(259.7e6, abs=0.05e6)
    assert mine.state_dict().keys() == theirs.state_dict().keys()


# Where CoCa differs from the package, and why


def test_padding_does_not_change_a_text_and_changed_the_packages(pair):
    theirs, mine = pair
    ids = texts((6, 3))
    short, long = ids[1:, :3], torch.nn.functional.pad(ids[1:], (0, 20))
    for other in (ids[1:], long):
        torch.testing.assert_close(mine.embed_text(other)[0], mine.embed_text(short)[0], rtol=1e-5, atol=1e-5)
        assert (theirs.embed_text(other)[0] - theirs.embed_text(short)[0]).abs().max() > 1e-3
    together = mine.embed_text(ids)
    torch.testing.assert_close(together[0][1:], mine.embed_text(short)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(together[1][1:, :3], mine.embed_text(short)[1], rtol=1e-5, atol=1e-5)


def test_padded_image_tokens_do_not_count_and_did_in_the_package(pair):
    theirs, mine = pair
    tokens = images(2, 8)
    padded = torch.cat([tokens, torch.zeros(2, 5, 20)], dim=1)
    mask = (torch.arange(13) < 8).expand(2, -1)
    for found, expected in zip(mine.embed_image(padded, mask), mine.embed_image(tokens), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    before, after = (theirs.embed_image(image_tokens=one)[0] for one in (tokens, padded))
    assert (before - after).abs().max() > 1e-3
    padded.requires_grad_()
    mine.embed_image(padded, mask)[0].sum().backward()
    assert padded.grad[:, :8].abs().sum() > 0 and padded.grad[:, 8:].abs().sum() == 0


def test_an_empty_text_has_an_embedding(pair):
    found = pair[1].embed_text(texts((4, 0)))[0]
    alone = pair[1].embed_text(torch.zeros(1, 1, dtype=torch.int64))[0]
    torch.testing.assert_close(found[1:], alone, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(found).all()


def test_a_token_sees_none_after_it(pair):
    ids, tokens = texts((9,)), images(1)
    changed = ids.clone()
    changed[:, 5:] = ids[:, 5:] % (VOCABULARY - 1) + 1
    with torch.no_grad():
        found, other = (pair[1](one, tokens).logits for one in (ids, changed))
    torch.testing.assert_close(found[:, :5], other[:, :5], rtol=1e-5, atol=1e-5)
    assert (found[:, 5:] - other[:, 5:]).abs().amin(dim=(1,)).max() > 1e-3


# Generation


@pytest.mark.parametrize("rows", [1, 3])
def test_steps_equal_the_whole(pair, rows):
    model = pair[1]
    ids, tokens = texts((12,) * rows), images(rows)
    with torch.no_grad():
        expected = model(ids, tokens).logits
        pooled = model.embed_image(tokens)[1]
        cache = model.start_cache(pooled, 12)
        for position in range(12):
            found = model.step(ids[:, position : position + 1], position, cache)
            torch.testing.assert_close(found, expected[:, position], rtol=1e-5, atol=1e-5)


# Precision, memory


def test_the_gated_part_has_the_gradients_of_its_formula():
    inner = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expected = (torch.nn.functional.silu(inner[..., 4:]) * inner[..., :4]) @ weight.T
    torch.testing.assert_close(gated_linear(inner, weight), expected)
    assert torch.autograd.gradcheck(gated_linear, (inner, weight))
    assert torch.autograd.gradcheck(lambda x: gated_linear(x, weight.detach()), (inner,))
    assert torch.autograd.gradcheck(lambda w: gated_linear(inner.detach(), w), (weight,))


def test_the_split_product_is_the_whole_one_and_has_its_gradients():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.cat(split_linear(x, weight, 3), dim=-1), x @ weight.T)
    assert torch.autograd.gradcheck(lambda x, w: split_linear(x, w, 3), (x, weight))
    assert torch.autograd.gradcheck(lambda x: split_linear(x, weight.detach(), 3), (x,))
    assert torch.autograd.gradcheck(lambda w: split_linear(x.detach(), w, 3), (weight,))
    with torch.autocast("cpu", torch.bfloat16):
        head, rest = split_linear(x.float(), weight.float(), 3)
    assert head.dtype == rest.dtype == torch.bfloat16


def losses_of(model, ids, tokens):
    out = model(ids, tokens)
    terms = loss_terms(logits=out.logits, ids=ids, text_latents=out.text_latents, image_latents=out.image_latents,
                       log_scale=model.temperature)  # fmt: skip
    return sum(terms.values())


def test_half_precision_is_near():
    ids, tokens = texts((9, 5, 7)), images(3)
    grads = {}
    for enabled in (False, True):
        model = CoCa(**SHAPE, num_tokens=VOCABULARY, image_queries=QUERIES)
        model.load_state_dict(original().state_dict())
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = losses_of(model, ids, tokens)
        loss.backward()
        grads[enabled] = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert grads[enabled].dtype == torch.float32
    similarity = torch.cosine_similarity(grads[True], grads[False], dim=0)
    assert similarity > 0.98


def test_less_is_kept_for_the_backward_pass_than_by_the_package():
    options = {"dim": 256, "unimodal_depth": 2, "multimodal_depth": 2, "dim_latents": 64, "image_dim": 160}
    ids, tokens = texts((64, 64)), images(2, 32).repeat(1, 1, 8)
    theirs = coca_pytorch.CoCa(num_tokens=VOCABULARY, num_img_queries=32, **options)
    mine = CoCa(VOCABULARY, image_queries=32, **options)

    by_them = kept_bytes(lambda: theirs(ids, image_tokens=tokens, return_loss=True), theirs.parameters())
    by_us = kept_bytes(lambda: losses_of(mine, ids, tokens), mine.parameters())
    assert by_us <= 0.6 * by_them


# Losses


def entropy(scores, target):
    return -(scores[target] - np.log(np.exp(scores).sum()))


def test_caption_loss_is_the_mean_over_what_is_predicted():
    rng = np.random.default_rng(5)
    ids, logits = texts((6, 3, 2)), rng.normal(size=(3, 6, VOCABULARY))
    expected = [entropy(logits[row, t], ids[row, t + 1]) for row, n in ((0, 6), (1, 3), (2, 2)) for t in range(n - 1)]
    total, count = caption_loss(torch.from_numpy(logits), ids, 0)
    assert count == len(expected) == 8
    assert total.item() == pytest.approx(sum(expected), rel=1e-5)
    parts = [caption_loss(torch.from_numpy(logits[row : row + 1]), ids[row : row + 1], 0) for row in range(3)]
    assert sum(part[0].item() for part in parts) == pytest.approx(total.item(), rel=1e-5)
    terms = loss_terms(logits=torch.from_numpy(logits), ids=ids, caption_weight=2.0)
    assert terms["caption"].item() == pytest.approx(2 * np.mean(expected), rel=1e-5)
    terms = loss_terms(logits=torch.from_numpy(logits), ids=ids, tokens=100)
    assert terms["caption"].item() == pytest.approx(sum(expected) / 100, rel=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=7), st.integers(0, 99))
def test_contrastive_loss_leaves_equal_texts_out(names, seed):
    rng = np.random.default_rng(seed)
    text, image = (rng.normal(size=(len(names), 5)) for _ in range(2))
    scores = text @ image.T * np.exp(0.7)
    expected = 0
    for row, name in enumerate(names):
        others = [column for column, other in enumerate(names) if other != name or column == row]
        place = others.index(row)
        expected += entropy(scores[row, others], place) + entropy(scores[others, row], place)
    same = torch.tensor(names)[:, None] == torch.tensor(names)
    text, image, scale = torch.from_numpy(text), torch.from_numpy(image), torch.tensor([0.7], dtype=torch.float64)
    found = contrastive_loss(text, image, scale, same)
    assert found.item() == pytest.approx(expected / (2 * len(names)), rel=1e-9, abs=1e-12)
    terms = loss_terms(text_latents=text, image_latents=image, log_scale=scale, same=same, contrastive_weight=3.0)
    assert list(terms) == ["contrastive"]
    assert terms["contrastive"].item() == pytest.approx(3 * found.item())


# The model with its slide encoder

MODEL = ModelSettings(**{name: value for name, value in SHAPE.items() if name != "image_dim"}, image_queries=QUERIES)
ENCODER = {"dim": 20, "latents": 6, "depth": 3, "transformer_depth": 1, "heads": 2}
TILE_DIM = 9


def slide_model(seed=0, **options):
    return build(MODEL, EncoderSettings(**ENCODER), TILE_DIM, VOCABULARY, 0, seed, **options)


def test_the_slide_encoder_is_called_and_learns():
    model = slide_model()
    tiles = torch.randn(3, 12, TILE_DIM).half()
    mask = torch.arange(12) < torch.tensor([12, 4, 7])[:, None]
    tokens, token_mask = model.image_tokens(tiles, mask)
    assert tokens.shape == (3, 6, 20) and token_mask is None
    chunked, _ = model.image_tokens(tiles, mask, chunk=5)
    torch.testing.assert_close(chunked, tokens, rtol=1e-4, atol=1e-4)
    out = model(texts((5, 5, 5)), tiles, mask)
    out.logits.square().sum().backward()
    assert all(p.grad is not None for p in model.encoder.perceiver.parameters())
    assert model(texts((5, 5, 5)), tiles, mask, captions=False).logits is None


def test_stored_latents_are_taken_as_they_are(tmp_path):
    settings = EncoderSettings(**ENCODER, weights="some.bin")
    model = build(MODEL, settings, TILE_DIM, VOCABULARY, 0, 0)
    assert model.encoder is None
    latents = torch.randn(2, 6, 20).half()
    tokens, mask = model.image_tokens(latents, torch.ones(2, 6, dtype=torch.bool))
    assert tokens.dtype == torch.float32 and torch.equal(tokens, latents.float()) and mask.all()
    with pytest.raises(KilnError, match=r"\[2, 6, 21\], expected \[B, N, 20\]"):
        model.image_tokens(torch.zeros(2, 6, 21))


def test_the_seed_decides_the_weights_and_nothing_else(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    models = [slide_model(seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, again) and not torch.equal(first, other)
    save_file(models[2].encoder.state_dict(), tmp_path / "weights.safetensors")
    started = slide_model(1, weights=tmp_path / "weights.safetensors", temperature=2.5)
    assert all(
        torch.equal(a, b) for a, b in zip(started.encoder.parameters(), models[2].encoder.parameters(), strict=True)
    )
    assert started.coca.temperature.item() == 2.5


# Checkpoints


@pytest.fixture
def tokenizers(tmp_path):
    """Two folders of tokenizers that differ."""
    folders = [tmp_path / name for name in ("one", "other")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps({"version": str(number)}))
    return folders


def facts_of(tokenizer, frozen=None):
    return checkpoints.Facts(
        TILE_DIM, encoder_shape(EncoderSettings(**ENCODER)), MODEL.model_dump(), VOCABULARY, 0,
        checkpoints.identity(tokenizer), frozen, 12, 3,
    )  # fmt: skip


def test_a_checkpoint_comes_back(tokenizers, tmp_path):
    model, path = slide_model().train(), tmp_path / "model.safetensors"
    facts = facts_of(tokenizers[0])
    checkpoints.save(path, model, facts)
    first = path.read_bytes()
    checkpoints.save(path, model, facts)
    assert path.read_bytes() == first
    random = torch.get_rng_state()
    loaded, found = checkpoints.load(path, tokenizers[0])
    assert torch.equal(torch.get_rng_state(), random)
    assert found == facts == checkpoints.read(path)[0] and not loaded.training
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.coca.to_logits[1].weight is loaded.coca.token_emb.weight
    theirs = coca_pytorch.CoCa(**SHAPE, num_tokens=VOCABULARY, num_img_queries=QUERIES)
    tensors = checkpoints.read(path)[1]
    own = {name.removeprefix("coca."): value for name, value in tensors.items() if name.startswith("coca.")}
    theirs.load_state_dict({**own, "to_logits.1.weight": own["token_emb.weight"]})


def test_a_frozen_encoder_is_not_in_the_checkpoint(tokenizers, tmp_path):
    path = tmp_path / "model.safetensors"
    model = SlideModel(None, slide_model().coca)
    checkpoints.save(path, model, facts_of(tokenizers[0], frozen="ab" * 32))
    assert not [name for name in checkpoints.read(path)[1] if name.startswith("encoder.")]
    assert checkpoints.load(path, None)[0].encoder is None


def test_another_tokenizer_is_refused(tokenizers, tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoints.save(path, slide_model(), facts_of(tokenizers[0]))
    with pytest.raises(KilnError) as caught:
        checkpoints.load(path, tokenizers[1])
    for folder in tokenizers:
        assert checkpoints.identity(folder)[:12] in caught.value.message
    with pytest.raises(KilnError, match="no tokenizer"):
        checkpoints.load(path, tmp_path)


def test_what_is_no_checkpoint_is_refused(tokenizers, tmp_path):
    path, facts = tmp_path / "model.safetensors", facts_of(tokenizers[0])
    with pytest.raises(KilnError, match="no checkpoint"):
        checkpoints.load(path, None)
    path.write_bytes(b"damaged")
    with pytest.raises(KilnError, match="no checkpoint"):
        checkpoints.load(path, None)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(KilnError, match="no checkpoint"):
        checkpoints.load(path, None)
    checkpoints.save(path, slide_model(), facts)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(KilnError, match="no checkpoint"):
        checkpoints.load(path, None)
    checkpoints.save(path, slide_model(), facts._replace(vocabulary=VOCABULARY + 1))
    with pytest.raises(KilnError, match="not the model that it describes"):
        checkpoints.load(path, None)
    checkpoints.save(path, SlideModel(None, slide_model().coca), facts)
    with pytest.raises(KilnError, match="not the model that it describes"):
        checkpoints.load(path, None)
