"""The loss of who sees no image: below it, a model must have looked."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from scripts.common.errors import KilnError
from scripts.common.trivial import blind_loss

ROWS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=30)


@settings(deadline=None)
@given(ROWS, st.integers(0, 2**16))
def test_no_predictor_that_knows_the_question_alone_has_less(rows, seed):
    """Any table of logits (question, answer) is such a predictor; the table of frequencies reaches the line."""
    questions, answers, tokens = (list(one) for one in zip(*rows, strict=True))
    asked, told = torch.tensor(questions), torch.tensor(answers)
    line = blind_loss(questions, answers, tokens)
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 4)) * 3)
    other = F.cross_entropy(logits[asked], told, reduction="sum") / sum(tokens)
    counts = torch.zeros(3, 4, dtype=torch.float64).index_put_((asked, told), torch.ones(len(rows)).double(), True)
    best = F.cross_entropy(counts.log()[asked], told, reduction="sum") / sum(tokens)
    assert line == pytest.approx(float(best), abs=1e-9)
    assert line <= float(other) + 1e-9


def test_one_answer_to_each_question_needs_no_image():
    assert blind_loss(["a", "b", "a"], ["x", "y", "x"], [2, 3, 2]) == 0


@pytest.mark.parametrize("rows", [([], [], []), (["a"], ["x", "y"], [1, 1]), (["a"], ["x"], []), (["a"], ["x"], [0])])
def test_it_refuses_what_has_no_tokens_or_does_not_fit(rows):
    with pytest.raises(KilnError, match="answers"):
        blind_loss(*rows)
