"""Snakemake, but that it asks Slurm for its jobs every two seconds: else ten seconds more lie between any two looks."""

import sys

from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor

SECONDS = 2
Executor.next_seconds_between_status_checks = property(lambda self: SECONDS, lambda self, seconds: None)

if __name__ == "__main__":
    sys.exit(main())
