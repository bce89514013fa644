"""
What every other .smk file shares: configuration, the command prefix of steps, resources, model folders.

REQUIRED INPUTS: none; config/config.yaml of the working directory is read if it is there.

OUTPUTS: none; rules/guards.smk has what happens around the jobs.

Steps are called as `{params.step} scripts.<pipeline>.<step>`, from any working directory and from a
`module:`. A rule's params record only the numerics that its step reads and its code key; execution
settings, paths of this machine and the like pass through `outside`, so that changing them reruns nothing.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import sys
from pathlib import Path

ROOT = str(Path(str(workflow.current_basedir)).parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

import yaml
from snakemake.common.configfile import load_configfile
from snakemake.exceptions import IncompleteCheckpointException, WorkflowError
from snakemake.logging import logger
from snakemake.settings.types import DeploymentMethod

from scripts import config as kiln_config
from scripts import layouts, needs
from scripts.common import disk, doctor, rehash, retrain, scans, variants
from scripts.common import code_key as code_keys
from scripts.common import settings as kiln_settings
from scripts.common.artefacts import sha256_file
from scripts.common.errors import KilnError
from scripts.common.images import EXTENSIONS
from scripts.common.shards import ShardTable, last, refresh
from scripts.retrieve import names as model_names
from scripts.retrieve.models import read_table as read_models


def or_stop(function, *arguments):
    """What `function` returns; its KilnError stops the workflow with message and hint, before any job."""
    try:
        return function(*arguments)
    except KilnError as error:
        raise WorkflowError(str(error)) from None


if workflow.modifier.path_modifier.prefix or workflow.modifier.path_modifier.modifies_prefixes:
    hint = "leave `prefix` out, and set `results`, `models` and `datasets` in its config"
    raise WorkflowError(f"Kiln as a module has no `prefix`: its steps are told paths that it would miss\nHint: {hint}")

USER_FILE = Path("config/config.yaml").absolute()
if USER_FILE.is_file() and USER_FILE not in map(Path, workflow.configfiles):
    workflow.configfiles.append(str(USER_FILE))  # for Snakemake to name it; it is read below, beneath the others


def origins():
    """(name, values) of what made `config`, later ones on top: files of `configfile:`, of --configfile, --config."""
    asked = workflow.config_settings
    own = [file for file in map(Path, workflow.configfiles) if file not in (USER_FILE, *asked.configfiles)]
    files = [(os.path.relpath(file), load_configfile(file)) for file in [*own, *asked.configfiles]]
    return [*files, ("--config", asked.config)]


GIVEN = (config, Path("config/config.yaml"), origins)
CONFIG = or_stop(kiln_config.load, *GIVEN)
RESULTS = CONFIG.results
LOGS = f"{RESULTS}/logs"
BENCHMARKS = f"{RESULTS}/benchmarks"
STATE = f"{RESULTS}/state"
MODELS_TABLE = f"{ROOT}/config/models.csv"
MODELS = or_stop(read_models, Path(MODELS_TABLE))
IN_ENVIRONMENT = {DeploymentMethod.CONDA, DeploymentMethod.APPTAINER} & set(
    workflow.deployment_settings.deployment_method
)
ADVICE = []  # what a dry run has yet to say


def advise(text):
    """Say what the user should know before the jobs run: at once; in a dry run below its list of jobs, which is long."""
    if workflow.output_settings.dryrun:
        ADVICE.append(text)
    else:
        logger.warning(text)


def look_for_conda():
    """Stop, or warn in a dry run, which then plans without it, if there is no conda to make environments."""
    try:
        doctor.require_conda()
    except KilnError as error:
        if not workflow.output_settings.dryrun:
            raise
        advise(str(error))
        methods = set(workflow.deployment_settings.deployment_method)
        workflow.deployment_settings.deployment_method = methods - {DeploymentMethod.CONDA}


if workflow.is_main_process and DeploymentMethod.CONDA in IN_ENVIRONMENT:
    or_stop(look_for_conda)
PYTHON = "python" if IN_ENVIRONMENT else shlex.quote(sys.executable)
STEP_ONLINE = f"env HF_HUB_OFFLINE=0 PYTHONPATH={shlex.quote(ROOT)} {PYTHON} -m"
STEP = f"env HF_HUB_OFFLINE=1 PYTHONPATH={shlex.quote(ROOT)} {PYTHON} -m"

SHELL_PREFIX = "set -euo pipefail; "
if "SLURM_JOB_ID" in os.environ:
    # Slurm's SIGTERM reaches all processes of a job; without its shell and `tee` a step would end, and a preempted
    # job count as failed instead of being requeued.
    SHELL_PREFIX += "trap '' TERM; "
    shell.prefix(SHELL_PREFIX)


CODES = retrain.Codes(Path(RESULTS, "code"))


def code_key(*modules):
    """The code key of a rule that keys `modules`."""
    return CODES.note(code_keys.code_key(*modules), modules)


def _of_kind(config, kind, place, places):
    if place:
        return kiln_settings.to_json(kiln_settings.of_kind(kiln_config.section(config, place), kind))
    values = {name: kiln_config.section(config, dotted) for name, dotted in places.items()}
    sections = {n: v for n, v in values.items() if isinstance(v, kiln_settings.Settings)}
    plain = {n: v for n, v in values.items() if n not in sections}  # single keys, which are numerics
    return kiln_settings.to_json(plain | {n: kiln_settings.of_kind(v, kind) for n, v in sections.items()})


def numerics(place=None, /, **places):
    """The numerics of one section (`numerics("vase.split")`) or of several under new names, as JSON."""
    return _of_kind(CONFIG, "numerics", place, places)


def execution(place=None, /, **places):
    """The execution settings, likewise; give them to `outside`."""
    return _of_kind(CONFIG, "execution", place, places)


def changed(settings, **values):
    """Settings as JSON, with other values of some."""
    return kiln_settings.to_json(kiln_settings.merge(json.loads(settings), values))


def outside(value):
    """A param that no result depends on: Snakemake neither records nor compares what asks for `output`."""
    return lambda wildcards, output: value


RUNS_OF = {}  # pipeline: its runs


class Runs:
    """The runs of a pipeline: its variants with their seeds; see scripts/common/variants.py.

    Rules of a stage have the name of a run as their wildcard {variant}; a run whose stage another run serves has none
    of its own. `numerics` and `execution` give params functions, `at` an input function.
    """

    def __init__(self, pipeline):
        RUNS_OF[pipeline] = self
        self.section = getattr(CONFIG, pipeline)
        self.configs = or_stop(kiln_config.runs, CONFIG, pipeline)
        self.names = list(self.configs)
        self.first = self.names[0]
        self.pattern = "|".join(self.names)
        self.variant_of = {name: run.variant for name, run in variants.runs(self.section).items()}
        self.serving = {stage: variants.serving(self.section, stage) for stage in self.section.stages}

    def of(self, wildcards):
        """The configuration of the run that a job belongs to."""
        return self.configs[self._run(wildcards.variant)]

    def _run(self, name):
        """The run of that name, or the first one of the variant of that name, where a rule has seeds of its own."""
        return name if name in self.configs else next(run for run in self.names if self.variant_of[run] == name)

    def numerics(self, place=None, /, **places):
        """`numerics` of a job's run; {wildcard} may stand in a place."""
        return lambda wildcards: self._of_kind("numerics", wildcards, place, places)

    def execution(self, place=None, /, **places):
        """`execution` of a job's run, not recorded, as what `outside` gives."""
        return lambda wildcards, output: self._of_kind("execution", wildcards, place, places)

    def _of_kind(self, kind, wildcards, place, places):
        places = {name: dotted.format(**wildcards) for name, dotted in places.items()}
        return _of_kind(self.of(wildcards), kind, place and place.format(**wildcards), places)

    def agreed(self, place):
        """A value that is the same in all runs, since it decides more than the numbers, such as an environment."""
        values = {name: kiln_config.section(one, place) for name, one in self.configs.items()}
        if len(set(values.values())) > 1:
            raise WorkflowError(f"{place} differs between variants: {values}\nHint: give another `results` folder")
        return values[self.first]

    def model_files(self, place):
        """An input function: the files of the model that is named at a place of a job's run, if one is."""
        return lambda wildcards: [
            file
            for name in [kiln_config.section(self.of(wildcards), place)]
            if name
            for file in model_folder_files(name)
        ]

    def model_option(self, option, place):
        """A params function: the option that gives that model's folder; not recorded, as what `outside` gives."""
        return lambda wildcards, output: " ".join(
            f"{option} {shlex.quote(model_folder(name))}"
            for name in [kiln_config.section(self.of(wildcards), place)]
            if name
        )

    def at(self, stage, pattern):
        """The files of an earlier stage, whose names hold {variant}, that serve a job's run."""
        return lambda wildcards: self.path(stage, pattern, **wildcards)

    def path(self, stage, pattern, **wildcards):
        """The file of a stage that serves the run `variant`; a list for a list of patterns."""
        served_by = {**wildcards, "variant": self.serving[stage][self._run(wildcards["variant"])]}
        if isinstance(pattern, str):
            return str(pattern).format(**served_by)
        return [str(one).format(**served_by) for one in pattern]

    def headline(self, *patterns, **wildcards):
        """The files for the first run, that of `main`, whose numbers are the headline."""
        return [path for one in patterns for path in expand(one, variant=self.first, **wildcards)]

    def metrics(self, stage, *patterns, **wildcards):
        """The metrics files of a stage as {file: variant/run}, of each run that has its own."""
        own = [name for name in self.names if self.serving[stage][name] == name]
        return {
            path: f"{self.variant_of[name]}/{name}"
            for name in own
            for one in patterns
            for path in expand(one, variant=name, **wildcards)
        }

    def all(self, stage, /, *patterns, **wildcards):
        """The files of a stage for all runs, each once."""
        served = dict.fromkeys(self.serving[stage].values())
        return [path for name in served for one in patterns for path in expand(one, variant=name, **wildcards)]


GPUS = {
    name: 0 if CONFIG.device == "cpu" else getattr(CONFIG.resources, name).gpu
    for name in type(CONFIG.resources).model_fields
}
SNAKEMAKE_MB = 300  # of a job's memory: the two Snakemake processes around its step


def resource_class(name):
    """The settings of a resource class."""
    return or_stop(kiln_config.resource_class, CONFIG, name)


def class_processes(name):
    """How many processes train in a class: one per GPU, on each of its nodes at least one."""
    return resource_class(name).nodes * max(1, GPUS[name])


def launcher(name):
    """A params function: the launcher's options for a resource class; not recorded, as what `outside` gives."""
    asked = resource_class(name)

    def options(wildcards, output, resources):
        several = f"--nodes {asked.nodes} " if asked.nodes > 1 else ""
        or_cpu = " --or-cpu" if CONFIG.device == "auto" else ""
        return f"{several}--gpus {GPUS[name]}{or_cpu} --minutes {resources.runtime}"

    return options


def class_threads(name):
    """CPU threads of a resource class."""
    return resource_class(name).threads


def class_resources(name):
    """Resources of a class; memory and runtime grow with each attempt."""
    asked, gpus = resource_class(name), GPUS[name]
    wanted = {
        "mem_mb": lambda wildcards, attempt: asked.mem_mb * attempt + SNAKEMAKE_MB,
        "runtime": lambda wildcards, attempt: asked.runtime * attempt,
    }
    if asked.constraint:
        wanted["constraint"] = asked.constraint
    if asked.nodes > 1:
        # With `mpi`, the rule's own command starts its tasks. `gpu` would count those of all nodes together.
        wanted |= {"mpi": "srun", "nodes": asked.nodes, "tasks": asked.nodes}
        if gpus:
            model = f"{asked.gpu_model}:" if asked.gpu_model else ""
            wanted["slurm_extra"] = f"--gpus-per-node={model}{gpus}"
    elif gpus:
        wanted["gpu"] = gpus
        if asked.gpu_model:
            wanted["gpu_model"] = asked.gpu_model
    return wanted


WRITES = {}  # rule: what a job of it writes, of those that write much


def disk_mb(rule, *alike, measure=None):
    """A resource: MB (1e6 bytes) that a job of a rule, or of one like it, writes, as far as known: scripts/needs.py.

    It is not recorded, so nothing is rerun when it changes. `measure` is a params function.
    """

    def needed(wildcards):
        runs = RUNS_OF.get(rule.partition("_")[0])
        own = runs.of(wildcards) if runs and "variant" in wildcards.keys() else CONFIG
        measured = None
        with contextlib.suppress(KilnError, WorkflowError):  # the job's own input or params say why, and stop
            measured = measure and measure(wildcards)
        return needs.of_rule(rule, needs.Job(own, dict(wildcards.items()), model_folder, measured))

    WRITES.update(dict.fromkeys((rule, *alike), needed))
    if not workflow.is_main_process:
        return 0
    return lambda wildcards: sum(one.bytes or 0 for one in needed(wildcards)) // 10**6


def is_listed(name):
    """Whether a model is one of config/models.csv; else it is a path. A misspelt name stops the workflow."""
    return or_stop(model_names.is_listed, name, MODELS)


def model_files(name, *files):
    """What a rule that uses a model waits for; `files` are those of a model given by its path."""
    if is_listed(name):
        return [f"{CONFIG.models}/{name}/files.json"]
    return [f"{name}/{file}" for file in files] if files else [os.path.expanduser(name)]


def model_file(name):
    """The one weights file of a model: the only file of a retrieved one, or the path itself."""
    if not is_listed(name):
        return os.path.expanduser(name)
    files = MODELS[name].files
    if len(files) != 1:
        raise WorkflowError(f"{name} in config/models.csv has {len(files)} files, expected one\nHint: give a path")
    return f"{CONFIG.models}/{name}/{files[0]}"


def model_folder(name):
    """The folder of a model that consists of several files."""
    return f"{CONFIG.models}/{name}" if is_listed(name) else os.path.expanduser(name)


def model_folder_files(name):
    """What a rule that uses such a model waits for, and is rerun by."""
    folder = model_folder(name)
    if name in MODELS or folder.startswith(f"{RESULTS}/demo/"):
        return [f"{folder}/files.json"]
    return [f"{folder}/config.json", *sorted(map(str, Path(folder).glob("*.safetensors")))]


def model_card_options(name):
    """What a model card says of the model that it was made from."""
    row = MODELS.get(name)
    if row is None:
        return "--base-name 'a model given as a folder' --licence unknown"
    hub = f" --hub-name {row.source}" if row.kind == "hub" else ""
    return f"--base-name {shlex.quote(name)}{hub} --licence {shlex.quote(row.licence)}"


def file_digest(path):
    """sha256 of a small file of the user's that a step reads by its path, or None: its content is a numeric too."""
    return sha256_file(Path(path)) if path and Path(path).is_file() else None


DRAWN = ("draw_vases", "draw_ultrasound", "draw_digits", "draw_slides", "draw_figures")


def drawn(path):
    """An input function: what must be made before a folder or table of the demo can be read; else nothing."""
    name = next((one for one in DRAWN if path and path.startswith(f"{RESULTS}/demo/{one}/")), None)
    return lambda wildcards: [getattr(checkpoints, f"demo_{name}").get().output.listing] if name else []


def served(path, consumer):
    """The hub on this machine that goes with a folder of the demo, which `consumer` has for itself; else nothing."""
    drawn_here = path and path.startswith(f"{RESULTS}/demo/draw_figures/")
    return [f"{RESULTS}/demo/serve_hub/{consumer}.url"] if drawn_here else []


def endpoint(hub):
    """What precedes a step that reads from a hub of `served`."""
    return " ".join(f"env HF_ENDPOINT=$(cat {shlex.quote(str(url))})" for url in hub)


def once_drawn(path, function):
    """A params function: what `function` finds in a folder; nothing while the demo has yet to draw it."""

    def found(wildcards):
        try:
            drawn(path)(wildcards)
        except IncompleteCheckpointException:
            return None
        return or_stop(function, wildcards)

    return found


def optional_table(path):
    """An input function: the table of that path; the drawing that makes it, if it is the demo's; or nothing."""
    return lambda wildcards: drawn(path)(wildcards) or ([users_file(path)] if path else [])


def users_file(path):
    """A path of the configuration; if no file of the user's is there, the workflow stops and names its key.

    Of a module, other rules may make it; nor is it looked at where Kiln itself makes it.
    """
    others = workflow.modifier.parent_modifier is not None or path.startswith(f"{RESULTS}/")
    if workflow.is_main_process and not others:
        or_stop(of_folder, path, layouts.require_file, path)
    return path


def of_folder(folder, function, *arguments):
    """What `function` finds at a path of the configuration; its KilnError names the key and what it is to hold."""
    try:
        return function(*arguments)
    except KilnError as error:
        keys = kiln_config.keys_of(CONFIG, folder)
        by = [one for one in (kiln_config.giver(key, *GIVEN) for key in keys) if one]
        if by:
            told = f", given by {' and '.join(dict.fromkeys(by))}"
        else:
            told = ", the default" + ("" if GIVEN[1].is_file() else "; there is no config/config.yaml here")
        raise layouts.explained(error, folder, keys, told, CONFIG.pipelines) from None


def folder_facts(folder, extensions=EXTENSIONS, may_be_empty=False):
    """What is known of a folder's images, or of its files with other endings: see `scans.Facts`. Scanned once a run."""
    return _folder_facts(folder, extensions, may_be_empty)  # a cache tells a default from the same value that is given


@functools.cache
def _folder_facts(folder, extensions, may_be_empty):
    main = workflow.is_main_process
    seen = scans.Seen(Path(STATE, "scans"), again=main and CONFIG.rescan, write=main and not workflow.dryrun)
    spoken = logger.warning if main else logger.debug
    return of_folder(folder, seen.facts, Path(folder), extensions, may_be_empty, spoken)


def folder_digest(folder, extensions=EXTENSIONS, may_be_empty=False, look=None):
    """A params function: digest of names, sizes and mtimes of a folder's images, or of its files with other endings.

    `look` gets the folder and how many files lie below each of its own, and may refuse them before any job.
    """

    def digest(wildcards):
        if not folder:
            return None
        found = folder_facts(folder, extensions, may_be_empty)
        if look and workflow.is_main_process:
            of_folder(folder, look, Path(folder), found.tops)
        return found.digest

    return once_drawn(folder, digest)


class ShardedFolder:
    """A folder of images in append-only shards: scanned once by the main process, read by its jobs.

    `digest` and `ignored` are params functions; `expand(pattern)` is an input function. `inspected` is the folder of
    the shards' tables (columns path, sha256). `look` gets the paths, and may refuse them before any job.
    """

    def __init__(self, pipeline, folder, per_shard, inspected, look=None):
        self.folder, self.per_shard, self.inspected, self.look = folder, per_shard, Path(inspected), look
        self.table = f"{STATE}/{pipeline}/shards.parquet"
        self.digest = once_drawn(folder, lambda wildcards: self.now().digest(wildcards.shard))
        self.ignored = once_drawn(folder, lambda wildcards: self.now().ignored)
        self.count = once_drawn(folder, lambda wildcards: len(self.now().rows(wildcards.shard)))

    @functools.cache
    def now(self):
        table, folder, write = Path(self.table), Path(self.folder), not workflow.dryrun
        if not workflow.is_main_process:
            return ShardTable.load(table)
        found = None if CONFIG.rescan or CONFIG.rehash else last(table, logger.warning)
        if found is None:
            made = self.inspected.glob("s*.parquet")
            given = (table, folder, EXTENSIONS, self.per_shard, write, made, logger.warning)
            found = of_folder(self.folder, refresh, *given)
        if self.look:
            of_folder(self.folder, self.look, (path.as_py() for path in found.files["path"]))
        if CONFIG.rehash:
            found = rehash.mark_changed(found, table, folder, self.inspected, write, logger.warning)
        return found

    def expand(self, pattern):
        def paths(wildcards):
            drawn(self.folder)(wildcards)
            return [pattern.format(**{**wildcards, "shard": shard}) for shard in or_stop(self.now).names()]

        return paths


def of_shard(path):
    """An output for each shard that can be made anew; it goes once it is read, if the user wants the room."""
    return path if CONFIG.keep_shards else temp(path)


def kept(step):
    """A params function: the option that keeps a shard's results by item, unless the user wants the room."""

    def option(wildcards, output):
        place = Path(STATE, step, wildcards.get("variant", ""))
        return f"--state-folder {shlex.quote(str(place))}" if CONFIG.keep_shards else ""

    return option


def marked_pictures():
    """What all rules so far mark for reports, of the first run of each pipeline: see scripts/report/pictures.py."""
    outputs = [output for rule in workflow.rules for output in rule.output if output.flags.get("report")]
    marked = [(str(output), output.flags["report"]) for output in outputs]
    return [
        {
            "pattern": re.sub(r"\{variant\b[^{}]*\}", RUNS_OF[of.category].first, path),
            "caption": str(of.caption),
            "category": of.category,
            "labels": {name: text for name, text in of.labels.items() if name != "variant"},
        }
        for path, of in marked
    ]
