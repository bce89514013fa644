"""Room on the disks: what is needed is compared with what is free before any job, and shards can be let go."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import workflow
import yaml
from PIL import Image
from safetensors.torch import save_file

from scripts import needs
from scripts.coca.settings import CocaSettings
from scripts.coca.slide_model import build
from scripts.common import disk, training_state
from scripts.common.disk import Need
from scripts.common.errors import KilnError
from scripts.config import Config
from scripts.rae.decoder import DECODERS, Decoder, Size
from scripts.rae.settings import DecoderSettings

LIGHT = {name: {"threads": 1, "mem_mb": 1000} for name in ("light", "cpu")}


def pictures(folder: Path, number: int, side: int = 24, seed: int = 0) -> None:
    """Draw noise, which no file format makes small."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed)
    for index in range(number):
        Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"p{seed}_{index}.png")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return workflow.copy_checkout(tmp_path_factory.mktemp("disk") / "checkout")


def set_up(run: Path, **values) -> Path:
    (run / "config").mkdir(parents=True, exist_ok=True)
    (run / "config/config.yaml").write_text(yaml.safe_dump({"device": "cpu", "resources": LIGHT, **values}))
    return run


def on_a_small_disk(folder: Path, megabytes: int, script: str) -> str:
    """What `script` prints, run where `folder` is a disk of so many MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = f"exec 2>&1; mount -t tmpfs -o size={megabytes}m none '{folder}' || exit 99\n{script}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", mounted], capture_output=True, text=True, cwd=folder.parent)
    text = done.stdout + done.stderr
    if ("unshare" in text and "permitted" in text) or done.returncode == 99:
        pytest.skip("this machine lets nobody mount a small disk")
    return text


def test_too_small_a_disk_stops_before_any_job(checkout, tmp_path):
    """On a real small disk: Arrow of 3 MB does not fit into 2; another disk's folder is not counted against it."""
    run = set_up(tmp_path / "run", rae={"images": "data/images", "dataset": {"processes": 1}})
    pictures(run / "data/images/train/a", 8, side=360)
    pictures(run / "data/images/val/a", 4, side=64, seed=1)
    target = "results/rae/build_arrow/summary.json"
    inner = " ".join(f"'{part}'" for part in workflow.command(checkout, run, target))
    script = f"{inner}; echo ALL THE SAME; {inner} --config check_disk=false"
    text = on_a_small_disk(run / "results", 2, script)
    first, _, second = text.partition("ALL THE SAME")
    assert "too little room" in first and "TOO LITTLE" in first and "Hint:" in first, first[-3000:]
    (line,) = [line for line in first.splitlines() if line.strip().startswith("rae_build_arrow") and "Arrow" in line]
    wanted = sum(path.stat().st_size for path in (run / "data/images").rglob("*.png"))
    assert disk.size(wanted) in line, (wanted, line)
    assert not workflow.finished(first) and "rule rae_build_arrow" not in first, first
    assert "the shards need" in second, second[-3000:]  # without the check, the step's own


def test_jobs_that_do_not_run_need_nothing(checkout, tmp_path):
    """Once the data set is built, a full disk stops nothing; and the results folder says what it holds."""
    run = set_up(tmp_path / "run", rae={"images": "data/images", "dataset": {"processes": 1}})
    pictures(run / "data/images/train/a", 8, side=64)
    target = "results/rae/build_arrow/summary.json"
    workflow.run(checkout, run, target)
    text = (run / "results/README.md").read_text()
    assert "`rae/build_arrow/`" in text and text.startswith("# results\n") and "\n## The results tree\n" in text
    named = json.loads((run / "results/state/variants.json").read_text())
    places = ("busi/train_lora", "state/busi/train_lora", "logs/busi/train_lora", "benchmarks/busi/evaluate")
    assert set(places) < set(named) and "busi/split" not in named
    (run / "results").rename(run / "kept")
    inner = " ".join(f"'{part}'" for part in workflow.command(checkout, run, target))
    known = f"cp -a '{run}/kept/.' '{run}/results/'; {inner} --dry-run > /dev/null 2>&1"  # that this is a copy
    script = f"{known}; head -c 2M /dev/zero > '{run}/results/filler'; {inner}"
    text = on_a_small_disk(run / "results", 2, script)
    assert "Nothing to be done" in text and "too little room" not in text, text


def test_touching_writes_nothing_and_needs_no_room(checkout, tmp_path):
    run = set_up(tmp_path / "run", rae={"images": "data/images", "dataset": {"processes": 1}})
    pictures(run / "data/images/train/a", 8, side=360)
    target = "results/rae/build_arrow/summary.json"
    inner = " ".join(f"'{part}'" for part in workflow.command(checkout, run, target))
    text = on_a_small_disk(run / "results", 2, f"{inner} --dry-run; echo TOUCH; {inner} --forceall --touch")
    planned, _, touched = text.partition("TOUCH")
    assert "too little room" in planned and "too little room" not in touched, text
    assert "rae_build_arrow" in touched, touched[-3000:]


def test_shards_go_if_the_user_wants_the_room(checkout, tmp_path):
    """Results are the same, nothing is planned afterwards, and flipping the key back and forth reruns nothing."""
    kept, gone = (
        set_up(tmp_path / name, vase={"images": "../images", "images_per_shard": 4, "list": {"view_pattern": None}})
        for name in "ab"
    )
    pictures(tmp_path / "images", 10)
    target = "results/vase/list_images/manifest.parquet"
    let_go = ("--config", "keep_shards=false")
    workflow.run(checkout, kept, target)
    workflow.run(checkout, gone, target, *let_go)
    assert len(list((kept / "results/vase/inspect_images").glob("s*.parquet"))) == 3
    assert not list((gone / "results/vase/inspect_images").glob("s*.parquet"))
    assert (kept / target).read_bytes() == (gone / target).read_bytes()
    assert workflow.planned(checkout, kept, target, *let_go) == workflow.planned(checkout, gone, target) == {}
    pictures(tmp_path / "images", 1, seed=1)
    done = [workflow.run(checkout, kept, target), workflow.run(checkout, gone, target, *let_go)]
    counts = [workflow.finished(one.stdout + one.stderr)["vase_inspect_images"] for one in done]
    assert counts == [1, 4]  # what is gone is made anew
    assert len(pd.read_parquet(gone / target)) == 11
    assert (kept / target).read_bytes() == (gone / target).read_bytes()
    assert not list((gone / "results/vase/inspect_images").glob("s*.parquet"))


def weights(folder: Path, **shapes: tuple[int, ...]) -> Path:
    """A model's folder, whose safetensors hold float32 zeros."""
    folder.mkdir(parents=True)
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def needed(rule: str, config: Config, measured: int | None = None, folder=str, **wildcards: str) -> dict:
    """{what: bytes} of a job of a rule."""
    return {one.what: one.bytes for one in needs.of_rule(rule, needs.Job(config, wildcards, folder, measured))}


def test_a_model_not_yet_retrieved_is_unknown():
    for rule in ("vase_merge_sft", "busi_train_lora", "busi_merge", "vase_train_grpo", "biomedica_train_clip"):
        assert set(needed(rule, Config()).values()) == {None}, rule
    text = disk.table(disk.by_filesystem([("busi_merge", Need(Path("/nowhere"), None, "merged model"))]))
    assert "unknown" in text and "TOO LITTLE" not in text


def test_what_models_need_follows_from_their_files(tmp_path):
    """A LoRA of rank 2 on two layers of 8 x 4 and 4 x 4, and none on the head or the frozen vision tower."""
    place = weights(
        tmp_path / "model",
        **{
            "model.layers.0.self_attn.q_proj.weight": (8, 4),
            "model.layers.0.mlp.up_proj.weight": (4, 4),
            "model.norm.weight": (4,),
            "visual.blocks.0.q_proj.weight": (4, 4),
            "lm_head.weight": (100, 4),
        },
    )
    config = Config.model_validate({"vase": {"vlm": {"model": str(place)}, "sft": {"tuner": {"rank": 2}}}})
    adapter = 4 * 2 * (8 + 4 + 4 + 4)
    saves = config.vase.sft.save_total_limit + 2
    assert needed("vase_train_sft", config) == {"training state": 3 * saves * adapter, "results": 2 * adapter}
    size = (place / "model.safetensors").stat().st_size
    assert needed("vase_merge_sft", config) == {"merged model": size}
    saves = config.vase.grpo.save_total_limit + 2
    assert needed("vase_train_grpo", config) == {"training state": 3 * saves * size, "results": size}


def test_sizes_of_models_that_settings_shape():
    """The formulas give what torch counts."""
    assert needs.SAVES == training_state.KEEP + 1
    assert {name: size[:3] for name, size in DECODERS.items()} == needs.DECODERS
    free = DecoderSettings(size="free", layers=2, width=16, mlp=24, heads=2)
    made = Decoder(8, 4, 32, Size(2, 16, 24, 2))
    assert needs.decoder_parameters(free, 8, 8) == sum(p.numel() for p in made.parameters())
    small = {"dim": 16, "dim_head": 4, "heads": 2, "dim_latents": 12, "unimodal_depth": 2, "image_queries": 3}
    encoder = {"latents": 5, "dim": 8, "depth": 3, "transformer_depth": 2, "heads": 2, "mlp_ratio": 2}
    values = {"model": small, "tokenizer": {"vocabulary": 300}, "list": {"tile_dim": 20}, "encoder": encoder}
    for frozen in (False, True):
        own = {**encoder, "frozen": frozen, "weights": "encoder.bin" if frozen else None}
        coca = CocaSettings.model_validate({**values, "encoder": own})
        count = sum(p.numel() for p in build(coca.model, coca.encoder, 20, 300, 0, 1).parameters())
        assert needs.coca_parameters(coca) == count, frozen


def test_images_slides_and_caches(tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": {"embed_dim": 512}}))
    config = Config.model_validate({"vase": {"clip": {"model": str(tmp_path / "clip")}}})
    assert needed("vase_embed_images", config, 4096) == {"embeddings": 4096 * 512 * 4}
    assert needed("vase_embed_images", config, None) == {"embeddings": None}
    assert needed("coca_encode_slides", config, 100) == {"latents of slides": 100 * 513 * 1280 * 2}
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/shard").write_bytes(bytes(4_000_000))
    config = Config.model_validate(
        {"biomedica": {"remote": {"cache_folder": str(tmp_path / "cache"), "cache_gb": 0.01}}}
    )
    jobs = [needs.Job(config, {"arm": "hybrid", "seed": seed}, str, None) for seed in "123"]
    asked = [("biomedica_train_clip", one) for job in jobs for one in needs.of_rule("biomedica_train_clip", job)]
    (system,) = [one for one in disk.by_filesystem(asked) if any(need[1].startswith("cache") for need in one.needs)]
    assert system.needed == 6_000_000  # three share it, and 4 MB are there


def test_each_filesystem_by_itself(tmp_path, monkeypatch):
    """Folders of one disk count together, of another apart; what does not exist yet is where its parent is."""
    asked = [("a", Need(tmp_path / "x/y", 600, "one")), ("a", Need(tmp_path / "z", 600, "one"))]
    asked += [("b", Need(Path("/dev/shm/none"), 900, "two"))]
    monkeypatch.setattr(disk, "free_bytes", lambda place: 1000)
    systems = disk.by_filesystem(asked)
    assert [(one.needed, one.free) for one in systems] == [(1200, 1000), (900, 1000)]
    with pytest.raises(KilnError) as error:
        disk.require(systems)
    assert "a x 2" in error.value.message and str(tmp_path) in error.value.message
    disk.require(systems[1:])
    said = []
    disk.require(systems, said.append)
    assert said == [str(error.value)]


def test_a_folder_that_two_look_at_is_scanned_once(checkout, tmp_path):
    """The room that Arrow needs and the digest that reruns it: on some disks a scan of ImageNet takes minutes."""
    run = set_up(tmp_path / "run", rae={"images": "data/images", "dataset": {"processes": 1}}, rescan=False)
    pictures(run / "data/images/train/a", 2)
    pictures(run / "data/images/val/a", 2, seed=1)
    done = workflow.run(checkout, run, "results/rae/build_arrow/summary.json", "--dry-run")
    assert (done.stdout + done.stderr).count("no earlier scan of it is known") == 1, done.stdout + done.stderr
