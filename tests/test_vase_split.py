"""Sides of vases: nothing seen in training is scored, whatever the names, bytes and order of the files."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vase_fixtures import command_line, error_of, files_below, run, write

from scripts.common.errors import KilnError
from scripts.vase import audit_split, sides, split, split_labelled
from scripts.vase.settings import SplitSettings

SIDES = ("train", "validation", "test")
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows(vases, label=None, views=1, prefix="", first=0):
    """`views` images for each of `vases` vases, every one with bytes of its own."""
    made = []
    for v in range(first, first + vases):
        for view in range(views):
            path = f"{prefix}{v:03d}_{view}.jpg" if label is None else f"{label}/{prefix}{v:03d}_{view}.jpg"
            row = {"path": path, "sha256": f"hash of {path}", "vase": f"{prefix}{v:03d}", "status": "ok"}
            made.append(row if label is None else {**row, "label": label})
    return made


def labelled_rows(low=40, high=40, views=1):
    return rows(low, 0, views, "L") + rows(high, 1, views, "H")


def split_labels(folder, table, attributes=None, **values):
    folder.mkdir(parents=True, exist_ok=True)
    source = write(folder / "in.parquet", table)
    arguments = ["--labelled", source, "--output-folder", folder / "out", "--meta", folder / "out/meta.json"]
    run(split_labelled.main, *arguments, *(["--attributes", attributes] if attributes else []), settings=values)
    return pd.read_parquet(folder / "out/labelled.parquet")


def split_all(folder, raw, labelled, attributes=None, **values):
    folder.mkdir(parents=True, exist_ok=True)
    one, two = write(folder / "raw.parquet", raw), write(folder / "known.parquet", labelled)
    arguments = ["--manifest", one, "--labelled", two, "--output-folder", folder / "out"]
    arguments += ["--meta", folder / "out/meta.json", *(["--attributes", attributes] if attributes else [])]
    run(split.main, *arguments, settings=values)
    return pd.read_parquet(folder / "out/splits.parquet").set_index("vase")


def components(pairs):
    """{vase: set of vases tied to it} by brute force: merge sets until nothing changes."""
    sets = [{v for v, h in pairs if h == one} for one in {h for _, h in pairs}]
    merged = True
    while merged:
        merged = False
        for i, a in enumerate(sets):
            for b in sets[i + 1 :]:
                if a & b:
                    a |= b
                    sets.remove(b)
                    merged = True
                    break
            if merged:
                break
    return {v: s for s in sets for v in s}


# --- who is tied to whom ---


@QUICK
@given(
    st.lists(st.tuples(st.sampled_from("abcdefghij"), st.integers(0, 12)), min_size=1, max_size=25),
    st.randoms(use_true_random=False),
)
def test_identical_images_tie_vases_transitively(pairs, random):
    expected = {vase: min(tied) for vase, tied in components(pairs).items()}
    random.shuffle(pairs)
    vases, hashes = zip(*pairs, strict=True)
    found = sides.group_by_identity(pd.Series(vases), pd.Series([str(h) for h in hashes]))
    assert found.to_dict() == expected


@settings(QUICK, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 25), st.integers(0, 1)), max_size=40),
    st.integers(0, 2**32),
)
def test_every_vase_is_on_one_side_and_ties_hold(tmp_path_factory, ties, seed):
    """Raw vases, labelled ones and random byte-identical images between any of them."""
    folder = tmp_path_factory.mktemp("split")
    known = pd.DataFrame(labelled_rows(30, 30))
    extra = [
        {"path": f"x{i}", "sha256": f"shared {h}", "vase": f"R{v:03d}", "status": "ok"}
        for i, (v, h, _) in enumerate(ties)
    ]
    raw = pd.DataFrame(rows(25, prefix="R") + extra)
    try:
        labelled = split_labels(folder / "labelled", known, seed=seed)
    except KilnError as error:
        assert "no labelled image of class" in error.message  # few vases: a side may lack a class, which is said
        return
    found = split_all(folder / "all", raw, labelled, seed=seed)
    assert set(found.index) == set(raw["vase"]) | set(known["vase"])
    assert found.index.is_unique and set(found["side"]) <= set(SIDES)
    both = pd.concat([raw, known])
    assert both.assign(side=both["vase"].map(found["side"])).groupby("sha256")["side"].nunique().max() == 1
    for vase, tied in components(list(zip(both["vase"], both["sha256"], strict=True))).items():
        assert found.loc[vase, "group"] == min(tied)
    was = labelled.drop_duplicates("vase").set_index("vase")["side"]
    assert (found.loc[was.index, "side"] == was).all()
    assert set(found.index[found["labelled"]]) == set(was.index)


def test_a_raw_copy_stands_where_its_labelled_original_stands(tmp_path):
    labelled = split_labels(tmp_path / "l", labelled_rows(60, 60))
    copies = [
        {"path": f"copy{i}", "sha256": row.sha256, "vase": f"copy{i}", "status": "ok"}
        for i, row in enumerate(labelled.itertuples())
    ]
    friends = [{"path": f"friend{i}", "sha256": "f" * i, "vase": f"friend{i}", "status": "ok"} for i in range(1, 120)]
    twins = [{**f, "path": f"twin{i}", "vase": f"copy{i}"} for i, f in enumerate(friends)]  # friend ~ copy ~ labelled
    found = split_all(tmp_path / "a", copies + friends + twins, labelled)
    for i, row in enumerate(labelled.itertuples()):
        assert found.loc[f"copy{i}", "side"] == row.side
    for i in range(len(friends)):
        assert found.loc[f"friend{i + 1}", "side"] == found.loc[f"copy{i}", "side"]
    assert labelled["side"].value_counts().to_dict() == {"train": 96, "validation": 12, "test": 12}
    summary = json.loads((tmp_path / "a/out/summary.json").read_text())
    assert summary["labelled"] == 120 and summary["vases"]["in"] == 120 + 120 + 119
    assert summary["tied_by_identical_images"] > 0


def test_raw_images_that_tie_labelled_vases_of_two_sides_are_refused(tmp_path):
    labelled = split_labels(tmp_path / "l", labelled_rows())
    one, two = (labelled[labelled["side"] == side].iloc[0] for side in ("train", "test"))
    raw = [
        {"path": f"r{i}", "sha256": h, "vase": "bridge", "status": "ok"} for i, h in enumerate([one.sha256, two.sha256])
    ]
    with pytest.raises(KilnError) as caught:
        split_all(tmp_path / "a", raw, labelled)
    assert f"{one.vase} (train)" in caught.value.message and f"{two.vase} (test)" in caught.value.message
    assert not (tmp_path / "a/out").exists()


def test_quarantined_images_tie_nothing_and_are_no_vases(tmp_path):
    labelled = split_labels(tmp_path / "l", labelled_rows())
    raw = [
        {"path": "a", "sha256": "a", "vase": "A", "status": "ok"},
        {"path": "a2", "sha256": "empty", "vase": "A", "status": "quarantined"},
        {"path": "b2", "sha256": "empty", "vase": "B", "status": "quarantined"},
        {"path": "c", "sha256": "c", "vase": "C", "status": "ok"},
        {"path": "c2", "sha256": "empty", "vase": "C", "status": "quarantined"},
    ]
    found = split_all(tmp_path / "a", raw, labelled)
    assert "B" not in found.index
    assert found.loc[["A", "C"], "group"].tolist() == ["A", "C"]


# --- shares ---


@QUICK
@given(
    st.dictionaries(st.text(min_size=1, max_size=5), st.integers(1, 60), min_size=1, max_size=8),
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20)),
    st.integers(0, 2**63),
)
def test_shares_are_met_within_rounding_in_each_stratum(sizes, weights, seed):
    shares = [w / sum(weights) for w in weights]
    strata = pd.Series({f"{name}/{i}": name for name, n in sizes.items() for i in range(n)})
    found = sides.deal(strata, shares, seed)
    assert set(found.index) == set(strata.index) and found.notna().all()
    for name, n in sizes.items():
        for side, share in zip(SIDES, shares, strict=True):
            count = (found[strata[strata == name].index] == side).sum()
            assert math.floor(share * n - 1e-6) <= count <= math.ceil(share * n + 1e-6), (name, side)


def test_shares_are_met_overall_when_every_stratum_is_tiny():
    """400 strata of 3: rounding down everywhere would leave no test side at all."""
    strata = pd.Series({f"{s}/{i}": f"stratum {s}" for s in range(400) for i in range(3)})
    counts = sides.deal(strata, [0.8, 0.1, 0.1], 42).value_counts(normalize=True)
    for side, share in SHARES.items():
        assert counts[side] == pytest.approx(share, abs=0.03)


def test_both_classes_keep_their_shares_on_every_side(tmp_path):
    found = split_labels(tmp_path, labelled_rows(100, 20))
    counts = found.groupby(["label", "side"]).size()
    assert {side: counts[0, side] for side in SIDES} == {"train": 80, "validation": 10, "test": 10}
    assert {side: counts[1, side] for side in SIDES} == {"train": 16, "validation": 2, "test": 2}
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["images"]["test"] == {"0": 10, "1": 2}
    assert summary["vases"] == {"in": 120, "train": 96, "validation": 12, "test": 12}


def test_all_views_of_a_vase_with_both_labels_stay_together(tmp_path):
    mixed = rows(40, 0, 3, "M") + [
        {**r, "path": r["path"].replace("0/", "1/"), "sha256": r["path"] + "b", "label": 1} for r in rows(40, 0, 2, "M")
    ]
    found = split_labels(tmp_path, mixed)
    assert found.groupby("vase")["side"].nunique().max() == 1
    assert set(found["vase"]) == {f"M{i:03d}" for i in range(40)}


def test_other_shares_are_obeyed(tmp_path):
    found = split_labels(tmp_path, labelled_rows(50, 50), train=0.5, validation=0.3, test=0.2)
    assert found["side"].value_counts().to_dict() == {"train": 50, "validation": 30, "test": 20}


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.2), (0.5, 0.25, 0.2)])
def test_shares_that_do_not_add_up_are_refused(tmp_path, shares):
    with pytest.raises(KilnError, match="must be 1"):
        split_labels(tmp_path, labelled_rows(), **dict(zip(SIDES, shares, strict=True)))


# --- stability ---


@QUICK
@given(st.randoms(use_true_random=False), st.integers(0, 1000))
def test_the_order_of_rows_does_not_matter(random, seed):
    strata = pd.Series({f"g{i}": f"s{i % 3}" for i in range(40)})
    order = list(strata.index)
    random.shuffle(order)
    assert (
        sides.deal(strata, [0.8, 0.1, 0.1], seed).to_dict()
        == sides.deal(strata[order], [0.8, 0.1, 0.1], seed).to_dict()
    )


def test_the_order_of_rows_does_not_change_a_byte(tmp_path):
    table = pd.DataFrame(labelled_rows(30, 30, views=2))
    table.loc[5, "sha256"] = table.loc[9, "sha256"]
    split_labels(tmp_path / "one", table)
    (tmp_path / "two").mkdir()
    shuffled = table.sample(frac=1, random_state=1)
    shuffled.to_parquet(tmp_path / "two/in.parquet")
    arguments = ["--labelled", tmp_path / "two/in.parquet", "--output-folder", tmp_path / "two/out"]
    run(split_labelled.main, *arguments, "--meta", tmp_path / "two/out/meta.json")
    one, two = (tmp_path / n / "out/labelled.parquet" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_another_seed_deals_anew(tmp_path):
    found = [split_labels(tmp_path / str(s), labelled_rows(60, 60), seed=s).set_index("path")["side"] for s in (1, 2)]
    moved = (found[0] != found[1]).mean()
    assert 0.1 < moved < 0.6  # independent deals differ in 1 - (.64 + .01 + .01) = 0.34 of the vases
    assert split_labels(tmp_path / "again", labelled_rows(60, 60), seed=1).set_index("path")["side"].equals(found[0])


@QUICK
@given(st.integers(1, 50), st.integers(0, 30), st.integers(0, 1000))
def test_what_comes_in_one_stratum_moves_nothing_in_another(n, added, seed):
    before = pd.Series({f"{s}{i}": s for s in "abc" for i in range(n)})
    more = pd.Series({f"a new {i}": "a" for i in range(added)}, dtype=object)
    after = sides.deal(pd.concat([before, more]), [0.7, 0.2, 0.1], seed)
    others = before.index[before != "a"]
    assert (after[others] == sides.deal(before, [0.7, 0.2, 0.1], seed)[others]).all()


def test_a_new_low_quality_vase_moves_no_high_quality_one(tmp_path):
    one = split_labels(tmp_path / "one", labelled_rows(30, 60)).set_index("path")["side"]
    two = split_labels(tmp_path / "two", labelled_rows(47, 60)).set_index("path")["side"]
    high = one.index[one.index.str.startswith("1/")]
    assert len(high) == 60 and (one[high] == two[high]).all()


def test_new_raw_vases_move_no_labelled_vase(tmp_path):
    labelled = split_labels(tmp_path / "l", labelled_rows())
    one = split_all(tmp_path / "one", rows(10, prefix="R"), labelled)
    two = split_all(tmp_path / "two", rows(200, prefix="R"), labelled)
    known = one.index[one["labelled"]]
    assert (one.loc[known, "side"] == two.loc[known, "side"]).all()


# --- strata by attributes ---


def attribute_table(path, values):
    pd.DataFrame({"vase": list(values), "shape": list(values.values())}).to_csv(path, index=False)
    return path


def test_attributes_stratify_raw_vases(tmp_path):
    labelled = split_labels(tmp_path / "l", labelled_rows())
    shapes = {f"R{i:03d}": "krater" if i < 100 else "lekythos" for i in range(120)}
    table = attribute_table(tmp_path / "a.csv", shapes)
    found = split_all(tmp_path / "s", rows(130, prefix="R"), labelled, table, stratify=["shape"])
    raw = found[~found["labelled"]]
    counts = raw.groupby([raw.index.map(lambda v: shapes.get(v, "?")), "side"]).size().unstack(fill_value=0)
    assert counts.loc["krater"].to_dict() == {"train": 80, "validation": 10, "test": 10}
    assert counts.loc["lekythos"].to_dict() == {"train": 16, "validation": 2, "test": 2}
    assert counts.loc["?"].to_dict() == {"train": 8, "validation": 1, "test": 1}


def test_attributes_stratify_labelled_vases_beside_their_label(tmp_path):
    shapes = {f"{p}{i:03d}": "krater" if i < 20 else "lekythos" for p in "LH" for i in range(40)}
    table = attribute_table(tmp_path / "a.csv", shapes)
    found = split_labels(tmp_path / "l", labelled_rows(), table, stratify=["shape"])
    counts = found.groupby(["label", found["vase"].map(shapes), "side"]).size()
    for label in (0, 1):
        for shape in ("krater", "lekythos"):
            assert {side: counts[label, shape, side] for side in SIDES} == {"train": 16, "validation": 2, "test": 2}


@pytest.mark.parametrize("values", [[-500, -480], [1.5, 2.0], [True, False]])
def test_a_vase_without_attribute_moves_no_vase_that_has_one(tmp_path, values):
    """A gap in a column of numbers turns 1 into 1.0: the strata must not be renamed by it."""
    table = {f"R{i:03d}": values[i % 2] for i in range(40)}
    frame = pd.DataFrame({"vase": list(table), "date": list(table.values())})
    frame.to_parquet(tmp_path / "a.parquet")
    group = pd.Series({v: v for v in table})
    one = sides.attribute_strata(group, tmp_path / "a.parquet", ["date"])
    two = sides.attribute_strata(
        pd.concat([group, pd.Series({"unknown": "unknown"})]), tmp_path / "a.parquet", ["date"]
    )
    assert two[one.index].equals(one) and two["unknown"] not in set(one)
    frame.to_csv(tmp_path / "whole.csv", index=False)
    (tmp_path / "gap.csv").write_text((tmp_path / "whole.csv").read_text() + "gap,\n")
    whole, gap = (sides.attribute_strata(group, tmp_path / f"{n}.csv", ["date"]) for n in ("whole", "gap"))
    assert whole.equals(gap) and whole.nunique() == 2


def test_a_vase_that_is_twice_in_the_attributes_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("vase,shape\nL000,krater\nL001,krater\nL000,pelike\n")
    with pytest.raises(KilnError, match=r"a\.csv.*L000"):
        split_labels(tmp_path / "l", labelled_rows(), tmp_path / "a.csv", stratify=["shape"])


def test_numbers_as_vase_names_are_found_in_a_parquet_table(tmp_path):
    pd.DataFrame({"vase": [1, 2], "shape": ["a", "b"]}).to_parquet(tmp_path / "a.parquet")
    found = sides.attribute_strata(pd.Series({"1": "1", "2": "2"}), tmp_path / "a.parquet", ["shape"])
    assert found.nunique() == 2 and not found.str.contains("?", regex=False).any()


def test_stratify_needs_the_table_and_its_column(tmp_path):
    with pytest.raises(KilnError, match="there is no table"):
        split_labels(tmp_path / "a", labelled_rows(), stratify=["shape"])
    table = attribute_table(tmp_path / "a.csv", {"L000": "krater"})
    with pytest.raises(KilnError, match="no column fabric; it has vase, shape"):
        split_labels(tmp_path / "b", labelled_rows(), table, stratify=["fabric"])


# --- what is refused ---


def test_identical_images_with_both_labels_are_refused_by_name(tmp_path):
    table = labelled_rows()
    table[3] = {**table[3], "sha256": table[77]["sha256"]}
    with pytest.raises(KilnError) as caught:
        split_labels(tmp_path, table)
    assert table[3]["path"] in caught.value.message and table[77]["path"] in caught.value.message
    assert not (tmp_path / "out").exists()


def test_identical_images_with_one_label_are_tied(tmp_path):
    table = labelled_rows()
    for i in range(1, 5):
        table[i] = {**table[i], "sha256": table[0]["sha256"]}
    found = split_labels(tmp_path, table).set_index("path")
    assert found.loc[[r["path"] for r in table[:5]], "side"].nunique() == 1
    assert json.loads((tmp_path / "out/summary.json").read_text())["tied_by_identical_images"] == 4


def test_unreadable_labelled_images_count_for_nothing(tmp_path):
    table = labelled_rows()
    table[3] = {**table[3], "sha256": table[77]["sha256"], "status": "quarantined"}
    found = split_labels(tmp_path, table)
    assert len(found) == len(table) - 1


def test_a_side_without_a_class_is_refused(tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    source = write(folder / "in.parquet", labelled_rows(40, 2))
    arguments = ["--labelled", source, "--output-folder", folder / "out", "--meta", folder / "out/meta.json"]
    said = error_of(command_line("split_labelled", *arguments))
    assert "no labelled image of class 1 on side" in said and "class 1 has 2 vases in all" in said
    assert files_below(folder) == ["in.parquet"]


def test_no_vase_left_to_deal(tmp_path):
    labelled = split_labels(tmp_path / "l", labelled_rows())
    raw = [{"path": f"r/{r.path}", "sha256": r.sha256, "vase": r.vase, "status": "ok"} for r in labelled.itertuples()]
    found = split_all(tmp_path / "a", raw, labelled)
    assert found["labelled"].all() and len(found) == 80
    assert (found["side"] == labelled.drop_duplicates("vase").set_index("vase")["side"].sort_index()).all()


# --- the audit ---


@pytest.fixture
def clean(tmp_path):
    """Splits, used images and sample of a run that never looked at the test side."""
    names = [f"V{i}" for i in range(10)]
    place = ["train"] * 6 + ["validation"] * 2 + ["test"] * 2
    split_table = pd.DataFrame({"vase": names, "group": names, "side": place})
    split_table.loc[10] = ["twin", "V9", "test"]  # holds an image of V9
    used = pd.DataFrame({"path": names, "vase": names, "side": place})
    used["role"] = used["side"].map({"train": "fit", "validation": "choose", "test": "score"})
    sample = pd.DataFrame({"path": names[:8], "vase": names[:8], "side": place[:8], "score": 0.5})
    return {"splits": split_table, "classifier": used, "sample": sample}


def audit(folder, tables, by_command=False):
    keys = {"splits": "vase", "classifier": "path", "sample": "path"}
    arguments = []
    for name, table in tables.items():
        arguments += [f"--{name}", write(folder / f"{name}.parquet", table, keys[name])]
    arguments += ["--output", folder / "out/audit.json", "--meta", folder / "out/meta.json"]
    if by_command:
        return command_line("audit_split", *arguments)
    run(audit_split.main, *arguments)
    return json.loads((folder / "out/audit.json").read_text())


def test_a_clean_run_passes_the_audit(tmp_path, clean):
    report = audit(tmp_path, clean)
    assert report["test_vases"] == 3
    assert {c["stage"]: c["vases"] for c in report["checks"]} == {
        "classifier: fitted on": 6,
        "classifier: chosen on": 2,
        "threshold: sampled from": 8,
    }
    assert all(c["shared_with_test"] == [] for c in report["checks"])


@pytest.mark.parametrize("vase", ["V9", "twin"])
@pytest.mark.parametrize(
    ("stage", "table", "row"),
    [
        ("classifier: fitted on", "classifier", {"role": "fit"}),
        ("classifier: chosen on", "classifier", {"role": "choose"}),
        ("threshold: sampled from", "sample", {"score": 0.1}),
    ],
)
def test_a_test_vase_that_is_learned_from_fails_the_audit(tmp_path, clean, stage, table, row, vase):
    """Also when only a byte-identical image of it is, under another name."""
    leak = {"path": "leak.jpg", "vase": vase, "side": "train", **row}
    clean[table] = pd.concat([clean[table], pd.DataFrame([leak])], ignore_index=True)
    with pytest.raises(KilnError) as caught:
        audit(tmp_path, clean)
    assert caught.value.message.startswith(f"{stage} 1 vases of the test side, such as {vase}")
    assert not (tmp_path / "out").exists()


def test_the_audit_goes_by_the_splits_not_by_what_a_stage_says_of_itself(tmp_path, clean):
    clean["splits"].loc[0, "side"] = "test"
    said = error_of(audit(tmp_path, clean, by_command=True))
    assert "classifier: fitted on 1 vases of the test side, such as V0" in said


@pytest.mark.parametrize(("vase", "group"), [("twin", "V9"), ("V0", "V0")])
def test_a_split_that_tears_identical_images_apart_fails_the_audit(tmp_path, clean, vase, group):
    """Learned from by a name on the train side, scored by another: V9 shares an image with it."""
    clean["splits"].loc[clean["splits"]["vase"].isin([vase, "V9"]), "group"] = group
    clean["splits"].loc[clean["splits"]["vase"] == vase, "side"] = "train"
    clean["sample"].loc[0, "vase"] = vase
    with pytest.raises(KilnError, match=rf"1 vases of the test side, such as {vase}"):
        audit(tmp_path, clean)


def test_a_vase_that_no_split_knows_fails_the_audit(tmp_path, clean):
    clean["sample"].loc[0, "vase"] = "stranger"
    with pytest.raises(KilnError, match="threshold: sampled from.*stranger"):
        audit(tmp_path, clean)


@pytest.mark.parametrize(("table", "column"), [("sample", "vase"), ("classifier", "role")])
def test_the_audit_needs_what_the_stages_recorded(tmp_path, clean, table, column):
    clean[table] = clean[table].drop(columns=column)
    with pytest.raises(KilnError, match=f"no column {column}"):
        audit(tmp_path, clean)


def test_a_stage_that_recorded_nothing_is_no_pass(tmp_path, clean):
    clean["classifier"] = clean["classifier"].query("role != 'choose'")
    with pytest.raises(KilnError, match="classifier: chosen on.*no vase"):
        audit(tmp_path, clean)


def test_defaults_are_the_published_shares():
    assert SplitSettings().model_dump() == {**SHARES, "seed": 42, "stratify": ()}
    assert np.isclose(sum(SHARES.values()), 1)


def test_a_score_on_another_side_fails_the_audit(tmp_path, clean):
    stray = {"path": "stray.jpg", "vase": "V7", "side": "validation", "role": "score"}
    clean["classifier"] = pd.concat([clean["classifier"], pd.DataFrame([stray])], ignore_index=True)
    with pytest.raises(KilnError, match="scored on 1 vases that are not of the test side, such as V7"):
        audit(tmp_path, clean)
