"""Draw the demo's vases: raw photographs, labelled ones, and captioned ones for the demo's CLIP.

Rule `demo_draw_vases`. Writes `images/` (names as in VaseVQA-3D: <VASE>_<view>_ac001001.jpg),
`labelled/0` and `labelled/1` (low and high quality), `clip/` with `captions.tsv`, `truth.parquet`
(what each raw photograph is), `vases.parquet` (what each raw vase is), `published/captions.json` and
`published/questions.json` (about raw photographs, as others publish them) and `files.json`. Equal
settings give equal bytes.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
from PIL import Image

from scripts.common import artefacts, progress, step, tables, workers
from scripts.common.errors import KilnError
from scripts.demo.captions import caption
from scripts.demo.settings import DrawSettings
from scripts.demo.vase_questions import published_captions, published_questions
from scripts.demo.vases import SIDES, Vase, choose_flaw

CAPTIONS = 4  # wordings per picture
_ROLES = ("raw", "labelled", "clip")


def draw_vase(role: str, number: int, values: DrawSettings) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The facts of vase `number` of a role, and a row for each of its six photographs.

    A row has `name`, `jpeg` (bytes), `view` (1..6), `side`, `flaw` (or "none"), `quality`,
    `view_quality`, and `captions` for role `clip`.
    """
    rng = np.random.default_rng([values.seed, _ROLES.index(role), number])
    words = np.random.default_rng([values.seed, _ROLES.index(role), number, 1])  # so that wording moves no pixel
    vase = Vase(rng, values.shapes)
    digits = rng.bytes(16).hex().upper()
    identity = "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
    rows = []
    # photographers do not number views alike, so a view's number says nothing about its side
    for view, side in enumerate(rng.permutation(list(SIDES)), start=1):
        flaw = choose_flaw(values.flawed, rng)
        picture = vase.photograph(str(side), flaw, values.image_size, rng)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=int(rng.integers(80, 95)))
        row = {
            "name": f"{identity}_{view}_ac001001.jpg",
            "jpeg": buffer.getvalue(),
            "view": view,
            "side": str(side),
            "flaw": flaw or "none",
            "quality": int(flaw is None),
            "view_quality": SIDES[side][2] if flaw is None else 0.0,
        }
        if role == "clip":
            row["captions"] = [caption(vase.facts, str(side), flaw, words) for _ in range(CAPTIONS)]
        rows.append(row)
    return {"vase": identity, **vase.facts}, rows


def draw_all(values: DrawSettings, processes: int) -> Iterator[tuple[str, int, dict, list[dict]]]:
    """(role, number, facts, photographs) of every vase, in order."""
    counts = {"raw": values.vases, "labelled": values.labelled_vases, "clip": values.clip_vases}
    tasks = [(role, i) for role in _ROLES for i in range(counts[role])]
    work = workers.pool(processes, return_as="generator")(
        joblib.delayed(draw_vase)(role, i, values) for role, i in tasks
    )
    for (role, i), (facts, rows) in zip(tasks, progress.bar(work, "draw", len(tasks)), strict=True):
        yield role, i, facts, rows


def write_demo(folder: Path, values: DrawSettings, processes: int) -> int:
    """Fill an existing empty `folder`; the number of pictures written."""
    for name in ("images", "labelled/0", "labelled/1", "clip"):
        (folder / name).mkdir(parents=True)
    truth, vases, lines = [], [], ["path\tvase\tcaption"]
    for role, number, facts, rows in draw_all(values, processes):
        for row in rows:
            places = {"raw": ["images"], "labelled": [], "clip": ["clip"]}[role]
            if role == "labelled" or (role == "raw" and number < values.shared_vases):
                places = [*places, f"labelled/{row['quality']}"]
            for place in places:
                (folder / place / row["name"]).write_bytes(row["jpeg"])
            if role == "clip":
                lines += [f"{row['name']}\t{facts['vase']}\t{text}" for text in row["captions"]]
            if role == "raw":
                known = {key: value for key, value in row.items() if key not in ("name", "jpeg")}
                truth.append({"path": row["name"], **known, **facts})
        if role == "raw":
            vases.append(facts)
    (folder / "clip" / "captions.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tables.write_table(folder / "truth.parquet", pd.DataFrame(truth), ["path"])
    tables.write_table(folder / "vases.parquet", pd.DataFrame(vases), ["vase"])
    artefacts.write_json(folder / "published/captions.json", published_captions(truth))
    artefacts.write_json(folder / "published/questions.json", published_questions(truth))
    return sum(path.suffix == ".jpg" for path in artefacts.write_listing(folder))


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, DrawSettings)
    made.add_argument("--output-folder", type=Path, required=True, help="folder to make or replace")
    args = made.parse_args(argv)
    values = step.read_settings(args)
    if values.shared_vases > values.vases:
        raise KilnError(
            f"demo.draw.shared_vases = {values.shared_vases} of {values.vases} raw vases",
            "set shared_vases to vases or less",
        )
    record = step.record(args, "scripts.demo.draw_vases", values, {})
    folder = args.output_folder
    with artefacts.atomic_folder(folder) as temporary:
        count = write_demo(temporary, values, step.threads(args))
    names = ("files.json", "truth.parquet", "vases.parquet", "clip/captions.tsv")
    names += ("published/captions.json", "published/questions.json")
    outputs = [folder / name for name in names]
    record.write(args.meta, outputs, items=count)


if __name__ == "__main__":
    step.run(main)
