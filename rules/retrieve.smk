"""
Retrieval of models and data sets: the only rules that download, run where Snakemake itself runs (the login node).

REQUIRED INPUTS: config/models.csv, the table of models; config/models.lock.json and config/datasets.lock.json once
there are such.

OUTPUTS (below the folder `models`, by default resources/models):
    {name}/             the model's files
    {name}/files.json   their names, bytes and sha256
    {name}/meta.json    source, commit, and what else the step records
    and config/models.lock.json, to which the first retrieval of each model adds its commit and hashes; data sets
    likewise, below the folder `datasets` and in config/datasets.lock.json

STEPS: a rule that uses a model or data set waits for its files.json; only what some rule uses is retrieved.

The table is no input: a row is in params instead, so that a changed row reruns its own model only.
"""

import re

from scripts.retrieve.lock import locked_bytes

MODELS_LOCK = f"{ROOT}/config/models.lock.json"
DATASETS_LOCK = f"{ROOT}/config/datasets.lock.json"
DATASETS = {CONFIG.rae.dataset.repo: CONFIG.rae.dataset.wanted()}


rule retrieve_model:
    output:
        listing=f"{CONFIG.models}/{{name}}/files.json",
        meta=f"{CONFIG.models}/{{name}}/meta.json",
    log:
        f"{LOGS}/retrieve_model/{{name}}.log",
    benchmark:
        f"{BENCHMARKS}/retrieve_model/{{name}}.tsv"
    wildcard_constraints:
        name="|".join(map(re.escape, MODELS)) or "(?!)",
    localrule: True
    conda:
        "../envs/retrieve.yaml"
    threads: 1
    resources:
        disk_mb=disk_mb("retrieve_model", measure=lambda w: locked_bytes(Path(MODELS_LOCK), w.name)),
    params:
        step=outside(STEP_ONLINE),
        row=lambda wildcards: MODELS[wildcards.name].identity(),
        code=code_key("scripts.retrieve.model"),
        table=outside(MODELS_TABLE),
        lock=outside(MODELS_LOCK),
        folder=subpath(output.meta, parent=True),
    message:
        "Retrieve model {wildcards.name}"
    shell:
        "{params.step} scripts.retrieve.model"
        " --name {wildcards.name:q}"
        " --models {params.table:q}"
        " --lock {params.lock:q}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule retrieve_dataset:
    output:
        listing=f"{CONFIG.datasets}/{{repo}}/files.json",
        meta=f"{CONFIG.datasets}/{{repo}}/meta.json",
    log:
        f"{LOGS}/retrieve_dataset/{{repo}}.log",
    benchmark:
        f"{BENCHMARKS}/retrieve_dataset/{{repo}}.tsv"
    wildcard_constraints:
        repo="|".join(map(re.escape, DATASETS)),
    localrule: True
    conda:
        "../envs/retrieve.yaml"
    threads: 1
    resources:
        disk_mb=disk_mb("retrieve_dataset", measure=lambda w: locked_bytes(Path(DATASETS_LOCK), w.repo)),
    params:
        step=outside(STEP_ONLINE),
        settings=lambda wildcards: kiln_settings.to_json(DATASETS[wildcards.repo]),
        code=code_key("scripts.retrieve.dataset"),
        lock=outside(DATASETS_LOCK),
        folder=subpath(output.meta, parent=True),
    message:
        "Retrieve data set {wildcards.repo}"
    shell:
        "{params.step} scripts.retrieve.dataset"
        " --settings {params.settings:q}"
        " --lock {params.lock:q}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"
