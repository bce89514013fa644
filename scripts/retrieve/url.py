"""One file by https, carried on where a broken download stopped."""

import json
import logging
import os
import time
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from scripts.common import network
from scripts.common.errors import KilnError
from scripts.retrieve import transfer

CONNECT_SECONDS, READ_SECONDS = 10, 60
MAX_WAIT_SECONDS = 120  # however long a busy server would have us wait
CHUNK = 1 << 16  # a break loses at most this much
log = logging.getLogger("kiln")


def download(url: str, target: Path, name: str, wait: float) -> None:
    """Download `url` to `target`; until it is whole, it is `target` with `.part` at its end.

    Args:
        name: of the model, for messages.
        wait: seconds before the second attempt; each later one waits twice as long.

    Raises:
        KilnError: refused, not found, unreachable, broken off again and again, or the disk is full.
    """
    if target.exists():
        return
    part = target.with_name(f"{target.name}.part")
    left = transfer.ATTEMPTS
    with _session(wait) as session:
        while True:
            before = _size(part)
            try:
                _continue(session, url, part, name)
                os.replace(part, target)
                part.with_suffix(".json").unlink(missing_ok=True)
                return
            except requests.RequestException as error:
                # Only attempts without a single new byte count: a long download may break often.
                left = transfer.ATTEMPTS if _size(part) > before else left - 1
                if left == 0 or not _worth_repeating(error):
                    raise _explain(error, url, part) from None
                pause = wait * 2 ** (transfer.ATTEMPTS - left)
                log.info("%s: %s; again in %.0f s, from byte %d", name, network.reason(error), pause, _size(part))
                time.sleep(pause)
            except OSError as error:
                raise transfer.explain_disk(error, target.parent) or error from None


def _session(wait: float) -> requests.Session:
    retry = Retry(
        total=transfer.ATTEMPTS - 1,
        backoff_factor=wait,
        status_forcelist=(408, 429, 500, 502, 503, 504),
        allowed_methods=("GET",),
        raise_on_status=False,
        retry_after_max=MAX_WAIT_SECONDS,
    )
    session = requests.Session()
    session.mount("https://", HTTPAdapter(max_retries=retry))
    session.mount("http://", HTTPAdapter(max_retries=retry))
    return session


def _continue(session: requests.Session, url: str, part: Path, name: str) -> None:
    note = part.with_suffix(".json")
    have, version = _size(part), _version(note)
    # Compressed transfer would make byte positions meaningless.
    headers = {"Accept-Encoding": "identity"}
    if have and version:
        # If-Range: a changed file comes whole, never as a tail glued to the old head.
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    with session.get(url, headers=headers, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS)) as response:
        if response.status_code == 416:  # there is nothing after what we have, or the file has changed
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink(missing_ok=True)
            raise requests.ConnectionError("the file has changed, so it is downloaded from its start")
        response.raise_for_status()
        tail = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status_code == 206 and not tail:
            part.unlink(missing_ok=True)
            raise requests.ConnectionError("the server sent another part than asked for")
        length = int(response.headers.get("Content-Length") or 0)
        have = have if tail else 0
        if not tail:
            # A weak ETag cannot vouch for bytes.
            etag = response.headers.get("ETag", "")
            strong = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")
            note.write_text(json.dumps(strong), encoding="utf-8")
        transfer.need_room(part.parent, length)
        with transfer.progress(name, part.parent, have + length or None), part.open("ab" if tail else "wb") as handle:
            for chunk in response.iter_content(CHUNK):
                handle.write(chunk)
            handle.flush()
            os.fsync(handle.fileno())
    if length and _size(part) != have + length:
        raise requests.ConnectionError(f"{_size(part)} bytes came, {have + length} were announced")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _version(note: Path) -> str | None:
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _worth_repeating(error: requests.RequestException) -> bool:
    if isinstance(error, requests.HTTPError | requests.exceptions.SSLError | requests.exceptions.InvalidURL):
        return False
    # The adapter has tried to connect several times already.
    return not isinstance(error, requests.ConnectTimeout) and "Max retries exceeded" not in str(error)


def _explain(error: requests.RequestException, url: str, part: Path) -> KilnError:
    response = error.response
    if response is not None:
        status = response.status_code
        hints = {
            401: "the server wants a login, which Kiln does not give; download it by hand and give its path instead",
            403: "the server refuses it; check the url in a browser, and whether a proxy stands in between",
            404: "the file is not there (any more); correct `source` in config/models.csv",
            429: "the server is asked too often from here; wait some minutes and run again",
        }
        return KilnError(f"{url}: the server answers {status}", hints.get(status, "wait some minutes and run again"))
    if isinstance(error, requests.exceptions.SSLError):
        return KilnError(
            f"{url}: no trusted connection ({network.proxy_in_force(url)}): {network.reason(error)}",
            "if your site reads traffic, set REQUESTS_CA_BUNDLE to its certificates",
        )
    kept = _size(part)
    if not _worth_repeating(error) or isinstance(error, requests.ConnectTimeout):
        return KilnError(
            f"{url}: the server cannot be reached ({network.proxy_in_force(url)}): {network.reason(error)}",
            "check the network, and HTTPS_PROXY and NO_PROXY; retrieve on a machine that has internet",
        )
    return KilnError(
        f"{url}: the connection broke {transfer.ATTEMPTS} times without a new byte: {network.reason(error)}",
        f"run again; {kept} bytes are kept, and the download carries on from there",
    )
