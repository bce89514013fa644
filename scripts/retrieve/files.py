"""Bring the files of a model or a data set into a folder, which appears whole or not at all.

The first retrieval locks commit and hashes; a later one gets the same bytes or fails. Files that are there already
with the locked bytes are not downloaded again, and when all are, no network is needed.
"""

import argparse
import contextlib
import json
import os
import shutil
from pathlib import Path

from scripts.common import artefacts, locks, step
from scripts.common.errors import KilnError
from scripts.retrieve import lock, models, transfer
from scripts.retrieve.lock import FileRecord


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what all retrievals share to a parser."""
    parser.add_argument("--output-folder", type=Path, required=True, help="where the files go")
    parser.add_argument(
        "--retry-wait",
        type=float,
        default=2.0,
        metavar="SECONDS",
        help="pause before the second attempt; each later one is twice as long (default: 2)",
    )


def retrieve(args: argparse.Namespace, model: models.Model, record: artefacts.Record, owner: str) -> None:
    """Bring what `model` wants into `args.output_folder`, with files.json and the record `args.meta`.

    Args:
        args: of `add_options`, and `lock`, `meta`.
        record: of this run.
        owner: the step, in the lock of the folder of downloads.

    Raises:
        KilnError: refused, not found, broken off, changed since it was locked, or no room.
    """
    # Kept when this run fails or is killed, so that the next one carries on.
    work = args.output_folder.with_name(f".{args.output_folder.name}.partial")
    try:
        with locks.writer_lock(work, owner):
            _retrieve(args, model, work, record)
            shutil.rmtree(work)
    except OSError as error:
        raise transfer.explain_disk(error, args.output_folder) or error from None


def _retrieve(args: argparse.Namespace, model: models.Model, work: Path, record: artefacts.Record) -> None:
    staged = _staging(work, model)
    entry = lock.entry_for(args.lock, model)
    files = _standing(args.output_folder, staged, model, entry)
    revision, files = _fetch(args, model, staged, entry, files)
    lock.add(args.lock, model, revision, files)
    with artefacts.atomic_folder(args.output_folder) as folder:
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(staged / name, folder / name)
        listing = {name: files[name].model_dump() for name in sorted(files)}
        (folder / "files.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")
        # The weights' hashes are known: hashing them again would take as long as the check itself.
        outputs = listing | artefacts.describe_files([folder / "files.json"])
        record.facts |= {"source": model.source, "revision": revision, "outputs": outputs}
        within = args.meta.parent.resolve() == args.output_folder.resolve()
        record.write(folder / args.meta.name if within else args.meta, [])


def _staging(work: Path, model: models.Model) -> Path:
    """The folder of downloads; emptied if it was begun for something else."""
    staged, stamp = work / "files", work / "row.json"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != model.identity():
        shutil.rmtree(staged, ignore_errors=True)
        artefacts.write_text(stamp, model.identity())
    staged.mkdir(exist_ok=True)
    return staged


def _standing(old: Path, staged: Path, model: models.Model, entry: lock.Entry | None) -> dict[str, FileRecord]:
    """The files that need no download: those with the locked bytes, staged or in the `old` folder."""
    standing = {}
    for name, locked in (entry.files if entry else {}).items():
        for place in (staged / name, old / name):
            if place.is_file() and place.stat().st_size == locked.bytes and _describe(place) == locked:
                if place != staged / name:
                    _link(place, staged / name)
                standing[name] = locked
                break
    return standing


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _fetch(
    args: argparse.Namespace,
    model: models.Model,
    staged: Path,
    entry: lock.Entry | None,
    standing: dict[str, FileRecord],
) -> tuple[str, dict[str, FileRecord]]:
    """Download what is not `standing`, and check it; the commit, and the records of all wanted files."""
    answered = entry is not None and entry.asked == lock.asked_by(model)
    if answered and standing.keys() >= set(model.select(entry.files)):
        step.log.info("%s: all files are there with the locked bytes", model.name)
        names, revision, announced = model.select(entry.files), entry.revision, {}
    elif model.kind != "url":
        names, revision, announced = _from_hub(args, model, staged, entry, standing)
    else:
        from scripts.retrieve import url

        names, revision, announced = list(model.files), "", {}
        if names[0] not in standing:
            url.download(model.source, staged / names[0], model.name, args.retry_wait)
    files = {}
    for name in names:
        files[name] = standing.get(name) or _describe(staged / name)
        with _discarding(staged / name):
            if name not in standing and name in announced:
                _check_announced(model, staged / name, files[name], announced[name])
            _check_stated(model, name, files[name])
            if entry:
                lock.check(args.lock, model, entry, name, files[name])
    return revision, files


def _from_hub(args, model, staged, entry, standing):
    # Otherwise the library's first request is one that looks up what kind of program asks.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from scripts.retrieve import hub  # after that, and only here: the library takes long to import

    repo = hub.Repo(model, args.retry_wait)
    revision = entry.revision if entry else repo.resolve(model.revision)
    announced = repo.listing(revision)
    names = model.select(announced)
    missing = [name for name in names if name not in standing]
    if missing:
        whole = sum(announced[name].bytes for name in names)
        here = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
        transfer.need_room(staged, max(0, whole - here))
        step.log.info("%s: %s at %s, %d files, %.2f GB", model.name, model.source, revision, len(names), whole / 1e9)
        with transfer.progress(model.name, staged, whole):
            repo.download(revision, missing, staged)
    return names, revision, announced


def _describe(path: Path) -> FileRecord:
    return FileRecord(bytes=path.stat().st_size, sha256=artefacts.sha256_file(path))


@contextlib.contextmanager
def _discarding(path: Path):
    """Remove a staged file that a check refuses, so that the next run does not find it again."""
    try:
        yield
    except KilnError:
        path.unlink(missing_ok=True)
        raise


def _check_announced(model, path, got, remote) -> None:
    from scripts.retrieve import hub

    wrong = remote.sha256 is not None and remote.sha256 != got.sha256
    if got.bytes != remote.bytes or wrong or hub.damaged(path, remote):
        raise KilnError(
            f"{model.title}: {path.name} came damaged: the hub announces {remote.bytes} bytes, sha256"
            f" {remote.sha256 or 'not stated'}, got {got.bytes} bytes, sha256 {got.sha256}",
            "run again; if it happens again, a proxy or mirror (HF_ENDPOINT) changes files",
        )


def _check_stated(model: models.Model, name: str, got: FileRecord) -> None:
    stated = dict(zip(model.files, model.sha256, strict=True)) if model.sha256 else {}
    if name in stated and not got.sha256.startswith(stated[name]):
        raise KilnError(
            f"{model.title}: {name} from {model.source} is not what {model.place} states: expected sha256"
            f" {stated[name]}, got {got.sha256} ({got.bytes} bytes)",
            f"the source has changed, or something in between has; do not use it, or correct `sha256` in {model.place}",
        )
