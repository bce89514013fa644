"""Draw the demo's figures with captions, in tar shards as those of BIOMEDICA: <key>.jpg, <key>.json, <key>.txt.

Rule `demo_draw_figures`. Writes `local/*.tar` (a random share of the articles), `hub/datasets/<owner>/<name>/*.tar`
(the others), `truth.parquet`, what each figure shows and what is wrong with its pair; and `files.json`. A few pairs are
as real ones that cannot be used; in the first shard of both places two keys interleave. Equal settings give equal
bytes.
"""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import pandas as pd
from PIL import Image

from scripts.common import artefacts, progress, step, tables, workers
from scripts.demo.figure_captions import choose_topic, write_caption
from scripts.demo.figures import KINDS, Figure, choose_figure, choose_look, draw, subtype
from scripts.demo.settings import FiguresSettings

FLAWS = ("empty caption", "no caption found", "small image", "broken image", "no json", "caption not utf-8")
_ARTICLE, _PLACES, _FLAWS = 1, 2, 3  # random streams
_ARTICLES_PER_BATCH = 200  # as in the original's keys
_INTERLEAVED = 2  # place in the first shard of the two keys whose members interleave
_SHARDS = {"local": "000_001{:06d}.tar", "hub": "001_002{:06d}.tar"}


class Pair(NamedTuple):
    """A drawn figure, as JPEG, with its caption."""

    key: str
    article: str
    topic: str
    figure: Figure
    caption: str
    jpeg: bytes
    size: tuple[int, int]


def plan(values: FiguresSettings) -> list[tuple[int, int]]:
    """(accession number, figures) of all articles: one to four figures, `values.figures` in all."""
    rng = np.random.default_rng([values.seed, _PLACES])
    counts = rng.integers(1, 5, values.figures)
    ends = np.minimum(np.cumsum(counts), values.figures)
    counts = np.diff(ends, prepend=0)
    counts = counts[counts > 0]
    accessions = rng.choice(9_000_000, len(counts), replace=False) + 1_000_000
    return [(int(accession), int(count)) for accession, count in zip(accessions, counts, strict=True)]


def draw_article(number: int, accession: int, count: int, values: FiguresSettings) -> list[Pair]:
    """The `count` figures of article `number`: one look, one topic."""
    rng = np.random.default_rng([values.seed, _ARTICLE, number])
    look, topic = choose_look(rng, (values.min_side, values.max_side)), choose_topic(rng)
    made = []
    for index in range(count):
        figure = choose_figure(rng)
        picture = draw(figure, look, rng)
        soft = int(rng.integers(16**8))
        key = f"{number // _ARTICLES_PER_BATCH:05d}-PMC{accession}-{index}-{soft:08x}"
        caption = write_caption(figure, topic, rng)
        made.append(Pair(key, f"PMC{accession}", topic, figure, caption, _jpeg(picture), picture.size))
    return made


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def members(pair: Pair, flaw: str) -> dict[str, bytes]:
    """{ending: bytes} of a pair in its shard, with one of FLAWS or, if "", without."""
    caption, jpeg, size = pair.caption.encode(), pair.jpeg, pair.size
    if flaw == "empty caption":
        caption = b" \n"
    elif flaw == "no caption found":
        caption = b"No caption found"
    elif flaw == "caption not utf-8":
        caption = f"{pair.caption} Scale bar: 5 µm.".encode("latin-1")
    elif flaw == "small image":
        size = (20, 16)
        jpeg = _jpeg(Image.open(io.BytesIO(jpeg)).resize(size))
    elif flaw == "broken image":
        jpeg = jpeg[: len(jpeg) // 2]
    described = json.dumps(_describe(pair, size), sort_keys=True).encode()
    return {"jpg": jpeg, "txt": caption} | ({} if flaw == "no json" else {"json": described})


def _describe(pair: Pair, size: tuple[int, int]) -> dict:
    """The fields of the original's json."""
    kind, number = pair.figure.kind, int(pair.key.split("-")[2])
    return {
        "image_file_name": f"{pair.article}_F{number + 1}.jpg",
        "image_cluster_id": KINDS.index(kind),
        "image_hash": artefacts.sha256_text(pair.key)[:16],
        "image_label_id": KINDS.index(kind),
        "image_panel_type": kind,
        "image_panel_subtype": subtype(pair.figure),
        "image_primary_label": [kind],
        "image_secondary_label": [subtype(pair.figure)],
        "image_size": list(size),
        "image_set": "demo",
        "image_context": [f"Figure {number + 1} shows {pair.topic}."],
        "article_accession_id": pair.article,
        "article_title": f"Measurements of {pair.topic}",
        "article_journal": "Journal of Drawn Figures",
        "article_date": f"20{int(pair.article[-2:]) % 25:02d}-01-01",
        "article_abstract": f"We drew {pair.topic} by a rule.",
        "article_mesh_terms": [],
        "article_keywords": pair.topic.split(" in "),
        "article_reference_ids": [],
        "article_reference_count": 0,
        "article_reference_list": [],
        "article_subject": ["Research Article"],
        "article_citation": f"Journal of Drawn Figures, {pair.article}",
        "article_license": "CC0",
        "article_text": "",
    }


def draw_all(values: FiguresSettings, processes: int) -> Iterator[list[Pair]]:
    """The pairs of each article, in the plan's order."""
    articles = plan(values)
    work = workers.pool(processes, return_as="generator")(
        joblib.delayed(draw_article)(number, *article, values) for number, article in enumerate(articles)
    )
    yield from progress.bar(work, "draw", len(articles))


def choose_flaws(pairs: int, place: str, values: FiguresSettings) -> list[str]:
    """A flaw or "" for each pair of a place; each kind of flaw as often as the others, but for one."""
    rng = np.random.default_rng([values.seed, _FLAWS, [*_SHARDS].index(place)])
    flaws = [""] * pairs
    for turn, number in enumerate(rng.permutation(pairs)[: round(values.flawed * pairs)]):
        flaws[number] = FLAWS[turn % len(FLAWS)]
    return flaws


def write_shards(folder: Path, place: str, pairs: list[Pair], values: FiguresSettings) -> list[dict]:
    """Write the pairs of a place in shards below `folder`; a row of the truth for each."""
    from webdataset import TarWriter  # 2 s, which the processes that draw do without

    folder.mkdir(parents=True)
    flaws = choose_flaws(len(pairs), place, values)
    rows = []
    for number, start in enumerate(range(0, len(pairs), values.samples_per_shard)):
        name = _SHARDS[place].format(number)
        chosen = [*zip(pairs, flaws, strict=True)][start : start + values.samples_per_shard]
        files = [(pair.key, members(pair, flaw)) for pair, flaw in chosen]
        if number == 0:
            files = _interleave(files, _INTERLEAVED)
        with (folder / name).open("wb") as stream, TarWriter(stream, encoder=False, mtime=0) as writer:
            for key, content in files:
                writer.write({"__key__": key, **content})
        rows += [_truth(pair, flaw, place, name) for pair, flaw in chosen]
    return rows


def _interleave(files: list[tuple[str, dict[str, bytes]]], place: int) -> list[tuple[str, dict[str, bytes]]]:
    """The image of the pair at `place` and that of the next come before what else these two have."""
    two = files[place : place + 2]
    images = [(key, {"jpg": content["jpg"]}) for key, content in two]
    rest = [(key, {end: part for end, part in content.items() if end != "jpg"}) for key, content in two]
    return files[:place] + images + rest + files[place + 2 :]


def _truth(pair: Pair, flaw: str, place: str, shard: str) -> dict:
    shown = pair.figure._asdict() | {"colours": ", ".join(pair.figure.colours)}
    shown = {"panel_type": shown.pop("kind"), "panel_subtype": subtype(pair.figure), **shown}
    where = {"key": pair.key, "article": pair.article, "place": place, "shard": shard}
    return where | shown | {"topic": pair.topic, "caption": pair.caption, "flaw": flaw}


def write_demo(folder: Path, values: FiguresSettings, processes: int) -> int:
    """Fill an existing empty `folder`; the number of pairs written."""
    articles = [*draw_all(values, processes)]
    order = np.random.default_rng([values.seed, _PLACES, 1]).permutation(len(articles))
    near = set(order[: max(round(values.local * len(articles)), 1)].tolist())
    folders = {"local": folder / "local", "hub": folder / "hub" / "datasets" / values.repo}
    rows = []
    for place, below in folders.items():
        pairs = [pair for n, article in enumerate(articles) if (n in near) == (place == "local") for pair in article]
        rows += write_shards(below, place, pairs, values)
    tables.write_table(folder / "truth.parquet", pd.DataFrame(rows), ["key"])
    artefacts.write_listing(folder)
    return len(rows)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, FiguresSettings)
    made.add_argument("--output-folder", type=Path, required=True, help="folder to make or replace")
    args = made.parse_args(argv)
    values = step.read_settings(args)
    record = step.record(args, "scripts.demo.draw_figures", values, {})
    folder = args.output_folder
    with artefacts.atomic_folder(folder) as temporary:
        count = write_demo(temporary, values, step.threads(args))
    record.write(args.meta, [folder / "files.json", folder / "truth.parquet"], items=count)


if __name__ == "__main__":
    step.run(main)
