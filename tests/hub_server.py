"""A small hub on this machine: repos by the routes of the Hugging Face hub, plain files, and faults on demand.

    with HubServer() as hub:
        hub.repos["me/model"] = {"config.json": b"{}"}
        hub.repos["datasets/me/data"] = {"data/train-0.parquet": b"..."}    # a data set
        hub.files["weights.pth"] = b"..."       # at hub.url + "/files/weights.pth"
        hub.cuts["config.json"] = [1000]        # the next answer breaks off after 1000 bytes, the one after is whole
        hub.unavailable = 2                     # the next two answers are 503
        hub.gated["me/model"] = "the-token"     # files need it: 401 without a token, 403 with another
    hub.storm = (500, 30.0)                 # all answers are 500 until hub.clock() is 30
    hub.answers = [(429, {"Retry-After": "3"})]     # the next answer, then as usual; (status, headers)
    hub.silences["a.tar"] = [1000]          # the next answer says nothing more after 1000 bytes; the connection stays
    hub.headers["a.tar"] = [{"Content-Length": "5"}]    # put over those of the next answer; None leaves one out
    hub.corrupt["a.tar"] = [7]              # in the next answer this byte of the file is another one
    hub.ranges = False                      # parts of files are not sent
    hub.chunked = True                      # no answer says its length
    hub.storage = "http://127.0.0.1:81/x"   # files are redirected there, as the real hub's to its CDN

`hub.log` holds what was asked: (method, path, Range, Authorization).
"""

import contextlib
import hashlib
import http.server
import json
import re
import ssl
import threading
import time
import urllib.parse


class HubServer:
    """The server's state; faults may be set while it runs. With `tls` it speaks https."""

    def __init__(self, tls: ssl.SSLContext | None = None):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.files: dict[str, bytes] = {}
        self.cuts: dict[str, list[int]] = {}
        self.gated: dict[str, str] = {}
        self.unavailable = 0
        self.storm = (500, 0.0)
        self.clock = time.monotonic
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.silences: dict[str, list[int]] = {}
        self.headers: dict[str, list[dict[str, str | None]]] = {}
        self.corrupt: dict[str, list[int]] = {}
        self.ranges, self.chunked = True, False
        self.storage: str | None = None
        self.sent = 0  # bytes of files
        self.log: list[tuple[str, str, str | None, str | None]] = []
        self.lock, self.over = threading.Lock(), threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str) -> str:
        """The commit of a repo as it is now: a hash over its files."""
        digest = hashlib.sha1()
        for name, data in sorted(self.repos[repo].items()):
            digest.update(f"{name}\0{len(data)}\0".encode() + data)
        return digest.hexdigest()

    def asked(self, pattern: str) -> list[tuple[str, str, str | None, str | None]]:
        """The requests so far whose "METHOD path" matches a regular expression."""
        return [entry for entry in self.log if re.search(pattern, f"{entry[0]} {entry[1]}")]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # whoever asked has left
            super().handle()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        storm = hub.clock() < hub.storm[1]
        with hub.lock:
            hub.log.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
            refuse, hub.unavailable = hub.unavailable > 0, max(0, hub.unavailable - 1)
            answer = hub.answers.pop(0) if hub.answers else None
        if refuse:
            return self._json(503, {"error": "busy"})
        if answer:
            return self._json(answer[0], {"error": "on demand"}, answer[1])
        if storm:
            return self._json(hub.storm[0], {"error": "storm"})
        if path.startswith("/files/"):
            name = path.removeprefix("/files/")
            if name not in hub.files:
                return self._json(404, {"error": "not found"})
            return self._send(name, hub.files[name], {"ETag": f'"{_sha256(hub.files[name])}"'})
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/revision/(.+)|/tree/(.+))?", path):
            kind, repo, _, revision, tree = found.groups()
            repo = f"datasets/{repo}" if kind == "datasets" else repo
            if not self._known(repo, revision or tree):
                return None
            return self._json(200, self._tree(repo) if tree else self._info(repo))
        if found := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo, revision, name = found.groups()
            if not self._known(repo, revision) or not self._allowed(repo):
                return None
            if name not in hub.repos[repo]:
                return self._json(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound"})
            data = hub.repos[repo][name]
            etag = _sha256(data) if _is_lfs(name) else _blob(data)
            facts = {"X-Repo-Commit": hub.commit(repo)}
            if hub.storage and _is_lfs(name):
                facts |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
                return self._json(302, {}, facts | {"Location": f"{hub.storage}/{urllib.parse.quote(name)}?sign=hush"})
            return self._send(name, data, {"ETag": f'"{etag}"', **facts})
        return self._json(404, {"error": "no route"}, {"X-Error-Code": "RepoNotFound"})

    def _known(self, repo: str, revision: str | None) -> bool:
        # Without a login the real hub answers 401 for a repo that does not exist.
        if repo not in self.hub.repos:
            self._json(401, {"error": "no repo"}, {"X-Error-Code": "RepoNotFound"})
            return False
        if revision not in (None, "main", self.hub.commit(repo)):
            self._json(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
            return False
        return True

    def _allowed(self, repo: str) -> bool:
        token = self.hub.gated.get(repo)
        given = self.headers.get("Authorization")
        if token is None or given == f"Bearer {token}":
            return True
        self._json(403 if given else 401, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        return False

    def _info(self, repo: str) -> dict:
        siblings = [{"rfilename": name} for name in self.hub.repos[repo]]
        facts = {
            "_id": "1",
            "id": repo.removeprefix("datasets/"),
            "sha": self.hub.commit(repo),
            "private": False,
            "disabled": False,
        }
        return facts | {"gated": "auto" if repo in self.hub.gated else False, "tags": [], "siblings": siblings}

    def _tree(self, repo: str) -> list[dict]:
        entries = []
        for name, data in sorted(self.hub.repos[repo].items()):
            entry = {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
            if _is_lfs(name):
                entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        return entries

    def _json(self, status: int, value, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self._head(status, len(body), {"Content-Type": "application/json", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        start, status, hub = 0, 200, self.hub
        with hub.lock:
            over = hub.headers[name].pop(0) if hub.headers.get(name) else {}
            corrupt = hub.corrupt[name].pop(0) if hub.corrupt.get(name) else None
        headers = headers | {key: value for key, value in over.items() if value is not None}
        if corrupt is not None:
            data = data[:corrupt] + bytes([data[corrupt] ^ 1]) + data[corrupt + 1 :]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "") if hub.ranges else None
        stop = int(asked[2]) + 1 if asked and asked[2] else len(data)
        if asked and self.headers.get("If-Range", headers["ETag"]) == headers["ETag"]:
            start, status = int(asked[1]), 206
            if start >= len(data):
                return self._head(416, 0, {"Content-Range": f"bytes */{len(data)}"})
            stop = min(stop, len(data))
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"} | headers
        else:
            stop = len(data)
        absent = {key for key, value in over.items() if value is None}
        self._head(status, stop - start, {key: value for key, value in headers.items() if key not in absent})
        if self.command == "HEAD":
            return None
        with hub.lock:
            cut = start + hub.cuts[name].pop(0) if hub.cuts.get(name) else stop
            silent = start + hub.silences[name].pop(0) if hub.silences.get(name) else stop
        self._body(data[start : min(stop, cut, silent)], whole=min(cut, silent) >= stop)
        if silent < stop:
            hub.over.wait()
        if cut < stop or silent < stop:
            self.close_connection = True
        return None

    def _body(self, data: bytes, whole: bool) -> None:
        for at in range(0, len(data), 1 << 16):
            piece = data[at : at + (1 << 16)]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if self.hub.chunked else piece)
            with self.hub.lock:
                self.hub.sent += len(piece)
        if self.hub.chunked and whole:
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        chunked = self.hub.chunked and "ETag" in headers
        sized = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(length)}
        for key, value in (sized | headers).items():
            self.send_header(key, value)
        self.end_headers()


def _is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".pt", ".pth", ".parquet", ".tar"))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
