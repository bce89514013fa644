"""How an answer about a vase is compared with the truth, per dimension.

Words are runs of letters and digits; each character of a Chinese, Japanese or Korean script is a word of its own.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from rapidfuzz.distance import Levenshtein
from sacrebleu.metrics import BLEU

Range = tuple[int, int]
NONE: Mapping[str, str] = MappingProxyType({})
CLOSED = ("fabric", "technique", "shape")  # dimensions with a vocabulary

_CJK = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U000323af"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
_SIGNS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-") | {"’": "'"})
_HEAD = re.compile(r"(?:(?!-[0-9])[\W_]|(?:an?|the)\s)*")
_TAIL = re.compile(r"[\W_]*")
_BLEU1 = BLEU(max_ngram_order=1, effective_order=True, smooth_method="none", tokenize="none")


def normalise(text: str) -> str:
    """`text` in NFKC, case folded, one kind of dash, single spaces, without outer punctuation and leading articles.

    A minus before a leading digit stays. Equal to its own normal form; empty where there is no letter or digit.
    """
    # folding can undo NFKC, and the reverse
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).casefold()
    folded = " ".join(unicodedata.normalize("NFKC", folded).translate(_SIGNS).split())
    folded = folded[_HEAD.match(folded).end() :]
    return folded[: len(folded) - _TAIL.match(folded[::-1]).end()]


def words(text: str) -> list[str]:
    """The words of the normal form of `text`, in order; hyphens separate."""
    return _WORD.findall(normalise(text))


def _key(text: str) -> str:
    return " ".join(words(text))


# --- vocabularies: {canonical term: (other spellings, kinds that come before or after any of these)} ---

_FABRICS = {
    "athenian": (("attic",), ()),
    "corinthian": ((), ()),
    "apulian": ((), ()),
    "lucanian": ((), ()),
    "campanian": ((), ()),
    "paestan": ((), ()),
    "sicilian": ((), ()),
    "boeotian": (("boiotian",), ()),
    "euboean": (("euboian",), ()),
    "laconian": (("lakonian",), ()),
    "chalcidian": (("chalkidian",), ()),
    "east greek": (("eastern greek",), ()),
    "etruscan": ((), ()),
    "faliscan": ((), ()),
    "caeretan": ((), ()),
    "clazomenian": (("klazomenian",), ()),
    "rhodian": ((), ()),
    "chian": ((), ()),
    "cycladic": (("kykladic",), ()),
    "cretan": ((), ()),
    "argive": ((), ()),
    "gnathian": (("gnathia",), ()),
}
_TECHNIQUES = {
    "black-figure": (("black figured", "blackfigure", "black figures", "bf"), ()),
    "red-figure": (("red figured", "redfigure", "red figures", "rf"), ()),
    "white-ground": (("white grounded", "whiteground", "wg"), ()),
    "black-glaze": (("black glazed", "black gloss", "black slip", "bg"), ()),
    "bilingual": ((), ()),
    "six": (("six s",), ()),
    "coral-red": ((), ()),
    "silhouette": ((), ()),
}
_SHAPES = {
    "amphora": (
        ("amphoras", "amphorae", "amphorai"),
        ("neck", "belly", "panel", "panathenaic", "panathenaic prize", "nolan", "pointed", "a", "b", "c", "type a")
        + ("type b", "type c", "one piece"),
    ),
    "amphoriskos": (("amphoriskoi", "amphoriscus"), ()),
    "hydria": (("hydriai", "hydriae", "hydrias", "kalpis", "kalpides", "water jar"), ()),
    "krater": (
        ("kraters", "krateres", "crater", "craters", "mixing bowl"),
        ("calyx", "kalyx", "column", "volute", "bell", "chalcidian", "corinthian"),
    ),
    "kylix": (
        ("kylikes", "kylixes", "cylix", "cylices", "cup", "cups", "drinking cup"),
        ("a", "b", "c", "type a", "type b", "type c", "eye", "siana", "lip", "band", "little master", "stemless")
        + ("little master lip", "little master band", "droop", "komast"),
    ),
    "cup-skyphos": (("cup skyphoi",), ()),
    "skyphos": (("skyphoi", "scyphus", "scyphos", "kotyle", "kotylai"), ("a", "b", "corinthian", "owl")),
    "lekythos": (("lekythoi", "lecythus", "lecythos", "lekythus", "oil flask"), ("squat", "shoulder", "cylindrical")),
    "oinochoe": (
        ("oinochoai", "oinochoes", "oenochoe", "oenochoae", "oinochoi", "chous", "choes", "wine jug"),
        ("trefoil",),
    ),
    "olpe": (("olpai", "olpes"), ()),
    "pelike": (("pelikai", "pelikes"), ()),
    "stamnos": (("stamnoi", "stamnus"), ()),
    "psykter": (("psykteres", "psykters", "psycter"), ()),
    "dinos": (("dinoi",), ()),
    "lebes gamikos": (("lebetes gamikoi", "nuptial lebes"), ()),
    "lebes": (("lebetes",), ()),
    "loutrophoros": (("loutrophoroi", "loutrophorus"), ()),
    "kantharos": (("kantharoi", "cantharus", "cantharos"), ()),
    "kyathos": (("kyathoi", "cyathus"), ()),
    "mastos": (("mastoi", "mastoid"), ()),
    "alabastron": (("alabastra", "alabastrum"), ()),
    "aryballos": (("aryballoi", "aryballus"), ()),
    "askos": (("askoi",), ()),
    "pyxis": (("pyxides", "pyxes"), ()),
    "lekanis": (("lekanides",), ()),
    "phiale": (("phialai", "phialae"), ()),
    "rhyton": (("rhyta", "rhytons"), ()),
    "plate": (("plates",), ()),
    "pinax": (("pinakes", "plaque"), ()),
    "epinetron": (("epinetra",), ()),
    "plemochoe": (("plemochoai", "exaleiptron", "exaleiptra", "kothon"), ()),
}


def _spellings(terms: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]], noun: str = "") -> dict[str, str]:
    """{key of a spelling: canonical term}; `noun` may follow a spelling: "black-figure technique"."""
    found = {}
    for term, (others, kinds) in terms.items():
        for one in (term, *others):
            made = [one, f"{one} {noun}", *(f"{kind} {one}" for kind in kinds), *(f"{one} {kind}" for kind in kinds)]
            found |= {_key(spelling): term for spelling in made}
    return found


_SPELLINGS = {
    "fabric": _spellings(_FABRICS, "ware"),
    "technique": _spellings(_TECHNIQUES, "technique"),
    "shape": _spellings(_SHAPES),
}


def canonical(text: str, dimension: str, extra: Mapping[str, str] = NONE) -> str:
    """The canonical term that `text` spells, or its normal form where it is no spelling of any.

    Hyphens and spaces are alike. A value of `extra` may be any spelling that is known already.
    """
    own = {_key(spelling): normalise(term) for spelling, term in extra.items()}
    table = _SPELLINGS.get(dimension, {})
    found = normalise(text)
    for _ in range(3):  # a user's spelling of one of ours, ours, the user's word for it
        key = _key(found)
        found = own.get(key) or table.get(key, found)
    return found


def named(
    text: str, dimension: str, extra: Mapping[str, str] = NONE, also: Iterable[str] = ()
) -> set[str]:  # fmt: skip
    """Canonical terms of `dimension` that `text` holds as whole words; of overlapping spellings the longest counts.

    Args:
        also: terms to look for that the vocabulary may lack, such as a true value.
    """
    table = dict(_SPELLINGS.get(dimension, {}))
    more = {_key(one): canonical(one, dimension, extra) for one in also}
    known = set(table.values()) | set(more.values())
    more |= {
        _key(spelling): term for spelling in extra if (term := canonical(spelling, dimension, extra)) in known
    }  # fmt: skip
    # `extra` may also rename a term of ours
    table = {key: canonical(term, dimension, extra) for key, term in table.items()} if extra else table
    return set(_terms_in(words(text), table | more))


def _terms_in(found: list[str], table: Mapping[str, str]) -> Iterable[str]:
    longest: dict[str, int] = {}  # by first word, since most words begin no term
    for key in table:
        first = key.partition(" ")[0]
        longest[first] = max(longest.get(first, 0), key.count(" ") + 1)
    at = 0
    while at < len(found):
        for length in range(longest.get(found[at], 0), 0, -1):
            term = table.get(" ".join(found[at : at + length]))
            if term and at + length <= len(found):
                yield term
                at += length - 1
                break
        at += 1


# --- dates ---

_BCE, _CE = r"b\.?\s?c\.?(?:\s?e\.?)?|公元前|西元前|前", r"a\.?\s?d\.?|c\.?\s?e\.?|公元|西元"
_ABOUT = r"(?:(?:circa|about|ca\.?|c\.|约)\s*)?"
_TO = r"(?(between)(?:to|and)|(?:to|until|through|-|/|~|至|到))"


_START, _END = rf"(?<![^\W{_CJK}])", rf"(?![^\W{_CJK}])"  # of a word


def _year(n: int) -> str:
    before, after = (
        rf"(?:{_START}(?P<pre{n}>{_BCE}|{_CE})\s*)?",
        rf"(?:\s*年)?(?:\s*(?P<post{n}>{_BCE}|{_CE}){_END})?",
    )
    number = rf"(?P<sign{n}>{_START}-)?(?P<year{n}>(?<![0-9.])[0-9]{{1,4}})(?![0-9]|(?:st|nd|rd|th)\b|\s*(?:cent|世))"
    return rf"{_ABOUT}{before}{_ABOUT}{number}{after}"


_YEARS = re.compile(rf"(?P<between>between\s+)?{_year(1)}(?:\s*{_TO}\s*{_year(2)})?")
_RANKS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_ORDINAL = rf"(?:[0-9]{{1,2}}(?:st|nd|rd|th)?|{'|'.join(_RANKS)})(?![0-9])"
_PARTS = {"half": 2, "third": 3, "quarter": 4}


def _part(n: int) -> str:
    return (
        rf"(?:(?:(?P<third{n}>early|mid(?:dle)?|late)|(?P<rank{n}>last|{_ORDINAL})\s+(?P<part{n}>{'|'.join(_PARTS)}))"
        r"[\s-]+(?:of\s+)?(?:the\s+)?)?"
    )


_CENTURY = re.compile(
    rf"{_START}{_part(1)}(?P<pre>{_BCE}|{_CE})?\s*(?P<first>{_ORDINAL})"
    rf"(?:\s*(?:-|/|to|and|or|至|到)\s*{_part(2)}(?P<last>{_ORDINAL}))?"
    rf"[\s-]*(?:cent(?:ur(?:y|ies))?\.?|c\.?|世[纪紀])(?:\s*(?P<post>{_BCE}|{_CE}))?{_END}"
)


def date_range(text: str) -> Range | None:
    """(first, last) year that `text` names, first <= last, years BCE negative; None where it names none.

    Of several dates the first counts: years with an era or sign, else centuries, else plain numbers of three or four
    digits. The last end of a range may give the era of both; after "525 BC to" a smaller number is BCE, too. Plain
    years that count down are BCE, others CE. A century n BCE is -100 n to -100 n + 99; early, mid, late are its thirds.
    """
    text = normalise(text)
    plain = None
    for found in _YEARS.finditer(text):
        marked, years = _read_years(found)
        if marked:
            return years
        if plain is None and all(len(one) >= 3 for one in found.group("year1", "year2") if one):
            plain = years
    century = _CENTURY.search(text)
    return _read_century(century) if century else plain


def _era(*marks: str | None) -> int:
    """-1 BCE, 1 CE, 0 not said."""
    mark = next(filter(None, marks), "")
    return 0 if not mark else -1 if mark[0] in "b前" or mark.endswith("前") else 1


def _read_years(found: re.Match) -> tuple[bool, Range]:
    first, last = int(found["year1"]), int(found["year2"] or found["year1"])
    eras = [-1 if found[f"sign{n}"] else _era(found[f"pre{n}"], found[f"post{n}"]) for n in (1, 2)]
    marked = any(eras)
    if found["year2"] is None:
        eras[1] = eras[0]
    elif not marked:
        eras = [-1, -1] if first > last else [1, 1]
    elif not eras[1]:  # a sign holds for its own number alone
        eras[1] = -1 if eras[0] < 0 and not found["sign1"] and last < first else 1
    eras = [eras[0] or eras[1], eras[1]]
    if not any(eras):
        eras = [1, 1]
    first, last = sorted((first * eras[0], last * eras[1]))
    return marked, (first, last)


def _rank(text: str) -> int:
    return _RANKS.index(text) + 1 if text in _RANKS else int(re.match("[0-9]+", text)[0])


def _read_century(found: re.Match) -> Range:
    era = _era(found["pre"], found["post"]) or 1
    ends = []
    for number, name in ((1, "first"), (2, "last")):
        if found[name] is None:
            continue
        start = -100 * _rank(found[name]) if era < 0 else 100 * _rank(found[name]) - 99
        at, of = 0, 1
        if third := found[f"third{number}"]:
            at, of = ("e", "m", "l").index(third[0]), 3
        elif part := found[f"part{number}"]:
            of = _PARTS[part]
            at = of - 1 if found[f"rank{number}"] == "last" else min(max(_rank(found[f"rank{number}"]), 1), of) - 1
        ends += [start + 100 * at // of, start + 100 * (at + 1) // of - 1]
    return min(ends), max(ends)


def range_overlap(a: Range | str | None, b: Range | str | None) -> float:
    """Years in both of two closed ranges over years in either, in [0, 1]; 0 where one is missing.

    Args:
        a, b: (first, last), or a text that `date_range` reads.
    """
    a, b = (date_range(one) if isinstance(one, str) else one for one in (a, b))
    if a is None or b is None:
        return 0.0
    both = max(0, min(a[1], b[1]) - max(a[0], b[0]) + 1)
    return both / ((a[1] - a[0] + 1) + (b[1] - b[0] + 1) - both)


# --- texts ---


def exact(answer: str, reference: str, dimension: str, extra: Mapping[str, str] = NONE) -> bool:
    """Whether both mean the same: equal years, or equal words after synonyms. An empty answer is never right."""
    if dimension == "dating" and (dates := date_range(reference)):
        return date_range(answer) == dates
    one, other = (_key(canonical(text, dimension, extra)) for text in (answer, reference))
    return bool(one) and one == other


def anls(answer: str, reference: str) -> float:
    """1 - Levenshtein's distance / longer length, of normal forms, 0 below 0.5 (Biten et al. 2019)."""
    value = Levenshtein.normalized_similarity(normalise(answer), normalise(reference))
    return value if value >= 0.5 else 0.0


def bleu1(answer: str, reference: str) -> float:
    """BLEU of single words with its brevity penalty (Papineni et al. 2002), in [0, 1]; by sacrebleu, over our words."""
    return min(1.0, _BLEU1.sentence_score(_key(answer), [_key(reference)]).score / 100)


def lexical_overlap(a: str, b: str) -> float:
    """Jaccard index of the sets of words, in [0, 1]; 0 where there are none."""
    one, other = set(words(a)), set(words(b))
    return len(one & other) / len(one | other) if one | other else 0.0


def token_f1(a: str, b: str) -> float:
    """Harmonic mean of precision and recall of words, each as often as it stands there (Rajpurkar et al. 2016)."""
    one, other = words(a), words(b)
    return 2 * (Counter(one) & Counter(other)).total() / (len(one) + len(other)) if one and other else 0.0


def similarity(answer: str, reference: str, dimension: str, extra: Mapping[str, str] = NONE) -> float:
    """r_i in [0, 1] of an answer about one dimension; no caption.

    Fabric, technique, shape: 1 if equal after synonyms, else 0. Dating: overlap of ranges; as those where the reference
    holds no year. Decoration: F1 of words. Attribution: 1 - normalised Levenshtein's distance, without ANLS's cut at
    0.5, since a reward should tell nearer names from farther ones.
    """
    if exact(answer, reference, dimension, extra):
        return 1.0
    if dimension == "dating":
        return range_overlap(answer, reference)
    one, other = (canonical(text, dimension, extra) for text in (answer, reference))
    if dimension == "decoration":
        return token_f1(one, other)
    if dimension == "attribution":
        return Levenshtein.normalized_similarity(one, other) if one and other else 0.0
    return 0.0
