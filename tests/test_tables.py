"""Tables: bytes that depend on the rows alone, text that stays text, sums that must be right."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.common.errors import KilnError
from scripts.common.tables import read_table, reconcile, write_table

row = st.tuples(
    st.text("aé花B0 ", max_size=3),
    st.integers(-3, 3),
    st.floats(allow_infinity=False) | st.none(),
    st.text() | st.none(),
)
rows = st.lists(row, min_size=1, max_size=12, unique_by=lambda r: (r[0], r[1]))


def frame_of(some: list[tuple]) -> pd.DataFrame:
    frame = pd.DataFrame(some, columns=["path", "view", "score", "reason"])
    return frame.astype({"view": "int64", "score": "float64", "path": "object", "reason": "object"})


@settings(deadline=None)
@given(rows, st.randoms(use_true_random=False))
def test_any_order_of_rows_gives_the_same_bytes(tmp_path_factory, some, random):
    folder = tmp_path_factory.mktemp("tables")
    shuffled = list(some)
    random.shuffle(shuffled)
    frame = frame_of(shuffled)
    frame.index = range(100, 100 + len(frame))
    write_table(folder / "one.parquet", frame_of(some), ["path", "view"])
    write_table(folder / "two.parquet", frame, ["path", "view"])
    assert (folder / "one.parquet").read_bytes() == (folder / "two.parquet").read_bytes()
    back = pq.read_table(folder / "one.parquet")
    keys = list(zip(back["path"].to_pylist(), back["view"].to_pylist(), strict=True))
    assert keys == sorted((r[0], r[1]) for r in some)
    assert back.column_names == ["path", "view", "score", "reason"]
    assert dict(zip(keys, back["reason"].to_pylist(), strict=True)) == {(r[0], r[1]): r[3] for r in some}


def test_tables_of_many_pages_do_not_tell_what_they_were_put_together_from(tmp_path):
    rows = pd.DataFrame({"path": [f"folder/{number:06}/E{number * 7919:09X}.jpg" for number in range(60_000)]})
    written = set()
    for count, order in ((1, None), (7, None), (5, np.random.default_rng(0))):
        numbers = np.arange(len(rows)) if order is None else order.permutation(len(rows))
        parts = [rows.iloc[part].copy() for part in np.array_split(numbers, count)]
        write_table(tmp_path / "table.parquet", pd.concat(parts, ignore_index=True), ["path"])
        written.add((tmp_path / "table.parquet").read_bytes())
    assert len(written) == 1


def test_a_schema_fixes_the_types(tmp_path):
    path = tmp_path / "t.parquet"
    schema = pa.schema([("path", pa.string()), ("width", pa.int32())])
    write_table(path, pd.DataFrame({"path": ["a"], "width": [None]}), ["path"], schema)
    assert pq.read_schema(path) == schema
    write_table(path, pd.DataFrame({"path": [], "width": []}), ["path"], schema)
    assert pq.read_table(path).num_rows == 0


def test_a_doubled_key_is_named_and_nothing_is_written(tmp_path):
    frame = pd.DataFrame({"path": ["a", "b", "b"], "view": [1, 2, 2], "score": [1.0, 2.0, 3.0]})
    with pytest.raises(KilnError) as caught:
        write_table(tmp_path / "t.parquet", frame, ["path", "view"])
    assert "'path': 'b'" in caught.value.message
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []
    write_table(tmp_path / "t.parquet", frame, ["path", "view", "score"])


@pytest.mark.parametrize("name", ["t.csv", "T.CSV"])
def test_csv_names_stay_text(tmp_path, name):
    path = tmp_path / name
    path.write_text("vase,path,label,score\n007,0012.png,1,0.5\nNA,nan,0,\n1e5,1.10,1,NA\n", encoding="utf-8")
    frame = read_table(path, ["path", "vase", "label", "score"])
    assert frame["vase"].tolist() == ["007", "NA", "1e5"]
    assert frame["path"].tolist() == ["0012.png", "nan", "1.10"]
    assert frame["label"].tolist() == [1, 0, 1]
    np.testing.assert_array_equal(frame["score"], [0.5, np.nan, np.nan])


def test_csv_of_a_spreadsheet_reads(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufeffpath,vase\r\n花.png,001\r\n".encode())
    assert read_table(tmp_path / "t.csv", ["path", "vase"]).to_dict("list") == {"path": ["花.png"], "vase": ["001"]}


def test_only_the_named_columns_come_in_the_named_order(tmp_path):
    write_table(tmp_path / "t.parquet", pd.DataFrame({"a": [1], "b": [2], "c": [3]}), ["a"])
    assert list(read_table(tmp_path / "t.parquet", ["c", "a"]).columns) == ["c", "a"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    frame = pd.DataFrame({"path": ["x"], "label": [1]})
    frame.to_csv(path, index=False) if suffix == ".csv" else frame.to_parquet(path)
    with pytest.raises(KilnError) as caught:
        read_table(path, ["path", "view", "side"])
    assert f"{path}: no column view, side; it has path, label" in caught.value.message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.parquet", b""),
        ("t.parquet", b"PAR1 and no more"),
        ("t.parquet", b"a,b\n1,2\n"),
        ("t.csv", b""),
        ("t.csv", b"a,b\n1,2,3\n1,2,3,4\n"),
        ("t.csv", b"path\n\xff\xfe\n"),
    ],
)
def test_an_unreadable_table_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KilnError) as caught:
        read_table(tmp_path / name, ["a"])
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_a_missing_table_is_named(tmp_path, name):
    with pytest.raises(KilnError, match="no such table"):
        read_table(tmp_path / name, ["a"])


@given(st.dictionaries(st.sampled_from(["out", "rejected", "quarantined"]), st.integers(0, 10**6)), st.integers(-2, 2))
def test_sums_must_be_right(parts, off):
    total = sum(parts.values())
    assert reconcile("here", total, **parts) == {"in": total, **parts}
    if off:
        with pytest.raises(KilnError) as caught:
            reconcile("here", total + off, **parts)
        assert "here" in caught.value.message
        assert all(f"{n} {name}" in caught.value.message for name, n in parts.items())
