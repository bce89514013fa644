"""Slides per second that a training reads: stored latents through a memory map, against compressed HDF5.

tiles        all tiles of a slide from a compressed file, `file["embeddings"][:]`, as the original does in each epoch
latents      the same latents from compressed HDF5 files, one per slide
ours         rule `coca_train` on the latents of rule `coca_encode_slides`: a row of a memory-mapped shard, copied

Files lie in the page cache, one process reads. Latents must be equal to the byte, else the exit status is 1. Tiles are
random, so that they compress less than real ones; only the order of magnitude of their row counts.
"""

import argparse
import statistics
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from benchmarks import coca_models as models
from benchmarks import measure
from scripts.coca.latents import shard_name
from scripts.coca.pairs import StoredLatents
from scripts.common import tables
from scripts.common.artefacts import write_json

LEVEL = 4  # of gzip, h5py's own


def compare(args: argparse.Namespace, root: Path) -> dict:
    """Interleaved passes over all slides; ends the program if latents differ."""
    encoder, tile_dim = models.shapes(args)[1], 32 if args.smallest else 2560
    rng, names = np.random.default_rng(0), [f"{number:04d}" for number in range(args.slides)]
    latents = rng.standard_normal((args.slides, 1 + encoder.latents, encoder.dim), np.float32).astype(np.float16)
    for number, name in enumerate(names):
        write(root / f"tiles_{name}.h5", rng.standard_normal((args.slide_tiles, tile_dim), np.float32))
        write(root / f"latents_{name}.h5", latents[number])
    stored = store(root / "latents", latents, names)

    def of_files(kind: str) -> list[np.ndarray]:
        return [read(root / f"{kind}_{name}.h5") for name in names]

    ways = {
        "tiles": lambda: of_files("tiles"),
        "latents": lambda: of_files("latents"),
        "ours": lambda: [stored.read(number, 0) for number in range(len(names))],
    }
    for theirs, mine in zip(ways["latents"](), ways["ours"](), strict=True):
        if not np.array_equal(theirs[1:], mine):
            sys.exit("latents of the memory map are not those of the HDF5 files")
    ways["tiles"]()
    seconds = measure.interleave(
        {name: lambda way=way: measure.seconds_of(way, measure.CPU) for name, way in ways.items()}, args.runs
    )
    return {
        "alternative": f'h5py.File(path)["embeddings"][:], gzip level {LEVEL}, chunks by h5py, float16',
        "slides": args.slides, "tiles_of_a_slide": args.slide_tiles, "tile_dim": tile_dim,
        "latents": [encoder.latents, encoder.dim],
        "megabytes_of_a_file": {
            kind: (root / f"{kind}_{names[0]}.h5").stat().st_size / 1e6 for kind in ("tiles", "latents")
        },
        "slides_per_second": {name: args.slides / statistics.median(values) for name, values in seconds.items()},
        **measure.ratio(seconds["tiles"], seconds["ours"]),
        "over_compressed_latents": measure.ratio(seconds["latents"], seconds["ours"]), "seconds": seconds,
    }  # fmt: skip


def write(path: Path, values: np.ndarray) -> None:
    """A compressed HDF5 file as tile encoders write them."""
    with h5py.File(path, "w") as file:
        file.create_dataset("embeddings", data=values.astype(np.float16), compression="gzip", compression_opts=LEVEL)


def read(path: Path) -> np.ndarray:
    """All of it, as the original reads a slide."""
    with h5py.File(path, "r") as file:
        return file["embeddings"][:]


def store(folder: Path, latents: np.ndarray, names: list[str]) -> StoredLatents:
    """The latents as rule `coca_encode_slides` stores them, one shard."""
    folder.mkdir()
    np.save(folder / shard_name(0), latents)
    tables.write_table(
        folder / "index.parquet", pd.DataFrame({"slide": names, "shard": 0, "row": range(len(names))}), ["slide"]
    )
    facts = {"latents": latents.shape[1] - 1, "dim": latents.shape[2], "dtype": "float16", "encoder_sha256": "0"}
    write_json(folder / "summary.json", facts)
    return StoredLatents(folder, pd.DataFrame({"slide": names}), latents.shape[2])
