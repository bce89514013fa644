"""Caption new slides, and compare them with given texts.

Rule `coca_predict` for a folder; by hand, for one file:

    python -m scripts.coca.predict --checkpoint model.safetensors --tokenizer tokenizer \\
        --embeddings-file x.h5 --text "adenocarcinoma" "normal mucosa" --max-length 100

Without --output the predictions are printed. Files of a folder that cannot be used go to a `.quarantine.tsv` beside
the output.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from pydantic import Field

from scripts.coca import checkpoints, embedding, generation, texts
from scripts.coca.perceiver import Perceiver, encode
from scripts.coca.settings import EXTENSIONS, CaptionSettings, EncoderSettings, ListSettings, TrainSettings
from scripts.coca.slides import SlideError, open_slide, read_tiles
from scripts.common import artefacts, devices, progress, shards, step, tables
from scripts.common.errors import KilnError
from scripts.common.settings import Settings, execution


class PredictStepSettings(Settings):
    """Settings of this step."""

    caption: CaptionSettings = CaptionSettings()
    keys: tuple[str, ...] = Field(ListSettings().keys, min_length=1, description="HDF5 data sets to take")
    max_seq_len: int = Field(TrainSettings().max_seq_len, gt=2, description="tokens of a text with its two marks")
    chunk_tiles: int = execution(EncoderSettings().chunk_tiles, gt=0, description="tiles looked at at a time")


class Slide(NamedTuple):
    """A slide's latents [1 + latents, dim] float32, how many tiles it has, and where it is."""

    path: str
    tiles: int
    latents: np.ndarray


def load_encoder(args: argparse.Namespace, facts: checkpoints.Facts, trained: Perceiver | None) -> Perceiver:
    """The slide encoder: `trained`, which the checkpoint holds, or the frozen one of --encoder-weights.

    Raises:
        KilnError: the frozen one is not given, or another one is.
    """
    if trained is not None:
        if args.encoder_weights:
            raise KilnError(
                f"--encoder-weights {args.encoder_weights}: {args.checkpoint} holds the slide encoder that it needs",
                "leave them out",
            )
        return trained
    if args.encoder_weights is None:
        raise KilnError(
            f"{args.checkpoint}: its slide encoder was frozen and is not in it",
            f"give --encoder-weights, the file with sha256 {facts.encoder_sha256}",
        )
    found = artefacts.input_hash(args.encoder_weights)
    if found != facts.encoder_sha256:
        raise KilnError(
            f"{args.encoder_weights}: sha256 {found[:12]}, but {args.checkpoint} was trained on latents of "
            f"{facts.encoder_sha256[:12]}",
            "give the slide encoder of this checkpoint",
        )
    encoder = Perceiver(facts.tile_dim, **facts.encoder)
    encoder.load_weights(args.encoder_weights)
    return encoder.eval()


def read_slide(path: Path, keys: Sequence[str], tile_dim: int) -> torch.Tensor:
    """Tiles [N, tile_dim] as stored.

    Raises:
        SlideError: the file is no usable slide.
    """
    slide = open_slide(path, keys)
    if slide.dim != tile_dim:
        raise SlideError(path, f"dim: {slide.dim} features per tile, expected {tile_dim}")
    tiles = read_tiles(slide)
    finite = sum(int(np.isfinite(tiles[start:stop]).all(axis=1).sum()) for start, stop in slide.slabs())
    if finite < slide.tiles:
        raise SlideError(path, f"not finite: {slide.tiles - finite} of {slide.tiles} tiles hold NaN or infinity")
    return torch.from_numpy(tiles)


class Predictor:
    """A model that captions slides and compares them with texts.

    Args:
        coca: in evaluation mode, on the accelerator's device.
        strings: texts to compare with, distinct; there may be none.
    """

    def __init__(self, coca, tokens: texts.Texts, strings: Sequence[str], values: PredictStepSettings, accelerator):
        self.coca, self.tokens, self.strings, self.values = coca, tokens, strings, values
        self.accelerator, self.scale = accelerator, embedding.scale(coca)
        self.embedded = None
        if strings:
            self.embedded = embedding.embed_texts(coca, tokens, strings, values.max_seq_len, accelerator)

    def __call__(self, slides: Sequence[Slide]) -> Iterator[dict]:
        """A prediction for each slide: slide, path, tiles, caption, scores {text: {cosine, softmax}}."""
        image_tokens = torch.from_numpy(np.stack([one.latents[1:] for one in slides])).to(self.accelerator.device)
        with self.accelerator.autocast():
            captions = generation.captions(
                self.coca, image_tokens, self.tokens, self.values.caption, [Path(one.path).stem for one in slides]
            )
        scores = [{}] * len(slides)
        if self.strings:
            cosines = embedding.embed_images(self.coca, image_tokens, self.accelerator) @ self.embedded.T
            shares = torch.from_numpy(cosines).double().mul(self.scale).softmax(dim=1).tolist()
            scores = [
                {text: {"cosine": a, "softmax": b} for text, a, b in zip(self.strings, *row, strict=True)}
                for row in zip(cosines.tolist(), shares, strict=True)
            ]
        for slide, caption, own in zip(slides, captions, scores, strict=True):
            facts = {"slide": Path(slide.path).stem, "path": slide.path, "tiles": slide.tiles}
            yield {**facts, "caption": caption, "scores": own}


def predict(
    paths: Sequence[str], folder: Path, encoder: Perceiver, predictor: Predictor
) -> tuple[list[dict], list[tuple[str, str]]]:
    """(predictions of the slides `paths` in `folder`, path and reason of those that cannot be used)."""
    values, accelerator = predictor.values, predictor.accelerator
    made, bad, waiting = [], [], []
    for path in progress.bar(paths, "predict"):
        try:
            tiles = read_slide(folder / path, values.keys, encoder.tile_dim)
        except SlideError as error:
            bad.append((path, error.reason))
            continue
        waiting.append(Slide(path, len(tiles), encode(tiles, encoder, values.chunk_tiles, accelerator)))
        if len(waiting) == values.caption.batch_size:
            made += predictor(waiting)
            waiting = []
    if waiting:
        made += predictor(waiting)
    return made, bad


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, PredictStepSettings, by_hand=True)
    step.add_device(made)
    made.add_argument("--checkpoint", type=Path, required=True, help="model.safetensors of rule coca_train")
    made.add_argument("--tokenizer", type=Path, required=True, help="folder of rule coca_train_tokenizer")
    made.add_argument("--encoder-weights", type=Path, help="of the slide encoder, if it was frozen in training")
    source = made.add_mutually_exclusive_group(required=True)
    source.add_argument("--slides", type=Path, help="folder of .h5 files, at any depth")
    source.add_argument("--embeddings-file", type=Path, help="one .h5 file")
    made.add_argument(
        "--text", nargs="+", action="extend", default=[], help="texts to compare with; softmax is over them"
    )
    made.add_argument("--max-length", type=int, help="new tokens of a caption (default: setting caption.max_length)")
    made.add_argument("--output", type=Path, help="predictions.jsonl (default: print them)")
    args = made.parse_args(argv)
    if args.slides and not args.output:
        made.error("--slides needs --output")
    run(args)


def run(args: argparse.Namespace) -> None:
    """Predict what `args` name.

    Raises:
        KilnError: a blank text, an unusable file, or a folder without a usable one.
    """
    if args.max_length is not None:
        args.settings = [*args.settings, f"caption.max_length={args.max_length}"]
    values = step.read_settings(args)
    strings = list(dict.fromkeys(args.text))
    if not all(one.strip() for one in strings):
        raise KilnError("--text is blank", "give a text to compare with, or leave it out")
    accelerator = devices.make_accelerator(args.device, values.caption.precision, step.threads(args))
    inputs = {"checkpoint": args.checkpoint} | texts.identity(args.tokenizer)
    inputs |= {"encoder": args.encoder_weights} if args.encoder_weights else {}
    inputs |= {"slide": args.embeddings_file} if args.embeddings_file else {}
    record = step.record(args, "scripts.coca.predict", values, inputs)
    record.facts["texts"] = strings
    tokens = texts.Texts.load(args.tokenizer)
    model, facts = checkpoints.load(args.checkpoint, args.tokenizer)
    encoder = load_encoder(args, facts, model.encoder).to(accelerator.device)
    predictor = Predictor(model.coca.to(accelerator.device), tokens, strings, values, accelerator)
    for text in strings:
        if tokens.encode(text, values.max_seq_len)[1]:
            step.log.warning("text of more than %d tokens, the rest of it is not seen: %.60s", values.max_seq_len, text)

    folder, paths = args.slides, None
    if args.embeddings_file:
        folder, paths = args.embeddings_file.parent, [args.embeddings_file.name]
    else:
        paths = [item.path for item in shards.scan(folder, EXTENSIONS).items]
    made, bad = predict(paths, folder, encoder, predictor)
    tables.reconcile("coca_predict", len(paths), ok=len(made), quarantined=len(bad))
    if not made:
        raise KilnError(
            f"{folder}: none of {len(paths)} files can be used; {bad[0][0]}: {bad[0][1]}" if bad
            else f"{folder}: no .h5 file there",
            "give tile embeddings of the tile encoder that the checkpoint was trained with",
        )  # fmt: skip
    lines = [json.dumps(one, ensure_ascii=False, allow_nan=False) for one in made]
    if args.output is None:
        print("\n".join(lines))
        return
    outputs = [args.output]
    if args.slides:
        outputs.append(args.output.with_suffix(".quarantine.tsv"))
        artefacts.write_text(outputs[1], pd.DataFrame(bad, columns=["path", "reason"]).to_csv(sep="\t", index=False))
    artefacts.write_text(args.output, "".join(f"{line}\n" for line in lines))
    step.log.info("%d slides captioned, %d quarantined", len(made), len(bad))
    record.write(step.meta_beside(args, args.output), outputs, items=len(made))


if __name__ == "__main__":
    step.run(main)
