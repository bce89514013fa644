"""What the demo asks and tells about its raw vases, in the layouts of published captions and questions."""

from collections.abc import Iterable
from typing import Any

QUESTIONS = {
    "fabric": "What fabric?",
    "technique": "What technique?",
    "shape": "What shape?",
    "dating": "What date?",
    "decoration": "What decoration?",
    "attribution": "By whom?",
}
DESCRIBE = "Describe the vase."
_FRONT_ONLY = ("decoration", "attribution")  # what other sides show too little of


def answers(facts: dict[str, Any]) -> dict[str, str]:
    """The answer to each of `QUESTIONS` about a vase; `facts` as `vases.describe` gives them."""
    dating = f"{facts['date_from']} to {facts['date_to']}"
    return {name: dating if name == "dating" else facts[name] for name in QUESTIONS}


def caption(facts: dict[str, Any]) -> str:
    """A museum's one line about a vase, the same for all its photographs."""
    known = answers(facts)
    kind = f"{known['fabric']} {known['technique']} {known['shape']}"
    return ", ".join((kind, known["dating"], known["decoration"], known["attribution"]))


def published_captions(photographs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each photograph (`path`, `view`, and the vase's facts); even views have conversations."""
    rows = []
    for one in photographs:
        text = caption(one)
        row: dict[str, Any] = {"images": [one["path"]], "caption": text, "data_by": "Kiln demo"}
        if one["view"] % 2 == 0:
            row["conversations"] = [{"from": "human", "value": DESCRIBE}, {"from": "gpt", "value": text}]
        rows.append(row)
    return rows


def published_questions(photographs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each question that can be answered from a photograph (`path`, `side`, and the vase's facts)."""
    return [
        {"question": QUESTIONS[dimension], "answer": answer, "dimension": dimension, "image": one["path"]}
        for one in photographs
        for dimension, answer in answers(one).items()
        if one["side"] == "front" or dimension not in _FRONT_ONLY
    ]
