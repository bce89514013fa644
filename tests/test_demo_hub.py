"""The demo's hub: huggingface_hub, datasets and curl read from it as from the real one, faults come as asked for."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from scripts.demo import serve_hub
from scripts.demo.serve_hub import Faults, Hub

ROOT = Path(__file__).resolve().parents[1]
REPO = "kiln/figures"
BIG = bytes(range(256)) * 2000


@pytest.fixture
def folder(tmp_path):
    repo = tmp_path / "hub" / "datasets" / REPO
    (repo / "other").mkdir(parents=True)
    (repo / "a.tar").write_bytes(BIG)
    (repo / "b.tar").write_bytes(b"b" * 1000)
    (repo / "other" / "c d.tar").write_bytes(b"c" * 10)
    return tmp_path / "hub"


@pytest.fixture
def serve(folder):
    running = []

    def start(token=None, **faults):
        hub = Hub(folder, Faults(**faults), token)
        running.append(hub)
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02}).start()
        return hub

    yield start
    for hub in running:
        hub.shutdown()
        hub.server_close()


def get(hub, name="a.tar", revision="main", **headers):
    made = {key.replace("_", "-"): value for key, value in headers.items()}
    return requests.get(f"{hub.url}/datasets/{REPO}/resolve/{revision}/{name}", headers=made, timeout=30)


def test_huggingface_hub_lists_and_downloads(serve, tmp_path):
    hub = serve()
    api = HfApi(endpoint=hub.url, token=False)
    info = api.repo_info(REPO, repo_type="dataset")
    entries = {e.path: e for e in api.list_repo_tree(REPO, repo_type="dataset", recursive=True, revision=info.sha)}
    assert sorted(entries) == ["a.tar", "b.tar", "other/c d.tar"]
    assert entries["a.tar"].size == len(BIG) and entries["a.tar"].lfs.sha256 == hashlib.sha256(BIG).hexdigest()
    top = [(type(e).__name__, e.path) for e in api.list_repo_tree(REPO, repo_type="dataset")]
    assert sorted(top) == [("RepoFile", "a.tar"), ("RepoFile", "b.tar"), ("RepoFolder", "other")]
    assert [e.path for e in api.list_repo_tree(REPO, "other", repo_type="dataset")] == ["other/c d.tar"]
    assert api.list_repo_files(REPO, repo_type="dataset") == sorted(entries)
    path = hf_hub_download(REPO, "other/c d.tar", repo_type="dataset", endpoint=hub.url, cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == b"c" * 10 and info.sha in path


def test_what_is_not_there_is_refused_as_by_the_real_hub(serve):
    hub = serve()
    api = HfApi(endpoint=hub.url, token=False)
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("kiln/nothing", repo_type="dataset")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(REPO, repo_type="dataset", revision="0" * 40)
    assert get(hub, "d.tar").headers["X-Error-Code"] == "EntryNotFound"
    for name in ("../../../outside", "%2e%2e/%2e%2e/outside", "other"):
        assert requests.get(f"{hub.url}/datasets/{REPO}/resolve/main/{name}", timeout=30).status_code == 404


def test_parts_of_files(serve):
    hub = serve()
    whole = get(hub)
    etag = whole.headers["ETag"]
    assert (whole.status_code, whole.content, whole.headers["Content-Length"]) == (200, BIG, str(len(BIG)))
    assert etag == f'"{hashlib.sha256(BIG).hexdigest()}"' == whole.headers["X-Linked-Etag"]
    for asked, first, end in (("bytes=500000-", 500_000, len(BIG)), ("bytes=5-9", 5, 10), ("bytes=-7", -7, None)):
        part = get(hub, Range=asked, If_Range=etag)
        assert (part.status_code, part.content) == (206, BIG[first:end])
    assert part.headers["Content-Range"] == f"bytes {len(BIG) - 7}-{len(BIG) - 1}/{len(BIG)}"
    assert get(hub, Range="bytes=5-9", If_Range='"older"').content == BIG
    beyond = get(hub, Range=f"bytes={len(BIG)}-")
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{len(BIG)}")
    head = requests.head(f"{hub.url}/datasets/{REPO}/resolve/main/a.tar", timeout=30)
    assert (head.status_code, head.headers["Content-Length"], head.content) == (200, str(len(BIG)), b"")


def test_a_changed_file_is_another_commit(serve, folder):
    hub = serve()
    before = get(hub).headers
    assert get(hub, revision=before["X-Repo-Commit"]).content == BIG
    (folder / "datasets" / REPO / "a.tar").write_bytes(b"new")
    after = get(hub)
    assert after.content == b"new" and after.headers["ETag"] != before["ETag"]
    assert after.headers["X-Repo-Commit"] != before["X-Repo-Commit"]
    assert get(hub, revision=before["X-Repo-Commit"]).headers["X-Error-Code"] == "RevisionNotFound"


def test_a_token_is_needed_for_files_alone(serve):
    hub = serve(token="right")
    assert HfApi(endpoint=hub.url, token=False).repo_info(REPO, repo_type="dataset").gated == "auto"
    answers = [get(hub), get(hub, Authorization="Bearer wrong"), get(hub, Authorization="Bearer right")]
    assert [one.status_code for one in answers] == [401, 403, 200]
    with pytest.raises(GatedRepoError):
        hf_hub_download(REPO, "a.tar", repo_type="dataset", endpoint=hub.url, token="wrong")


def test_every_tenth_reply_is_a_503_that_asks_for_a_pause(serve):
    hub = serve(unavailable_every=10)
    answers = [get(hub, "b.tar") for _ in range(30)]
    busy = [number for number, one in enumerate(answers, 1) if one.status_code == 503]
    assert busy == [10, 20, 30] and answers[9].headers["Retry-After"] == "1"


def test_the_first_file_breaks_off_half_way_once(serve):
    hub = serve(cut_once=True)
    with requests.get(f"{hub.url}/datasets/{REPO}/resolve/main/a.tar", stream=True, timeout=30) as answer:
        assert answer.headers["Content-Length"] == str(len(BIG))
        assert answer.raw.read(len(BIG) // 2) == BIG[: len(BIG) // 2]
        with pytest.raises(Exception, match="IncompleteRead"):
            answer.raw.read(1)
    assert get(hub, Range=f"bytes={len(BIG) // 2}-").content == BIG[len(BIG) // 2 :]
    assert get(hub).content == BIG


def test_the_second_file_is_slow_once(serve, monkeypatch):
    waits = []
    monkeypatch.setattr(serve_hub.time, "sleep", waits.append)
    hub = serve(slow_once=True, slow_seconds=7.0)
    for _ in range(3):
        assert get(hub, "b.tar").status_code == 200
    assert waits.count(7.0) == 1


def test_the_link_is_shared_by_all_connections(serve, monkeypatch):
    now, slept = [100.0], []
    monkeypatch.setattr(serve_hub.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(serve_hub.time, "sleep", slept.append)
    hub = serve(bytes_per_second=1000.0, latency=0.02)
    get(hub, "b.tar")
    get(hub, "b.tar")
    late = serve_hub.LATE  # of a link that was idle before
    assert [wait for wait in slept if wait > 0] == pytest.approx([0.02, 1.0 - late, 0.02, 2.0 - late])


def start(folder, port_file):
    """A shell that starts the step and does not replace itself by it, as Snakemake's may."""
    command = f'"{sys.executable}" -m scripts.demo.serve_hub --folder "{folder}" --port-file "{port_file}" & wait'
    shell = subprocess.Popen(["bash", "-c", command], cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(port_file.exists)
    return shell, port_file.read_text()


def until(true):
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("not within 30 s")


def answers(url):
    try:
        return requests.get(f"{url}/api/datasets/{REPO}", timeout=30).status_code == 200
    except requests.ConnectionError:
        return False


def test_it_ends_when_its_parent_dies(folder, tmp_path):
    shell, url = start(folder, tmp_path / "port")
    assert url.startswith("http://127.0.0.1:") and answers(url)
    shell.kill()
    shell.wait()
    until(lambda: not answers(url))


def test_it_ends_well_on_sigterm(folder, tmp_path):
    port_file = tmp_path / "port"
    command = [sys.executable, "-m", "scripts.demo.serve_hub", "--folder", folder, "--port-file", port_file]
    with subprocess.Popen([*command, "--token-variable", "DEMO_TOKEN"], cwd=ROOT, env=os.environ | {"DEMO_TOKEN": "x"},
                          stderr=subprocess.PIPE, text=True) as server:  # fmt: skip
        until(port_file.exists)
        url = port_file.read_text()
        assert requests.get(f"{url}/datasets/{REPO}/resolve/main/a.tar", timeout=30).status_code == 401
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=60)
    assert server.returncode == 0 and f"{url} serves {REPO}" in said
    assert list(tmp_path.glob(".port*")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--folder", "none"], "none: no datasets/<owner>/<name> in it"),
     (["--folder", "hub", "--token-variable", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE is not set")],
)  # fmt: skip
def test_what_cannot_be_served_is_refused(arguments, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(serve_hub.KilnError, match=message):
        serve_hub.main([*arguments, "--port-file", "port"])
    assert not Path("port").exists()


def test_curl_under_webdataset_and_datasets_stream_from_it(serve, folder):
    from webdataset import TarWriter  # imports for 2 s

    with (folder / "datasets" / REPO / "b.tar").open("wb") as stream, TarWriter(stream, encoder=False) as writer:
        for number in range(5):
            writer.write({"__key__": f"x{number}", "txt": b"%d" % number})
    hub = serve()
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
                                "HF_HOME": str(folder.parent / "home")}  # fmt: skip

    def printed(program: str) -> str:
        """By a process of its own, as `datasets` may hang in one that read from a hub before; it then says where."""
        watched = f"import faulthandler; faulthandler.dump_traceback_later(100, exit=True)\n{program}"
        command = [sys.executable, "-c", watched]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-6000:]
        return done.stdout.strip()

    url = f"{hub.url}/datasets/{REPO}/resolve/main/b.tar"
    piped = f'webdataset.WebDataset("pipe:curl -sfL {url}", shardshuffle=False)'
    assert printed(f'import webdataset\nprint([one["txt"] for one in {piped}])') == str([b"%d" % n for n in range(5)])
    rows = f'datasets.load_dataset("{REPO}", data_files="b.tar", split="train", streaming=True)'
    assert printed(f'import datasets\nprint([one["txt"] for one in {rows}])') == str([str(n) for n in range(5)])
