"""rFID and sheets while an autoencoder trains: the right numbers at the right steps, and no trace in the weights."""

import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rae_fixtures as rae
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.common import step
from scripts.common.errors import KilnError
from scripts.common.settings import of_kind
from scripts.common.training_state import OutOfTime
from scripts.rae import arrow, train_autoencoder
from scripts.rae.autoencoder import Autoencoder
from scripts.rae.autoencoder_training import TrainingPictures
from scripts.rae.decoder import Decoder, Size
from scripts.rae.encoder import Encoder
from scripts.rae.extractors import load_extractor
from scripts.rae.monitor import Monitor
from scripts.rae.settings import AutoencoderSettings

ROOT = Path(__file__).resolve().parents[1]
SECOND = 1.1  # event files are ordered by the second they began in
SHORT = {"epochs": 2, "warmup_epochs": 0.5, "tracker": "tensorboard"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """100 training and 20 validation pictures, so 4 steps in an epoch."""
    return rae.build_data(tmp_path_factory.mktemp("rae"))


def training(data: Path, out: Path, rfid: dict, extractor: str = "kiln-random", **changes) -> list[str]:
    return [*rae.training(data, "siglip2", out, **changes, rfid=rfid), "--extractor", extractor]


def train(data: Path, out: Path, rfid: dict, **changes) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} of a short training's curves."""
    train_autoencoder.main(training(data, out, rfid, **SHORT | changes))
    return curves(out)


def curves(out: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(out.with_name(f"{out.name}.curves")), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Heusel et al. 2017, eq. 6, of features [n,D]; the trace of the root by eigenvalues of a symmetric product."""
    (mu_a, cov_a), (mu_b, cov_b) = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    both = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((mu_a - mu_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * both)


def independent_score(data: Path, ema: dict, split: str, rows: list[int]) -> float:
    """By hand: crops of the stored pictures, the average decoder, 8 bits, features of all pictures at once."""
    own = arrow.open_split(data / "arrow/dataset", split)
    crops = []
    for row in rows:
        image = own[row]["image"].convert("RGB")  # 48 x 40: no halving
        small = image.resize((round(48 * rae.SIDE / 40), rae.SIDE), Image.Resampling.BICUBIC)
        left = (small.width - rae.SIDE) // 2
        crops.append(np.asarray(small)[:, left : left + rae.SIDE])
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    encoder = Encoder(data / "siglip2", rae.INPUT["siglip2"])
    decoder = Decoder(encoder.dim, encoder.grid, rae.SIDE, Size(1, 32, 64, 2))
    decoder.load_state_dict(ema)
    saved = torch.load(data / "siglip2.pt", weights_only=True)
    with torch.no_grad():
        made = Autoencoder(encoder, decoder, 0.0, saved["mean"], saved["var"]).eval()(images / 255)
    made = (made.double().clamp(0, 1) * 255).round().to(torch.uint8)
    extractor = load_extractor("kiln-random", None)
    return frechet(extractor(images).numpy(), extractor(made).numpy())


def modes(model: torch.nn.Module) -> list[bool]:
    return [one.training for one in model.modules()]


def test_weights_curves_generators_and_modes_are_those_of_a_training_without_it(data, tmp_path, monkeypatch):
    called = Monitor.__call__
    seen = []

    def watched(self, fit, writer, pause):
        models = (fit.model, fit.discriminator, fit.ema, fit.perceptual)
        before = [modes(one) for one in models], torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
        called(self, fit, writer, pause)
        after = [modes(one) for one in models], torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
        assert before == after
        seen.append(fit.at.step)

    monkeypatch.setattr(Monitor, "__call__", watched)
    every = {"every_n_steps": 1, "every_epoch": True, "save_samples": True, "save_count": 5, "batch_size": 7}
    train_autoencoder.main(training(data, tmp_path / "with", every, sample_every=2))
    train_autoencoder.main(training(data, tmp_path / "without", {"every_n_steps": 0}, sample_every=0))
    for name in rae.RESULTS:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name
    assert seen == [*range(1, 33)] * 2
    drawn = {p.parent.name: p.name for p in sorted((tmp_path / "with.curves").rglob("*.png"))}
    assert drawn == {"rfid": "step-0000032.png", "samples": "step-0000032.png"}
    assert len(list((tmp_path / "with.curves/rfid").iterdir())) == 32
    assert not (tmp_path / "without.curves").exists()


def test_saved_generators_are_the_same_too(data, tmp_path):
    states = []
    for name, steps in (("with", 1), ("without", 0)):
        rfid = {"every_n_steps": steps}
        with pytest.raises(OutOfTime):
            train_autoencoder.main(training(data, tmp_path / name, rfid, budget_minutes=0, save_minutes=0))
        (folder,) = (tmp_path / f"{name}.state").iterdir()
        states.append(folder)
    assert states[0].name == states[1].name  # the fingerprint
    for file in ("shared.pt", "rank-0.pt"):
        assert (states[0] / f"step-000000001/{file}").read_bytes() == (
            states[1] / f"step-000000001/{file}"
        ).read_bytes()


def test_the_settings_are_execution_alone():
    numerics = of_kind(AutoencoderSettings(), "numerics")
    assert not {"rfid", "sample_every"} & set(numerics)
    assert of_kind(AutoencoderSettings(), "execution")["rfid"]["every_n_steps"] == 1000


@pytest.mark.parametrize(
    ("changes", "split", "rows", "tag"),
    [
        ({}, "validation", list(range(20)), "rfid/score"),
        ({"num_samples": 7, "batch_size": 3}, "validation", [0, 3, 6, 9, 12, 15, 19], "rfid/score"),
        ({"on_train": True, "num_samples": 12, "batch_size": 5}, "train", [9 * i for i in range(12)],
         "rfid_train/score"),
    ],
)  # fmt: skip
def test_the_score_is_that_of_the_saved_average(data, tmp_path, caplog, changes, split, rows, tag):
    """The training stops after a step; what it saved there gives, by hand, the score that it logged there."""
    caplog.set_level("INFO", logger="kiln")
    out, rfid = tmp_path / "out", {"every_n_steps": 1, **changes}
    command = training(data, out, rfid, **SHORT, save_minutes=0, budget_minutes=0)
    for number in (1, 2):
        with pytest.raises(OutOfTime):
            train_autoencoder.main(command)
        time.sleep(SECOND)
        (state,) = (tmp_path / "out.state").glob(f"*/step-{number:09d}/shared.pt")
        ema = torch.load(state, weights_only=True)["ema"]
        expected = independent_score(data, ema, split, rows)
        assert dict(curves(out)[tag])[number] == pytest.approx(expected, rel=1e-5)
        kind = "training" if split == "train" else "validation"
        line = f"step {number}: rFID {expected:.4f} (n = {len(rows)} {kind} images, extractor kiln-random)"
        assert line in caplog.text
    assert set(curves(out)) == {tag}
    assert caplog.text.count("rank-deficient covariance (reference") == 2  # once in each process
    assert caplog.text.count("random features, not comparable") == 2


def test_the_schedule_goes_on_after_a_stop(data, tmp_path):
    rfid = {"every_n_steps": 3, "every_epoch": True}
    whole = train(data, tmp_path / "whole", rfid, sample_every=5)
    assert [step for step, _ in whole["rfid/score"]] == [3, 4, 6, 8]
    assert [step for step, _ in whole["l1"]] == [4, 8]
    for _ in range(4):  # stopped after each of four steps, the last of which ends an epoch
        with pytest.raises(OutOfTime):
            train(data, tmp_path / "parts", rfid, sample_every=5, save_minutes=0, budget_minutes=0)
        time.sleep(SECOND)
    parts = train(data, tmp_path / "parts", rfid, sample_every=5)
    assert parts["rfid/score"] == whole["rfid/score"]
    for name in ("whole", "parts"):
        assert [p.name for p in (tmp_path / f"{name}.curves/samples").iterdir()] == ["step-0000005.png"]
        assert not (tmp_path / f"{name}.curves/rfid").exists()


def test_sheets_show_pictures_beside_reconstructions_and_reach_the_tracker(data, tmp_path):
    out = tmp_path / "out"
    train(data, out, {"every_n_steps": 8, "save_samples": True, "save_count": 3}, sample_every=4)
    folder = tmp_path / "out.curves"
    sheets = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
    assert sheets == ["rfid/step-0000008.png", "samples/step-0000004.png", "samples/step-0000008.png"]
    sizes = {name: Image.open(folder / name).size for name in sheets}
    assert sizes["samples/step-0000004.png"][0] > sizes["rfid/step-0000008.png"][0]  # eight columns, and three
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert [one.step for one in events.Images("samples/reconstructions")] == [4, 8]
    assert [one.step for one in events.Images("rfid/reconstructions")] == [8]


def test_a_sheet_that_cannot_be_written_ends_no_training(data, tmp_path, caplog):
    (tmp_path / "out.curves").mkdir()
    (tmp_path / "out.curves/samples").write_text("in the way")
    train(data, tmp_path / "out", {"every_n_steps": 0}, sample_every=4)
    assert (tmp_path / "out/meta.json").exists()
    assert caplog.text.count("not drawn") == 2


def test_off_or_never_due_it_asks_for_nothing(data, tmp_path, caplog):
    """By default Inception and its weights are due at step 1000; these trainings have 8 steps."""
    for name, rfid, every in (("off", {"every_n_steps": 0}, 0), ("late", {"every_n_steps": 9}, 9)):
        train_autoencoder.main(
            training(data, tmp_path / name, rfid, "inception-v3-compat", **SHORT, sample_every=every)
        )
        assert set(curves(tmp_path / name)) == {"l1", "lpips"}
        assert not list((tmp_path / f"{name}.curves").rglob("*.png"))


def test_fewer_pictures_than_asked_for_are_said_and_used(data, tmp_path, caplog):
    caplog.set_level("INFO", logger=step.log.name)
    train(data, tmp_path / "out", {"every_n_steps": 8})
    assert "rFID while training: 20 of 1000 pictures, all that split validation has" in caplog.text
    assert "(n = 20 validation images" in caplog.text


def test_what_it_lacks_stops_the_training_before_it_begins(data, tmp_path):
    out, rfid = tmp_path / "out", {"every_n_steps": 1}

    def refused(message: str, hint: str, root: Path = data, extractor: str = "kiln-random", **changes) -> None:
        with pytest.raises(KilnError, match=message) as error:
            train_autoencoder.main(training(root, out, rfid | changes, extractor))
        assert hint in error.value.hint
        assert not out.exists() and not (tmp_path / "out.state").exists()

    off = "set rae.autoencoder.rfid.every_n_steps=0"
    refused("inception-v3-compat needs a file of weights", off, extractor="inception-v3-compat")
    for name in ("siglip2", "siglip2.pt"):
        (tmp_path / name).symlink_to(data / name)
    dataset = tmp_path / "arrow/dataset"
    dataset.mkdir(parents=True)
    for name in ("files.json", "dataset_dict.json", "train"):
        (dataset / name).symlink_to(data / "arrow/dataset" / name)
    refused("validation: no such split", off, root=tmp_path)
    arrow.open_split(data / "arrow/dataset", "validation").select([3]).save_to_disk(str(dataset / "validation"))
    refused("validation: 1 picture; a Fréchet distance needs 2 or more", off, root=tmp_path)
    train_autoencoder.main(training(tmp_path, out, rfid | {"on_train": True}, **SHORT, sample_every=0))


@pytest.mark.parametrize(
    "changes", [{"num_samples": 1}, {"batch_size": 0}, {"every_n_steps": -1}, {"save_count": 0}, {"every": 5}]
)
def test_settings_that_cannot_hold_are_refused(data, tmp_path, changes):
    with pytest.raises(KilnError, match=f"autoencoder.rfid.{next(iter(changes))}"):
        train_autoencoder.main(training(data, tmp_path / "out", changes))


@pytest.mark.slow
def test_two_processes_give_the_score_of_one(data, tmp_path):
    """Of weights that do not move, as two processes round gradients in another way; the last batch is short."""
    first = tmp_path / "first"
    train_autoencoder.main(training(data, first, {"every_n_steps": 0}, **SHORT))
    still = SHORT | {"lr": 1e-30, "final_lr": 1e-30, "discriminator_lr": 1e-30, "epochs": 1,
                     "init_from": str(first / "autoencoder.safetensors")}  # fmt: skip
    rfid = {"every_n_steps": 4, "batch_size": 3, "save_samples": True}
    train_autoencoder.main(training(data, tmp_path / "one", rfid, **still, sample_every=2))
    launch = [sys.executable, "-m", "scripts.common.launch", "--processes", "2", "--", "scripts.rae.train_autoencoder"]
    command = [*launch, *training(data, tmp_path / "two", rfid, **still, sample_every=2)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ((_, one),), ((_, two),) = (curves(tmp_path / name)["rfid/score"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-6) and one > 0
    assert len(re.findall("step 4: rFID", done.stderr)) == 1
    assert [p.name for p in sorted((tmp_path / "two.curves").rglob("*.png"))] == [
        "step-0000004.png", "step-0000002.png", "step-0000004.png",
    ]  # fmt: skip


def test_training_pictures_reach_loader_processes_that_are_spawned(data):
    made = TrainingPictures(arrow.open_split(data / "arrow/dataset", "train"), rae.SIDE, seed=3)
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again[2, 7][0], made[2, 7][0])
