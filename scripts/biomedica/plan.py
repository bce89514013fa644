"""What a run trains on: local and streamed pairs of an epoch, the shards of each epoch, and what they cost.

Rule `biomedica_plan`. The repo does not tell how many pairs its shards hold: that is estimated by the mean size of the
pairs indexed here, or else of those at the head of the repo's first shard. Training stops at the planned number.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from scripts.biomedica.local import read_columns
from scripts.biomedica.planning import Plan, make_plan, not_local
from scripts.biomedica.settings import ARMS, HeldOutSettings, PlanSettings
from scripts.common import artefacts, plots, step
from scripts.common.settings import Settings


class StepSettings(Settings):
    plan: PlanSettings = PlanSettings()
    held_out: HeldOutSettings = HeldOutSettings()


def describe(plan: Plan, listed: dict) -> list[str]:
    """The plan in a few lines. `listed` is summary.json of rule biomedica_list_remote."""
    lines = [
        f"{plan.samples:,} pairs an epoch in {plan.steps_per_epoch:,} batches of {plan.batch_size}, "
        f"{plan.steps:,} steps in {plan.epochs} epochs",
        f"{plan.local_share:.1f} % local ({plan.local_per_epoch:,}), {plan.streamed_share:.1f} % streamed "
        f"({plan.streamed_per_epoch:,}): {_network(plan)} over the network per epoch, nothing on disk",
    ]
    if not plan.streamed_per_epoch:
        lines[1] = f"all {plan.local_per_epoch:,} pairs are local: nothing is streamed"
    else:
        shards = [sum(map(len, lanes)) for lanes in plan.schedule]
        lines.append(
            f"{min(shards)} to {max(shards)} of {len(plan.shards)} shards an epoch in {plan.lanes} lanes, "
            f"{plan.bytes_per_sample:,.0f} bytes per pair; {listed['repo']} at {listed['revision']}"
        )
    if plan.dropped:
        lines.append(f"{plan.dropped} pairs of the target do not fill a batch and are left out of each epoch")
    if plan.shortfall:
        lines.append(f"{plan.shortfall:,} pairs fewer than wanted: shards hold no more (shortfall: fewer)")
    return lines


def _network(plan: Plan) -> str:
    size = plan.network_bytes_per_epoch
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def picture(path: Path, plan: Plan, index: dict, on_disk: int) -> None:
    """plan.png: an epoch, what the local shards hold, and the repo's shards. `index` is summary.json of rule
    biomedica_index_local."""
    planned = sum(map(len, plan.schedule[0]))
    plots.shares(
        path,
        {
            "pairs of an epoch": {"local": plan.local_per_epoch, "streamed": plan.streamed_per_epoch},
            "keys in local shards": {
                "train": index["sides"]["train"],
                "held out": index["sides"]["validation"] + index["sides"]["test"],
                "rejected": index["rejected"],
                "quarantined": index["quarantined"],
            },
            "shards of the repo": {
                "first epoch": planned,
                "reserve": len(plan.shards) - planned,
                "local": on_disk,
            },
        },
        f"{plan.local_share:.1f} % local, {plan.streamed_share:.1f} % streamed: "
        f"{_network(plan)} over the network per epoch",
    )


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, StepSettings)
    made.add_argument("--index", type=Path, required=True, help="folder of rule biomedica_index_local")
    made.add_argument("--remote", type=Path, required=True, help="folder of rule biomedica_list_remote")
    made.add_argument("--arm", choices=ARMS, default=ARMS[0], help="local: no streamed pair, for as many steps")
    made.add_argument("--output", type=Path, required=True, help="plan.json; plan.png goes beside it")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Plan the arm `args.arm`."""
    values = step.read_settings(args)
    inputs = {
        "index": args.index / "summary.json",
        "local_shards": args.index / "shards.parquet",
        "remote": args.remote / "summary.json",
        "remote_shards": args.remote / "shards.parquet",
    }
    record = step.record(args, "scripts.biomedica.plan", values, inputs)
    index, listed = artefacts.read_json(inputs["index"]), artefacts.read_json(inputs["remote"])
    local = read_columns(inputs["local_shards"], ["shard", "bytes", "reason"]).to_pylist()
    remote = read_columns(inputs["remote_shards"], ["name", "bytes"]).to_pylist()
    shards, on_disk = not_local(
        [(one["name"], one["bytes"]) for one in remote], {one["shard"]: (one["bytes"], one["reason"]) for one in local}
    )
    mean = index["bytes_per_sample"] or listed["bytes_per_sample"]
    plan = make_plan(values.plan, values.held_out, args.arm, index["sides"]["train"], shards, mean)
    outputs = [args.output, args.output.with_suffix(".png")]
    artefacts.write_json(outputs[0], plan.to_json())
    picture(outputs[1], plan, index, len(on_disk))
    for line in describe(plan, listed):
        step.log.info("%s", line)
    if on_disk:
        step.log.info("%d of the repo's %d shards are local and not streamed", len(on_disk), len(remote))
    if index["note"]:
        step.log.warning("%s", index["note"])
    record.write(args.meta, outputs, items=plan.samples)


if __name__ == "__main__":
    step.run(main)
