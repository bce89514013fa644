"""biomedica's loader: one order of an epoch, whoever reads it, and from any batch on."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os

import numpy as np
import pytest
import torch
from biomedica_streams import (
    HELD_OUT,
    MemoryHub,
    MemoryLocal,
    lane_threads,
    make_plan,
    make_reading,
    shard,
    transform,
)
from hub_server import HubServer
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.biomedica import index_local, positions
from scripts.biomedica.hybrid import Batch, Loader
from scripts.biomedica.local import LocalPairs
from scripts.biomedica.remote import Hub, ShardChanged
from scripts.biomedica.reports import Report
from scripts.biomedica.settings import RemoteSettings
from scripts.common.artefacts import sha256_text
from scripts.common.data_order import item_seed
from scripts.common.errors import KilnError
from scripts.common.images import open_rgb

SHARDS = {f"s{number}.tar": shard(number, 20 + number) for number in range(12)}
SCHEDULE = [list(SHARDS)[lane::4] for lane in range(4)]
PLAN = make_plan(8, 9, 50, 4, 5, SCHEDULE, SHARDS)  # 72 pairs an epoch, 22 of them local
LOCAL = MemoryLocal(40)
FIELDS = ("images", "tokens", "caption_ids", "positions", "streamed")


def children() -> list[multiprocessing.Process]:
    """Processes of this one, but for those that joblib keeps for other tests."""
    return [one for one in multiprocessing.active_children() if type(one).__name__ != "LokyProcess"]


def read(plan=PLAN, epoch=0, hub=None, local=LOCAL, prefetch=3, policies=None, **loader) -> list[Batch]:
    """All batches of a loader."""
    reading = make_reading(plan, prefetch, **(policies or {}))
    return list(Loader(reading, local, hub or MemoryHub(SHARDS), epoch, **loader))


def equal(one: Batch, other: Batch) -> bool:
    return one.keys == other.keys and all(torch.equal(getattr(one, name), getattr(other, name)) for name in FIELDS)


def all_equal(ones: list[Batch], others: list[Batch]) -> bool:
    return len(ones) == len(others) and all(map(equal, ones, others))


def union(ranks: list[list[Batch]]) -> list[Batch]:
    """Batches of all processes put together in the order of positions."""
    made = []
    for parts in zip(*ranks, strict=True):
        order = torch.cat([part.positions for part in parts]).argsort()
        keys = [key for part in parts for key in part.keys]
        columns = [torch.cat([getattr(part, name) for part in parts])[order] for name in FIELDS]
        made.append(Batch(*columns, [keys[place] for place in order], Report()))
    return made


def told(batches: list[Batch]) -> tuple:
    total = Report()
    for batch in batches:
        total.add(batch.report)
    return total.finished, sorted(total.rejected), sorted(total.unreachable)


@pytest.fixture(scope="module")
def whole() -> list[Batch]:
    return read()


# --- the order ---------------------------------------------------------------------------------


def test_each_planned_pair_comes_once_at_the_place_that_lane_and_number_say(whole):
    keys = [key for batch in whole for key in batch.keys]
    assert torch.cat([batch.positions for batch in whole]).tolist() == list(range(72)) and len(set(keys)) == 72
    streamed = [key for batch in whole for key, one in zip(batch.keys, batch.streamed, strict=True) if one]
    for lane, names in enumerate(SCHEDULE):
        expected = [key for name in names for key in SHARDS[name].keys]
        found = streamed[lane::4]
        assert len(found) == len(range(lane, 50, 4))
        for start in range(0, len(found), 5):
            assert sorted(found[start : start + 5]) == sorted(expected[start : min(start + 5, len(found))])
    local = {key for key in keys if key.startswith("l-")}
    assert len(local) == 22 and local <= {LOCAL.read(row).key for row in LOCAL.rows("train")}


def test_each_batch_has_the_planned_ratio(whole):
    counts = np.array([int(batch.streamed.sum()) for batch in whole])
    assert np.abs(counts - 8 * 50 / 72).max() <= 1 and counts.sum() == 50
    assert all(len(batch.keys) == 8 for batch in whole)


def test_pairs_are_what_their_keys_say_and_crops_are_drawn_by_the_key(whole):
    pictures = {pair.key: pair for pair in LOCAL.pairs}
    for batch in whole:
        for place, key in enumerate(batch.keys):
            if key in pictures:
                seed = item_seed(11, 0, int(sha256_text(key)[:16], 16))
                assert torch.equal(batch.images[place], transform(open_rgb(pictures[key].image, 10**6), seed))
                assert batch.caption_ids[place] == pictures[key].caption_id
    assert whole[0].images.dtype == torch.uint8 and whole[0].tokens.dtype == torch.int64


@pytest.mark.parametrize("ranks, workers, prefetch", [(1, 1, 1), (1, 3, 9), (2, 0, 40), (2, 3, 2), (4, 0, 1)])
def test_neither_processes_nor_workers_nor_prefetch_move_a_pair(whole, ranks, workers, prefetch):
    parts = [read(rank=rank, ranks=ranks, workers=workers, prefetch=prefetch) for rank in range(ranks)]
    assert all(len(batch.keys) == 8 // ranks for part in parts for batch in part)
    assert all_equal(union(parts), whole)
    assert told([batch for part in parts for batch in part]) == told(whole)
    lanes = [sorted(part[-1].report.lanes) for part in parts]
    assert lanes == [[lane for lane in range(4) if lane % ranks == rank] for rank in range(ranks)]
    assert not lane_threads() and not children()


def test_more_workers_than_lanes_and_shards(whole):
    assert all_equal(read(workers=6), whole)


def test_workers_may_be_spawned(whole, monkeypatch):
    monkeypatch.setattr(Loader, "_data_loader", _spawning(Loader._data_loader))
    assert all_equal(read(workers=1), whole)


def _spawning(make):
    def made(self):
        loader = make(self)
        loader.multiprocessing_context = "spawn"
        return loader

    return made


def test_epochs_and_seeds_have_their_own_orders(whole):
    keys = [key for batch in whole for key in batch.keys]
    other = [key for batch in read(epoch=1) for key in batch.keys]
    assert other != keys and len(set(other)) == 72
    assert [key for key in other if key.startswith("l-")] != [key for key in keys if key.startswith("l-")]
    seeded = dataclasses.replace(make_reading(PLAN), seed=12)
    assert [key for batch in Loader(seeded, LOCAL, MemoryHub(SHARDS), 0) for key in batch.keys] != keys


def test_local_pairs_alone_need_no_hub():
    plan = make_plan(8, 4, 0, 0, 5, [], {})
    batches = list(Loader(make_reading(plan), LOCAL, None, 0, workers=2))
    assert not any(batch.streamed.any() for batch in batches)
    rows = [key for batch in batches for key in batch.keys]
    assert len(set(rows)) == 32 and set(rows) == {LOCAL.read(row).key for row in LOCAL.rows("train")}


def test_streamed_pairs_alone_need_no_local_ones():
    plan = make_plan(8, 6, 48, 4, 5, SCHEDULE, SHARDS)
    batches = read(plan, local=None)
    assert all(batch.streamed.all() for batch in batches)
    assert all_equal(union([read(plan, local=None, rank=rank, ranks=2) for rank in range(2)]), batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_local_shards_of_an_index(tmp_path, workers):
    shards = {f"a/{number}.tar": shard(30 + number, 25) for number in range(3)}
    for name, one in shards.items():
        (tmp_path / "shards" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "shards" / name).write_bytes(one.data)
    arguments = ["--shards", tmp_path / "shards", "--output-folder", tmp_path / "index"]
    arguments += [
        "--settings",
        json.dumps({"held_out": HELD_OUT.model_dump(), "index": {"processes": 1}}),
        "--meta",
        tmp_path / "meta.json",
    ]
    index_local.main([str(one) for one in arguments])
    keys = sorted(key for one in shards.values() for key in one.keys)
    plan = make_plan(2, (len(keys) + 20) // 2, (len(keys) + 20) // 2 * 2 - len(keys), 4, 5, SCHEDULE, SHARDS)
    batches = read(plan, local=LocalPairs(tmp_path / "index", tmp_path / "shards"), workers=workers)
    found = [key for batch in batches for key, one in zip(batch.keys, batch.streamed, strict=True) if not one]
    assert sorted(found) == keys


def test_processes_that_cannot_share_are_refused():
    with pytest.raises(KilnError, match="4 lanes over 8"):
        read(rank=0, ranks=8)
    with pytest.raises(KilnError, match="batch_size 8 over 3"):
        read(rank=0, ranks=3)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_shares_are_disjoint_complete_and_even(data):
    ranks, workers = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    batch_size, batches = ranks * data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    lanes, streamed = ranks * data.draw(st.integers(1, 3)), data.draw(st.integers(0, batch_size * batches))
    plan = make_plan(batch_size, batches, streamed, lanes, 5, [[]] * lanes, {})
    found = {True: [], False: []}
    for number in range(batches):
        places = []
        for rank in range(ranks):
            sizes = []
            for worker in range(workers):
                one = positions.shares(plan, number, rank, ranks, worker, workers)
                own = [p for lane in one.streamed.values() for p in lane]
                assert all(p % lanes == lane for lane, numbers in one.streamed.items() for p in numbers)
                found[True] += own
                found[False] += one.local
                places += [one.streamed_from + p for p in own] + [one.local_from + p for p in one.local]
                sizes.append((len(own) + len(one.local), len(one.local)))
            assert sum(size for size, _ in sizes) == batch_size // ranks
            # nobody who got local pairs has more than one pair over anybody else
            assert all(size <= min(sizes)[0] + 1 for size, local in sizes if local)
        assert sorted(places) == list(range(number * batch_size, (number + 1) * batch_size))
    assert sorted(found[True]) == list(range(streamed))
    assert sorted(found[False]) == list(range(batch_size * batches - streamed))


# --- going on ----------------------------------------------------------------------------------


def through_disk(state: dict) -> dict:
    """As training states are kept."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_run_goes_on_with_exactly_the_batches_that_were_left(data):
    lanes = data.draw(st.sampled_from([1, 2, 4]))
    names = data.draw(st.permutations(list(SHARDS)))[: data.draw(st.integers(lanes, 12))]
    schedule = [names[lane::lanes] for lane in range(lanes)]
    shards = dict(SHARDS)
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(SHARDS[names[0]].data) - 1))
        shards[names[0]] = dataclasses.replace(SHARDS[names[0]], data=SHARDS[names[0]].data[:cut])
    breaks = {names[-1]: data.draw(st.integers(-1, 20000))} if data.draw(st.booleans()) else {}
    batches, buffer = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 30))
    streamed = data.draw(st.integers(max(0, 8 * batches - 32), 8 * batches))
    plan = make_plan(8, batches, streamed, lanes, buffer, schedule, shards)
    policies = {"unreachable": "others", "shortfall": "fewer"}
    complete = read(plan, hub=MemoryHub(shards, breaks), policies=policies)
    start = data.draw(st.integers(0, len([batch for batch in complete if batch.whole])))
    states = {}
    for batch in complete[:start]:
        states |= batch.report.lanes
    ranks = data.draw(st.sampled_from([one for one in (1, 2) if lanes % one == 0]))
    rest = [
        read(
            plan, hub=MemoryHub(shards, breaks), policies=policies, start_batch=start, rank=rank, ranks=ranks,
            prefetch=data.draw(st.integers(1, 20)), lane_states=through_disk(states),
        )
        for rank in range(ranks)
    ]  # fmt: skip
    left = [batch for batch in complete[start:] if batch.whole]
    assert all_equal(union([part[: len(left)] for part in rest]), left)
    if ranks == 1:
        assert told(complete[:start] + rest[0]) == told(complete)
        assert rest[0][-1].whole == complete[-1].whole if rest[0] else start == plan.steps_per_epoch


@pytest.mark.parametrize("ranks", [1, 4])
def test_each_batch_may_be_the_last_before_a_stop(whole, ranks):
    states = {}
    for start, batch in enumerate(whole):
        parts = [read(start_batch=start, lane_states=states, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert all_equal(union(parts), whole[start:])
        assert told(whole[:start] + [one for part in parts for one in part]) == told(whole)
        states |= through_disk(batch.report.lanes)
    assert read(start_batch=len(whole), lane_states=states) == []


def test_what_is_read_again_is_counted(whole):
    states = {}
    for batch in whole[:4]:
        states |= batch.report.lanes
    rest = read(start_batch=4, lane_states=states, workers=2)
    total = Report()
    for batch in rest:
        total.add(batch.report)
    assert total.reread_pairs >= sum(one["taken"] for one in states.values()) > 0
    assert 0 < total.reread_bytes < total.transfer["bytes"]
    assert not sum(batch.report.reread_pairs for batch in whole)


def test_states_of_another_batch_are_not_taken(whole):
    with pytest.raises(ValueError, match="stands after"):
        read(start_batch=3, lane_states=whole[3].report.lanes)


# --- too few -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_too_few_pairs_fail_the_run_or_end_the_epoch_for_all(workers):
    held = len(SHARDS["s1.tar"].keys)
    schedule = [own if lane != 1 else ["s1.tar"] for lane, own in enumerate(SCHEDULE)]
    plan = make_plan(8, 12, 96, 4, 5, schedule, SHARDS)
    with pytest.raises(KilnError, match=rf"the 1 shards of lane 1, .* hold {held} usable pairs: too few for batch"):
        read(plan, workers=workers)
    assert not lane_threads()
    fewer = {"shortfall": "fewer"}
    batches = read(plan, workers=workers, policies=fewer)
    full = held * 4 // 8  # lane 1 gives two pairs of each batch
    assert [batch.whole for batch in batches] == [True] * full + [False] and batches[-1].keys == []
    assert told(batches)[0]["s1.tar"] == SHARDS["s1.tar"].counts
    lacks = read(plan, policies=fewer, rank=1, ranks=2)
    assert [batch.whole for batch in lacks] == [True] * full + [False]
    assert len(read(plan, policies=fewer, rank=0, ranks=2)) == 12


def test_the_reserve_makes_up_for_a_shard_that_is_away():
    reserve = [[], ["s11.tar"], [], []]
    schedule = [[name for name in own if name != "s11.tar"] for own in SCHEDULE]
    plan = make_plan(8, 9, 50, 4, 5, schedule, SHARDS, reserve)
    hub = MemoryHub(SHARDS, {"s1.tar": -1, "s5.tar": 9000, "s9.tar": -1})
    batches = read(plan, hub=hub, policies={"unreachable": "others"}, workers=2)
    finished, rejected, unreachable = told(batches)
    assert [name for name, *_ in unreachable] == ["s1.tar", "s5.tar", "s9.tar"]
    keys = {key for batch in batches for key in batch.keys}
    assert len(keys) == 72 and keys & set(SHARDS["s11.tar"].keys)
    assert {name: pairs for name, _, pairs in unreachable} == {
        name: len(keys & set(SHARDS[name].keys)) for name in ("s1.tar", "s5.tar", "s9.tar")
    }


# --- ends --------------------------------------------------------------------------------------


def test_a_loader_that_is_left_early_leaves_no_thread_connection_or_process():
    hub = MemoryHub(SHARDS)
    hub.hangs = "s8.tar"
    with contextlib.closing(iter(Loader(make_reading(PLAN, 50), LOCAL, hub, 0))) as batches:
        next(batches)
        assert lane_threads()
    assert not lane_threads() and all(file.stream.closed for file in hub.files)
    with contextlib.closing(iter(Loader(make_reading(PLAN), LOCAL, MemoryHub(SHARDS), 0, workers=2))) as batches:
        next(batches)
        assert len(children()) == 2
    assert not children()


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_of_readers_keep_their_hint(workers):
    with pytest.raises(KilnError, match="s6.tar") as caught:
        read(hub=MemoryHub(SHARDS, {"s6.tar": 3000}), workers=workers)
    assert caught.value.hint
    assert not lane_threads() and not children()


def test_a_local_pair_that_is_no_longer_readable_is_named():
    local = MemoryLocal(40)
    local.pairs = [pair._replace(image=pair.image[:300]) for pair in local.pairs]
    with pytest.raises(KilnError, match="usable when it was indexed"):
        read(local=local)


def test_no_random_state_of_torch_is_used():
    before = torch.random.get_rng_state()
    read(workers=1)
    read()
    assert torch.equal(torch.random.get_rng_state(), before)


# --- a hub that misbehaves ---------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    for name in ("HF_TOKEN", *(one for one in os.environ if one.lower().endswith("_proxy"))):
        monkeypatch.delenv(name, raising=False)
    with HubServer() as made:
        made.repos["datasets/me/figures"] = {name: one.data for name, one in SHARDS.items()}
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


def real_hub(**changed) -> Hub:
    quick = {"wait_seconds": 0.001, "max_wait_seconds": 0.01, "read_seconds": 5.0, "attempts": 6}
    return Hub(RemoteSettings(repo="me/figures", **(quick | changed)), "main")


@pytest.mark.parametrize("workers", [0, 2])
def test_cut_connections_and_busy_replies_move_nothing(whole, server, workers):
    draw = np.random.default_rng(workers)
    for name, one in SHARDS.items():
        server.cuts[name] = [int(cut) for cut in draw.integers(0, len(one.data), 3)]
    server.unavailable = 4
    batches = read(hub=real_hub(), workers=workers)
    assert all_equal(batches, whole)
    total = Report()
    for batch in batches:
        total.add(batch.report)
    assert total.transfer["retries"] >= 4 and total.transfer["reconnects"] > 0
    states = {}
    for batch in batches[:5]:
        states |= batch.report.lanes
    assert all_equal(read(hub=real_hub(), start_batch=5, lane_states=states, workers=workers), whole[5:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changes_between_epochs_stops_the_run(whole, server, workers):
    hub = real_hub()
    assert all_equal(read(hub=hub, workers=workers), whole)
    assert all_equal(read(hub=hub, workers=workers), whole)
    changed = bytearray(SHARDS["s2.tar"].data)
    changed[700] ^= 1
    server.repos["datasets/me/figures"]["s2.tar"] = bytes(changed)
    with pytest.raises(ShardChanged, match="s2.tar"):
        read(hub=hub, workers=workers)


def test_a_shard_that_is_gone_is_unreachable(server):
    del server.repos["datasets/me/figures"]["s0.tar"]
    reserve = [["s0.tar"], [], [], []]
    plan = make_plan(8, 4, 32, 4, 5, [["s0.tar", "s4.tar"], *SCHEDULE[1:]], SHARDS, reserve)
    with pytest.raises(KilnError, match="s0.tar"):
        read(plan, hub=real_hub())
    _, _, unreachable = told(read(plan, hub=real_hub(), policies={"unreachable": "others"}))
    assert [(name, pairs) for name, _, pairs in unreachable] == [("s0.tar", 0)]
