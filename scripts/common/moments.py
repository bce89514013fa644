"""Moments of a Snakemake run that have no hook of their own, told by its logger; in dry runs, too."""

import logging
from collections.abc import Callable

STARTED = "workflow_started"  # the rules are read, the plan is not made
PLANNED = "run_info"  # the plan is made, no job has started


class At(logging.Handler):
    """Added to Snakemake's logger, it calls a function once, at a moment; what that raises ends the run."""

    def __init__(self, moment: str, function: Callable[[], None]) -> None:
        super().__init__()
        self._moment = moment
        self._function: Callable[[], None] | None = function

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of one record of Snakemake's."""
        if str(vars(record).get("event")) == self._moment and self._function:
            function, self._function = self._function, None
            function()
