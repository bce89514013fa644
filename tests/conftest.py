"""What all tests share: the checkout's root, and which tests this machine can run."""

import os
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def realdata() -> Path:
    """The folder of real images, which cannot be redistributed: KILN_REALDATA, else ../shared/data."""
    return real_images()


def real_images() -> Path:
    """Where the real images should be, whether or not they are there."""
    return Path(os.environ.get("KILN_REALDATA") or ROOT.parent / "shared/data").resolve()


@pytest.fixture(scope="session")
def offline() -> Callable[..., subprocess.CompletedProcess]:
    """Runs a command without network (tests/offline.sh), with the options of subprocess.run. Skips where it cannot."""

    def run(*command: str, **options) -> subprocess.CompletedProcess:
        options = {"capture_output": True, "text": True, "timeout": 300, **options}
        return subprocess.run([str(ROOT / "tests/offline.sh"), *map(str, command)], **options)

    if (tried := run("true")).returncode:
        warnings.warn(pytest.PytestWarning(tried.stderr), stacklevel=1)
        pytest.skip(tried.stderr)
    return run


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """The training that tests of faults on the cluster disturb; see tests/cluster_training.py."""
    import cluster_training

    return cluster_training.prepare(tmp_path_factory)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


LONG = 15  # minutes from which a test runs on demand only


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help=f"run tests of {LONG} minutes and more, too")


def pytest_collection_modifyitems(config, items):
    """Skip what needs a GPU, a Slurm cluster, a browser or the real images where there are none, and what is long; and
    say so.

    The slowest files come first, so that of several processes none ends long after the others: a slow test counts
    one minute, or those of `slow(minutes=...)`.
    """
    minutes: dict[Path, float] = {}
    for item in items:
        mark = item.get_closest_marker("slow")
        own = mark.kwargs.get("minutes", 1) if mark else 0
        if own >= LONG and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason=f"takes {own} minutes: make test-long"))
            own = 0
        minutes[item.path] = minutes.get(item.path, 0) + own
    items.sort(key=lambda item: -minutes[item.path])
    marked = {
        name: [item for item in items if item.get_closest_marker(name)]
        for name in ("gpu", "cluster", "conda", "realdata", "browser")
    }
    reasons = {}
    if marked["gpu"] and not _has_gpu():
        reasons["gpu"] = "torch sees no GPU"
    if "KILN_CLUSTER" not in os.environ:
        reasons["cluster"] = "runs on the test cluster: make test-cluster"
    if "KILN_CONDA" not in os.environ:
        reasons["conda"] = "makes every conda environment: make test-conda"
    if marked["realdata"] and not real_images().is_dir():
        reasons["realdata"] = f"NO REAL IMAGES in {real_images()}: set KILN_REALDATA to their folder"
        warnings.warn(pytest.PytestWarning(reasons["realdata"]), stacklevel=1)
    if marked["browser"] and shutil.which("chromium") is None:
        reasons["browser"] = "NO BROWSER: tests/browser/install.sh"
        warnings.warn(pytest.PytestWarning(reasons["browser"]), stacklevel=1)
    for name, reason in reasons.items():
        for item in marked[name]:
            item.add_marker(pytest.mark.skip(reason=reason))
