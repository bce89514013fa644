"""Shards of a hub on this machine, read while it misbehaves: nothing lost, nothing doubled, or a clear stop."""

import datetime
import email.utils
import errno
import hashlib
import io
import ipaddress
import json
import multiprocessing
import os
import pickle
import random
import ssl
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from hub_server import HubServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.biomedica import cache, list_remote, remote
from scripts.biomedica.remote import Hub, Refused, ShardChanged, Unreachable
from scripts.biomedica.settings import RemoteSettings
from scripts.common.errors import KilnError

ROOT = Path(__file__).resolve().parents[1]
REPO, NAME = "me/figures", "data/a b+0.tar"
TOKEN = "hf_DoNotShowThisAnywhere0123456789"
DATA = random.Random(1).randbytes(300_001)
SHA = hashlib.sha256(DATA).hexdigest()
QUICK = {"wait_seconds": 0.001, "max_wait_seconds": 0.01, "read_seconds": 0.3, "attempts": 4}


@pytest.fixture(autouse=True)
def _plain(monkeypatch, tmp_path):
    """No token, proxy or netrc of this machine."""
    for name in ("HF_TOKEN", "HF_ENDPOINT", *(n for n in os.environ if n.lower().endswith("_proxy"))):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def server(monkeypatch):
    with HubServer() as made:
        made.repos[f"datasets/{REPO}"] = {NAME: DATA, "README.md": b"# figures\n"}
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


def hub(revision="main", authorised=False, **changed) -> Hub:
    return Hub(RemoteSettings(repo=REPO, **(QUICK | changed)), revision, authorised)


def read(reader: Hub, start=0, sha256=SHA) -> bytes:
    with reader.open(NAME, len(DATA), sha256, start) as stream:
        return stream.read()


def ranges(server) -> list[str | None]:
    return [asked for _, _, asked, _ in server.asked("GET .*/resolve/")]


# --- whole shards ------------------------------------------------------------------------------


def test_a_shard_is_read_from_any_byte_to_its_end(server):
    reader = hub(server.commit(f"datasets/{REPO}"))
    assert read(reader) == DATA
    for start in (1, 299_999, len(DATA)):
        with reader.open(NAME, len(DATA), SHA, start) as stream:
            assert stream.tell() == start and stream.read(7) == DATA[start : start + 7]
            assert stream.tell() == min(start + 7, len(DATA))
            assert stream.read() == DATA[start + 7 :] and stream.read(5) == b"" and stream.tell() == len(DATA)
    assert ranges(server) == [None, "bytes=1-", "bytes=299999-"]
    assert reader.stats.read()[1:] == (0, 0, 0, 0)
    assert reader.stats.bytes == len(DATA) + (len(DATA) - 1) + (len(DATA) - 299_999)


def test_tarfile_reads_it_as_a_stream(server):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for number in range(40):
            info = tarfile.TarInfo(f"{number:03d}.jpg")
            info.size = 5000 + number
            made.addfile(info, io.BytesIO(DATA[: info.size]))
    data = buffer.getvalue()
    server.repos[f"datasets/{REPO}"][NAME] = data
    server.cuts[NAME] = [4000, 100_000]
    with hub().open(NAME, len(data)) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        sizes = [len(tar.extractfile(member).read()) for member in tar]
    assert sizes == [5000 + number for number in range(40)]


def test_closing_early_leaves_the_rest_on_the_server(server):
    large = bytes(48 << 20)
    server.repos[f"datasets/{REPO}"][NAME] = large
    reader = hub()
    stream = reader.open(NAME, len(large))
    assert stream.read(1000) == bytes(1000)
    stream.close()
    assert reader.stats.bytes <= remote.CHUNK and server.sent < len(large) // 2
    with pytest.raises(ValueError, match="closed file"):
        stream.read(1)


def test_a_closed_hub_ends_a_reader_that_waits(server):
    server.storm = (500, float("inf"))
    reader = hub(wait_seconds=1000.0, max_wait_seconds=1000.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(read, reader)
        while not server.log:
            time.sleep(0.01)
        reader.close()
        with pytest.raises(ValueError, match="closed hub"):
            waiting.result()


# --- broken connections ------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(0, 150_000), max_size=8),
    start=st.integers(0, len(DATA)),
    sizes=st.lists(st.integers(1, 100_000), min_size=1, max_size=5),
    chunked=st.booleans(),
)
def test_connections_cut_at_any_byte_lose_and_double_nothing(server, cuts, start, sizes, chunked):
    # Attempts without a new byte: as many as cuts at 0 may follow each other.
    server.log.clear()
    server.chunked, server.cuts[NAME] = chunked, list(cuts)
    reader, got = hub(attempts=9), b""
    with reader.open(NAME, len(DATA), SHA, start) as stream:
        while piece := stream.read(sizes[len(got) % len(sizes)]):
            got += piece
            assert stream.tell() == start + len(got)
    assert hashlib.sha256(DATA[:start] + got).hexdigest() == SHA
    at, expected = start, []
    for cut in [*cuts, len(DATA)]:
        if at < len(DATA):
            expected.append(f"bytes={at}-" if at else None)
            at += cut
    assert ranges(server) == expected
    counts = reader.stats.read()
    assert (counts.bytes, counts.reread_bytes) == (len(DATA) - start, 0)
    assert counts.retries == max(0, len(expected) - 1) >= counts.reconnects


def test_only_attempts_without_a_new_byte_count(server):
    server.cuts[NAME] = [1000, 0, 0, 0] * 6
    reader = hub(attempts=4)
    assert read(reader) == DATA and reader.stats.retries == 24


def test_a_shard_that_stays_cut_is_unreachable_and_what_came_is_not_lost(server):
    server.cuts[NAME] = [2000] + [0] * 4
    reader = hub()
    with reader.open(NAME, len(DATA), SHA) as stream:
        with pytest.raises(Unreachable) as caught:
            stream.read()
        assert "4 attempts without a new byte, at byte 2000 of 300001" in caught.value.message
        assert NAME in caught.value.message and f"{server.url}/datasets/{REPO}" in caught.value.message
        assert stream.tell() == 0 and stream.read() == DATA  # the server has recovered
    assert len(server.log) == 6 and reader.stats.bytes == len(DATA)


def test_a_server_that_sends_no_parts_is_read_again_from_the_start_and_that_is_counted(server):
    server.ranges, server.cuts[NAME] = False, [100_000, 50_000]
    reader = hub()
    assert read(reader) == DATA
    assert reader.stats.reread_bytes == 50_000 + 100_000 and reader.stats.bytes == len(DATA)


def test_a_stalled_socket_is_given_up_and_the_stall_counted(server):
    server.silences[NAME] = [1000, 0]
    reader = hub(read_seconds=0.2)
    assert read(reader) == DATA
    assert ranges(server) == [None, "bytes=1000-", "bytes=1000-"] and reader.stats.stalled_seconds > 0.39


def test_a_time_out_names_the_endpoint_and_the_proxy(server, monkeypatch):
    server.silences[NAME] = [0, 0]
    with pytest.raises(Unreachable) as caught:
        read(hub(attempts=2, read_seconds=0.1))
    said = caught.value.message
    assert "timed out" in said and f"the hub {server.url} (HF_ENDPOINT); no proxy is set" in said
    monkeypatch.setenv("http_proxy", "http://ann:hush@127.0.0.1:9")
    with pytest.raises(Unreachable) as caught:
        read(hub(attempts=2))
    assert "through the proxy http://***@127.0.0.1:9" in caught.value.message and "hush" not in str(caught.value)


def test_a_hub_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="the hub http://127.0.0.1:9 .HF_ENDPOINT."):
        hub().check_access(NAME)
    monkeypatch.setenv("HF_ENDPOINT", "ftp://127.0.0.1")
    with pytest.raises(KilnError, match="HF_ENDPOINT = ftp://127.0.0.1: expected https://host"):
        hub()


# --- busy servers ------------------------------------------------------------------------------


class Clock:
    """Time that passes only in the pauses of a hub."""

    def __init__(self, reader: Hub, server: HubServer):
        self.now, self.pauses = 0.0, []
        server.clock = lambda: self.now
        reader.pause = self.pause

    def pause(self, seconds: float) -> None:
        if seconds:
            self.now += seconds
            self.pauses.append(seconds)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 520])
def test_a_storm_of_30_seconds_is_sat_out_with_growing_pauses(server, status):
    reader = Hub(RemoteSettings(repo=REPO), "main")
    clock, server.storm = Clock(reader, server), (status, 30.0)
    assert read(reader) == DATA and reader.stats.retries == len(clock.pauses) == len(server.log) - 1
    for number, pause in enumerate(clock.pauses):
        assert 2**number <= pause <= 1.25 * 2**number


def test_a_storm_without_end_ends_after_the_attempts(server):
    reader = Hub(RemoteSettings(repo=REPO), "main")
    clock, server.storm = Clock(reader, server), (500, float("inf"))
    with pytest.raises(Unreachable, match="8 attempts without a new byte, at byte 0 of 300001: the hub answers 500"):
        read(reader)
    assert len(server.log) == 8 and 127 <= sum(clock.pauses) <= 1.25 * 127


def test_a_storm_in_mid_shard_is_sat_out(server):
    reader = Hub(RemoteSettings(repo=REPO), "main")
    Clock(reader, server)
    server.cuts[NAME] = [100_000]
    with reader.open(NAME, len(DATA), SHA) as stream:
        head = stream.read(50_000)
        server.storm = (503, 30.0)
        assert head + stream.read() == DATA
    assert reader.stats.reconnects == reader.stats.retries > 3


def test_the_pause_that_a_server_asks_for_is_kept_up_to_a_bound(server):
    reader = Hub(RemoteSettings(repo=REPO), "main")
    clock = Clock(reader, server)
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=50)
    asked = ["7", email.utils.format_datetime(soon, usegmt=True), "86400", "soon", "0"]
    server.answers = [(429, {"Retry-After": value}) for value in asked]
    assert read(reader) == DATA
    seconds, date, long, *odd = clock.pauses
    assert 7 <= seconds <= 8.75 and 30 < date <= 62.5 and long == 120
    assert [8 <= odd[0] <= 10, 16 <= odd[1] <= 20] == [True, True]


# --- answers that cannot be right --------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"Content-Length": "299000"},
        {"Content-Length": "400000"},
        {"Content-Encoding": "gzip"},
        {"Content-Length": "299000", "ETag": None},
    ],
)
@pytest.mark.parametrize("midway", [False, True])
def test_an_answer_of_a_wrong_length_is_not_believed(server, wrong, midway):
    server.headers[NAME] = [{}] * midway + [wrong]
    server.cuts[NAME] = [1000] * midway
    assert read(hub()) == DATA and len(server.log) == 2 + midway
    server.headers[NAME] = [{}] * midway + [wrong] * 4
    server.cuts[NAME] = [1000] * midway
    with pytest.raises(Unreachable, match="the answer's length is wrong: .* 300001 bytes are listed|encoded as gzip"):
        read(hub())


@pytest.mark.parametrize("part", ["bytes 999-300000/300001", "bytes 1000-299000/300001", "nonsense", None])
def test_another_part_than_asked_for_is_not_believed(server, part):
    server.cuts[NAME], server.headers[NAME] = [1000], [{}, {"Content-Range": part}]
    assert read(hub()) == DATA and ranges(server) == [None, "bytes=1000-", "bytes=1000-"]


def test_a_shorter_part_than_asked_for_is_followed_by_the_next(server):
    server.headers[NAME] = [{"Content-Range": "bytes 1-50/300001", "Content-Length": "50"}]
    assert read(hub(), start=1) == DATA[1:]
    assert ranges(server) == ["bytes=1-", "bytes=51-"]


def test_a_changed_byte_on_the_way_is_noticed_and_the_shard_stays_refused(server):
    server.corrupt[NAME] = [123_456]
    with hub().open(NAME, len(DATA), SHA) as stream:
        assert stream.read(1) == DATA[:1]
        for _ in range(2):
            with pytest.raises(ShardChanged, match="have sha256 .*, listed is"):
                stream.read()


def test_a_shard_that_changes_in_its_midst_is_not_glued_together(server):
    server.cuts[NAME], server.headers[NAME] = [1000], [{}, {"ETag": '"other"'}]
    with pytest.raises(ShardChanged, match="its ETag was .* and is other now"):
        read(hub())


def test_a_shard_that_changes_between_epochs_is_a_clear_stop(server):
    known, unknown = hub(), hub()
    assert read(known) == DATA and read(unknown, sha256=None) == DATA
    server.repos[f"datasets/{REPO}"][NAME] = changed = DATA[::-1]
    with pytest.raises(ShardChanged, match=f"announces sha256 {hashlib.sha256(changed).hexdigest()}, listed is {SHA}"):
        read(known)
    with pytest.raises(ShardChanged, match="its ETag was"):
        read(unknown, sha256=None)
    with pytest.raises(ShardChanged, match="its ETag was"):  # what was seen travels to the processes that read
        read(pickle.loads(pickle.dumps(unknown)), start=5, sha256=None)


def test_a_shard_that_became_shorter_is_a_clear_stop(server):
    server.repos[f"datasets/{REPO}"][NAME] = DATA[:1000]
    with pytest.raises(ShardChanged, match="ends before byte 2000"):
        read(hub(), start=2000, sha256=None)


def test_a_weak_etag_or_none_still_gives_the_right_bytes(server):
    for etag in ('W/"weak"', None):
        server.cuts[NAME], server.headers[NAME] = [1000], [{"ETag": etag}] * 2
        assert read(hub()) == DATA
    server.cuts[NAME], server.headers[NAME] = [1000], [{"ETag": 'W/"one"'}, {"ETag": 'W/"two"'}]
    with pytest.raises(ShardChanged, match="was one and is two"):
        read(hub())


# --- refusals ----------------------------------------------------------------------------------


def refusal(error: type[KilnError], **changed) -> str:
    with pytest.raises(error) as caught:
        hub(**changed).check_access(NAME)
    assert TOKEN not in repr(caught.value) and caught.value.hint
    return str(caught.value)


def test_refusals_are_told_apart_and_named_without_waiting(server, monkeypatch):
    page = f"{server.url}/datasets/{REPO}"
    server.gated[f"datasets/{REPO}"] = "another"
    said = refusal(Refused)
    assert f"open {page}, log in, accept the terms" in said and "gated" in said and "HF_TOKEN" in said
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = refusal(Refused)  # 401 without a token, 403 with it
    assert f"open {page} with that account and accept its terms" in said and "account of HF_TOKEN" in said
    server.answers = [(401, {})] * 2
    assert "HF_TOKEN may be wrong or expired" in refusal(Refused)
    monkeypatch.delenv("HF_TOKEN")
    server.answers = [(403, {})]
    assert "accept the terms" in refusal(Refused)
    server.gated.clear()
    assert "no such revision as 0123" in refusal(Refused, revision="0123")
    server.answers = [(404, {"X-Error-Code": "RepoNotFound"})]
    assert f"{page}: the hub has no such data set" in refusal(Refused)
    del server.repos[f"datasets/{REPO}"][NAME]
    assert "the hub answers 404" in refusal(Unreachable)
    del server.repos[f"datasets/{REPO}"]
    assert "if it is private, set HF_TOKEN" in refusal(Refused)
    assert len(server.log) == 10


def test_a_token_with_a_line_break_is_refused_unseen(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\nX")
    server.gated[f"datasets/{REPO}"] = TOKEN
    assert "one word that begins with hf_" in refusal(KilnError)


def test_access_is_checked_by_one_request_for_one_byte(server):
    hub().check_access(NAME)
    assert ranges(server) == ["bytes=0-0"] and server.sent <= 1
    server.ranges = False
    hub().check_access(NAME)


# --- the token, and other servers --------------------------------------------------------------


def authorisations(server) -> list[str | None]:
    return [given for *_, given in server.log]


def test_the_token_is_used_only_after_a_refusal_and_from_then_on(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    reader = hub()
    reader.check_access(NAME)
    assert authorisations(server) == [None] and not reader.authorised
    server.gated[f"datasets/{REPO}"] = TOKEN
    reader.check_access(NAME)
    assert read(reader) == DATA and read(pickle.loads(pickle.dumps(reader))) == DATA
    assert authorisations(server)[1:] == [None, *[f"Bearer {TOKEN}"] * 3]
    assert TOKEN.encode() not in pickle.dumps(reader) and TOKEN not in repr(vars(reader))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_token_is_dropped_on_a_redirect_and_netrc_is_never_asked(server, monkeypatch, tmp_path, host):
    (tmp_path / "netrc").write_text(f"default login ann password {TOKEN[::-1]}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.gated[f"datasets/{REPO}"] = TOKEN
    with HubServer() as storage:
        # On the second host, the first server itself: another name for it is another host.
        place = storage if host == "127.0.0.1" else server
        place.files[NAME] = DATA
        place.cuts[NAME] = [1000, 2000]
        server.storage = f"{place.url.replace('127.0.0.1', host)}/files"
        assert read(hub()) == DATA
        moved = [(asked, given) for _, _, asked, given in place.asked("GET /files/")]
        assert moved == [(None, None), ("bytes=1000-", None), ("bytes=3000-", None)]
        asked = [given for *_, given in server.asked("/resolve/")]
        assert asked == [None, *[f"Bearer {TOKEN}"] * 3]


def test_a_redirect_within_the_hub_keeps_the_token(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.files[NAME] = DATA
    server.storage = f"{server.url}/files"
    assert read(hub(authorised=True)) == DATA
    assert authorisations(server) == [f"Bearer {TOKEN}"] * 2


def test_a_storage_host_has_its_own_etag_and_its_refusal_means_an_old_address(server):
    with HubServer() as storage:
        storage.files[NAME], server.storage = DATA, f"{storage.url}/files"
        other = "0" * 64  # of another kind than sha256
        storage.headers[NAME] = [{"ETag": f'"{other}"'}] * 3
        storage.cuts[NAME] = [1000, 1000, len(DATA)]
        storage.answers = [(403, {})]
        reader = hub()
        assert read(reader) == DATA and len(server.log) == len(storage.log) == 4
        server.repos[f"datasets/{REPO}"][NAME] = DATA[::-1]
        with pytest.raises(ShardChanged, match="announces sha256"):
            read(hub())
        storage.answers = [(403, {})] * 4
        server.repos[f"datasets/{REPO}"][NAME] = DATA
        with pytest.raises(Unreachable, match="answers 403"):
            read(hub())


def test_a_signed_address_is_not_shown(server):
    server.storage = "http://127.0.0.1:9/files"
    assert "hush" not in refusal(Unreachable)
    server.storage = f"{server.url}/datasets/{REPO}/resolve/main"  # to itself, for ever
    assert "hush" not in (said := refusal(Unreachable)) and "redirects" in said


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Files with a certificate of 127.0.0.1 and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "hub of a test")])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = made.add_extension(address, False).sign(key, hashes.SHA256())
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    folder = tmp_path_factory.mktemp("certificate")
    (folder / "certificate.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *form))
    return folder / "certificate.pem", folder / "key.pem"


def test_https_is_not_left_and_a_stranger_not_trusted(server, certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with HubServer(tls=context) as safe:
        safe.repos, safe.files[NAME] = server.repos, DATA
        server.files[NAME] = DATA
        monkeypatch.setenv("HF_ENDPOINT", safe.url)
        assert "REQUESTS_CA_BUNDLE" in (said := refusal(Unreachable)) and "CERTIFICATE_VERIFY_FAILED" in said
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
        assert read(hub()) == DATA
        safe.storage = f"{safe.url}/files"
        assert read(hub()) == DATA
        safe.storage = f"{server.url}/files"
        said = refusal(Refused)
        assert f"redirects from https to {server.url}/files" in said and "hush" not in said
        assert not server.log


# --- threads and processes ---------------------------------------------------------------------


def test_threads_share_a_hub_and_its_counts(server):
    reader = hub()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: read(reader, start), range(24)))
    assert [len(one) for one in found] == [len(DATA) - start for start in range(24)]
    assert reader.stats.bytes == sum(map(len, found))


def test_errors_and_hubs_go_between_fresh_processes(server):
    reader = hub()
    assert read(reader) == DATA
    server.cuts[NAME] = [1000]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(read, reader).result() == DATA
        server.storm = (500, float("inf"))
        with pytest.raises(Unreachable) as caught:
            pool.submit(read, reader).result()
        assert "4 attempts" in caught.value.message and "HF_ENDPOINT" in caught.value.hint
        server.storm = (500, 0.0)
        server.repos[f"datasets/{REPO}"][NAME] = DATA[::-1]
        with pytest.raises(ShardChanged):
            pool.submit(read, reader).result()
    assert reader.stats.retries == 0


def test_a_forked_process_has_connections_and_counts_of_its_own(server):
    program = (
        "import os, sys, test_biomedica_remote as t\n"
        "reader = t.hub(); assert t.read(reader) == t.DATA\n"
        "child = os.fork()\n"
        "assert child or reader.stats.bytes == 0\n"
        "good = all(t.read(reader, start) == t.DATA[start:] for start in range(5))\n"
        "good &= reader.stats.bytes == sum(len(t.DATA) - start for start in range(5)) + (len(t.DATA) if child else 0)\n"
        "good &= not child or os.waitpid(child, 0)[1] == 0\n"
        "os._exit(not good)\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, timeout=120)
    assert done.returncode == 0


# --- the cache ---------------------------------------------------------------------------------


def cached(folder: Path, gb: float = 1.0) -> Hub:
    return hub(cache_folder=str(folder), cache_gb=gb)


def kept(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_a_shard_read_whole_is_kept_and_read_from_disk(server, tmp_path):
    folder = tmp_path / "cache"
    server.cuts[NAME] = [1000]
    assert read(cached(folder)) == DATA and kept(folder) == [f"{SHA}.shard"]
    asked = len(server.log)
    reader = cached(folder)
    assert read(reader) == DATA and read(reader, 1000) == DATA[1000:]
    assert len(server.log) == asked and reader.stats.bytes == 0


def test_what_is_not_read_whole_or_not_right_is_not_kept(server, tmp_path):
    folder = tmp_path / "cache"
    with cached(folder).open(NAME, len(DATA), SHA) as stream:
        stream.read(1000)
        assert kept(folder) == [f"{SHA}.shard.part"]
        assert read(cached(folder)) == DATA  # another reader of it meanwhile keeps nothing
    read(cached(folder), start=1)
    server.corrupt[NAME] = [5]
    with pytest.raises(ShardChanged):
        read(cached(folder))
    assert kept(folder) == []


def test_the_longest_unused_make_room_and_nothing_else_does(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "mine.tar").write_bytes(bytes(10))
    (folder / "orphan.shard.part").write_bytes(bytes(50))  # of a process that was killed
    shelf = cache.Cache(folder, 110)

    def keep(name: str, size: int) -> bool:
        entry = shelf.begin(name, size)
        if entry is not None:
            entry.write(bytes(size))
            entry.finish()
            os.utime(folder / f"{name}.shard", ns=(0, len(list(folder.iterdir()))))
        return entry is not None

    assert keep("a", 40) and keep("b", 40) and kept(folder) == ["a.shard", "b.shard", "mine.tar"]
    with shelf.find("a", 40) as handle:  # used again, so b is the longest unused
        assert keep("c", 60) and kept(folder) == ["a.shard", "c.shard", "mine.tar"]
        entry = shelf.begin("d", 80)
        assert kept(folder) == ["d.shard.part", "mine.tar"] and handle.read() == bytes(40)
    assert shelf.begin("d", 80) is None and not keep("e", 30) and not keep("f", 111)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 110
    entry.drop()
    assert shelf.find("a", 40) is None and keep("e", 30) and shelf.find("e", 31) is None


def test_a_full_disk_costs_the_cache_but_no_byte(server, tmp_path, monkeypatch, caplog):
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(errno.ENOSPC, "No space left on device")

    begin = cache.Cache.begin

    def full(self, key, size):
        entry = begin(self, key, size)
        entry._handle.close()
        entry._handle = Full()
        return entry

    monkeypatch.setattr(cache.Cache, "begin", full)
    assert read(cached(tmp_path / "cache")) == DATA
    assert kept(tmp_path / "cache") == [] and "not kept: No space left" in caplog.text


def test_a_cache_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(KilnError, match="cache: is no folder"):
        read(cached(tmp_path / "cache"))


# --- the list of shards ------------------------------------------------------------------------


def tar_of(keys, image_bytes=3000) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as made:
        for key in keys:
            for ending, data in (("jpg", DATA[:image_bytes]), ("json", b"{}"), ("txt", key.encode())):
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                made.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class Listing:
    """Runs of the step against a server, from an index with `train` local pairs of `samples`."""

    def __init__(self, folder: Path, train: int, samples: int | None = None):
        self.folder = folder
        (folder / "index").mkdir(parents=True)
        index = {"shard": ["a.tar"], "samples": [train if samples is None else samples], "train": [train]}
        pd.DataFrame(index).to_parquet(folder / "index/shards.parquet")

    def arguments(self, repo=REPO, samples=100, **values) -> list[str]:
        values = {"remote": {"repo": repo, **QUICK, "read_seconds": 10, **values}, "samples": samples}
        line = ["--settings", json.dumps(values), "--index", self.folder / "index"]
        line += ["--output", self.folder / "out/shards.parquet", "--meta", self.folder / "out/meta.json"]
        return list(map(str, line))

    def run(self, **values) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "scripts.biomedica.list_remote", *self.arguments(**values)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    def read(self) -> tuple[pd.DataFrame, dict]:
        assert sorted(path.name for path in (self.folder / "out").iterdir()) == [
            "meta.json", "shards.parquet", "summary.json",
        ]  # fmt: skip
        table = pd.read_parquet(self.folder / "out/shards.parquet")
        assert pa.parquet.read_schema(self.folder / "out/shards.parquet") == list_remote.SHARDS
        return table, json.loads((self.folder / "out/summary.json").read_text())


@pytest.fixture
def shards(server):
    """Files of the repo: three shards, and others."""
    files = {f"noncommercial/10_20{n:06d}.tar": tar_of([f"1-PMC{n}{i}-0-x" for i in range(20)]) for n in (2, 0, 1)}
    server.repos[f"datasets/{REPO}"] = files | {"README.md": b"# figures\n", "list.txt": b"x"}
    return files


@pytest.mark.parametrize(
    ("train", "values", "said"),
    [(100, {}, "suffice for the 100"), (500, {}, "suffice"), (3, {"repo": None}, "no repo is set; 3 local pairs")],
)
def test_no_request_is_made_and_no_token_asked_where_nothing_is_streamed(
    server, shards, tmp_path, monkeypatch, train, values, said
):
    monkeypatch.setenv("HF_TOKEN", "not\na token")  # whoever looks at it stops
    listing = Listing(tmp_path, train)
    list_remote.main(listing.arguments(**values))
    table, summary = listing.read()
    assert len(table) == summary["shards"] == summary["bytes"] == 0 and not summary["needed"]
    assert said in summary["reason"] and summary["revision"] is summary["bytes_per_sample"] is None
    assert server.log == []


def test_the_shards_are_listed_at_one_commit_with_sizes_and_hashes(server, shards, tmp_path):
    listing = Listing(tmp_path, 99)
    server.answers = [(503, {}), (429, {"Retry-After": "0"})]
    done = listing.run()
    assert done.returncode == 0, done.stderr
    table, summary = listing.read()
    names = sorted(shards)
    expected = [(name, len(shards[name]), hashlib.sha256(shards[name]).hexdigest()) for name in names]
    assert list(table.itertuples(index=False, name=None)) == expected
    commit = server.commit(f"datasets/{REPO}")
    assert summary == {
        "repo": REPO, "revision": commit, "needed": True, "shards": 3, "other_files": 2, "bytes_per_sample": None,
        "reason": "99 local pairs to train on; an epoch has 100", "bytes": sum(map(len, shards.values())),
    }  # fmt: skip
    assert server.asked(f"/tree/{commit}") and not server.asked("/resolve/")
    with hub(commit).open(*table.iloc[1]) as stream:
        assert stream.read() == shards[names[1]]


def test_without_local_pairs_the_head_of_a_shard_is_measured_and_pure_streaming_is_said(server, shards, tmp_path):
    listing = Listing(tmp_path, 0)
    done = listing.run(pattern="*000001.tar")
    assert done.returncode == 0 and "all 100 of an epoch are streamed" in done.stderr, done.stderr
    table, summary = listing.read()
    assert summary["bytes_per_sample"] == 512 + 3072 + 2 * 1024  # headers, and data in blocks of 512
    assert len(table) == 1 and summary["other_files"] == 4 and len(server.asked("/resolve/")) == 1


def test_shards_without_a_listed_hash_are_read_all_the_same(server, shards, tmp_path):
    data = server.repos[f"datasets/{REPO}"]["small.bin"] = tar_of(["1-PMC1-0-x"])  # too small for LFS
    listing = Listing(tmp_path, 0)
    done = listing.run(pattern="*.bin")
    assert done.returncode == 0, done.stderr
    table, summary = listing.read()
    assert table["sha256"].isna().all() and summary["bytes_per_sample"] == 5632
    with hub().open(*table.iloc[0]) as stream:
        assert stream.read() == data


def test_only_the_head_of_a_large_shard_is_read(server, monkeypatch):
    data = tar_of([f"1-PMC{i}-0-x" for i in range(400)], image_bytes=100_000)
    server.repos[f"datasets/{REPO}"][NAME] = data
    monkeypatch.setattr(list_remote, "HEAD", 1_000_000)
    reader = hub()
    assert list_remote.measure(reader, NAME, len(data), None) == 512 + 100_352 + 2 * 1024
    assert reader.stats.bytes < 1_000_000 + 2 * remote.CHUNK and server.sent < len(data)


def test_a_damaged_head_or_one_without_pairs_is_told(server):
    whole = tar_of(["1-PMC1-0-x", "1-PMC2-0-x"])
    for data, mean in ((whole[:8000], 5632), (tar_of([]), None)):
        server.repos[f"datasets/{REPO}"][NAME] = data
        assert list_remote.measure(hub(), NAME, len(data), None) == mean
    server.repos[f"datasets/{REPO}"][NAME] = whole[:3000]
    with pytest.raises(KilnError, match="truncated"):
        list_remote.measure(hub(), NAME, 3000, None)


@pytest.mark.parametrize(
    ("values", "change", "said"),
    [
        ({"pattern": "*.zip"}, None, ["none of 5 files is named '*.zip'"]),
        ({"revision": "v9"}, None, ["no such revision", "biomedica.remote"]),
        ({}, "gate", ["accept the terms, then set HF_TOKEN"]),
        ({"attempts": 2}, "storm", ["the hub answers 500", "run again"]),
        ({"attempts": 1}, "gone", ["http://127.0.0.1:9 (HF_ENDPOINT) cannot be reached (no proxy is set)"]),
    ],
)
def test_a_repo_that_cannot_be_listed_is_a_clear_stop(server, shards, tmp_path, monkeypatch, values, change, said):
    if change == "gate":
        server.answers = [(403, {"X-Error-Code": "GatedRepo"})]
    elif change == "storm":
        server.storm = (500, float("inf"))
    elif change == "gone":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    done = Listing(tmp_path, 0).run(**values)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert all(words in done.stderr for words in said), done.stderr
    assert not (tmp_path / "out").exists()
