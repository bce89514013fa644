"""List what of a results folder no configuration names, what is spent, and what killed runs left; remove it with --yes.

    python -m scripts.prune --results results --configfile config/a.yaml --configfile config/b.yaml

Without --yes nothing is removed. config/config.yaml, if there is one, lies under every --configfile, as in a run. Name
all configurations whose variants are to stay. States of trainings that stopped before their end stay, unless
--older-than says after how many days they may go: a training that is carried on needs its state.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts import config as kiln_config
from scripts.common import disk, prune, settings, step
from scripts.common.errors import KilnError

USER_FILE = Path("config/config.yaml")


def main(argv: Sequence[str] | None = None) -> None:
    """List, and remove.

    Raises:
        KilnError: no such folder, or a configuration is not valid.
    """
    parser = argparse.ArgumentParser(
        prog="python -m scripts.prune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, help="the results folder (default: as the configuration says)")
    parser.add_argument("--configfile", type=Path, action="append", default=[], help="may be given several times")
    parser.add_argument("--set", default="", help='as in --config set="..." of a run')
    parser.add_argument("--older-than", type=float, metavar="DAYS", help="remove unfinished states of that age, too")
    parser.add_argument("--yes", action="store_true", help="remove what the list says")
    args = parser.parse_args(argv)
    configs = [configured(file, args.set) for file in args.configfile or [None]]
    results = args.results or Path(configs[0].results)
    if not results.is_dir():
        raise KilnError(f"{results}: no such folder", "give --results, or the --configfile of the run")
    results = results.resolve()
    found = prune.look(results, kiln_config.current_runs(configs), args.older_than)
    print(prune.table(found, results) if found else f"nothing to prune below {results}")
    going = [one for one in found if one.stays is None]
    if not going:
        return
    if not args.yes:
        again = shlex.join(["python", "-m", "scripts.prune", *(sys.argv[1:] if argv is None else argv), "--yes"])
        print(f"\n{disk.size(sum(one.bytes for one in going))} can go: {again}")
        return
    kept = [(one, said) for one in going if (said := prune.remove(one))]
    for one, said in kept:
        print(f"kept {one.path}: {said}")
    print(f"\nremoved {disk.size(sum(one.bytes for one in going if one not in [k for k, _ in kept]))}")


def configured(file: Path | None, overrides: str) -> kiln_config.Config:
    """The configuration of a run with that --configfile."""
    given = settings.read_yaml(file) if file else {}
    whole = {**given, **({"set": overrides} if overrides else {})}
    return kiln_config.load(whole, USER_FILE, lambda: [(str(file), given)])


if __name__ == "__main__":
    step.run(main)
