"""A repo of the Hugging Face hub, of a model or a data set, at one commit: what it holds.

Requests are anonymous; HF_TOKEN is used only after the hub has refused one without it. HF_HOME,
HF_ENDPOINT and the proxy variables are those that huggingface_hub knows. It must be imported after
they are set.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging

from scripts.common import network
from scripts.common.errors import KilnError

log = logging.getLogger("kiln")
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_MALFORMED = (httpx.UnsupportedProtocol, httpx.InvalidURL)
_UNREACHABLE = (httpx.ConnectError, httpx.ProxyError, httpx.TimeoutException, *_MALFORMED)


class Remote(NamedTuple):
    """What the hub announces of a file: size in bytes, and the hash of one kind or the other."""

    bytes: int
    sha256: str | None
    blob: str | None


class Repo:
    """A repo.

    Args:
        source: owner/repo.
        repo_type: "model" or "dataset".
        noun, place: for messages: what it is, and where its name, revision and files are said.
        wait: seconds before the second attempt; each later one waits twice as long.
        longest: seconds of a pause at most, whatever the hub asks for.
        attempts: of a request, before it counts as failed.
    """

    again = "run again"  # what to do after a break, in messages

    def __init__(
        self, source: str, repo_type: str, noun: str, place: str, wait: float, attempts: int, longest: float = math.inf
    ):
        self.source, self.repo_type, self.noun, self.place = source, repo_type, noun, place
        self.wait, self.attempts, self.longest = wait, attempts, longest
        self.token: str | bool = False
        disable_progress_bars()
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every url, signed ones too
        for handler in hub_logging.get_logger().handlers:
            handler.addFilter(network.CleanFilter())

    def resolve(self, revision: str) -> str:
        """The commit that `revision` (empty: the default branch) means now.

        Raises:
            KilnError: as all methods here: gated, not found, unreachable, broken off again and again.
        """
        options = {"revision": revision or None, "repo_type": self.repo_type}
        return self._call(lambda: self._api().repo_info(self.source, **options)).sha

    def listing(self, commit: str) -> dict[str, Remote]:
        """All files of the repo at `commit`."""
        options = {"recursive": True, "revision": commit, "repo_type": self.repo_type}
        entries = self._call(lambda: list(self._api().list_repo_tree(self.source, **options)))
        files = (entry for entry in entries if isinstance(entry, huggingface_hub.RepoFile))
        return {f.path: Remote(f.size, f.lfs.sha256 if f.lfs else None, None if f.lfs else f.blob_id) for f in files}

    def _api(self) -> huggingface_hub.HfApi:
        return huggingface_hub.HfApi(token=self.token)

    def _call(self, action: Callable[[], Any]) -> Any:
        for attempt in range(self.attempts + 1):
            try:
                return action()
            except (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError) as raised:  # RuntimeError: hf_xet's
                error = _cause(raised)
                local = self._explain_local(error)
                if local:
                    raise local from None
                if _refused(error) and self.token is False and network.hub_token():
                    self.token = network.hub_token()
                    log.info("%s wants a login: using HF_TOKEN", self.source)
                    continue
                if attempt + 1 >= self.attempts or not _worth_repeating(error):
                    raise self._explain(error) from None
                asked = network.retry_after(error.response.headers) if _status(error) else 0.0
                pause = min(max(self.wait * 2**attempt, asked), self.longest)
                log.info("%s: %s; again in %.0f s", self.source, network.reason(error), pause)
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _explain_local(self, error: BaseException) -> KilnError | None:
        """A failure of this machine; None if it is not one."""
        return None

    def _explain(self, error: BaseException) -> KilnError:
        status = _status(error)
        endpoint = network.clean(constants.ENDPOINT)
        page = f"{endpoint}/datasets/{self.source}" if self.repo_type == "dataset" else f"{endpoint}/{self.source}"
        if isinstance(error, errors.OfflineModeIsEnabled):
            return KilnError(f"{self.source}: HF_HUB_OFFLINE is set, so nothing is retrieved", "unset it and run again")
        gated = isinstance(error, errors.GatedRepoError) or status == 403
        if isinstance(error, errors.RevisionNotFoundError):
            return KilnError(
                f"{page}: no such revision ({status})",
                f"correct `revision` in {self.place}, or leave it empty for the default branch",
            )
        if isinstance(error, errors.EntryNotFoundError) and status == 404:
            return KilnError(
                f"{page}: no such file: {network.reason(error)}", f"correct the wanted files in {self.place}"
            )
        if gated or isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            return network.explain_refusal(page, self.noun, self.place, status, bool(self.token), gated)
        if status == 429:
            return KilnError(f"{page}: asked too often from here (429)", "wait some minutes and run again")
        if status:
            return KilnError(f"{page}: the hub answers {status}", f"wait some minutes and {self.again}")
        if isinstance(error, _UNREACHABLE):
            return KilnError(
                f"{self.source}: {network.named_endpoint(constants.ENDPOINT)} cannot be reached"
                f" ({network.proxy_in_force(constants.ENDPOINT)}): {network.reason(error)}",
                "check the network, HF_ENDPOINT, HTTPS_PROXY, NO_PROXY, and SSL_CERT_FILE if your site reads traffic;"
                " retrieve on a machine that has internet",
            )
        return KilnError(f"{page}: the connection broke off: {network.reason(error)}", self.again)


def _cause(error: BaseException) -> BaseException:
    """What really happened: the library hides some failures behind "not found in the cache"."""
    found = error
    while isinstance(found, errors.LocalEntryNotFoundError) and found.__cause__ is not None:
        found = found.__cause__
    return found


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _refused(error: BaseException) -> bool:
    return isinstance(error, errors.RepositoryNotFoundError) or _status(error) in (401, 403)


def _worth_repeating(error: BaseException) -> bool:
    if isinstance(error, (errors.OfflineModeIsEnabled, *_MALFORMED)):
        return False
    status = _status(error)
    return status in _TRANSIENT if status else True
