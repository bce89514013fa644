"""What ms-swift takes from us while it trains: callbacks in its own registry, and less noise."""

import contextlib
import io
import logging

import transformers
from swift.callbacks import callbacks_map
from swift.trainers.patcher import PrinterCallbackNew

from scripts.common.trackers import Tracker
from scripts.common.trainer_checkpoints import WholeCheckpoints
from scripts.common.trainer_log import Log
from scripts.vase.swift_flags import CALLBACKS


def register_callbacks(keeper: WholeCheckpoints, writer: Tracker, every: int, hint: str) -> None:
    """Callbacks `kiln_checkpoints` and `kiln_log` for `--callbacks`."""
    made = dict(zip(CALLBACKS, (keeper, Log(writer, every, hint)), strict=True))
    for name, callback in made.items():
        callbacks_map[name] = lambda args, trainer, callback=callback: callback


class QuietPrinter(PrinterCallbackNew):
    """ms-swift's lines for logging.jsonl without those for the screen: the periodic ones are `kiln_log`'s."""

    def on_log(self, *args, **kwargs):
        with contextlib.redirect_stdout(io.StringIO()):
            super().on_log(*args, **kwargs)


def set_up_logging() -> None:
    """Our lines, and none of ms-swift's for each step: it prints them where there is no progress bar."""
    transformers.trainer.PrinterCallback = QuietPrinter
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.NOTSET)  # ms-swift's import silences the handlers of others below ERROR
