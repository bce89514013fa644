"""Training of pipeline coca: batches, the contrastive loss beyond a pass, and that no kill costs more than time."""

import functools
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import torch.multiprocessing
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributed

from scripts.coca import (
    batches,
    checkpoints,
    contrastive,
    encode_slides,
    list_slides,
    losses,
    sides,
    slide_model,
    split,
    train,
    train_tokenizer,
)
from scripts.coca.batches import Budget, Lengths
from scripts.coca.pairs import Collate, Pairs, TileDraws
from scripts.coca.perceiver import Perceiver
from scripts.coca.settings import CocaSettings, EncoderSettings, ModelSettings, TrainSettings
from scripts.coca.texts import Texts
from scripts.coca.training import Fit
from scripts.common import devices
from scripts.common.contrastive import sum_gradients
from scripts.common.errors import KilnError

ROOT = Path(__file__).resolve().parents[1]
NO_LIMIT = Budget(10**9, 10**9)
DIM = 16
TEXTS = {"ductal carcinoma, grade {}": "浸润性导管癌，{}级", "lobular carcinoma, grade {}": "浸润性小叶癌，{}级",
         "fibroadenoma without atypia": "纤维腺瘤，无异型"}  # fmt: skip
SETTINGS = {
    "encoder": {"latents": 4, "dim": 16, "depth": 2, "transformer_depth": 1, "heads": 2},
    "model": {"dim": 24, "unimodal_depth": 1, "multimodal_depth": 1, "dim_latents": 12, "image_queries": 4,
              "dim_head": 8, "heads": 2, "ff_mult": 2},
    "train": {"epochs": 4, "batch_size": 12, "tiles_per_slide": 24, "max_seq_len": 32, "lr": 1e-2, "precision": "fp32",
              "temperature": 2.0, "workers": 0, "tracker": "none", "save_every": 2},
}  # fmt: skip
RESULTS = ("model.safetensors", "last.safetensors", "metrics.json", "epochs/epoch-0002.safetensors",
           "epochs/files.json")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """slides/ of 70 patients, listed, split, and their tokenizer; a few texts are those of several slides."""
    root = tmp_path_factory.mktemp("coca")
    rng = np.random.default_rng(0)
    centres, labels = rng.normal(0, 1, (3, DIM)), {}
    (root / "slides").mkdir()
    for number in range(70):
        kind = number % 3
        tiles = rng.normal(0, 1, (int(rng.integers(5, 60)), DIM)) + centres[kind]
        with h5py.File(root / f"slides/{number:03d}.h5", "w") as file:
            file["features" if number % 2 else "embeddings"] = tiles.astype(np.float16)
        labels[f"{number:03d}"] = list(TEXTS.items())[kind][number // 3 % 2].format(number % 3 + 1)
    (root / "labels.json").write_text(json.dumps(labels, ensure_ascii=False), encoding="utf-8")
    list_slides.main(["--slides", str(root / "slides"), "--labels", str(root / "labels.json"), "--threads", "1",
                      "--output-folder", str(root / "list"), "--meta", str(root / "list/meta.json"),
                      "--settings", f"tile_dim={DIM}"])  # fmt: skip
    split.main(["--manifest", str(root / "list/manifest.parquet"), "--output-folder", str(root / "split"),
                "--meta", str(root / "split/meta.json"), "--settings", "validation=0.2"])  # fmt: skip
    tokenizer(root, root / "tokenizer", 300)
    return root


def tokenizer(root: Path, out: Path, vocabulary: int) -> None:
    train_tokenizer.main([*listed(root), "--output-folder", str(out), "--meta", str(out.with_suffix(".meta.json")),
                          "--settings", f"vocabulary={vocabulary}"])  # fmt: skip


def listed(root: Path) -> list[str]:
    return ["--manifest", str(root / "list/manifest.parquet"), "--splits", str(root / "split/splits.csv")]


def training(root: Path, out: Path, *more: str, **changes) -> list[str]:
    settings = SETTINGS | {"train": SETTINGS["train"] | changes}
    return [
        *listed(root), "--tokenizer", str(root / "tokenizer"), "--slides", str(root / "slides"),
        "--state-folder", str(out.with_name(f"{out.name}.state")),
        "--tracker-folder", str(out.with_name(f"{out.name}.curves")), "--output-folder", str(out), "--device", "cpu",
        "--threads", "1", "--settings", json.dumps(settings), "--meta", str(out / "meta.json"), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(data) -> Path:
    """An undisturbed training."""
    train.main(training(data, data / "trained"))
    return data / "trained"


def side_of(data: Path, side: str) -> pd.DataFrame:
    columns = ("path", "tiles", "dim", "key")
    return sides.only(sides.read(data / "list/manifest.parquet", data / "split/splits.csv", columns), side)


def history(out: Path) -> list[dict]:
    return json.loads((out / "metrics.json").read_text())["history"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@st.composite
def corpora(draw) -> Lengths:
    pairs = draw(st.integers(1, 120))
    sizes = st.lists(st.integers(1, 3000), min_size=pairs, max_size=pairs)
    return Lengths(np.array(draw(sizes)), np.array(draw(sizes)))


@settings(deadline=None)
@given(corpora(), st.integers(1, 40), st.integers(0, 2**63 - 1), st.integers(0, 100))
def test_batches_are_a_function_of_seed_and_epoch_and_hold_each_pair_once(lengths, batch_size, seed, epoch):
    made = batches.epoch_batches(lengths, batch_size, seed, epoch)
    again = batches.epoch_batches(lengths, batch_size, seed, epoch)
    assert [one.tolist() for one in made] == [one.tolist() for one in again]
    pairs = len(lengths.tiles)
    assert sorted(np.concatenate(made).tolist()) == list(range(pairs))
    sizes = [len(one) for one in made]
    assert len(made) == batches.count(pairs, batch_size) and max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(corpora(), st.integers(1, 40), st.integers(1, 4), st.integers(3000, 30_000), st.integers(3000, 30_000))
def test_passes_keep_the_budget_and_processes_share_a_batch(lengths, batch_size, ranks, tiles, tokens):
    for batch in batches.epoch_batches(lengths, batch_size, 0, 0):
        cut = [batches.passes(batches.share(batch, rank, ranks), lengths, Budget(tiles, tokens))
               for rank in range(ranks)]  # fmt: skip
        assert sorted(int(i) for parts in cut for part in parts for i in part) == sorted(batch.tolist())
        for part in (part for parts in cut for part in parts):
            assert len(part) * lengths.tiles[part].max() <= tiles
            assert len(part) * lengths.tokens[part].max() <= tokens


def test_epochs_and_seeds_differ_and_a_resumed_epoch_goes_on():
    rng = np.random.default_rng(0)
    lengths = Lengths(rng.integers(50, 3000, 200), rng.integers(5, 60, 200))
    made = {key: batches.epoch_batches(lengths, 16, *key) for key in ((0, 0), (0, 1), (1, 0))}
    first = {key: [sorted(one.tolist()) for one in every] for key, every in made.items()}
    # other members, not only another order
    assert not any(one in first[0, 1] or one in first[1, 0] for one in first[0, 0])
    whole = [batches.passes(one, lengths, Budget(20_000, 10**6)) for one in made[0, 0]]
    half = list(batches.Passes(whole[5:], 0, twice=True))
    assert list(batches.Passes(whole, 0, twice=True))[-len(half) :] == half


def test_several_passes_are_given_twice_and_a_single_one_once():
    several, one = [np.array([1]), np.array([2, 0])], [np.array([3])]
    assert list(batches.Passes([several, one], 7, twice=True)) == [
        [(7, 1)], [(7, 2), (7, 0)], [(7, 1)], [(7, 2), (7, 0)], [(7, 3)],
    ]  # fmt: skip
    assert len(batches.Passes([several, one], 7, twice=False)) == 3


def test_like_lengths_train_together():
    """Padding of batches by length against that of batches by chance."""
    rng = np.random.default_rng(0)
    lengths = Lengths(np.exp(rng.uniform(np.log(50), np.log(3000), 2000)).astype(int), rng.integers(5, 60, 2000))

    def padded(every) -> float:
        return sum(len(one) * lengths.tiles[one].max() for one in every) / lengths.tiles.sum()

    by_chance = np.array_split(rng.permutation(2000), 250)
    assert padded(batches.epoch_batches(lengths, 8, 0, 0)) < 1.3 < 2 < padded(by_chance)
    same_slides = lengths._replace(tiles=np.full(2000, 512))
    text = sum(len(one) * lengths.tokens[one].max() for one in batches.epoch_batches(same_slides, 8, 0, 0))
    assert text < 1.1 * lengths.tokens.sum()


def test_what_no_batch_can_be_made_of_is_refused():
    lengths, names = Lengths(np.array([10, 50, 20, 30, 5]), np.array([5, 6, 7, 80, 9])), list("abcde")

    def refuse(message: str, batch_size: int = 4, budget: Budget = NO_LIMIT, ranks: int = 1) -> None:
        with pytest.raises(KilnError, match=message):
            batches.check(lengths, batch_size, budget, ranks, names)

    refuse("5 training pairs, fewer than coca.train.batch_size 6", 6)
    refuse("batch_size 4 over 3 processes", ranks=3)
    refuse("leave one of 2 for 4 processes", ranks=4)
    refuse("slide b: 50 tiles, more than coca.train.max_tiles 40", budget=Budget(40, 100))
    refuse("slide d: 80 text tokens, more than coca.train.max_tokens 64", budget=Budget(50, 64))
    batches.check(lengths, 4, Budget(50, 80), 2, names)


class Towers(torch.nn.Module):
    """Two small encoders, a scale, and a loss of each pair alone."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(0)
        self.text, self.image = (torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))
                                 for _ in range(2))  # fmt: skip
        self.scale = torch.nn.Parameter(torch.tensor([1.3]))
        self.to(dtype)

    def encode(self, part):
        return tuple(torch.nn.functional.normalize(tower(x), dim=-1)
                     for tower, x in zip((self.text, self.image), part, strict=True))  # fmt: skip

    def terms(self, part, pairs: int):
        text, image = self.encode(part)
        return text, image, (text.detach().roll(1, 1) * image).pow(3).sum() / pairs + text.pow(3).sum() / pairs


def contrast(text, image, scale, same=None):
    """Straight from the definition."""
    similarity = text @ image.T * scale.exp()
    if same is not None:
        similarity = similarity.masked_fill(same & ~torch.eye(len(same), dtype=torch.bool), -torch.inf)
    own = similarity.diagonal()
    return ((similarity.logsumexp(0) - own).mean() + (similarity.logsumexp(1) - own).mean()) / 2


def pairs_of(dtype: torch.dtype, count: int = 12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, count, 6, generator=generator, dtype=torch.float64).to(dtype)


def one_big_batch(dtype: torch.dtype, data, same=None):
    model = Towers(dtype)
    text, image, own = model.terms(data, data.shape[1])
    loss = contrast(text, image, model.scale, same)
    (loss + own).backward()
    return loss.item(), own.item(), [p.grad for p in model.parameters()]


def in_passes(dtype: torch.dtype, data, cuts: list[int], sides: contrastive.Sides, same=None):
    """As `one_big_batch`, of the rows that `sides` gives this process, cut at `cuts`."""
    model, own = Towers(dtype), data[:, sides.own]
    parts = [part for part in own.tensor_split(sorted(cuts), dim=1) if part.shape[1]]
    stream = iter(parts * (2 if len(parts) > 1 else 1))
    terms = functools.partial(model.terms, pairs=data.shape[1])
    loss = functools.partial(contrast, same=same)
    by_itself, whole = contrastive.backward(stream, len(parts), model.encode, terms, model.scale, loss, sides)
    assert next(stream, None) is None
    if len(sides.counts) > 1:
        sum_gradients(list(model.parameters()))
        distributed.all_reduce(by_itself)
    return whole.item(), by_itself.item(), [p.grad for p in model.parameters()]


def assert_equal(found, wanted, tolerance: float) -> None:
    assert found[:2] == pytest.approx(wanted[:2], abs=tolerance)
    for mine, other in zip(found[2], wanted[2], strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@settings(deadline=None)
@given(st.lists(st.integers(1, 11), max_size=11), st.booleans())
def test_any_passes_equal_one_big_batch(dtype, tolerance, cuts, with_same):
    data = pairs_of(dtype)
    same = contrastive.same(torch.arange(12) // 2) if with_same else None
    found = in_passes(dtype, data, cuts, contrastive.Sides((12,), 0), same)
    assert_equal(found, one_big_batch(dtype, data, same), tolerance)


def of_two(rank: int, port: int, job, *arguments) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        job(rank, *arguments)
    finally:
        distributed.destroy_process_group()


def two_processes(job, *arguments) -> None:
    """Fresh processes: a fork of one whose OpenMP threads have worked may wait for them for ever."""
    torch.multiprocessing.spawn(of_two, (free_port(), job, *arguments), nprocs=2)


def two_equal_one(rank: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        data = pairs_of(dtype)
        for counts, cuts in (((6, 6), ([], [])), ((7, 5), ([3], [])), ((5, 7), ([1, 2], [4]))):
            for same in (None, contrastive.same(torch.arange(12) % 7)):
                found = in_passes(dtype, data, cuts[rank], contrastive.Sides(counts, rank), same)
                assert_equal(found, one_big_batch(dtype, data, same), tolerance)


def test_two_processes_with_different_passes_equal_one():
    two_processes(two_equal_one)


def original(images: torch.Tensor, texts: torch.Tensor):
    from coca_pytorch.coca_pytorch import CoCa

    torch.manual_seed(0)
    model = CoCa(dim=16, num_tokens=11, unimodal_depth=1, multimodal_depth=1, dim_latents=8, image_dim=6,
                 num_img_queries=3, dim_head=8, heads=2, caption_loss_weight=0.0)  # fmt: skip
    loss = model(texts, image_tokens=images, return_loss=True)
    loss.backward()
    return loss, model


def the_original_fails(rank: int) -> None:
    """Labels count the local batch, latents are those of all."""
    generator = torch.Generator().manual_seed(rank)
    with pytest.raises(ValueError, match="batch_size"):
        original(torch.randn(3, 4, 6, generator=generator), torch.randint(1, 11, (3, 7), generator=generator))


def test_the_original_has_labels_of_the_local_batch_alone():
    two_processes(the_original_fails)


def the_originals_gradient_is_a_half(rank: int) -> None:
    """Its gather hands back the own rows of one process's gradient, which `DistributedDataParallel` then averages."""
    from coca_pytorch.coca_pytorch import all_gather

    data, theirs, whole = pairs_of(torch.float64), Towers(torch.float64), Towers(torch.float64)
    contrast(*map(all_gather, theirs.encode(data[:, 6 * rank : 6 * rank + 6])), theirs.scale.detach()).backward()
    contrast(*whole.encode(data), whole.scale.detach()).backward()
    for (name, mine), wanted in zip(theirs.named_parameters(), whole.parameters(), strict=True):
        if name != "scale":
            distributed.all_reduce(mine.grad)
            torch.testing.assert_close(mine.grad / 2, wanted.grad / 2, rtol=1e-9, atol=1e-12)
            assert wanted.grad.abs().max() > 0


def test_the_original_has_half_the_gradient_on_two_processes():
    two_processes(the_originals_gradient_is_a_half)


def test_rows_that_do_not_fit_are_a_defect():
    with pytest.raises(KilnError, match="process 0 has 3 rows of a global batch, expected 2"):
        contrastive.gather(torch.zeros(3, 1), contrastive.Sides((2, 1), 0))


def test_equal_texts():
    assert contrastive.same(torch.tensor([4, 1, 4])).tolist() == [[True, False, True], [False, True, False],
                                                                  [True, False, True]]  # fmt: skip


def open_fit(data: Path, loss=losses.loss_terms, device: str = "cpu", **changes) -> Fit:
    """A training at its start, in this process."""
    values = TrainSettings(**SETTINGS["train"] | changes)
    sides = []
    for side in ("train", "validation"):
        table = side_of(data, side)
        images = TileDraws(data / "slides", table, values.tiles_per_slide, values.seed)
        sides.append(Pairs(images, table, Texts.load(data / "tokenizer"), values.max_seq_len))
    texts = Texts.load(data / "tokenizer")
    model = slide_model.build(
        ModelSettings(**SETTINGS["model"]), EncoderSettings(**SETTINGS["encoder"]), DIM, texts.size, texts.pad_id,
        values.seed, values.temperature,
    )  # fmt: skip
    accelerator = devices.make_accelerator(device, values.precision, 1, values.deterministic)
    return Fit(model, *sides, values, accelerator, 0, loss)


def first_step(fit: Fit) -> dict[str, torch.Tensor]:
    """{name: gradient} of the first optimiser step, which is not clipped."""
    found = {}

    class Stop(Exception):
        pass

    def instead() -> None:
        found.update({name: p.grad.clone() for name, p in fit.model.named_parameters() if p.grad is not None})
        raise Stop

    fit.optimiser.step = instead
    with pytest.raises(Stop):
        fit.run(lambda fit: None, lambda fit: None)
    return found


@pytest.mark.parametrize("budget", [{"max_tiles": 70}, {"max_tokens": 40}, {"max_tiles": 130, "max_tokens": 100}])
def test_passes_of_the_model_equal_one_big_batch(data, budget):
    whole, cut = (open_fit(data, clip_grad=0, **changes) for changes in ({}, budget))
    parts = [cut._passes(cut.train, one) for one in batches.epoch_batches(
        Lengths(cut.train.images.sizes, cut.train.tokens), 12, 42, 0)]  # fmt: skip
    assert min(len(one) for one in parts) > 1
    wanted, found = first_step(whole), first_step(cut)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        assert gradient.abs().max() > 0, name


def step_of_two(rank: int, data: Path, wanted: dict[str, torch.Tensor]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}
    fit = open_fit(data, clip_grad=0, max_tiles=70)
    assert (fit.rank, fit.ranks) == (rank, 2)
    for name, gradient in first_step(fit).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_gradient_of_two_processes_is_that_of_one_big_batch(data):
    """Of the whole model and both losses, each process with several passes of its own."""
    two_processes(step_of_two, data, first_step(open_fit(data, clip_grad=0)))


@pytest.fixture
def anew():
    """accelerate's state, which otherwise keeps the precision of this process's first training."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def test_half_precision_passes_have_whole_gradients(data, anew):
    """Autocast keeps copies of weights: those of the pass without a graph must not serve the next."""
    whole, cut = (first_step(open_fit(data, precision="bf16", clip_grad=0, **changes))
                  for changes in ({}, {"max_tiles": 70}))  # fmt: skip
    assert whole.keys() == cut.keys()
    for name, gradient in whole.items():
        assert torch.nn.functional.cosine_similarity(cut[name].flatten(), gradient.flatten(), dim=0) > 0.98, name


def test_the_loss_of_a_step_is_that_of_its_definition(data):
    """Caption loss by the tokens of the batch, contrast of all its pairs, as a user's own function is asked for it."""
    asked = []

    def loss(**tensors):
        asked.append(tensors)
        return losses.loss_terms(**tensors)

    fit = open_fit(data, loss, caption_weight=2.0, contrastive_weight=0.5)
    first = batches.epoch_batches(Lengths(fit.train.images.sizes, fit.train.tokens), 12, 42, 0)[0]
    first_step(fit)
    (caption, contrast) = asked
    assert caption["tokens"] == sum(len(fit.train.ids[i]) - 1 for i in first) and caption["caption_weight"] == 2.0
    assert len(contrast["text_latents"]) == len(first) and contrast["contrastive_weight"] == 0.5
    texts = fit.train.codes[batches.passes(first, Lengths(fit.train.images.sizes, fit.train.tokens), NO_LIMIT)[0]]
    assert contrast["same"].tolist() == (texts[:, None] == texts[None, :]).tolist()
    again = open_fit(data, lambda **tensors: asked.append(tensors) or losses.loss_terms(**tensors),
                     same_text_negatives=True)  # fmt: skip
    first_step(again)
    assert asked[-1]["same"] is None


PLUGIN = """
from scripts.coca import losses

def loss_terms(**tensors):
    terms = losses.loss_terms(**tensors)
    return terms | {f"more {name}": 0.5 * value for name, value in terms.items()}
"""


def test_a_users_function_takes_the_place_of_the_loss(data, tmp_path):
    """Half of each term once more is as much as weights of 1.5, and each term has its curve."""
    (tmp_path / "plugin.py").write_text(PLUGIN)
    train.main(training(data, tmp_path / "by_user", epochs=1, loss_plugin=str(tmp_path / "plugin.py")))
    train.main(training(data, tmp_path / "by_weights", epochs=1, caption_weight=1.5, contrastive_weight=1.5))
    (row,), (other,) = history(tmp_path / "by_user"), history(tmp_path / "by_weights")
    assert row["more caption"] == pytest.approx(row["caption"] / 2)
    assert row["caption"] + row["more caption"] == pytest.approx(other["caption"], rel=1e-4)
    for name in ("val_caption", "val_contrastive", "contrastive"):
        assert row[name] == pytest.approx(other[name], rel=1e-4), name
    assert "loss plugin" in json.loads((tmp_path / "by_user/meta.json").read_text())["inputs"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "plugin.py: no such file"),
        ("loss_terms = 3", "no function loss_terms"),
        ("import nowhere_at_all", "cannot be imported .ModuleNotFoundError"),
        ("def loss_terms(**tensors): return {}", r"loss_terms\(logits, .*\) gave {}"),
        ("def loss_terms(**tensors): return {'caption': 0.5}", "gave caption: float"),
        ("def loss_terms(logits=None, **tensors): return {'caption': logits}", r"gave caption: \[11, "),
    ],
)
def test_a_users_function_that_is_none_is_refused(data, tmp_path, text, message):
    if text is not None:
        (tmp_path / "plugin.py").write_text(text)
    with pytest.raises(KilnError, match=message):
        train.main(training(data, tmp_path / "out", loss_plugin=str(tmp_path / "plugin.py")))
    assert not (tmp_path / "out").exists()


def test_a_validation_that_is_no_number_stops(data, tmp_path):
    (tmp_path / "plugin.py").write_text(
        "import torch\nfrom scripts.coca import losses\n\ndef loss_terms(**tensors):\n"
        "    factor = 1.0 if torch.is_grad_enabled() else float('nan')\n"
        "    return {name: factor * value for name, value in losses.loss_terms(**tensors).items()}\n"
    )
    with pytest.raises(KilnError, match="the validation loss is nan at step [0-9]+, epoch 0, .*: caption nan"):
        train.main(training(data, tmp_path / "out", loss_plugin=str(tmp_path / "plugin.py")))
    assert not (tmp_path / "out").exists()


def test_the_slide_encoder_has_a_rate_of_its_own(data):
    """Adam's first step moves each weight by about its rate."""
    fit = open_fit(data, encoder_lr=1e-3, lr=1e-2)
    groups = fit.optimiser.param_groups
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, fit.model.parameters()))
    before = {name: p.detach().clone() for name, p in fit.model.named_parameters()}

    def stop(fit: Fit) -> None:
        raise StopIteration

    with pytest.raises(StopIteration):
        fit.run(stop, lambda fit: None)
    assert [group["peak"] for group in groups] == [1e-2, 1e-2, 1e-3, 1e-3]
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in fit.model.named_parameters()}
    rates = {name: groups[0]["lr"] * (0.1 if name.startswith("encoder.") else 1) for name in moved}
    for name in ("encoder.perceiver.layers.0.xattn.xattn.to_kv.weight", "coca.img_attn_pool.to_q.weight"):
        assert moved[name] == pytest.approx(rates[name], rel=0.1), name
    assert all(moved[name] < 1.1 * rates[name] for name in moved)


def test_draws_of_tiles_follow_seed_epoch_and_slide(data):
    table = side_of(data, "train")
    draws = TileDraws(data / "slides", table, 10, 3)
    index = int(np.argmax(table["tiles"]))
    whole = TileDraws(data / "slides", table, None, 3).read(index, 0)
    assert whole.shape == (table["tiles"][index], DIM) and whole.dtype == np.float16
    first = draws.read(index, 0)
    assert len(first) == 10 and (first == draws.read(index, 0)).all()
    assert not np.array_equal(first, draws.read(index, 1))
    rows = [int(np.flatnonzero((whole == tile).all(1))[0]) for tile in first]
    assert rows == sorted(set(rows))
    assert draws.sizes.max() == 10 and draws.sizes.min() == table["tiles"].clip(upper=10).min()


def test_a_slide_that_changed_stops_the_training(data, tmp_path):
    table = side_of(data, "train")
    with h5py.File(tmp_path / table["path"][0], "w") as file:
        file[table["key"][0]] = np.zeros((3, DIM + 1), np.float16)
    pairs = Pairs(TileDraws(tmp_path, table, None, 0), table, Texts.load(data / "tokenizer"), 32)
    error = Collate(0)([pairs[0, 0]])
    assert isinstance(error, KilnError) and "3 tiles of 17; when it was listed" in error.message


def test_it_learns_and_writes_what_it_says(data, trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    first, *_, last = metrics["history"]
    assert len(metrics["history"]) == 4
    assert last["caption"] < 0.8 * first["caption"] and last["val_caption"] < first["val_caption"]
    assert last["contrastive"] < first["contrastive"]
    best = max(metrics["history"], key=lambda row: (row["val_recall"], -row["val_caption"] - row["val_contrastive"]))
    assert metrics["chosen"] == {"epoch": metrics["history"].index(best) + 1, **best}
    assert metrics["sides"]["train"]["cut_texts"] == 0 and metrics["sides"]["train"]["distinct_texts"] <= 10
    assert 0 <= last["val_r1"] <= last["val_r5"] <= 1
    meta = json.loads((trained / "meta.json").read_text())
    assert set(meta["outputs"]) == {
        "model.safetensors", "last.safetensors", "metrics.json", "epoch-0002.safetensors", "epoch-0004.safetensors",
        "files.json",
    }  # fmt: skip
    assert not (data / "trained.state").exists()


def test_best_and_last_are_the_weights_of_their_epochs(data, tmp_path):
    """At so high a rate retrieval gets worse again, so that the best epoch is not the last."""
    out = tmp_path / "out"
    train.main(training(data, out, epochs=6, lr=0.1, final_lr=0.1, clip_grad=0, save_every=1))
    metrics = json.loads((out / "metrics.json").read_text())
    recalls = [row["val_recall"] for row in metrics["history"]]
    best = recalls.index(max(recalls)) + 1
    assert metrics["chosen"]["epoch"] == best < 6
    for name, epoch in (("model", best), ("last", 6)):
        facts, tensors = checkpoints.read(out / f"{name}.safetensors")
        kept = checkpoints.read(out / f"epochs/epoch-{epoch:04d}.safetensors")
        assert facts == kept[0] and facts.epoch == epoch
        assert all(torch.equal(tensors[key], value) for key, value in kept[1].items())


@torch.no_grad()
def test_validation_is_that_of_the_model_pair_by_pair(data, trained):
    """Without padding, passes or masks; equal texts are right, and no candidate that is as near comes before."""
    model, _ = checkpoints.load(trained / "last.safetensors", data / "tokenizer")
    table, texts = side_of(data, "validation"), Texts.load(data / "tokenizer")
    draws = TileDraws(data / "slides", table, 24, 42)
    latents, loss, tokens = [], 0.0, 0
    for index, text in enumerate(table["text"]):
        ids = torch.tensor([texts.encode(text, 32)[0]])
        out = model(ids, torch.from_numpy(draws.read(index, 0))[None])
        latents.append(torch.cat([out.text_latents, out.image_latents]))
        loss -= float(out.logits[0, :-1].log_softmax(dim=1)[range(ids.shape[1] - 1), ids[0, 1:]].sum())
        tokens += ids.shape[1] - 1
    text, image = torch.stack(latents).unbind(dim=1)
    row = history(trained)[-1]
    assert row["val_caption"] == pytest.approx(loss / tokens, rel=1e-4)
    equal = table["text"].to_numpy()[:, None] == table["text"].to_numpy()
    found = []
    for k in (1, 5, 10):
        both = []
        for similarity in (text @ image.T, image @ text.T):
            best = similarity.masked_fill(~torch.from_numpy(equal), -2).amax(dim=1, keepdim=True)
            wrong = ((similarity >= best) & ~torch.from_numpy(equal)).sum(dim=1)
            both.append((wrong < k).double().mean().item())
        found.append(sum(both) / 2)
        assert row[f"val_r{k}"] == pytest.approx(found[-1], abs=1e-9)
    assert row["val_recall"] == pytest.approx(sum(found) / 3)


def test_matrices_decay_and_nothing_else(data):
    fit = open_fit(data, weight_decay=0.3)
    rates = {id(p): group["weight_decay"] for group in fit.optimiser.param_groups for p in group["params"]}
    names = {name: rates[id(p)] for name, p in fit.model.named_parameters()}
    assert len(rates) == len(names)
    still = ("norm", "gamma", "bias", "temperature", "token_emb", "queries", "cls_token", "latents")
    for name, rate in names.items():
        is_matrix = name.endswith("to_latents.weight") or not any(one in name for one in still)
        assert rate == (0.3 if is_matrix else 0.0), name


def test_the_rate_warms_up_and_follows_a_cosine(data, tmp_path):
    out = tmp_path / "out"
    train.main(training(data, out, warmup=0.5, final_lr=1e-3, tracker="tensorboard"))
    steps = json.loads((out / "metrics.json").read_text())["steps"]
    rates = [row["lr"] for row in history(out)]
    for epoch, rate in enumerate(rates, start=1):
        done, half = epoch * steps // 4, steps // 2
        cosine = 0.5 * (1 + math.cos(math.pi * (done - 1 - half) / (steps - 1 - half)))
        assert rate == pytest.approx(1e-2 * done / half if done <= half else 1e-3 + 9e-3 * cosine)
    curves = EventAccumulator(str(tmp_path / "out.curves")).Reload()
    assert {"lr", "caption", "contrastive", "scale", "val_caption", "val_recall"} <= set(curves.Tags()["scalars"])
    assert [one.value for one in curves.Scalars("lr")] == pytest.approx(rates)
    assert [one.step for one in curves.Scalars("val_recall")] == [steps * n // 4 for n in range(1, 5)]


def test_gradients_are_clipped(data):
    free, clipped = (first_step(open_fit(data, clip_grad=most)) for most in (0, 0.05))
    length = torch.stack([one.norm() for one in free.values()]).norm()
    assert length > 0.1
    for name, gradient in free.items():
        torch.testing.assert_close(clipped[name], gradient * 0.05 / length, rtol=1e-3, atol=1e-9, msg=name)


def test_published_values_are_the_defaults():
    values = CocaSettings()
    train = values.train
    assert (train.max_seq_len, train.batch_size, train.epochs, train.lr, train.weight_decay) == (512, 4, 10, 1e-4, 0.01)
    assert (train.caption_weight, train.contrastive_weight, train.save_every, train.temperature) == (1, 1, 5, 1)
    assert (values.split.validation, values.list.tile_dim, values.encoder.dim) == (0.1, 2560, 1280)
    model = values.model
    assert (model.dim, model.unimodal_depth, model.multimodal_depth, model.dim_latents) == (1024, 6, 6, 5120)
    assert (model.image_queries, model.dim_head, model.heads, model.ff_mult) == (256, 64, 8, 4)
    perceiver = values.encoder
    assert (perceiver.latents, perceiver.depth, perceiver.transformer_depth, perceiver.heads) == (512, 8, 6, 8)
    assert (perceiver.mlp_ratio, perceiver.weights, perceiver.is_frozen) == (1, None, False)
    assert values.list.keys == ("embeddings", "features", "feats") and values.caption.max_length == 100


def test_texts_that_are_cut_are_counted(data, tmp_path):
    train.main(training(data, tmp_path / "out", max_seq_len=6, epochs=1, save_every=0))
    sides = json.loads((tmp_path / "out/metrics.json").read_text())["sides"]
    assert sides["train"]["cut_texts"] > 0 and sides["validation"]["cut_texts"] > 0
    assert json.loads((tmp_path / "out/epochs/files.json").read_text()) == {}


def test_passes_change_the_curve_by_rounding_alone(data, trained, tmp_path):
    train.main(training(data, tmp_path / "out", max_tiles=100))
    for mine, other in zip(history(tmp_path / "out"), history(trained), strict=True):
        for name in ("caption", "contrastive", "val_caption"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1000}, "training pairs, fewer than coca.train.batch_size 1000"),
        ({"max_tiles": 20}, "24 tiles, more than coca.train.max_tiles 20"),
        ({"max_tokens": 8}, "text tokens, more than coca.train.max_tokens 8"),
        ({"lr": 1e18, "clip_grad": 0}, "at step [0-9]+, epoch [0-9]+, batch [0-9]+"),
    ],
)
def test_bad_input_stops_and_leaves_nothing(data, tmp_path, changes, message):
    with pytest.raises(KilnError, match=message):
        train.main(training(data, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_an_encoder_and_what_it_reads_must_fit(data, tmp_path):
    with pytest.raises(KilnError, match="a frozen slide encoder with random weights tells nothing of a slide"):
        train.main(training(data, tmp_path / "out", "--settings", "encoder.frozen=true"))
    frozen = json.dumps({"encoder": {"weights": "some.safetensors"}})
    with pytest.raises(KilnError, match="the slide encoder is frozen, and --slides gives tiles"):
        train.main(training(data, tmp_path / "out", "--settings", frozen))
    arguments = training(data, tmp_path / "out")
    arguments[arguments.index("--slides")] = "--latents"
    with pytest.raises(KilnError, match="the slide encoder is trained, and --latents gives"):
        train.main(arguments)


def test_another_tokenizers_checkpoint_is_refused(data, trained, tmp_path):
    tokenizer(data, tmp_path / "tokenizer", 290)
    arguments = training(data, tmp_path / "out", "--init-from", str(trained / "model.safetensors"))
    arguments[arguments.index("--tokenizer") + 1] = str(tmp_path / "tokenizer")
    with pytest.raises(KilnError, match="tokenizer"):
        train.main(arguments)
    assert not (tmp_path / "out").exists()


def test_it_starts_from_an_earlier_checkpoint(data, trained, tmp_path):
    train.main(training(data, tmp_path / "out", "--init-from", str(trained / "last.safetensors"), epochs=1, lr=1e-4))
    assert history(tmp_path / "out")[0]["caption"] < history(trained)[-2]["caption"]


def encoded(data: Path, folder: Path, seed: int) -> Path:
    """Latents by a slide encoder of random weights, which stand for given ones."""
    torch.manual_seed(seed)
    encoder = EncoderSettings(**SETTINGS["encoder"])
    folder.mkdir()
    save_file(Perceiver(DIM, **slide_model.encoder_shape(encoder)).state_dict(), folder / "encoder.safetensors")
    settings = {"encoder": SETTINGS["encoder"], "encode": {"workers": 0}}
    encode_slides.main(["--manifest", str(data / "list/manifest.parquet"), "--slides", str(data / "slides"),
                        "--encoder-weights", str(folder / "encoder.safetensors"), "--state-folder",
                        str(folder / "state"), "--output-folder", str(folder / "latents"), "--device", "cpu",
                        "--threads", "1", "--settings", json.dumps(settings), "--meta",
                        str(folder / "latents/meta.json")])  # fmt: skip
    return folder / "latents"


def test_on_the_latents_of_a_frozen_encoder(data, tmp_path):
    first, second = (encoded(data, tmp_path / str(seed), seed) for seed in range(2))
    frozen = {"encoder": {"weights": str(tmp_path / "0/encoder.safetensors")}}

    def of(latents: Path, out: Path, *more: str, **changes) -> list[str]:
        arguments = training(data, out, "--settings", json.dumps(frozen), *more, **changes)
        place = arguments.index("--slides")
        return [*arguments[:place], "--latents", str(latents), *arguments[place + 2 :]]

    train.main(of(first, tmp_path / "out"))
    begin, *_, end = history(tmp_path / "out")
    assert end["caption"] < 0.8 * begin["caption"]
    facts, tensors = checkpoints.read(tmp_path / "out/model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"coca"} and facts.tile_dim == DIM
    assert facts.encoder_sha256 == json.loads((first / "summary.json").read_text())["encoder_sha256"]
    start = ("--init-from", str(tmp_path / "out/last.safetensors"))
    train.main(of(first, tmp_path / "on", *start, epochs=1, lr=1e-4))
    assert history(tmp_path / "on")[0]["caption"] < begin["caption"]
    with pytest.raises(KilnError, match="trained on latents of slide encoder"):
        train.main(of(second, tmp_path / "other", *start))
    with pytest.raises(KilnError, match="latents of width 16, expected 32"):
        train.main(of(first, tmp_path / "other", "--settings", '{"encoder": {"dim": 32}}'))
    assert not (tmp_path / "other").exists()


KILLED = """
import os, signal, sys
from scripts.coca import train
from scripts.common import training_state

at, inside = int(sys.argv[1]), sys.argv[2] == "inside"
save, write = training_state.TrainingState.save, training_state._save_synced
now = []

def killed_before(self, step, payload):
    if step == at and not inside:
        os.kill(os.getpid(), signal.SIGKILL)
    now[:] = [step]
    save(self, step, payload)

def killed_inside(value, path):
    write(value, path)
    if now == [at] and inside:
        os.kill(os.getpid(), signal.SIGKILL)

training_state.TrainingState.save, training_state._save_synced = killed_before, killed_inside
train.main(sys.argv[3:])
"""


@pytest.mark.slow(minutes=2)
def test_killed_at_any_step_and_in_a_save_it_ends_with_the_same_bytes(data, trained, tmp_path):
    """SIGKILL after a step, and when the first file of a save is written, at four seeded steps; every step saves."""
    out, state = tmp_path / "out", tmp_path / "out.state"
    options = [*training(data, out), "--settings", '{"train": {"save_minutes": 0}}']
    steps = json.loads((trained / "metrics.json").read_text())["steps"]
    for number, at in enumerate(sorted(random.Random(0).sample(range(2, steps), 4))):
        where = ("between", "inside")[number % 2]
        done = subprocess.run([sys.executable, "-c", KILLED, str(at), where, *options], cwd=ROOT, capture_output=True,
                              text=True, timeout=600)  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        assert bool(list(state.glob("*/*.partial"))) == (where == "inside") and not (out / "meta.json").exists()
    done = subprocess.run([sys.executable, "-m", "scripts.coca.train", *options], cwd=ROOT, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0 and f"resumed from {state}" in done.stderr, done.stderr[-3000:]
    for name in RESULTS:
        assert (out / name).read_bytes() == (trained / name).read_bytes(), name
    assert not state.exists()


@pytest.mark.slow(minutes=2)
def test_compiled_training_equals_plain(data):
    """An epoch of batches of several lengths, and its validation."""
    plain, compiled = (open_fit(data, epochs=1, compile=choice) for choice in (False, True))
    for one in (plain, compiled):
        one.run(lambda _: None, lambda _: None)
    for name in ("caption", "contrastive", "val_caption", "val_contrastive"):
        assert compiled.at.history[0][name] == pytest.approx(plain.at.history[0][name], rel=1e-3), name


@pytest.mark.slow(minutes=2)
def test_the_benchmarks_run_and_both_sides_agree(tmp_path):
    command = [sys.executable, "-m", "benchmarks.coca", "--smallest", "--output", str(tmp_path / "all.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "all.json").read_text())
    rows = [*found["training"]["lengths"].values(), *(found[part] for part in ("padding", "captions", "reading"))]
    for one in rows:
        assert 0 < one["ratio_min"] <= one["ratio"] <= one["ratio_max"]
    for one in found["training"]["lengths"].values():
        assert one["relative_difference"]["loss"] < 1e-5 and one["relative_difference"]["gradient"] < 1e-4
    for one in found["memory"]["lengths"].values():
        assert 0 < one["kept_mib"]["ours"] < one["kept_mib"]["original"]
    assert found["padding"]["mean_padded_length"]["ours"] < found["padding"]["max_length"]
    assert found["encoding"]["largest_difference"] < 1e-4 and found["encoding"]["target_met"]
    assert found["captions"]["equal_tokens"] == 1


@pytest.mark.slow
def test_two_processes_follow_the_curve_of_one(data, trained, tmp_path):
    """Two gloo processes, whose passes differ in number."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "scripts.common.launch", "--processes", "2", "--", "scripts.coca.train"]
    done = subprocess.run([*command, *training(data, out, max_tiles=100)], cwd=ROOT, capture_output=True, text=True,
                          timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for mine, other in zip(history(out), history(trained), strict=True):
        for name in ("caption", "contrastive", "val_caption", "val_contrastive"):
            assert mine[name] == pytest.approx(other[name], rel=2e-3), name


@pytest.mark.slow
def test_processes_that_cannot_share_a_batch_are_refused(data, tmp_path):
    command = [sys.executable, "-m", "scripts.common.launch", "--processes", "2", "--", "scripts.coca.train"]
    done = subprocess.run([*command, *training(data, tmp_path / "out", batch_size=13)], cwd=ROOT, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode and "coca.train.batch_size 13 over 2 processes" in done.stderr
    assert not (tmp_path / "out").exists()


def test_splits_of_another_manifest_are_refused(data, tmp_path):
    manifest, splits = data / "list/manifest.parquet", pd.read_csv(data / "split/splits.csv", dtype=str)
    for name, frame in (
        ("more", pd.concat([splits, splits[:1].assign(slide="elsewhere")])),
        ("fewer", splits[splits["slide"] != "000"]),
        ("train", splits.assign(side="train")),
    ):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    with pytest.raises(KilnError, match="manifest.parquet: no slide elsewhere"):
        sides.read(manifest, tmp_path / "more.csv")
    with pytest.raises(KilnError, match="fewer.csv: no slide 000"):
        sides.read(manifest, tmp_path / "fewer.csv")
    with pytest.raises(KilnError, match="no slide on the validation side"):
        sides.only(sides.read(manifest, tmp_path / "train.csv"), "validation")
