"""biomedica's lanes: streamed pairs in shuffled blocks, places to go on from, and threads that end."""

import dataclasses
import io
import threading
import time

import pytest
import torch
from biomedica_streams import MemoryHub, Shard, lane_threads, make_plan, make_reading, shard
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.biomedica.blocks import Blocks
from scripts.biomedica.lanes import Lane
from scripts.biomedica.reports import Report
from scripts.common.errors import KilnError

SHARDS = {f"s{number}.tar": shard(number, pairs) for number, pairs in enumerate([33, 9, 17, 1, 30])}
PLAIN = {f"p{number}.tar": shard(50 + number, 12, odd=False) for number in range(3)}


def one_lane(shards: dict[str, Shard], quota: int, buffer: int, **policies):
    """A plan and how to read it, of one lane that reads all shards in order."""
    plan = make_plan(1, quota, quota, 1, buffer, [list(shards)], shards)
    return make_reading(plan, **policies)


def all_keys(shards: dict[str, Shard]) -> list[str]:
    return [key for one in shards.values() for key in one.keys]


def keys_of(blocks) -> list[list[str]]:
    return [[pair.key for pair in block.pairs] for block in blocks]


def through_disk(state: dict) -> dict:
    """As training states are kept."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def merged(reports) -> Report:
    total = Report()
    for report in reports:
        total.add(report)
    return total


def told(report: Report) -> tuple:
    """What must be told once, however often a run stops."""
    return report.finished, sorted(report.rejected), report.unreachable


@pytest.mark.parametrize("buffer", [1, 4, 13, 200])
def test_blocks_hold_consecutive_pairs_of_all_shards_in_another_order(buffer):
    keys = all_keys(SHARDS)
    reading = one_lane(SHARDS, len(keys), buffer)
    found = keys_of(Blocks(reading, 0, 0, list(SHARDS), MemoryHub(SHARDS)))
    assert [sorted(block) for block in found] == [
        sorted(keys[start : start + buffer]) for start in range(0, len(keys), buffer)
    ]
    if buffer > 1:
        assert [key for block in found for key in block] != keys
    again = keys_of(Blocks(reading, 1, 0, list(SHARDS), MemoryHub(SHARDS)))
    other = keys_of(Blocks(reading, 0, 1, list(SHARDS), MemoryHub(SHARDS))) if buffer > 1 else []
    assert buffer == 1 or (again != found and other[:1] != found[:1])


def test_counts_of_whole_shards_and_reasons_of_what_gave_no_pair():
    quota = len(all_keys(SHARDS)) - len(SHARDS["s4.tar"].keys) + 2  # ends within the last shard
    found = merged(block.report for block in Blocks(one_lane(SHARDS, quota, 6), 0, 0, list(SHARDS), MemoryHub(SHARDS)))
    whole = list(SHARDS)[:-1]
    assert found.finished == {name: SHARDS[name].counts for name in whole}
    rejected = {(name, key): status for name, key, status, _ in found.rejected if name in whole}
    assert rejected == {(name, key): status for name in whole for key, status in SHARDS[name].rejected.items()}
    assert set(rejected.values()) == {"rejected", "quarantined"}
    assert any(reason.startswith("image: truncated") for _, _, _, reason in found.rejected)
    assert any(reason.startswith("incomplete: no text") for _, _, _, reason in found.rejected)
    assert not found.reread_pairs


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_lane_goes_on_from_after_any_pair(data):
    names = data.draw(st.permutations(list(SHARDS)))
    shards = {name: SHARDS[name] for name in names}
    for name in names:
        if data.draw(st.integers(0, 4)) == 0:
            cut = data.draw(st.integers(0, len(SHARDS[name].data) - 1))
            shards[name] = dataclasses.replace(SHARDS[name], data=SHARDS[name].data[:cut])
    most = len(all_keys(shards))
    buffer, quota = data.draw(st.integers(1, 25)), data.draw(st.integers(1, most + 4))
    breaks = {name: data.draw(st.integers(-1, len(shards[name].data))) for name in names if data.draw(st.booleans())}
    reading = one_lane(shards, quota, buffer, unreachable="others")

    def blocks(state=None, breaks=breaks):
        return list(Blocks(reading, 0, 0, names, MemoryHub(shards, breaks), state))

    whole = blocks()
    keys = [key for block in keys_of(whole) for key in block]
    assert len(keys) == len(set(keys)) <= min(most, quota)
    assert len(keys) == quota or whole[-1].short
    given_before = data.draw(st.integers(0, len(keys)))
    states, reports, left = [], [], given_before
    for block in whole:
        reports.append(block.report)
        states.append(block.state(min(left, len(block.pairs))))
        if left <= len(block.pairs):
            break
        left -= len(block.pairs)
    if left == 0:
        reports.pop()  # told once the block's first pair is given
    state = through_disk(states[-1])
    if left == 0 and len(states) == 1:
        state = None
    # what was given up stays so for a block that was begun, though the hub may be well again
    well = breaks if state is None or state["taken"] == 0 else {
        name: end for place, (name, end) in enumerate((one, breaks.get(one)) for one in names)
        if end is not None and place not in dict(state["broken"])
    }  # fmt: skip
    rest = blocks(state, well)
    resumed = [key for block in keys_of(rest) for key in block]
    assert resumed[state["taken"] if state else 0 :] == keys[given_before:]
    assert told(merged([*reports, *(block.report for block in rest)])) == told(merged(block.report for block in whole))


def test_what_is_read_again_begins_where_the_block_began_and_is_counted():
    reading = one_lane(PLAIN, len(all_keys(PLAIN)), 5)
    names, hub = list(PLAIN), MemoryHub(PLAIN)
    first, second, *_ = list(Blocks(reading, 0, 0, names, hub))
    assert second.begin["resume"][0] > 0
    again = MemoryHub(PLAIN)
    resumed = next(iter(Blocks(reading, 0, 0, names, again, through_disk(second.state(2)))))
    assert [pair.key for pair in resumed.pairs] == [pair.key for pair in second.pairs]
    assert again.opened[0] == (names[0], second.begin["resume"][0])
    assert sum(again.stats.read()) >= resumed.report.reread_bytes > 0
    assert first.report.reread_pairs == second.report.reread_pairs == 0
    begin, after = (one["resume"] for one in (second.begin, second.after))
    assert second.after["index"] == 1  # the block goes on in the next shard
    assert resumed.report.reread_bytes == len(PLAIN[names[0]].data) - begin[0] + after[0]
    assert resumed.report.reread_pairs == sum(PLAIN[names[0]].counts.values()) // 2 - begin[1] + after[1]
    fresh = next(iter(Blocks(reading, 0, 0, names, MemoryHub(PLAIN), through_disk(first.state(5)))))
    assert fresh.report.reread_pairs == fresh.report.reread_bytes == 0


def test_at_most_one_shard_is_read_again_where_no_block_is_longer_than_a_shard():
    reading = one_lane(SHARDS, len(all_keys(SHARDS)), 1)
    names = list(SHARDS)
    for block in list(Blocks(reading, 0, 0, names, MemoryHub(SHARDS)))[1:]:
        state = block.state(0 if block.pairs else 1)
        hub = MemoryHub(SHARDS)
        resumed = next(iter(Blocks(reading, 0, 0, names, hub, state)))
        assert resumed.report.reread_bytes <= len(SHARDS[names[state["index"]]].data)
        assert [one.key for one in resumed.pairs] == [one.key for one in block.pairs]


@pytest.mark.parametrize("damage", ["away", "truncated"])
def test_a_shard_that_cannot_be_read_fails_the_run_or_is_made_up(damage):
    shards, names = dict(PLAIN), list(PLAIN)
    half = len(PLAIN["p1.tar"].data) // 2
    breaks = {"p1.tar": half} if damage == "away" else {}
    if damage == "truncated":
        shards["p1.tar"] = Shard(PLAIN["p1.tar"].data[:half], [], {}, {})
    first, last = len(PLAIN["p0.tar"].keys), len(PLAIN["p2.tar"].keys)
    with pytest.raises(KilnError, match="p1.tar") as caught:
        list(Blocks(one_lane(shards, first + last, 3), 0, 0, names, MemoryHub(shards, breaks)))
    assert damage in str(caught.value)
    reading = one_lane(shards, first + last, 3, unreachable="others")
    blocks = list(Blocks(reading, 0, 0, names, MemoryHub(shards, breaks)))
    found, report = [key for block in keys_of(blocks) for key in block], merged(block.report for block in blocks)
    gave = sorted(set(found) & set(PLAIN["p1.tar"].keys))
    assert len(found) == first + last and 0 < len(gave) < len(PLAIN["p1.tar"].keys)
    assert gave == sorted(PLAIN["p1.tar"].keys[: len(gave)])  # all that came before it broke
    ((name, reason, pairs),) = report.unreachable
    assert (name, pairs) == ("p1.tar", len(gave)) and damage in reason
    assert "p1.tar" not in report.finished


def test_a_block_that_was_begun_must_be_as_it_was():
    reading = one_lane(PLAIN, len(all_keys(PLAIN)), 8, unreachable="others")
    blocks = list(Blocks(reading, 0, 0, list(PLAIN), MemoryHub(PLAIN)))
    state = through_disk(blocks[0].state(3))
    with pytest.raises(KilnError, match="needed again"):
        list(Blocks(reading, 0, 0, list(PLAIN), MemoryHub(PLAIN, {"p0.tar": 3000}), state))


def lane_of(reading, hub, names, state=None) -> Lane:
    plan = reading.plan
    return Lane(
        2 * plan.shuffle_buffer + reading.prefetch,
        lambda *hooks: Blocks(reading, 0, 0, names, hub, state, *hooks), state,
    )  # fmt: skip


def test_a_lane_gives_all_pairs_and_then_no_more():
    keys = all_keys(PLAIN)
    hub = MemoryHub(PLAIN)
    lane = lane_of(one_lane(PLAIN, len(keys) + 7, 5), hub, list(PLAIN))
    report, found = Report(), []
    while taken := lane.take(4, report):
        found += [pair.key for pair in taken]
        assert lane.state["block"] * 5 + lane.state["taken"] == len(found)
    assert sorted(found) == sorted(keys) and lane.take(1, report) == []
    assert f"hold {len(keys)} usable pairs" in lane.describe()
    lane.close()
    assert not lane_threads() and all(file.stream.closed for file in hub.files)


def test_a_lane_reads_ahead_as_far_as_there_is_room():
    read = threading.Semaphore(0)
    reading = one_lane(PLAIN, len(all_keys(PLAIN)), 5, prefetch=2)
    made, seen = reading.transform, []

    def counted(image, seed):
        seen.append(seed)
        read.release()
        return made(image, seed)

    lane = lane_of(dataclasses.replace(reading, transform=counted), MemoryHub(PLAIN), list(PLAIN))
    try:
        room = 2 * 5 + 2
        for _ in range(room):
            assert read.acquire(timeout=60)
        given = 0
        for taken in (1, 3, 4):
            given += len(lane.take(taken, Report()))
            for _ in range(taken):
                assert read.acquire(timeout=60)  # a pair that is given makes room for one
            assert not read.acquire(timeout=0.05)
            assert len(seen) == room + given
    finally:
        lane.close()
    assert not lane_threads()


def test_errors_of_the_thread_reach_the_consumer_after_the_pairs_before_them():
    hub = MemoryHub(PLAIN, {"p1.tar": 0})
    lane = lane_of(one_lane(PLAIN, len(all_keys(PLAIN)), 3), hub, list(PLAIN))
    before = len(PLAIN["p0.tar"].keys) // 3 * 3
    assert len(lane.take(before, Report())) == before
    for _ in range(2):
        with pytest.raises(KilnError, match="p1.tar"):
            lane.take(1, Report())
    lane.close()
    assert not lane_threads() and all(file.stream.closed for file in hub.files)


@pytest.mark.parametrize("where", ["full", "waits for the hub"])
def test_a_lane_that_is_left_ends_its_thread_and_its_connection(where):
    hub = MemoryHub(PLAIN)
    hub.hangs = "p1.tar" if where != "full" else None
    prefetch = 1 if where == "full" else 30
    lane = lane_of(one_lane(PLAIN, len(all_keys(PLAIN)), 3, prefetch=prefetch), hub, list(PLAIN))
    assert len(lane.take(2, Report())) == 2
    deadline = time.monotonic() + 60
    while where != "full" and not any(name == "p1.tar" for name, _ in hub.opened):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    hub.close()
    lane.close()
    assert not lane_threads() and all(file.stream.closed for file in hub.files)
