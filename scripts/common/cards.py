"""Model cards: the `README.md` beside weights that says what they are, how good, and how they were made.

The format is the Hugging Face Hub's, written and read back by `huggingface_hub`, so that a folder of
weights can be uploaded as it is.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from scripts.common import artefacts
from scripts.common.errors import KilnError

_TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ summary }}

{% if start -%}
Starting point: {{ start }}.
{% else -%}
Trained from scratch.
{% endif %}
Training data: {{ data }}

{% if usage -%}
## How to use

{{ usage }}

{% endif -%}
## Scores

{% if scores -%}
On {{ evaluated_on }}. The interval is a 95 % bootstrap interval.

| score | value | interval | n | compared with |
|---|---|---|---|---|
{% for row in scores -%}
| {{ row | join(" | ") }} |
{% endfor %}
{%- else -%}
None were measured.
{% endif %}
## Intended use

{{ intended_use }}

## Limits

{{ limits }}

## How it was made

- code key: `{{ code_key }}`
- git commit: `{{ git_commit }}`

{{ fence }}yaml
{{ settings }}
{{ fence }}

"""


def write_card(
    path: Path,
    *,
    name: str,
    summary: str,
    task: str,
    license: str,
    data: str,
    evaluated_on: str,
    metrics: Mapping[str, Mapping[str, Any]],
    intended_use: str,
    limits: str,
    settings: Mapping[str, Any],
    code_key: str,
    git_commit: str | None,
    base_model: str | Sequence[str] | None = None,
    starting_point: str | None = None,
    hub_datasets: Sequence[str] = (),
    library: str | None = None,
    languages: Sequence[str] = (),
    tags: Sequence[str] = (),
    usage: str = "",
) -> None:
    """Write a model card, read it back to see that it holds what was put in, and put it in place atomically.

    Args:
        path: the `README.md` in the folder of the weights.
        summary, intended_use, limits: Markdown.
        task: the Hub's name of the task, such as "image-classification" or "image-text-to-text".
        license: the Hub's identifier, such as "apache-2.0", "cc-by-nc-4.0", "other" or "unknown".
        data: what it was trained on, in words (folders of the user have no place on the Hub).
        evaluated_on: what the metrics were measured on, in words.
        metrics: {name: entry made by `statistics.metric`}; entries without a value are shown, with their reason, in
            the table alone.
        settings, code_key, git_commit: of the step that made the weights, as in its `meta.json`.
        base_model: "owner/name" on the Hub, one or several; None when it is not there, or trained from scratch.
        starting_point: the base in words, where it has no name on the Hub.
        hub_datasets: "owner/name" of datasets on the Hub.
        usage: Markdown, how to load and call it; "" for none.
        library: the Hub's name of the library that loads the weights ("transformers", "open_clip", "timm").

    Raises:
        KilnError: a base model or dataset that is no Hub name (a local path would tell about the user's disk), an
            empty text, or a card that does not read back.
    """
    base = [base_model] if isinstance(base_model, str) else list(base_model or ())
    for repo in [*base, *hub_datasets]:
        _check_hub_name(repo, path)
    texts = {"name": name, "summary": summary, "data": data, "intended_use": intended_use, "limits": limits}
    for key, text in {**texts, "license": license, "task": task, "evaluated_on": evaluated_on}.items():
        if not text.strip():
            raise KilnError(f"{path}: the card's {key} is empty", "say it in a sentence")
    card_data = ModelCardData(
        model_name=name,
        license=license,
        pipeline_tag=task,
        library_name=library,
        base_model=(base[0] if len(base) == 1 else base) or None,
        datasets=list(hub_datasets) or None,
        language=list(languages) or None,
        tags=["kiln", *tags],
        eval_results=_eval_results(metrics, task, evaluated_on) or None,
    )
    listed = yaml.safe_dump(dict(settings), sort_keys=True, allow_unicode=True, width=100).strip()
    card = ModelCard.from_template(
        card_data,
        template_str=_TEMPLATE,
        **texts,
        usage=usage,
        start=", ".join(base) or starting_point,
        evaluated_on=evaluated_on,
        scores=[_row(key, entry) for key, entry in metrics.items()],
        code_key=code_key,
        git_commit=git_commit or "unknown (not made from a git checkout)",
        settings=listed,
        fence="`" * (max((len(run) for run in re.findall("`+", listed)), default=2) + 1 if "```" in listed else 3),
    )
    with artefacts.atomic_path(path) as temporary:
        card.save(temporary)
        _check_reads_back(temporary, card_data, path)


def read_facts(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object that has `keys`.

    Raises:
        KilnError: it is none, or lacks one; names file and key.
    """
    found = artefacts.read_json(path)
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise KilnError(f"{path}: no {', '.join(missing)}", "check which file this is, or make it anew")
    return found


def without_paths(value: Any) -> Any:
    """Settings with every path of a disk cut down to its last part."""
    if isinstance(value, Mapping):
        kept = {key: without_paths(one) for key, one in value.items()}
        return kept | ({"init_from": Path(value["init_from"]).name} if value.get("init_from") else {})
    if isinstance(value, list | tuple):
        return [without_paths(one) for one in value]
    if isinstance(value, str) and re.match(r"[/~]|\.\.?/", value):
        return Path(value).name
    return value


def _check_hub_name(repo: str, path: Path) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError:
        wrong = True
    else:
        wrong = repo.startswith((".", "/", "~")) or repo.count("/") != 1
    if wrong:
        raise KilnError(f"{path}: {repo!r} is no name on the Hub", "give it as owner/name; local data belong in `data`")


def _eval_results(metrics: Mapping[str, Mapping[str, Any]], task: str, dataset: str) -> list[EvalResult]:
    slug = re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-") or "dataset"
    return [
        EvalResult(
            task_type=task,
            dataset_type=slug,
            dataset_name=dataset,
            metric_type=name,
            metric_value=float(entry["value"]),
            metric_name=f"{name} ({_n_and_interval(entry)})",  # the Hub shows nothing else beside a value
        )
        for name, entry in metrics.items()
        if entry["value"] is not None
    ]


def _n_and_interval(entry: Mapping[str, Any]) -> str:
    interval = "no interval" if entry["ci95"] is None else "95 % interval {} to {}".format(*map(_number, entry["ci95"]))
    return f"n = {entry['n']}, {interval}"


def _row(name: str, entry: Mapping[str, Any]) -> list[str]:
    if entry["value"] is None:
        cells = [name, "none", "", "", entry["reason"]]
    else:
        baseline = entry.get("baseline")
        compared = "" if baseline is None else f"{_number(baseline)} ({entry['baseline_kind'].replace('_', ' ')})"
        interval = "none" if entry["ci95"] is None else " to ".join(map(_number, entry["ci95"]))
        arrow = "" if entry.get("higher_is_better", True) else " (lower is better)"
        cells = [name + arrow, _number(entry["value"]), interval, f"{entry['n']:,}", compared]
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _check_reads_back(written: Path, wanted: ModelCardData, path: Path) -> None:
    try:
        found = ModelCard.load(written)
    except (ValueError, yaml.YAMLError) as error:
        raise KilnError(
            f"{path}: the card does not read back: {error}", "look for odd characters in its texts"
        ) from None
    if found.data.to_dict() != wanted.to_dict():
        raise KilnError(f"{path}: the card's front matter reads back differently", "look for odd characters in it")
