"""What must hold before a job is submitted to Slurm: no other controller, no jobs of a dead one, a right profile.

A controller is the Snakemake process that submits jobs and watches them. Killed, it leaves its jobs behind, and
a second one would submit the same jobs again: two writers of one result.
"""

import contextlib
import getpass
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from scripts.common import locks, slurm
from scripts.common.errors import KilnError

LOCK_FOLDER = ".snakemake/controller"
PROFILE = "slurm/config.yaml (or in the profile that you gave)"
EXAMPLE_ACCOUNT = "ml"  # of slurm/config.yaml as it comes


@contextlib.contextmanager
def only_controller(directory: Path, owner: str) -> Iterator[None]:
    """Be the only process that controls jobs of the working `directory` while the block runs.

    Raises:
        KilnError: there is another one, which is named.
    """
    with locks.writer_lock(directory / LOCK_FOLDER, owner):
        yield


def refuse_leftovers(directory: Path, started_in: Path) -> None:
    """Stop if jobs of an earlier controller of `directory` are still in the queue.

    Raises:
        KilnError: there are some, or Slurm does not answer.
    """
    jobs = slurm.jobs_of(directory, started_in)
    if jobs:
        raise KilnError(
            f"{directory}: {len(jobs)} Slurm job(s) of an earlier Snakemake are not over, which would be run twice:\n"
            + "\n".join(f"    {job}" for job in jobs),
            "`make adopt` waits for them, and the same command then carries on from what they made; "
            f"or end them, and wait until they are gone: scancel {' '.join(job.id for job in jobs)}",
        )


def check_profile(account: str | int | None, partitions: Iterable[str], where: Path | str = PROFILE) -> None:
    """Stop if Slurm knows not `account`, or not one of `partitions`; a comma in the account parts several.

    Raises:
        KilnError: the value is wrong; what there is instead is named.
    """
    named = _names(account)
    check_account(account, where)
    for partition in partitions:
        for name in named or [None]:
            wrong = slurm.refused(name, partition)
            if wrong == "partition":
                raise KilnError(
                    f"partition {partition}: Slurm knows no such partition",
                    f"name yours under `partitions` in {where}; " + _there_are("partitions", slurm.partitions()),
                )
            if wrong == "account":
                raise KilnError(
                    f"partition {partition}: not open to the account {name}",
                    f"set both in {where}; " + _there_are("partitions", slurm.partitions()),
                )


def check_account(account: str | int | None, where: Path | str = PROFILE) -> None:
    """Stop if Slurm knows not `account`; a comma parts several.

    Raises:
        KilnError: the value is wrong; what there is instead is named.
    """
    named = _names(account)
    known = slurm.accounts(getpass.getuser()) if named else []
    for name in named:
        # sacctmgr first, as Snakemake: where accounts are not enforced, sbatch takes any name.
        if name.lower() not in map(str.lower, known) if known else slurm.refused(name, None) == "account":
            raise KilnError(
                f"slurm_account = {name}: Slurm knows no such account of yours",
                f"set `slurm_account` under `default-resources` in {where}; " + _there_are("accounts", known),
            )


def advise_on_account(account: str | None, say: Callable[[str], None], where: Path | str = PROFILE) -> None:
    """Say what `check_account` says; and, where Slurm cannot be asked, that the account is still the example."""
    try:
        check_account(account, where)
    except KilnError as error:
        say(str(error))
        return
    if EXAMPLE_ACCOUNT in _names(account) and not slurm.accounts(getpass.getuser()):
        say(
            f"slurm_account = {account} is the example of slurm/config.yaml, and Slurm cannot be asked about it here\n"
            f"Hint: set `slurm_account` under `default-resources` in {where}, before a run is sent to Slurm"
        )


def _names(account: str | int | None) -> list[str]:
    return str(account or "").replace(",", " ").split()


def _there_are(what: str, names: list[str]) -> str:
    return f"your {what}: {', '.join(names)}" if names else f"ask your cluster's support for your {what}"


def advise_on_job_age(first_look_seconds: int, say: Callable[[str], None]) -> None:
    """Say so if squeue forgets ended jobs too soon for Snakemake, which looks at them by squeue."""
    age = slurm.min_job_age()
    if age is not None and age < 3 * first_look_seconds:
        say(
            f"MinJobAge of this cluster is {age} s: squeue may forget a job before Snakemake sees how it ended\n"
            f"Hint: set `slurm-init-seconds-before-status-checks` to {max(1, age // 3)} or less in {PROFILE}, "
            "or have MinJobAge raised (300 s is Slurm's default)"
        )
