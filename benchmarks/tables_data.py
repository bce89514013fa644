"""What `benchmarks.tables` gives to the steps: tables of any number of rows, and the small files that they speak of."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks import busi_duplicates
from scripts.biomedica import index_local
from scripts.biomedica.settings import HeldOutSettings
from scripts.biomedica.sides import SIDES, article_of, side_of
from scripts.busi import list_images as busi_listing
from scripts.coca import list_slides
from scripts.common import artefacts
from scripts.vase.inspect_images import SCHEMA
from scripts.vase.settings import DIMENSIONS

SHARDS = 100
VIEWS = 8  # of a vase
WIDTH = 512  # of an embedding, as ViT-B-32's
BROKEN, COPIED = 1000, 500  # one file of so many is empty, or a copy of the one before it
HARD_LINKS = 60_000  # of one file; ext4 takes 65,000


def shares(rows: int) -> Iterator[tuple[str, range]]:
    """(shard, its row numbers)."""
    per_shard = -(-rows // SHARDS)
    for number, start in enumerate(range(0, rows, per_shard)):
        yield f"s{number:05d}", range(start, min(start + per_shard, rows))


def image_path(row: int, per_folder: int) -> str:
    """Of raw image `row`; the file's name is one of VaseVQA-3D's."""
    return f"b{row // per_folder:03d}/{row // VIEWS:08X}_{row % VIEWS}_ac001001.jpg"


def jpegs(side: int = 16) -> Iterator[bytes]:
    """JPEG files without end, each with bytes of its own: a comment tells them apart."""
    made = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(made, "JPEG")
    data, number = made.getvalue(), 0
    while True:
        text = str(number).encode()
        yield data[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2) + text + data[2:]
        number += 1


def vase_images(folder: Path, rows: int) -> None:
    """folder/images with `rows` files, and tables by shard: folder/inspect_images, classify_images, embed_images."""
    from scripts.vase.embed_images import write_embeddings  # imports torch

    per_folder, files = -(-rows // SHARDS), jpegs()
    rng, data = np.random.default_rng(0), b""
    for name in ("inspect_images", "classify_images", "embed_images"):
        (folder / name).mkdir(parents=True)
    for shard, own in shares(rows):
        listed = []
        for row in own:
            path = image_path(row, per_folder)
            place = folder / "images" / path
            if row == own.start or row % per_folder == 0:
                place.parent.mkdir(parents=True, exist_ok=True)
            broken = row % BROKEN == BROKEN - 1
            data = b"" if broken else data if data and row % COPIED == 1 else next(files)
            place.write_bytes(data)
            facts = (None, None, None, None) if broken else (16, 16, "RGB", "JPEG")
            fate = ("quarantined", "empty file") if broken else ("ok", "")
            listed.append((path, hashlib.sha256(data).hexdigest(), len(data), *facts, shard, 0, *fate))
        frame = pd.DataFrame(listed, columns=SCHEMA.names)
        pq.write_table(pa.Table.from_pandas(frame, SCHEMA), folder / "inspect_images" / f"{shard}.parquet")
        ok = frame.loc[frame["status"] == "ok", "path"]
        probability = rng.random(len(ok))
        classes = pd.DataFrame({"path": ok, "probability": probability, "label": (probability > 0.2).astype(np.int64)})
        classes.to_parquet(folder / "classify_images" / f"{shard}.parquet", index=False)
        vectors = rng.standard_normal((len(ok), WIDTH), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        write_embeddings(folder / "embed_images" / f"{shard}.arrow", ok, vectors)


def labelled_images(path: Path, rows: int) -> None:
    """The table of rule vase_list_labelled for images of vases that are not among the raw ones."""
    numbers = np.arange(rows)
    frame = pd.DataFrame(
        {
            "path": [f"{number // 4 % 2}/L{number // 4:07X}_{number % 4}_ac001001.jpg" for number in numbers],
            "sha256": [hashlib.sha256(f"labelled {number}".encode()).hexdigest() for number in numbers],
            "vase": [f"L{number // 4:07X}" for number in numbers],
            "status": "ok",
            "label": numbers // 4 % 2,
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, index=False)


def used_by_classifier(path: Path, labelled: Path) -> None:
    """used.parquet of rule vase_train_classifier."""
    roles = {"train": "fit", "validation": "choose", "test": "score"}
    frame = pd.read_parquet(labelled, columns=["path", "vase", "side"])
    frame.assign(role=frame["side"].map(roles)).drop(columns="side").to_parquet(path, index=False)


def clip_model(folder: Path) -> None:
    """A small CLIP with embeddings of the published width."""
    import open_clip  # seconds, and memory, that the other parts do without
    import torch
    from safetensors.torch import save_file

    from scripts.vase import clip

    config = {
        "embed_dim": WIDTH,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    save_file(open_clip.CLIP(**config).state_dict(), folder / clip.WEIGHTS)
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3}
    artefacts.write_json(folder / clip.CONFIG, {"model_cfg": config, "preprocess_cfg": preprocess})


def questions(path: Path, rows: int, vases: int) -> None:
    """`rows` questions about the first of `vases` vases, by name, each of another dimension."""
    kinds = list(DIMENSIONS)
    with path.open("w", encoding="utf-8") as file:
        for row in range(rows):
            vase, kind = f"{row // len(kinds) % vases:08X}", kinds[row % len(kinds)]
            asked = {"vase": vase, "question": f"What is the {kind} of this vase ({row})?", "dimension": kind}
            file.write(json.dumps(asked | {"answer": f"{kind} {row % 17}"}) + "\n")


def busi_images(folder: Path, rows: int) -> None:
    """PNGs of 64 x 64 grey pixels in class folders, every tenth a near-twin of the one before it."""
    drawn = thumbnails(rows)
    for name in busi_listing.ListSettings().classes:
        (folder / name).mkdir(parents=True)
    names = busi_listing.ListSettings().classes
    row = 0
    for block in drawn:
        for one in block:
            place = folder / names[row // 10 % len(names)] / f"{row:07d}.png"
            Image.fromarray(one.reshape(64, 64)).save(place, compress_level=0)
            row += 1


def thumbnails(rows: int, block: int = 1000) -> Iterator[np.ndarray]:
    """uint8 [n,4096], `rows` in all: amplitudes fall with frequency as those of photographs do, 1/f.

    Every tenth is a near-twin of the one before it.
    """
    side = busi_duplicates.duplicates.SIDE
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij"))
    frequency[0, 0] = np.inf
    for start in range(0, rows, block):
        rng = np.random.default_rng(start)
        noise = np.fft.rfft2(rng.standard_normal((min(block, rows - start), side, side), dtype=np.float32))
        made = np.fft.irfft2(noise / frequency, (side, side))
        made = 128 + 40 * made / made.std(axis=(1, 2), keepdims=True)
        twins = np.arange(9, len(made), 10)
        made[twins] = made[twins - 1] + rng.normal(0, 4, made[twins].shape)
        yield np.clip(np.rint(made), 0, 255).astype(np.uint8).reshape(len(made), -1)


def busi_groups(path: Path, rows: int) -> None:
    """groups.parquet of rule busi_find_duplicates: a tenth of the images are twins of the one before."""
    numbers = np.arange(rows)
    first = numbers - (numbers % 10 == 9)
    frame = pd.DataFrame(
        {
            "path": [f"Normal/{number:07d}.png" for number in numbers],
            "group": [f"Normal/{number:07d}.png" for number in first],
            "conflict": first % 1000 == 8,
            "label": first % 3,
            "sha256": [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers],
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path, index=False)


def coca_slides(folder: Path, rows: int) -> None:
    """folder/slides with so many names of a few small files, and their labels.json."""
    for start in range(0, rows, HARD_LINKS):
        source = folder / "slides" / f"{start // 10_000:03d}" / f"S{start:07d}.h5"
        source.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(source, "w") as file:
            file["embeddings"] = np.random.default_rng(start).standard_normal((4, 2560)).astype(np.float16)
        for row in range(start + 1, min(start + HARD_LINKS, rows)):
            place = folder / "slides" / f"{row // 10_000:03d}" / f"S{row:07d}.h5"
            place.parent.mkdir(exist_ok=True)
            os.link(source, place)
    texts = {f"S{row:07d}": f"Invasive ductal carcinoma, grade {row % 3}, case {row}." for row in range(rows)}
    artefacts.write_json(folder / "labels.json", texts)


def coca_manifest(path: Path, rows: int) -> None:
    """manifest.parquet of rule coca_list_slides, two slides of a patient."""
    numbers = np.arange(rows)
    frame = pd.DataFrame(
        {
            "slide": [f"S{number:07d}" for number in numbers],
            "path": [f"{number // 10_000:03d}/S{number:07d}.h5" for number in numbers],
            "tiles": 4000, "dim": 2560, "dtype": "float16", "key": "embeddings", "finite_share": 1.0, "norm": 50.0,
            "sha256": [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers],
            "patient": [f"P{number // 2:07d}" for number in numbers],
            "text": [f"Invasive ductal carcinoma, grade {number % 3}, case {number // 3}." for number in numbers],
        }
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pandas(frame, list_slides.MANIFEST), path)


def biomedica_shards(folder: Path, rows: int) -> None:
    """folder/shards: `rows` small pairs in tars."""
    (folder / "shards").mkdir(parents=True)
    files = jpegs(64)
    for shard, own in shares(rows):
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as tar:
            for row in own:
                key = f"{shard}-PMC{row // 4}-F{row % 4}-0"
                for ending, data in (("jpg", next(files)), ("txt", f"Figure {row}: a micrograph.".encode())):
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def biomedica_repo(folder: Path) -> None:
    """folder/remote: what rule biomedica_list_remote says of a repo of 2,400 shards."""
    (folder / "remote").mkdir(parents=True)
    names = [f"commercial/{number:04d}.tar" for number in range(2400)]
    listed = pd.DataFrame({"name": names, "bytes": 2_000_000_000, "sha256": None})
    listed.to_parquet(folder / "remote" / "shards.parquet", index=False)
    summary = {"repo": "example/figures", "revision": "0" * 40, "bytes_per_sample": 1_120_000.0}
    artefacts.write_json(folder / "remote" / "summary.json", summary)


def biomedica_index(folder: Path, rows: int) -> None:
    """What rule biomedica_index_local makes of `rows` pairs; all of them are one image and one text of a file."""
    (folder / "shards").mkdir(parents=True)
    (folder / "index").mkdir()
    data, text = next(jpegs(64)), b"Figure 1: a micrograph."
    shared = folder / "shards" / "s00000.tar"
    shared.write_bytes(data + text)
    facts, held_out, counts = shared.stat(), HeldOutSettings(), []
    with pq.ParquetWriter(folder / "index" / "index.parquet", index_local.INDEX) as writer:
        for shard, own in shares(rows):
            if shard != "s00000":
                os.link(shared, folder / "shards" / f"{shard}.tar")
            keys = [f"{shard}-PMC{row // 4}-F{row % 4}-0" for row in own]
            articles = [article_of(key) for key in keys]
            frame = pd.DataFrame({"shard": f"{shard}.tar", "key": keys, "article": articles})
            frame["side"] = [side_of(article, held_out) for article in articles]
            frame = frame.assign(image_offset=0, image_bytes=len(data), text_offset=len(data), text_bytes=len(text))
            frame = frame.assign(meta_offset=0, meta_bytes=0, width=64, height=64, caption_id=range(len(own)))
            frame = frame.assign(panel_type="Microscopy", panel_subtype="Light")
            writer.write_table(pa.Table.from_pandas(frame, index_local.INDEX))
            train = int((frame["side"] == "train").sum())
            counts.append((f"{shard}.tar", facts.st_size, facts.st_mtime_ns, len(own), train, 0, 0, 1000.0, ""))
    listed = pd.DataFrame(counts, columns=index_local.SHARDS.names)
    pq.write_table(pa.Table.from_pandas(listed, index_local.SHARDS), folder / "index" / "shards.parquet")
    sides = {side: int(sum(one[4] for one in counts)) if side == "train" else rows // 50 for side in SIDES}
    summary = {"bytes_per_sample": 1_120_000.0, "sides": sides, "rejected": 0, "quarantined": 0, "note": ""}
    artefacts.write_json(folder / "index" / "summary.json", summary)
