"""What `make prune` lists and removes, and what it never touches."""

import json
import os
import socket
import time
from pathlib import Path

import pytest
import yaml

from scripts import prune as cli
from scripts.common import heartbeat, locks, prune, sizes, spent

OLD = "a" * 16
NEW = "b" * 16


def put(path: Path, text: str = "x" * 5000, days: float = 0) -> Path:
    """A file that last changed so many days ago, and the folders above it with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    for one in (path, *path.parents[:3]):
        age(one, days)
    return path


def age(path: Path, days: float) -> None:
    when = time.time() - days * prune.DAY
    os.utime(path, (when, when))


def state(folder: Path, days: float = 0, **told) -> Path:
    """A training's state folder, with a heartbeat of that age."""
    put(folder / locks.WRITER_LOCK, "{}", days)
    facts = {"updated": time.time() - days * prune.DAY, "host": socket.gethostname()} | told
    put(folder / heartbeat.NAME, json.dumps(facts), days)
    put(folder / "step-000000007/shared.pt", days=days)
    age(folder, days)
    return folder


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """A results folder of busi whose rules have variants, and a configuration that names `main` and `low`."""
    monkeypatch.chdir(tmp_path)
    made = tmp_path / "results"
    made.mkdir()
    patterns = ["busi/train_lora/{variant,main|low}/{method}/meta.json", "busi/split/splits.csv"]
    patterns += ["logs/busi/evaluate/{variant}.log", "benchmarks/busi/evaluate/{variant}.tsv"]
    prune.remember_variants(made, patterns)
    config = {"busi": {"variants": {"low": {"train": {"lr": 1e-5}, "seeds": [0, 1]}}}}
    Path("a.yaml").write_text(yaml.safe_dump(config))
    return made


def left(results: Path) -> set[str]:
    return {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}


def test_nothing_is_removed_without_yes(results, capsys):
    put(results / "busi/train_lora/gone/lora/meta.json", days=2)
    before = left(results)
    cli.main(["--results", str(results), "--configfile", "a.yaml"])
    printed = capsys.readouterr().out
    assert "variants: busi/train_lora/gone" in printed
    assert printed.rstrip().endswith(f"--results {results} --configfile a.yaml --yes")
    assert left(results) == before


def test_variants_go_that_no_configuration_names(results, capsys):
    for variant in ("main", "low-0", "low-1", "gone", "other"):
        put(results / f"busi/train_lora/{variant}/lora/meta.json", days=2)
        put(results / f"logs/busi/evaluate/{variant}.log", days=2)
        put(results / f"benchmarks/busi/evaluate/{variant}.tsv", days=2)
    put(results / "busi/split/splits.csv", days=2)
    Path("b.yaml").write_text(yaml.safe_dump({"busi": {"variants": {"other": {}}}}))
    command = ["--results", str(results), "--configfile", "a.yaml", "--yes"]
    cli.main([*command, "--configfile", "b.yaml"])
    kept = left(results)
    assert not [name for name in kept if "gone" in name]
    assert len([name for name in kept if name.count("other")]) == 3
    cli.main(command)
    kept = left(results)
    assert not [name for name in kept if "other" in name]
    assert {f"busi/train_lora/{one}/lora/meta.json" for one in ("main", "low-0", "low-1")} < kept
    assert "busi/split/splits.csv" in kept


def test_a_variant_that_may_be_in_use_stays(results):
    """One whose results have just changed, and all of one that trains."""
    put(results / "busi/train_lora/fresh/lora/meta.json")
    put(results / "busi/train_lora/gone/lora/meta.json", days=2)
    with locks.writer_lock(state(results / f"state/busi/train_lora/gone/lora/{OLD}", days=2), owner="training"):
        cli.main(["--results", str(results), "--configfile", "a.yaml", "--yes"])
        assert (results / f"state/busi/train_lora/gone/lora/{OLD}/step-000000007/shared.pt").is_file()
    assert "busi/train_lora/fresh/lora/meta.json" in left(results)
    assert "busi/train_lora/gone/lora/meta.json" in left(results)
    for path in results.rglob("*"):
        age(path, 2)
    cli.main(["--results", str(results), "--configfile", "a.yaml", "--yes"])
    assert not [name for name in left(results) if "gone" in name]


def test_states(results, capsys):
    """Spent ones go, those of trainings that stopped stay unless they are as old as the user says."""
    done = state(results / f"state/busi/train_lora/main/lora/{OLD}", days=3)
    put(results / "busi/train_lora/main/lora/meta.json", days=2)
    stopped = state(results / f"state/busi/train_lora/main/qlora/{OLD}", days=20)
    newer = state(results / f"state/busi/train_lora/main/qlora/{NEW}", days=5)
    resumed = state(results / f"state/coca/train/{OLD}", days=1)  # its results are of before
    put(results / "coca/train/meta.json", days=30)
    marked = state(results / f"state/rae/train_autoencoder/dinov2/{OLD}", days=1)
    record = put(results / "elsewhere/meta.json")
    put(marked.parent / spent.MARK, json.dumps({"record": str(record)}))
    command = ["--results", str(results), "--configfile", "a.yaml", "--yes"]
    cli.main(command)
    assert not done.parent.exists() and not marked.parent.exists()
    assert stopped.exists() and newer.exists() and resumed.exists()
    assert "unfinished" in capsys.readouterr().out
    cli.main([*command, "--older-than", "14"])
    assert not stopped.exists() and newer.exists() and resumed.exists()


@pytest.mark.parametrize("where", ["here", "another node"])
def test_a_training_that_runs_keeps_its_state(results, where, capsys):
    folder = results / f"state/coca/train/{OLD}"
    command = ["--results", str(results), "--configfile", "a.yaml", "--yes", "--older-than", "0"]
    if where == "here":
        with locks.writer_lock(state(folder, days=40), owner="training"):
            cli.main(command)
    else:
        state(folder, days=40, updated=time.time() - 60, host="node17")
        cli.main(command)
    assert folder.exists()
    assert "running: state/coca/train" in capsys.readouterr().out
    age(folder, 40)
    put(folder / heartbeat.NAME, json.dumps({"updated": time.time() - 9e4, "host": "node17"}), 40)
    cli.main(command)
    assert not folder.exists()


def test_of_what_steps_keep_the_newest_stays(results):
    for name, days in ((OLD, 9), (NEW, 2)):
        put(results / f"state/vase/embed_images/{name}/s00000.keys", days=days)
        put(results / f"state/coca/list_slides/{name}.parquet", days=days)
    put(results / "state/vase/shards.parquet", days=90)
    cli.main(["--results", str(results), "--configfile", "a.yaml", "--yes"])
    kept = left(results)
    assert {f"state/vase/embed_images/{NEW}/s00000.keys", f"state/coca/list_slides/{NEW}.parquet"} < kept
    assert "state/vase/shards.parquet" in kept and not [name for name in kept if OLD in name]


def test_leftovers(results, capsys):
    """A dead process's half-written files go after a day; the only copy of a folder, and a living one's, never."""
    dead, alive = 2**22 + 1, os.getpid()  # above the largest pid
    going = put(results / f"vase/split/.splits.parquet.{dead}.tmp", days=2)
    young = put(results / f"vase/split/.audit.json.{dead}.tmp")
    mine = put(results / f"vase/split/.meta.json.{alive}.tmp", days=2)
    only = put(results / f"rae/build_arrow/.dataset.{dead}.old/train/data.arrow", days=2)
    age(only.parents[1], 2)
    cli.main(["--results", str(results), "--configfile", "a.yaml", "--yes"])
    assert not going.exists() and young.exists() and mine.exists() and only.exists()
    assert "only copy of dataset" in capsys.readouterr().out


def test_no_link_is_followed(results, tmp_path):
    """Neither out of the results folder nor into a state that lies on another disk."""
    raw = put(tmp_path / "raw/images/one.png", days=90)
    put(tmp_path / f"raw/.half.{2**22 + 1}.tmp", days=90)
    (results / "busi/train_lora").mkdir(parents=True)
    (results / "busi/train_lora/gone").symlink_to(tmp_path / "raw")
    os.utime(results / "busi/train_lora/gone", (1, 1), follow_symlinks=False)
    (results / "vase").symlink_to(tmp_path / "raw")
    scratch = state(tmp_path / f"scratch/coca/train/{OLD}", days=90)
    (results / "state/coca").symlink_to(tmp_path / "scratch/coca")
    cli.main(["--results", str(results), "--configfile", "a.yaml", "--yes", "--older-than", "1"])
    assert raw.is_file() and len(list((tmp_path / "raw").iterdir())) == 2
    assert not (results / "busi/train_lora/gone").is_symlink()
    assert scratch.exists()


def test_the_readme_tells_sizes(results):
    put(results / "vase/embed_images/s00000.arrow", "x" * 3_000_000)
    os.link(results / "vase/embed_images/s00000.arrow", results / "vase/same.arrow")
    (results / "state/vase/embed_images").mkdir(parents=True)
    os.link(results / "vase/embed_images/s00000.arrow", results / "state/vase/embed_images/kept.values")
    put(results / "busi/train_lora/gone/lora/model.bin", "x" * 2_000_000, days=2)
    age(results / "busi/train_lora/gone", 2)
    sizes.write_readme(results, "# What is here", {"busi": {"main"}})
    text = (results / "README.md").read_text()
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert text.startswith("# What is here\n") and "2.0 MB of variants" in text
    both = lines["`vase/embed_images/`"], lines["`state/vase/`"]
    assert sum("3.0 MB" in line for line in both) == 1  # where it is met first
    assert "| 1 |" in lines["`busi/train_lora/`"]


def test_counting_stops_at_its_deadline(results):
    put(results / "vase/split/one")
    assert sizes.Counter(time.monotonic() - 1).count(results) == (0, 0, False)
    assert sizes.Counter(time.monotonic() + 60).count(results / "vase")[1:] == (1, True)
