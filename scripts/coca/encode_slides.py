"""Latents of every slide by a slide encoder, once, so that nothing after it reads tiles again.

Rule `coca_encode_slides`. Slides are read one by one, by slab, and looked at in chunks of tiles, so that memory grows
with the tiles of the longest slide alone. Killed at any moment, the same command carries on from whole shards and, on a
CPU, ends with the same bytes. Under torchrun each process takes every n-th shard.
"""

import argparse
import contextlib
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from scripts.coca import checkpoints
from scripts.coca.latents import shard_name
from scripts.coca.perceiver import Perceiver, encode
from scripts.coca.settings import EncoderSettings, EncodeSettings
from scripts.coca.slide_model import encoder_shape
from scripts.coca.slides import SlideFile, open_listed, read_tiles
from scripts.common import artefacts, devices, parts, step, tables
from scripts.common.errors import KilnError
from scripts.common.fingerprint import fingerprint
from scripts.common.listed_images import unwrapped
from scripts.common.settings import Settings, of_kind

COLUMNS = ["slide", "path", "tiles", "dim", "key"]
SLAB_BYTES = 4 * 2**20  # workers hand slabs over in shared memory, of which a container has 64 MiB


class EncodeSlidesSettings(Settings):
    """Settings of this step."""

    encoder: EncoderSettings = EncoderSettings()
    encode: EncodeSettings = EncodeSettings()


class Slabs(Dataset):
    """Tiles [n,dim] of slides, slab by slab, as stored; of a slab that cannot be read, the error (`unwrapped`)."""

    def __init__(self, slides: Sequence[SlideFile]):
        self.slabs = [(slide, *slab) for slide in slides for slab in slide.slabs(SLAB_BYTES)]

    def __len__(self) -> int:
        return len(self.slabs)

    def __getitem__(self, index: int) -> torch.Tensor | KilnError:
        try:
            return torch.from_numpy(read_tiles(*self.slabs[index]))
        except KilnError as error:
            return error


def read_slides(slides: Sequence[SlideFile], workers: int, device: torch.device) -> Iterator[torch.Tensor]:
    """All tiles [N,dim] of each slide, as stored, on `device`; beside these no more than a few slabs are in memory.

    Raises:
        KilnError: a slide is no longer what it was.
    """
    slabs = Slabs(slides)
    workers = min(workers, len(slabs))
    parts = iter(DataLoader(slabs, batch_size=None, num_workers=workers))
    for slide in slides:
        tiles = torch.empty(slide.tiles, slide.dim, dtype=getattr(torch, slide.dtype), device=device)
        for start, stop in slide.slabs(SLAB_BYTES):
            tiles[start:stop] = unwrapped(next(parts))
        yield tiles


def write_shard(path: Path, rows: Iterator[tuple[str, np.ndarray]], count: int, dtype: str) -> None:
    """Write `count` (slide, latents) as one .npy, row by row, atomically.

    Raises:
        KilnError: latents that are not finite, or too large for `dtype`.
    """
    with artefacts.atomic_path(path) as temporary:
        shard = None
        for number, (slide, found) in enumerate(rows):
            with np.errstate(over="ignore"):
                stored = found.astype(dtype)
            if not np.isfinite(stored).all():
                raise KilnError(
                    f"slide {slide}: latents that are not finite, or too large for {dtype}",
                    "set coca.encode.precision and dtype to fp32 and float32; else look at the slide's tiles",
                )
            if shard is None:
                shape = (count, *stored.shape)
                shard = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
            shard[number] = stored
        shard.flush()


def load_encoder(args: argparse.Namespace, encoder: EncoderSettings, tile_dim: int) -> tuple[Perceiver, str]:
    """The slide encoder that `args` name, in evaluation mode, and the sha256 of its file.

    Raises:
        KilnError: it is of another kind or width, or the checkpoint has none.
    """
    if args.encoder_weights is not None:
        made = Perceiver(tile_dim, **encoder_shape(encoder))
        made.load_weights(args.encoder_weights)
        return made.eval(), artefacts.input_hash(args.encoder_weights)
    model, facts = checkpoints.load(args.checkpoint, None)
    if model.encoder is None:
        raise KilnError(
            f"{args.checkpoint}: its slide encoder was frozen and is not in it", "give --encoder-weights instead"
        )
    if facts.tile_dim != tile_dim:
        raise KilnError(
            f"{args.checkpoint}: its slide encoder takes tiles of {facts.tile_dim}, the slides have {tile_dim}",
            "give tiles of the tile encoder that it was trained with",
        )
    return model.encoder, artefacts.input_hash(args.checkpoint)


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, EncodeSlidesSettings)
    step.add_device(made)
    made.add_argument("--manifest", type=Path, required=True, help="manifest.parquet of rule coca_list_slides")
    made.add_argument("--slides", type=Path, required=True, help="folder of the slides")
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--encoder-weights", type=Path, help="weights of a slide encoder, such as Prism's")
    source.add_argument("--checkpoint", type=Path, help="model.safetensors whose slide encoder was trained with it")
    made.add_argument("--state-folder", type=Path, required=True, help="where finished shards lie meanwhile")
    made.add_argument("--output-folder", type=Path, required=True, help="s00000.npy, ..., index.parquet, summary.json")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Encode the slides that `args` name."""
    values = step.read_settings(args)
    own = values.encode
    accelerator = devices.make_accelerator(args.device, own.precision, step.threads(args))
    first = accelerator.is_main_process
    if not first:
        step.log.setLevel(logging.WARNING)
    inputs = {"manifest": args.manifest}
    inputs |= {"encoder": args.encoder_weights} if args.encoder_weights else {"checkpoint": args.checkpoint}
    record = step.record(args, "scripts.coca.encode_slides", values, inputs)
    table = read_manifest(args.manifest)
    encoder, sha256 = load_encoder(args, values.encoder, int(table["dim"].iloc[0]))
    encoder.to(accelerator.device)
    hashes = {name: one["sha256"] for name, one in record.inputs.items()}
    key = fingerprint(of_kind(values, "numerics"), hashes, record.code)

    def read(shards: list[range]) -> Iterator[Iterator[torch.Tensor]]:
        for rows in shards:
            chosen = table.iloc[rows].itertuples()
            opened = [open_listed(args.slides / row.path, row.key, row.tiles, row.dim) for row in chosen]
            yield read_slides(opened, own.workers, accelerator.device)

    def build(rows: range, slides: Iterator[torch.Tensor], file: Path) -> None:
        found = (encode(tiles, encoder, values.encoder.chunk_tiles, accelerator) for tiles in slides)
        write_shard(file, zip(table["slide"].iloc[rows], found, strict=True), len(rows), own.dtype)

    with parts.built(
        args.state_folder, key, len(table), own.slides_per_shard, read, build, accelerator, "latents", suffix=".npy"
    ) as files:
        if first:
            outputs = publish(args.output_folder, files, table, own, encoder, sha256)
            record.write(args.meta, outputs, items=len(table))


def read_manifest(path: Path) -> pd.DataFrame:
    """The slides of a manifest, all of one width, sorted by slide.

    Raises:
        KilnError: there are none, or their widths differ.
    """
    table = tables.read_table(path, COLUMNS).sort_values("slide", ignore_index=True)
    if table["dim"].nunique() != 1:
        raise KilnError(f"{path}: tiles of widths {sorted(set(table['dim']))}, expected one", "list the slides again")
    return table


def publish(
    folder: Path, files: Sequence[Path], table: pd.DataFrame, own: EncodeSettings, encoder: Perceiver, sha256: str
) -> list[Path]:
    """Put the shards `files` into `folder`, with their index and summary; the outputs.

    Shards are linked where the file system allows it, so that a kill loses none and none is copied.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / shard_name(number) for number in range(len(files))]
    for file, output in zip(files, outputs, strict=True):
        with artefacts.atomic_path(output) as temporary:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            try:
                os.link(file, temporary)
            except OSError:
                shutil.copyfile(file, temporary)
    for stale in set(folder.glob("s*.npy")) - set(outputs):
        stale.unlink()
    numbers = np.arange(len(table))
    index = pd.DataFrame(
        {"slide": table["slide"], "shard": numbers // own.slides_per_shard, "row": numbers % own.slides_per_shard}
    )
    tables.write_table(folder / "index.parquet", index, ["slide"])
    summary = {
        "slides": len(table),
        "tiles": int(table["tiles"].sum()),
        "shards": len(files),
        "latents": len(encoder.perceiver.latents) - 1,
        "dim": encoder.dim,
        "dtype": own.dtype,
        "encoder_sha256": sha256,
    }
    artefacts.write_json(folder / "summary.json", summary)
    step.log.info("%(slides)d slides, %(tiles)d tiles, in %(shards)d shards", summary)
    return [*outputs, folder / "index.parquet", folder / "summary.json"]


if __name__ == "__main__":
    step.run(main)
