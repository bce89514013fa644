"""What every step's command line has in common: settings, device, messages, exit status."""

import argparse
import inspect
import logging
import os
import resource
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.common import artefacts, code_key, settings
from scripts.common.errors import KilnError

log = logging.getLogger("kiln")

_USAGE = 2  # argparse's exit status


def parser(
    description: str | None, model: type[settings.Settings] | None = None, by_hand: bool = False
) -> argparse.ArgumentParser:
    """A parser with what all steps share; a step adds its own `--input`s and `--output`s.

    With a settings `model` there is `--settings`, to be given any number of times (later ones win): a
    YAML file, JSON text, or `key=value`. Without it the model's defaults hold. A step that users also call
    `by_hand` does without `--meta`: see `meta_beside`.
    """
    made = argparse.ArgumentParser(
        description=inspect.cleandoc(description or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.set_defaults(settings_model=model)
    if model is not None:
        fields = ", ".join(model.model_fields)
        made.add_argument(
            "--settings",
            action="append",
            default=[],
            metavar="YAML|JSON|KEY=VALUE",
            help=f"settings, later ones on top of earlier ones; keys: {fields}",
        )
    made.add_argument("--meta", type=Path, required=not by_hand, help="where the record of this run goes (meta.json)")
    made.add_argument("--threads", type=int, default=None, help="CPU threads (default: those this process may use)")
    made.add_argument("--code-key", default=None, help="code key to record (default: that of this step)")
    return made


def add_device(made: argparse.ArgumentParser) -> None:
    """Add `--device` to a parser."""
    made.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, or cuda:N")


def meta_beside(args: argparse.Namespace, output: Path) -> Path:
    """Where the record goes: what `--meta` says, else beside the output."""
    return args.meta or output.with_name(f"{output.stem}.meta.json")


def read_settings(args: argparse.Namespace):
    """The validated settings object of parsed arguments."""
    return settings.from_sources(args.settings_model, args.settings)


def threads(args: argparse.Namespace) -> int:
    """How many CPU threads this step may use."""
    return args.threads or len(os.sched_getaffinity(0))


def record(args: argparse.Namespace, module: str, values: settings.Settings | None, inputs: dict[str, Path]):
    """Start the record of this run; see `artefacts.Record`.

    Raises:
        KilnError: an input is missing.
    """
    for name, path in inputs.items():
        if not path.is_file():
            raise KilnError(f"{path}: no such file (given as {name})", "check the path, or run the rule that makes it")
    numerics = settings.of_kind(values, "numerics") if values is not None else {}
    return artefacts.Record(module, numerics, inputs, args.code_key or code_key.code_key(module))


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Run a step's `main`; a `KilnError` becomes its message and exit status 1, others keep their traceback.

    Whichever it is, a line before it says where the step ran and how much memory it took.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    log.setLevel(logging.INFO)  # libraries: warnings only
    try:
        main(None)
    except KilnError as error:
        _say_where()
        print(f"Error: {error.message}\nHint: {error.hint}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as error:
        if error.code not in (None, 0, _USAGE):  # a launcher's, whose step may have been killed without a word
            _say_where()
        raise
    except BaseException:
        _say_where()
        raise


def _say_where() -> None:
    """The line that `scripts.common.failures` looks for in a step's log; on a terminal one sees where one is."""
    if sys.stderr.isatty():
        return
    job = os.environ.get("SLURM_JOB_ID")
    where = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    number = f", Slurm job {job}" if job else ""
    print(f"Failed on {where}{number}: peak memory {peak:.0f} MB (largest process)", file=sys.stderr)
