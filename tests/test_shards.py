"""Shards: files keep theirs, new files open new ones, and a change touches no other."""

import itertools
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.common.errors import KilnError
from scripts.common.shards import Item, Scan, ShardTable, assign, refresh, scan

PNG = (".png",)


def touch(folder: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def paths(found: Scan) -> list[str]:
    return [item.path for item in found.items]


def homes(table: ShardTable) -> dict[str, str]:
    return {item.path: name for name in table.names() for item in table.items(name)}


edits = st.lists(
    st.tuples(
        st.sets(st.sampled_from([f"{letter}{n}" for letter in "abc" for n in range(6)]), max_size=8),  # added
        st.sets(st.integers(0, 17), max_size=4),  # removed, by number
        st.sets(st.integers(0, 17), max_size=4),  # rewritten, by number
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None)
@given(edits, st.integers(1, 5))
def test_after_any_history(history, per_shard):
    clock = itertools.count(1)
    files: dict[str, Item] = {}
    table = None
    for added, removed, rewritten in history:
        before, old = dict(files), table
        added = added - set(before)
        known = sorted(before)
        gone = {known[n] for n in removed if n < len(known)}
        changed = {known[n] for n in rewritten if n < len(known)} - gone
        files = {name: item for name, item in before.items() if name not in gone}
        files |= {name: Item(name, 1, next(clock)) for name in sorted(added | changed)}
        table = assign(old, Scan(sorted(files.values()), 3), per_shard)

        now = homes(table)
        assert sorted(now) == sorted(files)
        assert sum(len(table.items(name)) for name in table.names()) == len(files)
        assert sorted(item for name in table.names() for item in table.items(name)) == sorted(files.values())
        assert all(table.items(name) == sorted(table.items(name)) for name in table.names())
        assert all(0 < len(table.items(name)) <= per_shard for name in table.names())
        assert table.ignored == 3
        then = homes(old) if old else {}
        assert all(now[name] == then[name] for name in files if name in then)
        existing = set(old.names()) if old else set()
        opened = {now[name] for name in added}
        assert not opened & existing
        assert len(opened) == -(-len(added) // per_shard)
        touched = {then[name] for name in gone | changed}
        for name in existing & set(table.names()):
            assert (table.digest(name) == old.digest(name)) == (name not in touched)


def test_one_added_file_makes_exactly_one_new_shard(tmp_path):
    folder, table = tmp_path / "images", tmp_path / "state/shards.parquet"
    touch(folder, *(f"{n}.png" for n in range(10)))
    first = refresh(table, folder, PNG, 4, write=True)
    assert [len(first.items(name)) for name in first.names()] == [4, 4, 2]
    touch(folder, "000.png")  # sorts before all others
    second = refresh(table, folder, PNG, 4, write=True)
    assert second.names() == [*first.names(), "s00003"]
    assert [item.path for item in second.items("s00003")] == ["000.png"]
    assert all(second.digest(name) == first.digest(name) for name in first.names())


def test_another_shard_size_leaves_old_shards_alone():
    items = [Item(f"{n}", 1, 1) for n in range(6)]
    table = assign(None, Scan(items[:4], 0), 2)
    assert [len(assign(table, Scan(items, 0), 1).items(n)) for n in ("s00000", "s00001", "s00002", "s00003")] == [
        2, 2, 1, 1,
    ]  # fmt: skip


def test_names_go_on_beyond_five_digits():
    table = assign(ShardTable.of({"s99999": [Item("a", 1, 1)]}), Scan([Item("a", 1, 1), Item("b", 1, 1)], 0), 1)
    assert homes(table) == {"a": "s99999", "b": "s100000"}


@pytest.mark.parametrize("other", [Item("b", 1, 2), Item("a", 2, 2), Item("a", 1, 3)])
def test_digest_knows_name_size_and_time(other):
    one = Item("a", 1, 2)
    assert ShardTable.of({"s00000": [one]}).digest("s00000") != ShardTable.of({"s00000": [other]}).digest("s00000")
    assert ShardTable.of({"s00000": [one]}, 5).digest("s00000") == ShardTable.of({"s00001": [one]}).digest("s00001")
    assert Scan([one]).digest() == ShardTable.of({"s00000": [one]}).digest("s00000") != Scan([other]).digest()


def test_digest_does_not_run_items_together():
    one = ShardTable.of({"s00000": [Item("a", 1, 2), Item("b", 3, 4)]})
    other = ShardTable.of({"s00000": [Item("a", 1, 2)]})
    odd = ShardTable.of({"s00000": [Item("a\n1", 1, 2)]})
    assert len({t.digest("s00000") for t in (one, other, odd)}) == 3


def test_scan_finds_files_at_any_depth_sorted_by_path(tmp_path):
    touch(tmp_path, "b.png", "a/z.PNG", "a/b/c/d.Png", "a.txt", "a/b/readme", "花瓶/一 二.png", "no/png", "x.png.bak")
    found = scan(tmp_path, [".PNG"])
    assert paths(found) == ["a/b/c/d.Png", "a/z.PNG", "b.png", "花瓶/一 二.png"]
    assert found.ignored == 4
    facts = (tmp_path / "b.png").stat()
    assert found.items[2] == Item("b.png", facts.st_size, facts.st_mtime_ns)
    assert scan(tmp_path, (".txt", ".bak")).ignored == 6


def test_scan_leaves_dot_files_alone_and_uncounted(tmp_path):
    touch(tmp_path, "a.png", ".b.png", ".hidden/c.png", "d/.DS_Store", "d/.git/e.png")
    assert scan(tmp_path, PNG) == Scan([scan(tmp_path, PNG).items[0]], 0)
    assert paths(scan(tmp_path, PNG)) == ["a.png"]


def test_scan_sees_size_and_time(tmp_path):
    touch(tmp_path, "a.png")
    before = scan(tmp_path, PNG)
    os.utime(tmp_path / "a.png", ns=(1, 1_700_000_000_123_456_789))
    assert scan(tmp_path, PNG).items == [Item("a.png", 1, 1_700_000_000_123_456_789)]
    touch(tmp_path, "a.png", text="longer")
    os.utime(tmp_path / "a.png", ns=(1, before.items[0].mtime_ns))
    assert scan(tmp_path, PNG).items == [Item("a.png", 6, before.items[0].mtime_ns)]


def test_scan_follows_links(tmp_path):
    touch(tmp_path, "elsewhere/sub/a.png", "images/b.png", "single.png")
    (tmp_path / "images/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images/c.png").symlink_to("../single.png")
    (tmp_path / "images/broken.png").symlink_to("nowhere.png")
    (tmp_path / "root").symlink_to("images")
    for folder in ("images", "root"):
        found = scan(tmp_path / folder, PNG)
        assert paths(found) == ["b.png", "c.png", "linked/sub/a.png"]
        assert found.ignored == 1


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_two_links_to_one_folder_both_count_in_whatever_order_they_were_made(tmp_path, order):
    touch(tmp_path, "elsewhere/a.png")
    (tmp_path / "images").mkdir()
    for name in order:
        (tmp_path / "images" / name).symlink_to(tmp_path / "elsewhere")
    assert paths(scan(tmp_path / "images", PNG)) == ["one/a.png", "two/a.png"]


def test_scan_ends_on_link_loops(tmp_path):
    touch(tmp_path, "images/a/b/x.png")
    (tmp_path / "images/a/b/up").symlink_to("../..")
    (tmp_path / "images/a/self").symlink_to(".")
    (tmp_path / "images/other").symlink_to("a")
    assert paths(scan(tmp_path / "images", PNG)) == ["a/b/x.png", "other/b/x.png"]


def hint_of(function, *arguments) -> KilnError:
    with pytest.raises(KilnError) as caught:
        function(*arguments)
    assert caught.value.hint
    return caught.value


def test_a_link_to_itself_is_named(tmp_path):
    touch(tmp_path, "a.png")
    (tmp_path / "odd").symlink_to("odd")
    assert str(tmp_path / "odd") in hint_of(scan, tmp_path, PNG).message


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    touch(tmp_path, "a.png", "locked/b.png")
    listed = os.scandir

    def refuse(place):
        if str(place).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(place))
        return listed(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert str(tmp_path / "locked") in hint_of(scan, tmp_path, PNG).message


def test_missing_and_empty_folders_are_named(tmp_path):
    assert str(tmp_path / "none") in hint_of(scan, tmp_path / "none", PNG).message
    touch(tmp_path, "file.png")
    assert "no such folder" in hint_of(scan, tmp_path / "file.png", PNG).message
    touch(tmp_path, "texts/a.txt", "texts/b/c.txt")
    message = hint_of(scan, tmp_path / "texts", (".png", ".jpg")).message
    assert ".png, .jpg" in message
    assert "2 other files" in message


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"\xff\xfe/a.png", b"caf\xe9.txt"])
def test_a_name_that_is_not_utf8_is_named(tmp_path, name):
    touch(tmp_path, "a.png")
    place = os.path.join(os.fsencode(tmp_path), name)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    os.close(os.open(place, os.O_CREAT))
    assert r"\x" in hint_of(scan, tmp_path, PNG).message


names = st.text(min_size=1).filter(str.isprintable)
numbers = st.integers(0, 2**62)
tables = st.dictionaries(names, st.tuples(st.integers(0, 99), numbers, numbers), max_size=12)


@settings(deadline=None)
@given(tables, st.integers(0, 10**6))
def test_tables_come_back_and_equal_tables_are_equal_bytes(tmp_path_factory, files, ignored):
    folder = tmp_path_factory.mktemp("tables")
    one, other = folder / "one.parquet", folder / "deep/er/other.parquet"
    shards: dict[str, list[Item]] = {}
    for path, (number, *facts) in files.items():
        shards.setdefault(f"s{number:05d}", []).append(Item(path, *facts))
    ShardTable.of(shards, ignored).save(one)
    back = ShardTable.load(one)
    assert back == ShardTable.of(shards, ignored) and back.ignored == ignored
    assert {name: back.items(name) for name in back.names()} == {n: sorted(own) for n, own in shards.items()}
    ShardTable.of(dict(reversed(shards.items())), ignored).save(other)
    assert one.read_bytes() == other.read_bytes()
    shutil.rmtree(folder)


def damaged(content: bytes) -> dict[str, bytes]:
    return {
        "empty": b"",
        "text": b"hello",
        "zeros": bytes(len(content)),
        **{f"cut {n}": content[:n] for n in (3, len(content) // 2, len(content) - 5, len(content) - 1)},
        **{f"overwritten {n}": content[:n] + b"\xa5" * 8 + content[n + 8 :] for n in range(0, len(content) - 8, 16)},
    }


def test_a_damaged_table_is_refused_or_read(tmp_path):
    """Whatever the damage, there is a hint or the table; a traceback would be of no use to anyone."""
    path = tmp_path / "shards.parquet"
    ShardTable.of({"s00000": [Item("a", 1, 2)], "s00001": [Item("b", 3, 4)]}).save(path)
    content = path.read_bytes()
    refused = []
    for name, data in damaged(content).items():
        path.write_bytes(data)
        try:
            ShardTable.load(path)
        except KilnError as error:
            assert str(path) in error.message
            refused.append(name)
    assert {"empty", "text", "zeros"} <= set(refused)
    assert {name for name in damaged(content) if name.startswith("cut")} <= set(refused)


def test_another_table_and_no_table_are_refused(tmp_path):
    pq.write_table(pa.table({"path": ["a"], "label": [1]}), tmp_path / "other.parquet")
    pq.write_table(pa.table({"shard": ["x"], "path": ["a"], "size": [1], "mtime_ns": [1]}), tmp_path / "odd.parquet")
    for name in ("other.parquet", "odd.parquet", "none.parquet"):
        assert str(tmp_path / name) in hint_of(ShardTable.load, tmp_path / name).message


def test_an_unknown_shard_is_named():
    assert "s00009" in hint_of(ShardTable.of({}).items, "s00009").message
    assert "s00009" in hint_of(ShardTable.of({}).digest, "s00009").message


def test_refresh_writes_only_when_something_changed(tmp_path):
    folder, table = tmp_path / "images", tmp_path / "shards.parquet"
    touch(folder, "a.png")
    assert refresh(table, folder, PNG, 2, write=False).names() == ["s00000"]
    assert not table.exists()
    refresh(table, folder, PNG, 2, write=True)
    os.utime(table, ns=(1, 1))
    refresh(table, folder, PNG, 2, write=True)
    assert table.stat().st_mtime_ns == 1
    touch(folder, "note.txt")
    assert refresh(table, folder, PNG, 2, write=False).ignored == 1
    assert table.stat().st_mtime_ns == 1
    refresh(table, folder, PNG, 2, write=True)
    assert ShardTable.load(table).ignored == 1
    (folder / "a.png").unlink()
    touch(folder, "b.png")
    last = refresh(table, folder, PNG, 2, write=True)
    assert ShardTable.load(table) == last
