"""Shards of a data set on the Hugging Face hub, read as files while they come; kept only in a cache, if one is set.

A connection that breaks is taken up again at the last byte that came. Nothing of an answer is believed that the
listing or an earlier answer contradicts: the shard's version (ETag), its length, the part that was asked for and, of a
shard that is read from its first byte to its last, the sha256. requests is taken rather than fsspec or curl, which
neither tell the counts nor resume so.
"""

import hashlib
import io
import logging
import os
import random
import re
import threading
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

import requests
import urllib3
from requests import exceptions as failures

from scripts.biomedica.cache import Cache, Entry
from scripts.biomedica.settings import RemoteSettings
from scripts.common import artefacts, network
from scripts.common.errors import KilnError

DEFAULT_ENDPOINT = "https://huggingface.co"
CHUNK = 2**18  # bytes asked of a connection at once; what a file holds in memory at most
PLACE = "biomedica.remote.repo"
_FINAL = (
    failures.InvalidURL, failures.MissingSchema, failures.InvalidSchema, failures.InvalidHeader,
    failures.InvalidProxyURL, failures.TooManyRedirects,
)  # fmt: skip
_PORTS = {"http": 80, "https": 443}
log = logging.getLogger("kiln")
_chance = random.SystemRandom()  # leaves the global state of `random` alone


class Unreachable(KilnError):
    """One shard cannot be read, after all patience."""


class ShardChanged(KilnError):
    """A shard's bytes are not those that were listed, or that were read before."""


class Refused(KilnError):
    """The hub, or what stands before it, gives nothing of this repo: no login, terms not accepted, no such repo."""


class Counts(NamedTuple):
    """Of what was read: new bytes of shards; requests that were repeated, and how many of those in mid-shard; bytes
    that came again because the server does not send parts; seconds without a new byte around failures."""

    bytes: int = 0
    retries: int = 0
    reconnects: int = 0
    reread_bytes: int = 0
    stalled_seconds: float = 0.0


class Stats:
    """`Counts` of one process, for any number of threads, as attributes that may be read at any time.

    Each thread adds to its own, so that there is no lock, which a fork might copy while it is held.
    """

    def __init__(self) -> None:
        self._process, self._threads = os.getpid(), {}

    def add(self, **more: float) -> None:
        """Add to counts, by their names."""
        if self._process != os.getpid():
            self.__init__()
        own = self._threads.setdefault(threading.get_ident(), dict.fromkeys(Counts._fields, 0))
        for name, value in more.items():
            own[name] += value

    def read(self) -> Counts:
        """All counts of this process so far."""
        threads = [dict(one) for one in list(self._threads.values())] if self._process == os.getpid() else []
        return Counts(*(sum(one[name] for one in threads) for name in Counts._fields))

    def __getattr__(self, name: str) -> float:
        if name not in Counts._fields:
            raise AttributeError(name)
        return getattr(self.read(), name)

    def __reduce__(self):
        return Stats, ()


class _FaultError(Exception):
    """A failed attempt: the reason, the pause that the server asks for, and whether another attempt may help."""

    def __init__(self, reason: str, wait: float = 0.0, again: bool = True):
        super().__init__(reason)
        self.wait, self.again = wait, again


class Hub:
    """Reads shards of `remote.repo` at a commit. May be used by many threads, pickled and forked.

    Args:
        remote: settings.
        revision: the commit that was listed.
        authorised: whether HF_TOKEN is sent from the first request on, as it was needed before. Otherwise it is used
            once the hub has refused a request without it.

    Attributes:
        stats: what this process has read by this hub.
    """

    def __init__(self, remote: RemoteSettings, revision: str, authorised: bool = False):
        self.remote, self.revision, self.authorised = remote, revision, authorised
        self.endpoint = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self.stats = Stats()
        self.cache = Cache(Path(remote.cache_folder), int(remote.cache_gb * 1e9)) if remote.cache_folder else None
        self.versions: dict[str, str] = {}
        self._sessions, self._closed = threading.local(), threading.Event()

    def __reduce__(self):
        return _restored, (self.remote, self.revision, self.authorised, self.endpoint, dict(self.versions))

    @property
    def page(self) -> str:
        """The repo's page, for messages."""
        return f"{network.clean(self.endpoint)}/datasets/{self.remote.repo}"

    def open(self, name: str, bytes: int, sha256: str | None = None, start: int = 0) -> BinaryIO:
        """A shard from byte `start` on, as a file to be read to its end or closed before.

        Args:
            name: of the shard in the repo.
            bytes, sha256: as listed; the hash may be unknown.
            start: 0 to `bytes`.

        Raises (here or while reading):
            Unreachable: after `remote.attempts` attempts without a new byte, or at once if the shard is not there.
            ShardChanged: other bytes than listed or read before.
            Refused: the hub gives nothing of the repo.
        """
        if not 0 <= start <= bytes:
            raise ValueError(f"{name}: start {start}, expected 0 to {bytes}")
        if self.cache is None:
            return RemoteFile(self, name, bytes, sha256, start)
        key = sha256 or artefacts.sha256_text(self.endpoint, self.remote.repo, self.revision, name)
        kept = self.cache.find(key, bytes)
        if kept is not None:
            kept.seek(start)
            return kept
        return RemoteFile(self, name, bytes, sha256, start, self.cache.begin(key, bytes) if start == 0 else None)

    def check_access(self, name: str) -> None:
        """Ask for the first byte of a shard, and so whether the repo may be read and whether that needs HF_TOKEN.

        Raises:
            KilnError: as `open`.
        """
        patience = _Patience(self, name)
        while True:
            try:
                self.request(name, {"Range": "bytes=0-0"}).close()
                return
            except _FaultError as fault:
                patience.fail(fault, "the first byte")

    def close(self) -> None:
        """End all files of this process that wait or read: they raise ValueError."""
        self._closed.set()

    def request(self, name: str, headers: dict[str, str]) -> requests.Response:
        """One request for a shard: an answer 200, 206 or 416, whose body has not been read.

        Raises:
            KilnError: asking again does not help.
            _FaultError: it may.
        """
        while True:
            authorised = self.authorised
            response = self._send(name, headers, authorised)
            status, code = response.status_code, response.headers.get("X-Error-Code", "")
            if status in (200, 206, 416):
                return response
            response.close()
            own = _origin(response.url) == _origin(self.endpoint)
            if status in (401, 403) and own:
                if authorised or network.hub_token() is None:
                    raise self._refused(status, authorised, status == 403 or code == "GatedRepo")
                self.authorised = True
                log.info("%s wants a login: using HF_TOKEN", self.remote.repo)
                continue
            if status == 404 and code == "RepoNotFound":
                raise self._refused(status, authorised, False)
            if status == 404 and code == "RevisionNotFound":
                raise Refused(
                    f"{self.page}: no such revision as {self.revision} any more ({status})",
                    "remove what biomedica_list_remote wrote, and list the repo again",
                )
            # A storage host's refusal means that the address it was given has expired: the next one is new.
            passing = status in (401, 403, 408, 429) or not 400 <= status < 500
            raise _FaultError(f"the hub answers {status}", network.retry_after(response.headers), again=passing)

    def _send(self, name: str, headers: dict[str, str], authorised: bool) -> requests.Response:
        repo, revision = self.remote.repo, quote(self.revision, safe="")
        url = f"{self.endpoint}/datasets/{repo}/resolve/{revision}/{quote(name)}"
        options = {
            "headers": {"Accept-Encoding": "identity", **headers}, "auth": _Login(authorised), "stream": True,
            "timeout": (self.remote.connect_seconds, self.remote.read_seconds),
        }  # fmt: skip
        try:
            return self._session().get(url, **options)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, UnicodeError) as error:
            fault = _fault(error)
        raise fault  # here, so that it does not lead to the request and its headers

    def _session(self) -> requests.Session:
        own = self._sessions
        if getattr(own, "process", None) != os.getpid():
            own.process, own.session = os.getpid(), _Session(self.endpoint)
        return own.session

    def _refused(self, status: int, authorised: bool, gated: bool) -> Refused:
        said = network.explain_refusal(self.page, "data set", PLACE, status, authorised, gated)
        return Refused(said.message, said.hint)

    def pause(self, seconds: float) -> None:
        """Wait between two attempts, or not at all.

        Raises:
            ValueError: the hub was closed.
        """
        if self._closed.is_set() or (seconds and self._closed.wait(seconds)):
            raise ValueError("read from a closed hub")


def _restored(remote: RemoteSettings, revision: str, authorised: bool, endpoint: str, versions: dict[str, str]) -> Hub:
    made = Hub(remote, revision, authorised)
    made.endpoint, made.versions = endpoint, versions
    return made


class RemoteFile(io.BufferedIOBase):
    """A shard, read from front to back; see `Hub.open`. For one thread at a time."""

    def __init__(self, hub: Hub, name: str, size: int, sha256: str | None, start: int, entry: Entry | None = None):
        self._hub, self.name, self.size, self._sha256, self._start = hub, name, size, sha256, start
        self._entry = entry
        self._hash = hashlib.sha256() if start == 0 else None
        self._at, self._held = start, memoryview(b"")  # bytes that came, and those of them not yet given
        self._response: requests.Response | None = None
        self._etag: str | None = None
        self._skip = 0  # bytes of the answer that came before
        self._patience = _Patience(hub, name)
        self._broken: ShardChanged | None = None

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        """Where in the shard the next byte to be read is."""
        return self._at - len(self._held)

    def read(self, size: int | None = -1, /) -> bytes:
        """The next `size` bytes (all, if negative or None); less only at the shard's end."""
        if self.closed:
            raise ValueError("read from a closed file")
        if self._broken is not None:
            raise self._broken
        left = self.size - self.tell()
        left = left if size is None or size < 0 else min(size, left)
        pieces = []
        try:
            while left:
                if not self._held:
                    self._held = memoryview(self._more())
                piece, self._held = self._held[:left], self._held[left:]
                pieces.append(piece)
                left -= len(piece)
        except BaseException:
            self._held = memoryview(b"".join([*pieces, self._held]))  # not given, so not lost
            raise
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    read1 = read

    def close(self) -> None:
        """Give the connection up; what was not read does not come."""
        self._drop()
        if self._entry is not None:
            self._entry.drop()
        super().close()

    def _more(self) -> bytes:
        """Bytes that follow those that came; at least one."""
        self._patience.start()
        while True:
            self._hub.pause(0)
            try:
                if self._response is None:
                    self._connect()
                data = self._receive()
                break
            except _FaultError as fault:
                self._drop()
                self._patience.fail(fault, f"byte {self._at} of {self.size}", self._at > self._start)
        self._patience.over()
        self._at += len(data)
        self._hub.stats.add(bytes=len(data))
        if self._hash is not None:
            self._hash.update(data)
        if self._entry is not None:
            self._entry.write(data)
        if self._at == self.size:
            self._finish()
        return data

    def _connect(self) -> None:
        asked = {"Range": f"bytes={self._at}-"} if self._at else {}
        if self._at and self._etag:
            asked["If-Range"] = self._etag  # a changed shard comes whole, never as a tail to the old head
        response = self._response = self._hub.request(self.name, asked)
        self._check_version(response)
        headers, status = response.headers, response.status_code
        if headers.get("Content-Encoding", "identity") != "identity":
            raise _FaultError(f"the answer is encoded as {headers['Content-Encoding']}")
        if status == 416:
            raise self._changed(f"the hub says that it ends before byte {self._at}; {self.size} bytes are listed")
        last, whole = self.size - 1, self.size
        if status == 206:
            part = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range", ""))
            if not part or int(part[1]) != self._at:
                raise _FaultError(f"another part came than asked for: {headers.get('Content-Range')!r}")
            last, whole = int(part[2]), self.size if part[3] == "*" else int(part[3])
        first = self._at if status == 206 else 0
        self._skip = self._at - first
        length = headers.get("Content-Length", str(last + 1 - first))
        if whole != self.size or not first <= last < self.size or length != str(last + 1 - first):
            raise _FaultError(
                f"the answer's length is wrong: Content-Length {headers.get('Content-Length')},"
                f" Content-Range {headers.get('Content-Range')}; {self.size} bytes are listed"
            )

    def _receive(self) -> bytes:
        while True:
            try:
                # read1, as what read has gathered is lost when it fails.
                data = self._response.raw.read1(CHUNK, decode_content=False)
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                fault = _fault(error)
            else:
                fault = None if data else _FaultError("the answer ended early")
            if fault:
                raise fault
            again, data = data[: self._skip], data[self._skip :]
            if again:
                self._skip -= len(again)
                self._hub.stats.add(reread_bytes=len(again))
            if data:
                return data[: self.size - self._at]
            self._hub.pause(0)

    def _check_version(self, response: requests.Response) -> None:
        """The hub's own word on the file (X-Linked-Etag, on its redirect to a storage host) counts before the ETag."""
        answers = [*response.history, response]
        linked = [one.headers["X-Linked-Etag"] for one in answers if "X-Linked-Etag" in one.headers]
        etag = response.headers.get("ETag", "")
        # A weak one cannot vouch for bytes.
        self._etag = etag if etag.startswith('"') else None
        version = (linked[0] if linked else etag).removeprefix("W/").strip('"')
        if not version:
            return
        by_hub = linked or not response.history  # a storage host's own may be a hash of something else
        if by_hub and self._sha256 and re.fullmatch(r"[0-9a-f]{64}", version) and version != self._sha256:
            raise self._changed(f"the hub announces sha256 {version}, listed is {self._sha256}")
        known = self._hub.versions.setdefault(self.name, version)
        if known != version:
            raise self._changed(f"its ETag was {known} and is {version} now")

    def _finish(self) -> None:
        self._drop()
        got = self._hash.hexdigest() if self._hash is not None else None
        if got and self._sha256 and got != self._sha256:
            raise self._changed(f"its {self.size} bytes have sha256 {got}, listed is {self._sha256}")
        if self._entry is not None:
            self._entry.finish()

    def _drop(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def _changed(self, why: str) -> ShardChanged:
        self._broken = ShardChanged(
            f"{self._hub.page}: shard {self.name} is not the one that was listed: {why}",
            "list the repo again (remove what biomedica_list_remote wrote) and train anew; if it happens again,"
            " a proxy or mirror (HF_ENDPOINT) changes files",
        )
        return self._broken


class _Patience:
    """Counts the attempts to read a shard that gave no new byte, and waits between them."""

    def __init__(self, hub: Hub, name: str):
        self.hub, self.name = hub, name
        self.failed = 0
        self.start()

    def start(self) -> None:
        """From now on somebody waits for bytes."""
        self.since = time.monotonic()

    def over(self) -> None:
        """New bytes have come."""
        if self.failed:
            self._count()
        self.failed = 0

    def fail(self, fault: _FaultError, where: str, midway: bool = False) -> None:
        """Wait before the next attempt.

        Raises:
            Unreachable: there is none.
        """
        hub, remote = self.hub, self.hub.remote
        self.failed += 1
        self._count()
        if not fault.again or self.failed >= remote.attempts:
            raise self._unreachable(fault, where)
        backoff = remote.wait_seconds * 2.0 ** min(self.failed - 1, 60)
        # The share by chance keeps many readers from coming back all at once.
        pause = min(max(backoff, fault.wait) * _chance.uniform(1.0, 1.25), remote.max_wait_seconds)
        log.info("%s: %s; again in %.0f s, from %s", self.name, fault, pause, where)
        hub.pause(pause)
        self._count()
        hub.stats.add(retries=1, reconnects=int(midway))

    def _count(self) -> None:
        now = time.monotonic()
        self.hub.stats.add(stalled_seconds=now - self.since)
        self.since = now

    def _unreachable(self, fault: _FaultError, where: str) -> Unreachable:
        endpoint = self.hub.endpoint
        tried = f"{self.failed} attempts without a new byte, at {where}" if fault.again else f"at {where}"
        return Unreachable(
            f"{self.hub.page}: shard {self.name} cannot be read: {tried}: {fault}"
            f" ({network.named_endpoint(endpoint)}; {network.proxy_in_force(endpoint)})",
            "check the network, HF_ENDPOINT, HTTPS_PROXY, NO_PROXY, and REQUESTS_CA_BUNDLE if your site reads traffic;"
            " wait some minutes and run again, or set plan.unreachable=others",
        )


class _Login(requests.auth.AuthBase):
    """HF_TOKEN, or nothing: with either, requests looks up no netrc."""

    def __init__(self, authorised: bool):
        self.authorised = authorised

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        token = network.hub_token() if self.authorised else None
        if token:
            request.headers["Authorization"] = f"Bearer {token}"
        return request


class _Session(requests.Session):
    """Follows redirects, but shows the token to nobody but the hub, and does not leave https."""

    def __init__(self, endpoint: str):
        super().__init__()
        self._own = _origin(endpoint)

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        if target and resp.url.startswith("https:") and urlsplit(urljoin(resp.url, target)).scheme != "https":
            raise Refused(
                f"{network.clean(resp.url)}: redirects from https to {network.clean(urljoin(resp.url, target))}",
                "nobody could vouch for what comes from there; check HF_ENDPOINT and the proxy",
            )
        return target

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        if _origin(prepared_request.url) != self._own:
            prepared_request.headers.pop("Authorization", None)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)


def _fault(error: Exception) -> _FaultError:
    untrusted = "CERTIFICATE_VERIFY_FAILED" in str(error)
    return _FaultError(network.reason(error), again=not (untrusted or isinstance(error, _FINAL)))
