"""Captions that say what a figure shows, in varied English, about the topic of its article."""

import numpy as np

from scripts.demo.figures import Figure

NAMES = {
    "line chart": ("line chart", "line graph", "line plot", "time course"),
    "bar chart": ("bar chart", "bar graph", "bar plot"),
    "scatter plot": ("scatter plot", "scatter diagram", "dot plot"),
    "histogram": ("histogram", "frequency distribution"),
    "gel": ("gel", "gel electrophoresis", "blot"),
    "microscopy": ("micrograph", "microscopy image", "microscope image"),
}
FORMS = {
    "line chart": {
        "rising": ("rising", "increasing over time", "going up"),
        "falling": ("falling", "decreasing over time", "going down"),
        "peaked": ("with a peak in the middle", "highest half way"),
        "dipping": ("with a dip in the middle", "lowest half way"),
    },
    "bar chart": {
        "rising": ("rising", "increasing from first to last", "the last being the longest"),
        "falling": ("falling", "decreasing from first to last", "the first being the longest"),
        "peaked": ("with a peak in the middle", "longest in the middle"),
        "equal": ("all equal", "of the same length"),
    },
    "scatter plot": {
        "positive": ("with a positive correlation", "positively correlated"),
        "negative": ("with a negative correlation", "negatively correlated"),
        "none": ("without correlation", "uncorrelated"),
    },
    "histogram": {
        "symmetric": ("symmetric", "bell-shaped"),
        "left-skewed": ("skewed to the left", "with a long left tail"),
        "right-skewed": ("skewed to the right", "with a long right tail"),
        "bimodal": ("bimodal", "with two peaks"),
    },
    "gel": {
        "rising": ("stronger from left to right", "with increasing intensity"),
        "falling": ("weaker from left to right", "with decreasing intensity"),
        "equal": ("equally strong", "of equal intensity"),
        "gap": ("absent in one lane", "with one empty lane"),
    },
    "microscopy": {
        "round": ("round", "spherical"),
        "elongated": ("elongated", "spindle-shaped"),
        "branched": ("branched", "star-shaped"),
    },
}
STYLES = {
    "line chart": {"plain": ("solid", "unbroken"), "dashed": ("dashed", "broken"), "marked": ("marked", "knotted")},
    "bar chart": {"vertical": ("vertical", "upright"), "horizontal": ("horizontal", "sideways")},
    "scatter plot": {"discs": ("discs", "circles"), "squares": ("squares",), "crosses": ("crosses",)},
    "histogram": {"filled": ("filled", "solid"), "outlined": ("outlined", "open")},
    "gel": {
        "one row": ("one band per lane", "a single band"),
        "two rows": ("two bands per lane", "double bands"),
        "three rows": ("three bands per lane", "triple bands"),
    },
    "microscopy": {"sparse": ("few", "sparse"), "dense": ("many", "dense"), "clustered": ("clustered", "aggregated")},
}
MARKERS = (
    *("IL-6", "TNF-alpha", "insulin", "albumin", "p53", "actin", "VEGF", "collagen", "glucose", "cortisol", "ATP"),
    *("ferritin", "leptin", "caspase-3", "CD4", "keratin"),
)
SITES = (
    *("mouse liver", "rat brain", "human serum", "HeLa cells", "lung tissue", "kidney biopsies", "zebrafish embryos"),
    *("muscle fibres", "bone marrow", "tumour samples", "colon tissue", "plant roots"),
)
TEMPLATES = (
    "{name} of {topic}: {what}, {form}.",
    "{what}, {form}, in a {name} of {topic}.",
    "{topic}: a {name} with {what}, {form}.",
    "{topic}, shown as {what}, {form} ({name}).",
)
PREFIXES = ("({}) ", "{}. ", "{}: ", "Panel {}: ")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def choose_topic(rng: np.random.Generator) -> str:
    """What the figures of an article are about; no picture shows it."""
    return f"{rng.choice(MARKERS)} in {rng.choice(SITES)}"


def write_caption(figure: Figure, topic: str, rng: np.random.Generator) -> str:
    """A sentence or two with every attribute of the figure, in English."""

    def one(phrases: tuple[str, ...]) -> str:
        return phrases[rng.integers(len(phrases))]

    kind, number = figure.kind, _NUMBERS[figure.count]
    form, style = one(FORMS[kind][figure.form]), one(STYLES[kind][figure.style])
    colours = " and ".join([", ".join(figure.colours[:-1])] * (len(figure.colours) > 1) + [figure.colours[-1]])
    plural = "s" if figure.count > 1 else ""
    if kind == "line chart":
        what = one((f"{number} {style} line{plural} in {colours}", f"{number} {colours} {style} curve{plural}"))
    elif kind == "bar chart" and len(figure.colours) > 1:
        what = one((f"{number} pairs of {style} bars in {colours}", f"{number} pairs of {colours} {style} bars"))
    elif kind == "bar chart":
        what = one((f"{number} {style} bars in {colours}", f"{number} {colours} {style} bars"))
    elif kind == "scatter plot":
        what = one((f"{number} group{plural} of {style} in {colours}", f"{number} group{plural} of {colours} {style}"))
    elif kind == "histogram":
        what = f"{style} {figure.colours[0]} bars" + "".join(f" and a {colour} curve" for colour in figure.colours[1:])
    elif kind == "gel":
        what = f"{number} lanes with {style} {one(('in', 'stained'))} {colours}"
    else:
        what, form = f"{style} {form} cells", one((f"stained {colours}", f"in {colours}"))
    text = one(TEMPLATES).format(name=one(NAMES[kind]), topic=topic, what=what, form=form)
    return (one(PREFIXES).format(figure.letter) if figure.letter else "") + text[0].upper() + text[1:]
