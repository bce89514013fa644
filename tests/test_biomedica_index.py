"""The index of local shards: every key accounted for, equal bytes whatever the history, pairs read back by offset."""

import json
import os
import pickle
import tarfile
import threading
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from biomedica_fixtures import key, members, pair, picture, tar_bytes, write_shard, write_shards

from scripts.biomedica import index_local, local
from scripts.biomedica.local import LocalPairs
from scripts.biomedica.pairs import Pair
from scripts.biomedica.settings import HeldOutSettings
from scripts.biomedica.sides import SIDES, side_of
from scripts.common import images
from scripts.common.errors import KilnError

HELD_OUT = {"validation": 0.2, "test": 0.2}
FILES = ("index.parquet", "shards.parquet", "rejected.tsv", "summary.json")


@pytest.fixture(autouse=True)
def all_lines(caplog):
    caplog.set_level("INFO", logger="kiln")


def run(folder, out="index", shards="shards", threads=1, **held_out) -> Path:
    """Index `folder`/shards into `folder`/`out`, with the state of earlier runs."""
    options = [] if shards is None else ["--shards", str(folder / shards)]
    settings = {"held_out": HELD_OUT | held_out, "index": {"processes": threads}}
    index_local.main(
        [*options, "--state-folder", str(folder / "state"), "--output-folder", str(folder / out), "--settings",
         json.dumps(settings), "--meta", str(folder / out / "meta.json"), "--threads", str(threads)]
    )  # fmt: skip
    return folder / out


def summary(out) -> dict:
    return json.loads((out / "summary.json").read_text())


def rejected(out) -> list[tuple]:
    frame = pd.read_csv(out / "rejected.tsv", sep="\t", keep_default_na=False)
    return list(frame.itertuples(index=False, name=None))


def contents(out) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in FILES}


ODD = {
    1: {"txt": ""}, 2: {"txt": "No caption found"}, 4: {"jpg": picture(4, (1, 1))}, 5: {"txt": b"caf\xe9"},
    7: {"jpg": picture(7)[:-200]}, 8: {"json": None}, 9: {"txt": None},
}  # fmt: skip


@pytest.fixture
def world(tmp_path):
    """Three shards; the second has odd pairs, the third lies deeper and is cut in its fourth pair."""
    write_shards(tmp_path / "shards", 2, 12)
    content = [part for n in range(12, 24) for part in members(pair(n, **ODD.get(n - 12, {})))]
    (tmp_path / "shards/0_200000001.tar").write_bytes(tar_bytes([*content, ("../x.jpg", b"")]))
    path = write_shard(tmp_path / "shards/deeper/c.tar", map(pair, range(24, 30)))
    with tarfile.open(path) as tar:
        cut = tar.getmember(f"{key(27)}.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:cut])
    for path in (tmp_path / "shards").rglob("*.tar"):
        os.utime(path, ns=(10**18, 10**18))
    return tmp_path


def test_every_key_is_a_pair_or_has_a_reason(world, caplog):
    out = run(world)
    index, shards = pd.read_parquet(out / "index.parquet"), pd.read_parquet(out / "shards.parquet")
    good = [n for n in range(27) if n not in {12 + odd for odd in ODD} - {20}]
    assert list(index["key"]) == [key(n) for n in good]
    assert list(index["side"]) == [side_of(f"PMC{1000 + n // 3}", HeldOutSettings(**HELD_OUT)) for n in good]
    assert index["side"].nunique() > 1 and set(index["side"]) <= set(SIDES)
    assert index[["shard", "image_offset"]].apply(tuple, axis=1).is_monotonic_increasing
    assert list(index["meta_bytes"] == 0) == [n == 20 for n in good]
    second = "0_200000001.tar"
    assert [(shard, name, status, why.split(":")[0]) for shard, name, status, why in rejected(out)] == [
        (second, "../x", "quarantined", "name with .."),
        (second, key(13), "rejected", "empty caption"),
        (second, key(14), "rejected", "no caption"),
        (second, key(16), "rejected", "small image"),
        (second, key(17), "quarantined", "caption not UTF-8"),
        (second, key(19), "quarantined", "image"),
        (second, key(21), "quarantined", "incomplete"),
        ("deeper/c.tar", key(27), "quarantined", "incomplete"),
    ]
    sizes = [(world / "shards" / name).stat().st_size for name in shards["shard"]]
    assert list(shards["shard"]) == ["0_200000000.tar", second, "deeper/c.tar"]
    assert list(shards["bytes"]) == sizes and list(shards["mtime_ns"]) == [10**18] * 3
    assert list(shards["samples"]) == [12, 6, 3] and list(shards["rejected"]) == [0, 3, 0]
    assert list(shards["quarantined"]) == [0, 4, 1] and shards["train"].sum() == (index["side"] == "train").sum()
    assert list(shards["tar_bytes_per_sample"]) == pytest.approx([sizes[0] / 12, sizes[1] / 6, sizes[2] / 3])
    assert list(shards["reason"] == "") == [True, True, False] and "truncated" in shards["reason"][2]
    found = summary(out)
    assert (found["in"], found["samples"], found["rejected"], found["quarantined"]) == (29, 21, 3, 5)
    assert found["sides"] == {side: int((index["side"] == side).sum()) for side in SIDES}
    assert found["panel_types"] == index["panel_type"].value_counts().sort_index().to_dict()
    assert found["panel_types"]["unknown"] == found["without_json"] == 1
    assert found["reasons"]["incomplete"] == 2 and sum(found["reasons"].values()) == 8
    assert found["bytes_per_sample"] == pytest.approx((sizes[0] + sizes[1]) / 18)  # the cut shard is no measure
    assert (found["shards"], found["damaged_shards"], found["bytes"]) == (3, 1, sum(sizes))
    assert "deeper/c.tar: 3 pairs before the damage are used; truncated" in caplog.text


def test_pairs_read_back_are_those_of_the_shards(world):
    out = run(world)
    pairs = LocalPairs(out, world / "shards")
    index = pd.read_parquet(out / "index.parquet")
    assert len(pairs) == len(index)
    for side in SIDES:
        assert list(pairs.rows(side)) == list(index.index[index["side"] == side])
    for copy in (pairs, pickle.loads(pickle.dumps(pairs))):
        for row, facts in enumerate(index.itertuples()):
            number = int(facts.key[-5:], 16)
            given = copy.read(row)
            assert copy.key(row) == facts.key
            assert given == Pair(
                key(number), facts.article, facts.side, f"Figure {number}.", facts.caption_id, picture(number), 32, 24,
                facts.panel_type, facts.panel_subtype,
            )  # fmt: skip
            assert images.open_rgb(given.image, 10**6).size == (given.width, given.height)


def test_the_result_does_not_depend_on_history_or_processes(world, caplog):
    folder = world / "shards"
    whole = contents(run(world))
    assert "3 of 3 shards to read" in caplog.text
    caplog.clear()
    assert contents(run(world, "again")) == whole and "0 of 3 shards to read" in caplog.text
    # one shard less, another rewritten, then all as it was
    hidden, rewritten = folder / "0_200000000.tar", folder / "deeper/c.tar"
    before, cut = hidden.read_bytes(), rewritten.read_bytes()
    hidden.unlink()
    write_shard(rewritten, map(pair, range(24, 30)))
    caplog.clear()
    less = run(world, "less")
    assert "1 of 2 shards to read" in caplog.text
    assert summary(less)["samples"] == 12 and summary(less)["damaged_shards"] == 0
    for path, data in ((hidden, before), (rewritten, cut)):
        path.write_bytes(data)
        os.utime(path, ns=(10**18, 10**18))
    caplog.clear()
    assert contents(run(world, "back")) == whole and "1 of 3 shards to read" in caplog.text
    (world / "state").rename(world / "elsewhere")
    assert contents(run(world, "fresh", threads=2)) == whole
    assert pq.ParquetFile(world / "index/index.parquet").num_row_groups == 3


def test_other_shares_read_no_shard_again(world, caplog):
    first = pd.read_parquet(run(world) / "index.parquet")
    caplog.clear()
    second = pd.read_parquet(run(world, "other", test=0.7) / "index.parquet")
    assert "0 of 3 shards to read" in caplog.text
    assert (second["side"] == "test").sum() > (first["side"] == "test").sum()
    assert first.drop(columns="side").equals(second.drop(columns="side"))


def test_a_damaged_state_is_read_anew(world, caplog):
    whole = contents(run(world))
    for path in (world / "state").rglob("*.json"):
        path.write_text("{")
    assert contents(run(world, "again")) == whole and "is read anew" in caplog.text


def test_of_a_key_in_two_shards_the_first_is_used(tmp_path):
    write_shards(tmp_path / "shards", 1, 6)
    write_shard(tmp_path / "shards/copy.tar", map(pair, range(4, 8)))
    out = run(tmp_path)
    assert list(pd.read_parquet(out / "index.parquet")["key"]) == [key(n) for n in range(8)]
    assert [row[:3] for row in rejected(out)] == [("copy.tar", key(n), "quarantined") for n in (4, 5)]
    assert all(row[3].startswith("duplicate key: ") for row in rejected(out))
    found = summary(out)
    assert (found["in"], found["samples"], found["quarantined"]) == (10, 8, 2)


@pytest.mark.parametrize("case", ["none", "missing", "empty"])
def test_without_shards_all_is_streamed_and_said_so(case, tmp_path, caplog):
    if case == "empty":
        (tmp_path / "shards").mkdir()
        (tmp_path / "shards/notes.txt").write_text("x")
    out = run(tmp_path, shards=None if case == "none" else "shards")
    where = {"none": "no folder is set", "missing": "no folder shards", "empty": "no .tar in shards"}[case]
    assert summary(out)["note"] == f"no local shards ({where}): all pairs are streamed"
    assert summary(out)["note"] in caplog.text
    assert summary(out)["in"] == 0 and summary(out)["bytes_per_sample"] is None
    assert len(pd.read_parquet(out / "shards.parquet")) == 0 and rejected(out) == []
    pairs = LocalPairs(out, None)
    assert len(pairs) == 0 and not len(pairs.rows("train"))


def test_a_shard_without_a_usable_pair_is_listed(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/a.tar").write_bytes(b"<html>not found</html>" * 100)
    out = run(tmp_path)
    row = pd.read_parquet(out / "shards.parquet").iloc[0]
    assert (row["samples"], row["reason"].split(" at ")[0]) == (0, "damaged header")
    assert summary(out)["bytes_per_sample"] is None and summary(out)["damaged_shards"] == 1
    assert len(LocalPairs(out, tmp_path / "shards").rows("train")) == 0


# --- faults while reading back ---


def test_a_shard_that_changed_since_is_refused(world):
    out, path = run(world), world / "shards/0_200000000.tar"
    pairs, data = LocalPairs(out, world / "shards"), path.read_bytes()
    assert pairs.read(0).key == key(0)
    os.utime(path, ns=(5, 5))  # in place, while it is open
    with pytest.raises(KilnError, match=r"0_200000000\.tar: .* changed at 5 ns, but was indexed with"):
        pairs.read(0)
    assert pairs.read(12).key  # the others are as they were
    path.write_bytes(data[:-512])
    os.utime(path, ns=(10**18, 10**18))
    with pytest.raises(KilnError, match=f"{len(data) - 512} bytes"):
        LocalPairs(out, world / "shards").read(0)
    path.unlink()
    with pytest.raises(KilnError, match=r"cannot be read \(No such file") as caught:
        LocalPairs(out, world / "shards").read(0)
    assert key(0) in str(caught.value) and "biomedica_index_local" in caught.value.hint


def test_an_index_without_its_folder_or_its_tables_is_refused(world):
    out = run(world)
    with pytest.raises(KilnError, match="21 local pairs, but no folder"):
        LocalPairs(out, None)
    (out / "shards.parquet").unlink()
    with pytest.raises(KilnError, match=r"shards\.parquet: no such table"):
        LocalPairs(out, world / "shards")
    (out / "index.parquet").write_bytes(b"x")
    with pytest.raises(KilnError, match=r"index\.parquet: unreadable table"):
        LocalPairs(out, world / "shards")


def test_threads_that_push_each_others_files_out_read_what_they_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "OPEN_SHARDS", 1)
    write_shards(tmp_path / "shards", 4, 3)
    pairs = LocalPairs(run(tmp_path), tmp_path / "shards")
    wrong = []

    def read(seed):
        for turn in range(60):
            row = (seed * 7 + turn * 5) % 12
            if pairs.read(row)[:1] + pairs.read(row)[5:6] != (key(row), picture(row)):
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not wrong
    open_files = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if n.isdigit()
                  and os.path.exists(f"/proc/self/fd/{n}")]  # fmt: skip
    assert sum(str(tmp_path / "shards") in one for one in open_files) == 1


def test_a_shard_that_grows_while_it_is_read_stops_the_run(tmp_path, monkeypatch):
    path = write_shards(tmp_path / "shards", 1, 3)[0]
    check = index_local.check

    def growing(raw, *rest, **options):
        with path.open("ab") as file:
            file.write(b"\0" * 512)
        return check(raw, *rest, **options)

    monkeypatch.setattr(index_local, "check", growing)
    with pytest.raises(KilnError, match="it changed while shards were read"):
        run(tmp_path)
    monkeypatch.undo()
    assert summary(run(tmp_path))["samples"] == 3
