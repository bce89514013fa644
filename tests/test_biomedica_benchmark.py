"""The benchmark of pipeline `biomedica`, as small as it gets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow(minutes=2)
def test_the_benchmarks_run_and_all_ways_give_the_same_pairs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.biomedica", "--smallest", "--output", str(tmp_path / "all.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "all.json").read_text())
    reading, stall, memory = (found[part] for part in ("reading", "stall", "memory"))
    assert reading["pairs"] == 32 and reading.keys() >= {"webdataset", "datasets", "ours"}
    assert 0 < reading["ratio_min"] <= reading["ratio"] <= reading["ratio_max"]
    assert all(0 < one < 1 for one in reading["share_of_link"].values())
    assert all(one > 0 for one in reading["cpu_seconds_of_a_pair"].values())
    assert 0 < stall["waited_share_min"] <= stall["waited_share"] <= stall["waited_share_max"] < 1
    assert memory["epochs"] > 1 and memory["pairs"] == 32 * memory["epochs"]
    assert all(0 < one <= memory["peak_mb"] for one in memory["mb_of_quarters"])


@pytest.mark.slow
@pytest.mark.parametrize("given", ["one less", "one twice", "another caption"])
def test_a_way_that_gives_other_pairs_ends_the_benchmark(given):
    from benchmarks import biomedica_reading

    expected = [["a", 1], ["b", 2], ["c", 3]]
    biomedica_reading.check("ours", expected[::-1], expected)
    odd = {"one less": expected[:2], "one twice": [*expected, ["c", 3]], "another caption": [*expected[:2], ["c", 4]]}
    with pytest.raises(SystemExit, match="ours: other pairs"):
        biomedica_reading.check("ours", odd[given], expected)
