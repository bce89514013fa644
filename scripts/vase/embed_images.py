"""CLIP embeddings of every readable image of one shard, whatever its class.

Rule `vase_embed_images`; one job per shard. Prompts, thresholds and a retrained classifier re-encode
nothing: they only read what is stored here (Arrow: path, embedding; unit length, float32).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from scripts.common import artefacts, devices, image_batches, step, tables
from scripts.common.errors import KilnError
from scripts.vase import clip
from scripts.vase.settings import ClipSettings


@torch.inference_mode()
def embed(loaded: clip.Clip, paths: Sequence[Path], values: ClipSettings, accelerator) -> np.ndarray:
    """Unit-length embeddings [N,D] float32, in the order of `paths`."""
    model = loaded.model.to(accelerator.device)
    at_least = 2 * loaded.image_size if values.decode == "reduced" else None
    rows = []
    for images, real in image_batches.batches(
        paths, loaded.transform, values.batch_size, values.workers, accelerator.device, at_least, "embed"
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


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ClipSettings)
    step.add_device(made)
    made.add_argument("--images", type=Path, required=True, help="folder of raw images")
    made.add_argument("--shard", type=Path, required=True, help="the shard's table of rule vase_inspect_images")
    made.add_argument("--model", type=Path, required=True, help=f"folder with {clip.CONFIG} and {clip.WEIGHTS}")
    made.add_argument("--output", type=Path, required=True, help="embeddings of this shard (.arrow)")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Embed the shard that `args` name."""
    values = step.read_settings(args)
    accelerator = devices.make_accelerator(args.device, values.precision, step.threads(args))
    loaded = clip.load(args.model)
    inputs = {"shard": args.shard, "model": args.model / clip.WEIGHTS}
    record = step.record(args, "scripts.vase.embed_images", values, inputs)
    frame = tables.read_table(args.shard, ["path", "status"]).query("status == 'ok'")
    embeddings = embed(loaded, [args.images / path for path in frame["path"]], values, accelerator)
    write_embeddings(args.output, frame["path"], embeddings)
    step.log.info("%s: %d images, %d dimensions", args.shard.stem, *embeddings.shape)
    record.write(args.meta, [args.output], items=len(frame))


if __name__ == "__main__":
    step.run(main)
