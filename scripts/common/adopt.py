"""Wait for the jobs of a Snakemake that was killed, so that the next one carries on from what they make.

Nothing is submitted, cancelled or changed; at the end the working directory is unlocked. A job marks its results
as complete itself, so those that ended well are not run again.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.common import slurm, step
from scripts.common.cluster_guard import only_controller

ROOT = Path(__file__).resolve().parents[2]
SAY_AGAIN = 300  # seconds after which the same line is printed anew


def main(argv: Sequence[str] | None = None) -> None:
    """Wait, unlock, and say what to type next.

    Raises:
        KilnError: Slurm does not answer, or a Snakemake still runs there.
    """
    parser = argparse.ArgumentParser(prog="python -m scripts.common.adopt", description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(), help="Snakemake's working directory (default: .)")
    parser.add_argument("--every", type=float, default=10, metavar="SECONDS", help="how often to look (default: 10)")
    args = parser.parse_args(argv)
    directory = args.directory.resolve()
    with only_controller(directory, "scripts.common.adopt"):
        wait(directory, args.every)
        if any((directory / ".snakemake/locks").glob("*.lock")):
            unlock(directory)
    print("No job of an earlier Snakemake is left; the same `snakemake --profile slurm ...` now carries on.")


def wait(directory: Path, every: float) -> None:
    """Return when no job of `directory` is in the queue any more; look `every` so many seconds."""
    said, when = "", 0.0
    while jobs := slurm.jobs_of(directory, Path.cwd()):
        text = f"Waiting for {len(jobs)} job(s):\n" + "\n".join(f"    {job}" for job in jobs)
        if text != said or time.monotonic() - when > SAY_AGAIN:
            print(text, flush=True)
            said, when = text, time.monotonic()
        time.sleep(every)


def unlock(directory: Path) -> None:
    """Remove the lock that a killed Snakemake left."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", directory]
    subprocess.run([*command, "--unlock"], check=True)


if __name__ == "__main__":
    step.run(main)
