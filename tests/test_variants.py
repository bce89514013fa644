"""Variants and seeds: which runs a configuration has, what they share, what is refused, how scores are compared."""

import json
import statistics

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import config
from scripts.common import variants
from scripts.common.errors import KilnError
from scripts.common.settings import parse_overrides
from scripts.report import compare_variants


def load(text: str, tmp_path) -> config.Config:
    """The configuration of --config set="..."."""
    return config.load({"set": text}, tmp_path / "config.yaml")


def test_without_variants_there_is_one_run_the_configuration_itself(tmp_path):
    loaded = load("busi.train.lr=1e-3", tmp_path)
    assert config.runs(loaded, "busi") == {"main": loaded}
    assert config.runs(loaded, "biomedica") == {"main": loaded}


def test_each_variant_has_its_settings_and_each_seed_its_run(tmp_path):
    loaded = load("busi.variants.low.train.lr=1e-5 busi.variants.low.seeds=[1,2] busi.train.max_steps=7", tmp_path)
    runs = config.runs(loaded, "busi")
    assert list(runs) == ["main", "low-1", "low-2"]
    assert [one.busi.train.lr for one in runs.values()] == [loaded.busi.train.lr, 1e-5, 1e-5]
    assert [one.busi.train.seed for one in runs.values()] == [42, 1, 2]
    assert {one.busi.train.max_steps for one in runs.values()} == {7}


def test_further_seeds_leave_the_run_with_the_own_seed_where_it_is(tmp_path):
    runs = config.runs(load("busi.variants.main.seeds=[42,1]", tmp_path), "busi")
    assert list(runs) == ["main", "main-1"]


def test_stages_before_the_first_change_are_shared(tmp_path):
    low = "biomedica.variants.low.train.lr=1e-5 biomedica.variants.low.seeds=[3,4]"
    text = f"{low} biomedica.variants.big.plan.batch_size=64"
    section = load(text, tmp_path).biomedica
    assert variants.serving(section, "plan") == {"main": "main", "low-3": "main", "low-4": "main", "big": "big"}
    assert variants.serving(section, "train") == {name: name for name in ("main", "low-3", "low-4", "big")}


def test_settings_that_decide_no_number_make_no_run_of_their_own(tmp_path):
    section = load("busi.variants.quick.train.workers=9", tmp_path).busi
    assert variants.serving(section, "train") == {"main": "main", "quick": "main"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("busi.variants.low.train.lrr=1", "did you mean 'train.lr'"),
        ("busi.variants.low.split.seed=1", "variant low changes split, which all variants share"),
        ("busi.variants.low.trian.lr=1", "unknown key 'trian'"),
        ("busi.variants.main.train.lr=1", "it is the configuration itself"),
        ("busi.variants.low.seeds=3", "variant low: seeds = 3"),
        ("busi.variants.low.seeds=[1,1]", "names one twice"),
        ("busi.variants.low.seeds=[-1]", "give whole numbers from 0"),
        ("busi.variants.low.seeds=[true]", "give whole numbers from 0"),
        ("busi.variants.a-1.train.lr=1", "variant 'a-1': not a name"),
        ("busi.variants.low.train=3", "variant low"),
        ("busi.variants.low.train.lr=-1", "greater than 0"),
    ],
)
def test_what_cannot_be_is_refused_before_any_job(text, message, tmp_path):
    with pytest.raises(KilnError) as caught:
        load(text, tmp_path)
    assert message in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True).filter(lambda name: name != "main"),
        st.tuples(st.sampled_from([1e-5, 3e-5, 2e-4]), st.lists(st.integers(0, 50), max_size=3, unique=True)),
        max_size=4,
    )
)
def test_runs_have_own_names_and_share_exactly_equal_settings(given):
    values = {name: {"train": {"lr": lr}, "seeds": seeds} for name, (lr, seeds) in given.items()}
    section = config.Config.model_validate({"busi": {"variants": values}}).busi
    runs = variants.runs(section)
    assert len(runs) == 1 + sum(max(1, len(seeds)) for _, seeds in given.values())
    serves = variants.serving(section, "train")
    for one, first in serves.items():
        same = [name for name, run in runs.items() if run.settings.train == runs[one].settings.train]
        assert first == same[0]


def write(path, **metrics):
    """A metrics file with these values."""
    facts = {"baseline": 0.1, "n": 50, "ci95": [0.0, 1.0], "higher_is_better": True}
    path.write_text(json.dumps({"summary": {name: {"value": value, **facts} for name, value in metrics.items()}}))
    return path


def test_scores_are_compared_over_seeds(tmp_path):
    values = {"low/low-1": 0.5, "low/low-2": 0.7, "low/low-3": 0.9, "main/main": 0.6}
    files = [f"{run}={write(tmp_path / f'{i}.json', psnr=value)}" for i, (run, value) in enumerate(values.items())]
    out = tmp_path / "out"
    options = ["--output-folder", str(out), "--meta", str(out / "meta.json")]
    compare_variants.main(
        ["--rae", *files, "--busi", f"main/main={write(tmp_path / 'b.json', accuracy=0.25)}", *options]
    )
    frame = pd.read_csv(out / "variants.csv")
    assert len(frame) == 5
    table = compare_variants.by_variant(frame).set_index(["pipeline", "variant"])
    low = table.loc[("rae", "low")]
    assert (low["seeds"], low["min"], low["max"]) == (3, 0.5, 0.9)
    assert low["mean"] == pytest.approx(statistics.mean([0.5, 0.7, 0.9]))
    assert low["sd"] == pytest.approx(statistics.stdev([0.5, 0.7, 0.9]))
    page = (out / "variants.md").read_text()
    assert "| psnr | 0.7 ± 0.2 | 0.6 |" in page
    assert "| accuracy | 0.25 |" in page


def test_a_metrics_file_without_its_run_is_refused(tmp_path):
    options = ["--output-folder", str(tmp_path), "--meta", str(tmp_path / "meta.json")]
    with pytest.raises(KilnError, match="expected VARIANT/RUN=FILE"):
        compare_variants.main(["--rae", f"low={write(tmp_path / 'm.json', psnr=1.0)}", *options])


def test_overrides_of_variants_are_dotted_like_all_others():
    parsed = parse_overrides("rae.variants.low.autoencoder.lr=1e-4 rae.variants.low.seeds=[0,1]")
    assert parsed == {"rae": {"variants": {"low": {"autoencoder": {"lr": 1e-4}, "seeds": [0, 1]}}}}
