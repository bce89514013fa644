"""States of trainings that are done: removed once their results are sure to stay.

In a Slurm job they are not when the training ends: Slurm may still end the job, preempted or out of time, and what
it made is then deleted as a failed job's. So a job only marks its state, and Snakemake removes what is marked when its
run ends; until then, another attempt goes on from the last save.
"""

import json
import os
import shutil
from pathlib import Path

from scripts.common.artefacts import write_json

MARK = "spent.json"


def let_go(state: Path, record: Path) -> None:
    """A training is done with its folder of states: remove it, or mark it in a Slurm job.

    Args:
        state: the rule's folder of states.
        record: the training's meta.json, which stands for its results.
    """
    if "SLURM_JOB_ID" in os.environ:
        write_json(state / MARK, {"record": str(record.absolute())})
    else:
        shutil.rmtree(state, ignore_errors=True)


def sweep(states: Path) -> None:
    """Remove every marked folder below `states` whose results stand; to be called when no job runs."""
    for mark in sorted(states.rglob(MARK)):
        if Path(json.loads(mark.read_text(encoding="utf-8"))["record"]).is_file():
            shutil.rmtree(mark.parent, ignore_errors=True)
