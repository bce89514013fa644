"""
Pipeline biomedica: figures with captions, on disk and streamed from the Hugging Face hub, to a CLIP model and its scores.

REQUIRED INPUTS (config section `biomedica`):
    shards        optional: folder of local tar shards (jpg, txt, json by key); without it all is streamed
    remote.repo   optional: data set of tar shards on the hub, read at one revision; null: local pairs alone
    HF_TOKEN      in the environment, if the repo is gated

OUTPUTS (below {results}/biomedica/):
    index_local/    index.parquet, shards.parquet, rejected.tsv, summary.json: what the local shards hold
    list_remote/    shards.parquet, summary.json: the repo's shards at a pinned revision
    hold_out/       validation.parquet, test.parquet, summary.json: pairs of articles that no training sees
  and for each run of a variant (`main` is the configuration itself; a training is shared by the runs of its variant):
    plan/{variant}/{arm}/     plan.json, plan.png: how many pairs from where, which shards for which epoch, bytes
    train_clip/{variant}/{arm}-{seed}/   model.safetensors (best by validation), last.safetensors, metrics.json
    draw_curves/{variant}/{arm}-{seed}/  loss.png, retrieval.png
    evaluate/{variant}/       metrics.json, scores.png, retrieval.png, confusion.png, runs.png (with `compare_seeds`)
    export/{variant}/         model/: a folder that open_clip loads as local-dir:
    describe_model/{variant}/ README.md, the card

STEPS: index, list, hold out, plan, train (while streaming), evaluate, export, describe.

The arm `hybrid` trains on local and streamed pairs, `local` as many steps on local ones alone, for comparison.
"""

from scripts.biomedica.settings import ARMS as BIOMEDICA_ARMS

BIOMEDICA = f"{RESULTS}/biomedica"
BIOMEDICA_RUNS = Runs("biomedica")
BIOMEDICA_SHARDS = CONFIG.biomedica.shards
BIOMEDICA_REPO = CONFIG.biomedica.remote.repo
BIOMEDICA_LOCAL = f"--shards {shlex.quote(BIOMEDICA_SHARDS)}" if BIOMEDICA_SHARDS else ""
BIOMEDICA_SEEDS = [f"{arm}-{seed}" for seed in CONFIG.biomedica.compare_seeds for arm in BIOMEDICA_ARMS]
BIOMEDICA_TRAINED = {
    name: f"{BIOMEDICA}/train_clip/{BIOMEDICA_RUNS.variant_of[name]}/hybrid-{one.biomedica.train.seed}"
    for name, one in BIOMEDICA_RUNS.configs.items()
}
BIOMEDICA_TRAININGS = sorted(  # of all variants, as {variant}/{arm}-{seed}
    {"/".join(Path(path).parts[-2:]) for path in BIOMEDICA_TRAINED.values()}
    | {f"{variant}/{run}" for variant in BIOMEDICA_RUNS.variant_of.values() for run in BIOMEDICA_SEEDS}
)
BIOMEDICA_TRAIN_CLASS = "network" if BIOMEDICA_REPO else CONFIG.biomedica.resources
BIOMEDICA_TRAIN_CODE = ("scripts.common.devices", "scripts.biomedica.training", "scripts.biomedica.hybrid")
BIOMEDICA_PICTURES = ("scores", "retrieval", "confusion", *(("runs",) if BIOMEDICA_SEEDS else ()))
BIOMEDICA_LOOK = functools.partial(layouts.require_shards, default=kiln_config.Config().biomedica.shards, say=advise)
BIOMEDICA_DEMO = bool(served(BIOMEDICA_SHARDS, "any"))


rule biomedica_index_local:
    input:
        shards=drawn(BIOMEDICA_SHARDS),
    output:
        index=f"{BIOMEDICA}/index_local/index.parquet",
        shards=f"{BIOMEDICA}/index_local/shards.parquet",
        rejected=f"{BIOMEDICA}/index_local/rejected.tsv",
        summary=f"{BIOMEDICA}/index_local/summary.json",
        meta=f"{BIOMEDICA}/index_local/meta.json",
    log:
        f"{LOGS}/biomedica/index_local.log",
    benchmark:
        f"{BENCHMARKS}/biomedica/index_local.tsv"
    conda:
        "../envs/vision.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        shards=outside(BIOMEDICA_LOCAL),
        state=outside(f"{STATE}/biomedica/index_local"),
        execution=outside(execution(index="biomedica.index")),
        settings=numerics(index="biomedica.index", held_out="biomedica.held_out"),
        code=code_key("scripts.biomedica.index_local"),
        files=folder_digest(BIOMEDICA_SHARDS, (".tar",), may_be_empty=True, look=BIOMEDICA_LOOK),
        folder=subpath(output.index, parent=True),
    message:
        "Index the local shards"
    shell:
        "{params.step} scripts.biomedica.index_local"
        " {params.shards}"
        " --state-folder {params.state:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule biomedica_list_remote:
    input:
        hub=served(BIOMEDICA_SHARDS, "list_remote"),
        index=rules.biomedica_index_local.output.summary,
    output:
        shards=f"{BIOMEDICA}/list_remote/shards.parquet",
        summary=f"{BIOMEDICA}/list_remote/summary.json",
        meta=f"{BIOMEDICA}/list_remote/meta.json",
    log:
        f"{LOGS}/biomedica/list_remote.log",
    benchmark:
        f"{BENCHMARKS}/biomedica/list_remote.tsv"
    localrule: True
    conda:
        "../envs/streaming.yaml"
    threads: 1
    params:
        step=outside(STEP_ONLINE),
        hub=outside(endpoint(served(BIOMEDICA_SHARDS, "list_remote"))),
        index=subpath(input.index, parent=True),
        execution=outside(execution(remote="biomedica.remote")),
        settings=changed(
            numerics(remote="biomedica.remote"),
            samples=max(one.biomedica.plan.samples for one in BIOMEDICA_RUNS.configs.values()),
        ),
        code=code_key("scripts.biomedica.list_remote"),
    message:
        "List the shards of the repo"
    shell:
        "{params.hub} {params.step} scripts.biomedica.list_remote"
        " --index {params.index:q}"
        " --output {output.shards:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule biomedica_hold_out:
    input:
        index=rules.biomedica_index_local.output.index,
        remote=rules.biomedica_list_remote.output.shards,
    output:
        validation=f"{BIOMEDICA}/hold_out/validation.parquet",
        test=f"{BIOMEDICA}/hold_out/test.parquet",
        summary=f"{BIOMEDICA}/hold_out/summary.json",
        meta=f"{BIOMEDICA}/hold_out/meta.json",
    log:
        f"{LOGS}/biomedica/hold_out.log",
    benchmark:
        f"{BENCHMARKS}/biomedica/hold_out.tsv"
    localrule: True
    conda:
        "../envs/streaming.yaml"
    threads: 1
    params:
        step=outside(STEP_ONLINE),
        shards=outside(BIOMEDICA_LOCAL),
        index=subpath(input.index, parent=True),
        remote=subpath(input.remote, parent=True),
        execution=outside(execution(remote="biomedica.remote")),
        settings=numerics(index="biomedica.index", remote="biomedica.remote", held_out="biomedica.held_out"),
        code=code_key("scripts.biomedica.hold_out"),
        folder=subpath(output.test, parent=True),
    message:
        "Hold out validation and test articles"
    shell:
        "{params.step} scripts.biomedica.hold_out"
        " {params.shards}"
        " --index {params.index:q}"
        " --remote {params.remote:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule biomedica_plan:
    input:
        index=rules.biomedica_index_local.output.index,
        remote=rules.biomedica_list_remote.output.shards,
    output:
        plan=f"{BIOMEDICA}/plan/{{variant}}/{{arm}}/plan.json",
        picture=report(
            f"{BIOMEDICA}/plan/{{variant}}/{{arm}}/plan.png",
            caption="captions/biomedica_plan.rst",
            category="biomedica",
            labels={"step": "plan", "variant": "{variant}", "picture": "{arm}"},
        ),
        meta=f"{BIOMEDICA}/plan/{{variant}}/{{arm}}/meta.json",
    log:
        f"{LOGS}/biomedica/plan/{{variant}}/{{arm}}.log",
    benchmark:
        f"{BENCHMARKS}/biomedica/plan/{{variant}}/{{arm}}.tsv"
    wildcard_constraints:
        variant=BIOMEDICA_RUNS.pattern,
        arm="|".join(BIOMEDICA_ARMS),
    conda:
        "../envs/vision.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        index=subpath(input.index, parent=True),
        remote=subpath(input.remote, parent=True),
        settings=BIOMEDICA_RUNS.numerics(plan="biomedica.plan", held_out="biomedica.held_out"),
        code=code_key("scripts.biomedica.plan"),
    message:
        "Plan the {wildcards.arm} epochs ({wildcards.variant})"
    shell:
        "{params.step} scripts.biomedica.plan"
        " --index {params.index:q}"
        " --remote {params.remote:q}"
        " --arm {wildcards.arm}"
        " --output {output.plan:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule biomedica_train_clip:
    input:
        hub=lambda wildcards: (
            served(BIOMEDICA_SHARDS, f"train-{wildcards.variant}-{wildcards.seed}")
            if wildcards.arm == "hybrid"
            else []
        ),
        plan=BIOMEDICA_RUNS.at("plan", rules.biomedica_plan.output.plan),
        index=rules.biomedica_index_local.output.index,
        remote=rules.biomedica_list_remote.output.shards,
        validation=rules.biomedica_hold_out.output.validation,
        weights=BIOMEDICA_RUNS.model_files("biomedica.model.weights"),
    output:
        weights=f"{BIOMEDICA}/train_clip/{{variant}}/{{arm}}-{{seed}}/model.safetensors",
        last=f"{BIOMEDICA}/train_clip/{{variant}}/{{arm}}-{{seed}}/last.safetensors",
        metrics=f"{BIOMEDICA}/train_clip/{{variant}}/{{arm}}-{{seed}}/metrics.json",
        counts=f"{BIOMEDICA}/train_clip/{{variant}}/{{arm}}-{{seed}}/remote_index.parquet",
        rejected=f"{BIOMEDICA}/train_clip/{{variant}}/{{arm}}-{{seed}}/remote_rejected.tsv",
        meta=f"{BIOMEDICA}/train_clip/{{variant}}/{{arm}}-{{seed}}/meta.json",
    log:
        f"{LOGS}/biomedica/train_clip/{{variant}}/{{arm}}-{{seed}}.log",
    benchmark:
        f"{BENCHMARKS}/biomedica/train_clip/{{variant}}/{{arm}}-{{seed}}.tsv"
    wildcard_constraints:
        variant="|".join(BIOMEDICA_RUNS.variant_of.values()),
        arm="|".join(BIOMEDICA_ARMS),
        seed=r"\d+",
    conda:
        "../envs/streaming.yaml"
    threads: class_threads(BIOMEDICA_TRAIN_CLASS)
    resources:
        **class_resources(BIOMEDICA_TRAIN_CLASS),
        disk_mb=disk_mb("biomedica_train_clip"),
    params:
        step=outside(STEP_ONLINE if BIOMEDICA_REPO else STEP),
        hub=lambda wildcards, input, output: endpoint(input.hub),
        shards=outside(BIOMEDICA_LOCAL),
        init=BIOMEDICA_RUNS.model_option("--weights", "biomedica.model.weights"),
        index=subpath(input.index, parent=True),
        remote=subpath(input.remote, parent=True),
        held_out=subpath(input.validation, parent=True),
        execution=BIOMEDICA_RUNS.execution(remote="biomedica.remote", train="biomedica.train"),
        device=outside(CONFIG.device),
        launcher=launcher(BIOMEDICA_TRAIN_CLASS),
        state=outside(f"{STATE}/biomedica/train_clip"),
        tracker=outside(f"{LOGS}/biomedica/train_clip"),
        settings=lambda wildcards: changed(
            BIOMEDICA_RUNS.numerics(
                index="biomedica.index",
                remote="biomedica.remote",
                held_out="biomedica.held_out",
                plan="biomedica.plan",
                model="biomedica.model",
                train="biomedica.train",
            )(wildcards),
            train={"seed": int(wildcards.seed)},
        ),
        code=code_key(*BIOMEDICA_TRAIN_CODE),
        folder=subpath(output.weights, parent=True),
    message:
        "Train the CLIP model on {wildcards.arm} data, seed {wildcards.seed} ({wildcards.variant})"
    shell:
        "{params.hub} {params.step} scripts.common.launch {params.launcher} -- scripts.biomedica.train_clip"
        " --plan {input.plan:q}"
        " --index {params.index:q}"
        " {params.shards}"
        " --remote {params.remote:q}"
        " --held-out {params.held_out:q}"
        " {params.init}"
        " --state-folder {params.state:q}/{wildcards.variant}/{wildcards.arm}-{wildcards.seed}"
        " --tracker-folder {params.tracker:q}/{wildcards.variant}/{wildcards.arm}-{wildcards.seed}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule biomedica_draw_curves:
    input:
        metrics=rules.biomedica_train_clip.output.metrics,
    output:
        loss=report(
            f"{BIOMEDICA}/draw_curves/{{variant}}/{{arm}}-{{seed}}/loss.png",
            caption="captions/biomedica_loss.rst",
            category="biomedica",
            labels={"step": "train {arm}, seed {seed}", "variant": "{variant}", "picture": "loss"},
        ),
        retrieval=report(
            f"{BIOMEDICA}/draw_curves/{{variant}}/{{arm}}-{{seed}}/retrieval.png",
            caption="captions/biomedica_retrieval.rst",
            category="biomedica",
            labels={"step": "train {arm}, seed {seed}", "variant": "{variant}", "picture": "retrieval"},
        ),
        meta=f"{BIOMEDICA}/draw_curves/{{variant}}/{{arm}}-{{seed}}/meta.json",
    log:
        f"{LOGS}/biomedica/draw_curves/{{variant}}/{{arm}}-{{seed}}.log",
    benchmark:
        f"{BENCHMARKS}/biomedica/draw_curves/{{variant}}/{{arm}}-{{seed}}.tsv"
    wildcard_constraints:
        variant="|".join(BIOMEDICA_RUNS.variant_of.values()),
        arm="|".join(BIOMEDICA_ARMS),
        seed=r"\d+",
    conda:
        "../envs/report.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        code=code_key("scripts.biomedica.draw_curves", "scripts.common.plots"),
        folder=subpath(output.meta, parent=True),
    message:
        "Draw the curves of {wildcards.arm} data, seed {wildcards.seed} ({wildcards.variant})"
    shell:
        "{params.step} scripts.biomedica.draw_curves"
        " --metrics {input.metrics:q}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule biomedica_evaluate:
    input:
        test=rules.biomedica_hold_out.output.test,
        checkpoint=lambda w: f"{BIOMEDICA_TRAINED[w.variant]}/model.safetensors",
        runs=lambda w: expand(
            f"{BIOMEDICA}/train_clip/{BIOMEDICA_RUNS.variant_of[w.variant]}/{{run}}/last.safetensors",
            run=BIOMEDICA_SEEDS,
        ),
        weights=BIOMEDICA_RUNS.model_files("biomedica.model.weights"),
    output:
        metrics=f"{BIOMEDICA}/evaluate/{{variant}}/metrics.json",
        pictures=[
            report(
                f"{BIOMEDICA}/evaluate/{{variant}}/{name}.png",
                caption=f"captions/biomedica_evaluate_{name}.rst",
                category="biomedica",
                labels={"step": "evaluate", "variant": "{variant}", "picture": name},
            )
            for name in BIOMEDICA_PICTURES
        ],
        meta=f"{BIOMEDICA}/evaluate/{{variant}}/meta.json",
    log:
        f"{LOGS}/biomedica/evaluate/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/biomedica/evaluate/{{variant}}.tsv"
    wildcard_constraints:
        variant=BIOMEDICA_RUNS.pattern,
    conda:
        "../envs/clip.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
    params:
        step=outside(STEP),
        device=outside(CONFIG.device),
        launcher=launcher("gpu_single"),
        held_out=subpath(input.test, parent=True),
        init=BIOMEDICA_RUNS.model_option("--weights", "biomedica.model.weights"),
        runs=lambda wildcards, input: " ".join(
            [
                *["--runs"][: len(BIOMEDICA_SEEDS)],
                *(f"{run}={shlex.quote(path)}" for run, path in zip(BIOMEDICA_SEEDS, input.runs, strict=True)),
            ]
        ),
        settings=BIOMEDICA_RUNS.numerics(evaluate="biomedica.evaluate", model="biomedica.model"),
        code=code_key("scripts.biomedica.evaluate", "scripts.common.plots"),
        folder=subpath(output.metrics, parent=True),
    message:
        "Score retrieval and zero-shot classification ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.biomedica.evaluate"
        " --held-out {params.held_out:q}"
        " --checkpoint {input.checkpoint:q}"
        " {params.init}"
        " {params.runs}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule biomedica_export:
    input:
        checkpoint=rules.biomedica_evaluate.input.checkpoint,
        weights=BIOMEDICA_RUNS.model_files("biomedica.model.weights"),
    output:
        listing=f"{BIOMEDICA}/export/{{variant}}/model/files.json",
        meta=f"{BIOMEDICA}/export/{{variant}}/meta.json",
    log:
        f"{LOGS}/biomedica/export/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/biomedica/export/{{variant}}.tsv"
    wildcard_constraints:
        variant=BIOMEDICA_RUNS.pattern,
    conda:
        "../envs/clip.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        init=BIOMEDICA_RUNS.model_option("--weights", "biomedica.model.weights"),
        code=code_key("scripts.biomedica.export"),
        folder=subpath(output.listing, parent=True),
    message:
        "Export the CLIP model for open_clip ({wildcards.variant})"
    shell:
        "{params.step} scripts.biomedica.export"
        " --checkpoint {input.checkpoint:q}"
        " {params.init}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule biomedica_describe_model:
    input:
        metrics=rules.biomedica_evaluate.output.metrics,
        training=lambda w: f"{BIOMEDICA_TRAINED[w.variant]}/meta.json",
        index=rules.biomedica_index_local.output.summary,
        remote=rules.biomedica_list_remote.output.summary,
        held_out=rules.biomedica_hold_out.output.summary,
        plan=lambda w: BIOMEDICA_RUNS.path("plan", rules.biomedica_plan.output.plan, variant=w.variant, arm="hybrid"),
        model=rules.biomedica_export.output.listing,
    output:
        card=f"{BIOMEDICA}/describe_model/{{variant}}/README.md",
        model=f"{BIOMEDICA}/describe_model/{{variant}}/model/files.json",
        meta=f"{BIOMEDICA}/describe_model/{{variant}}/meta.json",
    log:
        f"{LOGS}/biomedica/describe_model/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/biomedica/describe_model/{{variant}}.tsv"
    wildcard_constraints:
        variant=BIOMEDICA_RUNS.pattern,
    conda:
        "../envs/clip.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        base=lambda w: " ".join(
            model_card_options(one) for one in [BIOMEDICA_RUNS.of(w).biomedica.model.weights] if one
        ),
        demo="--demo" if BIOMEDICA_DEMO else "",
        model=subpath(input.model, parent=True),
        code=code_key("scripts.biomedica.describe_model"),
        folder=subpath(output.card, parent=True),
    message:
        "Describe the CLIP model ({wildcards.variant})"
    shell:
        "{params.step} scripts.biomedica.describe_model"
        " --metrics {input.metrics:q}"
        " --training-meta {input.training:q}"
        " --index-summary {input.index:q}"
        " --remote-summary {input.remote:q}"
        " --held-out-summary {input.held_out:q}"
        " --plan {input.plan:q}"
        " --weights {params.model:q}"
        " {params.base}"
        " {params.demo}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule biomedica:
    input:
        [f"{BIOMEDICA}/draw_curves/{one}/loss.png" for one in BIOMEDICA_TRAININGS],
        BIOMEDICA_RUNS.all(
            "train",
            rules.biomedica_evaluate.output.metrics,
            rules.biomedica_export.output.listing,
            rules.biomedica_describe_model.output.card,
        ),
