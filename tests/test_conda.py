"""The conda environments, for real: each is made as Snakemake makes it, and a rule of each family runs inside.

`make test-conda`. What conda itself gives, an interpreter and pip, comes from a channel on this machine (tests/conda);
all else is installed from the package index. That the few conda packages solve on the public channels is not shown.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import pytest
import workflow
import yaml
from hub_server import HubServer
from packaging.utils import canonicalize_name
from test_envs import pins

from scripts import envs

pytestmark = pytest.mark.conda
ROOT = Path(__file__).resolve().parents[1]
UV = Path(sys.executable).with_name("uv")
FAMILIES = sorted(envs.FAMILIES)
BY_PIP = {"retrieve", "tables"}  # short ones, which the environment's own pip installs; the others are linked by uv
LARGE = 2**20  # bytes from which files must be links into uv's cache
DEMO = "results/demo"
REFUSED = "busi.train.deepspeed is zero2 on a CPU"  # what says that deepspeed was found


class Work(NamedTuple):
    """What runs in an environment: a rule, its step and the file that it makes."""

    rule: str
    step: str
    target: str


RUNS = {
    "tables": Work("demo_draw_vases", "scripts.demo.draw_vases", f"{DEMO}/demo/draw_vases/files.json"),
    "vision": Work("demo_draw_digits", "scripts.demo.draw_digits", f"{DEMO}/demo/draw_digits/files.json"),
    "clip": Work("demo_train_clip", "scripts.demo.train_clip", f"{DEMO}/demo/train_clip/metrics.json"),
    "vlm": Work("demo_train_vlm", "scripts.demo.train_vlm", f"{DEMO}/demo/train_vlm/files.json"),
    "swift": Work("vase_train_sft", "scripts.vase.train_sft", f"{DEMO}/vase/train_sft/main/best/files.json"),
    "rae": Work(
        "demo_initialise_encoder",
        "scripts.demo.initialise_encoder",
        f"{DEMO}/demo/initialise_encoder/dinov2/files.json",
    ),
    "coca": Work("demo_draw_slides", "scripts.demo.draw_slides", f"{DEMO}/demo/draw_slides/files.json"),
    "streaming": Work("demo_draw_figures", "scripts.demo.draw_figures", f"{DEMO}/demo/draw_figures/files.json"),
    "retrieve": Work("retrieve_model", "scripts.retrieve.model", "resources/models/thing/files.json"),
    "report": Work("report_render", "snakemake", f"{DEMO}/report.html"),
    "hulumed": Work("busi_predict", "scripts.busi.predict", f"{DEMO}/busi/predict/main/base/predictions.csv"),
}
TRAIN_LORA = Work("busi_train_lora", "scripts.busi.train_lora", f"{DEMO}/busi/train_lora/main/lora/metrics.json")
ON_CLUSTER = f"{DEMO}/demo/initialise_encoder/siglip2/files.json"
SMALL = {
    "demo": {
        "draw": {"vases": 8, "labelled_vases": 8, "shared_vases": 2, "clip_vases": 40},
        "clip": {"epochs": 1, "batch_size": 8},
        "vlm": {"pictures": 64, "held_out": 16, "steps": 2},
        "digits": {"pictures": 20},
        "slides": {"slides": 6, "patients": 4, "max_tiles": 60},
        "figures": {"figures": 60},
    },
    "vase": {
        "images": "data/vases/images",
        "list": {"view_pattern": None},
        "vlm": {"model": "data/qwen"},
        "sft": {"max_steps": 2, "batch_size": 4, "eval_batch_size": 4, "eval_steps": 2, "save_steps": 2},
    },
    "busi": {"images": "data/ultrasound/images", "base": {"model": "data/qwen"}, "predict": {"batch_size": 4}},
}


class Place:
    """A checkout with a run folder, and beside them the environments, on the file system of uv's cache."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.checkout = workflow.copy_checkout(folder / "checkout")
        shutil.copy(ROOT / "config/demo.yaml", self.checkout / "config")
        self.prefix, self.run = folder / "envs", folder / "run"
        self.run.mkdir()
        self.small = folder / "small.yaml"
        self.small.write_text(yaml.safe_dump(SMALL))
        with (self.checkout / "config/models.csv").open("a") as table:
            table.write("thing,hub,me/thing,,config.json,,MIT,vase\n")

    def command(self, *more: str) -> list[str]:
        """Snakemake's command line for the demo, with rules in their environments."""
        demo = ["--configfile", str(self.checkout / "config/demo.yaml")]
        conda = ["--sdm", "conda", "--conda-prefix", str(self.prefix)]
        return workflow.command(self.checkout, self.run, *conda, *demo, *more)

    def snakemake(self, *more: str) -> subprocess.CompletedProcess:
        """Run it to its end; `stdout` holds all that it wrote. A new machine may have to download 10 GB."""
        return subprocess.run(
            self.command(*more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3600
        )

    def rules(self, *works: Work, settings: str = "") -> subprocess.CompletedProcess:
        """Run these rules alone, with small settings, on inputs that are there."""
        names, targets = [work.rule for work in works], [work.target for work in works]
        changed = ["--config", f"set={settings}"] if settings else []
        return self.snakemake(str(self.small), "--keep-going", *changed, "--allowed-rules", *names, "--", *targets)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    cache = Path(subprocess.run([UV, "cache", "dir"], capture_output=True, text=True, check=True).stdout.strip())
    cache.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="kiln-conda-", dir=cache.parent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{ROOT}/tests/conda/bin:{os.environ['PATH']}")
        patch.setenv("HF_HOME", str(folder / "huggingface"))
        # Each environment keeps the bytecode of what its first process imports: compiling all of it takes longer.
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield Place(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def environments(place) -> dict[str, Path]:
    """{family: its environment}, made by Snakemake for the settings that choose them."""
    found = {}
    for more in (
        ["--", "all", RUNS["retrieve"].target],
        ["--config", "set=busi.train.deepspeed=zero2", "--", "busi"],
        ["--config", "set=busi.train.deepspeed=zero2 busi.base.family=hulumed", "--", "busi"],
    ):
        done = place.snakemake("--conda-create-envs-only", *more)
        assert done.returncode == 0, done.stdout[-6000:]
        for family, folder in re.findall(r"/envs/(\w+)\.yaml created \(location: (.*?)\)", done.stdout):
            assert family not in found, "made twice"
            found[family] = place.run / folder
    return found


def test_every_environment_is_made_and_no_other(environments):
    assert sorted(environments) == FAMILIES


def installed(environment: Path) -> dict[str, tuple[str, str]]:
    """{canonical name: (version, installer)} of the packages in an environment."""
    site = environment / "lib/python3.11/site-packages"
    return {
        canonicalize_name(one.name): (one.version, (one.read_text("INSTALLER") or "").strip())
        for one in distributions(path=[str(site)])
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_an_environment_holds_exactly_its_pins(environments, family):
    held = installed(environments[family])
    del held["pip"]
    assert {name: version for name, (version, _) in held.items()} == pins(family)
    assert {installer for _, installer in held.values()} == {"pip" if family in BY_PIP else "uv"}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - BY_PIP))
def test_large_files_are_links_into_one_cache(environments, family):
    site = environments[family] / "lib/python3.11/site-packages"
    files = [path for path in site.rglob("*") if path.name != "RECORD"]  # which an installer writes anew
    large = [path for path in files if path.is_file() and path.stat().st_size > LARGE]
    assert large
    copied = [path for path in large if path.stat().st_nlink == 1]
    assert not copied


@pytest.mark.parametrize("family", FAMILIES)
def test_pip_section_resolves(family):
    """By the index's metadata: the pins agree with each other on the oldest Linux, and nothing is missing."""
    platform = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
    done = subprocess.run(
        [UV, "pip", "compile", "--quiet", "--no-annotate", "--no-header", *platform, "-"],
        input="".join(f"{name}=={version}\n" for name, version in pins(family).items()),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    resolved = dict(line.split("==") for line in done.stdout.split())
    assert {canonicalize_name(name): version for name, version in resolved.items()} == pins(family)


@pytest.mark.parametrize(
    "conda, pip, said",
    [
        ("pytorch=2.4", "tqdm==4.70.1", "No candidates were found for pytorch"),
        ("python=3.11", "tqdm==0.0.987", "No matching distribution found for tqdm==0.0.987"),
    ],
)
def test_what_is_not_there_fails(place, tmp_path, conda, pip, said):
    file = {"channels": ["conda-forge"], "dependencies": ["python=3.11", "pip", conda, {"pip": [pip]}]}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(file))
    snakefile = 'rule one:\n    output: "one"\n    conda: "wrong.yaml"\n    shell: "touch {output}"\n'
    (tmp_path / "Snakefile").write_text(snakefile)
    command = [sys.executable, "-m", "snakemake", "--sdm", "conda", "--conda-prefix", str(place.folder / "wrong")]
    done = subprocess.run(
        [*command, "--cores", "1", "--conda-create-envs-only"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode != 0
    assert said in done.stdout and "Could not create conda environment" in done.stdout


# --- rules in their environments -----------------------------------------------------------------------------------


def pictures_of_report(place: Place) -> list[Path]:
    """The pictures that the report is made of, by Snakemake's list of all outputs."""
    done = subprocess.run(
        place.command("--summary", f"{DEMO}/report.html"), capture_output=True, text=True, check=True, timeout=300
    )
    names = [line.split("\t")[0] for line in done.stdout.splitlines()]
    return [place.run / name for name in names if name.endswith(".png")]


def prepare(place: Place) -> str:
    """What rules start from that are run without those before them; the digest of Hulu-Med's code."""
    from hulumed_fixtures import tiny_hulumed
    from PIL import Image
    from vase_fixtures import technique_rows
    from vlm_fixtures import chat_rows, tiny_base

    from scripts.common.hulumed import code_digest

    run, data = place.run, place.run / "data"
    tiny_base(data / "qwen", image_side=56)
    tiny_hulumed(data / "hulumed")
    for side, count in (("train", 8), ("validation", 4), ("test", 4)):
        rows = chat_rows(data / "ultrasound", side, count)
        place_at(rows, run / DEMO / "busi/build_conversations")
    for name, count in (("sft_train", 8), ("sft_validation", 4)):
        technique_rows(data / "vases", name, count, answered=True)
        place_at(data / f"vases/{name}.jsonl", run / DEMO / "vase/build_dataset/main")
    for picture in pictures_of_report(place):
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(picture)
    (run / DEMO / "summary.json").write_text("{}")
    return code_digest(data / "hulumed")


def place_at(file: Path, folder: Path) -> None:
    """Move a file into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    file.rename(folder / file.name)


@pytest.fixture(scope="module")
def witnessed(environments) -> dict[str, Path]:
    """{family: file to which each interpreter of its environment adds its command line}."""
    line = 'import os, sys; open(os.path.join(sys.prefix, "ran"), "a").write(" ".join(sys.orig_argv) + "\\n")\n'
    for folder in environments.values():
        (folder / "lib/python3.11/site-packages/witness.pth").write_text(line)
    return {family: folder / "ran" for family, folder in environments.items()}


@pytest.fixture(scope="module")
def code_sha256(place) -> str:
    return prepare(place)


@pytest.fixture(scope="module")
def done(place, witnessed, code_sha256, on_cluster) -> dict[str, str]:
    """What Snakemake wrote, by what was run."""
    hulumed = f"busi.base.model=data/hulumed busi.base.family=hulumed busi.base.code_sha256={code_sha256}"
    works = [work for family, work in RUNS.items() if family not in ("hulumed", "report", "swift")]
    report = RUNS["report"]  # of the demo as it is, whose pictures are there
    runs = {"report": place.snakemake("--allowed-rules", report.rule, "--", report.target)}
    # Before the checkpoint demo_draw_vases, after which Snakemake plans anew and forgets --allowed-rules.
    runs["swift"] = place.rules(RUNS["swift"])
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        hub.repos["me/thing"] = {"config.json": b"{}"}
        patch.setenv("HF_ENDPOINT", hub.url)
        runs["locked"] = place.rules(*works)
    runs["hulumed"] = place.rules(RUNS["hulumed"], settings=hulumed)
    runs["deepspeed"] = place.rules(TRAIN_LORA, settings="busi.train.deepspeed=zero2")
    runs["hulumed_deepspeed"] = place.rules(TRAIN_LORA, settings=f"busi.train.deepspeed=zero2 {hulumed}")
    return {name: run.stdout for name, run in runs.items()}


@pytest.mark.parametrize("family", RUNS)
def test_a_rule_runs_in_its_environment(place, witnessed, done, family):
    work = RUNS[family]
    assert (place.run / work.target).is_file(), done.get(family, done["locked"])[-8000:]
    assert re.search(rf"-m {re.escape(work.step)} ", witnessed[family].read_text())


@pytest.mark.parametrize("family", ["deepspeed", "hulumed_deepspeed"])
def test_deepspeed_is_found_and_asks_for_a_gpu(environments, witnessed, done, family):
    """A CPU goes no further than that: the rule stops there, and DeepSpeed can be imported by what uses it."""
    assert REFUSED in done[family], done[family][-8000:]
    assert f"-m {TRAIN_LORA.step} " in witnessed[family].read_text()
    code = "import deepspeed, transformers.integrations as t; assert t.is_deepspeed_available()"
    subprocess.run([environments[family] / "bin/python", "-c", code], check=True, timeout=300)


def test_every_family_is_run():
    assert sorted([*RUNS, "deepspeed", "hulumed_deepspeed"]) == FAMILIES


# --- on a cluster --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_cluster(place, witnessed) -> Iterator[subprocess.Popen | None]:
    """A job by the repository's own profile, begun while other tests run; None where there can be no cluster."""
    if not shutil.which("slurmctld") or os.geteuid():
        yield None
        return
    command = [ROOT / "tests/slurm/with_cluster.sh", sys.executable, "-m", "snakemake", "--profile", "slurm"]
    command += ["--conda-prefix", place.prefix, "--configfile", place.checkout / "config/demo.yaml", place.small]
    with (place.folder / "cluster.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--", ON_CLUSTER],
            cwd=place.checkout,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_rule_runs_in_its_environment_as_a_slurm_job(place, environments, witnessed, on_cluster):
    """By the profile as it is; the network ends at the cluster, so the environment must be there already."""
    if on_cluster is None:
        pytest.skip("NO TEST CLUSTER HERE: tests/slurm/install.sh says why")
    status = on_cluster.wait(timeout=400)
    text = (place.folder / "cluster.log").read_text()
    assert status == 0, text[-8000:]
    assert "Creating conda environment" not in text
    assert "has been submitted with SLURM jobid" in text
    assert (place.checkout / ON_CLUSTER).is_file()
    assert "--name siglip2" in witnessed["rae"].read_text()
