"""Encoding slides once: what is stored is the encoder's output, killed runs carry on, and bad input stops early."""

import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from scripts.coca import checkpoints, encode_slides
from scripts.coca.latents import Latents
from scripts.coca.perceiver import Perceiver
from scripts.coca.settings import EncoderSettings, ModelSettings
from scripts.coca.slide_model import SlideModel, build, encoder_shape
from scripts.common.errors import KilnError

ROOT = Path(__file__).resolve().parents[1]
TILE_DIM, COUNT = 10, 11
ENCODER = {"dim": 12, "latents": 5, "depth": 3, "transformer_depth": 1, "heads": 3}
MODEL = {"dim": 16, "unimodal_depth": 1, "multimodal_depth": 1, "dim_latents": 8, "image_queries": 3, "heads": 2}
KEYS = ("embeddings", "features", "feats")


def write_slides(folder: Path) -> pd.DataFrame:
    """Slides of 1 to 40 tiles under each key, some [1,N,D], some compressed; the rows of their manifest."""
    rng, rows = np.random.default_rng(0), []
    for number in range(COUNT):
        tiles = int(rng.integers(1, 40))
        path, key = Path(f"part{number % 2}") / f"slide-{number}.h5", KEYS[number % 3]
        values = rng.normal(size=(tiles, TILE_DIM)).astype(("float16", "float32")[number % 2])
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(folder / path, "w") as file:
            values = values[None] if number % 4 == 1 else values
            file.create_dataset(key, data=values, **({"compression": "gzip"} if number % 4 == 2 else {}))
        rows.append({"slide": f"slide-{number}", "path": str(path), "tiles": tiles, "dim": TILE_DIM, "key": key})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    table = write_slides(folder / "slides")
    table.sample(frac=1, random_state=0).to_parquet(folder / "manifest.parquet")
    torch.manual_seed(0)
    save_file(Perceiver(TILE_DIM, **ENCODER).state_dict(), folder / "encoder.safetensors")
    return folder


@pytest.fixture(scope="module")
def encoded(data) -> Path:
    """The folder of latents that nothing disturbed."""
    encode_slides.main(command(data, data / "latents"))
    return data / "latents"


def command(data: Path, out: Path, *source: object, encoder=None, **encode) -> list[str]:
    values = {"encoder": {**ENCODER, "chunk_tiles": 7, **(encoder or {})}}
    values["encode"] = {"slides_per_shard": 4, "workers": 0, **encode}
    made = ["--manifest", data / "manifest.parquet", "--slides", data / "slides", "--device", "cpu", "--threads", "1"]
    made += source or ["--encoder-weights", data / "encoder.safetensors"]
    made += ["--state-folder", out.with_suffix(".state"), "--output-folder", out, "--meta", out / "meta.json"]
    return [*map(str, made), "--settings", json.dumps(values)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "meta.json"}


def expected_of(encoder: Perceiver, path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        (dataset,) = file.values()
        tiles = torch.from_numpy(np.asarray(dataset, dtype=np.float32).reshape(1, -1, TILE_DIM))
    with torch.no_grad():
        slide, latents = encoder(tiles)
    return torch.cat([slide[:, None], latents], dim=1)[0].numpy()


def test_what_is_stored_is_what_the_encoder_gives(data, encoded):
    encoder = Perceiver(TILE_DIM, **ENCODER)
    encoder.load_weights(data / "encoder.safetensors")
    table, latents = pd.read_parquet(data / "manifest.parquet"), Latents(encoded)
    assert len(latents) == COUNT and "slide-3" in latents and "slide-99" not in latents
    for row in table.itertuples():
        found = latents.get(row.slide)
        assert found.dtype == np.float16 and isinstance(found, np.memmap) and not found.flags.writeable
        np.testing.assert_allclose(found, expected_of(encoder, data / "slides" / row.path), rtol=2e-3, atol=2e-3)
    summary = json.loads((encoded / "summary.json").read_text())
    assert (summary["slides"], summary["shards"], summary["tiles"]) == (COUNT, 3, table["tiles"].sum())
    meta = json.loads((encoded / "meta.json").read_text())
    assert set(meta["outputs"]) == {"s00000.npy", "s00001.npy", "s00002.npy", "index.parquet", "summary.json"}
    assert latents.encoder_sha256 == meta["inputs"]["encoder"]["sha256"]
    assert not encoded.with_suffix(".state").exists()


@pytest.mark.parametrize("changes", [{"workers": 2}, {"dtype": "float32"}, {"slides_per_shard": 100}])
def test_execution_changes_no_byte_and_shards_no_number(data, encoded, tmp_path, changes):
    encode_slides.main(command(data, tmp_path / "out", **changes))
    ours, first = Latents(tmp_path / "out"), Latents(encoded)
    for number in range(COUNT):
        found = ours.get(f"slide-{number}").astype(first.dtype)
        np.testing.assert_array_equal(found, first.get(f"slide-{number}"))
    if "workers" in changes:
        assert bytes_of(tmp_path / "out") == bytes_of(encoded)


def test_shards_of_an_earlier_run_do_not_stay(data, encoded, tmp_path):
    encode_slides.main(command(data, tmp_path / "out", slides_per_shard=1))
    encode_slides.main(command(data, tmp_path / "out"))
    assert bytes_of(tmp_path / "out") == bytes_of(encoded)


def test_a_stopped_run_carries_on_from_whole_shards(data, encoded, tmp_path, monkeypatch):
    calls, encode = [], encode_slides.encode

    def stop_at(count):
        def instead(*arguments):
            calls.append(1)
            if len(calls) == count:
                raise KeyboardInterrupt
            return encode(*arguments)

        return instead

    monkeypatch.setattr(encode_slides, "encode", stop_at(7))
    with pytest.raises(KeyboardInterrupt):
        encode_slides.main(command(data, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    calls.clear()
    monkeypatch.setattr(encode_slides, "encode", stop_at(None))
    encode_slides.main(command(data, tmp_path / "out"))
    assert len(calls) == COUNT - 4
    assert bytes_of(tmp_path / "out") == bytes_of(encoded)


def test_another_setting_starts_anew(data, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_slides, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        encode_slides.main(command(data, tmp_path / "out"))
    monkeypatch.undo()
    encode_slides.main(command(data, tmp_path / "out", dtype="float32"))
    assert Latents(tmp_path / "out").get("slide-0").dtype == np.float32


KILLED = """
import os, signal, sys
from scripts.coca import encode_slides

at, inside = int(sys.argv[1]), sys.argv[2] == "inside"
encode, calls = encode_slides.encode, []

def counted(*arguments):
    calls.append(1)
    if len(calls) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(*arguments)

def killed(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

if inside:
    encode_slides.encode = counted
else:
    encode_slides.publish = killed
encode_slides.main(sys.argv[3:])
"""


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(data, encoded, tmp_path):
    """SIGKILL in the midst of the second shard, of the third, and when all are there but not published."""
    options = command(data, tmp_path / "out")
    for at, where in ((6, "inside"), (5, "inside"), (0, "after")):
        started = [sys.executable, "-c", KILLED, str(at), where, *options]
        done = subprocess.run(started, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        assert not (tmp_path / "out").exists()
    subprocess.run([sys.executable, "-m", "scripts.coca.encode_slides", *options], cwd=ROOT, check=True)
    assert bytes_of(tmp_path / "out") == bytes_of(encoded)


@pytest.mark.slow
def test_two_processes_equal_one(data, encoded, tmp_path):
    launch = [sys.executable, "-m", "scripts.common.launch", "--processes", "2", "--", "scripts.coca.encode_slides"]
    done = subprocess.run([*launch, *command(data, tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert bytes_of(tmp_path / "out") == bytes_of(encoded)


LARGE = """
import resource, sys
from scripts.coca import encode_slides

# what the interpreter and its libraries take is no matter of tiles
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
encode_slides.main(sys.argv[1:])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"chunks": (1000, 2560)}], ids=["whole", "chunked"])
def test_a_hundred_thousand_tiles_of_2560_take_the_memory_of_the_tiles(tmp_path, options):
    """Half a gigabyte, once."""
    count, rng = 100_000, np.random.default_rng(0)
    block = rng.normal(size=(10_000, 2560)).astype(np.float16)
    (tmp_path / "slides").mkdir()
    with h5py.File(tmp_path / "slides/a.h5", "w") as file:
        made = file.create_dataset("features", (count, 2560), np.float16, **options)
        for start in range(0, count, 10_000):
            made[start : start + 10_000] = block + np.float16(start / count)
    row = {"slide": "a", "path": "a.h5", "tiles": count, "dim": 2560, "key": "features"}
    pd.DataFrame([row]).to_parquet(tmp_path / "manifest.parquet")
    torch.manual_seed(0)
    encoder = Perceiver(2560, **ENCODER)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    arguments = command(tmp_path, tmp_path / "out", encoder={"chunk_tiles": 4096}, dtype="float32")
    done = subprocess.run([sys.executable, "-c", LARGE, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    with h5py.File(tmp_path / "slides/a.h5") as file, torch.no_grad():
        slide, latents = encoder(torch.from_numpy(file["features"][:])[None])  # keys and values of all tiles at once
    found = Latents(tmp_path / "out").get("a")
    np.testing.assert_allclose(found, torch.cat([slide[:, None], latents], dim=1)[0], atol=1e-4)
    assert int(done.stdout.split()[-1]) < 1.4 * count * 2560 * 2


# A checkpoint's encoder


def save_checkpoint(path: Path, tile_dim: int = TILE_DIM, frozen: bool = False) -> SlideModel:
    model, encoder = ModelSettings(**MODEL), EncoderSettings(**ENCODER)
    made = build(model, encoder, tile_dim, 30, 0, 1)
    if frozen:
        made = SlideModel(None, made.coca)
    sha256 = "ab" * 32 if frozen else None
    facts = checkpoints.Facts(tile_dim, encoder_shape(encoder), model.model_dump(), 30, 0, "00", sha256, 1, 1)
    checkpoints.save(path, made, facts)
    return made


def test_a_trained_encoder_is_taken_from_the_checkpoint(data, tmp_path):
    model = save_checkpoint(tmp_path / "model.safetensors")
    # the checkpoint knows its own shape
    encode_slides.main(
        command(data, tmp_path / "out", "--checkpoint", tmp_path / "model.safetensors", encoder={"depth": 7})
    )
    table, latents = pd.read_parquet(data / "manifest.parquet"), Latents(tmp_path / "out", dim=12)
    row = table.iloc[0]
    expected = expected_of(model.encoder, data / "slides" / row["path"])
    np.testing.assert_allclose(latents.get(row["slide"]), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"frozen": True}, "was frozen and is not in it"), ({"tile_dim": 12}, "takes tiles of 12, the slides have 10")],
)
def test_a_checkpoint_without_a_fitting_encoder_is_refused(data, tmp_path, options, message):
    save_checkpoint(tmp_path / "model.safetensors", **options)
    with pytest.raises(KilnError, match=message):
        encode_slides.main(command(data, tmp_path / "out", "--checkpoint", tmp_path / "model.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


# Bad input


def copied(data: Path, tmp_path: Path, change=lambda table: table) -> Path:
    """The data with another manifest."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("slides", "encoder.safetensors"):
        (folder / name).symlink_to(data / name)
    change(pd.read_parquet(data / "manifest.parquet")).to_parquet(folder / "manifest.parquet")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(tiles=t["tiles"] + 1), "when it was listed"),
        (lambda t: t.assign(path="gone.h5"), "gone.h5"),
        (lambda t: t.assign(dim=[9, *t["dim"][1:]]), r"widths \[9, 10\], expected one"),
        (lambda t: t.iloc[:0], "widths"),
        (lambda t: t.drop(columns="key"), "no column key"),
        (lambda t: t.assign(dim=9), "to_kv.weight has shape"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_manifest_that_does_not_fit_stops(data, tmp_path, change, message, workers):
    with pytest.raises(KilnError, match=message) as caught:
        encode_slides.main(command(copied(data, tmp_path, change), tmp_path / "out", workers=workers))
    assert caught.value.hint
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize("weight", [1e5, float("nan")])
def test_latents_that_cannot_be_stored_stop(data, tmp_path, weight):
    encoder = Perceiver(TILE_DIM, **ENCODER)
    torch.nn.init.constant_(encoder.img_norm.weight, weight)
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    source = ("--encoder-weights", tmp_path / "encoder.safetensors")
    with pytest.raises(KilnError, match="slide slide-0: latents that are not finite, or too large for float16"):
        encode_slides.main(command(data, tmp_path / "out", *source))
    assert not list(tmp_path.rglob("*.npy"))


def test_another_encoders_weights_are_refused(data, tmp_path):
    with pytest.raises(KilnError, match="perceiver.latents has shape"):
        encode_slides.main(command(data, tmp_path / "out", encoder={"latents": 6}))
    with pytest.raises(KilnError, match="no such file"):
        encode_slides.main(command(data, tmp_path / "out", "--encoder-weights", tmp_path / "none.bin"))
    assert list(tmp_path.iterdir()) == []


# Reading

FACTS = {"latents": 5, "dim": 12, "dtype": "float16", "encoder_sha256": ""}


def test_a_slide_without_latents_and_another_width_are_refused(encoded):
    with pytest.raises(KilnError, match="no latents of slide other"):
        Latents(encoded).get("other")
    with pytest.raises(KilnError, match="latents of width 12, expected 1280"):
        Latents(encoded, dim=1280)
    with pytest.raises(KilnError, match="summary.json: no such file"):
        Latents(encoded.parent)


def test_a_copy_for_another_process_holds_no_latents(encoded):
    latents = Latents(encoded)
    value = latents.get("slide-0")
    copy = pickle.loads(pickle.dumps(latents))
    assert copy._maps == {}
    np.testing.assert_array_equal(copy.get("slide-0"), value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s00000.npy", b"no array", "unreadable latents"),
        ("s00000.npy", None, "unreadable latents"),
        ("summary.json", b'{"latents": 5}', "not of latents"),
        ("summary.json", json.dumps({**FACTS, "latents": 7}).encode(), r"expected float16 \[n, 8, 12\]"),
        ("index.parquet", b"no table", "unreadable table"),
    ],
)  # fmt: skip
def test_damaged_latents_are_refused(encoded, tmp_path, name, content, message):
    for path in encoded.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(KilnError, match=message):
        Latents(tmp_path).get("slide-0")
