"""The reward against numbers by hand and own recursions, its properties, and plugins of every kind."""

import json
import math
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.common.errors import KilnError
from scripts.vase import answers, reward_plugin, rewards
from scripts.vase.rewards import Reward
from scripts.vase.settings import CAPTION, DIMENSIONS, RewardSettings

FACTS = {
    "fabric": "Athenian",
    "technique": "black-figure",
    "shape": "lekythos",
    "dating": "-525 to -475",
    "decoration": "two warriors fighting",
    "attribution": "Berlin Painter",
}
TRUE = "Athenian black-figure lekythos, c. 525–475 BCE, two warriors fighting, Berlin Painter"
WRONG = {
    "fabric": "Corinthian",
    "technique": "red-figure",
    "shape": "hydria",
    "dating": "-450 to -400",
    "decoration": "dolphins",
    "attribution": "Zygmunt",
}
PLAIN = Reward(RewardSettings(format="plain"))
THINK = Reward(RewardSettings())
texts = st.one_of(
    st.text(max_size=60),
    st.text(alphabet="abc -.0123456789<>/BCE公前年世纪\0\ud800\n", max_size=60),
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<answer>", "</answer>", "amphora", "525", "BC", "to", "-", "中文", "a"]
        ),
        max_size=20,
    ).map("".join),
)
years = st.tuples(st.integers(-900, 400), st.integers(0, 200)).map(lambda one: (one[0], one[0] + one[1]))


# --- answers ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  The  Neck–Amphora. ", "neck-amphora"),
        ("ＡＭＰＨＯＲＡ", "amphora"),
        ("“an amphora”", "amphora"),
        ("-575 to -550", "-575 to -550"),
        ("a the vase", "vase"),
        ("a", "a"),
        ("?!", ""),
        ("", ""),
    ],
)
def test_normal_forms(text, expected):
    assert answers.normalise(text) == expected


@given(texts)
@settings(max_examples=150, deadline=None)
def test_a_normal_form_is_its_own(text):
    once = answers.normalise(text)
    assert answers.normalise(once) == once


def test_words_of_cjk_scripts_are_characters():
    assert answers.words("黑绘 Amphora的瓶, ひと x1") == ["黑", "绘", "amphora", "的", "瓶", "ひ", "と", "x1"]
    assert answers.token_f1("黑绘瓶", "红绘瓶") == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("dimension", "term", "spellings"),
    [
        ("technique", "black-figure", "black figure;Black-Figured;bf;the BLACK–FIGURE technique"),
        ("technique", "red-figure", "RED FIGURE;rf"),
        ("technique", "white-ground", "White ground"),
        ("shape", "amphora", "neck-amphora;amphorae;AMPHORA, NECK;an amphora;belly amphorai;AMPHORA B"),
        ("shape", "oinochoe", "oenochoe;Oinochoai"),
        ("shape", "lekythos", "lekythoi;squat lekythos;lecythus"),
        ("shape", "krater", "kalyx-krater;calyx krater;KRATER, VOLUTE"),
        ("shape", "kylix", "cup;CUP B;kylikes"),
        ("fabric", "athenian", "attic;ATHENIAN;Attic ware"),
    ],
)
def test_synonyms(dimension, term, spellings):
    for spelling in spellings.split(";"):
        assert answers.canonical(spelling, dimension) == term, spelling
        assert answers.exact(spelling, term, dimension)
        assert answers.similarity(term, spelling, dimension) == 1


def test_synonyms_of_the_user():
    extra = {"Hals-Amphore": "neck amphora", "双耳瓶": "amphora", "attisch": "Attic"}
    assert answers.canonical("hals amphore", "shape", extra) == "amphora"
    assert answers.canonical("attisch", "fabric", extra) == "athenian"
    assert answers.named("一个双耳瓶。", "shape", extra) == {"amphora"}
    coarse = {"amphora": "jar"}
    assert answers.exact("neck-amphora", "jar", "shape", coarse)
    assert answers.named("a neck-amphora", "shape", coarse) == {"jar"}


def test_terms_are_whole_words_and_the_longest_counts():
    assert answers.named("cup-skyphos", "shape") == {"cup-skyphos"}
    assert answers.named("a cupboard, bicup", "shape") == set()
    assert answers.named("Attic hydria beside a neck amphora", "shape") == {"hydria", "amphora"}
    assert answers.named("Daunian jug", "fabric", also=["Daunian"]) == {"daunian"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("-575 to -550", (-575, -550)),
        ("−575 – −550", (-575, -550)),
        ("-525--475", (-525, -475)),
        ("c. 525–475 BCE", (-525, -475)),
        ("525-475 B.C.", (-525, -475)),
        ("550 to 500 B.C.E.", (-550, -500)),
        ("c. 525 - c. 475 BC", (-525, -475)),
        ("between 525 and 475 BC", (-525, -475)),
        ("ca. 500 BC", (-500, -500)),
        ("500bc", (-500, -500)),
        ("525 BC to 475", (-525, -475)),
        ("475-525 BC", (-525, -475)),
        ("525-475", (-525, -475)),
        ("AD 50 to 100", (50, 100)),
        ("50 to 100 CE", (50, 100)),
        ("50 BC - AD 50", (-50, 50)),
        ("-50 to 50", (-50, 50)),
        ("6th century BCE", (-600, -501)),
        ("6th-5th century B.C.", (-600, -401)),
        ("sixth century BC", (-600, -501)),
        ("first half of the 5th century BC", (-500, -451)),
        ("last quarter of the 6th century BC", (-525, -501)),
        ("1st century AD", (1, 100)),
        ("late 6th century BC (520-510 BC)", (-520, -510)),
        ("公元前525年至公元前475年", (-525, -475)),
        ("公元前6世纪", (-600, -501)),
        ("Athenian lekythos, 35-40 cm high, c. 525–475 BCE; Marathon", (-525, -475)),
        ("a head 50 high", None),
        ("35-40 cm", None),
        ("no date", None),
        ("", None),
        ("9" * 100_000, None),
        ("BC 12345678901234567890", None),
    ],
)
def test_dates(text, expected):
    assert answers.date_range(text) == expected


@given(texts)
@settings(max_examples=150, deadline=None)
def test_dates_are_in_order(text):
    found = answers.date_range(text)
    assert found is None or found[0] <= found[1]


@given(years, st.sampled_from(["{} to {}", "from {} until {}", "{} - {}", "{}–{}"]))
@settings(max_examples=60, deadline=None)
def test_signed_years_are_read_back(span, style):
    if span[0] < 0:
        assert answers.date_range(style.format(*span)) == span


@given(years, years)
@settings(max_examples=100, deadline=None)
def test_overlap_counts_years(a, b):
    one, other = set(range(a[0], a[1] + 1)), set(range(b[0], b[1] + 1))
    assert answers.range_overlap(a, b) == pytest.approx(len(one & other) / len(one | other))
    assert answers.range_overlap(a, b) == answers.range_overlap(b, a)
    assert answers.range_overlap(a, a) == 1


def test_overlap_of_texts():
    assert answers.range_overlap("525-475 BC", "c. 500 BC") == pytest.approx(1 / 51)
    assert answers.range_overlap("none", "500 BC") == answers.range_overlap(None, (1, 2)) == 0
    assert answers.exact("c. 525–475 BCE", "-525 to -475", "dating")
    assert not answers.exact("525 BC", "-525 to -475", "dating")
    assert answers.exact("Archaic", "archaic.", "dating")
    assert answers.similarity("archaic", "classical", "dating") == 0


def edits(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        row, above = [i], row
        for j, right in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
    return row[-1]


@given(st.text(alphabet="abé x", max_size=12), st.text(alphabet="abé x", max_size=12))
@settings(max_examples=150, deadline=None)
def test_anls_is_levenshteins(a, b):
    one, other = answers.normalise(a), answers.normalise(b)
    value = 1 - edits(one, other) / max(len(one), len(other), 1)
    assert answers.anls(a, b) == pytest.approx(value if value >= 0.5 else 0)
    assert answers.anls(a, b) == answers.anls(b, a)


def test_anls_is_cut_and_the_rewards_similarity_is_not():
    assert answers.anls("Kylyx", "kylix") == pytest.approx(0.8)
    assert answers.anls("abcd", "abxy") == 0.5
    assert answers.anls("abcde", "abxyz") == 0
    assert answers.similarity("abcde", "abxyz", "attribution") == pytest.approx(0.4)
    assert answers.similarity("", "Berlin Painter", "attribution") == 0


@given(*[st.lists(st.sampled_from(["amphora", "kylix", "瓶", "x"]), max_size=6)] * 2)
@settings(max_examples=100, deadline=None)
def test_word_measures_by_hand(a, b):
    one, other = " ".join(a), " ".join(b)
    common = sum(min(a.count(word), b.count(word)) for word in set(a))
    brevity = 1 if len(a) >= len(b) else math.exp(1 - len(b) / max(len(a), 1))
    assert answers.bleu1(one, other) == pytest.approx(common / len(a) * brevity if a and b else 0)
    assert answers.token_f1(one, other) == pytest.approx(2 * common / (len(a) + len(b)) if a and b else 0)
    jaccard = len(set(a) & set(b)) / max(len(set(a) | set(b)), 1)
    assert answers.lexical_overlap(one, other) == pytest.approx(jaccard)
    assert answers.token_f1(one, other) == answers.token_f1(other, one)
    assert answers.lexical_overlap(one, other) == answers.lexical_overlap(other, one)


def test_an_empty_answer_is_never_right():
    for dimension in (*DIMENSIONS, CAPTION):
        assert not answers.exact("", "", dimension)


# --- rewards ---


def test_one_dimension_has_all_the_weight():
    values = RewardSettings(weights={"shape": 0.1, "dating": 0.9}, penalty=0.2, bonus=0.3, format="plain")
    right, wrong, none = (Reward(values).content(text, "Amphora", "shape") for text in ("neck amphora", "hydria", "zz"))
    assert right == (1.3, 1, {"shape": 1}, 0, 0.3)
    assert wrong == (-0.2, 0, {"shape": 0}, 0.2, 0)
    assert none == (0, 0, {"shape": 0}, 0, 0)
    assert Reward(values).content("two warriors", "two warriors fighting", "decoration").base == pytest.approx(4 / 5)
    assert Reward(values).content("500 BC", "525-475 BC", "dating").value == pytest.approx(1 / 51)


def test_listing_everything_does_not_pay():
    listed = PLAIN.content("amphora, hydria or krater", "amphora", "shape")
    assert (listed.base, listed.penalty, listed.bonus) == (0, 0.1, 0)
    caption = PLAIN.content(f"{TRUE}, hydria, krater", TRUE, CAPTION, FACTS)
    assert caption.parts["shape"] == pytest.approx(1 / 3)
    assert (caption.penalty, caption.bonus) == (0.1, 0)


def test_a_true_caption_is_right():
    found = PLAIN.content(TRUE, TRUE, CAPTION, FACTS)
    assert found.parts == dict.fromkeys(DIMENSIONS, 1)
    assert found.value == pytest.approx(1.1)
    assert PLAIN.content(TRUE, TRUE, CAPTION, json.dumps(FACTS)) == found


def test_a_caption_by_hand():
    weights = {"fabric": 2, "shape": 1, "dating": 1, "attribution": 5}
    reward = Reward(RewardSettings(weights=weights, penalty=0.25, format="plain"))
    facts = {name: FACTS[name] for name in ("fabric", "shape", "dating", "decoration")}
    found = reward.content("An Attic hydria of 500-475 BC", TRUE, CAPTION, facts)
    assert found.parts == pytest.approx({"fabric": 1, "shape": 0, "dating": 26 / 51})
    assert found.base == pytest.approx((2 + 26 / 51) / 4)
    assert found.value == pytest.approx(found.base - 0.25)  # a hydria is a rival


def test_what_the_reference_names_is_no_rival():
    reference = "Athenian lekythos: a man with a krater"
    facts = {"shape": "lekythos"}
    assert PLAIN.content(reference, reference, CAPTION, facts).penalty == 0
    assert PLAIN.content(reference, "Athenian lekythos", CAPTION, facts).penalty == 0.1


def test_a_caption_of_which_nothing_is_known_is_compared_with_its_reference():
    for facts in (None, "", {}, "{}"):
        found = PLAIN.content("an Athenian amphora", "Athenian hydria", CAPTION, facts)
        assert found.parts == {CAPTION: pytest.approx(0.5)}
    assert PLAIN.content(TRUE, TRUE, CAPTION).value == pytest.approx(1.1)


def test_repetition_is_penalised():
    assert PLAIN.content("man man man", "a man", "decoration").penalty == 0.1
    assert PLAIN.content("man and a dog, " * 3, "a man", "decoration").penalty == 0.1
    assert PLAIN.content("man and a dog, " * 2, "a man", "decoration").penalty == 0
    assert PLAIN.content("人马" * 3, "人马", "decoration").penalty == 0.1


@given(st.lists(st.sampled_from("ab"), max_size=14))
@settings(max_examples=150, deadline=None)
def test_repetition_by_plain_loops(found):
    n = len(found)
    expected = any(
        found[i : i + p] == found[i + p : i + 2 * p] == found[i + 2 * p : i + 3 * p]
        for p in range(1, n // 3 + 1)
        for i in range(n - 3 * p + 1)
    )
    assert rewards.repeats(" ".join(f"{word}x" for word in found)) == expected


@given(*[st.lists(st.sampled_from("abcd"), min_size=1, max_size=8)] * 2)
@settings(max_examples=150, deadline=None)
def test_the_best_stretch_by_plain_loops(found, wanted):
    windows = [found[i : i + len(wanted)] for i in range(max(1, len(found) - len(wanted) + 1))]
    values = [2 * (Counter(one) & Counter(wanted)).total() / (len(one) + len(wanted)) for one in windows]
    assert rewards.best_stretch(found, wanted) == pytest.approx(max(values))


def test_attribution_within_a_caption():
    assert rewards.partial("by the berlin painter, as said", "berlin painter") == 1
    assert 0.8 < rewards.partial("by the berlim painter, as said", "berlin painter") < 1
    assert rewards.partial("b", "berlin painter") < 0.2
    assert rewards.partial("", "berlin painter") == 0


def written(right: set[str]) -> str:
    return ", ".join((FACTS if name in right else WRONG)[name] for name in DIMENSIONS)


@given(st.sets(st.sampled_from(DIMENSIONS)), st.sampled_from(DIMENSIONS), st.lists(st.floats(0.01, 5), min_size=6))
@settings(max_examples=60, deadline=None)
def test_one_more_right_dimension_never_lowers_the_base(right, more, weights):
    reward = Reward(RewardSettings(weights=dict(zip(DIMENSIONS, weights, strict=False)), format="plain"))
    before = reward.content(written(right - {more}), TRUE, CAPTION, FACTS)
    after = reward.content(written(right | {more}), TRUE, CAPTION, FACTS)
    assert after.base > before.base
    assert after.parts[more] == 1 > before.parts[more]


@given(years, years, years)
@settings(max_examples=60, deadline=None)
def test_a_better_overlap_never_lowers_the_base(truth, a, b):
    def base(span, dimension):
        reference = f"{truth[0]} BC to {truth[1]} BC"  # any two years will do
        text = f"{span[0]} BC to {span[1]} BC"
        facts = {"dating": reference, "shape": "amphora"}
        overlap = answers.range_overlap(answers.date_range(text), answers.date_range(reference))
        return overlap, PLAIN.content(text, reference, dimension, facts).base

    truth, a, b = (tuple(abs(year) + 1 for year in span) for span in (truth, a, b))
    for dimension in ("dating", CAPTION):
        low, high = sorted((base(a, dimension), base(b, dimension)))
        assert low[1] <= high[1] + 1e-12


@given(texts, st.permutations(list(FACTS.items())))
@settings(max_examples=60, deadline=None)
def test_the_order_of_facts_does_not_matter(text, items):
    assert PLAIN.content(text, TRUE, CAPTION, dict(items)) == PLAIN.content(text, TRUE, CAPTION, FACTS)


@given(texts, texts, st.sampled_from((*DIMENSIONS, CAPTION)), st.sampled_from([PLAIN, THINK]))
@settings(max_examples=300, deadline=None)
def test_any_text_has_a_reward(text, reference, dimension, reward):
    facts = {"shape": reference, "decoration": reference, "attribution": reference, "dating": "500 BC"}
    found = reward.content(text, reference, dimension, facts)
    assert 0 <= found.base <= 1
    assert all(0 <= value <= 1 for value in found.parts.values())
    assert found.value == pytest.approx(found.base - found.penalty + found.bonus)
    assert found.penalty in (0, 0.1) and found.bonus in (0, 0.1)
    assert 0 <= reward.format(text) <= 1
    for measure in (answers.anls, answers.bleu1, answers.lexical_overlap, answers.token_f1):
        assert 0 <= measure(text, reference) <= 1


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "中文",
        "a ",
        "<answer>",
        "<think>",
        "</answer>",
        "1 to ",
        "ca. ",
        "- ",
        "-1",
        "1st ",
        "公元前",
        "(",
        " ",
        "\0",
    ]
    + ["\ud800", "<a", "amphora ", "first half of the ", "ﷺ", "between 5 and "],
)
def test_long_texts_are_fast(text):
    text = text * (100_000 // len(text))
    for reward in (PLAIN, THINK):
        for dimension in (*DIMENSIONS, CAPTION):
            start = time.perf_counter()
            assert math.isfinite(reward.content(text, TRUE, dimension, FACTS).value)
            assert 0 <= reward.format(text) <= 1
            assert time.perf_counter() - start < 2, dimension  # 0.3 s at most here


def test_an_answer_is_looked_at_up_to_its_stated_length():
    filler = ", ".join(f"w{n}" for n in range(2000))
    assert len(filler) > rewards.MAX_CHARACTERS
    assert PLAIN.content(f"lekythos {filler}", TRUE, CAPTION, {"shape": "lekythos"}).base == 1
    assert PLAIN.content(f"{filler} lekythos", TRUE, CAPTION, {"shape": "lekythos"}).base == 0
    thought = f"<think>{filler}</think><answer>lekythos</answer>"
    assert THINK.content(thought, "lekythos", "shape").base == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>It is tall.</think>\n<answer>amphora</answer>", 1),
        ("  <think></think><answer>\namphora\n</answer>\n", 1),
        ("<think>a</think><answer> </answer>", 0.5),
        (f"<think>{'w ' * 99}</think><answer>{'w ' * 64}</answer>", 1),
        (f"<think>a</think><answer>{'w ' * 65}</answer>", 0.5),
        ("<think>a</think> so <answer>b</answer>", 0.5),
        ("<answer>b</answer><think>a</think>", 0.5),
        ("x<think>a</think><answer>b</answer>", 0.5),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.25),
        ("<think>a</think><answer>b", 0.375),
        ("<think>a\0</think><answer>b</answer>", 1),
        ("amphora", 0),
        ("", 0),
    ],
)
def test_the_format_think_answer(text, expected):
    assert THINK.format(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("amphora", 1),
        (" black-figure amphora\n", 1),
        ("two\nlines", 0),
        ("", 0),
        (" \n", 0),
        ("<answer>amphora</answer>", 0),
        ("amphora</s>", 0),
        ("1 < 2", 1),
        ("w " * 64, 1),
        ("w " * 65, 0),
        ("瓶" * 65, 0),
    ],
)
def test_the_format_plain(text, expected):
    assert PLAIN.format(text) == expected


def test_the_answer_is_extracted():
    assert THINK.extract("<think>a</think> <answer> b </answer> c") == "b"
    assert THINK.extract("<answer>a</answer><answer>b</answer>") == "b"
    assert THINK.extract("<think>a</think><answer>b") == "b"
    assert THINK.extract(" no tag ") == "no tag"
    assert PLAIN.extract(" <answer>b</answer>\n") == "<answer>b</answer>"
    assert THINK.content("<think>hydria?</think><answer>amphora</answer>", "amphora", "shape").value == 1.1


def test_rows_that_are_none_are_named():
    with pytest.raises(KilnError, match="'size' is unknown; these are fabric"):
        PLAIN.content("a", "b", "size")
    for facts in ("{", "[1]", '{"shape": 3}', {"shape": None}):
        with pytest.raises(KilnError, match="expected an object of texts"):
            PLAIN.content("a", "b", CAPTION, facts)


# --- plugins ---

CALL = {"reference": ["amphora", "amphora"], "dimension": ["shape", "shape"], "facts": ["", None]}
SAID = ["<think>a</think><answer>amphora</answer>", "hydria"]
FUNCTION = "def external_vase_acc(responses, references):\n    return [{} for a, b in zip(responses, references)]\n"
IMPORTS = "from swift.rewards import ORM, AsyncORM, orms\n"
CLASS = "class {}({}):\n    {}def __call__(self, completions, reference, **columns):\n        return {}\n"
LENGTHS = "[len(a) + len(b) for a, b in zip(completions, reference)]"
EXPECTED = [len(text) + 7 for text in SAID]


def settings_of(folder: Path, source: str, name: str = "my_reward.py") -> RewardSettings:
    (folder / name).write_text(source)
    return RewardSettings(plugin=str(folder / name))


def test_ours_without_a_trainer():
    assert reward_plugin.load_scorer(RewardSettings())(SAID, CALL) == pytest.approx([1.1, -0.1])
    for columns in ({}, {"reference": ["a"], "dimension": ["shape"] * 2}):
        with pytest.raises(KilnError, match="2 completions, but (no|1) values of reference"):
            reward_plugin.load_scorer(RewardSettings())(SAID, columns)


def test_a_plain_function_needs_no_ms_swift(tmp_path):
    values = settings_of(tmp_path, FUNCTION.format("len(a) + len(b)"))
    code = (
        "import sys; from scripts.vase import reward_plugin; from scripts.vase.settings import RewardSettings\n"
        f"print(reward_plugin.load_scorer(RewardSettings(plugin={values.plugin!r}))({SAID!r}, {CALL!r}))\n"
        "print([name for name in ('torch', 'swift') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str([float(one) for one in EXPECTED]), "[]"]


@pytest.mark.parametrize(
    "source",
    [
        FUNCTION.format("len(a) + len(b)"),
        IMPORTS + CLASS.format("Mine", "ORM", "", LENGTHS) + "orms['external_vase_acc'] = Mine\n",
        IMPORTS + CLASS.format("external_vase_acc", "ORM", "", LENGTHS),
        IMPORTS + CLASS.format("external_vase_acc", "AsyncORM", "async ", LENGTHS),
    ],
)
def test_plugins_in_the_registry(source, tmp_path):
    from swift.rewards import orms

    values = settings_of(tmp_path, source)
    reward_plugin.register(values)
    registered = dict(orms)
    found = orms["external_vase_acc"](args=None)(completions=SAID, trainer_state=None, **CALL)
    assert found == EXPECTED == reward_plugin.load_scorer(values)(SAID, CALL)
    assert all(isinstance(one, float) for one in found)
    assert orms["external_vase_format"](args=None)(completions=SAID, **CALL) == [1, 0]
    assert dict(orms) == registered  # another load leaves it alone
    reward_plugin.register(RewardSettings())
    assert orms["external_vase_acc"](args=None)(SAID, **CALL) == pytest.approx([1.1, -0.1])


def test_ms_swift_calls_the_registered_rewards():
    import torch
    from swift.rewards import orms
    from swift.rl_core.data import GRPOSample
    from swift.rl_core.grpo_algorithm import score_completions

    reward_plugin.register(RewardSettings())
    made = [orms[name](args=None) for name in ("external_vase_acc", "external_vase_format")]
    rows = [dict(zip(CALL, one, strict=True)) for one in zip(*CALL.values(), strict=True)]
    samples = [
        GRPOSample(messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}], extra=row)
        for text, row in zip(SAID, rows, strict=True)
    ]
    table = score_completions(samples, made, [None, None], False, torch.device("cpu"))
    assert table.flatten().tolist() == pytest.approx([1.1, 1.0, -0.1, 0.0])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def other():\n    pass\n", r"my_reward\.py: no external_vase_acc"),
        ("external_vase_acc = 3\n", r"my_reward\.py: no external_vase_acc"),
        ("import nothing_of_this_name\n", r"my_reward\.py: cannot be imported \(ModuleNotFoundError"),
        ("def (\n", r"my_reward\.py: cannot be imported \(SyntaxError"),
    ],
)
def test_plugins_that_cannot_be_used(source, says, tmp_path):
    with pytest.raises(KilnError, match=says) as caught:
        reward_plugin.load_scorer(settings_of(tmp_path, source))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("float('nan')", "gave nan; a reward must be a finite number"),
        ("float('inf')", "gave inf"),
        ("'0.5'", "gave '0.5'"),
        ("None", "gave None"),
        ("10 ** 400", "gave 1000"),
    ],
)
def test_rewards_that_are_no_numbers(value, says, tmp_path):
    scorer = reward_plugin.load_scorer(settings_of(tmp_path, FUNCTION.format(value)))
    with pytest.raises(KilnError, match=rf"my_reward\.py: external_vase_acc {says}"):
        scorer(SAID, CALL)


@pytest.mark.parametrize(
    ("made", "says"), [("[1.0]", "gave 1 values for 2 completions"), ("0.5", "gave 0.5, expected 2 numbers")]
)
def test_a_wrong_number_of_rewards(made, says, tmp_path):
    source = f"def external_vase_acc(responses, references):\n    return {made}\n"
    with pytest.raises(KilnError, match=says):
        reward_plugin.load_scorer(settings_of(tmp_path, source))(SAID, CALL)


def test_a_plugin_that_is_missing(tmp_path):
    for name in ("none.py", "folder", "reward.txt"):
        with pytest.raises(KilnError, match="no such plugin"):
            reward_plugin.load_scorer(RewardSettings(plugin=str(tmp_path / name)))
