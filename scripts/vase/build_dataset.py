"""Rows for SFT, GRPO and scoring, from published captions and questions about the accepted images.

Rule `vase_build_dataset`. A row is kept if all its images are accepted and its vase has a side; dropped.tsv says why
the others are not. The rows of a side go to test.jsonl, or to sft_*.jsonl and grpo_*.jsonl, in order of id, in
ms-swift's standard form: messages and images. GRPO's rows lack the answer's turn: what is right stays in `reference`
(the answer) and `facts` (what the questions file knows of the vase), names that ms-swift does not fold into messages.
The bytes of the .jsonl files do not depend on the order of the published rows.
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pandas as pd

from scripts.common import artefacts, step, tables
from scripts.common.errors import KilnError
from scripts.vase.lint_rows import lint
from scripts.vase.published_rows import PublishedRow, match_images, read_captions, read_questions
from scripts.vase.settings import DIMENSIONS, DatasetSettings
from scripts.vase.sides import SIDES
from scripts.vase.vqa_rows import KINDS

DROPPED = {
    "not_in_manifest": "no such image or vase is listed",
    "quarantined": "an image is unreadable",
    "low_quality": "the classifier calls an image low quality",
    "rejected": "an image's CLIP score is below the threshold",
    "no_accepted_view": "only the vase is named, and no view of it is accepted",
    "no_side": "the vase is not in the split",
}


def with_best_view(row: PublishedRow, best: Mapping[str, str]) -> PublishedRow:
    """`row` showing the best view of its vase, where it names only a vase that has one."""
    return row.showing([best[row.vase]]) if row.vase in best else row


def why_dropped(
    row: PublishedRow,
    listed: Mapping[str, Mapping],
    vases: Collection[str],
    accepted: Mapping[str, bool],
    sides: Mapping[str, str],
) -> tuple[str, str] | None:
    """(a key of `DROPPED`, the image or vase that is to blame), or None for a row that is kept.

    Args:
        row: images are matched, the best view of a vase is chosen.
        listed: {path: {vase, status, ...}} of the manifest.
        vases: those of the manifest.
        accepted: of each high-quality image, whether it is accepted.
        sides: side of each vase.
    """
    if not row.images:
        return ("no_accepted_view" if row.vase in vases else "not_in_manifest"), str(row.vase)
    for path in row.images:
        if path not in listed:
            return "not_in_manifest", path
        if listed[path]["status"] != "ok":
            return "quarantined", path
        if path not in accepted:
            return "low_quality", path
        if not accepted[path]:
            return "rejected", path
        if listed[path]["vase"] not in sides:
            return "no_side", listed[path]["vase"]
    return None


def facts_of(rows: Iterable[PublishedRow], vase_of: Mapping[str, str]) -> dict[str, dict[str, Counter]]:
    """{vase: {dimension: how often each answer is given}} of all rows that ask for one dimension of one vase."""
    found: dict[str, dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    for row in rows:
        vases = {vase_of.get(path) for path in row.images} or {row.vase}
        if row.dimension in DIMENSIONS and len(vases) == 1 and (vase := vases.pop()) is not None:
            found[vase][row.dimension][row.answer] += 1
    return found


def facts_text(known: Mapping[str, Counter]) -> str:
    """JSON {dimension: its most frequent answer}, the first in order of text where there are several; "" for none."""
    chosen = {name: min(answers, key=lambda text: (-answers[text], text)) for name, answers in known.items()}
    return json.dumps(chosen, ensure_ascii=False, sort_keys=True) if chosen else ""


class Named(NamedTuple):
    """A row that is kept, its id, and the vase of its first picture."""

    id: str
    vase: str
    row: PublishedRow


def named_rows(rows: Iterable[PublishedRow], vase_of: Mapping[str, str]) -> list[Named]:
    """Rows in order of their ids, which depend on the rows alone."""
    made = []
    numbers: Counter = Counter()
    for row in sorted(rows, key=lambda row: (row.images, row.turns, row.dimension)):
        vase = vase_of[row.images[0]]
        name = f"{vase}/{PurePosixPath(row.images[0]).stem}/{row.dimension}"
        numbers[name] += 1
        made.append(Named(name if numbers[name] == 1 else f"{name}#{numbers[name]}", vase, row))
    return sorted(made, key=lambda one: one.id)


def chat_row(one: Named, vase_of: Mapping[str, str], facts: Mapping[str, str]) -> dict:
    """A row as it is written, with the answer's turn."""
    row = one.row
    return {
        "id": one.id,
        "vase": one.vase,
        "dimension": row.dimension,
        "messages": [{"role": role, "content": text} for role, text in row.turns],
        "images": list(row.images),
        "reference": row.answer,
        "facts": facts.get(one.vase, "") if len({vase_of[path] for path in row.images}) == 1 else "",
    }


def without_answer(row: Mapping[str, Any]) -> dict:
    """`row` up to the question that is to be answered."""
    return {**row, "messages": row["messages"][:-1]}


def seen_by_sft(vases: Iterable[str], share: float, seed: int) -> set[str]:
    """The first `share` of `vases`, at least one, in an order by hash: a new vase moves few."""
    order = sorted(set(vases), key=lambda vase: (artefacts.sha256_text(str(seed), "sft", vase), vase))
    return set(order[: max(1, round(share * len(order)))])


def read_sides(path: Path) -> dict[str, str]:
    """Side of each vase.

    Raises:
        KilnError: a vase on two sides, or on a side that there is not.
    """
    frame = tables.read_table(path, ["vase", "side"]).drop_duplicates()
    unknown = frame[~frame["side"].isin(SIDES)]
    if len(unknown):
        vase, side = unknown.iloc[0]
        raise KilnError(
            f"{path}: vase {vase} is on side {side!r}, expected one of {', '.join(SIDES)}", "mend the table"
        )
    doubled = frame.loc[frame["vase"].duplicated(), "vase"]
    if len(doubled):
        on = ", ".join(frame.loc[frame["vase"] == doubled.iloc[0], "side"])
        raise KilnError(f"{path}: vase {doubled.iloc[0]} is on two sides: {on}", "make it anew by rule vase_split")
    return dict(zip(frame["vase"], frame["side"], strict=True))


def write_rows(path: Path, rows: Iterable[Mapping]) -> None:
    """`rows` as JSON Lines, UTF-8, one at a time."""
    with artefacts.atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, DatasetSettings)
    made.add_argument("--images", type=Path, required=True, help="folder of raw images")
    made.add_argument("--manifest", type=Path, required=True, help="manifest of rule vase_list_images")
    made.add_argument("--accepted", type=Path, required=True, help="accepted.parquet of rule vase_accept_images")
    made.add_argument("--best-views", type=Path, required=True, help="best_views.parquet of rule vase_select_views")
    made.add_argument("--splits", type=Path, required=True, help="splits.parquet of rule vase_split")
    made.add_argument("--captions", type=Path, help="published captions (.json)")
    made.add_argument("--questions", type=Path, help="published questions (.json, .jsonl)")
    made.add_argument("--output-folder", type=Path, required=True, help="where the rows of each side go")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Build the rows of the files that `args` name."""
    values = step.read_settings(args)
    given = {name: getattr(args, name) for name in ("captions", "questions") if getattr(args, name) is not None}
    inputs = {n: getattr(args, n) for n in ("manifest", "accepted", "best_views", "splits")} | given
    record = step.record(args, "scripts.vase.build_dataset", values, inputs)
    columns = ["path", "vase", "status", "sha256", "width", "height"]
    manifest = tables.read_table(args.manifest, columns)
    accepted = tables.read_table(args.accepted, ["path", "accepted"]).set_index("path")["accepted"].to_dict()
    best = tables.read_table(args.best_views, ["vase", "path"]).set_index("vase")["path"].to_dict()
    sides = read_sides(args.splits)

    rows = read_captions(args.captions, values.caption_question) if args.captions else []
    rows += read_questions(args.questions) if args.questions else []
    if not rows:
        raise KilnError(
            f"{' and '.join(map(str, given.values())) or 'neither captions nor questions given'}: no rows",
            "set vase.dataset.captions or vase.dataset.questions to a file with rows",
        )
    rows = match_images(rows, manifest["path"])
    for number, row in enumerate(rows):  # in place: rows are what takes memory
        rows[number] = with_best_view(row, best)
    vases = set(manifest["vase"].unique())
    asked = manifest[manifest["path"].isin({path for row in rows for path in row.images})].set_index("path")
    listed = asked[["vase", "status", "sha256"]].to_dict("index")
    vase_of = {path: one["vase"] for path, one in listed.items()}
    reasons = [why_dropped(row, listed, vases, accepted, sides) for row in rows]
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    ok = manifest.loc[manifest["status"] == "ok", ["width", "height"]].astype("int64")
    lint(rows, kept, args.images, listed, sides, int(ok.prod(axis=1).max()) if len(ok) else 0, step.threads(args))

    names = {path: name for name, path in given.items()}
    dropped = pd.DataFrame(
        [(names[row.file], row.number, *reason[::-1]) for row, reason in zip(rows, reasons, strict=True) if reason],
        columns=["file", "row", "image_or_vase", "reason"],
    )
    answers = facts_of(rows, vase_of)
    facts = {vase: facts_text(known) for vase, known in answers.items()}
    by_side: dict[str, list[Named]] = {side: [] for side in SIDES}
    for one in named_rows(kept, vase_of):
        by_side[sides[one.vase]].append(one)
    by_reason = {reason: int((dropped["reason"] == reason).sum()) for reason in DROPPED}
    counts = tables.reconcile("vase_build_dataset", len(rows), **{s: len(r) for s, r in by_side.items()}, **by_reason)
    empty = [side for side, own in by_side.items() if not own]
    if empty:
        told = ", ".join(f"{reason} {count}" for reason, count in by_reason.items() if count)
        raise KilnError(
            f"no row on side {' and '.join(empty)}; {len(kept)} of {len(rows)} rows are kept"
            + (f", dropped: {told}" if told else ""),
            "give rows about more vases, or accept more images (vase.threshold) or deal anew (vase.split)",
        )

    train_vases = {one.vase for one in by_side["train"]}
    seen = seen_by_sft(train_vases, values.sft_share, values.seed)
    files = {
        "sft_train": [one for one in by_side["train"] if one.vase in seen],
        "sft_validation": by_side["validation"],
        "grpo_train": by_side["train"],
        "grpo_validation": by_side["validation"],
        "test": by_side["test"],
    }
    folder = args.output_folder
    for name, own in files.items():
        written = (chat_row(one, vase_of, facts) for one in own)
        write_rows(folder / f"{name}.jsonl", map(without_answer, written) if name.startswith("grpo") else written)
    artefacts.write_text(folder / "dropped.tsv", dropped.to_csv(sep="\t", index=False, lineterminator="\n"))
    summary = {
        "rows": counts,
        "dropped": {reason: {"rows": count, "why": DROPPED[reason]} for reason, count in by_reason.items() if count},
        "sides": {side: describe(own) for side, own in by_side.items()},
        "files": {name: len(own) for name, own in files.items()},
        "sft": {"vases": len(seen), "of": len(train_vases), "share": round(len(seen) / len(train_vases), 6)},
        "facts_with_several_answers": sum(len(texts) > 1 for known in answers.values() for texts in known.values()),
    }
    artefacts.write_json(folder / "summary.json", summary)
    step.log.info("%s", counts)
    if summary["facts_with_several_answers"]:
        step.log.warning(
            "%d times a vase's questions of one dimension have several answers: `facts` hold the most frequent",
            summary["facts_with_several_answers"],
        )
    outputs = [folder / f"{name}.jsonl" for name in files] + [folder / n for n in ("dropped.tsv", "summary.json")]
    record.write(args.meta, outputs, items=len(rows))


def describe(rows: Sequence[Named]) -> dict[str, Any]:
    """What summary.json says of one side: rows, vases, images, rows by dimension."""
    dimensions = Counter(one.row.dimension for one in rows)
    return {
        "rows": len(rows),
        "vases": len({one.vase for one in rows}),
        "images": len({path for one in rows for path in one.row.images}),
        "dimensions": {name: dimensions[name] for name in KINDS if dimensions[name]},
    }


if __name__ == "__main__":
    step.run(main)
