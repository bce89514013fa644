"""Pipeline rae from folders to rFID, at the size of a stamp: what it writes, and that no kill costs more than time."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import workflow
from PIL import Image
from rae_fixtures import (
    CALM,
    EVALUATE,
    INPUT,
    RESULTS,
    SIDE,
    TRAIN,
    build_data,
    check_curve,
    common,
    encoder_settings,
    scored,
    train_all,
    training,
)
from rerun_cases import RAE, RAE_AFTER_TRAINING, RAE_TRAINING, named
from safetensors.torch import load_file

from scripts.common import devices
from scripts.common.errors import KilnError
from scripts.rae import checkpoints, fid, latent_stats, train_autoencoder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return build_data(tmp_path_factory.mktemp("rae"))


@pytest.fixture(scope="module")
def trained(data) -> dict[str, Path]:
    return train_all(data)


def test_the_statistics_are_those_of_crops_and_their_mirror_images(data):
    from scripts.rae.arrow import Pictures, open_split
    from scripts.rae.encoder import Encoder
    from scripts.rae.pictures import CentreCrop

    encoder = Encoder(data / "siglip2", INPUT["siglip2"])
    pictures = Pictures(open_split(data / "arrow/dataset", "train"), CentreCrop(SIDE))
    images = torch.stack([pictures[i][0] for i in range(len(pictures))]).float() / 255
    with torch.no_grad():
        latents = torch.cat([encoder(images), encoder(images.flip(-1))]).double()
    mean, var = latent_stats.read_statistics(data / "siglip2.pt")
    np.testing.assert_allclose(mean, latents.mean(0), atol=1e-5)
    np.testing.assert_allclose(var, latents.var(0, unbiased=False), rtol=1e-3, atol=1e-6)


def test_an_accelerator_forgets_the_one_before_it():
    """Left in the midst of an accumulation, the next one's optimisers would skip their steps without a word."""
    first = devices.make_accelerator("cpu", "bf16", 1)
    first.gradient_state._set_sync_gradients(False)
    second = devices.make_accelerator("cpu", "fp32", 1)
    weight = torch.nn.Parameter(torch.ones(1))
    optimiser = second.prepare(torch.optim.SGD([weight], lr=1.0))
    second.backward(weight.sum())
    optimiser.step()
    assert weight.item() == 0 and second.mixed_precision == "no"


@pytest.mark.parametrize("name", ["dinov2", "siglip2"])
def test_from_folders_to_scores(data, trained, tmp_path, name):
    metrics = json.loads((trained[name] / "metrics.json").read_text())
    first, *_, last = metrics["history"]
    assert last["l1"] < 0.8 * first["l1"]
    assert metrics["steps"] == 8 * (100 // 24)
    # every term's stage was crossed
    assert "discriminator" not in metrics["history"][3] and "discriminator" in metrics["history"][4]
    assert "gan" not in metrics["history"][5] and 0 <= last["adaptive_weight"] <= 1e4
    made = scored(data, name, trained[name], tmp_path)
    summary = {metric.removeprefix(f"{name}_"): one for metric, one in made["summary"].items()}
    assert set(summary) == {"psnr", "ssim", "lpips", "rfid"} and all(one["n"] == 20 for one in summary.values())
    kinds = {metric: one["baseline_kind"] for metric, one in summary.items()}
    assert kinds == {"psnr": "constant", "ssim": "constant", "lpips": "shrunk_input", "rfid": "shrunk_input"}
    assert summary["rfid"]["label"] == summary["lpips"]["label"] == "random features, not comparable"
    assert (summary["rfid"]["extractor"], len(summary["rfid"]["weights"])) == ("kiln-random", 64)
    low, high = summary["rfid"]["ci95"]
    assert 0 <= low < summary["rfid"]["value"] < high and summary["rfid"]["groups"] == 10
    assert summary["rfid"]["trivial"] > 0 and 5 < summary["psnr"]["trivial"] < 40
    low, high = summary["rfid"]["difference"]["ci95"]
    assert low < summary["rfid"]["value"] - summary["rfid"]["baseline"] < high
    assert any("random features, not comparable" in line for line in made["warnings"])
    assert any("not the paper's protocol (n = 20" in line for line in made["warnings"])
    table = pd.read_parquet(tmp_path / "reconstruct/images.parquet")
    assert summary["psnr"]["value"] == pytest.approx(table["psnr"].mean(), rel=1e-12)
    assert summary["psnr"]["value"] > summary["psnr"]["baseline"]
    assert table["path"].is_unique and set(table["label"]) == {0, 1}
    assert Image.open(tmp_path / "reconstruct/reconstructions.png").width > 4 * SIDE


def test_scores_do_not_depend_on_batches_or_parts(data, trained, tmp_path):
    made = [scored(data, "siglip2", trained["siglip2"], tmp_path / str(size), batch_size=size, images_per_part=part)
            ["summary"] for size, part in ((16, 20), (3, 7))]  # fmt: skip
    for name in ("psnr", "ssim", "lpips", "rfid"):
        assert made[0][f"siglip2_{name}"]["value"] == pytest.approx(
            made[1][f"siglip2_{name}"]["value"], abs=1e-3, rel=1e-3
        ), name


def test_perfect_reconstructions_have_no_distance(data, trained, tmp_path):
    scored(data, "siglip2", trained["siglip2"], tmp_path)
    reference = fid.FeatureStatistics.load(tmp_path / "reference/reference.safetensors")
    assert fid.frechet_distance(reference, reference) == pytest.approx(0, abs=1e-6)
    shrunk = fid.FeatureStatistics.load(tmp_path / "reference/shrunk.safetensors")
    assert fid.frechet_distance(reference, shrunk) > 1e-3


def test_a_checkpoint_of_the_other_encoder_is_refused(data, trained):
    with pytest.raises(KilnError, match="trained on encoder siglip2") as error:
        checkpoints.load(trained["siglip2"] / "autoencoder.safetensors", data / "dinov2")
    assert "the encoder of this checkpoint" in error.value.hint


def test_the_average_is_saved_and_no_frozen_weight(trained):
    tensors = load_file(trained["siglip2"] / "autoencoder.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"decoder", "latent_mean", "latent_var"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 1000}, "100 training images, fewer than rae.autoencoder.batch_size 1000"),
        ({"lr": 1e18, "final_lr": 1e18}, "at step [0-9]+, epoch [0-9]+, batch [0-9]+"),
    ],
)
def test_bad_input_stops_and_leaves_nothing(data, tmp_path, changes, message):
    with pytest.raises(KilnError, match=message):
        train_autoencoder.main(training(data, "siglip2", tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_hold_are_refused(data, tmp_path):
    for changes, message in (
        ({"gan_start": 1}, "gan_start 1 must not be before discriminator_start 4"),
        ({"accumulation": 5}, "batch_size 24 must be a multiple of accumulation 5"),
        ({"warmup_epochs": 8}, "must be fewer than epochs 8"),
    ):
        with pytest.raises(KilnError, match=message):
            train_autoencoder.main(training(data, "siglip2", tmp_path / "out", **changes))


def test_accumulation_changes_the_adaptive_weight_alone(data, trained, tmp_path):
    """Before the adversarial loss counts, two passes of half a batch equal one, but for rounding, which grows."""
    train_autoencoder.main(training(data, "siglip2", tmp_path / "out", accumulation=2))
    ours = json.loads((tmp_path / "out/metrics.json").read_text())["history"]
    whole = json.loads((trained["siglip2"] / "metrics.json").read_text())["history"]
    for mine, other in zip(ours[:6], whole[:6], strict=True):
        for name in ("l1", "lpips"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4 if mine is ours[0] else 1e-2)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_gives_the_same_bytes(data, trained, tmp_path):
    """SIGKILL at seeded moments after the first save, in each stage of the schedule."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "scripts.rae.train_autoencoder", *training(data, "siglip2", out),
               "--extractor", "kiln-random", "--settings",
               '{"autoencoder": {"save_minutes": 0, "sample_every": 3, "rfid": {"every_n_steps": 2}}}']  # fmt: skip
    rng, kills, last = random.Random(0), 0, -1
    while not (out / "meta.json").exists():
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
        while kills < 3 and process.poll() is None:
            steps = [
                int(p.name.split("-")[1]) for p in (tmp_path / "out.state").glob("*/step-*") if "p" not in p.suffix
            ]
            if steps and max(steps) > last + 1:
                time.sleep(rng.uniform(0, 0.2))
                os.killpg(process.pid, signal.SIGKILL)
                kills, last = kills + (process.wait() == -signal.SIGKILL), max(steps)
            time.sleep(0.01)
        assert process.wait() in (0, -signal.SIGKILL)
    assert kills == 3
    for name in RESULTS:
        assert (out / name).read_bytes() == (trained["siglip2"] / name).read_bytes(), name
    assert not (tmp_path / "out.state").exists()


@pytest.fixture(scope="module")
def calm(data, tmp_path_factory):
    """The loss curve of one process."""
    out = tmp_path_factory.mktemp("calm")
    train_autoencoder.main(training(data, "siglip2", out, **CALM))
    return json.loads((out / "metrics.json").read_text())["history"]


@pytest.mark.slow
def test_two_nodes_follow_the_curve_of_one_process(data, calm, tmp_path):
    """By hand, as docs/rae.md says: one torchrun on each node, here two on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "out"
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
             "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", str(port),
             "-m", "scripts.rae.train_autoencoder", *training(data, "siglip2", out, **CALM)],
            cwd=ROOT, stderr=(tmp_path / f"{rank}.log").open("w"), env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank, node in enumerate(nodes):
        assert node.wait(timeout=600) == 0, (tmp_path / f"{rank}.log").read_text()[-3000:]
    check_curve(out, calm)


@pytest.mark.slow
def test_two_processes_equal_one(data, calm, tmp_path):
    """Two gloo processes: the loss curve but for rounding, statistics to the byte."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "scripts.common.launch", "--processes", "2", "--"]
    options = training(data, "siglip2", out, **CALM)
    done = subprocess.run([*command, "scripts.rae.train_autoencoder", *options], cwd=ROOT, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    check_curve(out, calm)
    settings = {"image_size": SIDE, "encoder": encoder_settings("siglip2"),
                "latent_stats": {"batch_size": 16, "images_per_part": 40, "workers": 0}}  # fmt: skip
    both = ["--dataset", str(data / "arrow/dataset"), "--encoder", str(data / "siglip2"),
            "--state-folder", str(tmp_path / "s"), "--output", str(tmp_path / "stat.pt")]  # fmt: skip
    both += common(tmp_path / "s.json", settings)
    done = subprocess.run([*command, "scripts.rae.compute_latent_stats", *both], cwd=ROOT, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "stat.pt").read_bytes() == (data / "siglip2.pt").read_bytes()


@pytest.mark.slow(minutes=2)
def test_the_rules_make_all_of_it_and_rerun_what_a_setting_reaches(data, tmp_path):
    encoder = {"model": str(data / "siglip2"), "input_size": INPUT["siglip2"]}
    config = tmp_path / "config.json"
    rae = {
        **TRAIN, "autoencoder": TRAIN["autoencoder"] | {"sample_every": 16, "rfid": {"every_n_steps": 10}},
        "images": str(data / "images"), "use": ["siglip2"], "encoders": {"siglip2": encoder},
        "dataset": {"images_per_shard": 30}, "latent_stats": {"batch_size": 16, "workers": 0},
        "evaluate": EVALUATE | {"inception": str(tmp_path / "inception.pth")}, "resources": "gpu_single",
    }  # fmt: skip
    (tmp_path / "inception.pth").write_bytes(b"")  # waited for, and not read by another extractor
    one = {"threads": 1, "mem_mb": 1000}
    classes = dict.fromkeys(("light", "cpu", "gpu_single"), one)
    config.write_text(json.dumps({"results": "results", "device": "cpu", "resources": classes, "rae": rae}))
    wanted = ["rae", "--configfile", str(config)]

    def planned(*more: str) -> dict[str, int]:
        return workflow.planned(ROOT, tmp_path, *wanted, *more)

    steps = ("build_arrow", "compute_latent_stats", "compute_reference_stats", "evaluate", "reconstruct")
    after = {"rae_export": 1, "rae_describe_model": 1}
    assert (
        planned()
        == dict.fromkeys((*(f"rae_{name}" for name in steps), "rae_train_autoencoder", "rae_draw_curves"), 1) | after
    )
    workflow.run(ROOT, tmp_path, *wanted)
    metrics = json.loads((tmp_path / "results/rae/evaluate/main/siglip2/metrics.json").read_text())
    assert metrics["summary"]["siglip2_rfid"]["n"] == 20
    assert not list((tmp_path / "results/state/rae").rglob("*.safetensors"))
    logs = tmp_path / "results/logs/rae/train_autoencoder/main"
    assert re.findall("step (\\d+): rFID", (logs / "siglip2.log").read_text()) == ["10", "20", "30"]
    assert sorted(p.name for p in logs.rglob("*.png")) == ["step-0000016.png", "step-0000032.png"]
    assert planned() == {}
    card = (tmp_path / "results/rae/describe_model/main/siglip2/model/README.md").read_text()
    assert "| rFID (lower is better) |" in card and "random features, not comparable" in card
    for settings, jobs in RAE:
        assert planned("--config", f"set={settings}") == named("rae", jobs), settings
    (tmp_path / "inception.pth").write_bytes(b"other and newer")
    assert planned() == {}

    # a variant beside main, trained by another LPIPS, scored by main's
    low = ("--config", "set=rae.variants.low.autoencoder.lr=1e-3 rae.variants.low.perceptual.backbone=[8,8]")
    assert planned(*low) == named("rae", {**RAE_TRAINING, **RAE_AFTER_TRAINING})
    results = tmp_path / "results/rae"
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    workflow.run(ROOT, tmp_path, *wanted, *low)
    assert {path: path.read_bytes() for path in before} == before
    made = {path for path in results.rglob("*") if path.is_file()} - set(before)
    assert made == {Path(str(path).replace("/main/", "/low/")) for path in before} - set(before)
    weights = [results / f"train_autoencoder/{name}/siglip2/autoencoder.safetensors" for name in ("main", "low")]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    for step, backbone in (("train_autoencoder", [8, 8]), ("reconstruct", [4, 8]), ("evaluate", [4, 8])):
        record = json.loads((results / step / "low/siglip2/meta.json").read_text())
        assert record["settings"]["perceptual"]["backbone"] == backbone
    assert planned(*low) == {} == planned()
