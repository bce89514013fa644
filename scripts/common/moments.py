"""Moments of a Snakemake run that have no hook of their own, told by its logger; in dry runs, too."""

import logging
from collections.abc import Callable

from snakemake.common import NOTHING_TO_BE_DONE_MSG
from snakemake.exceptions import CliException

from scripts.common.errors import KilnError

STARTED = "workflow_started"  # the rules are read, the plan is not made
PLANNED = "run_info"  # the plan is made, no job has started; also if there is nothing to do


class At(logging.Handler):
    """Added to Snakemake's logger, it calls a function once, at a moment.

    What that raises ends the run; a KilnError by its message and hint.
    """

    def __init__(self, moment: str, function: Callable[[], None]) -> None:
        super().__init__()
        self._moment = moment
        self._function: Callable[[], None] | None = function

    def emit(self, record: logging.LogRecord) -> None:
        """Take note of one record of Snakemake's."""
        now = str(vars(record).get("event"))
        if self._moment == PLANNED and record.msg == NOTHING_TO_BE_DONE_MSG:
            now = PLANNED
        if now == self._moment and self._function:
            function, self._function = self._function, None
            try:
                function()
            except KilnError as error:
                raise CliException(str(error)) from None  # of Snakemake's errors the one without lines of a traceback
