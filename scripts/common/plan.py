"""A moment that Snakemake has no hook for: the plan is made, no job has started, and it may be a dry run."""

import logging
from collections.abc import Callable


class AtPlan(logging.Handler):
    """Added to Snakemake's logger, it calls a function once, when Snakemake tells which jobs it will run.

    What the function raises ends the run before its first job.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__()
        self._function: Callable[[], None] | None = function

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of one record of Snakemake's."""
        if str(vars(record).get("event")) == "run_info" and self._function:
            function, self._function = self._function, None
            function()
