"""Comparing answers, the reward's parts, and a user's own reward: numbers by hand, properties on any text."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from scripts.common.errors import KilnError
from scripts.vase import answers, reward_plugin
from scripts.vase.rewards import Reward, stutters
from scripts.vase.settings import CAPTION, DIMENSIONS, RewardSettings

PLAIN = RewardSettings(format="plain")
FACTS = {
    "fabric": "Athenian",
    "technique": "black-figure",
    "shape": "amphora",
    "dating": "-525 to -500",
    "decoration": "warriors fighting",
    "attribution": "Key Painter",
}
RIGHT = "Attic black figure amphorae, c. 525-500 BCE; warriors fighting, Key Painter"
TEXTS = st.one_of(
    st.text(max_size=80),
    st.text(alphabet="<>/thinkanswer 年黑绘-0123456789bce.", max_size=80),
    st.sampled_from(["", "\ud800", "\0", "<think>", "</answer><answer>", "红绘双耳瓶", "9" * 5000, "a b " * 30000]),
)
YEARS = st.tuples(st.integers(-900, 300), st.integers(0, 200)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def distance(a: str, b: str) -> int:
    """Levenshtein's distance by its recurrence."""
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
        last = row
    return last[-1]


# answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-575 to -550", (-575, -550)),
        ("−575 – −550", (-575, -550)),
        ("c. 525–475 BCE", (-525, -475)),
        ("525-475 B.C.", (-525, -475)),
        ("475-525 BC", (-525, -475)),
        ("from 525 BC to 475 BC", (-525, -475)),
        ("525-475", (-525, -475)),
        ("100-200", (100, 200)),
        ("ca. 500 BC", (-500, -500)),
        ("6th century BCE", (-600, -501)),
        ("2nd century AD", (101, 200)),
        ("AD 50 to 100", (50, 100)),
        ("50 BCE to 20 CE", (-50, 20)),
        ("Athenian lekythos, c. 525–475 BCE, depicting 3 men", (-525, -475)),
        ("no date", None),
        ("", None),
        ("7" * 90_000, None),
    ],
)
def test_dates_in_the_published_styles(text, expected):
    assert answers.date_range(text) == expected


def test_overlap_by_hand():
    assert answers.overlap((-525, -500), (-525, -500)) == 1
    assert answers.overlap((-525, -500), (-499, -475)) == 0
    assert answers.overlap((-525, -501), (-512, -488)) == pytest.approx(12 / 38)
    assert answers.range_overlap("525-501 BC", "-512 to -488") == pytest.approx(12 / 38)
    assert answers.range_overlap("unknown", "-512 to -488") == 0


@given(YEARS, YEARS)
def test_overlap_is_that_of_sets_of_years(a, b):
    x, y = set(range(a[0], a[1] + 1)), set(range(b[0], b[1] + 1))
    between = range(min(a[0], b[0]), max(a[1], b[1]) + 1)
    assert answers.overlap(a, b) == answers.overlap(b, a) == pytest.approx(len(x & y) / len(between))


@given(st.text("abcd ", min_size=1, max_size=12), st.text("abcd ", min_size=1, max_size=12))
def test_anls_is_levenshteins_similarity_cut_at_a_half(a, b):
    first, second = answers.normalise(a), answers.normalise(b)
    longest = max(len(first), len(second))
    expected = 1 - distance(first, second) / longest if longest else 1.0
    assert answers.edit_similarity(a, b) == pytest.approx(expected)
    assert answers.anls(a, b) == pytest.approx(expected if expected >= 0.5 else 0.0)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("a man and a horse", "a man and a horse", 1.0),
        ("two men", "two men fight", math.exp(1 - 3 / 2)),  # all right, but short
        ("man man man", "one man", 1 / 3),  # counted once, as often as it is there
        ("warriors", "dancers", 0.0),
        ("", "dancers", 0.0),
        ("两个战士", "两个舞者", 0.5),
    ],
)
def test_bleu1_by_hand(answer, reference, expected):
    assert answers.bleu1(answer, reference) == pytest.approx(expected, abs=1e-9)


def test_words_sets_and_synonyms():
    assert answers.words("Black-figure 双耳瓶!") == ["black", "figure", "双", "耳", "瓶"]
    assert answers.lexical_overlap("a red vase", "red krater") == pytest.approx(1 / 4)
    assert answers.token_f1("warriors and dancers", "dancers") == pytest.approx(0.5)
    for said, dimension, true in (
        ("Black figure", "technique", "black-figure"),
        ("a neck-amphora.", "shape", "Amphora"),
        ("OENOCHOE", "shape", "oinochoe"),
        ("Attic", "fabric", "Athenian"),
        ("c. 525-500 BCE", "dating", "-525 to -500"),
    ):
        assert answers.exact(said, true, dimension), said
    assert not answers.exact("red-figure", "black-figure", "technique")
    assert answers.exact("schwarzfigurig", "black-figure", "technique", {"Schwarzfigurig": "black-figure"})


@given(TEXTS, TEXTS)
@settings(max_examples=60)
def test_measures_lie_from_0_to_1_and_are_symmetric_where_they_should_be(a, b):
    for measure in (answers.anls, answers.bleu1, answers.lexical_overlap, answers.token_f1, answers.range_overlap):
        assert 0 <= measure(a, b) <= 1
    for measure in (answers.anls, answers.lexical_overlap, answers.token_f1, answers.range_overlap):
        assert measure(a, b) == pytest.approx(measure(b, a))
    for dimension in DIMENSIONS:
        assert 0 <= answers.similarity(a, b, dimension) <= 1


# the reward


def test_a_right_caption_has_all_of_it_and_the_bonus():
    scored = Reward(PLAIN).content(RIGHT, "unused", CAPTION, FACTS)
    assert scored.parts == dict.fromkeys(FACTS, 1.0)
    assert scored.base == pytest.approx(1) and scored.value == pytest.approx(1.1)
    as_json = Reward(PLAIN).content(RIGHT, "unused", CAPTION, json.dumps(FACTS))
    assert as_json == scored


def test_r_by_hand_with_weights_penalty_and_bonus():
    reward = Reward(
        PLAIN.model_copy(update={"weights": {"technique": 3.0, "shape": 1.0}, "penalty": 0.25, "bonus": 0.5})
    )
    facts = {"technique": "red-figure", "shape": "kylix"}
    assert reward.content("a red-figure vessel", "", CAPTION, facts).value == pytest.approx(0.75)
    assert reward.content("a red-figure krater", "", CAPTION, facts).value == pytest.approx(0.75 - 0.25)
    assert reward.content("a red-figure cup", "", CAPTION, facts).value == pytest.approx(1.0 + 0.5)
    both = reward.content("a red-figure kylix or krater", "", CAPTION, facts)
    assert (both.base, both.penalty, both.bonus) == (1.0, 0.25, 0.0)


def test_a_question_gives_its_dimension_all_the_weight():
    reward = Reward(PLAIN)
    assert reward.content("red figure", "red-figure", "technique").value == pytest.approx(1.1)
    wrong = reward.content("black-figure", "red-figure", "technique")
    assert (wrong.base, wrong.value) == (0, pytest.approx(-0.1))  # a rival
    assert reward.content("no idea", "red-figure", "technique").value == 0
    half = reward.content("-512 to -488", "-525 to -501", "dating")
    assert half.base == half.value == pytest.approx(12 / 38)
    assert reward.content("The Kay Painter", "Key Painter", "attribution").base == pytest.approx(1 - 1 / 11)


def test_saying_it_again_and_again_is_punished():
    assert stutters("no no no") and stutters("a red vase a red vase a red vase") and not stutters("no no, not that")
    reward = Reward(PLAIN)
    assert reward.content("warriors warriors warriors", "warriors", "decoration").penalty == 0.1


def test_the_format_and_what_is_taken_from_it():
    think = Reward(RewardSettings())
    good = "<think>The figures are black.</think>\n<answer>black-figure</answer>"
    assert think.format(good) == 1 and think.extract(good) == "black-figure"
    assert think.content(good, "black-figure", "technique").value == pytest.approx(1.1)
    for bad in ("black-figure", "<answer>x</answer>", good + good, "<think>a</think><answer></answer>", good + " so"):
        assert think.format(bad) == 0, bad
    plain = Reward(PLAIN)
    assert plain.format("black-figure") == 1
    for bad in ("", "  ", "two\nlines", "<answer>x</answer>", "word " * 65):
        assert plain.format(bad) == 0, bad


@given(TEXTS, st.sampled_from([*DIMENSIONS, CAPTION]), TEXTS.filter(str.strip))
@settings(max_examples=120, deadline=2000)
def test_no_text_makes_it_raise_or_leave_its_bounds(text, dimension, reference):
    for values in (PLAIN, RewardSettings()):
        reward = Reward(values)
        scored = reward.content(text, reference, dimension, FACTS)
        assert 0 <= scored.base <= 1 and math.isfinite(scored.value)
        assert all(0 <= r <= 1 for r in scored.parts.values())
        assert scored.value == pytest.approx(scored.base - scored.penalty + scored.bonus)
        assert reward.format(text) in (0, 1)


@given(st.permutations(list(FACTS)), st.integers(0, 6))
def test_one_more_right_dimension_never_lowers_it_and_order_does_not_count(names, count):
    said = {
        "fabric": "Athenian", "technique": "black-figure", "shape": "amphora", "dating": "525-500 BCE",
        "decoration": "warriors fighting", "attribution": "Key Painter",
    }  # fmt: skip
    reward = Reward(PLAIN)

    def value(some, order=names):
        text = "; ".join(said[name] for name in some)
        return reward.content(text, "", CAPTION, {name: FACTS[name] for name in order})

    more = value(names[: count + 1])
    assert more.base >= value(names[:count]).base - 1e-12
    assert value(names[: count + 1], sorted(names)).base == pytest.approx(more.base)


@given(YEARS, st.integers(0, 100), st.integers(0, 100))
def test_a_nearer_date_is_never_worth_less(true, near, far):
    near, far = sorted((near, far))
    reward = Reward(PLAIN)

    def value(shift):
        return reward.content(f"{true[0] + shift} to {true[1] + shift}", f"{true[0]} to {true[1]}", "dating").base

    assert value(near) >= value(far)


def test_unknown_weights_are_refused():
    with pytest.raises(ValidationError, match="colour is no dimension"):
        RewardSettings(weights={"colour": 1.0})
    with pytest.raises(ValidationError, match="a sum above 0"):
        RewardSettings(weights={"shape": 0.0})


# plugins

COLUMNS = {"reference": ["red-figure", "kylix"], "dimension": ["technique", "shape"], "facts": ["", ""]}


def plugin(path: Path, text: str) -> RewardSettings:
    path.write_text(text, encoding="utf-8")
    return RewardSettings(format="plain", plugin=str(path))


def test_ours_scores_by_columns():
    found = reward_plugin.load_scorer(PLAIN)(["red-figure", "krater"], COLUMNS)
    assert found == pytest.approx([1.1, -0.1])


def test_a_users_plain_function_is_adapted(tmp_path):
    text = "def external_vase_acc(responses, references):\n"
    text += "    return [float(a == b) for a, b in zip(responses, references)]\n"
    scorer = reward_plugin.load_scorer(plugin(tmp_path / "mine.py", text))
    assert scorer([" red-figure ", "krater"], COLUMNS) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def external_vase_acc(responses, references):\n    return [1.0]\n", "1 rewards for 2 completions"),
        ("def external_vase_acc(responses, references):\n    return [float('nan'), 1]\n", "the reward of 'a' is nan"),
        ("def external_vase_acc(responses, references):\n    return ['much', 1]\n", "gave no numbers"),
        ("import nowhere_to_be_found\n", "cannot be imported .ModuleNotFoundError"),
    ],
)
def test_a_bad_plugin_is_named(tmp_path, text, said):
    path = tmp_path / "mine.py"
    with pytest.raises(KilnError, match=said) as error:
        reward_plugin.load_scorer(plugin(path, text))(["a", "b"], COLUMNS)
    assert str(path) in error.value.message and error.value.hint


def test_a_plugin_that_is_not_there_is_named(tmp_path):
    with pytest.raises(KilnError, match="no such file"):
        reward_plugin.load_scorer(RewardSettings(plugin=str(tmp_path / "gone.py")))


@pytest.mark.slow
def test_ms_swift_finds_ours_and_a_users_orm(tmp_path):
    from swift.rewards import orms

    reward_plugin.register(PLAIN)
    assert orms["external_vase_acc"]()(["red-figure", "krater"], **COLUMNS, images=[[], []]) == pytest.approx(
        [1.1, -0.1]
    )
    assert orms["external_vase_format"]()(["red-figure", "two\nlines"], **COLUMNS) == [1, 0]
    text = (
        "from swift.rewards import ORM, orms\n"
        "class Mine(ORM):\n"
        "    def __call__(self, completions, reference=None, **columns):\n"
        "        return [2.0 * (c == r) for c, r in zip(completions, reference)]\n"
        "orms['external_vase_acc'] = Mine\n"
    )
    reward_plugin.register(plugin(tmp_path / "mine.py", text))
    assert orms["external_vase_acc"]()(["red-figure", "krater"], **COLUMNS) == [2.0, 0.0]
    del orms["external_vase_acc"]
    with pytest.raises(KilnError, match="no external_vase_acc"):
        reward_plugin.load_scorer(plugin(tmp_path / "empty.py", "x = 1\n"))
