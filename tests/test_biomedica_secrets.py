"""HF_TOKEN is nowhere in what listing and reading leave behind: output, errors, files, command lines."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest
from hub_server import HubServer
from test_biomedica_remote import NAME, REPO, TOKEN, tar_of

ROOT = Path(__file__).resolve().parents[1]
SHARD = tar_of([f"1-PMC{i}-0-x" for i in range(30)])
# Reads the shard with all that libraries log, and shows and keeps an error as fully as can be.
READER = f"""
import http.client, json, logging, pathlib, pickle, sys, traceback
logging.basicConfig(level=logging.DEBUG)
from scripts.biomedica.remote import Hub
from scripts.biomedica.settings import RemoteSettings
values = dict(repo={REPO!r}, wait_seconds=0.001, max_wait_seconds=0.01, read_seconds=5, attempts=3)
hub = None
try:
    hub = Hub(RemoteSettings(**values, cache_folder="cache"), "main")
    hub.check_access({NAME!r})
    with hub.open({NAME!r}, {len(SHARD)}) as stream:
        print(len(stream.read()), repr(stream), vars(stream))
except Exception as error:
    print("".join(traceback.TracebackException.from_exception(error, capture_locals=True).format()))
    print(repr(error), vars(error), error.__context__ and vars(error.__context__))
    pathlib.Path("error.pickle").write_bytes(pickle.dumps(error))
print(repr(hub), hub and (vars(hub), hub.stats.read()))
pathlib.Path("hub.pickle").write_bytes(pickle.dumps(hub))
"""


@pytest.fixture
def watched(tmp_path):
    """A hub with the shard; whenever it is asked, it notes the command lines of all processes."""
    with HubServer() as server:
        server.repos[f"datasets/{REPO}"] = {NAME: SHARD, "README.md": b"# figures\n"}
        server.lines = set()

        def clock() -> float:
            server.lines.update(" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"]))
            return 0.0

        server.clock, server.storm = clock, (500, 0.0)
        (tmp_path / "index").mkdir()
        pd.DataFrame({"samples": [0], "train": [0]}).to_parquet(tmp_path / "index/shards.parquet")
        yield server


def run(folder: Path, server: HubServer, command: list[str], mark: str, **more: str) -> subprocess.CompletedProcess:
    """Run in `folder` with the token, and look for it in all that is left behind."""
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    own = {"HF_TOKEN": TOKEN, "HF_ENDPOINT": server.url, "HF_HOME": str(folder / "hf"), "HF_DEBUG": "1"}
    own |= {"PYTHONPATH": str(ROOT), "HOME": str(folder), "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder, env=kept | own | more, capture_output=True, text=True, timeout=120)
    assert TOKEN not in done.stdout + done.stderr
    assert any(mark in line for line in server.lines) or not server.log
    assert not any(TOKEN in line for line in server.lines)
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        assert TOKEN.encode() not in path.read_bytes() and TOKEN not in str(path), path
    assert files
    assert not any(TOKEN in path for _, path, *_ in server.log)
    return done


def read(folder: Path, server: HubServer, **more: str) -> str:
    done = run(folder, server, [sys.executable, "-c", READER], "capture_locals=True", **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sent(server: HubServer) -> list[bool]:
    """Of each request, whether it held the token."""
    assert {given for *_, given in server.log} <= {None, f"Bearer {TOKEN}"}
    return [given is not None for *_, given in server.log]


@pytest.mark.parametrize("gated", [False, True])
def test_a_reading_that_passes(watched, tmp_path, gated):
    with HubServer() as storage:
        storage.files[NAME], storage.cuts[NAME] = SHARD, [0, 1000]
        watched.storage = f"{storage.url}/files"
        if gated:
            watched.gated[f"datasets/{REPO}"] = TOKEN
        said = read(tmp_path, watched)
        assert f"{len(SHARD)} <" in said and sent(watched) == [gated and n > 0 for n in range(3 + gated)]
        assert sent(storage) == [False] * 3
    assert sorted(path.name for path in (tmp_path / "cache").iterdir())[0] == ".lock"


@pytest.mark.parametrize(
    ("fault", "more", "said"),
    [
        ("gate", {}, "account of HF_TOKEN"),
        ("storm", {}, "3 attempts without a new byte"),
        ("cut", {}, "3 attempts without a new byte"),
        ("other", {}, "is not the one that was listed"),
        ("gone", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "HF_ENDPOINT"),
        ("proxy", {"http_proxy": f"http://ann:{TOKEN}@127.0.0.1:9"}, "through the proxy http://***@127.0.0.1:9"),
        (
            "endpoint",
            {"HF_ENDPOINT": f"http://ann:{TOKEN}@127.0.0.1:9"},
            "HF_ENDPOINT = http://***@127.0.0.1:9:",
        ),
    ],
)
def test_a_reading_that_fails(watched, tmp_path, fault, more, said):
    watched.gated[f"datasets/{REPO}"] = "another" if fault == "gate" else TOKEN
    if fault == "storm":
        watched.answers = [(401, {})] + [(500, {})] * 9
    if fault == "cut":
        watched.cuts[NAME] = [1, *[0] * 9]
    if fault == "other":
        watched.cuts[NAME], watched.headers[NAME] = [1, 1000], [{}, {}, {"ETag": '"other"'}]
    printed = read(tmp_path, watched, **more)
    assert said in printed and "Traceback" in printed
    error = pickle.loads((tmp_path / "error.pickle").read_bytes())
    assert said in str(error) and error.hint
    assert any(sent(watched)) == (fault in ("gate", "storm", "cut", "other"))


def test_a_token_with_a_line_break_is_not_shown_by_the_refusal(watched, tmp_path):
    watched.gated[f"datasets/{REPO}"] = TOKEN
    assert "HF_TOKEN holds a space, a line break" in read(tmp_path, watched, HF_TOKEN=f"{TOKEN}\nX")
    assert sent(watched) == [False]


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("none", 0, "'bytes_per_sample': 5632.0"),
        ("login", 0, "using HF_TOKEN"),
        ("gate", 1, "account of HF_TOKEN"),
        ("gone", 1, "cannot be reached"),
        ("word", 1, "one word that begins with hf_"),
    ],
)
def test_listing(watched, tmp_path, fault, code, said):
    more = {}
    if fault == "login":
        watched.answers = [(401, {"X-Error-Code": "RepoNotFound"})]
        watched.gated[f"datasets/{REPO}"] = TOKEN
    elif fault == "gate":
        watched.gated[f"datasets/{REPO}"] = "another"
    elif fault == "gone":
        more = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    elif fault == "word":
        watched.answers = [(401, {"X-Error-Code": "RepoNotFound"})]
        more = {"HF_TOKEN": f"{TOKEN} X"}
    remote = {"repo": REPO, "wait_seconds": 0.001, "max_wait_seconds": 0.01, "attempts": 2}
    line = ["--settings", json.dumps({"remote": remote}), "--index", "index", "--output", "out/shards.parquet"]
    command = [sys.executable, "-m", "scripts.biomedica.list_remote", *line, "--meta", "out/meta.json"]
    done = run(tmp_path, watched, command, "scripts.biomedica.list_remote", **more)
    assert done.returncode == code and said in done.stderr, done.stderr
    assert (tmp_path / "out").exists() == (code == 0)
    # info, tree and shard; after a refusal all with the token
    expected = {"none": [False] * 3, "login": [False, True, True, True], "gate": [False, False, False, True]}
    assert sent(watched) == expected.get(fault, [False] * len(watched.log))
