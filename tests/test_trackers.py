import io
import sys
import time
import types

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.common import trackers
from scripts.common.errors import KilnError


def _read(folder, tag):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_scalars_read_back(tmp_path):
    with trackers.tracker(tmp_path / "a" / "b") as tracker:
        for step in range(3):
            tracker.scalar("loss", step / 4, step)
            tracker.scalar("lr", 0.5, step)
    assert _read(tmp_path / "a" / "b", "loss") == [(0, 0), (1, 0.25), (2, 0.5)]
    assert _read(tmp_path / "a" / "b", "lr") == [(0, 0.5), (1, 0.5), (2, 0.5)]


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("first_step", [0, 5])
def test_resume_takes_back_the_steps_after_the_last_save(tmp_path, first_step, torn):
    with trackers.tracker(tmp_path) as tracker:
        for step in range(9):
            tracker.scalar("loss", 1, step)
    if torn:  # killed in the middle of a write
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:-7])
    time.sleep(1.1)  # event files are ordered by the second they began in
    with trackers.tracker(tmp_path, first_step=first_step) as tracker:
        for step in range(first_step, 12):
            tracker.scalar("loss", 2, step)
    assert _read(tmp_path, "loss") == [(step, 1 if step < first_step else 2) for step in range(12)]


def test_a_flushed_number_and_picture_outlive_the_process(tmp_path):
    Image.new("RGB", (3, 2), (10, 20, 30)).save(tmp_path / "picture.png")
    tracker = trackers.tracker(tmp_path / "a")
    tracker.scalar("loss", 0.5, 7)
    tracker.image("sheet", tmp_path / "picture.png", 7)
    tracker.flush()  # and never closed
    assert _read(tmp_path / "a", "loss") == [(7, 0.5)]
    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    (one,) = events.Images("sheet")
    shown = Image.open(io.BytesIO(one.encoded_image_string))
    assert (one.step, shown.size, shown.getpixel((0, 0))) == (7, (3, 2), (10, 20, 30))


def test_none_writes_nothing(tmp_path):
    with trackers.tracker(tmp_path / "a", "none") as tracker:
        tracker.scalar("loss", 1, 0)
        tracker.image("sheet", tmp_path / "absent.png", 0)
        tracker.flush()
    assert not list(tmp_path.iterdir())


def test_unknown_kind_and_absent_package(tmp_path, monkeypatch):
    with pytest.raises(KilnError, match="unknown tracker"):
        trackers.tracker(tmp_path, "mlflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(KilnError, match="pip install wandb"):
        trackers.tracker(tmp_path, "wandb")


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(KilnError, match="cannot be written"):
        trackers.tracker(tmp_path / "a")


def test_a_full_disk_ends_the_curves_and_not_the_training(tmp_path, monkeypatch, caplog):
    tracker = trackers.tracker(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracker, "_write", full)
    for step in range(3):
        tracker.scalar("loss", 1, step)
    tracker.close()
    assert len([r for r in caplog.records if "no longer recorded" in r.message]) == 1


@pytest.mark.parametrize("mode", [None, "online"])
def test_wandb_is_offline_unless_told_otherwise(tmp_path, monkeypatch, mode):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("end")
    )
    fake = types.SimpleNamespace(
        Settings=dict, init=lambda **arguments: calls.append(arguments) or run, Image=lambda file: ("image", file)
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.delenv("WANDB_MODE") if mode is None else monkeypatch.setenv("WANDB_MODE", mode)
    with trackers.tracker(tmp_path / "vase", "wandb", first_step=4) as tracker:
        tracker.scalar("loss", 0.5, 4)
        tracker.image("sheet", tmp_path / "a.png", 4)
    assert trackers.os.environ["WANDB_MODE"] == (mode or "offline")
    assert (calls[0]["group"], calls[0]["name"], calls[0]["dir"]) == ("vase", "vase-from-4", str(tmp_path / "vase"))
    assert calls[0]["settings"]["save_code"] is False
    assert calls[1:] == [({"loss": 0.5}, 4), ({"sheet": ("image", str(tmp_path / "a.png"))}, 4), "end"]
