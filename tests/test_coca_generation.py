"""Captions: the cache changes nothing, rows end by themselves, and no caption depends on its neighbours."""

import itertools
from collections import Counter

import pytest
import torch

from scripts.coca.generation import beam_ids, captions, greedy, greedy_ids, sampled_ids
from scripts.coca.model import CoCa
from scripts.coca.settings import CaptionSettings

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


def test_one_mark_for_begin_and_end_still_ends_captions(model, images):
    """As GPT-2's tokenizer has it."""

    class OneMark(Letters):
        bos_id = eos_id = EOS

    made = greedy_ids(model, images, None, OneMark(), 40)
    assert min(len(row) for row in made) < 40 and all(EOS not in row for row in made)


# Beam search


@torch.no_grad()
def log_probabilities(model, pooled, ids: list[int]) -> torch.Tensor:
    """Of the token after `ids`, among those that a text may hold."""
    logits = model.logits(model.embed_text(torch.tensor([ids]))[1], pooled)[0, -1].double()
    logits[[PAD, BOS]] = -torch.inf
    return logits.log_softmax(dim=0)


def score_of(model, pooled, text: list[int], length: int) -> float:
    """Log probability of a text, with its end mark where it has one."""
    whole = text if len(text) == length else [*text, EOS]
    return sum(float(log_probabilities(model, pooled, [BOS, *whole[:i]])[one]) for i, one in enumerate(whole))


def plain_beams(model, pooled, length: int, beams: int) -> tuple[list[int], float]:
    """Beam search as in a textbook, over lists, the whole text anew for each token; the first text is greedy's."""
    kept = [(0.0, [], False)]
    for _ in range(length):
        after = []
        for score, ids, ended in kept:
            found = log_probabilities(model, pooled, [BOS, *ids])
            going = [(score + float(found[one]), [*ids, one], False) for one in range(3, VOCABULARY)]
            after.append([(score, ids, True)] if ended else [(score + float(found[EOS]), ids, True), *going])
        first = max(after[0])
        others = sorted((one for every in after for one in every if one is not first), reverse=True)
        kept = [first, *others[: beams - 1]]
    score, ids, _ = max(kept)
    return ids, score


def pooled_of(model, images, row: int) -> torch.Tensor:
    with torch.no_grad():
        return model.embed_image(images[row : row + 1])[1]


@pytest.mark.parametrize(("length", "beams"), [(1, 3), (4, 2), (12, 5)])
def test_beams_are_those_of_a_textbook(model, images, length, beams):
    found, scores = beam_ids(model, images, Letters(), length, beams)
    for row in range(len(images)):
        ids, score = plain_beams(model, pooled_of(model, images, row), length, beams)
        assert found[row] == ids
        assert scores[row] == pytest.approx(score, abs=1e-4)
        assert scores[row] == pytest.approx(score_of(model, pooled_of(model, images, row), ids, length), abs=1e-4)


def test_one_beam_is_greedy_and_more_are_likelier(model, images):
    greedily = greedy_ids(model, images, None, Letters(), 20)
    assert beam_ids(model, images, Letters(), 20, 1)[0] == greedily
    found, scores = beam_ids(model, images, Letters(), 20, 8)
    gains = [score - score_of(model, pooled_of(model, images, row), greedily[row], 20)
             for row, score in enumerate(scores)]  # fmt: skip
    assert min(gains) > -1e-4 and max(gains) > 0.1 and found != greedily


def test_beams_enough_for_all_texts_find_the_likeliest(model, images):
    """Of all texts of at most two tokens."""
    every = [list(text) for n in range(3) for text in itertools.product(range(3, VOCABULARY), repeat=n)]
    found, scores = beam_ids(model, images[:3], Letters(), 2, VOCABULARY**2)
    for row in range(3):
        pooled = pooled_of(model, images, row)
        first = log_probabilities(model, pooled, [BOS])
        after = {one: log_probabilities(model, pooled, [BOS, one]) for one in range(3, VOCABULARY)}
        sums = {(): float(first[EOS])}
        sums |= {(one,): float(first[one] + after[one][EOS]) for one in after}
        sums |= {(one, two): float(first[one] + after[one][two]) for one in after for two in after}
        assert len(sums) == len(every) and tuple(found[row]) == max(sums, key=sums.get)
        assert scores[row] == pytest.approx(max(sums.values()), abs=1e-4)


# Draws


def drawn(model, images, slides, length: int = 20, **values) -> list[list[int]]:
    return sampled_ids(model, images, Letters(), CaptionSettings(max_length=length, **values), slides)


def test_draws_follow_seed_and_slide_alone(model, images):
    names = [f"slide {number}" for number in range(12)]
    first = drawn(model, images, names, top_k=5)
    assert first == drawn(model, images, names, top_k=5)
    assert first != drawn(model, images, names, top_k=5, seed=1)
    assert first != drawn(model, images, names[::-1], top_k=5)
    order = [7, 2, 11]
    assert drawn(model, images[order], [names[i] for i in order], top_k=5) == [first[i] for i in order]
    greedily = greedy_ids(model, images, None, Letters(), 20)
    assert drawn(model, images, names, top_k=1) == greedily
    assert drawn(model, images, names, top_k=VOCABULARY + 9, temperature=1e-4) == greedily


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_of_the_likeliest_in_proportion_to_their_probability(model, images, temperature):
    count = 3000
    made = drawn(model, images[:1].expand(count, -1, -1), list(map(str, range(count))), 1, top_k=4,
                 temperature=temperature)  # fmt: skip
    best, ids = log_probabilities(model, pooled_of(model, images, 0), [BOS]).topk(4)
    seen = Counter(row[0] if row else EOS for row in made)
    assert set(seen) <= set(ids.tolist())
    for one, share in zip(ids.tolist(), (best / temperature).softmax(dim=0).tolist(), strict=True):
        # four standard deviations of a share
        assert seen[one] / count == pytest.approx(share, abs=4 * (share * (1 - share) / count) ** 0.5 + 1e-9)


def test_settings_choose_how_captions_are_made(model, images):
    names = [str(number) for number in range(12)]

    def made(**values) -> list[str]:
        return captions(model, images, Letters(), CaptionSettings(max_length=20, **values), names)

    plain = [Letters().decode(row) for row in greedy_ids(model, images, None, Letters(), 20)]
    assert made() == plain
    assert made(beams=8) == [Letters().decode(row) for row in beam_ids(model, images, Letters(), 20, 8)[0]]
    assert made(top_k=5) == [Letters().decode(row) for row in drawn(model, images, names, top_k=5)] != plain
    with pytest.raises(ValueError, match="beams 2 and top_k 3: give one of them"):
        CaptionSettings(beams=2, top_k=3)
