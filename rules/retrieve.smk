"""
Retrieval of models: the only rule that downloads, run where Snakemake itself runs (the login node).

REQUIRED INPUTS: config/models.csv, the table of models; config/models.lock.json once there is one.

OUTPUTS (below the folder `models`, by default resources/models):
    {name}/             the model's files
    {name}/files.json   their names, bytes and sha256
    {name}/meta.json    source, commit, and what else the step records
    and config/models.lock.json, to which the first retrieval of each model adds its commit and hashes

STEPS: a rule that uses a model waits for its files.json; only models that some rule uses are retrieved.

The table is no input: a row is in params instead, so that a changed row reruns its own model only.
"""

import re

MODELS_LOCK = f"{ROOT}/config/models.lock.json"


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
