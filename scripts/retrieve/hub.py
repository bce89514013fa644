"""Files of a repo of the Hugging Face hub, of a model or a data set, at one commit; see `scripts.common.hub`."""

import glob
import hashlib
import shutil
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub

from scripts.common import hub
from scripts.common.errors import KilnError
from scripts.common.hub import Remote
from scripts.retrieve import transfer
from scripts.retrieve.models import Model


class Repo(hub.Repo):
    """The repo of a model or a data set.

    Args:
        model: what is wanted of it.
        wait: seconds before the second attempt; each later one waits twice as long.
    """

    again = "run again; whole files are kept"

    def __init__(self, model: Model, wait: float):
        super().__init__(model.source, model.repo_type, model.noun, model.place, wait, transfer.ATTEMPTS)
        self.folder: Path | None = None

    def download(self, commit: str, names: Iterable[str], folder: Path) -> None:
        """Bring `names` at `commit` into `folder`; files that are whole there already are kept.

        A break within a file is carried on; a killed process loses only the files that were not whole.

        Raises:
            KilnError: gated, not found, unreachable, broken off again and again, disk full.
        """
        self.folder = folder
        shutil.rmtree(folder / ".cache/huggingface/download/locks", ignore_errors=True)
        for orphan in (folder / ".cache").rglob("*.incomplete"):  # the library never takes them up again
            orphan.unlink()
        wanted = [glob.escape(name) for name in names]
        self._call(
            lambda: huggingface_hub.snapshot_download(
                self.source,
                repo_type=self.repo_type,
                revision=commit,
                allow_patterns=wanted,
                local_dir=folder,
                token=self.token,
            )
        )

    def _explain_local(self, error: BaseException) -> KilnError | None:
        return transfer.explain_disk(error, self.folder) if self.folder else None


def damaged(path: Path, remote: Remote) -> bool:
    """Whether a file without an announced sha256 differs from the git blob that the hub announces."""
    if remote.blob is None:
        return False
    data = path.read_bytes()  # only small files are kept as git blobs
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() != remote.blob
