"""Retrieval of models from a hub and a file server on this machine."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import workflow
from hub_server import HubServer

from scripts.common import network
from scripts.common.errors import KilnError
from scripts.retrieve import lock, models, names, transfer, url
from scripts.retrieve.models import read_table

ROOT = Path(__file__).resolve().parents[1]
HEADER = "name,kind,source,revision,files,sha256,licence,used_by\n"
SECRET = "hf_DoNotShowThisAnywhere0123456789"
WEIGHTS = bytes(range(256)) * 4000  # 1 MB
CONFIG = b'{"hidden_size": 8}\n'


@pytest.fixture
def hub():
    with HubServer() as server:
        server.repos["me/model"] = {"config.json": CONFIG, "sub/model.safetensors": WEIGHTS, "README.md": b"# hi\n"}
        server.files["weights.pth"] = WEIGHTS
        yield server


class Place:
    """A folder with a table, a lock and a folder of models."""

    def __init__(self, folder: Path, hub: HubServer):
        self.folder, self.hub = folder, hub
        self.table, self.lock = folder / "models.csv", folder / "models.lock.json"
        self.write()

    def write(self, hub_row: str = "me/model,,config.json sub/*.safetensors,", url_sha256: str = "") -> None:
        source = f"{self.hub.url}/files/weights.pth"
        rows = f"thing,hub,{hub_row},MIT,vase\nplain,url,{source},,weights.pth,{url_sha256},MIT,rae\n"
        self.table.write_text(HEADER + rows, encoding="utf-8")

    def out(self, name: str) -> Path:
        return self.folder / "models" / name

    def locked(self) -> dict:
        return json.loads(self.lock.read_text(encoding="utf-8"))

    def command(self, name: str) -> list[str]:
        options = {"name": name, "models": self.table, "lock": self.lock, "output-folder": self.out(name)}
        options |= {"meta": self.out(name) / "meta.json", "retry-wait": 0.02}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return [sys.executable, "-m", "scripts.retrieve.model", *words]

    def environment(self, **more: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        for key in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
            kept.pop(key, None)
        return kept | {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.folder / "hf"), **more}

    def run(self, name: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(name), cwd=ROOT, env=self.environment(**more), capture_output=True, text=True, timeout=60
        )

    def get(self, name: str, **more: str) -> str:
        """Retrieve, expecting success; what was printed."""
        done = self.run(name, **more)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def fail(self, name: str, **more: str) -> str:
        """Retrieve, expecting a KilnError; what was printed. Nothing may have appeared."""
        before = _tree(self.out(name))
        done = self.run(name, **more)
        assert done.returncode == 1, done.stderr
        assert "\nError: " in f"\n{done.stderr}" and "\nHint: " in done.stderr
        assert "Traceback" not in done.stderr or "HF_DEBUG" in more  # the library logs those it caught
        assert _tree(self.out(name)) == before
        return done.stderr


@pytest.fixture
def place(tmp_path, hub):
    return Place(tmp_path, hub)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- the whole way -----------------------------------------------------------------------------


def test_a_hub_model_is_retrieved_recorded_and_locked(place, hub):
    assert hub.url not in place.get("thing")  # real ones are redirected to urls that hold signatures
    files = _tree(place.out("thing"))
    assert sorted(files) == ["config.json", "files.json", "meta.json", "sub/model.safetensors"]
    assert files["config.json"] == CONFIG and files["sub/model.safetensors"] == WEIGHTS
    wanted = {
        "config.json": {"bytes": len(CONFIG), "sha256": _sha(CONFIG)},
        "sub/model.safetensors": {"bytes": len(WEIGHTS), "sha256": _sha(WEIGHTS)},
    }
    assert json.loads(files["files.json"]) == wanted
    meta = json.loads(files["meta.json"])
    assert meta["revision"] == hub.commit("me/model") and meta["source"] == "me/model"
    assert meta["outputs"]["files.json"]["sha256"] == _sha(files["files.json"])
    assert place.locked() == {
        "thing": {
            "source": "me/model",
            "asked": {"revision": "", "files": ["config.json", "sub/*.safetensors"]},
            "revision": hub.commit("me/model"),
            "files": wanted,
        }
    }
    assert sorted(p.name for p in place.out("thing").parent.iterdir()) == ["thing"]
    assert not hub.asked("README")


def test_a_url_model_is_retrieved_and_a_stated_hash_may_be_its_beginning(place):
    place.write(url_sha256=_sha(WEIGHTS)[:8])
    place.get("plain")
    assert sorted(_tree(place.out("plain"))) == ["files.json", "meta.json", "weights.pth"]
    assert place.locked()["plain"]["files"]["weights.pth"] == {"bytes": len(WEIGHTS), "sha256": _sha(WEIGHTS)}


def test_a_second_retrieval_needs_no_network_and_gives_the_same_listing(place, hub):
    place.get("thing")
    listing = (place.out("thing") / "files.json").read_bytes()
    locked = place.lock.read_bytes()
    for name in ("files.json", "meta.json"):  # as Snakemake does before it reruns a rule
        (place.out("thing") / name).unlink()
    asked = len(hub.log)
    place.get("thing", HF_ENDPOINT="http://127.0.0.1:9")
    assert (place.out("thing") / "files.json").read_bytes() == listing
    assert place.lock.read_bytes() == locked and len(hub.log) == asked


def test_the_locked_commit_is_used_even_if_the_branch_moves(place, hub):
    place.get("plain")
    place.get("thing")
    _forget(place, "thing")
    hub.repos["me/model"]["README.md"] = b"changed"
    # This hub knows only its newest commit, so that asking for the locked one shows.
    assert "no such revision" in place.fail("thing")
    assert "plain" in place.locked()


def _forget(place: Place, name: str) -> None:
    for path in sorted(place.out(name).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    place.out(name).rmdir()


# --- bytes that are not the right ones ---------------------------------------------------------


def test_changed_bytes_of_a_url_are_refused_and_not_kept(place, hub):
    place.get("plain")
    _forget(place, "plain")
    hub.files["weights.pth"] = WEIGHTS[::-1]
    said = place.fail("plain")
    assert _sha(WEIGHTS) in said and _sha(WEIGHTS[::-1]) in said and "weights.pth" in said
    assert not list(place.folder.rglob("weights.pth"))
    hub.files["weights.pth"] = WEIGHTS
    place.get("plain")


def test_changed_bytes_at_a_locked_commit_are_refused(place, hub):
    place.get("thing")
    _forget(place, "thing")
    values = place.locked()
    values["thing"]["files"]["config.json"]["sha256"] = "0" * 64
    place.lock.write_text(json.dumps(values), encoding="utf-8")
    said = place.fail("thing")
    assert "config.json" in said and "0" * 64 in said and _sha(CONFIG) in said


def test_a_wrong_stated_hash_is_refused_and_not_locked(place):
    place.write(url_sha256="deadbeef")
    said = place.fail("plain")
    assert "deadbeef" in said and _sha(WEIGHTS) in said
    assert not place.lock.exists()


def test_a_changed_revision_needs_a_new_lock(place):
    place.get("thing")
    place.write(hub_row="me/model,main,config.json sub/*.safetensors,")
    assert "'main'" in place.fail("thing")


# --- broken connections and killed runs --------------------------------------------------------


def test_a_cut_download_carries_on_from_where_it_broke(place, hub):
    hub.cuts["weights.pth"] = [4 * url.CHUNK, 3 * url.CHUNK]
    place.get("plain")
    ranges = [asked for _, _, asked, _ in hub.asked("GET /files/weights.pth")]
    assert ranges == [None, f"bytes={4 * url.CHUNK}-", f"bytes={7 * url.CHUNK}-"]
    assert (place.out("plain") / "weights.pth").read_bytes() == WEIGHTS


def test_a_cut_hub_download_carries_on(place, hub):
    block = 10 << 20  # huggingface_hub writes in blocks of this size
    hub.repos["me/model"]["sub/model.safetensors"] = large = WEIGHTS * 12
    hub.cuts["sub/model.safetensors"] = [block]
    place.get("thing")
    assert [r for _, _, r, _ in hub.asked("GET .*model.safetensors")] == [None, f"bytes={block}-"]
    assert (place.out("thing") / "sub/model.safetensors").read_bytes() == large


def test_a_connection_that_never_works_ends_in_an_error_and_the_next_run_carries_on(place, hub):
    hub.cuts["weights.pth"] = [4 * url.CHUNK] + [0] * 10
    assert f"run again; {4 * url.CHUNK} bytes are kept" in place.fail("plain")
    hub.cuts.clear()
    place.get("plain")
    assert hub.asked("GET /files")[-1][2] == f"bytes={4 * url.CHUNK}-"


def test_a_file_that_changed_meanwhile_comes_whole(place, hub):
    hub.cuts["weights.pth"] = [4 * url.CHUNK] + [0] * 10
    place.fail("plain")
    hub.cuts.clear()
    hub.files["weights.pth"] = WEIGHTS[::-1]
    place.get("plain")
    assert (place.out("plain") / "weights.pth").read_bytes() == WEIGHTS[::-1]


def test_a_busy_server_is_asked_again(place, hub):
    hub.unavailable = 2
    place.get("plain")
    hub.unavailable = 2
    place.get("thing")


def test_a_killed_run_leaves_nothing_half_written_and_whole_files_are_kept(place, hub):
    hub.repos["me/model"]["sub/late.safetensors"] = WEIGHTS[:5000]
    hub.cuts["sub/late.safetensors"] = [100] * 100  # its retries give time to kill
    process = subprocess.Popen(place.command("thing"), cwd=ROOT, env=place.environment(), stderr=subprocess.DEVNULL)
    staged = place.folder / "models/.thing.partial/files"
    deadline = time.monotonic() + 30
    while not all((staged / name).exists() for name in ("config.json", "sub/model.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not place.out("thing").exists() and not place.lock.exists()
    hub.cuts.clear()
    whole = len(hub.asked("GET .*/sub/model.safetensors"))
    place.get("thing")
    assert len(hub.asked("GET .*/sub/model.safetensors")) == whole == 1
    assert sorted(p.name for p in place.out("thing").parent.iterdir()) == ["thing"]


# --- refusals ----------------------------------------------------------------------------------


def test_a_gated_model_says_where_to_accept_its_terms(place, hub):
    hub.gated["me/model"] = SECRET
    said = place.fail("thing")
    assert f"{hub.url}/me/model" in said and "HF_TOKEN" in said and "accept" in said


def test_a_token_is_used_only_after_a_refusal_and_shown_nowhere(place, hub):
    place.get("thing", HF_TOKEN=SECRET)
    assert not any(SECRET in (given or "") for *_, given in hub.log)
    hub.gated["me/model"] = SECRET
    place.lock.unlink()
    _forget(place, "thing")
    hub.log.clear()
    printed = place.get("thing", HF_TOKEN=SECRET, HF_DEBUG="1")
    assert any(given == f"Bearer {SECRET}" for *_, given in hub.log)
    hub.gated["me/model"] = "another"
    place.lock.unlink()
    _forget(place, "thing")
    printed += place.fail("thing", HF_TOKEN=SECRET, HF_DEBUG="1")
    assert "account of HF_TOKEN" in printed and SECRET not in printed
    for path in place.folder.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_secrets_are_cleaned_from_messages(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    text = network.clean(f"{SECRET} at http://ann:pass@proxy:80 for https://cdn/x?Signature=abc&y=1 again")
    assert text == "*** at http://***@proxy:80 for https://cdn/x?*** again"
    monkeypatch.setenv("https_proxy", "http://ann:pass@proxy:80")
    assert network.proxy_in_force("https://hub.example/x") == "through the proxy http://***@proxy:80"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("me/absent,,config.json,", "no such model"),
        ("me/model,v9,config.json,", "no such revision"),
        ("me/model,,confg.json,", "did you mean 'config.json'?"),
    ],
)
def test_what_the_hub_does_not_have_is_named(place, row, said):
    place.write(hub_row=row)
    assert said in place.fail("thing")


def test_a_missing_url_is_named(place, hub):
    hub.files.clear()
    assert "the server answers 404" in place.fail("plain")


def test_an_unreachable_hub_names_the_endpoint_and_the_proxy(place):
    said = place.fail("thing", HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 (HF_ENDPOINT) cannot be reached" in said and "no proxy is set" in said
    said = place.fail("plain", http_proxy="http://ann:hush@127.0.0.1:9")
    assert "through the proxy http://***@127.0.0.1:9" in said and "hush" not in said


def test_offline_mode_is_named(place):
    assert "HF_HUB_OFFLINE is set" in place.fail("thing", HF_HUB_OFFLINE="1")


def test_an_unknown_name_gets_the_nearest_spelling(place):
    assert "did you mean 'thing'?" in place.fail("thng")


def test_a_disk_without_room_is_named_before_the_download(tmp_path):
    with pytest.raises(KilnError, match="are free"):
        transfer.need_room(tmp_path, 1 << 60)


def test_a_full_disk_is_named_and_what_came_is_kept(tmp_path, hub, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(url.os, "fsync", full)
    with pytest.raises(KilnError, match="the disk is full"):
        url.download(f"{hub.url}/files/weights.pth", tmp_path / "weights.pth", "plain", 0.02)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights.pth.json", "weights.pth.part"]


# --- the table and the lock --------------------------------------------------------------------


def test_the_table_of_the_project_is_valid():
    table = read_table(ROOT / "config/models.csv")
    assert {"resnet50-imagenet1k-v1", "clip-vit-b-32-openai"} <= set(table)
    assert all(model.used_by for model in table.values())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("a,hubb,me/model,,x,,MIT,", "kind = 'hubb'"),
        ("a b,hub,me/model,,x,,MIT,", "name = 'a b'"),
        ("a,hub,me/model/x,,x,,MIT,", "'me/model/x' is not owner/repo"),
        ("a,hub,me/model,,../x,,MIT,", "'../x' is not a relative path"),
        ("a,hub,me/model,,files.json,,MIT,", "'files.json' is a name that Kiln writes"),
        ("a,hub,me/model,,,,MIT,", "files = ''"),
        ("a,hub,me/model,,*.bin,00000000,MIT,", "sha256 needs one value for each file"),
        ("a,url,http://example.org/x,,x,,MIT,", "is not https"),
        ("a,url,https://me:word@example.org/x,,x,,MIT,", "has a user name"),
        ("a,url,https://example.org/x,main,x,,MIT,", "revision 'main'"),
        ("a,url,https://example.org/x,,x,XYZ,MIT,", "'XYZ' is not 8 to 64"),
        ("a,url,https://example.org/x,,x", "5 values for 8 columns"),
        ("ok,hub,me/other,,x,,MIT,", "name = 'ok' is there twice"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, said):
    path = tmp_path / "models.csv"
    path.write_text(f"{HEADER}ok,hub,me/model,,x,,MIT,\n{row}\n", encoding="utf-8")
    with pytest.raises(KilnError) as caught:
        read_table(path)
    assert f"{path}, row 3" in str(caught.value) and said in str(caught.value)
    assert "word@" not in str(caught.value)


def test_an_unknown_column_gets_the_nearest_spelling(tmp_path):
    path = tmp_path / "models.csv"
    path.write_text(HEADER.replace("licence", "license"), encoding="utf-8")
    with pytest.raises(KilnError, match="unknown column 'license'.*\n.*did you mean 'licence'"):
        read_table(path)


def test_a_wildcard_stays_in_its_folder():
    model = models.Model(name="a", kind="hub", source="me/model", files="*.json sub/*", licence="MIT")
    assert model.select(["a.json", "sub/b.json", "sub/deep/c.json", "d.txt"]) == ["a.json", "sub/b.json"]


def test_the_licence_is_no_part_of_what_reruns():
    one = models.Model(name="a", kind="hub", source="me/model", files="x", licence="MIT", used_by="vase")
    two = one.model_copy(update={"licence": "Apache-2.0", "used_by": ("rae",)})
    assert one.identity() == two.identity() != one.model_copy(update={"files": ("y",)}).identity()


def test_two_first_retrievals_with_different_bytes_do_not_both_lock(tmp_path):
    model = models.Model(name="a", kind="url", source="https://example.org/x", files="x", licence="MIT")
    path = tmp_path / "lock.json"
    lock.add(path, model, "", {"x": lock.FileRecord(bytes=1, sha256="1" * 64)})
    with pytest.raises(KilnError, match="is not what"):
        lock.add(path, model, "", {"x": lock.FileRecord(bytes=1, sha256="2" * 64)})
    assert lock.read(path)["a"].files["x"].sha256 == "1" * 64


def test_a_broken_lock_is_named(tmp_path):
    path = tmp_path / "lock.json"
    path.write_text('{"a": {"source": 1}}', encoding="utf-8")
    with pytest.raises(KilnError, match="not a lock of retrieved files"):
        lock.read(path)


def test_a_name_is_listed_or_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    listed = ["resnet50", "dinov2-base"]
    assert names.is_listed("resnet50", listed)
    assert not any(names.is_listed(one, listed) for one in ("mine", "./to-be-made", "results/demo/made", "~/model"))
    with pytest.raises(KilnError, match="did you mean 'dinov2-base'?"):
        names.is_listed("dinov2-bse", listed)
    with pytest.raises(KilnError, match="names are resnet50, dinov2-base"):
        names.is_listed("q", listed)


@pytest.mark.parametrize(
    "place,pipeline", [("vase.vlm.model", "vase"), ("busi.base.family=qwen busi.base.model", "busi")]
)
def test_a_misspelt_model_stops_before_any_job(tmp_path, place, pipeline):
    given = ("--dry-run", pipeline, "--config", f"set={place}=qwen2.5-vl-7b-instrct")
    done = workflow.run(ROOT, tmp_path, *given, check=False)
    assert done.returncode and "did you mean 'qwen2.5-vl-7b-instruct'?" in (said := done.stdout + done.stderr), said
