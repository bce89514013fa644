"""Show that no vase is chosen on what it is scored on.

Rule `vase_audit_split`: from what each learning step records of its own input (not from what it was
asked to do), counts the vases, and the byte-identical images, that it shares with the test side.
Any at all fails the rule.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from scripts.common import artefacts, step, tables
from scripts.common.errors import KilnError

STAGES = ("classifier: fitted on", "classifier: chosen on", "threshold: sampled from")


def used_by_stage(classifier: pd.DataFrame, sample: pd.DataFrame) -> dict[str, pd.Series]:
    """{stage: vases that it learned from}."""
    fitted = classifier.loc[classifier["role"] == "fit", "vase"]
    chosen = classifier.loc[classifier["role"] == "choose", "vase"]
    return dict(zip(STAGES, (fitted, chosen, sample["vase"]), strict=True))


def audit(stages: dict[str, pd.Series], splits: pd.DataFrame) -> dict:
    """Per stage: vases used, and those of them (or tied to them by identical images) on the test side."""
    group = splits.set_index("vase")["group"]
    test = set(splits.loc[splits["side"] == "test", "group"])
    checks = []
    for stage, vases in stages.items():
        used = set(vases)
        shared = sorted(v for v in used if group.get(v, v) in test)
        checks.append({"stage": stage, "vases": len(used), "shared_with_test": shared})
    return {"test_vases": int((splits["side"] == "test").sum()), "checks": checks}


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--splits", type=Path, required=True, help="splits.parquet of rule vase_split")
    made.add_argument("--classifier", type=Path, required=True, help="used.parquet of rule vase_train_classifier")
    made.add_argument("--sample", type=Path, required=True, help="sample.parquet of rule vase_choose_threshold")
    made.add_argument("--output", type=Path, required=True, help="audit.json")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Audit what `args` name.

    Raises:
        KilnError: a stage learned from a test vase, recorded none at all, or one that has no side, or the
            classifier was scored on a vase of another side; names stage and vases.
    """
    inputs = {n: getattr(args, n) for n in ("splits", "classifier", "sample")}
    record = step.record(args, "scripts.vase.audit_split", None, inputs)
    splits = tables.read_table(args.splits, ["vase", "group", "side"])
    classifier = tables.read_table(args.classifier, ["vase", "role"])
    sample = tables.read_table(args.sample, ["vase"])
    stages = used_by_stage(classifier, sample)
    for stage, vases in stages.items():
        unknown = sorted(set(vases) - set(splits["vase"]))
        if unknown or vases.empty:
            what = f"{len(unknown)} vases that have no side, such as {unknown[0]}" if unknown else "no vase at all"
            raise KilnError(f"{stage} {what}", "these tables are not of one run: delete the older and run again")
    report = audit(stages, splits)
    for check in report["checks"]:
        if check["shared_with_test"]:
            names = ", ".join(check["shared_with_test"][:5])
            raise KilnError(
                f"{check['stage']} {len(check['shared_with_test'])} vases of the test side, such as {names}",
                "leave test out of vase.threshold.sides; scores of the test side would be flattered",
            )
        step.log.info("%s %d vases, none of them on the test side", check["stage"], check["vases"])
    scored = set(classifier.loc[classifier["role"] == "score", "vase"])
    strays = sorted(scored - set(splits.loc[splits["side"] == "test", "vase"]))
    if strays:
        raise KilnError(
            f"the classifier was scored on {len(strays)} vases that are not of the test side, such as {strays[0]}",
            "these tables are not of one run: delete the older and run again",
        )
    artefacts.write_json(args.output, report)
    record.write(args.meta, [args.output])


if __name__ == "__main__":
    step.run(main)
