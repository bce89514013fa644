"""The pipeline through Snakemake: from raw images to best views, and what a change reruns."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import workflow
import yaml
from rerun_cases import CODE, VASE, VASE_FILTER
from vase_fixtures import clip_folder, draw

pytestmark = pytest.mark.slow

TRAINED = ("classifier.safetensors", "used.parquet")
SETTINGS = {
    "device": "cpu",
    "resources": {name: {"threads": 1, "mem_mb": 1000} for name in ("light", "cpu", "gpu_single")},
    "vase": {
        "truth": "data/truth.parquet",
        "images_per_shard": 60,
        "split": {"train": 0.4, "validation": 0.2, "test": 0.4},
        "classifier": {
            "arch": "resnet18", "weights": None, "image_size": 32, "epochs": 2, "batch_size": 16, "workers": 0,
        },
        "classify": {"workers": 0, "batch_size": 8},
        "clip": {"model": "data/clip", "workers": 0, "batch_size": 8},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> tuple[Path, Path]:
    """A checkout and a run folder in which vase_images is built."""
    base = tmp_path_factory.mktemp("vase")
    checkout, run = workflow.copy_checkout(base / "checkout"), base / "run one"
    drawn = draw(base / "drawn")
    (run / "data/vase").mkdir(parents=True)
    for name in ("images", "labelled"):
        shutil.move(drawn / name, run / "data/vase" / name)
    shutil.move(drawn / "truth.parquet", run / "data/truth.parquet")
    clip_folder(run / "data/clip")
    (run / "config").mkdir()
    (run / "config/config.yaml").write_text(yaml.safe_dump(SETTINGS))
    workflow.run(checkout, run, "vase_images")
    return checkout, run


@pytest.fixture
def edit(finished_run):
    """A function that edits a file of the checkout; undone after the test."""
    checkout, _ = finished_run
    undo = {}

    def change(name: str, old: str, new: str) -> None:
        path = checkout / name
        undo.setdefault(path, path.read_text())
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    yield change
    for path, text in undo.items():
        path.write_text(text)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def contents(folder: Path) -> dict[str, str]:
    """{path: sha256} of all files below a folder, links aside."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_everything_is_accounted_for(finished_run):
    results = finished_run[1] / "results/vase"
    listed = json.loads((results / "list_images/summary.json").read_text())
    accepted = json.loads((results / "accept_images/main/summary.json").read_text())
    views = json.loads((results / "select_views/main/best_views_report.json").read_text())
    assert listed["in"] == len(list((finished_run[1] / "data/vase/images").iterdir())) == accepted["in"]
    assert accepted["in"] == sum(n for name, n in accepted.items() if name != "in")
    links = [p for p in (results / "select_views/main/best_views").iterdir() if p.name != "files.json"]
    assert len(links) == views["total_vases"] == len(views["results"])
    assert all(p.is_symlink() and not os.path.isabs(os.readlink(p)) and p.resolve().is_file() for p in links)
    audit = json.loads((results / "audit_split/main/audit.json").read_text())
    assert all(c["shared_with_test"] == [] for c in audit["checks"])


def test_each_artefact_says_what_it_is(finished_run):
    results = finished_run[1] / "results/vase"
    metas = list(results.rglob("*meta.json"))
    assert len(metas) >= 12
    for path in metas:
        meta = json.loads(path.read_text())
        assert meta["outputs"] and meta["code"] and meta["packages"]["python"] and meta["wall_seconds"] > 0
        for name, record in meta["outputs"].items():
            found = [p for p in path.parent.rglob(name) if p.is_file()]
            assert any(hashlib.sha256(p.read_bytes()).hexdigest() == record["sha256"] for p in found), (path, name)


def test_nothing_changed_reruns_nothing(finished_run):
    assert workflow.planned(*finished_run, "vase_images") == {}


@pytest.mark.parametrize("what, edits, rerun", CODE)
def test_code_reruns_what_it_can_change(finished_run, edit, what, edits, rerun):
    for change in edits:
        edit(*change)
    assert set(workflow.planned(*finished_run, "vase_images")) == rerun


def test_every_shard_is_embedded_anew(finished_run, edit):
    edit("scripts/vase/clip.py", "embeddings.mean(0)", "embeddings.sum(0)")
    shards = len(list((finished_run[1] / "results/vase/embed_images").glob("*.arrow")))
    assert workflow.planned(*finished_run, "vase_images")["vase_embed_images"] == shards > 1


@pytest.mark.parametrize(
    "name, old, new",
    [
        ("scripts/vase/classifier_training.py", "torch.manual_seed(values.seed)", "torch.manual_seed(values.seed + 1)"),
        ("scripts/common/devices.py", "cudnn.benchmark = True", "cudnn.benchmark = False"),
    ],
)
def test_initialisation_and_kernels_retrain(finished_run, edit, name, old, new):
    edit(name, old, new)
    assert "vase_train_classifier" in workflow.planned(*finished_run, "vase_images")


def test_moved_images_are_linked_anew_and_not_read_again(finished_run, tmp_path):
    checkout, run = finished_run[0], copy_of(finished_run[1], tmp_path)
    (run / "data/vase/images").rename(run / "data/moved")
    plan = workflow.planned(checkout, run, "vase_images", "--config", "set=vase.images=data/moved")
    assert {"vase_link_classes", "vase_accept_images", "vase_select_views"} <= set(plan)
    assert not {"vase_inspect_images", "vase_embed_images", "vase_classify_images"} & set(plan)
    assert "vase_train_classifier" not in plan


@pytest.mark.parametrize("override, rerun", VASE)
def test_settings_rerun_only_their_readers(finished_run, override, rerun):
    assert set(workflow.planned(*finished_run, "vase_images", "--config", f"set={override}")) == rerun


def test_a_variant_of_the_classifier_stands_beside_main(finished_run, tmp_path):
    """Planned from the first training on, made, and taken out of the configuration again; main keeps its bytes."""
    checkout, run = finished_run[0], copy_of(finished_run[1], tmp_path)
    results = run / "results/vase"
    variant = ("--config", "set=vase.variants.slow.classifier.lr=9e-4")  # near main's, which finds some good images
    shards = len(list((results / "inspect_images").glob("*.parquet")))
    chain = dict.fromkeys({"vase_train_classifier", "vase_draw_classifier", "vase_link_classes", *VASE_FILTER}, 1)
    plan = workflow.planned(checkout, run, "vase_images", *variant)
    assert plan == {**chain, "vase_classify_images": shards}
    assert set(workflow.planned(checkout, run, "vase_quality", *variant)) == {
        "vase_train_classifier", "vase_classify_images", "vase_link_classes", "vase_choose_threshold"
    }  # fmt: skip
    before = contents(results)
    done = workflow.run(checkout, run, "vase_images", *variant)
    assert workflow.finished(done.stdout + done.stderr) == {**plan, "vase_images": 1}
    after = contents(results)
    assert {path: after[path] for path in before} == before
    made = {path.replace("/slow/", "/main/") for path in set(after) - set(before)}
    assert {path for path in before if "/main/" in path} == made
    same = {name: after[f"train_classifier/slow/{name}"] == after[f"train_classifier/main/{name}"] for name in TRAINED}
    assert same == {"used.parquet": True, "classifier.safetensors": False}
    assert workflow.planned(checkout, run, "vase_images", *variant) == {}
    assert workflow.planned(checkout, run, "vase_images") == {}


def test_a_seed_more_is_a_run_more(finished_run):
    """`main` keeps the seed that the configuration has, and its results."""
    plan = workflow.planned(*finished_run, "vase_images", "--config", "set=vase.variants.main.seeds=[42,7,8]")
    assert plan["vase_train_classifier"] == plan["vase_audit_split"] == plan["vase_evaluate_filter"] == 2
    assert not {"vase_inspect_images", "vase_embed_images", "vase_score_images", "vase_split"} & set(plan)


def test_a_variant_of_what_only_the_second_half_reads_changes_nothing_here(finished_run):
    override = "set=vase.variants.low.grpo.lr=1e-7 vase.variants.slow.sft.lr=1e-5"
    assert workflow.planned(*finished_run, "vase_images", "--config", override) == {}


def test_a_variant_may_not_change_what_all_share(finished_run):
    done = workflow.run(
        *finished_run, "vase_images", "--config", "set=vase.variants.more.threshold.percentile=40", check=False
    )
    text = done.stdout + done.stderr
    assert done.returncode and "variant more changes threshold" in text and "Hint:" in text
    assert not workflow.finished(text)


def test_a_bad_key_stops_before_any_job(finished_run):
    done = workflow.run(*finished_run, "vase_images", "--config", "set=vase.classifier.epoch=3", check=False)
    text = done.stdout + done.stderr
    assert done.returncode and "vase.classifier.epochs" in text and "Hint:" in text and not workflow.finished(text)


def test_one_added_image_makes_one_new_shard_and_trains_nothing(finished_run, tmp_path):
    checkout, _ = finished_run
    run = copy_of(finished_run[1], tmp_path)
    before = digests(run / "results/vase/embed_images")
    drawn = draw(tmp_path / "more", seed=7)
    new = sorted((drawn / "images").iterdir())[0]
    shutil.copy(new, run / "data/vase/images" / new.name)
    done = workflow.run(checkout, run, "vase_images")
    jobs = workflow.finished(done.stdout + done.stderr)
    per_shard = ("vase_inspect_images", "vase_classify_images", "vase_embed_images")
    assert {name: jobs.get(name) for name in per_shard} == dict.fromkeys(per_shard, 1)
    assert "vase_train_classifier" not in jobs
    after = digests(run / "results/vase/embed_images")
    assert {name: after[name] for name in before} == before and len(after) == len(before) + 2
    assert workflow.planned(checkout, run, "vase_images") == {}


def test_a_removed_and_a_rewritten_image_touch_their_shards_alone(finished_run, tmp_path):
    checkout, _ = finished_run
    run = copy_of(finished_run[1], tmp_path)
    table = pd.read_parquet(run / "results/state/vase/shards.parquet")
    removed = table[table["shard"] == "s00001"].iloc[0]
    (run / "data/vase/images" / removed["path"]).unlink()
    plan = workflow.planned(checkout, run, "vase_images")
    assert plan["vase_inspect_images"] == plan["vase_classify_images"] == plan["vase_embed_images"] == 1
    done = workflow.run(checkout, run, "vase_images")
    assert "vase_train_classifier" not in workflow.finished(done.stdout + done.stderr)
    manifest = pd.read_parquet(run / "results/vase/list_images/manifest.parquet")
    assert removed["path"] not in set(manifest["path"])
    assert not list((run / "results/vase").rglob(removed["path"]))


STEPS = ("inspect_images", "classify_images", "embed_images")
FINAL = ("list_images/manifest.parquet", "score_images/scores.parquet", "select_views/main/best_views.parquet")


def computed(run: Path, since: float) -> dict[str, list[int]]:
    """{step: [items computed, items reused]} of the shards that were made after a time."""
    counts = {}
    for name in STEPS:
        metas = [p for p in (run / "results/vase" / name).rglob("*.meta.json") if p.stat().st_mtime > since]
        facts = [json.loads(p.read_text()) for p in metas]
        counts[name] = [sum(one[f"items_{kind}"] for one in facts) for kind in ("computed", "reused")]
    return counts


def final_tables(run: Path) -> list[bytes]:
    return [(run / "results/vase" / name).read_bytes() for name in FINAL]


def test_changed_images_alone_are_computed_and_tables_equal_those_from_scratch(finished_run, tmp_path):
    checkout, _ = finished_run
    run = copy_of(finished_run[1], tmp_path)
    images = run / "data/vase/images"
    table = pd.read_parquet(run / "results/vase/list_images/manifest.parquet").query("status == 'ok'")
    removed, rewritten, renamed, edited = table.drop_duplicates("sha256", keep=False)["path"].iloc[[3, 11, 22, 33]]
    facts = (images / edited).stat()
    (images / removed).unlink()
    data = (images / rewritten).read_bytes()
    (images / rewritten).write_bytes(data + b"trailing")
    (images / renamed).rename(images / f"A{renamed}")
    data = bytearray((images / edited).read_bytes())
    data[-40] ^= 1
    (images / edited).write_bytes(data)
    os.utime(images / edited, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    count, since = len(list(images.iterdir())), time.time()
    done = workflow.run(checkout, run, *("results/vase/" + name for name in FINAL), "--config", "rehash=true")
    text = done.stdout + done.stderr
    assert f"rehash: {edited} differs" in text and "vase_train_classifier" not in workflow.finished(text)
    found = computed(run, since)
    assert found["inspect_images"][0] == 3  # rewritten, renamed, edited
    assert found["classify_images"][0] == found["embed_images"][0] == 2  # what was renamed is known by its content
    tables = final_tables(run)

    shards = len(pd.read_parquet(run / "results/state/vase/shards.parquet")["shard"].unique())
    subprocess.run([sys.executable, "-m", "scripts.common.reshard"], cwd=run, check=True,
                   env={**os.environ, "PYTHONPATH": str(checkout)})  # fmt: skip
    after = pd.read_parquet(run / "results/state/vase/shards.parquet")["shard"].unique()
    assert len(after) == -(-count // SETTINGS["vase"]["images_per_shard"]) < shards
    since = time.time()
    workflow.run(checkout, run, *("results/vase/" + name for name in FINAL))
    assert {name: one[0] for name, one in computed(run, since).items()} == dict.fromkeys(STEPS, 0)
    assert computed(run, since)["inspect_images"] == [0, count] and final_tables(run) == tables
    for name in STEPS:
        assert sorted({p.name[:6] for p in (run / "results/vase" / name).rglob("s*")}) == sorted(after)
        kept = {p.name[:6] for p in (run / "results/state/vase" / name).rglob("s*.*")}
        assert kept == set(after), name

    (run / "results/state/vase/shards.parquet").unlink()
    done = workflow.run(checkout, run, "vase_images", "--dry-run")
    assert workflow.count_jobs(done.stdout + done.stderr).keys() <= VASE_FILTER
    assert "made anew from the tables of" in done.stdout + done.stderr
    (run / "results/state/vase/shards.parquet").write_bytes(b"PAR1 edited by hand PAR1")
    (images / "one more.jpg").write_bytes(data)
    done = workflow.run(checkout, run, "vase_list_images", "--dry-run")
    assert workflow.count_jobs(done.stdout + done.stderr) == {"vase_inspect_images": 1, "vase_list_images": 1}
    (images / "one more.jpg").unlink()

    for name in ("inspect_images", "classify_images", "embed_images", "list_images", "link_classes", "select_views"):
        shutil.rmtree(run / "results/vase" / name)
    shutil.rmtree(run / "results/state/vase")
    workflow.run(
        checkout, run, *("results/vase/" + name for name in FINAL), "--config", "set=vase.images_per_shard=1000"
    )
    assert final_tables(run) == tables


def test_without_rescan_the_last_scan_holds(finished_run, tmp_path):
    checkout, run = finished_run[0], copy_of(finished_run[1], tmp_path)
    for folder, number in (("images", 0), ("labelled/0", 1)):
        first = sorted((run / "data/vase" / folder).iterdir())[number]
        shutil.copy(first, first.with_name("one more.jpg"))
    assert workflow.planned(checkout, run, "vase_images", "--config", "rescan=false") == {}
    assert workflow.planned(checkout, run, "vase_images")["vase_inspect_images"] == 1
    shutil.rmtree(run / "results/state/scans")
    done = workflow.run(checkout, run, "vase_list_labelled", "--dry-run", "--config", "rescan=false")
    assert "no earlier scan" in done.stdout + done.stderr
    assert workflow.count_jobs(done.stdout + done.stderr) == {"vase_list_labelled": 1}


def copy_of(run: Path, folder: Path) -> Path:
    """A finished run in another place, with times and links as they were."""
    return Path(shutil.copytree(run, folder / "copy of run", symlinks=True))


def test_results_copied_elsewhere_rerun_nothing(finished_run, tmp_path):
    assert workflow.planned(finished_run[0], copy_of(finished_run[1], tmp_path), "vase_images") == {}


def test_kill_9_in_training_ends_with_the_same_bytes(finished_run, tmp_path):
    checkout, run = finished_run[0], copy_of(finished_run[1], tmp_path)
    folder = run / "results/vase/train_classifier/main"
    target = "results/vase/train_classifier/main/classifier.safetensors"
    wanted = {name: h for name, h in digests(folder).items() if name in TRAINED}
    force = (target, "--forcerun", "vase_train_classifier")
    often = ("--config", "set=vase.classifier.save_minutes=0")
    state = run / "results/state/vase/train_classifier/main"
    rng = random.Random(5)
    running = subprocess.Popen(
        workflow.command(checkout, run, *force, *often), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    steps = rng.randint(1, 4)
    deadline = time.monotonic() + 300
    while not any(int(p.name[5:]) >= steps for p in state.glob("*/step-*[0-9]")):
        assert time.monotonic() < deadline and running.poll() is None, "no state was saved"
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    kill_leftovers(run)
    assert not (folder / "classifier.safetensors").exists()
    workflow.run(checkout, run, "--unlock")
    workflow.run(checkout, run, target, "--rerun-incomplete", *often)
    log = (run / "results/logs/vase/train_classifier/main.log").read_text()
    assert "resumed from" in log
    assert {name: digests(folder)[name] for name in wanted} == wanted
    assert not state.exists()


def kill_leftovers(run: Path) -> None:
    """End the launcher's own process group, which a group kill of Snakemake does not reach."""
    time.sleep(1)
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    mine = [line.split()[0] for line in listed.splitlines() if "scripts.vase.train_classifier" in line]
    mine = [pid for pid in mine if os.path.realpath(f"/proc/{pid}/cwd") == str(run.resolve())]
    for pid in mine:
        os.kill(int(pid), signal.SIGKILL)


def test_as_a_module_of_another_workflow(finished_run, tmp_path):
    checkout, run = finished_run[0], copy_of(finished_run[1], tmp_path)
    outer = tmp_path / "outer"
    outer.mkdir()
    (outer / "Snakefile").write_text(
        f"import yaml\n\n\nmodule kiln:\n    snakefile:\n        {str(checkout / 'Snakefile')!r}\n"
        f"    config:\n        yaml.safe_load(open({str(run / 'config/config.yaml')!r}))\n\n\n"
        "use rule * from kiln as kiln_*\n\n\n"
        "rule mine:\n    default_target: True\n    input:\n        rules.kiln_vase_quality.input,\n"
        "    output:\n        'mine.txt',\n    shell:\n        'wc -l {input} > {output}'\n"
    )
    done = workflow.run(outer, run, "mine", "--forcerun", "kiln_vase_choose_threshold")
    jobs = workflow.finished(done.stdout + done.stderr)
    assert jobs["mine"] == 1 and "kiln_vase_choose_threshold" in jobs
    assert (run / "mine.txt").read_text()


def test_a_read_only_results_folder_is_named(finished_run, tmp_path):
    checkout, run = finished_run[0], copy_of(finished_run[1], tmp_path)
    shutil.rmtree(run / "results")
    (run / "results").mkdir()
    inner = " ".join(f"'{part}'" for part in workflow.command(checkout, run, "vase_images"))
    script = f"mount -t tmpfs -o ro none '{run}/results' && {inner}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    text = done.stdout + done.stderr
    if "unshare" in text and "permitted" in text:
        pytest.skip("this machine lets nobody mount a read-only folder")
    assert done.returncode and "Hint:" in text and "results" in text, text[-2000:]
    assert not workflow.finished(text)


def test_a_full_disk_is_named_and_the_next_run_completes(finished_run, tmp_path):
    """On a real small disk: full while images are inspected, then with room again."""
    checkout, run = finished_run[0], copy_of(finished_run[1], tmp_path)
    page = 4096
    # room for the configuration, the note of code keys, the table of shards and two logs, but for no shard's table
    early = [run / "results/config.yaml", run / "results/code", *(run / "results/code").iterdir()]
    room = page * (sum(-(-path.stat().st_size // page) for path in early) + 3)
    shutil.rmtree(run / "results")
    (run / "results").mkdir()
    target = "results/vase/list_images/manifest.parquet"
    inner = " ".join(f"'{part}'" for part in workflow.command(checkout, run, target))
    script = f"""
        mount -t tmpfs -o size=2m none '{run}/results' || exit 99
        head -c {2 * 2**20 - room} /dev/zero > '{run}/results/filler'
        {inner} && exit 98
        find '{run}/results' -name '*.parquet' -size 0 -o -name '*.tmp' | grep . && exit 97
        rm '{run}/results/filler'
        echo ROOM AGAIN
        {inner} --rerun-incomplete
    """
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    text = done.stdout + done.stderr
    if "unshare" in text and "permitted" in text:
        pytest.skip("this machine lets nobody mount a small disk")
    first, _, second = text.partition("ROOM AGAIN")
    assert done.returncode == 0, text[-3000:]
    assert "the disk is full" in first and "Hint:" in first, first[-3000:]
    assert "vase_list_images" in workflow.finished(second + done.stderr)
