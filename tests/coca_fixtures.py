"""A small world for pipeline coca: slides of three diagnoses, their texts, and a model that was taught them."""

import json
from pathlib import Path

import h5py
import numpy as np
import torch

from scripts.coca import (
    caption,
    checkpoints,
    encode_slides,
    evaluate,
    list_slides,
    losses,
    slide_model,
    split,
    train_tokenizer,
)  # fmt: skip
from scripts.coca.settings import EncoderSettings, ModelSettings
from scripts.coca.sides import read
from scripts.coca.texts import Texts

TILE_DIM, SLIDES, PER_PATIENT = 8, 90, 2
ENCODER = {"dim": 12, "latents": 4, "depth": 2, "transformer_depth": 1, "heads": 2}
MODEL = {"dim": 24, "unimodal_depth": 1, "multimodal_depth": 1, "dim_latents": 16, "image_queries": 3, "heads": 2}
CLASSES = {"carcinoma": ["carcinoma", "癌"], "lymphoma": ["lymphoma", "淋巴瘤"], "inflammation": ["inflamed", "炎症"]}
SENTENCES = {
    "carcinoma": ("Ductal carcinoma of the breast.", "乳腺浸润性导管癌。"),
    "lymphoma": ("A lymphoma.", "符合淋巴瘤。"),
    "inflammation": ("Inflamed tissue, no tumour.", "慢性炎症，未见肿瘤。"),
}


def common(folder: Path) -> list[str]:
    return ["--meta", str(folder / "meta.json"), "--threads", "1"]


def write_slide(path: Path, number: int, tiles: int, dim: int = TILE_DIM) -> None:
    """Tiles around a mean that the diagnosis decides."""
    rng = np.random.default_rng(number)
    values = rng.normal(size=(tiles, dim)) * 0.5
    values[:, number % 3] += 3
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["features"] = values.astype(np.float16)


def build_world(folder: Path) -> Path:
    """Slides, manifest, splits, tokenizer, checkpoint, latents in `folder`; slide 7 has no class."""
    rng, labels = np.random.default_rng(0), {}
    for number in range(SLIDES):
        name = f"{number:03d}"
        write_slide(folder / "slides" / f"{name}.h5", number, int(rng.integers(3, 30)))
        labels[name] = SENTENCES[[*SENTENCES][number % 3]][number // 3 % 2]
    (folder / "labels.json").write_text(json.dumps(labels, ensure_ascii=False))
    patients = [f"{name},{number // PER_PATIENT:02d}\n" for number, name in enumerate(labels)]
    (folder / "patients.csv").write_text("slide,patient\n" + "".join(patients))
    list_slides.main(
        ["--slides", str(folder / "slides"), "--labels", str(folder / "labels.json"), "--patients",
         str(folder / "patients.csv"), "--output-folder", str(folder / "list"), "--settings",
         json.dumps({"tile_dim": TILE_DIM, "processes": 1}), *common(folder / "list")]
    )  # fmt: skip
    split.main(
        ["--manifest", manifest(folder), "--output-folder", str(folder / "split"), "--settings",
         json.dumps({"test": 0.3, "validation": 0.1}), *common(folder / "split")]
    )  # fmt: skip
    train_tokenizer.main(
        ["--manifest", manifest(folder), "--splits", splits(folder), "--output-folder", str(folder / "tokenizer"),
         "--settings", json.dumps({"vocabulary": 300}), *common(folder)]
    )  # fmt: skip
    teach(folder)
    encode_slides.main(
        ["--manifest", manifest(folder), "--slides", str(folder / "slides"), "--checkpoint",
         str(folder / "model.safetensors"), "--state-folder", str(folder / "state"), "--output-folder",
         str(folder / "latents"), "--settings", json.dumps({"encoder": ENCODER, "encode": {"workers": 0}}), "--device",
         "cpu", *common(folder / "latents")]
    )  # fmt: skip
    return folder


def teach(folder: Path, steps: int = 150) -> None:
    """model.safetensors: a slide encoder and a CoCa after a few steps on the train side."""
    torch.manual_seed(0)
    texts = Texts.load(folder / "tokenizer")
    model = slide_model.build(
        ModelSettings(**MODEL), EncoderSettings(**ENCODER), TILE_DIM, texts.size, texts.pad_id, 0, 2.0
    )  # fmt: skip
    table = read(Path(manifest(folder)), Path(splits(folder)), ["path"])
    table = table[table["side"] == "train"]
    tiles = []
    for path in table["path"]:
        with h5py.File(folder / "slides" / path) as file:
            tiles.append(torch.from_numpy(file["features"][:3]).float())
    rows = [torch.tensor(texts.encode(one, 64)[0]) for one in table["text"]]
    ids, tiles = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.stack(tiles)
    codes = torch.tensor(table["text"].astype("category").cat.codes.to_numpy())
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        out = model(ids, tiles)
        total, count = losses.caption_loss(out.logits, ids, texts.pad_id)
        same = codes[:, None] == codes[None]
        contrast = losses.contrastive_loss(out.text_latents, out.image_latents, model.coca.temperature, same)
        optimiser.zero_grad()
        (total / count + contrast).backward()
        optimiser.step()
    shape = slide_model.encoder_shape(EncoderSettings(**ENCODER))
    facts = checkpoints.Facts(
        TILE_DIM, shape, ModelSettings(**MODEL).model_dump(), texts.size, texts.pad_id,
        checkpoints.identity(folder / "tokenizer"), None, steps, 1,
    )  # fmt: skip
    checkpoints.save(folder / "model.safetensors", model, facts)


def manifest(folder: Path) -> str:
    return str(folder / "list/manifest.parquet")


def splits(folder: Path) -> str:
    return str(folder / "split/splits.csv")


def of_model(folder: Path, **changed: Path) -> list[str]:
    """Options of what steps with a model read."""
    options = {
        "manifest": manifest(folder), "splits": splits(folder), "tokenizer": folder / "tokenizer",
        "latents": folder / "latents", "checkpoint": folder / "model.safetensors", "device": "cpu",
    }  # fmt: skip
    return [text for name, value in (options | changed).items() for text in (f"--{name}", str(value))]


def run_caption(folder: Path, out: Path, settings: dict | None = None, **changed) -> Path:
    """captions.parquet in `out`."""
    output = out / "captions.parquet"
    caption.main(
        [*of_model(folder, **changed), "--output", str(output), "--settings",
         json.dumps({"max_length": 30} | (settings or {})), *common(out)]
    )  # fmt: skip
    return output


def run_evaluate(
    folder: Path, captions: Path, out: Path, settings: dict | None = None, max_seq_len: int = 64, **changed
) -> dict:
    """metrics.json in `out`."""
    values = {"evaluate": {"classes": CLASSES} | (settings or {}), "max_seq_len": max_seq_len}
    evaluate.main(
        [*of_model(folder, **changed), "--captions", str(captions), "--output-folder", str(out), "--settings",
         json.dumps(values), *common(out)]
    )  # fmt: skip
    return json.loads((out / "metrics.json").read_text())
