"""Greedy captions: the cache changes nothing, rows end by themselves, and no caption depends on its neighbours."""

import pytest
import torch

from scripts.coca.generation import greedy, greedy_ids
from scripts.coca.model import CoCa

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 23


class Letters:
    """Ids as letters."""

    pad_id, bos_id, eos_id, size = PAD, BOS, EOS, VOCABULARY

    def decode(self, ids) -> str:
        assert not {PAD, BOS, EOS} & set(ids)
        return "".join(chr(ord("a") + one - 3) for one in ids)


@pytest.fixture(scope="module")
def model() -> CoCa:
    """Weights of so wide a spread that captions differ, and a bias by the image towards the end."""
    torch.manual_seed(4)
    made = CoCa(VOCABULARY, 24, 2, 2, 16, image_dim=20, image_queries=3, dim_head=8, heads=2, ff_mult=2)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return made.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return 3 * torch.randn(12, 5, 20, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def without_cache(model, image_tokens, mask, length) -> list[list[int]]:
    """The whole text anew for each token, a row at a time."""
    made = []
    for row in range(len(image_tokens)):
        _, pooled = model.embed_image(image_tokens[row : row + 1], None if mask is None else mask[row : row + 1])
        ids = [BOS]
        while len(ids) <= length:
            _, tokens = model.embed_text(torch.tensor([ids]))
            logits = model.logits(tokens, pooled)[0, -1]
            logits[[PAD, BOS]] = -torch.inf
            chosen = int(logits.argmax())
            if chosen == EOS:
                break
            ids.append(chosen)
        made.append(ids[1:])
    return made


@pytest.mark.parametrize("length", [1, 5, 40])
def test_the_cache_changes_no_token(model, images, length):
    mask = torch.rand(12, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, 0] = True
    for one in (None, mask):
        wanted = without_cache(model, images, one, length)
        assert greedy_ids(model, images, one, Letters(), length) == wanted
        assert len({tuple(row) for row in wanted}) > 1
        assert all(len(row) <= length for row in wanted)


def test_each_row_ends_where_it_ends(model, images):
    lengths = {len(row) for row in greedy_ids(model, images, None, Letters(), 40)}
    assert len(lengths) > 2 and min(lengths) < 40


def test_neighbours_and_their_order_change_nothing(model, images):
    whole = greedy(model, images, None, Letters(), 30)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert greedy(model, images[order], None, Letters(), 30) == [whole[i] for i in order]
    assert [greedy(model, images[i : i + 1], None, Letters(), 30)[0] for i in range(12)] == whole


def test_all_rows_may_end_at_once(model, images):
    class Silent(Letters):
        eos_id = 3

    first = greedy_ids(model, images, None, Silent(), 1)
    silent = [row for row, ids in enumerate(first) if not ids]
    if not silent:
        Silent.eos_id, silent = first[0][0], [0]
    assert greedy(model, images[silent], None, Silent(), 9) == [""] * len(silent)


def test_nothing_is_trained_by_it(model, images):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    greedy(model, images, None, Letters(), 5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
