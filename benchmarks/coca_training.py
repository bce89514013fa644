"""A training step of rule `coca_train` on stored latents, against CoCa-pytorch with the same weights.

training  the same padded texts on both sides: all of one length, so that nothing is padding. Forward and backward
          pass, AdamW, no clipping; our side is the rule's own step, the other a loop around the package's loss
padding   texts of drawn lengths: the original pads to the greatest length, we to the longest of batches of like lengths
memory    what autograd keeps for the backward pass, and on a GPU the peak of a forward and backward pass

`ceiling` is the ratio if nothing of the original's step remained but its matrix products, by torch.profiler.
Losses and gradients must agree, else the exit status is 1. The package feeds a text without its last token where it is
not told the labels; for the comparison of losses, and for it alone, we do so, too.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks import coca_models as models
from benchmarks import measure
from scripts.coca.losses import loss_terms
from scripts.coca.pairs import Batch

TARGET, PADDING_TARGET, MEMORY_TARGET = 1.15, 2.0, 0.6
TOLERANCE = {"fp32": (1e-4, 1e-3), "bf16": (2e-2, 1e-1), "fp16": (5e-3, 5e-2)}  # of losses and of gradients, relative
PAIRS = 256  # of the epoch from which `padding` takes its batches


def compare_steps(args: argparse.Namespace, root: Path) -> dict:
    """Interleaved steps at each text length; eager, and with --compile compiled on both sides, too."""
    lengths = {str(length): steps_of(args, length) for length in args.text_lengths}
    return {**header(args), "target": TARGET, "lengths": lengths}


def steps_of(args: argparse.Namespace, length: int) -> dict:
    """Of texts of `length` tokens."""
    data, members = models.Drawn(args, np.full(args.batch_size, length)), np.arange(args.batch_size)
    theirs = models.Original(args, models.original(args), data)
    weights = theirs.model.state_dict()
    sides = {"original": theirs, "ours": models.Ours(args, weights, data)}
    differs = check(args, theirs, sides["ours"], data.batch(members))
    if args.compile:
        sides["original compiled"] = models.Original(args, models.original(args), data, compiled=True)
        sides["ours compiled"] = models.Ours(args, weights, data, compiled=True)
    runs = timed(args, {name: (side, [members], None) for name, side in sides.items()})
    found = ratio_of(runs, "original", "ours")
    share = models.products_share(lambda: theirs.step(members))
    row = {
        "relative_difference": differs, **found, "target_met": found["ratio"] >= TARGET,
        "products_share_of_original": share, "ceiling": 1 / share,
        "without_optimiser": ratio_of_passes(runs, "original", "ours"), "seconds": runs,
    }  # fmt: skip
    if args.compile:
        row["original_over"] = {name: ratio_of(runs, "original", name) for name in runs if "compiled" in name}
        row["compiled_over_compiled"] = ratio_of(runs, "original compiled", "ours compiled")
    return row


def compare_padding(args: argparse.Namespace, root: Path) -> dict:
    """Interleaved runs over the same pairs, padded to --max-length or to the longest of a batch of like lengths."""
    lengths = draw_lengths(PAIRS, args)
    data = models.Drawn(args, lengths)
    every = models.epoch(data, args.batch_size)
    padded = np.array([lengths[one].max() for one in every])
    # batches in the middle of equal shares of the epoch, ordered by length: together they stand for it
    order, count = np.argsort(padded, kind="stable"), min(args.steps, len(every))
    chosen = [every[order[int((number + 0.5) * len(every) / count)]] for number in range(count)]
    rng = np.random.default_rng(1)
    shuffled = np.array_split(rng.permutation(np.concatenate(chosen)), count)  # the original knows no buckets
    theirs = models.Original(args, models.original(args), data)
    mine = models.Ours(args, theirs.model.state_dict(), data)
    differs = check_padded(args, theirs, mine, data.batch(chosen[0], args.max_length), data.batch(chosen[0]))
    runs = timed(args, {"original": (theirs, shuffled, args.max_length), "ours": (mine, chosen, None)})
    made = measure.ratio(runs["original"]["all"], runs["ours"]["all"])
    return {
        **header(args), "max_length": args.max_length, "batches_of_a_run": count,
        "tokens": {"mean": float(lengths.mean()), "median": float(np.median(lengths)), "longest": int(lengths.max())},
        "mean_padded_length": {
            "original": args.max_length, "ours": float(padded.mean()),
            "ours_in_this_run": float(np.mean([lengths[one].max() for one in chosen])),
        },
        "relative_difference_of_caption_loss": differs, **made,
        "without_optimiser": ratio_of_passes(runs, "original", "ours"), "target": PADDING_TARGET,
        "target_met": made["ratio"] >= PADDING_TARGET, "seconds": runs,
    }  # fmt: skip


def compare_memory(args: argparse.Namespace, root: Path) -> dict:
    """What is kept for the backward pass, in MiB, the weights left out; it does not depend on the machine's load."""
    lengths = {str(length): memory_of(args, length) for length in args.text_lengths}
    return {**header(args), "target": MEMORY_TARGET, "lengths": lengths}


def memory_of(args: argparse.Namespace, length: int) -> dict:
    """Of a batch of texts of `length` tokens."""
    data, kept, peaks = models.Drawn(args, np.full(args.batch_size, length)), {}, {}
    theirs = models.Original(args, models.original(args), data)
    mine = models.Ours(args, theirs.model.state_dict(), data)
    batch = data.batch(np.arange(args.batch_size)).to(theirs.device)
    for name, loss, model in (
        ("original", lambda: theirs.loss(batch), theirs.model),
        ("ours", lambda: our_loss(mine, batch), mine.model),
    ):
        kept[name] = measure.kept_bytes(loss, model.parameters()) / 2**20
        if args.device != "cpu":
            peaks[name] = peak_mib(loss, model)
    share = kept["ours"] / kept["original"]
    return {
        "kept_mib": kept, "share": share, "target_met": share <= MEMORY_TARGET, "gpu_peak_mib": peaks,
        "gpu_share": peaks["ours"] / peaks["original"] if peaks else None,
    }  # fmt: skip


def header(args: argparse.Namespace) -> dict:
    """Both sides' settings."""
    return {
        "model": models.described(args),
        "alternative": "CoCa-pytorch's model(text, image_tokens=..., return_loss=True), backward, "
        f"torch.optim.AdamW(**{models.ORIGINAL}), zero_grad, loss.item()",
        "ours": "the step of rule coca_train: AdamW of the same settings, fused; no clipping; no weight decay on norms",
        "dtype": args.precision, "batch_size": args.batch_size, "threads": args.threads, "device": args.device,
    }  # fmt: skip


def draw_lengths(count: int, args: argparse.Namespace) -> np.ndarray:
    """Tokens of reports with their marks: log-normal around --median-length, as counts of words in reports are."""
    drawn = np.random.default_rng(0).lognormal(np.log(args.median_length), 0.6, count)
    return np.clip(drawn, 4, args.max_length).astype(np.int64)


def timed(args: argparse.Namespace, sides: dict) -> dict[str, dict[str, list[float]]]:
    """{side: {"all": seconds per run, "optimiser": those of its optimiser}} after a warm-up of each."""
    runs = {name: {"all": [], "optimiser": []} for name in sides}

    def run(name: str, keep: bool = True) -> float:
        side, parts, length = sides[name]
        times = models.time_steps(side, lambda: [side.step(one, length) for one in parts])
        for what, value in times.items() if keep else ():
            runs[name][what].append(value)
        return times["all"]

    for name in sides:
        for _ in range(args.warm):
            run(name, keep=False)
    measure.interleave({name: lambda name=name: run(name) for name in sides}, args.runs)
    return runs


def ratio_of(runs: dict, theirs: str, mine: str) -> dict[str, float]:
    """Of whole steps."""
    return measure.ratio(runs[theirs]["all"], runs[mine]["all"])


def ratio_of_passes(runs: dict, theirs: str, mine: str) -> dict[str, float]:
    """Of forward and backward passes alone."""
    spent = {name: np.subtract(runs[name]["all"], runs[name]["optimiser"]).tolist() for name in (theirs, mine)}
    return measure.ratio(spent[theirs], spent[mine])


def our_loss(mine: models.Ours, batch: Batch) -> torch.Tensor:
    """Caption and contrastive loss of our model."""
    with mine.fit.accelerator.autocast():
        out = mine.model(batch.ids, batch.tiles, batch.mask)
    return sum(terms_of(mine, out, batch.ids).values())


def terms_of(mine: models.Ours, out, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Our losses of what the model gave."""
    return loss_terms(
        logits=out.logits, ids=ids, pad_id=models.PAD, text_latents=out.text_latents,
        image_latents=out.image_latents, log_scale=mine.model.temperature,
    )  # fmt: skip


def check(args: argparse.Namespace, theirs: models.Original, mine: models.Ours, batch: Batch) -> dict[str, float]:
    """Relative differences of the loss and of its gradient by all weights; ends the program if they are too large."""
    batch = batch.to(theirs.device)
    expected = theirs.loss(batch)
    expected.backward()
    with mine.fit.accelerator.autocast():
        out = mine.model(batch.ids[:, :-1], batch.tiles, batch.mask)
    last = torch.zeros_like(out.logits[:, :1])  # predicts nothing
    found = sum(terms_of(mine, out._replace(logits=torch.cat([out.logits, last], dim=1)), batch.ids).values())
    found.backward()
    far = near = 0.0
    own = dict(mine.model.named_parameters())
    for name, parameter in theirs.model.named_parameters():
        far += float((own[name].grad - parameter.grad).double().square().sum())
        near += float(parameter.grad.double().square().sum())
    theirs.model.zero_grad()
    mine.model.zero_grad()
    differs = {"loss": abs(found.item() - expected.item()) / abs(expected.item()), "gradient": (far / near) ** 0.5}
    for (name, value), most in zip(differs.items(), TOLERANCE[args.precision], strict=True):
        if not value <= most:
            sys.exit(f"{name}: ours differs from the original's by {value:.2g} of it, more than {most}")
    return differs


@torch.no_grad()
def check_padded(args: argparse.Namespace, theirs, mine, theirs_batch: Batch, mine_batch: Batch) -> float:
    """Relative difference of caption losses, which no padding changes; ends the program if it is too large."""
    ids = theirs_batch.ids.to(theirs.device)
    with torch.autocast(theirs.device.type, theirs.dtype, enabled=theirs.dtype is not None):
        logits = theirs.model(ids, image_tokens=theirs_batch.tiles.to(theirs.device))
    expected = loss_terms(logits=logits, ids=ids, pad_id=models.PAD)["caption"].item()
    batch = mine_batch.to(theirs.device)
    with mine.fit.accelerator.autocast():
        out = mine.model(batch.ids, batch.tiles, batch.mask)
    differs = abs(terms_of(mine, out, batch.ids)["caption"].item() - expected) / abs(expected)
    if not differs <= TOLERANCE[args.precision][0]:
        sys.exit(f"caption loss: ours differs from the original's by {differs:.2g} of it")
    return differs


def peak_mib(loss, model: torch.nn.Module) -> float:
    """Greatest GPU memory of a forward and backward pass beyond weights and gradients."""
    loss().backward()  # so that the gradients are there
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss().backward()
    made = (torch.cuda.max_memory_allocated() - before) / 2**20
    model.zero_grad()
    return made
