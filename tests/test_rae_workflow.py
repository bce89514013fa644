"""Pipeline rae from folders to rFID, at the size of a stamp: what it writes, and that no kill costs more than time."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import workflow
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import (
    BitImageProcessor,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from scripts.common.errors import KilnError
from scripts.rae import (
    build_arrow,
    checkpoints,
    compute_latent_stats,
    compute_reference_stats,
    evaluate,
    fid,
    latent_stats,
    reconstruct,
    train_autoencoder,
)

ROOT = Path(__file__).resolve().parents[1]
SIDE = 32
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
INPUT = {"dinov2": 28, "siglip2": 32}
PERCEPTUAL = {"weights": None, "backbone": [4, 8]}
TRAIN = {
    "image_size": SIDE,
    "decoder": {"size": "free", "layers": 1, "width": 32, "mlp": 64, "heads": 2},
    "perceptual": PERCEPTUAL,
    "discriminator": {"recipe": "free", "weights": None, "dim": 16, "depth": 2, "taps": [0, 1], "size": 32},
    "autoencoder": {
        "epochs": 8, "batch_size": 24, "lr": 5e-3, "final_lr": 5e-4, "warmup_epochs": 1, "discriminator_start": 4,
        "gan_start": 6, "ema_decay": 0.8, "precision": "fp32", "workers": 0, "tracker": "none",
    },
}  # fmt: skip
EVALUATE = {"extractor": "kiln-random", "inception": None, "batch_size": 8, "images_per_part": 10, "workers": 0}


def draw_images(root: Path, count: int = 60) -> None:
    """Coloured boxes and discs on tinted grounds, two classes, train/ and val/."""
    rng = np.random.default_rng(0)
    for number in range(2 * count):
        kind, side = ("box", "disc")[number % 2], "train" if number // 2 % 6 else "val"
        image = Image.new("RGB", (48, 40), tuple(int(x) for x in rng.integers(0, 256, 3)))
        x, y, size = (int(v) for v in rng.integers((4, 4, 12), (20, 14, 24)))
        shape = getattr(ImageDraw.Draw(image), "rectangle" if kind == "box" else "ellipse")
        shape((x, y, x + size, y + size), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
        path = root / side / kind / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=92)


def encoder_settings(name: str) -> dict:
    return {"model": "a folder", "input_size": INPUT[name]}


def common(meta: Path, settings: dict) -> list[str]:
    return ["--device", "cpu", "--threads", "1", "--settings", json.dumps(settings), "--meta", str(meta)]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """images/, arrow/dataset, an encoder and its stat.pt for each of dinov2 and siglip2."""
    root = tmp_path_factory.mktemp("rae")
    draw_images(root / "images")
    torch.manual_seed(0)
    dino = Dinov2WithRegistersConfig(image_size=28, patch_size=7, num_register_tokens=4, **SIZES)
    Dinov2WithRegistersModel(dino).save_pretrained(root / "dinov2")
    BitImageProcessor().save_pretrained(root / "dinov2")
    siglip = SiglipVisionConfig(image_size=32, patch_size=8, intermediate_size=64, **SIZES)
    SiglipVisionModel(siglip).save_pretrained(root / "siglip2")
    SiglipImageProcessor().save_pretrained(root / "siglip2")
    build_arrow.main(["--images", str(root / "images"), "--output-folder", str(root / "arrow"), "--threads", "1",
                      "--settings", "images_per_shard=30"])  # fmt: skip
    for name in INPUT:
        statistics(root, name, root / f"{name}.pt")
    return root


def statistics(root: Path, name: str, output: Path, **changes) -> None:
    values = {"batch_size": 16, "images_per_part": 40, "workers": 0} | changes
    settings = {"image_size": SIDE, "encoder": encoder_settings(name), "latent_stats": values}
    compute_latent_stats.main(
        ["--dataset", str(root / "arrow/dataset"), "--encoder", str(root / name), "--output", str(output),
         "--state-folder", str(output.with_suffix(".state")), *common(output.with_suffix(".meta.json"), settings)]
    )  # fmt: skip


def training(root: Path, name: str, out: Path, **changes) -> list[str]:
    settings = TRAIN | {"encoder": encoder_settings(name), "autoencoder": TRAIN["autoencoder"] | changes}
    return [
        "--name", name, "--dataset", str(root / "arrow/dataset"), "--encoder", str(root / name),
        "--statistics", str(root / f"{name}.pt"), "--state-folder", str(out.with_name(f"{out.name}.state")),
        "--tracker-folder", str(out.with_name(f"{out.name}.curves")), "--output-folder", str(out),
        *common(out / "meta.json", settings),
    ]  # fmt: skip


RESULTS = ("autoencoder.safetensors", "metrics.json")


@pytest.fixture(scope="module")
def trained(data) -> dict[str, Path]:
    """{encoder: folder of its undisturbed training}."""
    for name in INPUT:
        train_autoencoder.main(training(data, name, data / f"train_{name}"))
    return {name: data / f"train_{name}" for name in INPUT}


def scored(data: Path, name: str, folder: Path, out: Path, **changes) -> dict:
    """metrics.json of an autoencoder."""
    values = EVALUATE | changes
    reference = ["--state-folder", str(out / "1"), "--output-folder", str(out / "reference")]
    compute_reference_stats.main(["--dataset", str(data / "arrow/dataset"), *reference,
                                  *common(out / "1.json", {"image_size": SIDE, "evaluate": values})])  # fmt: skip
    reconstruct.main(
        ["--dataset", str(data / "arrow/dataset"), "--checkpoint", str(folder / "autoencoder.safetensors"),
         "--encoder", str(data / name), "--state-folder", str(out / "2"), "--output-folder", str(out / "reconstruct"),
         *common(out / "2.json", {"perceptual": PERCEPTUAL, "evaluate": values})]
    )  # fmt: skip
    evaluate.main(
        ["--reference", str(out / "reference/reference.safetensors"), "--floor", str(out / "reference/floor.json"),
         "--shrunk", str(out / "reference/shrunk.safetensors"), "--output", str(out / "metrics.json"),
         "--features", str(out / "reconstruct/features.safetensors"), "--meta", str(out / "3.json"),
         "--images", str(out / "reconstruct/images.parquet")]
    )  # fmt: skip
    return json.loads((out / "metrics.json").read_text())


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
    summary = made["summary"]
    assert set(summary) == {"psnr", "ssim", "lpips", "rfid"} and all(one["n"] == 20 for one in summary.values())
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
        assert made[0][name]["value"] == pytest.approx(made[1][name]["value"], abs=1e-3, rel=1e-3), name


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


@pytest.mark.slow
def test_two_processes_equal_one(data, trained, tmp_path):
    """Two gloo processes: statistics to the byte; the loss curve but for rounding, which the GAN's stage amplifies."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "scripts.common.launch", "--processes", "2", "--"]
    done = subprocess.run([*command, "scripts.rae.train_autoencoder", *training(data, "siglip2", out)], cwd=ROOT,
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ours = json.loads((out / "metrics.json").read_text())["history"]
    one = json.loads((trained["siglip2"] / "metrics.json").read_text())["history"]
    for mine, other in zip(ours, one, strict=True):
        assert mine.keys() == other.keys()
        for name in ("l1", "lpips", "discriminator"):
            if name in other:
                assert mine[name] == pytest.approx(other[name], rel=1e-2 if "gan" in other else 2e-3), name
    settings = {"image_size": SIDE, "encoder": encoder_settings("siglip2"),
                "latent_stats": {"batch_size": 16, "images_per_part": 40, "workers": 0}}  # fmt: skip
    both = ["--dataset", str(data / "arrow/dataset"), "--encoder", str(data / "siglip2"),
            "--state-folder", str(tmp_path / "s"), "--output", str(tmp_path / "stat.pt")]  # fmt: skip
    both += common(tmp_path / "s.json", settings)
    done = subprocess.run([*command, "scripts.rae.compute_latent_stats", *both], cwd=ROOT, capture_output=True,
                          text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "stat.pt").read_bytes() == (data / "siglip2.pt").read_bytes()


@pytest.mark.slow
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
    assert planned() == dict.fromkeys((*(f"rae_{name}" for name in steps), "rae_train_autoencoder"), 1)
    workflow.run(ROOT, tmp_path, *wanted)
    metrics = json.loads((tmp_path / "results/rae/evaluate/siglip2/metrics.json").read_text())
    assert metrics["summary"]["rfid"]["n"] == 20
    assert not list((tmp_path / "results/state/rae").rglob("*.safetensors"))
    logs = tmp_path / "results/logs/rae/train_autoencoder"
    assert re.findall("step (\\d+): rFID", (logs / "siglip2.log").read_text()) == ["10", "20", "30"]
    assert sorted(p.name for p in logs.rglob("*.png")) == ["step-0000016.png", "step-0000032.png"]
    assert planned() == {}
    scoring = {"rae_compute_reference_stats": 1, "rae_reconstruct": 1, "rae_evaluate": 1}
    assert planned("--config", "set=rae.evaluate.max_images=10") == scoring
    assert planned("--config", "set=rae.evaluate.workers=2 rae.autoencoder.save_minutes=1") == {}
    watching = "rae.autoencoder.sample_every=0 rae.autoencoder.rfid.every_n_steps=0 rae.autoencoder.rfid.on_train=true"
    assert planned("--config", f"set={watching}") == {}
    assert planned("--config", "set=rae.evaluate.extractor=inception-v3-compat") == scoring
    (tmp_path / "inception.pth").write_bytes(b"other and newer")
    assert planned() == {}
    rate = planned("--config", "set=rae.autoencoder.lr=1e-3")
    assert rate == {"rae_train_autoencoder": 1, "rae_reconstruct": 1, "rae_evaluate": 1}
