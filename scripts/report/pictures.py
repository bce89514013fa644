"""The pictures that rules mark for reports, with their captions."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jinja2
from docutils.core import publish_parts

from scripts.common.errors import KilnError

ALIKE = 3  # pictures of one kind that are shown side by side; of more, one stands for all
SPELT = {"lora": "LoRA", "qlora": "QLoRA", "sft": "SFT", "grpo": "GRPO", "dinov2": "DINOv2", "siglip2": "SigLIP2"}
WILDCARD = re.compile(r"\{(\w+)(?:,([^{}]*))?\}")  # of Snakemake: a name and perhaps an expression for it


class Picture(NamedTuple):
    """A picture that is there: the pipeline's name, what it shows, its wildcards, and its caption as HTML.

    Pictures of one category whose captions come from one file, `kind`, show the same of different runs.
    """

    path: Path
    category: str
    labels: dict[str, str]
    caption: str
    kind: str

    @property
    def title(self) -> str:
        """Its labels in words: first what it shows, then of which step and, where there are several, which of them."""
        labels = dict(self.labels)
        parts = [one for one in (labels.pop("picture", ""), *labels.values()) if one not in ("", "all")]
        words = " · ".join(parts).replace("_", " ").split()
        text = " ".join(SPELT.get(word, word) for word in words)
        return text[:1].upper() + text[1:]


class Kind(NamedTuple):
    """Pictures that show the same of different runs: those that stand for it, and the others."""

    shown: list[Picture]
    others: list[Picture]


def by_kind(pictures: Iterable[Picture]) -> list[Kind]:
    """Pictures by category and kind, both in the order of their first: up to `ALIKE` are shown, of more the first."""
    found: dict[tuple[str, str], list[Picture]] = {}
    for one in pictures:
        found.setdefault((one.category, one.kind), []).append(one)
    cuts = [(own, len(own) if len(own) <= ALIKE else 1) for own in found.values()]
    return [Kind(own[:cut], own[cut:]) for own, cut in cuts]


def find_pictures(marked: Mapping[str, Any]) -> Iterator[Picture]:
    """The files of one marked output, sorted by path; none where the rule was not asked for.

    Args:
        marked: {pattern: path with {wildcards}, caption: .rst file with Jinja expressions of `snakemake.wildcards`, as
            in Snakemake's own report, category, labels: {name: text with {wildcards}}}.

    Raises:
        KilnError: no such caption, or one that cannot be rendered.
    """
    pattern, seen = marked["pattern"], set()
    first = WILDCARD.search(pattern)
    root = Path(pattern[: first.start()] if first else pattern).parent
    texts = WILDCARD.split(pattern)
    expression = re.escape(texts[0])
    for name, constraint, text in zip(texts[1::3], texts[2::3], texts[3::3], strict=True):
        expression += f"(?P={name})" if name in seen else f"(?P<{name}>{constraint or '[^/]+'})"
        expression += re.escape(text)
        seen.add(name)
    for path in sorted(root.glob(WILDCARD.sub("*", pattern).removeprefix(f"{root}/"))):
        match = re.fullmatch(expression, str(path))
        if match:
            wildcards = match.groupdict()
            labels = {name: text.format(**wildcards) for name, text in marked["labels"].items()}
            caption = render(Path(marked["caption"]), wildcards)
            yield Picture(path, marked["category"], labels, caption, marked["caption"])


def render(caption: Path, wildcards: Mapping[str, str]) -> str:
    """A caption as HTML, one or more paragraphs.

    Raises:
        KilnError: it is not there, or not valid.
    """
    job = SimpleNamespace(wildcards=SimpleNamespace(**wildcards))
    try:
        text = jinja2.Template(caption.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined).render(
            snakemake=job
        )
        options = {"halt_level": 2, "report_level": 5, "file_insertion_enabled": False, "raw_enabled": False}
        return publish_parts(text, writer="html5", settings_overrides=options)["body"].strip()
    except Exception as error:  # of Jinja and docutils, who have no common one
        raise KilnError(f"{caption}: {error}", "mend the caption") from error
