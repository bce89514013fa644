"""The plan: exact shares, quotas and batches, shards for each epoch, and what to do where there are too few."""

import json
import math

import pandas as pd
import pytest
from biomedica_fixtures import write_shards
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from scripts.biomedica import index_local, plan, planning
from scripts.biomedica.planning import Plan, epoch_shards, make_plan, not_local, quota, streamed_until
from scripts.biomedica.settings import HeldOutSettings, PlanSettings
from scripts.common.errors import KilnError

HELD_OUT = HeldOutSettings()  # leaves 0.96 of all pairs
SHARD = 11_250_000_000  # 10,000 pairs of 1.125 MB, as published
MEAN = 1_125_000.0


def shards(count, size=SHARD):
    return [(f"data/{n:05d}.tar", size) for n in range(count)]


def made(local=10_653, remote=None, mean=MEAN, arm="hybrid", **values) -> Plan:
    return make_plan(PlanSettings(**values), HELD_OUT, arm, local, shards(40) if remote is None else remote, mean)


# --- the published example ---


def test_the_published_example_has_its_shares():
    found = made(batch_size=250)  # which the target fills exactly
    assert (found.samples, found.local_per_epoch, found.streamed_per_epoch) == (50_000, 10_653, 39_347)
    assert (found.local_share, found.streamed_share) == pytest.approx((21.306, 78.694))
    assert (f"{found.local_share:.1f}", f"{found.streamed_share:.1f}") == ("21.3", "78.7")
    assert (found.dropped, found.shortfall, found.steps_per_epoch, found.steps) == (0, 0, 200, 2000)
    assert found.network_bytes_per_epoch == found.disk_saved_bytes == round(39_347 * 1_125_000 / 0.96)
    found = made()  # with the original's batches of 256
    assert (found.samples, found.dropped, found.local_per_epoch, found.streamed_per_epoch) == (
        49_920,
        80,
        10_653,
        39_267,
    )
    assert (f"{found.local_share:.1f}", f"{found.streamed_share:.1f}") == ("21.3", "78.7")


def test_expected_bytes_follow_the_measured_mean():
    one, two = made(), made(mean=2 * MEAN)
    assert two.network_bytes_per_epoch == pytest.approx(2 * one.network_bytes_per_epoch)
    assert one.shards["data/00000.tar"] == {"bytes": SHARD, "expected_samples": 9600}
    assert two.shards["data/00000.tar"]["expected_samples"] == 4800
    assert sum(map(len, two.schedule[0])) > sum(map(len, one.schedule[0]))


def test_enough_local_pairs_stream_nothing():
    for local in (49_920, 49_999, 50_000, 10**7):
        found = made(local=local, remote=[], mean=None)
        assert (found.local_per_epoch, found.streamed_per_epoch, found.dropped) == (49_920, 0, 80)
        assert (found.lanes, found.shards, found.network_bytes_per_epoch) == (0, {}, 0)
        assert found.schedule == [[]] * 10 and found.local_share == 100
        assert epoch_shards(found, 3, {"x": 1}) == []
        assert streamed_until(found, found.steps_per_epoch) == 0


def test_no_local_pairs_stream_all():
    found = made(local=0)
    assert (found.local_per_epoch, found.streamed_per_epoch, found.streamed_share) == (0, 49_920, 100)
    assert streamed_until(found, 7) == 7 * 256


def test_arm_local_has_as_many_steps_as_hybrid():
    hybrid, local = made(), made(arm="local")
    assert local.steps == hybrid.steps == 1950
    assert (local.local_per_epoch, local.streamed_per_epoch, local.samples) == (10_496, 0, 10_496)
    assert (local.steps_per_epoch, local.dropped) == (41, 157)
    assert local.epochs == math.ceil(1950 / 41) and len(local.schedule) == local.epochs
    assert (local.shards, local.lanes, local.network_bytes_per_epoch) == ({}, 0, 0)
    assert made(arm="local", local=60_000).epochs == 10
    with pytest.raises(KilnError, match="255 local pairs to train on, fewer than a batch of 256"):
        made(arm="local", local=255)


# --- too little ---


def test_a_shortfall_that_is_known_fails_or_shortens_epochs_by_setting():
    two = shards(2)  # about 19,200 pairs of train
    with pytest.raises(KilnError) as caught:
        made(remote=two)
    assert "50000 pairs are wanted: 10653 are local" in caught.value.message and "19200 more" in caught.value.message
    assert "samples to at most 29853" in caught.value.hint
    found = made(remote=two, shortfall="fewer")
    assert found.samples == 29_853 // 256 * 256 and found.samples + found.dropped + found.shortfall == 50_000
    assert (found.local_per_epoch, found.shortfall) == (10_653, 50_000 - 29_853)
    assert made(remote=two, samples=29_853).shortfall == 0
    with pytest.raises(KilnError, match="10653 are local, and 0 shards"):
        made(remote=[])
    assert made(remote=[], shortfall="fewer").streamed_per_epoch == 0
    with pytest.raises(KilnError, match="3 pairs to train on .3 local., fewer than a batch of 256"):
        made(local=3, remote=[], shortfall="fewer")
    with pytest.raises(KilnError, match="10 pairs to train on"):
        made(samples=10)


def test_lanes_that_cannot_share_the_shards_evenly_are_a_shortfall():
    nine = shards(9)  # 86,400 pairs, but one lane of eight has two shards and the others one
    with pytest.raises(KilnError, match="86400 more, of which 768") as caught:
        made(local=0, remote=nine, samples=80_000)
    assert "fewer biomedica.plan.lanes" in caught.value.hint
    assert made(local=0, remote=nine, samples=80_000, lanes=3).shortfall == 0


def test_streaming_needs_a_measured_mean():
    for mean in (None, 0.0):
        with pytest.raises(KilnError, match="no mean size of a pair"):
            made(mean=mean)


# --- batches, quotas, schedule ---

SIZES = st.lists(st.integers(1, 4000), min_size=1, max_size=30)


@st.composite
def plans(draw):
    sizes = draw(SIZES)
    values = PlanSettings(
        samples=draw(st.integers(2, 3000)), batch_size=draw(st.integers(2, 64)), lanes=draw(st.integers(1, 9)),
        epochs=draw(st.integers(1, 3)), seed=draw(st.integers(0, 3)), shortfall="fewer",
    )  # fmt: skip
    local = draw(st.integers(0, 2000))
    remote = [(f"{n}.tar", size * 10) for n, size in enumerate(sizes)]
    try:
        return values, local, remote, make_plan(values, HELD_OUT, "hybrid", local, remote, 10.0)
    except KilnError as error:
        assert "fewer than a batch" in error.message
        assume(False)


@settings(max_examples=150, deadline=None)
@given(plans())
def test_counts_add_up_and_each_batch_has_the_ratio(drawn):
    values, local, _, found = drawn
    assert found.samples == found.local_per_epoch + found.streamed_per_epoch
    assert found.samples == found.steps_per_epoch * values.batch_size
    assert found.samples + found.dropped + found.shortfall == values.samples
    assert 0 <= found.dropped < values.batch_size and found.local_per_epoch <= local
    assert found.local_per_epoch in (local, found.samples)  # local ones first
    assert found.local_share + found.streamed_share == pytest.approx(100)
    until = [streamed_until(found, batch) for batch in range(found.steps_per_epoch + 1)]
    assert until[0] == 0 and until[-1] == found.streamed_per_epoch and until == sorted(until)
    ratio = values.batch_size * found.streamed_per_epoch / found.samples
    for before, after in zip(until, until[1:], strict=False):
        assert abs(after - before - ratio) <= 1 and 0 <= after - before <= values.batch_size
    locals_until = [batch * values.batch_size - streamed for batch, streamed in enumerate(until)]
    assert locals_until == sorted(locals_until) and locals_until[-1] == found.local_per_epoch


@settings(max_examples=150, deadline=None)
@given(plans(), st.integers(1, 9))
def test_each_streamed_position_is_of_one_lane_and_one_process(drawn, ranks):
    found = drawn[-1]
    lanes = found.lanes
    of_lane = [range(lane, found.streamed_per_epoch, lanes) for lane in range(lanes)]
    assert sorted(p for own in of_lane for p in own) == list(range(found.streamed_per_epoch))
    quotas = [quota(found.streamed_per_epoch, lanes, lane) for lane in range(lanes)]
    assert quotas == [len(own) for own in of_lane]
    assert not quotas or max(quotas) - min(quotas) <= 1
    of_rank = [[lane for lane in range(lanes) if lane % ranks == rank] for rank in range(ranks)]
    assert sorted(lane for own in of_rank for lane in own) == list(range(lanes))


def check_schedule(found, epoch, names, sizes):
    planned, reserve = names
    everyone = [name for lanes in (planned, reserve) for own in lanes for name in own]
    assert sorted(everyone) == sorted(found.shards)
    for lane in range(found.lanes):
        wanted = quota(found.streamed_per_epoch, found.lanes, lane)
        own = sum(sizes[name] for name in planned[lane])
        assert own >= min(wanted, own + sum(sizes[name] for name in reserve[lane]))
        if any(reserve):  # all lanes have enough, with the margin, and not a shard more
            assert own >= wanted * (1 + planning.MARGIN)
            if planned[lane]:
                assert own - sizes[planned[lane][-1]] < wanted * (1 + planning.MARGIN)


@settings(max_examples=150, deadline=None)
@given(plans(), st.randoms(use_true_random=False))
def test_the_schedule_covers_the_quotas_of_every_epoch(drawn, rng):
    values, local, remote, found = drawn
    expected = {name: facts["expected_samples"] for name, facts in found.shards.items()}
    assert expected == ({name: int(size / 10.0 * 0.96) for name, size in remote} if found.lanes else {})
    assert found.lanes == (min(values.lanes, len(remote)) if expected else 0)
    assert len(found.schedule) == len(found.reserve) == values.epochs
    for epoch in range(values.epochs):
        check_schedule(found, epoch, (found.schedule[epoch], found.reserve[epoch]), expected)
        for lane in range(found.lanes):
            held = sum(expected[name] for name in epoch_shards(found, epoch, {})[lane])
            assert held >= quota(found.streamed_per_epoch, found.lanes, lane)
    shuffled = rng.sample(remote, len(remote))
    assert make_plan(values, HELD_OUT, "hybrid", local, shuffled, 10.0) == found  # the listing's order is nothing
    assert Plan.from_json(json.loads(json.dumps(found.to_json()))) == found


@settings(max_examples=80, deadline=None)
@given(plans(), st.randoms(use_true_random=False))
def test_actual_counts_replace_estimates_from_the_second_epoch_on(drawn, rng):
    found = drawn[-1]
    assume(found.lanes and found.epochs > 1)
    counts = {
        name: rng.randint(0, 5000) for name in rng.sample(sorted(found.shards), rng.randint(1, len(found.shards)))
    }
    assert epoch_shards(found, 0, counts) == epoch_shards(found, 0, {})
    lanes = epoch_shards(found, 1, counts)
    assert sorted(name for own in lanes for name in own) == sorted(found.shards)
    sizes = {name: counts.get(name, facts["expected_samples"]) for name, facts in found.shards.items()}
    held = [sum(sizes[name] for name in own) for own in lanes]
    if sum(sizes.values()) >= found.streamed_per_epoch * (1 + planning.MARGIN) + found.lanes * (
        max(sizes.values()) + 1
    ):
        assert all(own >= quota(found.streamed_per_epoch, found.lanes, lane) for lane, own in enumerate(held))
    assert epoch_shards(found, 1, counts) == lanes


def test_epochs_use_different_shards_where_the_repo_is_larger():
    found = made(remote=shards(2400))
    used = [{name for lane in lanes for name in lane} for lanes in found.schedule]
    assert len(set().union(*used)) > 5 * len(used[0]) and used[0] != used[1]
    assert made(remote=shards(2400), seed=7).schedule != found.schedule
    reserve = [sum(found.shards[name]["expected_samples"] for name in lane) for lane in found.reserve[0]]
    assert max(reserve) - min(reserve) <= 9600  # dealt evenly


def test_a_shard_more_leaves_the_order_of_the_others():
    before, after = (made(remote=shards(count), lanes=1) for count in (40, 41))
    more = [name for name in epoch_shards(after, 0, {})[0] if name != "data/00040.tar"]
    assert more == epoch_shards(before, 0, {})[0]


def test_what_is_no_plan_is_refused(tmp_path):
    values = made().to_json()
    for odd in ({}, [], values | {"more": 1}, {name: value for name, value in values.items() if name != "seed"}):
        (tmp_path / "plan.json").write_text(json.dumps(odd))
        with pytest.raises(KilnError, match="no plan"):
            Plan.read(tmp_path / "plan.json")


# --- shards of the repo that are on disk ---


@pytest.mark.parametrize(
    ("name", "local", "on_disk"),
    [
        ("data/a.tar", {"a.tar": (5, "")}, True),
        ("data/a.tar", {"data/a.tar": (5, "")}, True),
        ("a.tar", {"data/a.tar": (5, "")}, True),
        ("data/a.tar", {"a.tar": (6, "")}, False),  # another shard of the same name
        ("data/a.tar", {"a.tar": (3, "truncated")}, True),  # a download that was cut: its pairs are used
        ("data/a.tar", {"other/a.tar": (5, "")}, False),
        ("data/a.tar", {"b.tar": (5, "")}, False),
        ("data/aa.tar", {"a.tar": (5, "")}, False),
    ],
)
def test_a_shard_that_is_local_is_not_streamed(name, local, on_disk):
    remote = [("x.tar", 1), (name, 5)]
    kept, names = not_local(remote, local)
    assert names == ([name] if on_disk else []) and kept == [one for one in remote if one[0] not in names]


# --- the step ---


def write_remote(folder, listed, **summary):
    folder.mkdir()
    pd.DataFrame({"name": [n for n, _ in listed], "bytes": [b for _, b in listed], "sha256": None}).to_parquet(
        folder / "shards.parquet"
    )
    facts = {"repo": "a/b", "revision": "0" * 40, "needed": True, "reason": "", "bytes_per_sample": None} | summary
    (folder / "summary.json").write_text(json.dumps(facts))


@pytest.fixture
def world(tmp_path, caplog):
    caplog.set_level("INFO", logger="kiln")
    paths = write_shards(tmp_path / "shards", 2, 10)
    sizes = [path.stat().st_size for path in paths]
    write_remote(tmp_path / "remote", [(f"data/{n}.tar", sizes[0]) for n in range(9)] + [(paths[0].name, sizes[0])])
    return tmp_path


def index(folder, *options):
    index_local.main(
        ["--output-folder", str(folder / "index"), "--meta", str(folder / "m.json"), "--threads", "1", *options]
    )


def run(folder, *options, out="plan", **values):
    path = folder / out / "plan.json"
    values = {"samples": 60, "batch_size": 8, "lanes": 2, "epochs": 2} | values
    plan.main(
        ["--index", str(folder / "index"), "--remote", str(folder / "remote"), "--output", str(path), "--settings",
         json.dumps({"plan": values}), "--meta", str(path.with_name("meta.json")), *options]
    )  # fmt: skip
    return Plan.read(path)


def test_the_step_plans_what_was_indexed_and_listed(world, caplog):
    index(world, "--shards", str(world / "shards"))
    summary = json.loads((world / "index/summary.json").read_text())
    caplog.clear()
    found = run(world)
    train = summary["sides"]["train"]
    assert (found.local_per_epoch, found.samples, found.dropped) == (train, 56, 4)
    assert found.bytes_per_sample == summary["bytes_per_sample"]
    assert sorted(found.shards) == [f"data/{n}.tar" for n in range(9)]  # the tenth is on disk
    share = 100 * train / 56
    assert f"{share:.1f} % local ({train}), {100 - share:.1f} % streamed ({56 - train}): " in caplog.text
    assert "MB over the network per epoch, nothing on disk" in caplog.text
    assert "1 of the repo's 10 shards are local" in caplog.text
    assert "4 pairs of the target do not fill a batch" in caplog.text
    with Image.open(world / "plan/plan.png") as image:
        assert image.width > 500
    again = run(world, out="again")
    assert again == found
    for name in ("plan.json", "plan.png"):
        assert (world / "again" / name).read_bytes() == (world / "plan" / name).read_bytes()
    meta = json.loads((world / "plan/meta.json").read_text())
    assert {"index", "local_shards", "remote", "remote_shards"} == set(meta["inputs"]) and len(meta["outputs"]) == 2
    assert run(world, "--arm", "local", out="local").steps == found.steps


def test_the_step_says_that_all_is_streamed_or_nothing(world, caplog):
    index(world)
    with pytest.raises(KilnError, match="no mean size of a pair"):
        run(world)
    listed = json.loads((world / "remote/summary.json").read_text())
    (world / "remote/summary.json").write_text(json.dumps(listed | {"bytes_per_sample": 1000.0}))
    found = run(world)
    assert (found.streamed_share, found.bytes_per_sample) == (100, 1000.0) and len(found.shards) == 10
    assert "no local shards (no folder is set): all pairs are streamed" in caplog.text
    index(world, "--shards", str(world / "shards"))
    assert run(world, samples=16).streamed_per_epoch == 0
    assert "all 16 pairs are local: nothing is streamed" in caplog.text


def test_the_step_says_what_is_missing_from_the_target(world, caplog):
    index(world, "--shards", str(world / "shards"))
    with pytest.raises(KilnError, match="5000 pairs are wanted"):
        run(world, samples=5000)
    found = run(world, samples=5000, shortfall="fewer")
    assert f"{found.shortfall:,} pairs fewer than wanted" in caplog.text and found.shortfall > 4000


def test_a_missing_input_is_named(world):
    with pytest.raises(KilnError, match=r"summary\.json: no such file"):
        run(world)
