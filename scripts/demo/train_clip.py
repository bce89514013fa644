"""Train the demo's CLIP from scratch on captioned pictures of vases.

Rule `demo_train_clip`. A small ResNet and a small text transformer, both open_clip's own classes,
with open_clip's own loss; the folder loads as `local-dir:`. Demo only: about a minute, so it does
not resume; a real run takes a published CLIP instead.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from scripts.common import artefacts, progress, step
from scripts.common.errors import KilnError
from scripts.demo.settings import DemoClipSettings

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


def model_config(values: DemoClipSettings) -> dict:
    """open_clip's `model_cfg`; its tokenizer is open_clip's own, which needs no download."""
    return {
        "embed_dim": values.embed_dim,
        "vision_cfg": {
            "image_size": values.image_size,
            "layers": list(values.vision_layers),
            "width": values.vision_width,
            "head_width": values.vision_width * 4,
        },
        "text_cfg": {
            "context_length": values.context_length,
            "vocab_size": 49408,
            "width": values.text_width,
            "heads": values.text_width // 32,
            "layers": values.text_layers,
        },
    }


def folder_config(values: DemoClipSettings) -> dict:
    """The content of `open_clip_config.json`."""
    preprocess = {
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    return {"model_cfg": model_config(values), "preprocess_cfg": preprocess}


def read_captions(folder: Path) -> pd.DataFrame:
    """One row per picture: path, vase, captions (list of text), sorted by path.

    Raises:
        KilnError: the table is missing or lacks a column.
    """
    path = folder / "captions.tsv"
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
        return table.groupby(["path", "vase"], sort=True)["caption"].agg(list).reset_index()
    except (FileNotFoundError, KeyError, pd.errors.ParserError) as error:
        raise KilnError(f"{path}: unreadable: {error}", "give --data the folder that demo_draw_vases made") from None


def split_vases(vases: pd.Series, share: float, seed: int) -> np.ndarray:
    """Which rows are held out: those of a share of all vases, so that none is on both sides."""
    names = np.unique(vases)
    chosen = np.random.default_rng(seed).permutation(names)[: max(round(share * len(names)), 1)]
    return np.isin(vases, chosen)


def crop_and_flip(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each picture [B,3,S,S] mirrored or not, and moved by up to S/32 pixels."""
    reach = batch.shape[-1] // 32
    flips = torch.rand(len(batch), generator=generator) < 0.5
    batch = torch.where(flips[:, None, None, None], batch.flip(-1), batch)
    padded = nn.functional.pad(batch, (reach,) * 4, mode="replicate")
    size = batch.shape[-1]
    places = torch.randint(0, 2 * reach + 1, (len(batch), 2), generator=generator).tolist()
    return torch.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(padded, places, strict=True)])


def train(model, pictures: torch.Tensor, tokens: torch.Tensor, values: DemoClipSettings) -> list[float]:
    """Train in place; the mean loss of each epoch.

    Args:
        pictures: [N,3,S,S], normalised.
        tokens: [N,captions,context]; a picture's caption is drawn anew in every epoch.
    """
    generator = torch.Generator().manual_seed(values.seed)
    steps_per_epoch = len(pictures) // values.batch_size
    total = values.epochs * steps_per_epoch
    warmup = max(round(values.warmup * total), 1)
    # gains, biases and the temperature do not decay, as in CLIP
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": values.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=values.lr,
        betas=(0.9, 0.98),
        eps=1e-6,
    )

    def factor(done: int) -> float:
        if done < warmup:
            return (done + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(total - warmup, 1)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    criterion = open_clip.ClipLoss()
    model.visual.to(memory_format=torch.channels_last)  # a third faster on a CPU
    losses = []
    model.train()
    for _ in progress.bar(range(values.epochs), "train"):
        order = torch.randperm(len(pictures), generator=generator)[: steps_per_epoch * values.batch_size]
        summed = 0.0
        for rows in order.split(values.batch_size):
            wording = torch.randint(tokens.shape[1], (len(rows),), generator=generator)
            batch = crop_and_flip(pictures[rows], generator).to(memory_format=torch.channels_last)
            image, text, scale = model(batch, tokens[rows, wording])
            loss = criterion(image, text, scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            summed += loss.item()
        losses.append(summed / steps_per_epoch)
    if not math.isfinite(losses[-1]):
        raise KilnError("the demo's CLIP diverged: its loss is not finite", "lower demo.clip.lr")
    model.visual.to(memory_format=torch.contiguous_format)
    return losses


@torch.inference_mode()
def retrieval(model, pictures: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
    """Share of pictures whose caption is among the 1, 5, 10 nearest of all captions, with chance and loss."""
    model.eval()
    image, text, scale = model(pictures, tokens)
    logits = scale * image @ text.T
    own = logits.diagonal()[:, None]
    # captions repeat: an equal one ranks neither before nor behind, so half of the ties count
    rank = (logits > own + 1e-4).sum(1) + ((logits - own).abs() <= 1e-4).sum(1).sub(1) / 2
    found = {f"recall_at_{k}": (rank < k).float().mean().item() for k in (1, 5, 10)}
    chance = {f"chance_at_{k}": min(k / len(pictures), 1.0) for k in (1, 5, 10)}
    return {**found, **chance, "loss": open_clip.ClipLoss()(image, text, scale).item(), "pictures": len(pictures)}


def save(folder: Path, model, values: DemoClipSettings, metrics: dict) -> list[Path]:
    """Write weights, configuration and metrics, each atomically; their paths."""
    paths = [folder / CONFIG, folder / WEIGHTS, folder / "metrics.json"]
    artefacts.write_json(paths[0], folder_config(values))
    with artefacts.atomic_path(paths[1]) as temporary:
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, temporary)
    artefacts.write_json(paths[2], metrics)
    return paths


@torch.inference_mode()
def check_loads(folder: Path, model, picture: torch.Tensor) -> None:
    """Load the folder as its users will and compare: open_clip merely warns of weights it did not find."""
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    if not torch.equal(loaded.eval().encode_image(picture), model.eval().encode_image(picture)):
        raise KilnError(f"{folder}: open_clip loads other weights than were saved", "this is a defect: report it")


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, DemoClipSettings)
    made.add_argument("--data", type=Path, required=True, help="folder that demo_draw_vases made")
    made.add_argument("--output-folder", type=Path, required=True, help="folder of the model")
    args = made.parse_args(argv)
    values = step.read_settings(args)
    record = step.record(args, "scripts.demo.train_clip", values, {"listing": args.data / "files.json"})
    torch.set_num_threads(step.threads(args))
    torch.manual_seed(values.seed)

    folder = args.data / "clip"
    table = read_captions(folder)
    held_out = split_vases(table["vase"], values.held_out, values.seed)
    if (~held_out).sum() < values.batch_size:
        raise KilnError(
            f"{folder}: {(~held_out).sum()} pictures to train on, demo.clip.batch_size = {values.batch_size}",
            "raise demo.draw.clip_vases or lower demo.clip.batch_size",
        )
    config = folder_config(values)
    model = open_clip.model.CLIP(**config["model_cfg"])
    transform = open_clip.image_transform(values.image_size, is_train=False, **config["preprocess_cfg"])
    tokenizer = open_clip.SimpleTokenizer(context_length=values.context_length)
    pictures = torch.stack([transform(Image.open(folder / path).convert("RGB")) for path in table["path"]])
    tokens = torch.stack([tokenizer(captions) for captions in table["caption"]])

    test = torch.from_numpy(held_out)
    before = retrieval(model, pictures[test], tokens[test, 0])
    losses = train(model, pictures[~test], tokens[~test], values)
    after = retrieval(model, pictures[test], tokens[test, 0])
    metrics = {"held_out": after, "untrained": before, "train_loss": [round(loss, 4) for loss in losses]}
    outputs = save(args.output_folder, model, values, metrics)
    check_loads(args.output_folder, model, pictures[:1])
    record.write(args.meta, outputs, items=values.epochs * int((~test).sum()))


if __name__ == "__main__":
    step.run(main)
