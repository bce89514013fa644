"""Captions of the demo's pictures, in several wordings: a small grammar over condition, view and vase."""

from typing import Any

import numpy as np

_PICTURE = ("a photo", "a photograph", "a picture", "an image", "a museum photograph")
_WHOLE = ("intact", "complete", "undamaged", "whole", "well-preserved")
_NOUN = ("vase", "vessel", "pot", "pottery vessel")
_SIDES = {
    "front": ("from the front", "in a frontal view", "front view", "showing the main face, the front"),
    "left": ("from the side", "in a side view", "in profile"),
    "right": ("from the side", "in a side view", "in profile"),
    "back": ("from the back", "back view", "from behind"),
    "top": ("from above", "view into the mouth from the top", "from the top"),
    "bottom": ("from below", "view of the underside", "from the bottom"),
}
_BAD_PICTURE = {
    "blurred": ("blurred", "blurry, out of focus", "badly blurred", "unsharp"),
    "cropped": ("cropped", "badly cropped", "badly aimed, cropped"),
    "dark": ("dark", "under-exposed", "much too dark", "dark, under-exposed"),
}


def caption(facts: dict[str, Any], side: str, flaw: str | None, rng: np.random.Generator) -> str:
    """One caption of a picture.

    Args:
        facts: of the vase, see `vases.describe`.
        side: key of `vases.SIDES`.
        flaw: one of `vase_flaws.FLAWS`, or None.
    """

    def one(*choices: str) -> str:
        return choices[rng.integers(len(choices))]

    ancient = one("ancient ", "ancient Greek ", "Greek ", "", "painted ", "")
    noun = facts["shape"] if rng.random() < 0.5 else one(*_NOUN)
    kind = f"{ancient}{facts['technique']} {noun}" if rng.random() < 0.5 else f"{ancient}{noun}"
    picture, seen = one(*_PICTURE), one(*_SIDES[side])
    if flaw in _BAD_PICTURE:
        word = one(*_BAD_PICTURE[flaw])
        extra = {"cropped": ", showing only part of it", "blurred": ", nothing is clear", "dark": ""}[flaw]
        return f"{_article(word)} {one('picture', 'photo', 'photograph')} of {_article(kind)} {kind}" + one(extra, "")
    if flaw == "shards":
        word = one("fragments", "shards", "pieces", "broken pieces", "scattered fragments")
        return f"{word} of {one('a', 'a broken', 'a shattered')} {noun}" + one("", ", broken pottery")
    if flaw == "broken":
        word = one("broken", "damaged", "incomplete", "broken and incomplete")
        return f"{picture} of {_article(word)} {word} {kind}" + one("", ", a large piece is missing")
    word = one(*_WHOLE)
    if side == "front":
        clear = one("clear", "sharp", "full", "clear and full")
        return one(
            f"{picture} of {_article(word)} {word} {kind} seen {one('from the front', 'in frontal view')}",
            f"{_article(clear)} {clear} view of {_article(word)} {word} {kind}, {seen}",
            f"the front of {_article(word)} {word} {kind}, centred and sharp",
            f"{_article(clear)} frontal {one('picture', 'photo', 'photograph')} of {_article(kind)} {kind}",
            f"{_article(word)} {word} {kind} {seen}, its painted {facts['decoration']} in full view",
        ).replace("a clear frontal view of", "one clear frontal view of")
    return one(
        f"{picture} of {_article(word)} {word} {kind}, {seen}",
        f"{_article(word)} {word} {kind} {one('seen', 'shown')} {seen}".replace("seen view", "view"),
        f"the {_part(side)} of {_article(word)} {word} {kind}",
    )


def _part(side: str) -> str:
    return {"back": "back", "top": "mouth", "bottom": "underside"}.get(side, "side")


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"
