"""CoCa against the package CoCa-pytorch on shared weights, and where it must differ from it."""

import coca_pytorch
import numpy as np
import pytest
import torch

from scripts.coca.losses import caption_loss, contrastive_loss
from scripts.coca.model import CoCa

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
