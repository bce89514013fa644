"""Scores of captions, retrieval and classes against the packages themselves, plain loops, and cases by hand."""

import math

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from scripts.coca import scores
from scripts.common import classification, retrieval
from scripts.common.errors import KilnError

ENGLISH = ["infiltrating ductal carcinoma of the breast, grade 2", "benign breast tissue", "normal gland, no lesion"]
CHINESE = ["浸润性导管癌，中等分化", "乳腺良性组织", "正常腺体，未见病变"]
OTHERS = ["infiltrating lobular carcinoma of the breast, grade 2", "benign fibrous tissue here", "a stone"]
WORDS = ["grade", "2", "carcinoma", "of", "the", "癌", "浸润", "good"]
words = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)


def plain_interval(values, patients, seed=9) -> list[float]:
    """Of a mean, by drawing whole patients 20,000 times."""
    names = sorted(set(patients))
    parts = [[value for value, patient in zip(values, patients, strict=True) if patient == name] for name in names]
    sums, sizes = np.array([sum(one) for one in parts], float), np.array([len(one) for one in parts], float)
    chosen = np.random.default_rng(seed).integers(0, len(names), (20_000, len(names)))
    return list(np.percentile(sums[chosen].sum(1) / sizes[chosen].sum(1), [2.5, 97.5]))


@pytest.mark.parametrize(
    ("captions", "texts", "tokenizer"),
    [(OTHERS, ENGLISH, "13a"), (CHINESE[::-1], CHINESE, "zh"), (OTHERS + CHINESE, ENGLISH + CHINESE, "zh")],
)
def test_text_measures_are_those_of_the_packages(captions, texts, tokenizer):
    patients = [str(i) for i in range(len(texts))]
    made = scores.caption_scores(captions, texts, ["x", "benign breast tissue", "benign breast tissue"], patients)
    assert made["tokenizer"] == tokenizer
    assert made["bleu"]["value"] == pytest.approx(sacrebleu.corpus_bleu(captions, [texts], tokenize=tokenizer).score)
    chrf = [sacrebleu.sentence_chrf(one, [text]).score for one, text in zip(captions, texts, strict=True)]
    assert made["chrf"]["value"] == pytest.approx(np.mean(chrf))
    floor = ["benign breast tissue"] * len(texts)
    assert made["most_frequent_caption"] == floor[0]
    assert made["bleu"]["baseline"] == pytest.approx(sacrebleu.corpus_bleu(floor, [texts], tokenize=tokenizer).score)
    assert (made["bleu"]["baseline_kind"], made["n"]) == ("most_frequent", len(texts))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=6))
def test_corpus_bleu_of_any_corpus(rows):
    captions, texts = (list(one) for one in zip(*rows, strict=True))
    for tokenizer in ("13a", "zh"):
        wanted = sacrebleu.corpus_bleu(captions, [texts], tokenize=tokenizer).score
        assert scores.bleu(scores.bleu_counts(captions, texts, tokenizer).sum(0)) == pytest.approx(wanted)


def test_rouge_is_the_packages_own_on_english():
    rouge = RougeScorer(["rougeL"])
    for one, text in zip(OTHERS, ENGLISH, strict=True):
        wanted = rouge.score(text, one)["rougeL"].fmeasure
        assert scores.text_measures([one], [text])["rouge_l"][0] == pytest.approx(wanted)


def test_rouge_sees_chinese():
    # 浸润性癌 and 浸润性导管癌: 4 characters of 4 and of 6 in order
    assert RougeScorer(["rougeL"]).score("浸润性导管癌", "浸润性癌")["rougeL"].fmeasure == 0  # the package's own tokens
    assert scores.text_measures(["浸润性癌"], ["浸润性导管癌"])["rouge_l"][0] == pytest.approx(2 * 4 / (4 + 6))
    found = scores.Words().tokenize("HER2阳性, Ki-67 约20%; naïve")
    assert found == ["her2", "阳", "性", "ki", "67", "约", "20", "naïve"]


def test_bleu_resamples_whole_patients():
    rng = np.random.default_rng(3)
    texts = [ENGLISH[i % 3] for i in range(30)]
    captions = [text if rng.random() < 0.5 else OTHERS[i % 3] for i, text in enumerate(texts)]
    patients = np.array([f"p{i // 5}" for i in range(30)])
    found = scores.bleu_entry(scores.bleu_counts(captions, texts, "13a"), patients, 0.0)["ci95"]
    names = sorted(set(patients))
    plain = []
    for _ in range(1500):
        rows = [i for name in rng.choice(names, len(names)) for i in np.flatnonzero(patients == name)]
        plain.append(sacrebleu.corpus_bleu([captions[i] for i in rows], [[texts[i] for i in rows]]).score)
    np.testing.assert_allclose(found, np.percentile(plain, [2.5, 97.5]), atol=2)


def test_equal_texts_are_counted_apart_when_training_knows_them():
    texts, captions = ["a b", "c d", "e f", "a b"], ["a b", " c d\n", "x", "e f"]
    made = scores.caption_scores(captions, texts, ["a b", "a b", "q"], list("wxyz"))
    assert (made["exact"]["value"], made["exact"]["n"], made["exact"]["baseline"]) == (0.5, 4, 0.5)
    assert (made["exact_seen"]["value"], made["exact_seen"]["n"], made["exact_seen"]["baseline"]) == (0.5, 2, 1.0)
    made = scores.caption_scores(captions, texts, ["q"], list("wxyz"))
    assert made["exact_seen"] == {
        "value": None, "n": 0, "ci95": None, "reason": "no text of the test side occurs in training",
    }  # fmt: skip


def test_intervals_are_of_patients_and_need_two_of_them():
    values, patients = [1, 1, 1, 0, 0, 1, 0, 1], list("aaabbbcd")
    found = scores.entry(values, patients, 0.2, "chance")
    np.testing.assert_allclose(found["ci95"], plain_interval(values, patients), atol=0.04)
    one = scores.entry(values, ["a"] * 8, 0.2, "chance")
    assert (one["value"], one["n"], one["ci95"], one["baseline"]) == (0.625, 8, None, 0.2)
    assert one["reason"] == "one patient: no interval"
    constant = scores.caption_scores(["a"] * 3, ["a", "b", "c"], ["a"], ["p"] * 3)
    assert constant["bleu"]["ci95"] is None and constant["exact"]["value"] == pytest.approx(1 / 3)


def plain_ranks(similarity, texts) -> list[int]:
    ranks = []
    for row, text in zip(similarity, texts, strict=True):
        best = max(score for score, other in zip(row, texts, strict=True) if other == text)
        ranks.append(1 + sum(score >= best for score, other in zip(row, texts, strict=True) if other != text))
    return ranks


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_retrieval_counts_equal_texts_as_hits(n, seed):
    rng = np.random.default_rng(seed)
    texts = [f"text {i}" for i in rng.integers(0, max(2, n // 2), n)]
    similarity = rng.integers(0, 5, (n, n)).astype(np.float32)
    patients = [f"p{i % 2}" for i in range(n)]
    made = retrieval.retrieval_scores(similarity, texts, patients, (1, 2), "patient")
    both = {"image_to_text": plain_ranks(similarity, texts), "text_to_image": plain_ranks(similarity.T, texts)}
    for name, ranks in both.items():
        for k in (1, 2):
            assert made[name]["recall"][k]["value"] == pytest.approx(np.mean(np.array(ranks) <= k))
            right = [texts.count(text) for text in texts]
            chance = np.mean([1 - math.comb(n - one, k) / math.comb(n, k) for one in right])
            assert made[name]["recall"][k]["baseline"] == pytest.approx(chance)
        assert made[name]["median_rank"]["value"] == np.median(ranks)
        by_chance = [np.mean([1 - math.comb(n - one, k) / math.comb(n, k) for one in right]) for k in range(1, n + 1)]
        floor = made[name]["median_rank"]
        assert floor["baseline"] == next(k for k, one in enumerate(by_chance, start=1) if one >= 0.5 - 1e-12)
        assert (floor["baseline_kind"], floor["higher_is_better"]) == ("chance", False)
    mean = np.mean([made[name]["recall"][2]["value"] for name in both])
    assert made["mean"][2]["value"] == pytest.approx(mean) and made["mean"][2]["n"] == n


def test_mean_recall_has_an_interval_over_patients():
    rng = np.random.default_rng(5)
    n = 40
    texts, patients = [f"text {i}" for i in range(n)], [f"p{i // 4}" for i in range(n)]
    similarity = rng.normal(size=(n, n)) + 2 * np.eye(n)
    made = retrieval.retrieval_scores(similarity, texts, patients, (5,), "patient")
    hits = [
        (np.array(plain_ranks(one, texts)) <= 5).astype(float) for one in (similarity, similarity.T)
    ]  # fmt: skip
    np.testing.assert_allclose(made["mean"][5]["ci95"], plain_interval(np.mean(hits, axis=0), patients), atol=0.02)


def test_ks_above_the_number_of_texts_are_left_out_and_named():
    made = retrieval.retrieval_scores(np.eye(3), ["a", "b", "c"], ["x", "y", "z"], (1, 5, 10), "patient")
    assert made["left_out"] == {"ks": [5, 10], "reason": "more than 3 candidates"}
    assert list(made["mean"]) == [1] and made["mean"][1]["value"] == 1
    none = retrieval.retrieval_scores(np.eye(3), ["a", "b", "c"], ["x", "y", "z"], (5,), "patient")
    assert "image_to_text" not in none
    headlines, why = scores.summary(none, None, {}, 3)
    assert not headlines and "fewer test slides" in why["retrieval_r5"]


def test_a_constant_model_gains_nothing_by_ties():
    made = retrieval.retrieval_scores(np.ones((6, 6)), list("abcdef"), list("uvwxyz"), (1, 5), "patient")
    assert made["mean"][5]["value"] == 0 and made["mean"][5]["baseline"] == pytest.approx(5 / 6)


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 7), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_recall_with_ties_in_random_order(n, k, seed):
    rng = np.random.default_rng(seed)
    codes, similarity = rng.integers(0, 3, n), rng.integers(0, 3, (n, n)).astype(float)
    # equal texts always look alike to a class probability
    similarity = similarity[:, codes % n][codes % n]
    hits = []
    for _ in range(3000):
        order = rng.permutation(n)
        for scored in (similarity, similarity.T):
            ranked = order[np.argsort(-scored[:, order], axis=1, kind="stable")]
            hits.append(np.mean((codes[ranked[:, :k]] == codes[:, None]).any(axis=1)))
    assert retrieval.expected_recall(similarity, codes, min(k, n)) == pytest.approx(np.mean(hits), abs=0.04)


def test_zero_shot_sums_a_softmax_over_all_prompts():
    images, prompts = np.array([[1.0, 0.0], [0.6, 0.8]]), np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    made = scores.zero_shot(images, prompts, [0, 0, 1], 10.0)
    for row, image in zip(made, images, strict=True):
        weights = [math.exp(10 * float(image @ prompt)) for prompt in prompts]
        np.testing.assert_allclose(row, [sum(weights[:2]) / sum(weights), weights[2] / sum(weights)])
    np.testing.assert_allclose(made.sum(axis=1), 1)
    assert np.isfinite(scores.zero_shot(images, prompts, [0, 0, 1], 1e4)).all()


def test_class_scores_leave_out_texts_without_a_class_and_count_silent_captions_as_wrong():
    made = scores.class_scores([0, 1, -1, 1, 0], [0, -1, 0, 1, 1], list("abcde"), ["benign", "malignant"])
    assert (made["left_out"], made["n"], made["accuracy"]["value"]) == (1, 4, 0.5)
    assert made["confusion_matrix"] == [[1, 1], [0, 1]] and made["unanswered"] == [0, 1]
    alone = scores.class_scores([0, 1, 0], [0, 1, 1], ["p"] * 3, ["benign", "malignant"])
    assert alone["accuracy"]["ci95"] is None and alone["accuracy"]["value"] == pytest.approx(2 / 3)
    with pytest.raises(KilnError, match="none of 2 texts names exactly one of the classes benign, malignant"):
        scores.class_scores([-1, -1], [0, 0], ["p", "q"], ["benign", "malignant"])


def test_trivial_features_rank_texts_by_their_class():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    features = np.column_stack([labels * 8 + rng.normal(size=60), rng.normal(size=60)])
    shares = classification.trivial_probabilities(features, np.where(np.arange(60) < 3, -1, labels), features, 3)
    assert shares.shape == (60, 3) and (shares[:, 2] == 0).all()
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    texts = [f"text {i}" for i in range(60)]
    made = scores.trivial_scores(shares, labels, texts, 5)
    assert made["diagnosis"] > 0.95
    assert 5 / 60 < made["retrieval"] < 5 / 25  # at best 5 among the 30 texts of the class
    alone = classification.trivial_probabilities(features, np.zeros(60, int), features, 2)
    assert (alone == [1, 0]).all() and scores.trivial_scores(alone, labels, texts, 61)["retrieval"] is None


def test_summary_holds_both_headlines_with_what_they_are_compared_with():
    n = 20
    texts, patients = [f"text {i}" for i in range(n)], [f"p{i // 2}" for i in range(n)]
    labels = np.arange(n) % 4
    retrieved = retrieval.retrieval_scores(np.eye(n), texts, patients, (1, 5), "patient")
    diagnosed = scores.class_scores(labels, labels, patients, list("abcd"))
    diagnosed |= {"most_frequent": 0.25, "most_frequent_in_training": 0.125}
    made, why = scores.summary(retrieved, diagnosed, {"diagnosis": 0.3, "retrieval": 0.4}, 10)
    assert not why
    one = made["retrieval_r5"]
    assert (one["value"], one["baseline_kind"], one["trivial"]) == (1, "chance", 0.4)
    assert one["baseline"] == pytest.approx(0.25)
    assert (one["image_to_text"], one["text_to_image"], one["n"]) == (1, 1, 20)
    one = made["caption_diagnosis_accuracy"]
    assert one["most_frequent_in_training"] == 0.125
    for headline in made.values():
        assert (headline["groups"], headline["grouped_by"]) == (len(set(patients)), "patient")
    assert (one["value"], one["baseline"], one["baseline_kind"], one["trivial"]) == (1, 0.25, "most_frequent", 0.3)
    assert one["no_answer"] == 0
    made, why = scores.summary(retrieved, None, {}, 10)
    assert "trivial" not in made["retrieval_r5"] or made["retrieval_r5"]["trivial"] is None
    assert "no classes are set" in why["caption_diagnosis_accuracy"]
