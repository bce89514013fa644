"""CLIP embeddings of every readable image of one shard, whatever its class.

Rule `vase_embed_images`; one job per shard, in which an image whose content was encoded before is not read again
(`--state-folder`). Prompts, thresholds and a retrained classifier re-encode nothing: they only read what is stored
here (Arrow: path, embedding; unit length, float32).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from scripts.common import artefacts, devices, image_batches, reuse, step, tables
from scripts.common.errors import KilnError
from scripts.common.settings import of_kind
from scripts.vase import clip
from scripts.vase.settings import ClipSettings

PACKAGES = ("torch", "torchvision", "open-clip-torch", "pillow", "numpy")  # what decides an embedding


@torch.inference_mode()
def embed(
    loaded: clip.Clip, paths: Sequence[Path], values: ClipSettings, accelerator, hashes: Sequence[str] | None = None
) -> np.ndarray:
    """Unit-length embeddings [N,D] float32, in the order of `paths`."""
    model = loaded.model.to(accelerator.device)
    at_least = 2 * loaded.image_size if values.decode == "reduced" else None
    rows = []
    for images, real in image_batches.batches(
        paths, loaded.transform, values.batch_size, values.workers, accelerator.device, at_least, "embed", hashes
    ):
        with accelerator.autocast():
            features = model.encode_image(images)
        rows.append(torch.nn.functional.normalize(features.float(), dim=1)[:real].cpu().numpy())
    return np.concatenate(rows) if rows else np.zeros((0, model.visual.output_dim), dtype=np.float32)


def write_embeddings(path: Path, names: Sequence[str], embeddings: np.ndarray) -> None:
    """Store names and [N,D] float32 as an Arrow file, atomically."""
    width = embeddings.shape[1]
    values = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), width)
    table = pa.table({"path": pa.array(list(names), pa.string()), "embedding": values})
    with (
        artefacts.atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)


def read_embeddings(path: Path) -> tuple[list[str], np.ndarray]:
    """What `write_embeddings` wrote; the array is memory-mapped.

    Raises:
        KilnError: the file is missing or damaged.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().combine_chunks()
    except (OSError, pa.ArrowException) as error:
        raise KilnError(f"{path}: unreadable embeddings: {error}", "delete it and run again") from None
    width = table.schema.field("embedding").type.list_size
    flat = table["embedding"].chunk(0).flatten().to_numpy() if table.num_rows else np.zeros(0, dtype=np.float32)
    return table["path"].to_pylist(), flat.reshape(-1, width)


def read_rows(path: Path, rows: np.ndarray) -> np.ndarray:
    """The embeddings [rows,D] of those rows of a file of `write_embeddings`."""
    return read_embeddings(path)[1][rows]


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ClipSettings)
    step.add_device(made)
    made.add_argument("--images", type=Path, required=True, help="folder of raw images")
    made.add_argument("--shard", type=Path, required=True, help="the shard's table of rule vase_inspect_images")
    made.add_argument("--model", type=Path, required=True, help=f"folder with {clip.CONFIG} and {clip.WEIGHTS}")
    reuse.add_state_folder(made)
    made.add_argument("--output", type=Path, required=True, help="embeddings of this shard (.arrow)")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Embed the shard that `args` name."""
    values = step.read_settings(args)
    clip.check(args.model)
    shard = args.shard.stem
    inputs = {"shard": args.shard, "model": args.model / clip.WEIGHTS}
    record = step.record(args, "scripts.vase.embed_images", values, inputs)
    listed = tables.read_table(args.shard, ["path", "status", "sha256"]).query("status == 'ok'").reset_index(drop=True)
    keys = [bytes.fromhex(one) for one in listed["sha256"]]
    hashes = {"model": record.inputs["model"]["sha256"], "config": artefacts.input_hash(args.model / clip.CONFIG)}
    place = reuse.folder(args.state_folder, of_kind(values, "numerics"), hashes, record.code, PACKAGES)
    kept = reuse.Kept(place, shard, read_rows)
    missing, parts = listed, []
    for where, part in kept.find(keys):
        parts.append((where, part))
        missing = missing.drop(index=where)
    if len(missing) or not parts:
        accelerator = devices.make_accelerator(args.device, values.precision, step.threads(args))
        paths = [args.images / path for path in missing["path"]]
        found = embed(clip.load(args.model), paths, values, accelerator, missing["sha256"].tolist())
        parts.append((missing.index.to_numpy(), found))
    embeddings = np.zeros((len(listed), parts[0][1].shape[1]), dtype=np.float32)
    for where, part in parts:
        embeddings[where] = part
    write_embeddings(args.output, listed["path"], embeddings)
    step.log.info("%s: %d images, %d dimensions", shard, *embeddings.shape)
    kept.keep(keys, args.output)
    record.facts |= reuse.facts(shard, len(missing), len(listed))
    record.write(args.meta, [args.output], items=len(listed))


if __name__ == "__main__":
    step.run(main)
