"""Locks that end with their holder: one writer per state folder, one launcher per GPU.

They are `flock` locks on small files that stay where they are. The kernel releases them when the holder
dies in any way, SIGKILL included, so that no lock is ever stale. The file's text says who holds it.
"""

import contextlib
import datetime
import errno
import fcntl
import getpass
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import filelock

from scripts.common.artefacts import explain_os_error
from scripts.common.errors import KilnError

WRITER_LOCK = "writer.lock"
LOOK_SECONDS = 0.2  # `is_taken` may just be looking
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextlib.contextmanager
def writer_lock(folder: Path, owner: str, wait_seconds: float = 0, mode: int = -1) -> Iterator[None]:
    """Be the only process that writes in `folder`, which is made if need be, while the block runs.

    Args:
        folder: a state folder.
        owner: what the holder is, for whoever finds the folder taken, such as a step's name.
        wait_seconds: how long to wait for another writer to end.
        mode: permissions of the lock's file; 0o666 where other users are to find the folder taken, or free.

    Raises:
        KilnError: another process writes there (it is named), or the file system knows no locks.
    """
    path = folder / WRITER_LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(path, owner, mode)
        lock.acquire(timeout=max(wait_seconds, LOOK_SECONDS))
    except filelock.Timeout:
        raise KilnError(
            f"{folder}: another process writes here: {holder(path)}",
            "wait until it ends, or stop it (kill its pid, or scancel its job), and run again",
        ) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise KilnError(
                f"{folder}: this file system has no file locks ({error.strerror}), so two writers could meet here",
                "put this folder on one that has (Lustre: mounted with `-o flock`; NFS: with locking)",
            ) from error
        raise explain_os_error(error, folder) from error
    try:
        yield
    finally:
        lock.release()


def is_taken(folder: Path) -> bool:
    """Whether a process writes in `folder`; this asks by holding a shared lock for an instant.

    Raises:
        KilnError: the file system knows no locks, or the lock cannot be read.
    """
    path = folder / WRITER_LOCK
    try:
        with path.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        raise KilnError(f"{path}: {error.strerror}", "ask on the machine and as the user that trains") from error
    return False


def gpu_lock_folder() -> Path:
    """The folder of this machine's GPU locks: KILN_LOCK_DIR, else `kiln-locks` in the temporary folder.

    All users of a machine must see the same one; set KILN_LOCK_DIR where each has a TMPDIR of their own.
    """
    return Path(os.environ.get("KILN_LOCK_DIR") or Path(tempfile.gettempdir()) / "kiln-locks")


def take_gpus(names: Sequence[str], count: int, owner: str) -> tuple[dict[str, filelock.BaseFileLock], dict[str, str]]:
    """Locks on the first `count` free GPUs among `names`, by name, and {name: who holds it} of those found taken.

    If fewer are free there is no lock at all. This is no queue: whoever needs several GPUs may wait for as
    long as others keep taking single ones.

    Raises:
        KilnError: the lock folder cannot be used.
    """
    folder = gpu_lock_folder()
    taken: dict[str, filelock.BaseFileLock] = {}
    holders: dict[str, str] = {}
    try:
        _make_shared(folder)
        # One at a time, so that two who want two GPUs each can never hold one each and wait for ever.
        with _lock(folder / "choosing.lock", owner, mode=0o666):
            for name in names:
                if len(taken) == count:
                    break
                path = folder / f"gpu-{name.replace('/', '_')}.lock"
                lock = _lock(path, owner, mode=0o666)
                try:
                    lock.acquire(timeout=0)
                    taken[name] = lock
                except filelock.Timeout:
                    holders[name] = holder(path)
            if len(taken) < count:
                for lock in taken.values():
                    lock.release()
                taken = {}
            return taken, holders
    except OSError as error:
        raise KilnError(
            f"{folder}: GPU locks cannot be kept here ({error.strerror})",
            "set KILN_LOCK_DIR to a folder on a local disk in which every user of this machine can write",
        ) from error


def holder(path: Path) -> str:
    """Who wrote the lock file `path`, in words: owner, pid, user, host, Slurm job and start."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        job = f", Slurm job {note['job']}" if note["job"] else ""
        return f"{note['owner']}, pid {note['pid']} of {note['user']} on {note['host']}{job}, since {note['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not yet said who it is"


def _lock(path: Path, owner: str, mode: int = -1) -> filelock.FileLock:
    note = {
        "owner": owner,
        "pid": os.getpid(),
        "user": _user(),
        "host": socket.gethostname(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    text = json.dumps(note).encode()

    def sign(descriptor: int) -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)

    # No soft locks: they outlive a killed holder.
    return filelock.FileLock(path, mode=mode, fallback_to_soft=False, on_acquired=sign)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's numeric user has no name
        return str(os.getuid())


def _make_shared(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return
    folder.chmod(0o1777)  # as /tmp: all may add, none may remove what is another's
