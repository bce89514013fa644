"""Atomic files and folders under injected faults, and the records beside them."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.common import artefacts
from scripts.common.artefacts import atomic_folder, atomic_path, link_folder
from scripts.common.errors import KilnError

ROOT = Path(__file__).resolve().parents[1]


def program(text: str, *arguments, **options) -> subprocess.CompletedProcess:
    """A Python program run from the checkout's root."""
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "deep/er/a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent  # else the rename would copy
    assert path.read_text() == "new"
    assert names(path.parent) == ["a.txt"]


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), KilnError("a", "b"), OSError(errno.EIO, "I/O")]
)
@pytest.mark.parametrize("written", [True, False])
def test_an_exception_keeps_the_old_file_and_leaves_nothing(tmp_path, error, written):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_path(path) as temporary:
        if written:
            temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM])
@pytest.mark.parametrize("make", [atomic_path, atomic_folder])
def test_a_refusing_disk_is_explained_and_nothing_stays(tmp_path, monkeypatch, code, make):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    place = tmp_path / "new/thing"
    with pytest.raises(KilnError) as caught, make(place) as temporary:
        (temporary / "part" if make is atomic_folder else temporary).write_text("half")
        refuse()
    assert str(place) in caught.value.message
    assert caught.value.hint
    assert names(place.parent) == []
    monkeypatch.setattr(os, "replace" if make is atomic_path else "rename", refuse)
    with pytest.raises(KilnError), make(place) as temporary:
        (temporary / "part" if make is atomic_folder else temporary).write_text("whole")
    assert names(place.parent) == []


FULL = """
    import os, sys
    from pathlib import Path
    from scripts.common.artefacts import atomic_folder, atomic_path, write_text
    from scripts.common.errors import KilnError

    folder = Path(sys.argv[1])
    write_text(folder / "old.bin", "old")
    for place, make in ((folder / "old.bin", atomic_path), (folder / "tree", atomic_folder)):
        try:
            with make(place) as temporary:
                (temporary / "x" if make is atomic_folder else temporary).write_bytes(os.urandom(1 << 20))
        except KilnError as error:
            assert "the disk is full" in error.message and str(place) in error.message and error.hint, error
        else:
            raise SystemExit("it fitted")
    assert (folder / "old.bin").read_text() == "old"
    assert [p.name for p in folder.iterdir()] == ["old.bin"]
    print("explained")
"""


def test_a_really_full_disk(tmp_path):
    """A file system of 256 KiB, in a mount namespace of its own."""
    mount = 'mount -t tmpfs -o size=256k none "$1" && exec "$0" -c "$2" "$1"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mount, sys.executable, str(tmp_path)]
    probe = [*command[:5], 'mount -t tmpfs -o size=256k none "$1"', *command[6:]]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small file system")
    done = subprocess.run([*command, textwrap.dedent(FULL)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "explained\n", done.stderr


READ_ONLY = """
    import os, sys
    from pathlib import Path
    from scripts.common.artefacts import atomic_folder, atomic_path
    from scripts.common.errors import KilnError

    if os.getuid() == 0:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
    folder = Path(sys.argv[1])
    for place in (folder / "a.txt", folder / "sub/a.txt"):
        for make in (atomic_path, atomic_folder):
            try:
                with make(place) as temporary:
                    temporary.write_text("x") if make is atomic_path else (temporary / "x").write_text("x")
            except KilnError as error:
                assert "cannot be written" in error.message and str(place) in error.message and error.hint, error
            else:
                raise SystemExit("it was written")
    print("explained")
"""


@pytest.mark.parametrize("mode", [0o555, 0o444, 0o000])
def test_a_folder_that_cannot_be_written(mode):
    # in /tmp, because every folder above must be open to the user `nobody`
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "results"
        folder.mkdir()
        Path(name).chmod(0o755)
        folder.chmod(mode)
        try:
            done = program(READ_ONLY, folder)
        finally:
            folder.chmod(0o755)
        assert done.stdout == "explained\n", done.stderr
        assert names(folder) == []


def test_a_file_size_limit_keeps_the_old_file(tmp_path):
    """The kernel refuses a write half-way, as some full file systems do."""
    text = """
        import os, resource, signal, sys
        from pathlib import Path
        from scripts.common.artefacts import atomic_path
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with atomic_path(Path(sys.argv[1])) as temporary:
            temporary.write_bytes(bytes(10000))
    """
    assert resource.RLIMIT_FSIZE >= 0
    (tmp_path / "a").write_text("old")
    done = program(text, tmp_path / "a")
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_json_round_trip_and_refusal_of_nan(tmp_path):
    path = tmp_path / "a.json"
    artefacts.write_json(path, {"name": "花瓶", "n": [1, 2.5, None]})
    assert path.read_text(encoding="utf-8").endswith("}\n")
    assert "花瓶" in path.read_text(encoding="utf-8")
    assert artefacts.read_json(path) == {"name": "花瓶", "n": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON compliant"):
        artefacts.write_json(path, {"loss": float("nan")})
    assert artefacts.read_json(path)["n"] == [1, 2.5, None]
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe"])
def test_unusable_json_is_named(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KilnError) as caught:
        artefacts.read_json(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_hashes_against_known_values(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert artefacts.sha256_file(tmp_path / "a") == known
    assert artefacts.describe_files([tmp_path / "a"]) == {"a": {"bytes": 3, "sha256": known}}


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))), st.lists(st.text("ab")))
def test_texts_do_not_run_together(one, other):
    assert (artefacts.sha256_text(*one) == artefacts.sha256_text(*other)) == (one == other)


LINKED = ["plain.png", "sub/deep er/a b.png", "花瓶/前 面.png", "-dash.png", "quote'\".png"]


@pytest.fixture
def sources(tmp_path):
    """{name: file} of targets, outside the linking folder."""
    made = {}
    for number, name in enumerate(LINKED):
        made[name] = tmp_path / "raw" / str(number) / name
        made[name].parent.mkdir(parents=True)
        made[name].write_text(name)
    return made


def test_links_are_relative_and_resolve(tmp_path, sources):
    folder = tmp_path / "results/accepted"
    records = {LINKED[0]: {"bytes": 9, "sha256": "00"}}
    link_folder(folder, sources, records)
    for name in LINKED:
        assert (folder / name).read_text() == name
        assert not (folder / name).readlink().is_absolute()
    listing = json.loads((folder / "files.json").read_text())
    assert listing == {**{name: {} for name in LINKED}, **records}
    assert list(listing) == sorted(listing)
    assert names(folder.parent) == ["accepted"]
    shutil.move(tmp_path / "raw", tmp_path / "new place")
    shutil.move(tmp_path / "results", tmp_path / "other")
    assert not (tmp_path / "other/accepted" / LINKED[0]).exists()
    shutil.move(tmp_path / "new place", tmp_path / "raw")
    assert (tmp_path / "other/accepted" / LINKED[1]).read_text() == LINKED[1]


def test_links_resolve_through_linked_folders(tmp_path, sources, monkeypatch):
    """Results on another disk, raw images on a third, all seen through links, and a relative target."""
    (tmp_path / "disk/one/two").mkdir(parents=True)
    (tmp_path / "results").symlink_to("disk/one/two")
    (tmp_path / "images").symlink_to("raw")
    monkeypatch.chdir(tmp_path)
    targets = {name: Path("images", *path.relative_to(tmp_path / "raw").parts) for name, path in sources.items()}
    for _ in range(2):
        link_folder(Path("results/accepted"), targets)
        for name in LINKED:
            assert (tmp_path / "results/accepted" / name).read_text() == name


def test_a_folder_that_is_a_link_is_replaced_itself(tmp_path, sources):
    elsewhere = tmp_path / "a/b/c/elsewhere"
    elsewhere.mkdir(parents=True)
    (elsewhere / "keep").write_text("kept")
    (tmp_path / "accepted").symlink_to(elsewhere)
    link_folder(tmp_path / "accepted", sources)
    assert (tmp_path / "accepted" / LINKED[1]).read_text() == LINKED[1]
    assert (elsewhere / "keep").read_text() == "kept"
    assert names(tmp_path) == ["a", "accepted", "raw"]


def test_a_linked_folder_is_replaced_whole_and_targets_stay(tmp_path, sources):
    folder = tmp_path / "accepted"
    link_folder(folder, sources)
    (folder / "stray.txt").write_text("x")
    link_folder(folder, {"only.png": sources[LINKED[0]]})
    assert names(folder) == ["files.json", "only.png"]
    assert all(path.read_text() == name for name, path in sources.items())
    link_folder(folder, {})
    assert names(folder) == ["files.json"]


def test_the_listing_is_never_written_through_a_link(tmp_path, sources):
    precious = sources[LINKED[0]]
    with pytest.raises(ValueError, match=r"files\.json"):
        link_folder(tmp_path / "accepted", {"files.json": precious})
    assert precious.read_text() == LINKED[0]


def test_links_are_the_same_whatever_the_order(tmp_path, sources):
    link_folder(tmp_path / "one", sources)
    link_folder(tmp_path / "two", dict(reversed(sources.items())))
    assert (tmp_path / "one/files.json").read_bytes() == (tmp_path / "two/files.json").read_bytes()


def test_a_failed_block_keeps_the_old_folder(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x").write_text("old")
    with pytest.raises(ValueError, match="no"), atomic_folder(folder) as temporary:
        (temporary / "x").write_text("new")
        raise ValueError("no")
    assert (folder / "x").read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_failed_last_rename_keeps_the_old_folder(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "x").write_text("old")
    renamed, calls = os.rename, []

    def fail_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.EIO, "I/O error")
        renamed(*arguments)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(OSError, match="I/O"), atomic_folder(folder) as temporary:
        (temporary / "x").write_text("new")
    assert (folder / "x").read_text() == "old"
    assert names(tmp_path) == ["a"]


RELINK = """
    import sys
    from pathlib import Path
    from scripts.common.artefacts import link_folder
    base = Path(sys.argv[1])
    print("ready", flush=True)
    version = int(sys.argv[2])
    while True:
        version += 1
        (base / f"target-{version}").write_text(str(version))
        link_folder(base / "accepted", {f"{n}.txt": base / f"target-{version}" for n in range(40)})
        print(version, flush=True)
"""


@pytest.mark.slow
def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path):
    """Or, between two renames, none at all: then the next run makes it. Never a mixture, never half of one."""
    import random

    delays = random.Random(3)
    version, shown, seen = 0, 0, set()
    for _ in range(12):
        command = [sys.executable, "-c", textwrap.dedent(RELINK), str(tmp_path), str(version)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(delays.uniform(0.005, 0.1))
            process.send_signal(signal.SIGKILL)
            told = process.stdout.read().split()
        shown = int(told[-1]) if told else shown
        version = max(version, shown)
        folder = tmp_path / "accepted"
        if folder.exists():
            held = {(folder / f"{n}.txt").read_text() for n in range(40)}
            assert len(held) == 1
            assert int(held.pop()) >= shown
            assert len(names(folder)) == 41
            seen.add("whole")
        version += 1
    assert seen == {"whole"}


def record(folder: Path, inputs: dict[str, Path], **settings) -> artefacts.Record:
    return artefacts.Record("scripts.some.step", settings, inputs, "c0de")


def test_meta_says_what_made_an_artefact(tmp_path):
    (tmp_path / "in.bin").write_bytes(b"abc")
    made = record(tmp_path, {"data": tmp_path / "in.bin"}, lr=0.1)
    (tmp_path / "out.bin").write_bytes(b"result")
    made.facts["loss"] = 0.5
    made.write(tmp_path / "meta.json", [tmp_path / "out.bin"], items=7)
    meta = artefacts.read_json(tmp_path / "meta.json")
    assert meta["step"] == "scripts.some.step"
    assert meta["settings"] == {"lr": 0.1}
    assert meta["code"] == "c0de"
    assert meta["inputs"] == {
        "data": {"path": str(tmp_path / "in.bin"), "sha256": artefacts.sha256_file(tmp_path / "in.bin")}
    }
    assert meta["outputs"] == artefacts.describe_files([tmp_path / "out.bin"])
    assert meta["packages"]["python"] == sys.version.split()[0]
    assert {"numpy", "pillow"} <= set(meta["packages"])
    assert meta["hardware"]["cpus"] == os.cpu_count()
    assert meta["peak_rss_mb"] > 5
    assert meta["wall_seconds"] >= 0
    assert meta["items"] == 7
    assert meta["items_per_second"] > 0
    assert meta["loss"] == 0.5
    assert {"git_commit", "started", "peak_vram_mb"} <= set(meta)


@pytest.mark.parametrize("meta", ["meta.json", "out.meta.json"])
def test_input_hashes_come_from_upstreams_record(tmp_path, monkeypatch, meta):
    out = tmp_path / "out.bin"
    out.write_bytes(b"result")
    record(tmp_path, {}).write(tmp_path / meta, [out])
    known = artefacts.sha256_file(out)
    with monkeypatch.context() as patch:
        patch.setattr(artefacts, "sha256_file", lambda path: pytest.fail(f"{path} was read"))
        assert record(tmp_path, {"x": out}).inputs["x"]["sha256"] == known


@pytest.mark.parametrize("content", [b"other!", b"longer than it was"])
def test_a_file_changed_after_its_record_is_read_again(tmp_path, content):
    out = tmp_path / "out.bin"
    out.write_bytes(b"result")
    record(tmp_path, {}).write(tmp_path / "meta.json", [out])
    out.write_bytes(content)
    later = (tmp_path / "meta.json").stat().st_mtime_ns + 10**9
    os.utime(out, ns=(later, later))
    assert artefacts.input_hash(out) == artefacts.sha256_file(out)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"outputs": []}', '{"outputs": {"out.bin": 3}}', "\udcff", "null"])
def test_a_strangers_meta_json_is_no_record(tmp_path, text):
    out = tmp_path / "out.bin"
    out.write_bytes(b"abc")
    (tmp_path / "meta.json").write_bytes(text.encode(errors="surrogateescape"))
    assert artefacts.input_hash(out) == artefacts.sha256_file(out)


def test_no_secret_reaches_a_record(tmp_path, monkeypatch):
    secrets = {"HF_TOKEN": "hf_SECRETsecret", "WANDB_API_KEY": "wandb-secret", "AWS_SECRET_ACCESS_KEY": "aws-secret"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "out").write_text("x")
    record(tmp_path, {"x": tmp_path / "out"}).write(tmp_path / "meta.json", [tmp_path / "out"])
    text = (tmp_path / "meta.json").read_text()
    assert not [name for name, value in secrets.items() if name in text or value in text]


def test_a_record_does_not_import_torch(tmp_path):
    text = """
        import sys
        from pathlib import Path
        from scripts.common import artefacts
        artefacts.Record("s", {}, {}, "c").write(Path(sys.argv[1]) / "meta.json", [])
        print("torch" in sys.modules)
    """
    assert program(text, tmp_path).stdout == "False\n"
    meta = artefacts.read_json(tmp_path / "meta.json")
    assert meta["peak_vram_mb"] is None
    assert "torch" in meta["packages"]


def test_errors_survive_another_process():
    import pickle

    error = pickle.loads(pickle.dumps(KilnError("what", "do this")))
    assert (error.message, error.hint, str(error)) == ("what", "do this", "what\nHint: do this")


@pytest.mark.parametrize(("raised", "status", "told"), [
    ('KilnError("bad row 3", "mend it")', 1, ["Error: bad row 3", "Hint: mend it"]),
    ('ValueError("a defect")', 1, ["Traceback", "a defect"]),
])  # fmt: skip
def test_a_step_tells_what_to_do(raised, status, told):
    done = program(f"""
        from scripts.common import step
        from scripts.common.errors import KilnError
        def main(argv):
            raise {raised}
        step.run(main)
    """)
    assert done.returncode == status
    assert all(text in done.stderr for text in told)
    assert ("Traceback" in done.stderr) == ("Traceback" in told)


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path):
    left, other = tmp_path / ".out.1.tmp", tmp_path / ".out2.1.tmp"
    for folder in (left, other):
        (folder / "deep").mkdir(parents=True)
    with artefacts.atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out2.1.tmp", "out"]


def test_links_that_stay_take_no_new_inode_and_those_that_lead_elsewhere_are_made_anew(tmp_path, sources):
    folder = tmp_path / "accepted"
    link_folder(folder, sources)
    inodes = {name: (folder / name).lstat().st_ino for name in LINKED}
    moved, kept = LINKED[0], LINKED[1:]
    other = tmp_path / "raw/other.png"
    other.write_text("other")
    link_folder(folder, {**sources, moved: other, "new.png": other})
    assert {name: (folder / name).lstat().st_ino for name in kept} == {name: inodes[name] for name in kept}
    assert all((folder / name).lstat().st_nlink == 1 and (folder / name).is_symlink() for name in LINKED)
    assert (folder / moved).read_text() == (folder / "new.png").read_text() == "other"
    assert all((folder / name).read_text() == name for name in kept)


@pytest.mark.parametrize("error", [errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_a_disk_without_second_names_of_links_gets_new_ones(tmp_path, sources, monkeypatch, error):
    def refuse(*_, **__):
        raise OSError(error, os.strerror(error))

    folder = tmp_path / "accepted"
    link_folder(folder, sources)
    monkeypatch.setattr(artefacts.os, "link", refuse)
    link_folder(folder, sources)
    assert all((folder / name).read_text() == name for name in LINKED)


def test_a_full_disk_while_linking_keeps_the_old_folder(tmp_path, sources, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "accepted"
    link_folder(folder, sources)
    monkeypatch.setattr(artefacts.os, "link", full)
    with pytest.raises(KilnError, match="accepted"):
        link_folder(folder, sources)
    assert all((folder / name).read_text() == name for name in LINKED) and names(tmp_path) == ["accepted", "raw"]


@given(st.dictionaries(st.text(min_size=1), st.dictionaries(st.text(), st.integers() | st.text() | st.none())))
@settings(deadline=None)
def test_the_listing_is_written_as_json_itself_indents_it(tmp_path_factory, records):
    """Names that are no file names are left out; those with odd signs are not."""
    records = {
        name: facts
        for name, facts in sorted(records.items())
        if name.isprintable() and not set(name) & set("/.\0") and len(name.encode()) < 200
    }
    folder = tmp_path_factory.mktemp("linked") / "made"
    link_folder(folder, dict.fromkeys(records, Path("/nowhere")), records)
    assert (folder / "files.json").read_text(encoding="utf-8") == json.dumps(records, indent=1) + "\n"
