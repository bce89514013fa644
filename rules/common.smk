"""
What all rule files share: the configuration, the command prefix of steps, resources, model folders.

REQUIRED INPUTS: none; config/config.yaml of the working directory is read if it is there.

OUTPUTS: {results}/config.yaml, the resolved configuration of this run.

Steps are called as `{STEP} scripts.<pipeline>.<step>`, from any working directory and from a
`module:`. A rule's params hold only the numerics that its step reads; execution settings reach the
command line through EXECUTION, outside params, so that changing them reruns nothing.
"""

import functools
import os
import shlex
import sys
from pathlib import Path

ROOT = str(Path(str(workflow.current_basedir)).parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from snakemake.exceptions import WorkflowError
from snakemake.settings.types import DeploymentMethod

from scripts import config as kiln_config
from scripts.common import settings as kiln_settings
from scripts.common.artefacts import write_text
from scripts.common.code_key import code_key
from scripts.common.errors import KilnError
from scripts.retrieve.models import read_table as read_models


def or_stop(function, *arguments):
    """What `function` returns; its KilnError stops the workflow with message and hint, before any job."""
    try:
        return function(*arguments)
    except KilnError as error:
        raise WorkflowError(str(error)) from None


CONFIG = or_stop(kiln_config.load, config, Path("config/config.yaml"))
RESULTS = CONFIG.results
LOGS = f"{RESULTS}/logs"
BENCHMARKS = f"{RESULTS}/benchmarks"
STATE = f"{RESULTS}/state"
MODELS_TABLE = f"{ROOT}/config/models.csv"
MODELS = or_stop(read_models, Path(MODELS_TABLE))

IN_CONDA = DeploymentMethod.CONDA in workflow.deployment_settings.deployment_method
PYTHON = "python" if IN_CONDA else shlex.quote(sys.executable)
STEP_ONLINE = f"env PYTHONPATH={shlex.quote(ROOT)} {PYTHON} -m"
STEP = f"env HF_HUB_OFFLINE=1 PYTHONPATH={shlex.quote(ROOT)} {PYTHON} -m"


def numerics(place=None, /, **places):
    """The numerics of one section (`numerics("vase.split")`) or of several under new names, as JSON."""
    if place:
        return kiln_settings.to_json(kiln_settings.of_kind(kiln_config.section(CONFIG, place), "numerics"))
    values = {name: kiln_config.section(CONFIG, dotted) for name, dotted in places.items()}
    return kiln_settings.to_json({n: kiln_settings.of_kind(v, "numerics") for n, v in values.items()})


class _Execution(dict):
    """EXECUTION[place]: the execution settings of a section as JSON, for use in shell commands."""

    def __missing__(self, place):
        return kiln_settings.to_json(kiln_settings.of_kind(kiln_config.section(CONFIG, place), "execution"))


EXECUTION = _Execution()


GPUS = {
    name: 0 if CONFIG.device == "cpu" else getattr(CONFIG.resources, name).gpu
    for name in type(CONFIG.resources).model_fields
}


def class_threads(name):
    """CPU threads of a resource class."""
    return kiln_config.section(CONFIG, f"resources.{name}").threads


def class_resources(name):
    """Resources of a class; memory and runtime grow with each attempt."""
    asked = kiln_config.section(CONFIG, f"resources.{name}")
    wanted = {
        "mem_mb": lambda wildcards, attempt: asked.mem_mb * attempt,
        "runtime": lambda wildcards, attempt: asked.runtime * attempt,
    }
    if GPUS[name]:
        wanted["gpu"] = GPUS[name]
        if asked.gpu_model:
            wanted["gpu_model"] = asked.gpu_model
    return wanted


def model_folder(name):
    """The folder of a model: retrieved if config/models.csv names it, else the path itself."""
    return f"{CONFIG.models}/{name}" if name in MODELS else name


def model_files(name, *files):
    """What a rule that uses a model waits for; `files` are those of a model given by its path."""
    if name in MODELS:
        return [f"{CONFIG.models}/{name}/files.json"]
    return [f"{name}/{file}" for file in files] if files else [name]


def model_file(name):
    """The one weights file of a model: the only file of a retrieved one, or the path itself."""
    if name not in MODELS:
        return name
    files = MODELS[name].files
    if len(files) != 1:
        raise WorkflowError(f"{name} in config/models.csv has {len(files)} files, expected one\nHint: give a path")
    return f"{CONFIG.models}/{name}/{files[0]}"


onstart:
    write_text(Path(RESULTS, "config.yaml"), kiln_config.to_yaml(CONFIG))
