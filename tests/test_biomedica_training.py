"""Training of pipeline biomedica: one update for any passes and processes, and that no kill costs more than time."""

import io
import math
import os
import socket
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing
from accelerate.state import AcceleratorState
from open_clip import ClipLoss
from torch import distributed

from scripts.biomedica import model, transforms
from scripts.biomedica.hybrid import Batch
from scripts.biomedica.planning import Plan
from scripts.biomedica.reports import Report
from scripts.biomedica.settings import BiomedicaSettings, ModelSettings, TrainSettings
from scripts.biomedica.training import Fit, Validation
from scripts.common import devices, settings
from scripts.common.data_order import epoch_order
from scripts.common.errors import KilnError
from scripts.config import ROOT, load

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
NUMERICS = {"lr": 3e-3, "warmup_steps": 2, "precision": "fp32", "tracker": "none", "workers": 0, "seed": 7}
COLOURS = {
    "red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "grey": (128, 128, 128),
    "black": (10, 10, 10), "white": (240, 240, 240), "yellow": (230, 220, 40), "pink": (240, 120, 200),
}  # fmt: skip
KINDS = ("plain chart", "chart with a dark half", "chart with a light half")
LANES = 4


def plan_of(**changes) -> Plan:
    """Four batches of 12 pairs an epoch, three quarters of them streamed."""
    values = {
        "arm": "hybrid", "samples": 48, "epochs": 3, "batch_size": 12, "steps_per_epoch": 4, "steps": 12,
        "local_per_epoch": 12, "streamed_per_epoch": 36, "dropped": 0, "shortfall": 0, "lanes": LANES,
        "shuffle_buffer": 4, "bytes_per_sample": 1000.0, "network_bytes_per_epoch": 36_000,
        "disk_saved_bytes": 36_000, "local_share": 25.0, "streamed_share": 75.0, "seed": 1,
        "shards": {}, "schedule": [], "reserve": [],
    }  # fmt: skip
    return Plan(**values | changes)


def pairs_of(count: int, clip: model.Clip, seed: int = 0) -> SimpleNamespace:
    """Coloured charts and captions that tell colour and kind; a few have equal captions."""
    rng, images, captions = np.random.default_rng(seed), [], []
    for number in range(count):
        colour, kind = list(COLOURS)[number % 8], number // 8 % 3
        picture = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 12, (16, 16, 3)), 0, 255)
        picture[:8] = picture[:8] * (1, 0.3, 0.3)[kind] + (0, 0, 170)[kind]
        images.append(torch.from_numpy(picture.astype(np.uint8)).permute(2, 0, 1))
        captions.append(f"a {colour} {KINDS[kind]}")
    ids = {caption: number for number, caption in enumerate(sorted(set(captions)))}
    found = torch.tensor([ids[one] for one in captions])
    return SimpleNamespace(images=torch.stack(images), tokens=clip.tokenizer(captions), ids=found, captions=captions)


class Reader:
    """This process's share of batches: every so many of the global batch's rows; streamed ones first."""

    def __init__(self, pairs, plan: Plan, rank: int, ranks: int, epoch: int, start: int, end: int | None):
        self.pairs, self.plan, self.rank, self.ranks = pairs, plan, rank, ranks
        self.epoch, self.start, self.end = epoch, start, plan.steps_per_epoch if end is None else end

    def __iter__(self):
        size = self.plan.batch_size
        order = epoch_order(len(self.pairs.images), 5, self.epoch)
        for number in range(self.start, self.end):
            places = torch.arange(number * size, (number + 1) * size)[self.rank :: self.ranks]
            rows = torch.from_numpy(order)[places % len(order)]
            streamed = places % size < size * self.plan.streamed_per_epoch // self.plan.samples
            lanes = {lane: {"after": number + 1} for lane in range(self.rank, self.plan.lanes, self.ranks)}
            report = Report(lanes=lanes, transfer=Counter(bytes=100, retries=1))
            if number == 1:
                counts = {"samples": 9, "train": 8, "held_out": 1, "rejected": 2, "quarantined": 0}
                report.finished[f"e{self.epoch}r{self.rank}.tar"] = counts
                report.rejected.append((f"e{self.epoch}.tar", f"k{self.rank}", "rejected", "empty caption"))
            yield Batch(
                self.pairs.images[rows], self.pairs.tokens[rows], self.pairs.ids[rows], places, streamed,
                [str(int(row)) for row in rows], report,
            )  # fmt: skip
        if self.end < self.plan.steps_per_epoch:
            yield Batch(*[torch.empty(0)] * 5, [], Report(transfer=Counter(bytes=7)))


def open_fit(plan: Plan | None = None, device: str = "cpu", ends: dict[int, int] | None = None, asked=None,
             config: dict = CONFIG, **changes) -> Fit:  # fmt: skip
    """A training at its start, in this process; `ends` cuts epochs short, `asked` gets the loader's arguments."""
    plan = plan or plan_of()
    values = TrainSettings(**NUMERICS | changes)
    clip = model.build(ModelSettings(config=config), values.seed)
    accelerator = devices.make_accelerator(device, values.precision, 1, values.deterministic)
    pairs, held = pairs_of(48, clip), pairs_of(24, clip, seed=1)

    def loader(epoch, start, lanes, counts, versions):
        if asked is not None:
            asked.append((epoch, start, dict(lanes), dict(counts)))
        end = (ends or {}).get(epoch)
        return Reader(pairs, plan, accelerator.process_index, accelerator.num_processes, epoch, start, end)

    validation = Validation(held.images, held.tokens, held.ids.numpy())
    return Fit(clip, plan, loader, validation, values, accelerator)


def nothing(fit: Fit) -> None:
    pass


def run(fit: Fit) -> Fit:
    fit.run(nothing, nothing)
    return fit


class Stop(Exception):
    pass


def first_step(fit: Fit) -> dict[str, torch.Tensor]:
    """{name: gradient} of the first optimiser step, which is not clipped."""
    found = {}

    def instead() -> None:
        found.update({name: p.grad.clone() for name, p in fit.model.named_parameters() if p.grad is not None})
        raise Stop

    fit.optimiser.step = instead
    with pytest.raises(Stop):
        fit.run(nothing, nothing)
    return found


def weights(fit: Fit) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in fit.model.state_dict().items()}


@pytest.fixture(scope="module")
def whole() -> SimpleNamespace:
    """An undisturbed training, and the first gradient of one that does not clip."""
    fit = run(open_fit())
    return SimpleNamespace(at=fit.at, weights=weights(fit), gradient=first_step(open_fit(clip_grad=0)))


def by_definition() -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of the first batch, straight from the model and the text book."""
    fit = open_fit()
    batch = next(iter(fit.loader(0, 0, {}, {}, {})))
    images = (batch.images / 255 - torch.tensor(fit.preprocess["mean"]).view(3, 1, 1)) / torch.tensor(
        fit.preprocess["std"]
    ).view(3, 1, 1)
    image, text, scale = fit.model.train()(images, batch.tokens)
    similarity = scale * image @ text.T
    own = similarity.diagonal()
    loss = ((similarity.logsumexp(0) - own).mean() + (similarity.logsumexp(1) - own).mean()) / 2
    loss.backward()
    return loss.item(), {name: p.grad for name, p in fit.model.named_parameters() if p.grad is not None}


def assert_gradients(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
        assert gradient.abs().max() > 0, name


def test_the_gradient_is_that_of_the_definition(whole):
    loss, wanted = by_definition()
    assert_gradients(whole.gradient, wanted)
    told = []

    def stop(fit: Fit) -> None:
        told.append(fit.now["loss"])
        raise Stop

    with pytest.raises(Stop):
        open_fit().run(stop, nothing)
    assert told[0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("size", [1, 5, 6, 11, 100])
def test_passes_equal_one_big_batch(whole, size):
    assert_gradients(first_step(open_fit(clip_grad=0, micro_batch=size)), whole.gradient)


def test_gradient_checkpointing_changes_no_gradient(whole):
    assert_gradients(first_step(open_fit(clip_grad=0, gradient_checkpointing=True)), whole.gradient)


def test_half_precision_passes_have_whole_gradients():
    """Autocast keeps copies of weights: those of the pass without a graph must not serve the next."""
    one, cut = (first_step(open_fit(precision="bf16", clip_grad=0, **more)) for more in ({}, {"micro_batch": 4}))
    for name, gradient in one.items():
        assert torch.nn.functional.cosine_similarity(cut[name].flatten(), gradient.flatten(), dim=0) > 0.98, name
    AcceleratorState._reset_state(reset_partial_state=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def of_two(rank: int, port: int, job, *arguments) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank),
        "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        job(rank, *arguments)
    finally:
        distributed.destroy_process_group()


def two_of_one(rank: int, wanted: dict, losses: list[dict], weights_of_one: dict) -> None:
    fit = open_fit(clip_grad=0)
    assert (fit.rank, fit.ranks) == (rank, 2)
    assert_gradients(first_step(fit), wanted)
    assert_gradients(first_step(open_fit(clip_grad=0, micro_batch=4)), wanted)
    fit = run(open_fit())
    for mine, other in zip(fit.at.history, losses, strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)
    for name, value in weights(fit).items():
        torch.testing.assert_close(value, weights_of_one[name], rtol=1e-3, atol=1e-3, msg=name)
    # each process tells of its own lanes, the state holds all, and sums are those of both
    assert fit.at.counts.keys() == {f"e{epoch}r{other}.tar" for epoch in range(3) for other in range(2)}
    assert len(fit.at.rejected) == 6 and fit.at.totals["bytes"] == 2 * 12 * 100
    assert (fit.at.totals["samples_local"], fit.at.totals["samples_streamed"]) == (36, 108)
    kept = []

    def keep(fit: Fit) -> None:
        if fit.at.step == 6:
            kept.append(fit.state())
            raise Stop

    first = open_fit()
    with pytest.raises(Stop):
        first.run(keep, nothing)
    assert kept[0]["progress"]["lanes"] == {lane: {"after": 2} for lane in range(LANES)}
    again = open_fit(asked=(asked := []))
    again.load_state(kept[0])
    assert again.at.lanes.keys() == {rank, rank + 2}
    run(again)
    assert asked[0][:2] == (1, 2) and asked[0][2].keys() == {rank, rank + 2}
    assert asked[1][3].keys() == {f"e{epoch}r{other}.tar" for epoch in range(2) for other in range(2)}
    for name, value in weights(again).items():
        assert torch.equal(value, weights(fit)[name]), name
    short_on_one(rank)
    with pytest.raises(KilnError, match="batch_size 13 over 2 processes"):
        open_fit(plan_of(batch_size=13))
    with pytest.raises(KilnError, match="3 lanes over 2 processes"):
        open_fit(plan_of(lanes=3))


def short_on_one(rank: int) -> None:
    """Where one process lacks pairs, none goes on without it."""
    fit = run(open_fit(ends={1: 2} if rank else {1: 3}))
    assert [row["batches"] for row in fit.at.history] == [4, 2, 4] and fit.at.step == 10
    assert fit.at.totals["samples_local"] + fit.at.totals["samples_streamed"] == 120
    assert fit.at.totals["bytes"] == 2 * 10 * 100 + 100 + 7


@pytest.mark.slow
def test_two_processes_make_the_update_of_one(whole):
    """Gradient of the first batch, in one pass each and in several; whole trainings, resumed and with too few pairs."""
    arguments = (free_port(), two_of_one, whole.gradient, whole.at.history, whole.weights)
    torch.multiprocessing.spawn(of_two, arguments, nprocs=2)


def test_it_learns(whole):
    first, *_, last = whole.at.history
    assert last["loss"] < 0.8 * first["loss"] and last["val_loss"] < first["val_loss"] < math.log(12) + 0.5
    assert last["val_recall"] > first["val_recall"]
    assert whole.at.totals["samples_local"] == 36 and last["samples_streamed"] == 108


def test_resumed_from_any_step_it_ends_with_the_same_bytes(whole):
    """State after each step, as torch saves it: in mid-epoch, between epochs, and at the end."""
    states = []
    open_fit().run(lambda fit: states.append(torch_bytes(fit.state())), nothing)
    assert len(states) == 12
    for data in (states[1], states[3], states[6], states[11]):
        fit = open_fit()
        fit.load_state(torch.load(data, weights_only=True))
        run(fit)
        assert fit.at.history == whole.at.history and fit.at.best_epoch == whole.at.best_epoch
        assert all(torch.equal(value, whole.weights[name]) for name, value in weights(fit).items())
        assert all(torch.equal(value, whole.at.best[name]) for name, value in fit.at.best.items())
        assert fit.at.counts == whole.at.counts and fit.at.rejected == whole.at.rejected


def torch_bytes(state: dict):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def test_counts_of_shards_change_the_order_from_the_next_epoch_on():
    asked, states = [], []
    fit = open_fit(asked=asked)
    fit.run(lambda fit: states.append(torch_bytes(fit.state())), nothing)
    assert [one[:2] for one in asked] == [(0, 0), (1, 0), (2, 0)]
    assert [list(one[3]) for one in asked] == [[], ["e0r0.tar"], ["e0r0.tar", "e1r0.tar"]]
    assert asked[1][3]["e0r0.tar"]["train"] == 8
    again = open_fit(asked=(late := []))
    again.load_state(torch.load(states[6], weights_only=True))  # after the shard that batch 1 of epoch 1 ends
    run(again)
    assert late[0] == (1, 3, {lane: {"after": 3} for lane in range(LANES)}, asked[1][3])
    assert late[1][3] == asked[2][3]


def test_an_epoch_with_too_few_pairs_ends_early():
    fit = run(open_fit(ends={1: 2}))
    assert [(row["batches"], row["batches_planned"]) for row in fit.at.history] == [(4, 4), (2, 4), (4, 4)]
    assert fit.at.step == 10 and fit.at.totals["bytes"] == 10 * 100 + 7
    with pytest.raises(KilnError, match="epoch 2: not one batch of 12 pairs"):
        run(open_fit(ends={1: 0}))


def test_the_local_arm_ends_at_the_planned_steps():
    plan = plan_of(arm="local", samples=36, steps_per_epoch=3, epochs=4, steps=10, local_per_epoch=36,
                   streamed_per_epoch=0, lanes=0)  # fmt: skip
    fit = run(open_fit(plan))
    assert fit.at.step == 10 and [row["batches"] for row in fit.at.history] == [3, 3, 3, 1]
    assert fit.at.totals["samples_local"] == 120 and fit.at.totals["samples_streamed"] == 0


def test_the_logit_scale_stays_in_bounds():
    for most, start in ((2.0, math.log(50)), (100.0, -1.0)):
        fit = open_fit(max_logit_scale=most)
        with torch.no_grad():
            fit.model.logit_scale.fill_(start)
        scales = []
        fit.run(lambda fit, scales=scales: scales.append(fit.now["logit_scale"]), nothing)
        assert min(scales) >= 1 and max(scales) <= most * (1 + 1e-6)


def test_the_rate_warms_up_and_follows_a_cosine():
    rates = []
    open_fit(final_lr=1e-4).run(lambda fit: rates.append(fit.now["lr"]), nothing)
    assert rates[:2] == pytest.approx([1.5e-3, 3e-3])
    cosine = [1e-4 + 2.9e-3 * (1 + math.cos(math.pi * done / 9)) / 2 for done in range(10)]
    assert rates[2:] == pytest.approx(cosine)
    with pytest.raises(KilnError, match="warm-up of 12 steps in 12"):
        open_fit(warmup_steps=12)


def test_matrices_decay_as_in_open_clip():
    """Against the rule as open_clip's own training writes it."""
    fit = open_fit(weight_decay=0.3)
    rates = {id(p): group["weight_decay"] for group in fit.optimiser.param_groups for p in group["params"]}
    names = {name: rates[id(p)] for name, p in fit.model.named_parameters()}
    assert len(rates) == len(names)
    for name, p in fit.model.named_parameters():
        still = p.ndim < 2 or any(one in name for one in ("bn", "ln", "bias", "logit_scale"))
        assert names[name] == (0.0 if still else 0.3), name
    assert {names["logit_scale"], names["visual.ln_pre.weight"], names["visual.class_embedding"]} == {0.0}


def test_gradients_are_clipped(whole):
    clipped = first_step(open_fit(clip_grad=0.05))
    length = torch.stack([one.norm() for one in whole.gradient.values()]).norm()
    assert length > 0.1
    for name, gradient in whole.gradient.items():
        torch.testing.assert_close(clipped[name], gradient * 0.05 / length, rtol=1e-3, atol=1e-9, msg=name)


def test_captions_that_come_twice_in_a_batch_are_counted():
    shares, wanted = [], []
    fit = open_fit()
    reader = fit.loader(0, 0, {}, {}, {})
    for batch in reader:
        counts = Counter(batch.caption_ids.tolist())
        wanted.append(sum(count for count in counts.values() if count > 1) / 12)
    fit.run(lambda fit: shares.append((fit.now["duplicates"], fit.now["full_captions"])), nothing)
    assert [one for one, _ in shares[:4]] == pytest.approx(wanted) and max(wanted) > 0
    assert fit.at.history[0]["duplicates"] == pytest.approx(sum(wanted) / 4)
    assert {full for _, full in shares} == {0.0}
    config = CONFIG | {"text_cfg": CONFIG["text_cfg"] | {"context_length": 5}}
    assert run(open_fit(config=config)).at.history[0]["full_captions"] == 1.0


@torch.no_grad()
def test_validation_is_that_of_the_model_pair_by_pair():
    """Equal captions are right, and no candidate that is as near comes before; the loss is that of batches of 12."""
    fit = open_fit(micro_batch=5)
    row, pairs = fit.validate(), fit.validation
    images = transforms.normalise(pairs.images, fit.preprocess)
    image = torch.cat([fit.model.encode_image(one[None], normalize=True) for one in images])
    text = torch.cat([fit.model.encode_text(one[None], normalize=True) for one in pairs.tokens])
    equal = torch.from_numpy(pairs.caption_ids[:, None] == pairs.caption_ids)
    found = []
    for way, similarity in (("image_to_text", image @ text.T), ("text_to_image", text @ image.T)):
        best = similarity.masked_fill(~equal, -2).amax(dim=1, keepdim=True)
        wrong = ((similarity >= best - 1e-6) & ~equal).sum(dim=1)
        for k in (1, 5, 10):
            found.append((wrong < k).double().mean().item())
            assert row[f"{way}_r{k}"] == pytest.approx(found[-1], abs=1e-9)
    assert row["recall"] == pytest.approx(sum(found) / 6)
    order = epoch_order(24, fit.values.seed, 0)
    losses = [ClipLoss()(image[one], text[one], fit.model.logit_scale.exp()) for one in (order[:12], order[12:])]
    assert row["loss"] == pytest.approx(float(sum(losses)) / 2, rel=1e-5)


@pytest.mark.parametrize("best_by", ["retrieval", "loss"])
def test_best_and_last_are_the_weights_of_their_epochs(best_by):
    """At so high a rate validation gets worse again, so that the best epoch is not the last."""
    kept = []
    fit = open_fit(plan_of(epochs=6, steps=24), lr=0.1, final_lr=0.1, best_by=best_by, clip_grad=0)
    fit.run(nothing, lambda fit: kept.append(weights(fit)))
    if best_by == "retrieval":
        scores = [(row["val_recall"], -row["val_loss"]) for row in fit.at.history]
    else:
        scores = [-row["val_loss"] for row in fit.at.history]
    best = scores.index(max(scores))
    assert fit.at.best_epoch == best < 5
    assert all(torch.equal(value, kept[best][name]) for name, value in fit.at.best.items())


def test_what_is_no_number_stops():
    with pytest.raises(KilnError, match=r"(loss|norm|largest).* at step \d+, epoch \d+, batch \d+"):
        run(open_fit(lr=1e18, clip_grad=0))
    fit = open_fit()
    with torch.no_grad():
        fit.model.text_projection[0, 0] = math.inf
    with pytest.raises(KilnError, match="the largest text_projection is inf"):
        fit.state()
    with pytest.raises(KilnError, match="the loss is nan at step 0, epoch 0, batch 0"):
        run(fit)


def test_layers_that_mix_pairs_are_refused_where_batches_are_cut():
    patches = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"patch_dropout": 0.5}}
    resnet = {"image_size": 16, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}
    for config, kind in ((patches, "PatchDropout"), (CONFIG | {"vision_cfg": resnet}, "BatchNorm2d")):
        with pytest.raises(KilnError, match=f"a {kind}, whose features depend"):
            open_fit(config=config, micro_batch=6)
        assert open_fit(config=config).pass_size == 12


def test_the_defaults_are_the_originals_and_the_preset_is_that_of_bmc_clip():
    values = BiomedicaSettings()
    assert (values.plan.samples, values.plan.epochs, values.plan.batch_size, values.train.lr) == (50_000, 10, 256, 1e-4)
    overlay = settings.read_yaml(ROOT / "config/bmc_clip.yaml")
    preset = load(overlay, ROOT / "config/no_file.yaml").biomedica
    train, plan = preset.train, preset.plan
    assert overlay.keys() == {"biomedica", "resources"} and preset.model.name == "ViT-L-14"
    assert (train.lr, train.betas, train.weight_decay, train.warmup_steps) == (1e-6, (0.9, 0.95), 0.2, 1000)
    assert train.gradient_checkpointing and plan.batch_size == 4 * 2 * 512 and train.micro_batch == 512
    assert plan.samples // plan.batch_size * plan.epochs > train.warmup_steps
    assert all(plan.batch_size % ranks == plan.lanes % ranks == 0 for ranks in (1, 4, 8))
