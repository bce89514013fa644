"""Training of pipeline coca: batches, the contrastive loss beyond a pass, and that no kill costs more than time."""

import functools
import os
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed

from scripts.coca import batches, contrastive
from scripts.coca.batches import Budget, Lengths
from scripts.common.errors import KilnError

NO_LIMIT = Budget(10**9, 10**9)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@st.composite
def corpora(draw) -> Lengths:
    pairs = draw(st.integers(1, 120))
    sizes = st.lists(st.integers(1, 3000), min_size=pairs, max_size=pairs)
    return Lengths(np.array(draw(sizes)), np.array(draw(sizes)))


@settings(deadline=None)
@given(corpora(), st.integers(1, 40), st.integers(0, 2**63 - 1), st.integers(0, 100))
def test_batches_are_a_function_of_seed_and_epoch_and_hold_each_pair_once(lengths, batch_size, seed, epoch):
    made = batches.epoch_batches(lengths, batch_size, seed, epoch)
    again = batches.epoch_batches(lengths, batch_size, seed, epoch)
    assert [one.tolist() for one in made] == [one.tolist() for one in again]
    pairs = len(lengths.tiles)
    assert sorted(np.concatenate(made).tolist()) == list(range(pairs))
    sizes = [len(one) for one in made]
    assert len(made) == batches.count(pairs, batch_size) and max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(corpora(), st.integers(1, 40), st.integers(1, 4), st.integers(3000, 30_000), st.integers(3000, 30_000))
def test_passes_keep_the_budget_and_processes_share_a_batch(lengths, batch_size, ranks, tiles, tokens):
    for batch in batches.epoch_batches(lengths, batch_size, 0, 0):
        cut = [batches.passes(batches.share(batch, rank, ranks), lengths, Budget(tiles, tokens))
               for rank in range(ranks)]  # fmt: skip
        assert sorted(int(i) for parts in cut for part in parts for i in part) == sorted(batch.tolist())
        for part in (part for parts in cut for part in parts):
            assert len(part) * lengths.tiles[part].max() <= tiles
            assert len(part) * lengths.tokens[part].max() <= tokens


def test_epochs_and_seeds_differ_and_a_resumed_epoch_goes_on():
    rng = np.random.default_rng(0)
    lengths = Lengths(rng.integers(50, 3000, 200), rng.integers(5, 60, 200))
    made = {key: batches.epoch_batches(lengths, 16, *key) for key in ((0, 0), (0, 1), (1, 0))}
    first = {key: [sorted(one.tolist()) for one in every] for key, every in made.items()}
    # other members, not only another order
    assert not any(one in first[0, 1] or one in first[1, 0] for one in first[0, 0])
    whole = [batches.passes(one, lengths, Budget(20_000, 10**6)) for one in made[0, 0]]
    half = list(batches.Passes(whole[5:], 0, twice=True))
    assert list(batches.Passes(whole, 0, twice=True))[-len(half) :] == half


def test_several_passes_are_given_twice_and_a_single_one_once():
    several, one = [np.array([1]), np.array([2, 0])], [np.array([3])]
    assert list(batches.Passes([several, one], 7, twice=True)) == [
        [(7, 1)], [(7, 2), (7, 0)], [(7, 1)], [(7, 2), (7, 0)], [(7, 3)],
    ]  # fmt: skip
    assert len(batches.Passes([several, one], 7, twice=False)) == 3


def test_like_lengths_train_together():
    """Padding of batches by length against that of batches by chance."""
    rng = np.random.default_rng(0)
    lengths = Lengths(np.exp(rng.uniform(np.log(50), np.log(3000), 2000)).astype(int), rng.integers(5, 60, 2000))

    def padded(every) -> float:
        return sum(len(one) * lengths.tiles[one].max() for one in every) / lengths.tiles.sum()

    by_chance = np.array_split(rng.permutation(2000), 250)
    assert padded(batches.epoch_batches(lengths, 8, 0, 0)) < 1.3 < 2 < padded(by_chance)
    same_slides = lengths._replace(tiles=np.full(2000, 512))
    text = sum(len(one) * lengths.tokens[one].max() for one in batches.epoch_batches(same_slides, 8, 0, 0))
    assert text < 1.1 * lengths.tokens.sum()


def test_what_no_batch_can_be_made_of_is_refused():
    lengths, names = Lengths(np.array([10, 50, 20, 30, 5]), np.array([5, 6, 7, 80, 9])), list("abcde")

    def refuse(message: str, batch_size: int = 4, budget: Budget = NO_LIMIT, ranks: int = 1) -> None:
        with pytest.raises(KilnError, match=message):
            batches.check(lengths, batch_size, budget, ranks, names)

    refuse("5 training pairs, fewer than coca.train.batch_size 6", 6)
    refuse("batch_size 4 over 3 processes", ranks=3)
    refuse("leave one of 2 for 4 processes", ranks=4)
    refuse("slide b: 50 tiles, more than coca.train.max_tiles 40", budget=Budget(40, 100))
    refuse("slide d: 80 text tokens, more than coca.train.max_tokens 64", budget=Budget(50, 64))
    batches.check(lengths, 4, Budget(50, 80), 2, names)


class Towers(torch.nn.Module):
    """Two small encoders, a scale, and a loss of each pair alone."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.text, self.image = (torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
                                 for _ in range(2))  # fmt: skip
        self.scale = torch.nn.Parameter(torch.tensor([1.3]))
        self.to(dtype)

    def encode(self, part):
        return tuple(torch.nn.functional.normalize(tower(x), dim=-1)
                     for tower, x in zip((self.text, self.image), part, strict=True))  # fmt: skip

    def terms(self, part, pairs: int):
        text, image = self.encode(part)
        return text, image, (text.detach().roll(1, 1) * image).pow(3).sum() / pairs + text.pow(3).sum() / pairs


def contrast(text, image, scale, same=None):
    """Straight from the definition."""
    similarity = text @ image.T * scale.exp()
    if same is not None:
        similarity = similarity.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool), -torch.inf)
    own = similarity.diagonal()
    return ((similarity.logsumexp(0) - own).mean() + (similarity.logsumexp(1) - own).mean()) / 2


def pairs_of(dtype: torch.dtype, count: int = 12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, count, 6, generator=generator, dtype=torch.float64).to(dtype)


def one_big_batch(dtype: torch.dtype, data, same=None):
    model = Towers(dtype)
    text, image, own = model.terms(data, data.shape[1])
    loss = contrast(text, image, model.scale, same)
    (loss + own).backward()
    return loss.item(), own.item(), [p.grad for p in model.parameters()]


def in_passes(dtype: torch.dtype, data, cuts: list[int], sides: contrastive.Sides, same=None):
    """As `one_big_batch`, of the rows that `sides` gives this process, cut at `cuts`."""
    model, own = Towers(dtype), data[:, sides.own]
    parts = [part for part in own.tensor_split(sorted(cuts), dim=1) if part.shape[1]]
    stream = iter(parts * (2 if len(parts) > 1 else 1))
    terms = functools.partial(model.terms, pairs=data.shape[1])
    loss = functools.partial(contrast, same=same)
    by_itself, whole = contrastive.backward(stream, len(parts), model.encode, terms, model.scale, loss, sides)
    assert next(stream, None) is None
    if len(sides.counts) > 1:
        contrastive.sum_gradients(list(model.parameters()))
        distributed.all_reduce(by_itself)
    return whole.item(), by_itself.item(), [p.grad for p in model.parameters()]


def assert_equal(found, wanted, tolerance: float) -> None:
    assert found[:2] == pytest.approx(wanted[:2], abs=tolerance)
    for mine, other in zip(found[2], wanted[2], strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@settings(deadline=None)
@given(st.lists(st.integers(1, 11), max_size=11), st.booleans())
def test_any_passes_equal_one_big_batch(dtype, tolerance, cuts, with_same):
    data = pairs_of(dtype)
    same = contrastive.same(torch.arange(12) // 2) if with_same else None
    found = in_passes(dtype, data, cuts, contrastive.Sides((12,), 0), same)
    assert_equal(found, one_big_batch(dtype, data, same), tolerance)


def of_two(rank: int, port: int, job, *arguments) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        job(rank, *arguments)
    finally:
        distributed.destroy_process_group()


def two_processes(job, *arguments) -> None:
    torch.multiprocessing.spawn(of_two, (free_port(), job, *arguments), nprocs=2)


def two_equal_one(rank: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        data = pairs_of(dtype)
        for counts, cuts in (((6, 6), ([], [])), ((7, 5), ([3], [])), ((5, 7), ([1, 2], [4]))):
            for same in (None, contrastive.same(torch.arange(12) % 7)):
                found = in_passes(dtype, data, cuts[rank], contrastive.Sides(counts, rank), same)
                assert_equal(found, one_big_batch(dtype, data, same), tolerance)


def test_two_processes_with_different_passes_equal_one():
    two_processes(two_equal_one)


def original(images: torch.Tensor, texts: torch.Tensor):
    from coca_pytorch.coca_pytorch import CoCa

    torch.manual_seed(0)
    model = CoCa(dim=16, num_tokens=11, unimodal_depth=1, multimodal_depth=1, dim_latents=8, image_dim=6,
                 num_img_queries=3, dim_head=8, heads=2, caption_loss_weight=0.0)  # fmt: skip
    loss = model(texts, image_tokens=images, return_loss=True)
    loss.backward()
    return loss, model


def the_original_fails(rank: int) -> None:
    """Labels count the local batch, latents are those of all."""
    generator = torch.Generator().manual_seed(rank)
    with pytest.raises(ValueError, match="batch_size"):
        original(torch.randn(3, 4, 6, generator=generator), torch.randint(1, 11, (3, 7), generator=generator))


def test_the_original_has_labels_of_the_local_batch_alone():
    two_processes(the_original_fails)


def test_rows_that_do_not_fit_are_a_defect():
    with pytest.raises(KilnError, match="process 0 has 3 rows of a global batch, expected 2"):
        contrastive.gather(torch.zeros(3, 1), contrastive.Sides((2, 1), 0))


def test_equal_texts():
    assert contrastive.same(torch.tensor([4, 1, 4])).tolist() == [[True, False, True], [False, True, False],
                                                                  [True, False, True]]  # fmt: skip
