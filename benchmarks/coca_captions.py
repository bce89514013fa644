"""Greedy captions per second, with cached keys and values and without.

alternative  CoCa-pytorch, which has no generation of its own: its model on the whole text so far for each next token
without      our model, likewise
ours         rule `coca_caption`: one token at a time, keys and values of the text and the image cached

All make --caption-length tokens; the end mark is none of them. Tokens must be the same, else the exit status is 1; in
half precision nine in ten must be, since a near tie may change all that follows it.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks import coca_models as models
from benchmarks import measure
from scripts.coca.generation import greedy_ids
from scripts.common import devices


def compare(args: argparse.Namespace, root: Path) -> dict:
    """Interleaved runs of all three; ends the program if their tokens differ."""
    encoder = models.shapes(args)[1]
    accelerator = devices.make_accelerator(args.device, args.precision, args.threads)
    theirs = models.original(args).eval()
    mine = models.ours(args, theirs.state_dict()).eval()
    generator, shape = torch.Generator().manual_seed(0), (args.caption_batch, encoder.latents, encoder.dim)
    images = torch.randn(*shape, generator=generator).to(accelerator.device)
    texts = SimpleNamespace(pad_id=models.PAD, bos_id=models.BOS, eos_id=-1)  # no token ends a caption
    begin = torch.full((len(images), 1), models.BOS, device=images.device)
    ways = {
        "alternative": lambda: uncached(lambda ids: theirs(ids, image_tokens=images), begin, args.caption_length),
        "without the cache": lambda: uncached(whole(mine, images), begin, args.caption_length),
        "ours": lambda: greedy_ids(mine, images, None, texts, args.caption_length),
    }

    def made_by(name: str) -> list[list[int]]:
        with accelerator.autocast():
            return ways[name]()

    first = {name: made_by(name) for name in ways}  # a warm-up, too
    pairs = [
        (one, other)
        for row, others in zip(first["ours"], first["alternative"], strict=True)
        for one, other in zip(row, others, strict=True)
    ]
    equal = sum(one == other for one, other in pairs) / len(pairs)
    if equal < (1 if args.precision == "fp32" else 0.9) or len(pairs) != len(images) * args.caption_length:
        sys.exit(f"{equal:.1%} of our tokens are those of the original, of {len(pairs)}")
    seconds = measure.interleave(
        {
            name: lambda name=name: measure.seconds_of(lambda: made_by(name), accelerator.device) for name in ways
        }, args.runs,
    )  # fmt: skip
    return {
        "model": models.described(args), "alternative": "CoCa-pytorch on the whole text for each token, argmax",
        "without the cache": "our model likewise; keys and values of the image are made once",
        "ours": "rule coca_caption: cached keys and values", "tokens": args.caption_length,
        "batch_size": args.caption_batch, "dtype": args.precision, "threads": args.threads, "device": args.device,
        "equal_tokens": equal,
        "captions_per_second": {name: len(images) / statistics.median(values) for name, values in seconds.items()},
        **measure.ratio(seconds["alternative"], seconds["ours"]),
        "over_our_model_without_the_cache": measure.ratio(seconds["without the cache"], seconds["ours"]),
        "seconds": seconds,
    }  # fmt: skip


def whole(model, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Our model's logits of a whole text; the image is looked at once."""
    with torch.inference_mode():
        pooled = model.embed_image(images)[1]
    return lambda ids: model.logits(model.embed_text(ids)[1], pooled)


@torch.inference_mode()
def uncached(logits: Callable[[Tensor], Tensor], ids: Tensor, length: int) -> list[list[int]]:
    """Greedy tokens after ids [B,L], by logits [B,L,V] of the whole text so far."""
    begun = ids.shape[1]
    for _ in range(length):
        scores = logits(ids)[:, -1].float()
        scores[:, [models.PAD, models.BOS]] = -torch.inf
        ids = torch.cat([ids, scores.argmax(dim=1, keepdim=True)], dim=1)
    return ids[:, begun:].tolist()
