"""What every step's command line has in common: settings, device, messages, exit status."""

import argparse
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scripts.common import artefacts, code_key, settings
from scripts.common.errors import KilnError

log = logging.getLogger("kiln")


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
    """Run a step's `main`; a `KilnError` becomes its message and exit status 1, others keep their traceback."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    log.setLevel(logging.INFO)  # libraries: warnings only
    try:
        main(None)
    except KilnError as error:
        print(f"Error: {error.message}\nHint: {error.hint}", file=sys.stderr)
        sys.exit(1)
