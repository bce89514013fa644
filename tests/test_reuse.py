"""What was computed before is found again, whatever happened to files, shards and what is kept; never anything else."""

import itertools
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from vase_fixtures import clip_folder, picture

from scripts.common import artefacts, rehash, reshard, reuse, shards, tables
from scripts.common.errors import KilnError
from scripts.vase import embed_images, inspect_images, list_images

ENDINGS = (".png",)
PER_SHARD = 3
NAMES = [f"{letter}{number}.png" for letter in "ab" for number in range(4)]


@pytest.fixture(autouse=True, scope="module")
def without_git():
    """No process for each record of the many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artefacts, "git_commit", lambda: None)
        yield


class Folder:
    """A folder of pictures, and runs over it as the workflow does them: shards whose digest is new are inspected."""

    def __init__(self, place: Path):
        self.images, self.made, self.state = place / "images", place / "vase/inspect_images", place / "state/vase"
        self.images.mkdir(parents=True)
        self.results, self.table, self.digests = place, self.state / "shards.parquet", {}
        self.clock = itertools.count(1)
        self.content: dict[str, tuple[int, int]] = {}  # path -> (colour, mtime) as files are
        self.known: dict[str, tuple[int, int]] = {}  # as they were at the last run
        self.said: list[str] = []

    def write(self, name: str, colour: int, mtime: int | None = None) -> None:
        mtime = mtime or next(self.clock)
        Image.new("RGB", (2, 2), (colour // 256, colour % 256, 7)).save(self.images / name, compress_level=0)
        os.utime(self.images / name, ns=(mtime, mtime))
        self.content[name] = colour, mtime

    def remove(self, name: str) -> None:
        (self.images / name).unlink()
        del self.content[name]

    def rename(self, name: str, other: str) -> None:
        (self.images / name).rename(self.images / other)
        self.content[other] = self.content.pop(name)

    def inspect(self, table: Path, name: str, out: Path, state: Path | None) -> dict:
        arguments = ["--images", self.images, "--shard-table", table, "--shard", name, "--output", out, "--threads", 1]
        arguments += ["--meta", out.with_suffix(".meta.json"), "--code-key", "same"]
        inspect_images.main([*map(str, arguments), *(["--state-folder", str(state)] if state else [])])
        return json.loads(out.with_suffix(".meta.json").read_text())

    def run(self, reread: bool = False) -> tuple[int, pd.DataFrame]:
        """(how many files were read, the table of all)."""
        table = shards.refresh(
            self.table, self.images, ENDINGS, PER_SHARD, True, self.made.glob("s*.parquet"), self.said.append
        )
        if reread:
            table = rehash.mark_changed(table, self.table, self.images, self.made, True, self.said.append)
        read = 0
        for name in table.names():
            if self.digests.get(name) != table.digest(name) or not (self.made / f"{name}.parquet").exists():
                facts = self.inspect(self.table, name, self.made / f"{name}.parquet", self.state / "inspect_images")
                assert facts["items_computed"] + facts["items_reused"] == len(table.rows(name)) == facts["items"]
                self.digests[name] = table.digest(name)
                read += facts["items_computed"]
        reshard.sweep(self.state.parent)
        self.known = dict(self.content)
        return read, self.all(table, self.made)

    def all(self, table: shards.ShardTable, made: Path) -> pd.DataFrame:
        parts = [pd.read_parquet(made / f"{name}.parquet") for name in table.names()]
        return pd.concat(parts).drop(columns=list_images.HISTORY).sort_values("path", ignore_index=True)

    def from_scratch(self) -> pd.DataFrame:
        place = self.results / "scratch"
        table = shards.refresh(place / "t.parquet", self.images, ENDINGS, 100, True)
        for name in table.names():
            self.inspect(place / "t.parquet", name, place / f"{name}.parquet", None)
        found = self.all(table, place)
        shutil.rmtree(place)
        return found

    def compact(self) -> None:
        reshard.reshard(self.table, self.results, PER_SHARD, dry_run=False)


def kept_of(folder: Folder) -> list[Path]:
    return sorted((folder.state / "inspect_images").glob("*/*"))


PHASES = [phase for phase in Phase if phase is not Phase.shrink]  # an example takes a second
names, colours = st.sampled_from(NAMES), st.integers(0, 400)
changes = st.one_of(
    st.tuples(st.just("write"), names, colours),
    st.tuples(st.just("write"), names, colours),
    st.tuples(st.just("remove"), names, st.none()),
    st.tuples(st.just("rename"), names, names),
    st.tuples(st.just("edit"), names, colours),
    st.tuples(st.just("reshard"), st.none(), st.none()),
    st.tuples(st.just("lose table"), st.none(), st.none()),
    st.tuples(st.just("damage table"), st.none(), st.none()),
    st.tuples(st.just("damage kept"), st.integers(0, 30), st.integers(0, 2000)),
)


def apply(folder: Folder, kind: str, one, other) -> bool:
    """Make a change, if it can be made; whether what is kept was damaged."""
    if kind == "write":
        folder.write(one, other)
    elif kind == "remove" and one in folder.content and len(folder.content) > 1:
        folder.remove(one)
    elif kind == "rename" and one in folder.content and other not in folder.content:
        folder.rename(one, other)
    elif kind == "edit" and one in folder.known and folder.content.get(one) == folder.known[one]:
        folder.write(one, other, folder.content[one][1])
    elif kind == "reshard" and folder.table.exists():
        try:
            folder.compact()
        except KilnError:
            assert folder.table.read_bytes() == b"PAR1"
    elif kind == "lose table":
        folder.table.unlink(missing_ok=True)
    elif kind == "damage table" and folder.table.exists():
        folder.table.write_bytes(b"PAR1")
    elif kind == "damage kept" and (files := kept_of(folder)):
        damage(files[one % len(files)], other)
        return True
    return False


def damage(file: Path, at: int) -> None:
    """Another byte in a file that no other name leads to."""
    data = bytearray(file.read_bytes())
    data[at % len(data)] ^= 0xFF
    file.unlink()
    file.write_bytes(data)


EDITED_BEFORE_RESHARD = [[("edit", "a0.png", 82), ("reshard", None, None)]]  # its shard has no table to compare with


@example(EDITED_BEFORE_RESHARD)
@settings(deadline=None, max_examples=10, phases=PHASES, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(changes, max_size=4), min_size=1, max_size=5))
def test_after_any_history_results_are_those_from_scratch_and_changes_alone_are_read(tmp_path_factory, history):
    place = tmp_path_factory.mktemp("folder")
    folder = Folder(place)
    for number, name in enumerate(NAMES[:5]):
        folder.write(name, number)
    damaged = False  # what is kept, until its shard is next rewritten
    for batch in ([], *history):
        for change in batch:
            damaged |= apply(folder, *change)
        changed = {name for name, facts in folder.content.items() if folder.known.get(name) != facts}
        read, found = folder.run(reread=True)
        pd.testing.assert_frame_equal(found, folder.from_scratch())
        if damaged or any(kind in ("reshard", "lose table", "damage table") for kind, *_ in batch):
            assert read >= len(changed)
        else:
            assert read == len(changed), (changed, batch)
    assert folder.run()[0] == 0
    folder.compact()
    read, found = folder.run()
    pd.testing.assert_frame_equal(found, folder.from_scratch())
    assert (read == 0 or damaged) and len(shards.ShardTable.load(folder.table).names()) == -(
        -len(folder.content) // PER_SHARD
    )
    shutil.rmtree(place)


@pytest.fixture
def folder(tmp_path) -> Folder:
    made = Folder(tmp_path)
    for number, name in enumerate(NAMES):
        made.write(name, number)
    assert made.run()[0] == len(NAMES)
    return made


def test_an_edit_that_keeps_size_and_time_is_found_by_rehash_alone(folder):
    folder.write("a1.png", 300, folder.content["a1.png"][1])
    assert folder.run()[0] == 0
    read, found = folder.run(reread=True)
    assert read == 1 and any("a1.png differs" in line for line in folder.said)
    pd.testing.assert_frame_equal(found, folder.from_scratch())
    assert folder.run(reread=True)[0] == 0


@pytest.mark.parametrize("loss", ["gone", "damaged"])
def test_a_lost_table_is_made_from_those_of_the_shards(folder, loss):
    folder.write("a1.png", 300, folder.content["a1.png"][1])
    folder.run(reread=True)
    folder.write("more.png", 9)
    folder.run()
    folder.remove("b3.png")
    folder.run()
    before = shards.ShardTable.load(folder.table)
    folder.table.unlink() if loss == "gone" else folder.table.write_bytes(b"no table")
    folder.said.clear()
    assert folder.run()[0] == 0
    assert shards.ShardTable.load(folder.table) == before
    assert any("made anew" in line for line in folder.said) and any("damaged" in line for line in folder.said) == (
        loss == "damaged"
    )


@pytest.mark.parametrize("which", [reuse.KEYS, reuse.VALUES])
@pytest.mark.parametrize("at", ["a row", "its hash", "cut", "gone", "other folder"])
def test_what_is_damaged_is_said_and_read_anew(folder, caplog, which, at):
    file = next(file for file in kept_of(folder) if file.name.startswith("s00001") and file.name.endswith(which))
    if at == "cut":
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data[: len(data) // 2])
    elif at == "gone":
        file.unlink()
    elif at == "other folder":
        file.parent.rename(file.parent.with_name("0" * 16))
    elif which == reuse.KEYS:
        data = file.read_bytes()
        keys = pa.ipc.open_file(file).read_all()["key"].to_pylist()
        damage(file, data.index(keys[1]) + 3 if at == "a row" else data.rindex(b'"values"') + 15)
    else:
        damage(file, 40 if at == "a row" else -9)
    folder.digests.clear()
    with caplog.at_level(logging.WARNING, "kiln"):
        read, found = folder.run()
    pd.testing.assert_frame_equal(found, folder.from_scratch())
    assert read == (len(NAMES) if at == "other folder" else PER_SHARD)
    silent = at == "other folder" or (at == "gone" and which == reuse.KEYS)
    assert (str(file.parent) in caplog.text) == (not silent)
    assert folder.run()[0] == 0


def test_a_result_takes_no_space_twice(folder):
    for name in shards.ShardTable.load(folder.table).names():
        (values,) = (file for file in kept_of(folder) if file.name.startswith(name) and file.suffix == reuse.VALUES)
        assert values.samefile(folder.made / f"{name}.parquet")


def test_a_kill_between_its_writes_leaves_what_was_kept_before(folder, monkeypatch):
    folder.write("a0.png", 200)
    monkeypatch.setattr(reuse.pa.ipc, "new_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.run()
    monkeypatch.undo()
    folder.digests.pop("s00000")
    read, found = folder.run()
    assert read == 1
    pd.testing.assert_frame_equal(found, folder.from_scratch())
    assert len(kept_of(folder)) == 2 * len(shards.ShardTable.load(folder.table).names())


def test_what_changed_while_it_was_read_is_not_kept(folder, monkeypatch):
    inspect = inspect_images.inspect_files

    def meanwhile(*arguments):
        found = inspect(*arguments)
        os.utime(folder.images / "a0.png", ns=(1, 1))
        return found

    folder.write("a0.png", 200)
    facts = folder.content["a0.png"]
    monkeypatch.setattr(inspect_images, "inspect_files", meanwhile)
    folder.run()
    monkeypatch.undo()
    folder.write("a0.png", *facts)
    folder.digests.clear()
    assert folder.run()[0] == 1


def test_what_is_kept_of_shards_that_are_no_more_goes_when_the_others_are_complete(folder):
    for name in ("a0.png", "a1.png", "a2.png"):
        folder.remove(name)
    folder.run()
    assert {file.name[:6] for file in kept_of(folder)} == {"s00001", "s00002"}
    folder.write("later.png", 5)
    folder.run()
    assert shards.ShardTable.load(folder.table).names() == ["s00001", "s00002", "s00003"]


def test_reshard_refuses_while_snakemake_runs_and_names_what_it_removes(folder, capsys):
    for number in range(3):
        folder.write(f"more{number}.png", number)
        folder.run()
    before = folder.table.read_bytes()
    lock = folder.results / ".snakemake/locks/0.output.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    options = ["--directory", str(folder.results), "--results", ".", "--per-shard", "100"]
    with pytest.raises(KilnError, match="a Snakemake runs here"):
        reshard.main(options)
    lock.unlink()
    reshard.main([*options, "--dry-run"])
    assert folder.table.read_bytes() == before and (folder.made / "s00000.parquet").exists()
    capsys.readouterr()
    reshard.main(options)
    assert f"remove {folder.results / 'vase/inspect_images/s00000.parquet'}" in capsys.readouterr().out
    assert not (folder.made / "s00000.parquet").exists()
    assert folder.run()[0] == 0
    with pytest.raises(KilnError, match="images_per_shard"):
        reshard.main(options[:-2])
    (folder.results / "config.yaml").write_text("vase: {images_per_shard: 100}\n")
    reshard.main(options[:-2])
    assert "nothing to compact" in capsys.readouterr().out


def test_embeddings_are_found_by_content(tmp_path):
    model = clip_folder(tmp_path / "clip")
    images = tmp_path / "images"
    for number in range(5):
        picture(images / f"{number}.png", number)

    def embed(out: str, state: bool = True) -> tuple[int, dict[str, np.ndarray]]:
        files = sorted(images.iterdir())
        rows = [{"path": p.name, "status": "ok", "sha256": reuse.sha256_file(p)} for p in files]
        tables.write_table(tmp_path / "s00000.parquet", pd.DataFrame(rows), ["path"])
        arguments = ["--images", images, "--shard", tmp_path / "s00000.parquet", "--model", model, "--device", "cpu"]
        arguments += ["--output", tmp_path / out, "--meta", tmp_path / f"{out}.json", "--threads", "1"]
        arguments += ["--state-folder", tmp_path / "state"] if state else []
        embed_images.main([*map(str, arguments), "--settings", '{"workers":0,"batch_size":4}'])
        facts = json.loads((tmp_path / f"{out}.json").read_text())
        return facts["items_computed"], (tmp_path / out).read_bytes()

    assert embed("first.arrow")[0] == 5
    (images / "3.png").rename(images / "z.png")
    (images / "1.png").unlink()
    assert embed("renamed.arrow") == (0, embed("scratch.arrow", state=False)[1])
    picture(images / "0.png", 77)
    assert embed("rewritten.arrow") == (1, embed("scratch.arrow", state=False)[1])
    table = tmp_path / "s00000.parquet"
    frame = pd.read_parquet(table).assign(sha256="0" * 64)
    tables.write_table(table, frame, ["path"])
    arguments = ["--images", images, "--shard", table, "--model", model, "--device", "cpu", "--meta", tmp_path / "m"]
    with pytest.raises(KilnError, match="changed since it was listed"):
        embed_images.main([*map(str, arguments), "--output", str(tmp_path / "x.arrow"), "--threads", "1"])
