"""Pairs that are held out: which, from where, in what order, and that nothing is lost or doubled on the way."""

import hashlib
import os
from pathlib import Path

import biomedica_fixtures as shards
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.biomedica import held_out, hold_out, index_local
from scripts.biomedica.pairs import Pair, caption_id
from scripts.biomedica.settings import HeldOutSettings
from scripts.biomedica.sides import side_of
from scripts.common import artefacts, hashed, tables
from scripts.common.errors import KilnError

REPO = "me/figures"
SIDES = {"validation": 0.2, "test": 0.2, "seed": 5}
QUICK = {"wait_seconds": 0.001, "max_wait_seconds": 0.01, "read_seconds": 5, "attempts": 3}


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    """No token or proxy of this machine."""
    for name in ("HF_TOKEN", "HF_ENDPOINT", *(one for one in os.environ if one.lower().endswith("_proxy"))):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(monkeypatch, tmp_path):
    with HubServer() as made:
        made.repos[f"datasets/{REPO}"] = {"README.md": b"# figures\n"}
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


def serve(server: HubServer, folder: Path, counts: list[int], first: int = 0, **changed) -> list[str]:
    """Shards of so many pairs each in the repo; their names, in the listing's order."""
    names = []
    for number, count in enumerate(counts):
        path = shards.write_shard(
            folder / f"{number:02d}.tar", [shards.pair(first + i, **changed) for i in range(count)]
        )
        names.append(f"data/{path.name}")
        server.repos[f"datasets/{REPO}"][names[-1]] = path.read_bytes()
        first += count
    return names


def write_settings(folder: Path, repo: str | None, **changed) -> Path:
    values = {"index": {}, "remote": {"repo": repo, **QUICK}, "held_out": SIDES | changed}
    artefacts.write_json(folder / "settings.json", values)
    return folder / "settings.json"


def write_listing(folder: Path, server: HubServer | None) -> Path:
    """What rule biomedica_list_remote writes: shards of the repo, or none."""
    files = server.repos[f"datasets/{REPO}"] if server else {}
    rows = [(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items() if ".tar" in name]
    frame = pd.DataFrame(rows, columns=["name", "bytes", "sha256"])
    frame.loc[::2, "sha256"] = None  # files outside LFS have none
    folder.mkdir(parents=True, exist_ok=True)
    tables.write_table(folder / "shards.parquet", frame, ["name"])
    commit = server.commit(f"datasets/{REPO}") if server else None
    artefacts.write_json(folder / "summary.json", {"repo": REPO, "revision": commit})
    return folder


def build(folder: Path, local: Path | None, server: HubServer | None = None, out: str = "held", **changed) -> Path:
    """The folder of rule biomedica_hold_out, after that of biomedica_index_local."""
    made = write_settings(folder, REPO, **changed)
    given = ["--shards", str(local)] if local else []
    index = folder / "index"
    index_local.main([
        *given, "--output-folder", str(index), "--settings", str(_only(made, "index", "held_out")),
        "--meta", str(index / "meta.json"), "--threads", "1",
    ])  # fmt: skip
    hold_out.main([
        "--index", str(index), *given, "--remote", str(write_listing(folder / "remote", server)),
        "--output-folder", str(folder / out), "--settings", str(made), "--meta", str(folder / out / "meta.json"),
    ])  # fmt: skip
    return folder / out


def _only(path: Path, *keys: str) -> Path:
    wanted = path.with_name("-".join(keys) + ".json")
    artefacts.write_json(wanted, {key: artefacts.read_json(path)[key] for key in keys})
    return wanted


def numbers_of(side: str, count: int, **changed) -> list[int]:
    """Numbers of the fixture's pairs on a side."""
    own = HeldOutSettings(**(SIDES | changed))
    return [one for one in range(count) if side_of(f"PMC{1000 + one // 3}", own) == side]


def test_local_pairs_of_both_sides_with_their_images_in_an_order_of_their_keys_alone(tmp_path):
    shards.write_shards(tmp_path / "shards", count=3, per_shard=30)
    folder = build(tmp_path, tmp_path / "shards")
    summary = artefacts.read_json(folder / "summary.json")
    for side in held_out.SIDES:
        table, numbers = held_out.read(folder / f"{side}.parquet"), numbers_of(side, 90)
        wanted = sorted(map(shards.key, numbers), key=lambda key: hashed.unit(5, key))
        assert table["key"].to_list() == wanted and len(wanted) > 5
        by_key = {shards.key(number): number for number in numbers}
        files = [one for batch in held_out.batches(folder / f"{side}.parquet", 7) for one in batch]
        assert files == [shards.picture(by_key[key]) for key in wanted]
        assert table["caption"].to_list() == [f"Figure {by_key[key]}." for key in wanted]
        assert (
            set(table["source"]) == {held_out.LOCAL} and (table["width"] == 32).all() and (table["height"] == 24).all()
        )
        facts = summary["sides"][side]
        assert facts["pairs"] == facts["local"] == facts["sources"][held_out.LOCAL] == len(numbers)
        assert facts["bytes"] == sum(map(len, files)) and facts["articles"] == len(numbers) // 3
        assert summary["local"][side] == {"in": len(numbers), "kept": len(numbers), "left_out": 0}
        assert facts["panel_types"] == pd.Series([shards.PANELS[n % 3] for n in numbers]).value_counts().to_dict()
    train = pq.read_table(tmp_path / "index/index.parquet", columns=["article", "side"]).to_pandas()
    held = {one for side in held_out.SIDES for one in held_out.read(folder / f"{side}.parquet")["article"]}
    assert not held & set(train[train["side"] == "train"]["article"]) and summary["streamed"] == {}


def test_bytes_do_not_depend_on_which_shard_a_pair_lies_in(tmp_path):
    made = []
    for name, order in (("a", range(60)), ("b", sorted(range(60), key=lambda one: (one % 4, -one)))):
        for start in (0, 20, 40):
            shards.write_shard(tmp_path / name / f"s/{start}.tar", [shards.pair(i) for i in order[start : start + 20]])
        folder = build(tmp_path / name, tmp_path / name / "s")
        made.append([(folder / f"{side}.parquet").read_bytes() for side in held_out.SIDES])
    assert made[0] == made[1]


def test_more_pairs_than_wanted_are_left_out_and_counted(tmp_path):
    shards.write_shards(tmp_path / "shards", count=2, per_shard=45)
    everything, some = (
        build(tmp_path, tmp_path / "shards"),
        build(tmp_path, tmp_path / "shards", out="some", max_pairs=4),
    )
    for side in held_out.SIDES:
        whole, part = (held_out.read(one / f"{side}.parquet")["key"].to_list() for one in (everything, some))
        assert part == whole[:4]
        counts = artefacts.read_json(some / "summary.json")["local"][side]
        assert counts == {"in": len(whole), "kept": 4, "left_out": len(whole) - 4}


def test_without_local_pairs_the_first_shards_are_streamed(tmp_path, server):
    names = serve(server, tmp_path / "served", [30, 30, 30, 30])
    folder = build(tmp_path, None, server)
    summary = artefacts.read_json(folder / "summary.json")
    assert list(summary["streamed"]) == names[:3]
    assert not server.asked(f"GET .*resolve.*{names[3][-6:]}")
    for side in held_out.SIDES:
        table, numbers = held_out.read(folder / f"{side}.parquet"), numbers_of(side, 90)
        assert table["key"].to_list() == list(map(shards.key, numbers))
        assert table["source"].to_list() == [names[number // 30] for number in numbers]
        assert summary["sides"][side]["streamed"] == len(numbers) == sum(summary["sides"][side]["sources"].values())
    kept = sum(one["kept"] for one in summary["streamed"].values())
    assert kept == sum(summary["sides"][side]["pairs"] for side in held_out.SIDES)
    assert sum(one["train"] for one in summary["streamed"].values()) == 90 - kept
    first = [(folder / f"{side}.parquet").read_bytes() for side in held_out.SIDES]
    again = build(tmp_path, None, server, out="again")
    assert first == [(again / f"{side}.parquet").read_bytes() for side in held_out.SIDES]


def test_streaming_ends_with_the_last_pair_that_is_wanted(tmp_path, server):
    names = serve(server, tmp_path / "served", [60, 60])
    folder = build(tmp_path, None, server, max_pairs=2)
    read = artefacts.read_json(folder / "summary.json")["streamed"]
    last = max(numbers_of(side, 60)[1] for side in held_out.SIDES)
    assert list(read) == names[:1] and read[names[0]]["in"] == last + 1
    for side in held_out.SIDES:
        assert held_out.read(folder / f"{side}.parquet")["key"].to_list() == list(
            map(shards.key, numbers_of(side, 60)[:2])
        )


def test_only_a_side_that_lacks_local_pairs_is_filled_up_and_no_pair_comes_twice(tmp_path, server):
    validation, test = (numbers_of(side, 60) for side in held_out.SIDES)
    local = [*numbers_of("train", 60)[:9], *validation, test[0]]
    shards.write_shard(tmp_path / "local/0.tar", [shards.pair(one) for one in local])
    serve(server, tmp_path / "served", [60])  # the local pairs are of the repo too
    folder = build(tmp_path, tmp_path / "local", server)
    found = {side: held_out.read(folder / f"{side}.parquet") for side in held_out.SIDES}
    assert set(found["validation"]["key"]) == set(map(shards.key, validation))
    assert set(found["validation"]["source"]) == {held_out.LOCAL}
    assert found["test"]["key"].to_list() == list(map(shards.key, test))
    assert found["test"]["source"].to_list() == [held_out.LOCAL] + ["data/00.tar"] * (len(test) - 1)
    (counts,) = artefacts.read_json(folder / "summary.json")["streamed"].values()
    assert counts["left_out"] == len(validation) + 1  # of the other side, and the one that is there
    assert counts["in"] == 60


def test_what_cannot_be_used_is_counted_with_its_reason_and_a_cut_shard_said(tmp_path, server):
    held = numbers_of("test", 60)[:4] + numbers_of("validation", 60)[:4]
    changes = [{"txt": ""}, {"jpg": b"no image"}, {"jpg": shards.picture(1)[:300]}, {"txt": None}]
    odd = dict(zip(held, changes * 2, strict=True))
    path = shards.write_shard(tmp_path / "odd.tar", [shards.pair(one, **odd.get(one, {})) for one in range(60)])
    whole = path.read_bytes()
    server.repos[f"datasets/{REPO}"] |= {"data/0.tar": whole, "data/1.tar": whole[: len(whole) // 2]}
    folder = build(tmp_path, None, server)
    found = artefacts.read_json(folder / "summary.json")["streamed"]
    first, second = found["data/0.tar"], found["data/1.tar"]
    assert first["in"] == 60 and first["rejected"] == 2 and first["quarantined"] == 6 and first["reason"] == ""
    assert first["reasons"]["rejected: empty caption"] == 2
    assert sum(first["reasons"].values()) == 8
    assert "truncated" in second["reason"] and second["kept"] == 0  # all of it came before
    for side in held_out.SIDES:
        keys = held_out.read(folder / f"{side}.parquet")["key"].to_list()
        assert keys == [shards.key(one) for one in numbers_of(side, 60) if one not in odd]


@pytest.mark.parametrize("served", [False, True])
def test_too_few_pairs_say_what_to_do_and_leave_nothing(tmp_path, server, served):
    shards.write_shard(tmp_path / "shards/0.tar", [shards.pair(one) for one in numbers_of("train", 60)])
    if served:
        serve(server, tmp_path / "served", [12], first=0, jpg=b"broken")
    with pytest.raises(KilnError, match="0 pairs of side validation, expected at least 2") as error:
        build(tmp_path, tmp_path / "shards", server if served else None)
    assert "raise biomedica.held_out.validation (now 0.2 of all articles)" in error.value.hint
    assert ("biomedica.remote.repo" in error.value.hint) is not served
    assert ("12 pairs of all sides were read from 1 shards" in error.value.message) is served
    assert not list((tmp_path / "held").glob("*"))


def make_pair(number: int) -> Pair:
    text = f"caption {number} β"
    return Pair(str(number), "a", "test", text, caption_id(text), bytes([number]) * number, 30, 40, "unknown", "x")


@settings(deadline=None, max_examples=15)
@given(count=st.integers(1, 3 * held_out.ROWS), size=st.integers(1, 50))
def test_what_is_written_is_read_in_small_groups(tmp_path_factory, count, size):
    path = tmp_path_factory.mktemp("held") / "test.parquet"
    with held_out.writer(path) as add:
        for number in range(count):
            add(make_pair(number), held_out.LOCAL)
    groups = pq.ParquetFile(path).metadata
    assert max(groups.row_group(i).num_rows for i in range(groups.num_row_groups)) <= held_out.ROWS
    assert held_out.read(path)["caption_id"].to_list() == [make_pair(one).caption_id for one in range(count)]
    batches = list(held_out.batches(path, size))
    assert [one for batch in batches for one in batch] == [make_pair(one).image for one in range(count)]
    assert max(map(len, batches)) <= size


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), held_out.writer(tmp_path / "test.parquet") as add:
        add(make_pair(1), held_out.LOCAL)
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(KilnError, match="no such file"):
        held_out.read(tmp_path / "test.parquet")
    with held_out.writer(tmp_path / "test.parquet"):
        pass
    with pytest.raises(KilnError, match="no pairs"):
        held_out.read(tmp_path / "test.parquet")
    (tmp_path / "test.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(KilnError, match="unreadable table"):
        held_out.read(tmp_path / "test.parquet")
    pd.DataFrame({"key": ["a"]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(KilnError, match="no column article"):
        held_out.read(tmp_path / "test.parquet")
    with pytest.raises(KilnError, match="held-out figure k: not an image"):
        held_out.decoded([b"no image"], ["k"])
