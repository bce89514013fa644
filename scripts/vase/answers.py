"""How an answer about a vase is compared with the truth, dimension by dimension; every measure lies from 0 to 1."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping

from rapidfuzz import fuzz
from rapidfuzz.distance import Levenshtein

MOST_CHARACTERS = 2000  # of an answer; what follows is not looked at
_DASHES = re.compile(r"[\u2010-\u2015\u2212]")
_OUTER = " \t\n.,;:!?\"'`()[]{}*_"
_ARTICLES = re.compile(r"^(?:an?|the)\s+")
# a word, or one character of a script that is written without spaces
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af"
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_ERA = r"(?:b\.?\s?c\.?(?:\s?e\.?)?|a\.?\s?d\.?|c\.?\s?e\.?)"
_YEAR = r"-?\d{1,4}"
_RANGE = re.compile(  # all of these read normalised text
    rf"(?P<era0>{_ERA})?\s*(?<!\d)(?P<first>{_YEAR})(?!\d)\s*(?P<era1>{_ERA})?\s*(?:to|until|and|-|/)\s*"
    rf"(?P<last>{_YEAR})(?!\d)\s*(?P<era2>{_ERA})?"
)
_CENTURY = re.compile(rf"(?<!\d)(?P<number>\d{{1,2}})(?:st|nd|rd|th) (?:century|c\.) ?(?P<era>{_ERA})?")
_SINGLE = re.compile(rf"(?<!\d)(?P<first>{_YEAR})(?!\d)\s*(?P<era>{_ERA})?")

# canonical value: other spellings, as `normalise` leaves them
SYNONYMS = {
    "fabric": {
        "athenian": ("attic", "athens", "attica"),
        "corinthian": ("corinth",),
        "apulian": ("apulia",),
        "boeotian": ("boeotia",),
        "laconian": ("lakonian", "laconia", "spartan"),
        "campanian": ("campania",),
        "lucanian": ("lucania",),
        "paestan": ("paestum",),
        "sicilian": ("sicily",),
        "etruscan": ("etruria",),
        "euboean": ("euboea",),
        "chalcidian": ("chalcis", "chalkidian"),
    },
    "technique": {
        "black-figure": ("black figure", "black-figured", "black figured", "blackfigure", "bf"),
        "red-figure": ("red figure", "red-figured", "red figured", "redfigure", "rf"),
        "white-ground": ("white ground", "whiteground"),
        "black-glaze": ("black glaze", "black-glazed", "black gloss"),
        "six's technique": ("sixs technique", "six technique"),
    },
    "shape": {
        "amphora": ("amphorae", "neck-amphora", "neck amphora", "belly-amphora", "panathenaic amphora"),
        "krater": ("kraters", "crater", "calyx-krater", "calyx krater", "kalyx-krater", "bell-krater", "bell krater",
                   "column-krater", "column krater", "volute-krater", "volute krater"),
        "kylix": ("kylikes", "cylix", "drinking cup", "cup"),
        "hydria": ("hydriai", "hydriae", "kalpis"),
        "oinochoe": ("oenochoe", "oinochoai", "jug", "chous"),
        "lekythos": ("lekythoi", "lecythus", "squat lekythos"),
        "skyphos": ("skyphoi", "scyphus"),
        "pelike": ("pelikai",),
        "stamnos": ("stamnoi",),
        "alabastron": ("alabastra",),
        "aryballos": ("aryballoi",),
        "pyxis": ("pyxides",),
        "kantharos": ("kantharoi", "cantharus"),
        "psykter": ("psykteres",),
        "lebes": ("dinos", "deinos", "lebetes"),
        "loutrophoros": ("loutrophoroi",),
    },
}  # fmt: skip


def normalise(text: str) -> str:
    """Compatibility forms, case, dashes, spaces, outer marks and a leading article taken away."""
    return _ARTICLES.sub("", _plain(text))


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text[:MOST_CHARACTERS]).casefold()
    return " ".join(_DASHES.sub("-", text).split()).strip(_OUTER)


@functools.cache
def _spellings(dimension: str) -> dict[str, str]:
    table = SYNONYMS.get(dimension, {})
    return {other: name for name, others in table.items() for other in (name, *others)}


def spellings(dimension: str, extra: Mapping[str, str] = {}) -> dict[str, str]:
    """{spelling: canonical value} of a closed dimension, a user's `extra` on top; spellings are normalised."""
    return _spellings(dimension) | {normalise(key): normalise(value) for key, value in extra.items()}


def canonical(text: str, dimension: str, extra: Mapping[str, str] = {}) -> str:
    """`normalise`, then the canonical one of known spellings."""
    plain = normalise(text)
    return spellings(dimension, extra).get(plain, plain)


def words(text: str) -> list[str]:
    """Words of a text, in lower case; a character is a word where the script has no spaces."""
    return _WORDS.findall(_plain(text))


def date_range(text: str) -> tuple[int, int] | None:
    """First and last year that a text names, BCE negative, or None: a range, a century, or one year.

    Without an era, years are BCE where the first is the larger ("525-475"), else as they are written.
    """
    text = normalise(text)
    for pattern, read in ((_RANGE, _of_range), (_CENTURY, _of_century), (_SINGLE, _of_year)):
        found = pattern.search(text)
        if found:
            return read(found)
    return None


def _bce(era: str | None) -> bool:
    return bool(era) and era.replace(".", "").replace(" ", "").startswith("b")


def _of_range(found: re.Match) -> tuple[int, int]:
    first, last = int(found["first"]), int(found["last"])
    era2 = found["era2"] or found["era0"]
    era1 = found["era1"] or era2
    signed = first < 0 or last < 0
    if not signed:
        unmarked = not (era1 or era2) and first > last
        first = -first if _bce(era1) or unmarked else first
        last = -last if _bce(era2) or unmarked else last
    return min(first, last), max(first, last)


def _of_century(found: re.Match) -> tuple[int, int]:
    number = int(found["number"])
    return (-100 * number, -100 * number + 99) if _bce(found["era"]) else (100 * number - 99, 100 * number)


def _of_year(found: re.Match) -> tuple[int, int]:
    year = int(found["first"])
    year = -abs(year) if _bce(found["era"]) else year
    return year, year


def overlap(a: tuple[int, int], b: tuple[int, int]) -> float:
    """Years in both of two closed ranges over years in either or between: 1 when equal, 0 when they do not meet."""
    both = min(a[1], b[1]) - max(a[0], b[0]) + 1
    return max(0, both) / (max(a[1], b[1]) - min(a[0], b[0]) + 1)


def range_overlap(answer: str, reference: str) -> float:
    """`overlap` of the dates that two texts name; 0 where one names none."""
    a, b = date_range(answer), date_range(reference)
    return overlap(a, b) if a and b else 0.0


def exact(answer: str, reference: str, dimension: str, extra: Mapping[str, str] = {}) -> bool:
    """Whether both say the same after synonyms; datings, whether they name the same years."""
    if dimension == "dating":
        a, b = date_range(answer), date_range(reference)
        if a and b:
            return a == b
    return canonical(answer, dimension, extra) == canonical(reference, dimension, extra)


def edit_similarity(answer: str, reference: str) -> float:
    """1 - Levenshtein distance over the longer length, of the normalised texts; symmetric."""
    return Levenshtein.normalized_similarity(normalise(answer), normalise(reference))


def anls(answer: str, reference: str) -> float:
    """Average normalised Levenshtein similarity of one answer: 0 below 0.5 (Biten et al. 2019, equation 1)."""
    found = edit_similarity(answer, reference)
    return found if found >= 0.5 else 0.0


def bleu1(answer: str, reference: str) -> float:
    """BLEU of unigrams with its brevity penalty (Papineni et al. 2002), by sacrebleu, on `words`."""
    from sacrebleu.metrics import BLEU

    hypothesis, truth = words(answer), words(reference)
    if not hypothesis or not truth:
        return 0.0
    scorer = BLEU(max_ngram_order=1, tokenize="none", smooth_method="none", effective_order=True)
    return min(1.0, scorer.sentence_score(" ".join(hypothesis), [" ".join(truth)]).score / 100)


def lexical_overlap(a: str, b: str) -> float:
    """Jaccard index of the sets of words; 1 for two texts without words."""
    first, second = set(words(a)), set(words(b))
    return len(first & second) / len(first | second) if first | second else 1.0


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, as often as they occur; symmetric."""
    first, second = Counter(words(answer)), Counter(words(reference))
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 1.0


def similarity(answer: str, reference: str, dimension: str, extra: Mapping[str, str] = {}) -> float:
    """How right an answer to a question for one dimension is: the r_i of the reward."""
    if dimension == "dating":
        return range_overlap(answer, reference)
    if dimension == "decoration":
        return token_f1(answer, reference)
    if dimension == "attribution":
        return edit_similarity(answer, reference)
    return float(exact(answer, reference, dimension, extra))


def partial_similarity(text: str, reference: str) -> float:
    """Edit similarity of `reference` to the part of a longer text that is most like it."""
    return fuzz.partial_ratio(normalise(reference), normalise(text)) / 100 if normalise(text) else 0.0
