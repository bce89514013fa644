"""Captions of the demo's pictures, in several wordings: a small grammar over condition, view and vase."""

from typing import Any

import numpy as np

_PICTURE = ("a photo", "a photograph", "a picture", "an image", "a museum photograph")
_WHOLE = ("intact", "complete", "undamaged", "whole", "well-preserved")
_NOUN = ("vase", "vessel", "pot", "pottery vessel")
_SEEN = {
    "front": ("seen from the front", "in a frontal view", "facing the camera", "with its main face in full view"),
    "left": ("seen from the side", "in a side view", "in profile"),
    "right": ("seen from the side", "in a side view", "in profile"),
    "back": ("seen from the back", "in a back view", "seen from behind"),
    "top": ("seen from above", "in a top view", "with a look into its mouth"),
    "bottom": ("seen from below", "in a bottom view", "with a look at its underside"),
}
_PART = {"front": "front", "left": "side", "right": "side", "back": "back", "top": "mouth", "bottom": "underside"}
_BAD_PICTURE = {
    "blurred": ("blurred", "blurry, unsharp", "badly blurred", "unsharp"),
    "cropped": ("cropped", "badly cropped", "badly aimed, cropped"),
    "dark": ("dark", "under-exposed", "much too dark", "dark, under-exposed"),
}
_CONSEQUENCE = {"blurred": ", nothing is clear", "cropped": ", showing only part of it", "dark": ", hard to see"}


def caption(facts: dict[str, Any], side: str, flaw: str | None, rng: np.random.Generator) -> str:
    """One caption of a picture.

    Args:
        facts: of the vase, see `vases.describe`.
        side: key of `vases.SIDES`.
        flaw: one of `vase_flaws.FLAWS`, or None.
    """

    def one(*choices: str) -> str:
        return choices[rng.integers(len(choices))]

    noun = facts["shape"] if rng.random() < 0.5 else one(*_NOUN)
    kind = one("ancient ", "ancient Greek ", "Greek ", "", "finely painted ", "")
    kind += f"{facts['technique']} {noun}" if rng.random() < 0.5 else noun
    if kind in _NOUN:
        kind = f"old {kind}"  # a bare noun could make a caption equal to a prompt of the pipeline
    if flaw in _BAD_PICTURE:
        text = f"{a(one(*_BAD_PICTURE[flaw]))} {one('picture', 'photo', 'photograph')} of {a(kind)}"
        return text + one(_CONSEQUENCE[flaw], "")
    if flaw == "shards":
        pieces = one("fragments", "shards", "pieces", "broken pieces", "scattered fragments")
        return f"{pieces} of {one(a(kind), f'a broken {kind}', f'a shattered {kind}')}" + one("", ", broken pottery")
    if flaw == "broken":
        word = one("broken", "damaged", "incomplete", "broken and incomplete")
        return f"{one(*_PICTURE)} of {a(word)} {kind}" + one("", ", a large piece is missing")
    whole, seen = f"{one(*_WHOLE)} {kind}", one(*_SEEN[side])
    wordings = [
        f"{one(*_PICTURE)} of {a(whole)}, {seen}",
        f"{a(whole)} {seen}",
        f"the {_PART[side]} of {a(whole)}",
    ]
    if side == "front":
        clear = one("clear", "sharp", "full", "clear and full")
        wordings += [
            f"{a(clear)} {one('view', 'picture', 'museum photograph')} of {a(whole)} {seen}",
            f"{a(clear)} frontal photograph of {a(kind)}, centred in the picture",
            f"the painted {facts['decoration']} on the front of {a(whole)}",
        ]
    return one(*wordings)


def a(words: str) -> str:
    """`words` after their indefinite article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
