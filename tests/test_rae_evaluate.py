"""One checkpoint scored by hand: any folder of pictures, resumption, several processes, Inception's dimensions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import rae_fixtures
import torch
from PIL import Image

from scripts.common.errors import KilnError
from scripts.rae import evaluate, fid, quality
from scripts.rae.perceptual import Lpips

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"perceptual": {"weights": None, "backbone": [4, 8]}, "evaluate": {"workers": 0, "images_per_part": 3}}
KEPT = {"metrics.json", "images.parquet", "reconstructions.png", "meta.json"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folder of the checkpoint and, as if retrieved, its encoder."""
    root = tmp_path_factory.mktemp("models")
    rae_fixtures.untrained(root)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return rae_fixtures.noisy_pictures(tmp_path_factory.mktemp("images") / "val", 46)


def options(models: Path, data: Path, out: Path, *more, extractor: str = "kiln-random") -> list[str]:
    found = ["--checkpoint", models / "autoencoder.safetensors", "--data", data, "--output-dir", out,
             "--models", models, "--extractor", extractor, "--device", "cpu", "--threads", "1",
             "--settings", json.dumps(SMALL), *more]  # fmt: skip
    return [str(one) for one in found]


def by_hand(models: Path, data: Path, out: Path, *more, **changes) -> dict:
    evaluate.main(options(models, data, out, *more, **changes))
    return json.loads((out / "metrics.json").read_text())


def same(a: dict, b: dict, rel: float) -> bool:
    """Whether the metrics of two summaries are alike."""
    names = a["summary"].keys()
    assert names == b["summary"].keys()
    pairs = [(a["summary"][name], b["summary"][name]) for name in names]
    numbers = [[(x["value"], *x["ci95"]), (y["value"], *y["ci95"])] for x, y in pairs]
    return all(np.allclose(x, y, rtol=rel, atol=0) for x, y in numbers)


@pytest.fixture(scope="module")
def undisturbed(models, images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    by_hand(models, images, out)
    return out


def test_it_prints_the_scores_and_why_they_do_not_compare(models, images, tmp_path, capsys):
    made = by_hand(models, images, tmp_path / "out", "--num-samples", "30", "--batch-size", "8")
    assert {path.name for path in (tmp_path / "out").iterdir()} == KEPT
    lines = capsys.readouterr().out.splitlines()
    summary = made["summary"]
    assert set(summary) == {f"siglip2_{name}" for name in ("psnr", "rfid", "ssim", "lpips")}
    value = summary["siglip2_rfid"]["value"]
    assert lines[0].startswith(f"rFID Score: {value:.4f} [") and "(n = 30, kiln-random " in lines[0]
    assert [line.split(":")[0] for line in lines[1:4]] == ["PSNR", "SSIM", "LPIPS"]
    warned = "\n".join(lines[4:])
    for words in ("rank-deficient", "not the paper's protocol (n = 30", "random features, not comparable"):
        assert words in warned
    assert len(pd.read_parquet(tmp_path / "out/images.parquet")) == 30
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["settings"]["evaluate"]["batch_size"] == 8 and set(meta["outputs"]) == KEPT - {"meta.json"}


def test_the_floor_is_that_of_plain_formulas(models, images, undisturbed):
    """PSNR of the mean of all pictures, and of each picture's mean colour, from the files themselves."""
    summary = json.loads((undisturbed / "metrics.json").read_text())["summary"]
    table = pd.read_parquet(undisturbed / "images.parquet")
    assert table["row"].tolist() == list(range(46)) and table["path"].is_monotonic_increasing
    assert table["label"].tolist() == [0] * 23 + [1] * 23
    from scripts.rae.crops import center_crop_arr

    cut = [np.asarray(center_crop_arr(Image.open(images / path), rae_fixtures.SIDE)) for path in table["path"]]
    pixels = np.stack(cut).astype(np.float64)

    def psnr(made):
        return np.mean(10 * np.log10(255**2 / ((pixels - np.round(made)) ** 2).mean(axis=(1, 2, 3))))

    assert summary["siglip2_psnr"]["baseline"] == pytest.approx(psnr(pixels.mean(axis=0)), abs=0.01)
    assert summary["siglip2_psnr"]["trivial"] == pytest.approx(psnr(pixels.mean(axis=(1, 2), keepdims=True)), abs=0.01)
    assert summary["siglip2_psnr"]["value"] == pytest.approx(table["psnr"].mean(), rel=1e-12)
    assert summary["siglip2_rfid"]["trivial"] > summary["siglip2_rfid"]["baseline"] > 0
    originals = torch.from_numpy(pixels.astype(np.uint8)).permute(0, 3, 1, 2)
    constant = originals.double().mean(dim=0).round().to(torch.uint8).expand_as(originals)
    assert summary["siglip2_ssim"]["baseline_kind"] == "constant"
    assert summary["siglip2_ssim"]["baseline"] == pytest.approx(
        float(quality.ssim(originals, constant).mean()), abs=1e-3
    )
    colours = originals.double().mean(dim=(2, 3), keepdim=True).round().to(torch.uint8).expand_as(originals)
    assert summary["siglip2_ssim"]["trivial"] == pytest.approx(float(quality.ssim(originals, colours).mean()), abs=1e-3)


def test_the_floor_of_lpips_is_that_of_copies_made_smaller_and_large_again(models, images, undisturbed):
    table = pd.read_parquet(undisturbed / "images.parquet")
    found = json.loads((undisturbed / "metrics.json").read_text())["summary"]["siglip2_lpips"]
    from scripts.rae.crops import center_crop_arr

    expected, lpips = [], Lpips(None, SMALL["perceptual"]["backbone"])
    for path in table["path"]:
        cut = Image.fromarray(np.asarray(center_crop_arr(Image.open(images / path), rae_fixtures.SIDE)))
        small = cut.resize((rae_fixtures.SIDE // 8,) * 2, Image.Resampling.BOX)
        pair = [torch.from_numpy(np.array(one)).permute(2, 0, 1)[None].float() / 127.5 - 1
                for one in (small.resize(cut.size, Image.Resampling.BICUBIC), cut)]  # fmt: skip
        with torch.inference_mode():
            expected.append(float(lpips(*pair)))
    assert (found["baseline_kind"], found["baseline"]) == ("shrunk_input", pytest.approx(np.mean(expected), rel=0.05))
    assert found["baseline"] == pytest.approx(table["shrunk_lpips"].mean(), rel=1e-12)


def test_any_folder_of_the_same_pictures_gives_the_same_scores(models, images, undisturbed, tmp_path):
    files = sorted(images.rglob("*.png"))
    labels = [int(path.parent.name == "class1") for path in files]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["class0", "class1"])}
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"image": [str(path) for path in files], "label": labels}, features=features)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows.select(range(9)), "val": rows}).save_to_disk(tmp_path / "saved")
    expected = json.loads((undisturbed / "metrics.json").read_text())
    (tmp_path / "flat").mkdir()
    for path in files:
        os.link(path, tmp_path / "flat" / f"{path.parent.name}-{path.name}")
    folders = {"above": images.parent, "one": tmp_path / "one", "saved": tmp_path / "saved", "flat": tmp_path / "flat"}
    for name, folder in folders.items():
        assert same(by_hand(models, folder, tmp_path / f"out-{name}"), expected, 1e-9), name


def test_scores_are_the_same_at_any_batch_size(models, images, undisturbed, tmp_path):
    expected = json.loads((undisturbed / "metrics.json").read_text())
    for size in (16, 64, 256):
        settings = json.dumps({"evaluate": {"images_per_part": 300}})
        made = by_hand(models, images, tmp_path / str(size), "--batch-size", size, "--settings", settings)
        for name, one in made["summary"].items():
            assert one["value"] == pytest.approx(expected["summary"][name]["value"], abs=1e-3, rel=1e-3)


class Killed(BaseException):
    pass


def test_stopped_between_parts_it_does_none_twice_and_gives_the_same_bytes(models, images, undisturbed, tmp_path):
    """46 pictures in 10 groups, 5 each at most, in parts of 3: 20 parts of the originals, 20 of reconstructions."""
    out, saves, own = tmp_path / "out", [], fid.FeatureStatistics.save
    with pytest.MonkeyPatch.context() as patch:
        for allowed in (10, 70, 75):
            before = len(saves)

            def save(self, path, allowed=allowed):
                if len(saves) == allowed:
                    raise Killed
                own(self, path)
                saves.append(path.name)

            patch.setattr(fid.FeatureStatistics, "save", save)
            with pytest.raises(Killed):
                by_hand(models, images, out)
            assert len(saves) > before and not (out / "metrics.json").exists()
        patch.setattr(fid.FeatureStatistics, "save", lambda self, path: (own(self, path), saves.append(path.name)))
        by_hand(models, images, out)
    assert len(saves) == 20 * 3 + 20 + 1  # three files of a part of originals; the first stop was after one of them
    for name in KEPT - {"meta.json"}:
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert {path.name for path in out.iterdir()} == KEPT


@pytest.mark.slow
def test_two_processes_killed_and_carried_on_by_one_give_the_same_bytes(models, images, undisturbed, tmp_path):
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "scripts.common.launch", "--processes", "2", "--"]
    command = [*launch, "scripts.rae.evaluate", *options(models, images, out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not list(out.glob(".state/*/*/part-*.safetensors")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # the processes are tied to the launcher
    assert not (out / "metrics.json").exists() and list(out.glob(".state/*/*/part-*.safetensors"))
    by_hand(models, images, out)
    both = tmp_path / "both"
    done = subprocess.run([*launch, "scripts.rae.evaluate", *options(models, images, both)], cwd=ROOT, text=True,
                          capture_output=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("rFID Score:") == 1
    for folder in (out, both):
        for name in KEPT - {"meta.json"}:
            assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name


@pytest.mark.slow(minutes=3)
def test_inception_s_2048_dimensions_on_64_pictures(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fid, "GROUPS", 2)  # each distance takes seconds at 2048 dimensions
    weights = rae_fixtures.inception_weights(tmp_path / "inception.pth")
    data = rae_fixtures.noisy_pictures(tmp_path / "val", 64)
    made = by_hand(models, data, tmp_path / "out", "--inception", weights, extractor="inception-v3-compat")
    weights.unlink()
    one = made["summary"]["siglip2_rfid"]
    assert one["n"] == 64 and one["groups"] == 2 and one["ci95"][0] <= one["value"] <= one["ci95"][1]
    assert one["value"] > 0 and one["trivial"] > 0 and one["baseline"] > 0
    assert made["features"]["extractor"] == "inception-v3-compat"
    said = capsys.readouterr().out
    assert "rank-deficient covariance (reference: 64 images, 2048 dimensions), not comparable" in said
    assert "Inception weights other than torch-fidelity's, not comparable" in said


def test_what_cannot_be_scored_is_refused(models, images, tmp_path, capsys):
    out = tmp_path / "out"
    for arguments, words in (
        ([], "either --checkpoint"),
        (["--checkpoint", "a", "--reference", "b"], "either --checkpoint"),
        (["--checkpoint", "a"], "--data and --output-dir missing"),
        (["--reference", "a", "--name", "b"], "--reconstructions and --output missing"),
    ):
        with pytest.raises(SystemExit):
            evaluate.main(arguments)
        assert words in capsys.readouterr().err
    with pytest.raises(KilnError, match="no checkpoint of an autoencoder"):
        by_hand(tmp_path, images, out, "--encoder", models / "siglip2-base-patch16-256")
    with pytest.raises(KilnError, match="siglip2-base-patch16-256: no such model") as error:
        by_hand(models, images, out, "--models", tmp_path)
    assert "give --encoder" in error.value.hint
    with pytest.raises(KilnError, match="inception-v3-compat: no such model") as error:
        by_hand(models, images, out, extractor="inception-v3-compat")
    assert "give --inception" in error.value.hint
    with pytest.raises(KilnError, match="batch_size"):
        by_hand(models, images, out, "--batch-size", "0")
    with pytest.raises(KilnError, match="no such folder"):
        by_hand(models, tmp_path / "nowhere", out)
    (tmp_path / "split/train/a").mkdir(parents=True)
    with pytest.raises(KilnError, match="none of its splits train is validation") as error:
        by_hand(models, tmp_path / "split", out)
    assert "split/train" in error.value.hint
    few = rae_fixtures.noisy_pictures(tmp_path / "few", 3)
    with pytest.raises(KilnError, match="3 images are too few"):
        by_hand(models, few, out)
    bad = rae_fixtures.noisy_pictures(tmp_path / "bad", 8, classes=0)
    (bad / "003.png").write_bytes((bad / "003.png").read_bytes()[:200])
    with pytest.raises(KilnError, match="003.png"):
        by_hand(models, bad, out)
    assert [path.name for path in out.iterdir()] == [".state"]  # what could be done, to carry on from


def test_a_mean_colour_is_the_picture_s_own():
    from scripts.rae.poor_copies import mean_colour

    pictures = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8))
    made = mean_colour(pictures)
    assert made.dtype == torch.uint8 and made.shape == pictures.shape
    assert torch.equal(made[..., :1, :1].expand_as(made), made)
    np.testing.assert_allclose(made[..., 0, 0], pictures.double().mean(dim=(2, 3)), atol=0.5)
    assert (quality.psnr(pictures, made) > 5).all()
