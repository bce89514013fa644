"""The loss of a guess by frequency: below it, a model knows more than how often tokens occur."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from scripts.common.errors import KilnError
from scripts.common.trivial import guess_loss

KINDS, TOKENS, PLACES = 3, 4, 5
ANSWERS = st.lists(
    st.tuples(st.integers(0, KINDS - 1), st.lists(st.integers(0, TOKENS - 1), min_size=1, max_size=PLACES)),
    min_size=1,
    max_size=20,
)


@settings(deadline=None)
@given(ANSWERS, st.integers(0, 2**16))
def test_no_table_of_kind_and_place_has_less(rows, seed):
    """Any logits [kinds, places, tokens] are such a guess; those of the frequencies reach the line."""
    kinds, answers = zip(*rows, strict=True)
    line = guess_loss(kinds, answers)
    kind, place, token = torch.tensor([(k, at, one) for k, answer in rows for at, one in enumerate(answer)]).T
    shape = KINDS, PLACES, TOKENS
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=shape) * 3)
    counts = torch.zeros(shape).double().index_put_((kind, place, token), torch.ones(len(token)).double(), True)
    best, other = (float(F.cross_entropy(table[kind, place], token)) for table in (counts.log(), logits))
    assert line == pytest.approx(best, abs=1e-9)
    assert line <= other + 1e-9


def test_equal_answers_need_no_image_and_two_as_frequent_ones_cost_ln_2_where_they_differ():
    assert guess_loss(["a", "b", "a"], [[1, 2], [3], [1, 2]]) == 0
    assert guess_loss(["a", "a"], [[7, 1, 0], [7, 2, 0]]) == pytest.approx(np.log(2) / 3)


@pytest.mark.parametrize("rows", [([], []), (["a"], [[1], [2]]), (["a"], [[]])])
def test_it_refuses_what_has_no_tokens_or_does_not_fit(rows):
    with pytest.raises(KilnError, match="kinds"):
        guess_loss(*rows)
