"""Serve data sets in a folder as the Hugging Face hub does, on 127.0.0.1, until SIGTERM or the parent's end.

Service of the rules that stream in the demo, and the far end of benchmarks. `--folder` holds `datasets/<owner>/<name>/`
and any files below. The address goes into `--port-file` once requests are answered; clients take it as HF_ENDPOINT.
On demand it misbehaves as real ones do, is slow, or asks for a token. Nothing but a piece of a file is held in memory.
"""

import argparse
import contextlib
import hashlib
import http.server
import inspect
import json
import logging
import os
import re
import signal
import threading
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.common import artefacts, step
from scripts.common.errors import KilnError

PIECE = 2**16  # bytes sent at once
LATE = 0.02  # seconds of the link's idle time that are made up for: a sleep ends late
log = logging.getLogger("kiln")


class Faults(NamedTuple):
    """What goes wrong on purpose; 0 and False are off.

    Attributes:
        unavailable_every: every so-many-th reply is a 503.
        retry_after: seconds of pause that a 503 asks for.
        cut_once: the first file that is asked for breaks off half way, once.
        slow_once: the second file that is asked for comes after `slow_seconds`, once.
        latency: seconds before each reply.
        bytes_per_second: of all connections together.
    """

    unavailable_every: int = 0
    retry_after: int = 1
    cut_once: bool = False
    slow_once: bool = False
    slow_seconds: float = 2.0
    latency: float = 0.0
    bytes_per_second: float = 0.0


class File(NamedTuple):
    """A file of a repo; all count as large ones, whose version is their sha256."""

    path: Path
    bytes: int
    sha256: str


class Hub(http.server.ThreadingHTTPServer):
    """The server; a thread for each connection.

    Args:
        folder: with `datasets/<owner>/<name>/`.
        token: files need it; None: they are for everyone.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, faults: Faults, token: str | None = None, port: int = 0):
        self.folder, self.faults, self.token = folder, faults, token
        self.lock = threading.Lock()
        self._replies = self._files = 0
        self._free = 0.0  # when the link has sent what was given to it
        self._hashes: dict[tuple[Path, int, int], str] = {}
        super().__init__(("127.0.0.1", port), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def repos(self) -> list[str]:
        """`<owner>/<name>` of all data sets."""
        places = sorted((self.folder / "datasets").glob("*/*"))
        return [f"{place.parent.name}/{place.name}" for place in places if place.is_dir()]

    def files(self, repo: str) -> dict[str, File]:
        """{path in the repo: file} as they are now, sorted."""
        root = self.folder / "datasets" / repo
        found = {}
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            facts = path.stat()
            known = (path, facts.st_size, facts.st_mtime_ns)
            with self.lock:
                if known not in self._hashes:
                    self._hashes[known] = artefacts.sha256_file(path)
            found[path.relative_to(root).as_posix()] = File(path, facts.st_size, self._hashes[known])
        return found

    def next_reply(self) -> bool:
        """Count a reply; whether it must be a 503."""
        with self.lock:
            self._replies += 1
            return self.faults.unavailable_every > 0 and self._replies % self.faults.unavailable_every == 0

    def next_file(self) -> int:
        """The number of this file among all that were sent, from 1."""
        with self.lock:
            self._files += 1
            return self._files

    def send_slowly(self, count: int) -> None:
        """Wait until the link has room for `count` bytes."""
        if self.faults.bytes_per_second:
            with self.lock:
                now = time.monotonic()
                self._free = max(self._free, now - LATE) + count / self.faults.bytes_per_second
                wait = self._free - now
            time.sleep(max(wait, 0.0))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client has gone
            super().handle()

    def do_GET(self) -> None:
        hub = self.server
        time.sleep(hub.faults.latency)
        address = urllib.parse.urlsplit(self.path)
        if hub.next_reply():
            log.info("503 on purpose: %s %s", self.command, address.path)
            return self._json(503, {"error": "busy"}, {"Retry-After": str(hub.faults.retry_after)})
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", address.path):
            repo, route, revision, below = (urllib.parse.unquote(part or "") for part in found.groups())
            files = self._known(repo, revision or "main")
            if files is None:
                return None
            if route != "tree":
                return self._json(200, self._info(repo, files))
            recursive = urllib.parse.parse_qs(address.query).get("recursive", ["false"])[0].lower() == "true"
            return self._json(200, _tree(files, below, recursive))
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", address.path):
            repo, revision, name = (urllib.parse.unquote(part) for part in found.groups())
            files = self._known(repo, revision)
            if files is None or not self._allowed():
                return None
            if name not in files:
                return self._json(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound"})
            return self._send(files[name], {"X-Repo-Commit": _commit(files)})
        return self._json(404, {"error": "no route"}, {"X-Error-Code": "RepoNotFound"})

    def _known(self, repo: str, revision: str) -> dict[str, File] | None:
        """The files of a repo, or None after a refusal."""
        if repo not in self.server.repos():  # without a login the real hub answers so, too
            self._json(401, {"error": "no repo"}, {"X-Error-Code": "RepoNotFound"})
            return None
        files = self.server.files(repo)
        if revision not in ("main", _commit(files)):
            self._json(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return files

    def _allowed(self) -> bool:
        given = self.headers.get("Authorization")
        if self.server.token is None or given == f"Bearer {self.server.token}":
            return True
        self._json(403 if given else 401, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        return False

    def _info(self, repo: str, files: dict[str, File]) -> dict:
        siblings = [{"rfilename": name} for name in files]
        gated = "auto" if self.server.token else False
        facts = {"_id": "1", "id": repo, "sha": _commit(files), "private": False, "disabled": False}
        return facts | {"gated": gated, "tags": [], "siblings": siblings}

    def _send(self, file: File, headers: dict[str, str]) -> None:
        etag = f'"{file.sha256}"'
        headers |= {"ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(file.bytes), "Accept-Ranges": "bytes"}
        part = _part(self.headers.get("Range"), file.bytes)
        if part is None or self.headers.get("If-Range", etag) != etag:
            status, first, end = 200, 0, file.bytes
        else:
            status, (first, end) = 206, part
            if first >= end:
                return self._head(416, 0, {"Content-Range": f"bytes */{file.bytes}"})
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{file.bytes}"
        if self.command == "HEAD":
            return self._head(status, end - first, headers)
        faults, number = self.server.faults, self.server.next_file()
        if faults.slow_once and number == 2:
            log.info("slow on purpose: %s from byte %d", file.path.name, first)
            time.sleep(faults.slow_seconds)
        self._head(status, end - first, headers)
        stop = end
        if faults.cut_once and number == 1:
            stop = (first + end) // 2
            log.info("cut on purpose: %s at byte %d", file.path.name, stop)
            self.close_connection = True
        with file.path.open("rb") as stream:
            stream.seek(first)
            while first < stop and (piece := stream.read(min(PIECE, stop - first))):
                self.server.send_slowly(len(piece))
                self.wfile.write(piece)
                first += len(piece)
        if first < stop:  # the file has shrunk: what was announced cannot come
            self.close_connection = True
        return None

    def _json(self, status: int, value, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._head(status, len(body), {"Content-Type": "application/json", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()


def _commit(files: dict[str, File]) -> str:
    """A hash over names and contents, as long as a commit's."""
    text = "".join(f"{name}\0{file.sha256}\0" for name, file in files.items())
    return hashlib.sha1(text.encode()).hexdigest()


def _tree(files: dict[str, File], below: str, recursive: bool) -> list[dict]:
    """What the hub lists of a folder: its files and folders, or the files of all its folders, too."""
    root = f"{below}/" if below else ""
    entries = {}
    for name, file in files.items():
        inner = name.removeprefix(root)
        if not name.startswith(root):
            continue
        if "/" in inner and not recursive:
            folder = root + inner.split("/")[0]
            entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": _oid(folder)}
        else:
            lfs = {"oid": file.sha256, "size": file.bytes, "pointerSize": 130}
            entries[name] = {"type": "file", "path": name, "size": file.bytes, "oid": _oid(file.sha256), "lfs": lfs}
    return [*entries.values()]


def _oid(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


def _part(asked: str | None, size: int) -> tuple[int, int] | None:
    """(first byte, end) of a Range header with one part; None if there is no such header.

    An empty part stands for one that the file does not have.
    """
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if not found or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        return max(size - int(last), 0), size
    return int(first), min(int(last) + 1, size) if last else size


def _end_with_parent(hub: Hub, every: float = 0.5) -> None:
    """Stop serving once another process has taken this one over, as its own has died."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(every)
    hub.shutdown()


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=inspect.cleandoc(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--folder", type=Path, required=True, help="folder with datasets/<owner>/<name>/")
    made.add_argument("--port-file", type=Path, required=True, help="where the address goes, http://127.0.0.1:PORT")
    made.add_argument("--port", type=int, default=0, help="0: a free one")
    made.add_argument("--unavailable-every", type=int, default=0, metavar="N", help="every Nth reply is a 503")
    made.add_argument("--retry-after", type=int, default=1, metavar="SECONDS", help="the pause that it asks for")
    made.add_argument("--cut-once", action="store_true", help="the first file breaks off half way, once")
    made.add_argument("--slow-once", action="store_true", help="the second file keeps its reader waiting, once")
    made.add_argument("--slow-seconds", type=float, default=2.0, help="how long")
    made.add_argument("--latency-ms", type=float, default=0.0, help="before each reply")
    made.add_argument("--megabytes-per-second", type=float, default=0.0, help="of all connections; 0: no limit")
    made.add_argument("--token-variable", default=None, help="environment variable with the token that files need")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    token = os.environ.get(args.token_variable) if args.token_variable else None
    if args.token_variable and not token:
        raise KilnError(f"{args.token_variable} is not set", "export it, or leave out --token-variable")
    faults = Faults(
        unavailable_every=args.unavailable_every,
        retry_after=args.retry_after,
        cut_once=args.cut_once,
        slow_once=args.slow_once,
        slow_seconds=args.slow_seconds,
        latency=args.latency_ms / 1000,
        bytes_per_second=args.megabytes_per_second * 1e6,
    )
    with Hub(args.folder, faults, token, args.port) as hub:
        repos = hub.repos()
        if not repos:
            raise KilnError(f"{args.folder}: no datasets/<owner>/<name> in it", "give the folder above `datasets`")
        for repo in repos:
            hub.files(repo)  # hashed before the first request
        # shutdown waits for serve_forever, which the signal has interrupted
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=hub.shutdown).start())
        threading.Thread(target=_end_with_parent, args=(hub,), daemon=True).start()
        artefacts.write_text(args.port_file, hub.url)
        log.info("%s serves %s", hub.url, ", ".join(repos))
        hub.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    step.run(main)
