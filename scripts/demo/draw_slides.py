"""Draw the demo's slides: tile embeddings with report sentences and patients.

Rule `demo_draw_slides`. Writes `slides/<slide>.h5`, float16, in the layouts that are found in practice (data set
`embeddings` or `features`, [N,D] or [1,N,D], with or without `coords`); `labels.json`, {slide: sentence};
`patients.csv`; `truth.parquet`, what each slide shows; and `files.json`. Equal settings give equal bytes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import joblib
import numpy as np
import pandas as pd

from scripts.common import artefacts, progress, step, tables, workers
from scripts.demo.settings import SlidesSettings
from scripts.demo.slides import DIAGNOSES, GRADES, SITES, Case, draw_tiles, make_tissue, write_report

_PLAN, _PATIENT, _SLIDE = 1, 2, 3  # random streams, beside that of the tissue


class Slide(NamedTuple):
    """A slide to draw: its name, the number of its patient, and what it shows and says."""

    name: str
    patient: int
    case: Case
    tiles: int
    text: str


def plan(values: SlidesSettings) -> list[Slide]:
    """All slides, by patient. Each patient has one at least, one diagnosis and one site; grades may differ."""
    rng = np.random.default_rng([values.seed, _PLAN])
    further = rng.integers(values.patients, size=values.slides - values.patients)
    counts = 1 + np.bincount(further, minlength=values.patients)
    made = []
    for patient, count in enumerate(counts):
        diagnosis, site = rng.choice([*DIAGNOSES]), rng.choice([*SITES])
        for number in range(count):
            case = Case(str(diagnosis), str(site), str(rng.choice([*GRADES])))
            long = (values.max_tiles / values.min_tiles) ** (rng.random() ** 2)  # most slides are small
            made.append(
                Slide(
                    name=f"P{patient:03d}-{number + 1}",
                    patient=patient,
                    case=case,
                    tiles=round(values.min_tiles * long),
                    text=write_report(case, rng),
                )
            )
    return made


def draw_slide(path: Path, number: int, slide: Slide, values: SlidesSettings) -> None:
    """Write the file of slide `number`."""
    stain = np.random.default_rng([values.seed, _PATIENT, slide.patient]).standard_normal(values.dim, dtype=np.float32)
    rng = np.random.default_rng([values.seed, _SLIDE, number])
    tiles = draw_tiles(slide.case, make_tissue(values.seed, values.dim), slide.tiles, stain, rng)
    with h5py.File(path, "w", libver="latest") as file:
        features = tiles[None] if number % 5 == 1 else tiles
        file.create_dataset("features" if number % 4 == 2 else "embeddings", data=features, track_times=False)
        if number % 3:
            across = int(np.ceil(np.sqrt(slide.tiles)))
            places = 224 * np.stack(np.divmod(np.arange(slide.tiles), across)[::-1], axis=1)
            file.create_dataset("coords", data=places.astype(np.int32), track_times=False)


def write_demo(folder: Path, values: SlidesSettings, processes: int) -> int:
    """Fill an existing empty `folder`; the number of slides written."""
    (folder / "slides").mkdir()
    planned = plan(values)
    work = workers.pool(processes, return_as="generator")(
        joblib.delayed(draw_slide)(folder / "slides" / f"{slide.name}.h5", number, slide, values)
        for number, slide in enumerate(planned)
    )
    for _ in progress.bar(work, "draw", len(planned)):
        pass
    artefacts.write_json(folder / "labels.json", {slide.name: slide.text for slide in planned})
    patients = pd.DataFrame([(slide.name, f"P{slide.patient:03d}") for slide in planned], columns=["slide", "patient"])
    artefacts.write_text(folder / "patients.csv", patients.to_csv(index=False))
    truth = [{"slide": slide.name, **slide.case._asdict(), "tiles": slide.tiles} for slide in planned]
    tables.write_table(folder / "truth.parquet", pd.DataFrame(truth), ["slide"])
    artefacts.write_listing(folder)
    return len(planned)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, SlidesSettings)
    made.add_argument("--output-folder", type=Path, required=True, help="folder to make or replace")
    args = made.parse_args(argv)
    values = step.read_settings(args)
    record = step.record(args, "scripts.demo.draw_slides", values, {})
    folder = args.output_folder
    with artefacts.atomic_folder(folder) as temporary:
        count = write_demo(temporary, values, step.threads(args))
    outputs = [folder / name for name in ("files.json", "labels.json", "patients.csv", "truth.parquet")]
    record.write(args.meta, outputs, items=count)


if __name__ == "__main__":
    step.run(main)
