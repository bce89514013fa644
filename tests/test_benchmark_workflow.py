"""How many jobs a full build at the published sizes has, and that the benchmark of plans measures what it says."""

import argparse

from benchmarks import workflow_plan as plan
from benchmarks import workflow_runs as runs

SMALLER = 512


def test_a_full_build_at_the_published_sizes_has_fewer_than_3000_jobs(tmp_path):
    """As many shards as at full size, of fewer images."""
    run = tmp_path / "run"
    runs.configure(run, plan.settings(4096 // SMALLER))
    plan.make_files(run / "data", 1 / SMALLER)
    found = plan.repeat(1, run, "--dry-run")
    assert found["of_shards"] == dict.fromkeys(plan.OF_SHARDS, plan.VASES * plan.VIEWS // 4096)
    assert sum(found["of_shards"].values()) < found["jobs"] < plan.MOST_JOBS


def test_the_benchmark_of_plans_sees_a_build_then_nothing_then_one_shard(tmp_path):
    args = argparse.Namespace(scale=0.001, images_per_shard=4096, runs=1)
    found = plan.measure_plan(args, tmp_path)
    assert found["files"] > 1000
    assert found["full build, planned"]["jobs"] > 70
    assert found["nothing to do"]["jobs"] == 0
    assert found["one image added, planned"]["of_shards"] == dict.fromkeys(plan.OF_SHARDS, 1)
    assert all(one["peak_mb"] > 50 and one["cpu_seconds"] > 0.5 for one in list(found.values())[1:])
