"""What each stage that filters took in, passed on, and left out for which reason, from the stages' own summaries."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scripts.common import artefacts, tables
from scripts.common.errors import KilnError

SIDES = ("train", "validation", "test")
UNREADABLE = "unreadable"
TORN = "near-twins disagree"
WORDS = {"image": "unreadable image"}  # of reasons that are a word too short


class Form(NamedTuple):
    """How a stage's summary holds its counts.

    Attributes:
        items: what is counted.
        passed: keys of what goes on.
        lost: {key: reason, or None where `reasons` of the summary has them}; other keys count nothing.
        place: keys that lead to the counts; "*" adds all entries up.
    """

    items: str
    passed: tuple[str, ...]
    lost: Mapping[str, str | None]
    place: tuple[str, ...] = ()


FORMS = {
    "vase": {
        "list_images": Form("raw images", ("ok",), {"quarantined": None}),
        "accept_images": Form(
            "images",
            ("accepted",),
            {
                "low_quality": "low quality",
                "rejected": "CLIP score too low",
                "quarantined": UNREADABLE,
            },
        ),
        "select_views": Form("vases", ("with_view",), {"without_accepted_view": "no accepted view"}, ("vases",)),
        "build_dataset": Form(
            "questions",
            SIDES,
            {
                "not_in_manifest": "no such image or vase",
                "quarantined": UNREADABLE,
                "low_quality": "low quality",
                "rejected": "CLIP score too low",
                "no_accepted_view": "no accepted view",
                "no_side": "vase not in the split",
            },
            ("rows",),
        ),
    },
    "busi": {
        "list_images": Form("files", ("ok",), {"masks": "lesion masks", "quarantined": None}),
        "split": Form(
            "images",
            SIDES,
            {"dropped": TORN, "quarantined": TORN},
        ),
    },
    "rae": {"build_arrow": Form("images", ("ok",), {"quarantined": None}, ("splits", "*"))},
    "coca": {
        "list_slides": Form("slide files", ("ok",), {"quarantined": None}, ("files",)),
        "split": Form("slides", SIDES, {}),
    },
    "biomedica": {"index_local": Form("local pairs", ("samples",), {"rejected": None, "quarantined": None})},
}


class Stage(NamedTuple):
    """A stage's counts: `total` = `passed` + the sum of `lost` {(key, reason): count}; no count of 0 in `lost`."""

    pipeline: str
    step: str
    items: str
    total: int
    passed: int
    lost: dict[tuple[str, str], int]


def read_stage(pipeline: str, file: Path) -> Stage:
    """The counts in a stage's summary, beside which its meta.json names the stage.

    Raises:
        KilnError: of no stage that filters, without its counts, or with counts that do not add up.
    """
    step = artefacts.read_json(file.with_name("meta.json"))["step"].rpartition(".")[2]
    form = FORMS.get(pipeline, {}).get(step)
    if form is None:
        known = ", ".join(FORMS.get(pipeline, {}))
        raise KilnError(f"{file}: {step} is no stage of {pipeline} that filters", f"give a summary of {known}")
    summary = artefacts.read_json(file)
    parts = _at(summary, form.place)
    try:
        counts = {key: sum(part[key] for part in parts) for key in ("in", *form.passed, *form.lost)}
    except (KeyError, TypeError) as error:
        raise KilnError(f"{file}: no count {error}", "delete it and run again: another Kiln made it") from None
    passed = sum(counts[key] for key in form.passed)
    lost = {(key, reason): counts[key] for key, reason in form.lost.items() if reason and counts[key]}
    unnamed = {key: counts[key] for key, reason in form.lost.items() if reason is None and counts[key]}
    if unnamed:
        key = " or ".join(unnamed)
        lost |= {(key, WORDS.get(reason, reason)): count for reason, count in summary["reasons"].items() if count}
    tables.reconcile(f"{file}", counts["in"], passed=passed, **{f"{k}: {why}": n for (k, why), n in lost.items()})
    return Stage(pipeline, step, form.items, counts["in"], passed, lost)


def _at(summary: Mapping[str, Any], place: tuple[str, ...]) -> list[Mapping[str, Any]]:
    found = [summary]
    for key in place:
        found = [one for part in found for one in (part.values() if key == "*" else [part.get(key)])]
    return found
