"""Files of a repo of the Hugging Face hub, of a model or a data set, at one commit.

Requests are anonymous; HF_TOKEN is used only after the hub has refused one without it. HF_HOME,
HF_ENDPOINT and the proxy variables are those that huggingface_hub knows. It must be imported after
they are set.
"""

import glob
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging

from scripts.common.errors import KilnError
from scripts.retrieve import transfer
from scripts.retrieve.models import Model

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
    """The repo of a model or a data set.

    Args:
        model: what is wanted of it.
        wait: seconds before the second attempt; each later one waits twice as long.
    """

    def __init__(self, model: Model, wait: float):
        self.model, self.source, self.wait = model, model.source, wait
        self.token: str | bool = False
        self.folder: Path | None = None
        disable_progress_bars()
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every url, signed ones too
        for handler in hub_logging.get_logger().handlers:
            handler.addFilter(transfer.CleanFilter())

    def resolve(self, revision: str) -> str:
        """The commit that `revision` (empty: the default branch) means now."""
        kind = self.model.repo_type
        info = self._call(lambda: self._api().repo_info(self.source, revision=revision or None, repo_type=kind))
        return info.sha

    def listing(self, commit: str) -> dict[str, Remote]:
        """All files of the repo at `commit`."""
        options = {"recursive": True, "revision": commit, "repo_type": self.model.repo_type}
        entries = self._call(lambda: list(self._api().list_repo_tree(self.source, **options)))
        files = (entry for entry in entries if isinstance(entry, huggingface_hub.RepoFile))
        return {f.path: Remote(f.size, f.lfs.sha256 if f.lfs else None, None if f.lfs else f.blob_id) for f in files}

    def download(self, commit: str, names: Iterable[str], folder: Path) -> None:
        """Bring `names` at `commit` into `folder`; files that are whole there already are kept.

        A break within a file is carried on; a killed process loses only the files that were not whole.

        Raises:
            KilnError: as all methods here: gated, not found, unreachable, broken off again and again, disk full.
        """
        self.folder = folder
        shutil.rmtree(folder / ".cache/huggingface/download/locks", ignore_errors=True)
        for orphan in (folder / ".cache").rglob("*.incomplete"):  # the library never takes them up again
            orphan.unlink()
        wanted = [glob.escape(name) for name in names]
        self._call(
            lambda: huggingface_hub.snapshot_download(
                self.source,
                repo_type=self.model.repo_type,
                revision=commit,
                allow_patterns=wanted,
                local_dir=folder,
                token=self.token,
            )
        )

    def _api(self) -> huggingface_hub.HfApi:
        return huggingface_hub.HfApi(token=self.token)

    def _call(self, action: Callable[[], Any]) -> Any:
        for attempt in range(transfer.ATTEMPTS + 1):
            try:
                return action()
            except (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError) as raised:  # RuntimeError: hf_xet's
                error = _cause(raised)
                full = transfer.explain_disk(error, self.folder) if self.folder else None
                if full:
                    raise full from None
                if _refused(error) and self.token is False and os.environ.get("HF_TOKEN", "").strip():
                    self.token = os.environ["HF_TOKEN"].strip()
                    log.info("%s wants a login: using HF_TOKEN", self.source)
                    continue
                if attempt + 1 >= transfer.ATTEMPTS or not _worth_repeating(error):
                    raise self._explain(error) from None
                pause = self.wait * 2**attempt
                log.info("%s: %s; again in %.0f s", self.source, _reason(error), pause)
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _explain(self, error: BaseException) -> KilnError:
        status = _status(error)
        endpoint = transfer.clean(constants.ENDPOINT)
        noun, place = self.model.noun, self.model.place
        page = (
            f"{endpoint}/datasets/{self.source}" if self.model.repo_type == "dataset" else f"{endpoint}/{self.source}"
        )
        if isinstance(error, errors.OfflineModeIsEnabled):
            return KilnError(f"{self.source}: HF_HUB_OFFLINE is set, so nothing is retrieved", "unset it and run again")
        if isinstance(error, errors.GatedRepoError) or status == 403:
            if self.token:
                return KilnError(
                    f"{page}: the hub refuses this {noun} to the account of HF_TOKEN ({status})",
                    f"open {page} with that account and accept its terms (some owners take days to approve);"
                    " HF_TOKEN must have the right to read gated repos",
                )
            return KilnError(
                f"{page}: this {noun} is gated: the hub gives it only to accounts that accepted its terms ({status})",
                f"open {page}, log in, accept the terms, then set HF_TOKEN to a read token of that account",
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return KilnError(
                f"{page}: no such revision ({status})",
                f"correct `revision` in {place}, or leave it empty for the default branch",
            )
        if isinstance(error, errors.EntryNotFoundError) and status == 404:
            return KilnError(f"{page}: no such file: {_reason(error)}", f"correct the wanted files in {place}")
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
            again = "HF_TOKEN may be wrong or expired" if self.token else "if it is private, set HF_TOKEN"
            return KilnError(
                f"{page}: the hub has no such {noun}, or does not show it to everyone ({status})",
                f"check the name of the repo in {place}; {again}",
            )
        if status == 429:
            return KilnError(f"{page}: asked too often from here (429)", "wait some minutes and run again")
        if status:
            return KilnError(
                f"{page}: the hub answers {status}", "wait some minutes and run again; whole files are kept"
            )
        if isinstance(error, _UNREACHABLE):
            named = "HF_ENDPOINT" if os.environ.get("HF_ENDPOINT") else "the default; HF_ENDPOINT is not set"
            return KilnError(
                f"{self.source}: the hub {endpoint} ({named}) cannot be reached"
                f" ({transfer.proxy_in_force(constants.ENDPOINT)}): {_reason(error)}",
                "check the network, HF_ENDPOINT, HTTPS_PROXY, NO_PROXY, and SSL_CERT_FILE if your site reads traffic;"
                " retrieve on a machine that has internet",
            )
        return KilnError(f"{page}: the download broke off: {_reason(error)}", "run again; whole files are kept")


def damaged(path: Path, remote: Remote) -> bool:
    """Whether a file without an announced sha256 differs from the git blob that the hub announces."""
    if remote.blob is None:
        return False
    data = path.read_bytes()  # only small files are kept as git blobs
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() != remote.blob


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


def _reason(error: BaseException) -> str:
    return transfer.clean(error).strip().replace("\n", " ")[:300] or type(error).__name__
