"""Shards of the repo on the Hugging Face hub, at one commit, with their sizes and hashes.

Rule `biomedica_list_remote`. If the local shards suffice, or no repo is set, the list is empty, and neither a request
is made nor a token looked for. Where there is no local pair to measure by, the head of the first shard is read, to
know how many bytes a pair takes.
"""

import argparse
import fnmatch
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pandas as pd
import pyarrow as pa
from pydantic import Field

from scripts.biomedica import tars
from scripts.biomedica.remote import PLACE, Hub
from scripts.biomedica.settings import PlanSettings, RemoteSettings
from scripts.common import artefacts, network, step, tables
from scripts.common.errors import KilnError
from scripts.common.settings import Settings

SHARDS = pa.schema([("name", pa.string()), ("bytes", pa.int64()), ("sha256", pa.string())])
HEAD = 32 * 2**20  # bytes of a shard that say how many a pair takes


class ListRemoteSettings(Settings):
    """Settings of this step."""

    remote: RemoteSettings = RemoteSettings()
    samples: int = Field(PlanSettings().samples, gt=1, description="pairs of an epoch: plan.samples")


def why_needed(values: ListRemoteSettings, local: pd.DataFrame) -> tuple[bool, str]:
    """Whether pairs must be streamed, and why. `local`: shards.parquet of the index."""
    pairs = int(local["train"].sum())
    if values.remote.repo is None:
        return False, f"no repo is set; {pairs} local pairs to train on"
    if pairs >= values.samples:
        return False, f"{pairs} local pairs to train on suffice for the {values.samples} of an epoch"
    if pairs == 0:
        return True, f"no local pair to train on: all {values.samples} of an epoch are streamed"
    return True, f"{pairs} local pairs to train on; an epoch has {values.samples}"


def list_shards(values: RemoteSettings) -> tuple[str, pd.DataFrame, int, bool]:
    """Commit, shards (columns of `SHARDS`, sorted by name), other files, and whether that took HF_TOKEN.

    Raises:
        KilnError: the hub cannot be reached or refuses, or the repo has no such shard.
    """
    network.hub_endpoint()
    # Otherwise the library's first request is one that looks up what kind of program asks.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from scripts.common import hub  # after that, and only here: the library takes long to import

    repo = hub.Repo(
        values.repo, "dataset", "data set", PLACE, values.wait_seconds, values.attempts, values.max_wait_seconds
    )
    commit = repo.resolve(values.revision or "")
    files = repo.listing(commit)
    names = sorted(name for name in files if fnmatch.fnmatchcase(name, values.pattern))
    if not names:
        raise KilnError(
            f"{values.repo}: none of {len(files)} files is named {values.pattern!r}; it has {sorted(files)[:5]}",
            "correct biomedica.remote.pattern or biomedica.remote.repo",
        )
    for name in names:
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise KilnError(f"{values.repo}: shard name {name!r} leads out of the repo", "do not use this repo")
    rows = [(name, files[name].bytes, files[name].sha256) for name in names]
    shards = pd.DataFrame(rows, columns=SHARDS.names)
    return commit, shards, len(files) - len(names), repo.token is not False


def measure(hub: Hub, name: str, bytes: int, sha256: str | None) -> float | None:
    """Mean bytes of a pair by the head of a shard, headers and other members included; None if it holds no pair.

    Raises:
        KilnError: it cannot be read, or is damaged.
    """
    pairs = end = 0
    with hub.open(name, bytes, sha256) as stream:
        try:
            for item in tars.samples(stream):
                if isinstance(item, tars.Raw):
                    pairs, end = pairs + 1, max(end, item.end)
                if pairs and stream.tell() >= HEAD:
                    break
        except tars.TarError as error:
            if not pairs:
                raise KilnError(f"{hub.page}: shard {name}: {error}", "choose others by remote.pattern") from None
            step.log.warning("%s: %s", name, error)
    return end / pairs if pairs else None


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, ListRemoteSettings)
    made.add_argument("--index", type=Path, required=True, help="folder of rule biomedica_index_local")
    made.add_argument("--output", type=Path, required=True, help="table of shards; summary.json goes beside it")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """List the shards of the repo, if they are needed."""
    values = step.read_settings(args)
    index = args.index / "shards.parquet"
    record = step.record(args, "scripts.biomedica.list_remote", values, {"index": index})
    local = tables.read_table(index, ["samples", "train"])
    needed, reason = why_needed(values, local)
    step.log.info("%s", reason)
    commit, shards, others, mean = None, pd.DataFrame(columns=SHARDS.names), 0, None
    if needed:
        commit, shards, others, authorised = list_shards(values.remote)
        if local["samples"].sum() == 0:
            mean = measure(Hub(values.remote, commit, authorised), *shards.iloc[0])
    summary = {
        "repo": values.remote.repo, "revision": commit, "needed": needed, "reason": reason, "shards": len(shards),
        "other_files": others, "bytes": int(shards["bytes"].sum()), "bytes_per_sample": mean,
    }  # fmt: skip
    outputs = [args.output, args.output.with_name("summary.json")]
    tables.write_table(outputs[0], shards, ["name"], SHARDS)
    artefacts.write_json(outputs[1], summary)
    step.log.info("%s", summary)
    record.write(args.meta, outputs, items=len(shards))


if __name__ == "__main__":
    step.run(main)
