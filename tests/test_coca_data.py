"""From slide files and labels to manifest, sides and tokenizer: each file and text accounted for, none read whole."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast
from vase_fixtures import ROOT, files_below

from scripts.coca import labels, list_slides, slide_facts, split, train_tokenizer
from scripts.coca.settings import EvaluateSettings, SplitSettings
from scripts.coca.sides import read_splits
from scripts.coca.slides import SlideError, SlideFile, iterate_tiles, open_slide, read_tiles
from scripts.coca.texts import Texts, class_of, identity
from scripts.common import tables
from scripts.common.errors import KilnError

DIM = 6
KEYS = ("embeddings", "features", "feats")
CHINESE = "浸润性导管癌，中等分化（II级）。"
ENGLISH = "Invasive ductal carcinoma, moderately differentiated (grade II)."
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tiles(count=20, dim=DIM, seed=0, dtype="float16"):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(dtype)


def slide(path, data=None, key="embeddings", **options):
    """Write a slide file; the data as given, else twenty tiles that depend on the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = tiles(seed=sum(path.stem.encode())) if data is None else data
    with h5py.File(path, "w") as file:
        file.create_dataset(key, data=data, **options)
    return path


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


# --- one file ---


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("dtype", ["float16", "float32", ">f2", ">f4"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("options", [{}, {"chunks": (7, 4), "compression": "gzip", "shuffle": True}, {"chunks": True}])
def test_every_layout_reads_as_plain_h5py_does(tmp_path, key, dtype, batched, options):
    data = tiles(dtype=dtype)
    if batched and isinstance(options.get("chunks"), tuple):
        options = {**options, "chunks": (1, *options["chunks"])}
    path = slide(tmp_path / "a.h5", data[None] if batched else data, key, **options)
    with h5py.File(path, "a") as file:
        file["coords"] = np.zeros((20, 2), int)
    opened = open_slide(path, KEYS)
    with h5py.File(path) as file:
        chunk = file[key].chunks[-2] if file[key].chunks else 1
    assert opened == SlideFile(path, key, 20, DIM, np.dtype(dtype).newbyteorder("=").name, batched, chunk)
    for start, stop in ((0, None), (0, 20), (3, 11), (19, 20), (5, 5)):
        read = read_tiles(opened, start, stop)
        assert read.dtype == opened.dtype and read.dtype.isnative
        assert np.array_equal(read, data[start:stop])
    assert np.array_equal(np.concatenate(list(iterate_tiles(opened))), data)
    for rows in (1, 3, 8, 100):
        slabs = opened.slabs(rows * DIM * np.dtype(dtype).itemsize)
        assert np.array_equal(np.concatenate([read_tiles(opened, *one) for one in slabs]), data)
        assert all(start % chunk == 0 and stop - start >= min(rows, 20 - start) for start, stop in slabs)
    with pytest.raises(ValueError):
        read_tiles(opened, 3, 21)


def test_the_first_of_the_keys_that_is_a_data_set_is_taken(tmp_path):
    path = slide(tmp_path / "a.h5", tiles(seed=1), "feats")
    with h5py.File(path, "a") as file:
        file["features"], file["tiles/of/it"] = tiles(3, seed=2), tiles(4, seed=3)
        file.create_group("embeddings")
        file["linked"] = h5py.SoftLink("tiles/of/it")
    assert open_slide(path, KEYS).key == "features"
    assert open_slide(path, ("feats", "features")).key == "feats"
    assert open_slide(path, ("tiles/of/it",)).tiles == open_slide(path, ("linked",)).tiles == 4
    assert np.array_equal(read_tiles(open_slide(path, ("linked",))), tiles(4, seed=3))
    with pytest.raises(
        SlideError, match="no data set x or y: it has 'embeddings', 'feats', 'features', 'linked', 'tiles'"
    ):
        open_slide(path, ("x", "y"))


def referenced(file):
    file["embeddings"] = tiles()
    return file["embeddings"].ref


def external(path):
    slide(path.with_name("elsewhere.h5"), key="x")
    return h5py.ExternalLink("elsewhere.h5", "x")


def damage_chunk(path):
    slide(path, np.zeros((30, DIM), "f4"), chunks=(30, DIM), compression="gzip")
    with h5py.File(path) as file:
        place = file["embeddings"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[place : place + 6] = b"\xff" * 6
    path.write_bytes(data)


FAULTS = {
    "empty file": lambda path, file: None,
    "no HDF5 file": lambda path, file: None,
    "external link: 'embeddings'": lambda path, file: file.update({"embeddings": external(path)}),
    "external link: 'other/place'": lambda path, file: file.update(
        {"embeddings": tiles(), "other/place": external(path)}
    ),
    "external link: 'group'": lambda path, file: file.update(
        {"group": h5py.ExternalLink("elsewhere.h5", "/"), "embeddings": h5py.SoftLink("/group/x")}
    ),
    "soft link in a circle": lambda path, file: file.update(
        {"embeddings": h5py.SoftLink("/feats"), "feats": h5py.SoftLink("embeddings")}
    ),
    "object references: 'index'": lambda path, file: file.create_dataset(
        "index", data=[referenced(file)], dtype=h5py.ref_dtype
    ),
    "object references: 'regions'": lambda path, file: file.create_dataset(
        "regions", shape=(1,), dtype=np.dtype([("of", "i4"), ("at", h5py.regionref_dtype)])
    ),
    "object references: 'lists'": lambda path, file: file.create_dataset(
        "lists", shape=(1,), dtype=h5py.vlen_dtype(h5py.ref_dtype)
    ),
    "external data": lambda path, file: file.create_dataset(
        "embeddings", (4, DIM), "f4", external=[(str(path.with_name("raw.bin")), 0, 4 * DIM * 4)]
    ),
    "type: 'embeddings' is float64": lambda path, file: file.update({"embeddings": tiles(dtype="float64")}),
    "type: 'embeddings' is int32": lambda path, file: file.update({"embeddings": np.ones((3, DIM), "i4")}),
    "type: 'embeddings' is object": lambda path, file: file.update({"embeddings": "text"}),
    "shape: 'embeddings' is [6]": lambda path, file: file.update({"embeddings": tiles()[0]}),
    "shape: 'embeddings' is [2,10,6]": lambda path, file: file.update({"embeddings": tiles().reshape(2, 10, DIM)}),
    "shape: 'embeddings' is [1,1,20,6]": lambda path, file: file.update({"embeddings": tiles()[None, None]}),
    "shape: 'embeddings' is []": lambda path, file: file.update({"embeddings": np.float32(1)}),
    "shape: 'embeddings' is empty": lambda path, file: file.update({"embeddings": h5py.Empty("f4")}),
    "no tiles": lambda path, file: file.update({"embeddings": tiles()[:0]}),
    "no data set": lambda path, file: file.update({"coords": tiles()}),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_what_is_no_slide_is_refused_with_the_reason(tmp_path, reason):
    path = tmp_path / "a.h5"
    if reason in ("empty file", "no HDF5 file"):
        path.write_bytes(b"" if reason == "empty file" else b"slide,tile\n1,2\n")
    else:
        with h5py.File(path, "w") as file:
            FAULTS[reason](path, file)
    with pytest.raises(SlideError) as caught:
        open_slide(path, KEYS)
    assert caught.value.reason.startswith(reason) and str(path) in caught.value.message
    sent = pickle.loads(pickle.dumps(caught.value))  # as a worker process does
    assert (sent.message, sent.hint, sent.reason) == (caught.value.message, caught.value.hint, caught.value.reason)


def test_virtual_data_sets_are_refused(tmp_path):
    layout = h5py.VirtualLayout((20, DIM), "f2")
    layout[:] = h5py.VirtualSource(slide(tmp_path / "elsewhere.h5"), "embeddings", (20, DIM))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_virtual_dataset("embeddings", layout)
    with pytest.raises(SlideError, match="external data"):
        open_slide(tmp_path / "a.h5", KEYS)


def test_an_external_link_is_never_followed(tmp_path):
    """Opening a pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["embeddings"] = h5py.ExternalLink("pipe", "x")
        file["group"] = h5py.ExternalLink("pipe", "/")
        file["feats"] = h5py.SoftLink("group/x")
    with pytest.raises(SlideError, match="external link"):
        open_slide(tmp_path / "a.h5", KEYS)
    for key in ("embeddings", "feats"):
        with pytest.raises(SlideError, match="external link"):
            read_tiles(SlideFile(tmp_path / "a.h5", key, 20, DIM, "float16", False, 1))


@QUICK
@given(share=st.floats(0, 1), chunks=st.sampled_from([None, (5, DIM)]))
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, share, chunks):
    path = slide(tmp_path / "a.h5", tiles(50), chunks=chunks)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * (len(data) - 1))])
    with pytest.raises(SlideError, match="truncated|no HDF5|empty file|unreadable"):
        open_slide(path, KEYS)


@QUICK
@given(place=st.floats(0, 1), wrong=st.binary(min_size=1, max_size=40))
def test_a_damaged_file_is_a_slide_or_refused_but_never_another_error(tmp_path, place, wrong):
    path = slide(tmp_path / "a.h5", tiles(50), chunks=(5, DIM), compression="gzip")
    data = bytearray(path.read_bytes())
    start = int(place * len(data))
    data[start : start + len(wrong)] = wrong
    path.write_bytes(data)
    facts = slide_facts.inspect(path, KEYS, DIM, 1000)
    assert facts["reason"] is None or isinstance(facts["reason"], str)


@pytest.mark.parametrize("options", [{}, {"chunks": (2, DIM)}], ids=["contiguous", "chunked"])
def test_tiles_that_were_never_written_are_no_zeros(tmp_path, options):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        data = file.create_dataset("embeddings", (10, DIM), "f4", **options)
        if options:
            data[:6] = 1
    with pytest.raises(SlideError, match="unfinished"):
        open_slide(tmp_path / "a.h5", KEYS)


def test_a_file_that_changed_since_it_was_listed_is_refused(tmp_path):
    opened = open_slide(slide(tmp_path / "a.h5"), KEYS)
    slide(tmp_path / "a.h5", tiles(19))
    with pytest.raises(SlideError, match="changed: 'embeddings' had 20 tiles of 6 float16"):
        read_tiles(opened, 0, 5)
    (tmp_path / "a.h5").unlink()
    with pytest.raises(KilnError, match="cannot be read"):
        read_tiles(opened)


@pytest.mark.parametrize("options", [{}, {"chunks": (256, 512), "compression": "gzip", "compression_opts": 1}])
def test_a_slab_costs_the_memory_of_a_slab(tmp_path, options):
    data = np.zeros((40_000, 512), "f2")
    path = slide(tmp_path / "a.h5", data, **options)
    whole, opened = data.nbytes, open_slide(path, KEYS)
    del data
    for work, share in (
        (lambda: read_tiles(opened, 20_000, 20_400), 0.02),
        (lambda: [read_tiles(opened, *one).sum() for one in opened.slabs(400 * 1024)], 0.03),
        # the next slab is made while one is held
        (lambda: slide_facts.inspect(path, KEYS, 512, 10**6), 1.3 * 2 * 16 * 2**20 / whole),
    ):
        tracemalloc.start()  # numpy tells it of its arrays
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < share * whole


def test_no_tile_is_read_twice_and_none_before_it_is_asked_for(tmp_path, monkeypatch):
    path = slide(tmp_path / "a.h5", tiles(100), chunks=(7, DIM), compression="gzip")
    ranges, read = [], h5py.Dataset.read_direct
    monkeypatch.setattr(
        h5py.Dataset, "read_direct", lambda self, to, where: (ranges.append(where), read(self, to, where))
    )
    opened = open_slide(path, KEYS)
    assert ranges == []
    # whole chunks, each unpacked once
    assert opened.slabs(10 * DIM * 2) == [(start, min(start + 14, 100)) for start in range(0, 100, 14)]
    slide_facts.inspect(path, KEYS, DIM, 1000)
    assert ranges == [slice(0, 100)]


# --- listing ---


@pytest.fixture
def data(tmp_path):
    """Six slides of three patients with texts."""
    root = tmp_path / "slides"
    texts = {f"s{i}": f"{CHINESE if i % 2 else ENGLISH} {i}" for i in range(6)}
    for i, name in enumerate(texts):
        slide(root / f"part{i % 2}" / f"{name}.h5")
    write_json(tmp_path / "labels.json", texts)
    (tmp_path / "patients.csv").write_text("slide,patient\n" + "".join(f"s{i},00{i // 2}\n" for i in range(6)))
    return tmp_path


def listed(root, *options, out="list", **values):
    """Run the step; (manifest, quarantine {(kind, name): reason}, summary)."""
    out = root / out
    arguments = ["--slides", root / "slides", "--labels", root / "labels.json", "--output-folder", out]
    arguments += ["--meta", out / "meta.json", "--threads", 1, *options]
    values = {"tile_dim": DIM, "processes": 1, **values}
    list_slides.main([*map(str, arguments), "--settings", json.dumps(values)])
    bad = pd.read_csv(out / "quarantine.tsv", sep="\t", dtype=str, keep_default_na=False)
    reasons = {(row.kind, row.name_): row.reason for row in bad.rename(columns={"name": "name_"}).itertuples()}
    return pd.read_parquet(out / "manifest.parquet"), reasons, json.loads((out / "summary.json").read_text())


def refused(root, *options, **values):
    with pytest.raises(KilnError) as caught:
        listed(root, *options, **values)
    assert not (root / "list").exists()
    return caught.value


def test_the_manifest_says_what_there_is(data):
    frame, bad, summary = listed(data, "--patients", data / "patients.csv")
    assert list(frame) == list_slides.MANIFEST.names and bad == {}
    assert frame["slide"].tolist() == [f"s{i}" for i in range(6)]
    assert frame["patient"].tolist() == ["000", "000", "001", "001", "002", "002"]
    assert dict(zip(frame["slide"], frame["text"], strict=True)) == json.loads((data / "labels.json").read_text())
    for row in frame.itertuples():
        assert row.path == f"part{int(row.slide[1]) % 2}/{row.slide}.h5"
        stored = tiles(seed=sum(row.slide.encode()))
        assert (row.tiles, row.dim, row.dtype, row.key, row.finite_share) == (20, DIM, "float16", "embeddings", 1.0)
        assert row.norm == pytest.approx(np.linalg.norm(stored.astype(float), axis=1).mean())
        assert row.sha256 == hashlib.sha256(b'[20, 6, "float16"]\0' + stored.tobytes()).hexdigest()
    assert summary["files"] == summary["texts"] == {"in": 6, "ok": 6, "quarantined": 0, "reasons": {}}
    assert (summary["patients"], summary["distinct_texts"], summary["equal_slides"]) == (3, 6, 0)
    meta = json.loads((data / "list/meta.json").read_text())
    assert set(meta["inputs"]) == {"labels", "patients"} and meta["items"] == 6
    assert set(meta["outputs"]) == {"manifest.parquet", "quarantine.tsv", "summary.json"}


def test_without_a_table_each_slide_is_its_own_patient(data):
    frame, _, summary = listed(data)
    assert frame["patient"].tolist() == frame["slide"].tolist() and summary["patients"] == 6
    by_setting, *_ = listed(data, out="other", patients=str(data / "patients.csv"))
    assert by_setting["patient"].nunique() == 3


def test_the_hash_is_of_values_and_sees_the_ends_of_a_long_slide(tmp_path):
    many = tiles(5000, 4)

    def sha(name, values, **options):
        return slide_facts.inspect(slide(tmp_path / f"{name}.h5", values, **options), KEYS, 4, 10**6)["sha256"]

    same = sha("a", many)
    assert sha("b", many[None]) == sha("c", many, chunks=(9, 3), compression="gzip") == sha("d", many.astype(">f2"))
    assert sha("d", many.astype(">f2")) == same == sha("e", many, key="feats")
    assert sha("f", many.astype("f4")) != same and sha("g", many[:-1]) != same
    for row in (0, 4999):
        other = many.copy()
        other[row, 0] += 1
        assert sha("h", other) != same


def test_every_bad_file_and_text_is_accounted_for(data):
    root = data / "slides"
    texts = json.loads((data / "labels.json").read_text())
    faults = {
        "junk": lambda path: path.write_bytes(b"no slide"),
        "cut": lambda path: path.write_bytes(slide(path).read_bytes()[:-1]),
        "wide": lambda path: slide(path, tiles(dim=7)),
        "nan": lambda path: slide(path, np.where(np.arange(120).reshape(20, 6) % 40, 1, np.nan).astype("f2")),
        "inf": lambda path: slide(path, np.where(np.arange(120).reshape(20, 6), 1, np.inf).astype("f4")[None]),
        "none": lambda path: slide(path, tiles()[:0]),
        "long": lambda path: slide(path, tiles(31)),
        "chunk": damage_chunk,
        "link": lambda path: h5py.File(path, "w").update({"embeddings": external(data / "x")}),
    }
    for name, write in faults.items():
        write(root / f"{name}.h5")
        texts[name] = "a text"
    slide(root / "silent.h5")
    slide(root / "blank.h5")
    slide(root / "twice.h5"), slide(root / "deep" / "twice.h5")
    (root / "notes.txt").write_text("not a slide")
    texts |= {"blank": " \n", "twice": "a text", "gone": "a text", "number": 5, "list": ["a"], "null": None}
    write_json(data / "labels.json", texts)
    frame, bad, summary = listed(data, max_tiles=30)
    assert frame["slide"].tolist() == [f"s{i}" for i in range(6)]
    files = {name: reason for (kind, name), reason in bad.items() if kind == "file"}
    assert files.pop("chunk.h5").startswith("unreadable: ")
    assert files.pop("cut.h5").startswith("truncated: ")
    assert files == {
        "junk.h5": "no HDF5 file",
        "wide.h5": "dim: 7 features per tile, expected 6",
        "nan.h5": "not finite: 3 of 20 tiles hold NaN or infinity",
        "inf.h5": "not finite: 1 of 20 tiles hold NaN or infinity",
        "none.h5": "no tiles",
        "long.h5": "too many tiles: 31, more than 30",
        "link.h5": "external link: 'embeddings' leads to 'elsewhere.h5'",
        "silent.h5": "no text",
        "blank.h5": "no usable text: empty text",
        "twice.h5": "double: 2 files are named twice",
        "deep/twice.h5": "double: 2 files are named twice",
    }
    said = {name: reason for (kind, name), reason in bad.items() if kind == "text"}
    assert said == {
        **dict.fromkeys([*faults, "twice"], "file quarantined"),
        "blank": "empty text",
        "gone": "no file",
        "number": "no string: a number",
        "list": "no string: a list",
        "null": "no string: null",
    }
    assert summary["files"]["in"] == 6 + 13 and summary["files"]["quarantined"] == 13
    assert summary["files"]["reasons"]["not finite"] == 2 and summary["files"]["reasons"]["double"] == 2
    assert summary["texts"]["in"] == 6 + 15 and summary["texts"]["quarantined"] == 15
    assert summary["other_files"] == 1


def test_a_doubled_id_is_not_the_last_one(data):
    rows = [("s0", "one"), ("s1", "two"), ("s0", "three"), ("s2", "four")]
    (data / "labels.json").write_text("{" + ",".join(f"{json.dumps(a)}: {json.dumps(b)}" for a, b in rows) + "}")
    frame, bad, summary = listed(data)
    assert frame["slide"].tolist() == ["s1", "s2"]
    assert bad["file", "part0/s0.h5"] == "no usable text: double: 2 entries"
    assert summary["texts"] == {"in": 4, "ok": 2, "quarantined": 2, "reasons": {"double": 2}}


def test_half_a_surrogate_pair_is_no_text(data):
    (data / "labels.json").write_text('{"s0": "a \\ud83d b", "s\\udc00": "x", "s1": "\\ud83d\\ude00"}')
    frame, bad, _ = listed(data)
    assert frame[["slide", "text"]].to_numpy().tolist() == [["s1", "😀"]]
    assert bad["text", "s0"] == bad["text", r"s\udc00"] == "no Unicode: half of a surrogate pair"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_utf_8_labels_may_have_a_mark(data, encoding):
    (data / "labels.json").write_text(json.dumps({"s1": CHINESE}, ensure_ascii=False), encoding=encoding)
    assert listed(data)[0]["text"].tolist() == [CHINESE]


@pytest.mark.parametrize(
    "encoding, says, convert",
    [("gbk", "as GB18030 (GBK) it reads '浸润性导管癌，", "iconv -f GB18030 -t UTF-8"),
     ("utf-16", "as UTF-16 it reads '浸润性导管癌，", "iconv -f UTF-16 -t UTF-8"),
     ("latin-1", "nor is it GB18030 (GBK) or UTF-16", "save it as UTF-8")],
)  # fmt: skip
def test_labels_in_another_encoding_are_refused_and_named(data, encoding, says, convert):
    text = json.dumps({"s1": CHINESE if encoding != "latin-1" else "café é"}, ensure_ascii=False, indent=1)
    (data / "labels.json").write_bytes(text.encode(encoding))
    error = refused(data)
    assert "labels.json: not UTF-8: it fails at byte" in error.message
    assert says in error.message and convert in error.hint
    if encoding == "gbk":
        assert "byte 10 (0xbd, line 2)" in error.message  # {\n "s1": "...


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not JSON"),
        ('{"s1": "a"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["a", "b"]', "a list, expected an object"),
        ('"a"', "a string, expected an object"),
        ("null", "null, expected an object"),
        ("{}", "no entries"),
        ('{"s1": {"report": "a"}}', "none of 6 slides can be used"),
        ('{"s1": 1, "s2": null}', "none of 6 slides can be used"),
    ],
    ids=lambda value: value[:20],
)
def test_labels_that_are_no_object_of_strings_are_refused(data, text, message):
    (data / "labels.json").write_text(text)
    assert message in refused(data).message


def test_labels_that_name_no_slide_are_refused_with_a_name_of_each(data):
    write_json(data / "labels.json", {"s0.h5": "a", "s1.h5": "b"})
    error = refused(data)
    assert "none of 6 slides can be used" in error.message and "no text" in error.message
    assert "'s0'" in error.hint and "'s0.h5'" in error.hint


def test_embeddings_of_another_width_name_the_setting(data):
    assert "coca.list.tile_dim" in refused(data, tile_dim=2560).hint
    assert "6 features per tile, expected 2560" in refused(data, tile_dim=2560).message


def test_missing_inputs_are_refused(data):
    (data / "labels.json").rename(data / "other.json")
    assert "labels.json: no such file" in refused(data).message
    (data / "other.json").rename(data / "labels.json")
    assert "patients.csv" in refused(data, "--patients", data / "no/patients.csv").message
    shutil.rmtree(data / "slides")
    assert "no such folder" in refused(data).message
    (data / "slides").mkdir()
    assert "no file ends with" in refused(data).message


def test_a_slide_without_a_patient_is_quarantined(data):
    rows = ["slide,age,patient", "s0,3,007", "s1,4,007", "s1,5,007", "s2,6,", '"s3 ",7, NA', "other,8,x"]
    (data / "patients.csv").write_text("\n".join(rows))
    frame, bad, _ = listed(data, "--patients", data / "patients.csv")
    assert frame[["slide", "patient"]].to_numpy().tolist() == [["s0", "007"], ["s1", "007"], ["s3", "NA"]]
    assert {bad["file", f"part{i % 2}/s{i}.h5"] for i in (2, 4, 5)} == {"no patient"}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"slide,patient\ns0,a\ns1,b\ns0,c\n", "row 4: slide 's0' is of patient 'c', and above of 'a'"),
        (b"slide,case\ns0,a\n", "no column patient; it has slide, case"),
        ("slide,patient\ns0,张三\n".encode("gbk"), "as GB18030 (GBK) it reads '张三'"),
        (b"", "no CSV"),
        (b'slide,patient\n"s0,a\n', "no CSV"),
    ],
)
def test_patients_that_do_not_fit_are_refused(data, content, message):
    (data / "patients.csv").write_bytes(content)
    error = refused(data, "--patients", data / "patients.csv")
    assert "patients.csv" in error.message and message in error.message


def test_the_number_of_processes_changes_no_byte(data):
    for number, out in ((1, "one"), (2, "two")):
        listed(data, "--threads", number, out=out, processes=number)
    for name in ("manifest.parquet", "quarantine.tsv", "summary.json"):
        assert (data / "one" / name).read_bytes() == (data / "two" / name).read_bytes()


def test_only_new_and_changed_slides_are_read_again(data, monkeypatch):
    read, inspect = [], slide_facts.inspect
    monkeypatch.setattr(slide_facts, "inspect", lambda path, *rest: (read.append(path.stem), inspect(path, *rest))[1])

    def names(out, **values):
        del read[:]
        listed(data, "--state-folder", data / "state", out=out, **values)
        return sorted(read)

    (data / "slides/part0/s4.h5").write_bytes(b"junk")
    assert names("first") == [f"s{i}" for i in range(6)]
    assert names("again") == []
    for name in ("manifest.parquet", "quarantine.tsv", "summary.json"):
        assert (data / "first" / name).read_bytes() == (data / "again" / name).read_bytes()
    slide(data / "slides/part0/s0.h5", tiles(9)), slide(data / "slides/part0/s4.h5")
    slide(data / "slides/new.h5")
    write_json(data / "labels.json", {**json.loads((data / "labels.json").read_text()), "new": "a text"})
    (data / "slides/part1/s1.h5").unlink()
    assert names("changed") == ["new", "s0", "s4"]
    fresh = listed(data, out="fresh")[0]
    assert fresh.equals(pd.read_parquet(data / "changed/manifest.parquet"))
    assert len(names("other settings", max_tiles=10)) == 6
    (state,) = [p for p in (data / "state").iterdir() if len(tables.read_table(p, ["path"])) == 6][:1]
    for path in (data / "state").iterdir():
        path.write_bytes(b"torn")
    assert len(names("torn")) == 6 and state.exists()


def test_a_long_listing_is_kept_on_the_way(data, monkeypatch):
    monkeypatch.setattr(slide_facts, "SAVE_SECONDS", 0)
    inspect = slide_facts.inspect

    def gone(path, *rest):
        if path.stem == "s5":
            raise KilnError(f"{path}: gone", "run again")
        return inspect(path, *rest)

    monkeypatch.setattr(slide_facts, "inspect", gone)
    with pytest.raises(KilnError, match="gone"):
        listed(data, "--state-folder", data / "state")
    (known,) = (data / "state").iterdir()
    assert len(pd.read_parquet(known)) == 5 and not (data / "list").exists()


def test_copies_of_a_slide_are_counted(data):
    shutil.copy(data / "slides/part0/s0.h5", data / "slides/part1/s1.h5")
    assert listed(data)[2]["equal_slides"] == 2


@QUICK
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip))
def test_texts_come_through_the_listing_unchanged(tmp_path, text):
    slide(tmp_path / "slides/007.h5")
    write_json(tmp_path / "labels.json", {"007": text})
    frame, *_ = listed(tmp_path)
    assert frame[["slide", "text"]].to_numpy().tolist() == [["007", text]]


# --- sides ---


def manifest(path, patients, text="a text of {}"):
    """A manifest of slides s0, s1, ... of the given patients."""
    rows = [
        {"slide": f"s{i}", "patient": patient, "text": text.format(i), "path": f"s{i}.h5"}
        for i, patient in enumerate(patients)
    ]
    tables.write_table(path, pd.DataFrame(rows), ["slide"])
    return path


def sides(root, patients, text="a text of {}", **values):
    """Run the step; (splits, summary)."""
    root.mkdir(parents=True, exist_ok=True)
    out = root / "split"
    arguments = ["--manifest", manifest(root / "manifest.parquet", patients, text), "--output-folder", out]
    arguments += ["--meta", out / "meta.json", "--threads", 1]
    split.main([*map(str, arguments), "--settings", json.dumps(values)])
    return read_splits(out / "splits.csv"), json.loads((out / "summary.json").read_text())


@QUICK
@given(st.lists(st.integers(0, 200), min_size=120, max_size=300), st.integers(0, 9), st.integers(201, 400))
def test_patients_stay_whole_and_where_they_are(tmp_path, numbers, seed, new):
    values = SplitSettings(seed=seed)
    frame = pd.DataFrame({"patient": [f"{n:03d}" for n in numbers]})
    frame["side"] = frame["patient"].map(lambda one: split.side_of(one, values))
    if frame["side"].nunique() < 3:
        return
    made, summary = sides(tmp_path, frame["patient"], seed=seed)
    more, _ = sides(tmp_path, [*frame["patient"], f"{new:03d}"], seed=seed)
    assert made.groupby("patient")["side"].nunique().eq(1).all()
    assert made.set_index("slide")["side"].to_dict().items() <= more.set_index("slide")["side"].to_dict().items()
    assert summary["in"] == len(numbers) == sum(summary[side] for side in split.SIDES)
    for side in split.SIDES:
        own = made[made["side"] == side]
        assert (summary["sides"][side]["slides"], summary["sides"][side]["patients"]) == (
            len(own), own["patient"].nunique(),
        )  # fmt: skip


def test_shares_are_met_and_another_seed_deals_anew(tmp_path):
    patients = [f"p{i}" for i in range(3000)]
    one, _ = sides(tmp_path / "one", patients, validation=0.1, test=0.2)
    share = one["side"].value_counts(normalize=True)
    # three standard deviations of a binomial share
    assert share["validation"] == pytest.approx(0.1, abs=0.017) and share["test"] == pytest.approx(0.2, abs=0.022)
    two, _ = sides(tmp_path / "two", patients, validation=0.1, test=0.2, seed=1)
    assert (one["side"] != two["side"]).mean() == pytest.approx(1 - 0.7**2 - 0.1**2 - 0.2**2, abs=0.03)


@pytest.mark.parametrize("patients", [1, 2, 3])
def test_an_empty_side_is_refused_with_the_number_of_patients(tmp_path, patients):
    with pytest.raises(KilnError) as caught:
        sides(tmp_path, [f"p{i % patients}" for i in range(9)], validation=0.001, test=0.001)
    assert "no patient for validation and test" in caught.value.message
    assert f"there are {patients} patients (9 slides)" in caught.value.message
    assert not (tmp_path / "split").exists()


@pytest.mark.parametrize("values", [{"validation": 0}, {"test": 0}, {"validation": 0.5, "test": 0.5}])
def test_sides_of_size_zero_are_refused_by_name(tmp_path, values):
    with pytest.raises(KilnError, match=".*".join(values)) as caught:
        sides(tmp_path, [f"p{i}" for i in range(90)], **values)
    assert caught.value.hint and not (tmp_path / "split").exists()


def test_repeated_texts_are_counted(tmp_path):
    patients = [f"p{i}" for i in range(60)]
    made, summary = sides(tmp_path, patients, text="the same")
    for side, number in made["side"].value_counts().items():
        facts = summary["sides"][side]
        assert facts["distinct_texts"] == 1 and facts["slides_with_repeated_text"] == number
        assert side == "train" or facts["slides_with_a_text_of_train"] == number
    _, summary = sides(tmp_path, patients)
    assert all(facts["slides_with_repeated_text"] == 0 for facts in summary["sides"].values())
    assert summary["sides"]["test"]["slides_with_a_text_of_train"] == 0


def test_ids_that_look_like_numbers_or_gaps_stay_text(tmp_path):
    rows = [{"slide": f"{i:03d}", "patient": f"00{i}", "text": "x"} for i in range(40)]
    rows.append({"slide": "NA", "patient": "NA", "text": "x"})
    tables.write_table(tmp_path / "manifest.parquet", pd.DataFrame(rows), ["slide"])
    out = tmp_path / "out"
    split.main(["--manifest", str(tmp_path / "manifest.parquet"), "--output-folder", str(out), "--meta",
                str(out / "meta.json")])  # fmt: skip
    frame = read_splits(out / "splits.csv")
    assert frame["slide"].tolist() == [f"{i:03d}" for i in range(40)] + ["NA"]
    assert frame["patient"].tolist() == [f"00{i}" for i in range(40)] + ["NA"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("slide,patient,side\ns0,p,train\ns0,p,test\n", "row 2: s0: a second row"),
        ("slide,patient,side\ns0,p,val\n", "row 1: s0: its side is none of train, validation, test"),
        ("slide,side\ns0,train\n", "no column patient"),
    ],
)
def test_splits_by_hand_are_checked(tmp_path, text, message):
    (tmp_path / "splits.csv").write_text(text)
    with pytest.raises(KilnError, match=message):
        read_splits(tmp_path / "splits.csv")


# --- tokenizer ---


def corpus(count=80):
    chinese = ["肺活检：腺癌，中等分化。", "（胃）高级别鳞状细胞癌。", CHINESE]
    english = ["Lung biopsy: adenocarcinoma, moderately differentiated.", "Section of the stomach.", ENGLISH]
    return [(chinese + english)[i % 6] + ("" if i % 7 else f" {i} mm") for i in range(count)]


def tokenizer(root, texts=None, test_texts=("XYZZY " * 9,) * 20, **values):
    """Run the step on train texts, with further ones of the other sides; the folder."""
    root.mkdir(parents=True, exist_ok=True)
    texts = corpus() if texts is None else texts
    everything = [(text, "train") for text in texts] + [(text, "test") for text in test_texts]
    rows = [{"slide": f"s{i:03d}", "patient": f"p{i}", "side": s, "text": t} for i, (t, s) in enumerate(everything)]
    frame = pd.DataFrame(rows)
    tables.write_table(root / "manifest.parquet", frame[["slide", "patient", "text"]], ["slide"])
    frame[["slide", "patient", "side"]].to_csv(root / "splits.csv", index=False)
    out = root / "tokenizer"
    arguments = ["--manifest", root / "manifest.parquet", "--splits", root / "splits.csv", "--output-folder", out]
    arguments += ["--meta", root / "meta.json", "--threads", 1]
    train_tokenizer.main([*map(str, arguments), "--settings", json.dumps(values)])
    return out


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    return Texts.load(tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_the_marks_come_first_and_plain_transformers_loads_it(tmp_path):
    folder = tokenizer(tmp_path)
    assert files_below(folder) == ["files.json", "tokenizer.json", "tokenizer_config.json"]
    plain, texts = AutoTokenizer.from_pretrained(folder), Texts.load(folder)
    assert plain.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>"]) == [0, 1, 2]
    assert (texts.pad_id, texts.bos_id, texts.eos_id, texts.size) == (0, 1, 2, len(plain))
    for text in corpus(6):
        ids, cut = texts.encode(text, 512)
        assert not cut and ids == [1, *plain(text, add_special_tokens=False)["input_ids"], 2]
        assert plain.decode(ids, skip_special_tokens=True) == text
    assert identity(folder) == {"tokenizer files.json": folder / "files.json"}
    facts = json.loads((tmp_path / "meta.json").read_text())["tokenizer"]
    assert facts["changed_texts"] == 0 and facts["vocabulary"] == texts.size and facts["texts"] == 80


def test_it_learns_from_the_training_texts_alone(tmp_path):
    one = tokenizer(tmp_path / "one")
    two = tokenizer(tmp_path / "two", test_texts=["something else altogether, twice, twice"] * 30)
    assert (one / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()
    vocabulary = Tokenizer.from_file(str(one / "tokenizer.json")).get_vocab()
    assert not any("XYZ" in token for token in vocabulary) and any("carcinoma" in token for token in vocabulary)


def test_vocabulary_is_the_greatest_size_and_no_token_is_a_sentence(tmp_path, learnt):
    assert Texts.load(tokenizer(tmp_path, vocabulary=300)).size == 300
    assert learnt.size < 8000  # few texts hold few merges
    ids, _ = learnt.encode("浸润性导管癌中等分化浸润性导管癌", 512)
    assert len(ids) - 2 >= 3  # the original's whitespace split makes this one
    assert max(len(learnt.decode([one]).encode()) for one in range(3, learnt.size)) <= 18


def test_bytes_are_equal_across_runs(tmp_path):
    first = tokenizer(tmp_path)
    made = {name: (first / name).read_bytes() for name in files_below(first)}
    command = [sys.executable, "-m", "scripts.coca.train_tokenizer", "--manifest", tmp_path / "manifest.parquet",
               "--splits", tmp_path / "splits.csv"]  # fmt: skip
    command += ["--output-folder", tmp_path / "again", "--meta", tmp_path / "again.json"]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "4"}
    subprocess.run([*map(str, command)], cwd=ROOT, env=environment, check=True)
    assert {name: (tmp_path / "again" / name).read_bytes() for name in files_below(first)} == made


@settings(deadline=None, max_examples=300)
@given(
    text=st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=80),
        st.text("浸润性导管癌，中等分化 abc.<pad><bos><eos>\u3000\n\t'", max_size=80),
        st.text("😀👩‍🔬🇨🇳é\u0301\ufeff\x00\u200d\U0010ffff", max_size=20),
    )
)
def test_any_text_comes_back_exactly(learnt, text):
    ids, cut = learnt.encode(text, 10_000)
    assert not cut and ids[0] == learnt.bos_id and ids[-1] == learnt.eos_id
    assert not {learnt.pad_id, learnt.bos_id, learnt.eos_id} & set(ids[1:-1])  # a mark in a text is text
    assert learnt.decode(ids) == learnt.decode(ids[1:-1]) == text
    assert learnt.decode([*ids, learnt.pad_id, learnt.pad_id]) == text


def test_a_copy_in_another_process_reads_marks_as_text_too(learnt):
    copy = pickle.loads(pickle.dumps(learnt))
    assert copy.encode("a <eos> b", 99) == learnt.encode("a <eos> b", 99)


@settings(deadline=None)
@given(text=st.text("肺腺癌 ab.", max_size=60), most=st.integers(2, 40))
def test_long_texts_are_cut_before_the_end_mark(learnt, text, most):
    whole, _ = learnt.encode(text, 10_000)
    ids, cut = learnt.encode(text, most)
    assert cut == (len(whole) > most) and len(ids) == min(len(whole), most)
    assert ids == whole[: len(ids) - 1] + [learnt.eos_id]


def gpt(folder, **marks):
    """A byte-level tokenizer without merges, as GPT-2 has it, saved with the given marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={one: i for i, one in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.enable_truncation(4)
    PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "marks, want",
    [
        ({}, ("<pad>", "<bos>", "<eos>")),
        ({"bos_token": "<|end|>", "eos_token": "<|end|>"}, ("<pad>", "<|end|>", "<|end|>")),
        ({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}, ("<pad>", "<s>", "</s>")),
        ({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<fill>"}, ("<fill>", "<s>", "</s>")),
        ({"cls_token": "[CLS]", "sep_token": "[SEP]"}, ("<pad>", "[CLS]", "[SEP]")),
    ],
)
def test_an_existing_tokenizer_gets_the_marks_that_it_lacks(tmp_path, marks, want):
    folder = tokenizer(tmp_path, path=str(gpt(tmp_path / "given", **marks)))
    texts, plain = Texts.load(folder), AutoTokenizer.from_pretrained(folder)
    assert (plain.pad_token, plain.bos_token, plain.eos_token) == want
    assert [texts.pad_id, texts.bos_id, texts.eos_id] == plain.convert_tokens_to_ids(list(want))
    assert texts.pad_id not in (texts.bos_id, texts.eos_id) and texts.size == 256 + len(set(want))
    for text in (CHINESE, ENGLISH):
        ids, cut = texts.encode(text, 512)
        assert texts.decode(ids) == text and not cut and len(ids) == len(text.encode()) + 2
    assert "tokenizer" in json.loads((tmp_path / "meta.json").read_text())["inputs"]


def test_a_tokenizer_that_changes_texts_is_taken_with_a_warning(tmp_path, caplog):
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "lung", "biopsy", ":", "肺", "活", "检"]
    (tmp_path / "given").mkdir()
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(tmp_path / "given")
    folder = tokenizer(tmp_path, path=str(tmp_path / "given"))
    texts = Texts.load(folder)
    assert texts.encode("Lung biopsy", 9)[0] == [2, 4, 5, 3] and (texts.pad_id, texts.size) == (1, 11)  # with [MASK]
    assert "80 of 80 training texts do not come back" in caplog.text
    assert json.loads((tmp_path / "meta.json").read_text())["tokenizer"]["changed_texts"] == 80


def test_what_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(KilnError, match="no such folder"):
        tokenizer(tmp_path, path=str(tmp_path / "nowhere"))
    (tmp_path / "given").mkdir()
    (tmp_path / "given/tokenizer.json").write_text("{}")
    with pytest.raises(KilnError, match="no tokenizer that can be read"):
        tokenizer(tmp_path, path=str(tmp_path / "given"))
    with pytest.raises(KilnError, match="no tokenizer:"):
        Texts.load(tmp_path / "given")
    with pytest.raises(KilnError, match="no tokenizer.json there"):
        Texts.load(tmp_path)
    with pytest.raises(KilnError, match="no pad and no bos and no eos token"):
        Texts.load(gpt(tmp_path / "bare"))
    assert not (tmp_path / "tokenizer").exists()


def test_splits_of_another_manifest_are_refused(tmp_path):
    tokenizer(tmp_path)
    (tmp_path / "splits.csv").write_text("slide,patient,side\nelse,p,train\n")
    with pytest.raises(KilnError, match=r"no slide .* slides are in one table alone"):
        train_tokenizer.main(
            ["--manifest", str(tmp_path / "manifest.parquet"), "--splits", str(tmp_path / "splits.csv"),
             "--output-folder", str(tmp_path / "other"), "--meta", str(tmp_path / "other.json"), "--threads", "1"]
        )  # fmt: skip
    assert not (tmp_path / "other").exists()


# --- the class of a text ---

CLASSES = {
    "invasive": ["invasive carcinoma", "浸润性导管癌", "carcinoma"],
    "in situ": ["carcinoma in situ", "导管原位癌"],
    "adenoma": ["adenoma", "腺瘤"],
    "fibroadenoma": ["纤维腺瘤"],
}


@pytest.mark.parametrize(
    "text, want",
    [
        ("Invasive Carcinoma, grade 2", "invasive"),
        (CHINESE, "invasive"),
        ("two carcinomas", "invasive"),
        ("ductal carcinoma in situ", "in situ"),
        ("carcinoma in situ beside a carcinoma", None),
        ("fibroadenoma", None),
        ("为ADENOMA的组织", "adenoma"),
        ("乳腺纤维腺瘤", "fibroadenoma"),
        ("腺瘤", "adenoma"),
        ("normal tissue", None),
        ("", None),
    ],
)
def test_a_text_is_of_the_class_whose_term_it_holds(text, want):
    assert class_of(text, CLASSES) == want


@pytest.mark.parametrize(
    "classes, message",
    [
        ({"a": ["tumour"], "b": ["Tumour"]}, "'Tumour' is a term of 'a' and of 'b'"),
        ({"a": [" "]}, "class 'a' has an empty term"),
    ],
)
def test_terms_that_name_no_class_or_two_are_refused(classes, message):
    with pytest.raises(ValueError, match=message):
        EvaluateSettings(classes=classes)


def test_no_classes_no_class():
    assert class_of("carcinoma", {}) is None and class_of("carcinoma", {"x": []}) is None


def test_labels_are_read_in_order(tmp_path):
    path = write_json(tmp_path / "labels.json", {"b": "x", "a": CHINESE})
    assert labels.read_labels(path) == ({"b": "x", "a": CHINESE}, [])
