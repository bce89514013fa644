"""Step train_clip of pipeline biomedica: local shards and a repo on this machine to a model, through any kill."""

import io
import json
import os
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.multiprocessing
from hub_server import HubServer
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.biomedica import checkpoints, hold_out, index_local, plan, sides, train_clip, transforms
from scripts.biomedica.settings import HeldOutSettings
from scripts.common import artefacts
from scripts.common.errors import KilnError

REPO, TOKEN = "me/figures", "hf_" + "neverToBeSeen" * 2
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "grey": (128, 128, 128)}
HELD_OUT = {"validation": 0.15, "test": 0.1, "seed": 1}
PLAN = {"samples": 96, "epochs": 3, "batch_size": 12, "lanes": 2, "shuffle_buffer": 5, "seed": 2}
SETTINGS = {
    "held_out": HELD_OUT,
    "plan": PLAN,
    "remote": {"repo": REPO, "wait_seconds": 0.01},
    "model": {"config": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 24, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }},
    "train": {"lr": 3e-3, "warmup_steps": 2, "precision": "fp32", "workers": 0, "tracker": "none", "prefetch": 3},
}  # fmt: skip
RESULTS = ("model.safetensors", "last.safetensors", "metrics.json", "remote_index.parquet", "remote_rejected.tsv")


def shard(numbers: range) -> bytes:
    """Figures of one colour and captions that tell it; every tenth has an empty caption, which is rejected."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for number in numbers:
            name, colour = list(COLOURS.items())[number % 4]
            noise = np.random.default_rng(number).normal(0, 15, (30, 40, 3))
            picture = io.BytesIO()
            Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(picture, "JPEG")
            caption = f"A {name} figure, panel {number % 7}." if number % 10 else " "
            panel = json.dumps({"image_panel_type": name})
            for kind, data in (("jpg", picture.getvalue()), ("json", panel.encode()), ("txt", caption.encode())):
                info = tarfile.TarInfo(f"0-PMC{1000 + number // 2}-{number % 2}-s.{kind}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Local shards, indexed; a repo of four shards more, listed; what is held out; a plan for each arm."""
    root = tmp_path_factory.mktemp("biomedica")
    (root / "shards").mkdir()
    (root / "shards/local.tar").write_bytes(shard(range(60)))
    meta = ["--threads", "1", "--settings"]
    index_local.main(["--shards", str(root / "shards"), "--output-folder", str(root / "index"), *meta,
                      json.dumps({"held_out": HELD_OUT}), "--meta", str(root / "index/meta.json")])  # fmt: skip
    with HubServer() as hub:
        repo = {f"data/{one}.tar": shard(range(100 + 30 * one, 130 + 30 * one)) for one in range(4)}
        hub.repos[f"datasets/{REPO}"] = repo
        (root / "remote").mkdir()
        rows = [{"name": name, "bytes": len(content), "sha256": None} for name, content in repo.items()]
        pd.DataFrame(rows).astype({"sha256": "string"}).to_parquet(root / "remote/shards.parquet")
        artefacts.write_json(root / "remote/summary.json", {
            "repo": REPO, "revision": hub.commit(f"datasets/{REPO}"), "shards": len(repo), "needed": True,
            "bytes": sum(map(len, repo.values())), "reason": "", "bytes_per_sample": None,
        })  # fmt: skip
        folders = ["--index", str(root / "index"), "--remote", str(root / "remote")]
        hold_out.main([*folders, "--shards", str(root / "shards"), "--output-folder", str(root / "held_out"), *meta,
                       json.dumps({"held_out": HELD_OUT}), "--meta", str(root / "held_out/meta.json")])  # fmt: skip
        for arm in ("hybrid", "local"):
            plan.main([*folders, "--arm", arm, "--output", str(root / f"{arm}/plan.json"), *meta,
                       json.dumps({"held_out": HELD_OUT, "plan": PLAN}),
                       "--meta", str(root / f"{arm}/meta.json")])  # fmt: skip
        assert not hub.log
        yield SimpleNamespace(root=root, hub=hub, repo=repo)


@pytest.fixture(autouse=True)
def environment(monkeypatch, data):
    """The repo's address; no proxy, no token."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", data.hub.url)


def training(root: Path, out: Path, *more: str, arm: str = "hybrid", **changes) -> list[str]:
    settings = SETTINGS | {"train": SETTINGS["train"] | changes}
    return [
        "--plan", str(root / arm / "plan.json"), "--index", str(root / "index"), "--shards", str(root / "shards"),
        "--remote", str(root / "remote"), "--held-out", str(root / "held_out"),
        "--state-folder", str(out.with_name(f"{out.name}.state")),
        "--tracker-folder", str(out.with_name(f"{out.name}.curves")), "--output-folder", str(out), "--device", "cpu",
        "--threads", "1", "--settings", json.dumps(settings), "--meta", str(out / "meta.json"), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(data) -> Path:
    """An undisturbed training of the hybrid arm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", data.hub.url)
        train_clip.main(training(data.root, data.root / "trained", tracker="tensorboard"))
    return data.root / "trained"


def metrics_of(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def test_it_learns_and_writes_what_it_says(data, trained):
    metrics, planned = metrics_of(trained), json.loads((data.root / "hybrid/plan.json").read_text())
    first, *_, last = metrics["history"]
    assert last["loss"] < first["loss"] and last["val_loss"] < first["val_loss"]
    best = max(metrics["history"], key=lambda row: (row["val_recall"], -row["val_loss"]))
    assert metrics["chosen"] == {"epoch": metrics["history"].index(best) + 1, **best}
    assert metrics["samples"] == {
        "planned": 288, "seen": 288, "samples_local": 3 * planned["local_per_epoch"],
        "samples_streamed": 3 * planned["streamed_per_epoch"],
    }  # fmt: skip
    assert planned["local_per_epoch"] > 0 < planned["streamed_per_epoch"] and metrics["unreachable"] == []
    meta = json.loads((trained / "meta.json").read_text())
    assert set(meta["outputs"]) == set(RESULTS) and meta["items"] == 288
    assert meta["reading"]["bytes"] > 0 and meta["reading"]["reread_pairs"] == 0
    assert not (data.root / "trained.state").exists()


def test_where_there_is_no_network_it_stops_before_any_step(data, tmp_path, offline, root, monkeypatch):
    """At the hub's own address, by the command line of the rule; local pairs alone train there."""
    monkeypatch.delenv("HF_ENDPOINT")
    step = (sys.executable, "-m", "scripts.biomedica.train_clip")
    impatient = json.dumps({"remote": {"repo": REPO, "attempts": 2, "wait_seconds": 0.01}})
    out = tmp_path / "out"
    done = offline(*step, *training(data.root, out), "--settings", impatient, cwd=root)
    assert done.returncode == 1, done.stderr
    assert "huggingface.co/datasets/me/figures: shard data/" in done.stderr and "2 attempts" in done.stderr
    assert "Hint: " in done.stderr and "resources.network" in done.stderr
    assert list(tmp_path.iterdir()) == []
    local = offline(*step, *training(data.root, out, arm="local"), cwd=root)
    assert local.returncode == 0, local.stderr
    assert metrics_of(out)["samples"]["samples_streamed"] == 0


def test_shards_read_to_the_end_are_counted(data, trained):
    found = pd.read_parquet(trained / "remote_index.parquet").set_index("name")
    assert list(found.index) == sorted(found.index) and len(found) >= 1
    held_out = HeldOutSettings(**HELD_OUT)
    for name, row in found.iterrows():
        first = 100 + 30 * int(name[5])
        usable = [number for number in range(first, first + 30) if number % 10]
        train = [one for one in usable if sides.side_of(f"PMC{1000 + one // 2}", held_out) == "train"]
        assert row.to_dict() == {"bytes": len(data.repo[name]), "samples": 27, "train": len(train),
                                 "held_out": 27 - len(train), "rejected": 3, "quarantined": 0}  # fmt: skip
    rejected = pd.read_csv(trained / "remote_rejected.tsv", sep="\t")
    assert (rejected["reason"] == "empty caption").all() and not rejected.duplicated(["shard", "key"]).any()
    by_shard = rejected.groupby("shard").size()
    assert all(by_shard[name] == 3 for name in found.index)
    assert metrics_of(trained)["streamed_without_a_pair"] == {"rejected": len(rejected)}


def test_curves_tell_of_every_step(trained):
    curves = EventAccumulator(str(trained.with_name("trained.curves"))).Reload()
    tags = {"loss", "lr", "logit_scale", "duplicates", "samples_local", "samples_streamed", "megabytes", "retries",
            "reread_pairs", "waited_share", "val_loss", "val_recall"}  # fmt: skip
    assert tags <= set(curves.Tags()["scalars"])
    assert [one.step for one in curves.Scalars("loss")] == list(range(1, 25))
    streamed = [one.value for one in curves.Scalars("samples_streamed")]
    assert streamed == sorted(streamed) and streamed[-1] == metrics_of(trained)["samples"]["samples_streamed"]
    assert all(0 <= one.value <= 1 for one in curves.Scalars("waited_share"))
    assert [one.step for one in curves.Scalars("val_recall")] == [8, 16, 24]


def test_the_checkpoints_are_the_models_of_their_epochs(data, trained):
    metrics, table = metrics_of(trained), pd.read_parquet(data.root / "held_out/validation.parquet")
    for name, row in (("model", metrics["chosen"]), ("last", metrics["history"][-1])):
        found = checkpoints.load(trained / f"{name}.safetensors")
        epoch = metrics["history"].index({key: value for key, value in row.items() if key != "epoch"}) + 1
        assert (found.facts.epoch, found.facts.step, found.facts.arm) == (epoch, 8 * epoch, "hybrid")
        assert found.facts.samples_streamed == row["samples_streamed"]
        images = torch.stack([found.transform(Image.open(io.BytesIO(one))) for one in table["image"]])
        with torch.no_grad():
            pixels = transforms.normalise(images, found.facts.preprocess_cfg)
            image = found.model.encode_image(pixels, normalize=True)
            text = found.model.encode_text(found.tokenizer(list(table["caption"])), normalize=True)
        similarity, ids = image @ text.T, torch.tensor(table["caption_id"].tolist())
        equal = ids[:, None] == ids
        best = similarity.masked_fill(~equal, -2).amax(dim=1, keepdim=True)
        wrong = ((similarity >= best - 1e-6) & ~equal).sum(dim=1)
        assert (wrong < 5).double().mean().item() == pytest.approx(row["val_image_to_text_r5"], abs=1e-9)


def test_the_local_arm_asks_nobody_and_has_as_many_steps(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked = len(data.hub.log)
    train_clip.main(training(data.root, tmp_path / "out", arm="local"))
    metrics = metrics_of(tmp_path / "out")
    assert len(data.hub.log) == asked and metrics["steps"] == 24 and metrics["samples"]["samples_streamed"] == 0
    assert metrics["samples"]["seen"] == 288 and len(metrics["history"]) > 3
    assert pd.read_parquet(tmp_path / "out/remote_index.parquet").empty
    assert checkpoints.read(tmp_path / "out/last.safetensors")[0].arm == "local"


def test_a_seed_of_its_own_and_a_start_from_weights(data, trained, tmp_path):
    from vase_fixtures import clip_folder

    folder = clip_folder(tmp_path / "start", seed=1, embed_dim=16)
    out = tmp_path / "out"
    train_clip.main(training(data.root, out, "--seed", "9", "--weights", str(folder), arm="local", lr=1e-9))
    facts, tensors = checkpoints.read(out / "last.safetensors")
    theirs = checkpoints.models.build(train_clip.ModelSettings(), 0, folder).model.state_dict()
    assert facts.seed == 9 and facts.name == "start" and metrics_of(out)["seed"] == 9
    assert all(torch.allclose(value, theirs[name], atol=1e-6) for name, value in tensors.items())
    assert {"weights open_clip_config.json", "weights open_clip_model.safetensors"} <= set(
        json.loads((out / "meta.json").read_text())["inputs"]
    )


@pytest.mark.parametrize(("token", "message"), [(None, "gated"), (TOKEN, "HF_TOKEN")])
def test_a_repo_that_is_closed_stops_before_any_training(data, tmp_path, monkeypatch, capfd, caplog, token, message):
    monkeypatch.setitem(data.hub.gated, f"datasets/{REPO}", "another")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    asked = len(data.hub.log)
    with pytest.raises(KilnError, match=message) as error:
        train_clip.main(training(data.root, tmp_path / "out"))
    assert 1 <= len(data.hub.log) - asked <= 2
    assert list(tmp_path.iterdir()) == []
    told = "".join(capfd.readouterr()) + caplog.text + str(error.value)
    assert TOKEN not in told


def test_a_gated_repo_is_read_and_its_token_is_nowhere(data, trained, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setitem(data.hub.gated, f"datasets/{REPO}", TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level("DEBUG")
    asked = len(data.hub.log)
    train_clip.main(training(data.root, tmp_path / "out", tracker="tensorboard"))
    assert f"Bearer {TOKEN}" in {authorization for *_, authorization in data.hub.log[asked:]}
    assert all((tmp_path / "out" / name).read_bytes() == (trained / name).read_bytes() for name in RESULTS)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in "".join(capfd.readouterr()) + caplog.text + json.dumps(sys.argv)


def test_offline_only_the_local_arm_trains(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(KilnError, match="pairs of an epoch are streamed, and HF_HUB_OFFLINE is set"):
        train_clip.main(training(data.root, tmp_path / "out"))


@pytest.mark.parametrize("flag", ["--hf-token", "--token", "--hf-tok"])
def test_a_token_is_no_flag(data, tmp_path, flag):
    with pytest.raises(KilnError, match="a token is no flag") as error:
        train_clip.main(training(data.root, tmp_path / "out", flag, TOKEN))
    assert TOKEN not in str(error.value) and "HF_TOKEN" in error.value.hint


def killed(index: int, at: int, inside: bool, endpoint: str, arguments: list[str]) -> None:
    """Train until step `at`, and be gone: between two steps, or when the first file of a save is written."""
    os.environ["HF_ENDPOINT"] = endpoint
    from scripts.common import training_state

    save, write, now = training_state.TrainingState.save, training_state._save_synced, []

    def killed_before(self, step, payload):
        if step == at and not inside:
            os._exit(9)
        now[:] = [step]
        save(self, step, payload)

    def killed_inside(value, path):
        write(value, path)
        if now == [at] and inside:
            os._exit(9)

    training_state.TrainingState.save, training_state._save_synced = killed_before, killed_inside
    train_clip.main(arguments)
    sys.exit("not killed")


@pytest.mark.slow
def test_killed_in_mid_epoch_and_in_a_save_it_ends_with_the_same_bytes(data, trained, tmp_path):
    """In the midst of the first epoch and of the last; every step saves; the number of readers changes too."""
    out = tmp_path / "out"
    rng = np.random.default_rng(4)
    for at, inside, workers in ((int(rng.integers(3, 8)), False, 1), (int(rng.integers(17, 24)), True, 0)):
        arguments = training(data.root, out, workers=workers, save_minutes=0)
        with pytest.raises(torch.multiprocessing.ProcessExitedException) as error:
            torch.multiprocessing.spawn(killed, (at, inside, data.hub.url, arguments), nprocs=1)
        assert error.value.exit_code == 9
        assert bool(list((tmp_path / "out.state").glob("*/*.partial"))) == inside
        assert not (out / "meta.json").exists()
    train_clip.main(training(data.root, out, workers=2))
    for name in RESULTS:
        assert (out / name).read_bytes() == (trained / name).read_bytes(), name
    assert json.loads((out / "meta.json").read_text())["reading"]["reread_pairs"] > 0
