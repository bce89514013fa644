"""
Pipeline busi: breast-ultrasound folders to a leak-free split, a fine-tuned medical VLM and its classification report.

REQUIRED INPUTS (config section `busi`):
    images      folder with one folder of images per class; masks beside them
    audits      optional published splits to audit beside ours
    base.model  the vision-language model to start from

OUTPUTS (below {results}/busi/):
    list_images/           manifest.parquet, masks.parquet, quarantine.tsv, summary.json
    find_duplicates/       groups.parquet, pairs.parquet, conflicts.png
    split/                 splits.csv: a side for each image, whole duplicate groups; left_out.tsv
    audit_split/{split}/   leakage_report.json of our split and of published ones
    build_conversations/   chat rows (.jsonl) and published rows (.json) of each side
  and for each run of a variant (`main` is the configuration itself; base is predicted once, as main's):
    train_lora/{variant}/{method}/   final_model/ (adapter, tokenizer, processor), metrics.json
    draw_curves/{variant}/{method}/  loss.png
    merge/{variant}/{method}/        model/ (merged weights), parity.json
    predict/{variant}/{model}/       predictions.csv of the test side, by base and merged models
    evaluate/{variant}/              metrics.json, confusion.png, calibration.png
    describe_model/{variant}/{method}/  README.md, the model card

STEPS: list, find duplicates, split, audit, build conversations, train (LoRA, QLoRA), merge, predict, evaluate,
describe.
"""

BUSI = f"{RESULTS}/busi"
BUSI_RUNS = Runs("busi")
BUSI_SPLIT = CONFIG.busi.conversations.split
BUSI_USED = "ours" if BUSI_SPLIT == "ours" else "published"
BUSI_SPLITS = {  # option: file of each split that is audited or used
    "ours": {"--splits": f"{BUSI}/split/splits.csv"},
    **({} if BUSI_SPLIT == "ours" else {"published": {"--train": BUSI_SPLIT.train, "--test": BUSI_SPLIT.test}}),
    **{name: {"--train": one.train, "--test": one.test} for name, one in CONFIG.busi.audits.items()},
}
BUSI_OPTIONS = {
    name: " ".join(f"{option} {shlex.quote(path)}" for option, path in files.items())
    for name, files in BUSI_SPLITS.items()
}
BUSI_MODELS = ["base", *CONFIG.busi.methods]
BUSI_BASE = model_folder(CONFIG.busi.base.model)
BUSI_ENV = {"qwen": "vlm", "hulumed": "hulumed"}[CONFIG.busi.base.family]
BUSI_DEEPSPEED_ENV = {"qwen": "deepspeed", "hulumed": "hulumed_deepspeed"}[CONFIG.busi.base.family]
BUSI_TRAIN_ENV = BUSI_ENV if BUSI_RUNS.agreed("busi.train.deepspeed") == "none" else BUSI_DEEPSPEED_ENV
BUSI_TRAIN_CODE = (
    "scripts.common.devices",
    "scripts.common.vlm",
    "scripts.busi.chat_examples",
    "scripts.busi.fine_tuning",
    "scripts.busi.lora",
)
BUSI_CARD = model_card_options(CONFIG.busi.base.model) + (
    " --demo" if CONFIG.busi.images.startswith(f"{RESULTS}/demo/") else ""
)
BUSI_CLASSES = " ".join(map(shlex.quote, CONFIG.busi.list.classes))
BUSI_LOOK = functools.partial(layouts.require_classes, classes=CONFIG.busi.list.classes, key="busi.list.classes")


rule busi_list_images:
    input:
        drawn(CONFIG.busi.images),
    output:
        manifest=f"{BUSI}/list_images/manifest.parquet",
        masks=f"{BUSI}/list_images/masks.parquet",
        quarantine=f"{BUSI}/list_images/quarantine.tsv",
        summary=f"{BUSI}/list_images/summary.json",
        meta=f"{BUSI}/list_images/meta.json",
    log:
        f"{LOGS}/busi/list_images.log",
    benchmark:
        f"{BENCHMARKS}/busi/list_images.tsv"
    conda:
        "../envs/tables.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.busi.images),
        settings=numerics("busi.list"),
        code=code_key("scripts.busi.list_images"),
        files=folder_digest(CONFIG.busi.images, look=BUSI_LOOK),
        folder=subpath(output.meta, parent=True),
    message:
        "List the ultrasound images and their masks"
    shell:
        "{params.step} scripts.busi.list_images"
        " --images {params.images:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule busi_find_duplicates:
    input:
        manifest=rules.busi_list_images.output.manifest,
    output:
        groups=f"{BUSI}/find_duplicates/groups.parquet",
        pairs=f"{BUSI}/find_duplicates/pairs.parquet",
        summary=f"{BUSI}/find_duplicates/summary.json",
        sheet=report(
            f"{BUSI}/find_duplicates/conflicts.png",
            caption="captions/busi_conflicts.rst",
            category="busi",
            labels={"step": "find_duplicates", "picture": "conflicts and closest pairs"},
        ),
        meta=f"{BUSI}/find_duplicates/meta.json",
    log:
        f"{LOGS}/busi/find_duplicates.log",
    benchmark:
        f"{BENCHMARKS}/busi/find_duplicates.tsv"
    conda:
        "../envs/vision.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.busi.images),
        classes=BUSI_CLASSES,
        execution=outside(execution("busi.duplicates")),
        settings=numerics("busi.duplicates"),
        code=code_key("scripts.busi.find_duplicates"),
        folder=subpath(output.meta, parent=True),
    message:
        "Find near-duplicate images and label conflicts"
    shell:
        "{params.step} scripts.busi.find_duplicates"
        " --images {params.images:q}"
        " --manifest {input.manifest:q}"
        " --classes {params.classes}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule busi_split:
    input:
        groups=rules.busi_find_duplicates.output.groups,
    output:
        splits=f"{BUSI}/split/splits.csv",
        left_out=f"{BUSI}/split/left_out.tsv",
        summary=f"{BUSI}/split/summary.json",
        meta=f"{BUSI}/split/meta.json",
    log:
        f"{LOGS}/busi/split.log",
    benchmark:
        f"{BENCHMARKS}/busi/split.tsv"
    conda:
        "../envs/tables.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        classes=BUSI_CLASSES,
        settings=numerics("busi.split"),
        code=code_key("scripts.busi.split"),
        folder=subpath(output.meta, parent=True),
    message:
        "Split whole duplicate groups into train, validation and test"
    shell:
        "{params.step} scripts.busi.split"
        " --groups {input.groups:q}"
        " --classes {params.classes}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule busi_audit_split:
    input:
        manifest=rules.busi_list_images.output.manifest,
        files=lambda w: drawn(CONFIG.busi.images)(w) + [users_file(one) for one in BUSI_SPLITS[w.split].values()],
    output:
        report=f"{BUSI}/audit_split/{{split}}/leakage_report.json",
        meta=f"{BUSI}/audit_split/{{split}}/meta.json",
    log:
        f"{LOGS}/busi/audit_split/{{split}}.log",
    benchmark:
        f"{BENCHMARKS}/busi/audit_split/{{split}}.tsv"
    wildcard_constraints:
        split="|".join(BUSI_SPLITS),
    conda:
        "../envs/tables.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.busi.images),
        classes=BUSI_CLASSES,
        tables=lambda w: BUSI_OPTIONS[w.split],
        clean=lambda w: f"--require-clean {CONFIG.busi.duplicates.threshold}" if w.split == "ours" else "",
        settings=numerics("busi.audit"),
        code=code_key("scripts.busi.audit_split"),
    message:
        "Audit split {wildcards.split} for near-twins across sides"
    shell:
        "{params.step} scripts.busi.audit_split"
        " --images {params.images:q}"
        " --manifest {input.manifest:q}"
        " {params.tables}"
        " {params.clean}"
        " --classes {params.classes}"
        " --output {output.report:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule busi_build_conversations:
    input:
        manifest=rules.busi_list_images.output.manifest,
        groups=rules.busi_find_duplicates.output.groups,
        files=lambda w: drawn(CONFIG.busi.images)(w) + [users_file(one) for one in BUSI_SPLITS[BUSI_USED].values()],
    output:
        train=f"{BUSI}/build_conversations/train.jsonl",
        validation=f"{BUSI}/build_conversations/validation.jsonl",
        test=f"{BUSI}/build_conversations/test.jsonl",
        published=[f"{BUSI}/build_conversations/{side}.json" for side in ("train", "validation", "test")],
        summary=f"{BUSI}/build_conversations/summary.json",
        meta=f"{BUSI}/build_conversations/meta.json",
    log:
        f"{LOGS}/busi/build_conversations.log",
    benchmark:
        f"{BENCHMARKS}/busi/build_conversations.tsv"
    conda:
        "../envs/tables.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        classes=BUSI_CLASSES,
        tables=outside(BUSI_OPTIONS[BUSI_USED]),
        settings=numerics("busi.conversations"),
        code=code_key("scripts.busi.build_conversations"),
        folder=subpath(output.meta, parent=True),
    message:
        "Build chat rows from the split"
    shell:
        "{params.step} scripts.busi.build_conversations"
        " --manifest {input.manifest:q}"
        " --groups {input.groups:q}"
        " {params.tables}"
        " --classes {params.classes}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule busi_train_lora:
    input:
        train=rules.busi_build_conversations.output.train,
        validation=rules.busi_build_conversations.output.validation,
        base=model_folder_files(CONFIG.busi.base.model),
        init=lambda w: [f"{one}/adapter_model.safetensors" for one in [BUSI_RUNS.of(w).busi.train.init_from] if one],
    output:
        listing=f"{BUSI}/train_lora/{{variant}}/{{method}}/final_model/files.json",
        metrics=f"{BUSI}/train_lora/{{variant}}/{{method}}/metrics.json",
        meta=f"{BUSI}/train_lora/{{variant}}/{{method}}/meta.json",
    log:
        f"{LOGS}/busi/train_lora/{{variant}}/{{method}}.log",
    benchmark:
        f"{BENCHMARKS}/busi/train_lora/{{variant}}/{{method}}.tsv"
    wildcard_constraints:
        variant=BUSI_RUNS.pattern,
        method="lora|qlora",
    conda:
        f"../envs/{BUSI_TRAIN_ENV}.yaml"
    threads: class_threads(CONFIG.busi.resources)
    resources:
        **class_resources(CONFIG.busi.resources),
        disk_mb=disk_mb("busi_train_lora"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.busi.images),
        base=outside(BUSI_BASE),
        execution=BUSI_RUNS.execution(train="busi.train"),
        device=outside(CONFIG.device),
        launcher=launcher(CONFIG.busi.resources),
        state=outside(f"{STATE}/busi/train_lora"),
        tracker=outside(f"{LOGS}/busi/train_lora"),
        settings=BUSI_RUNS.numerics(base="busi.base", lora="busi.lora", train="busi.train"),
        code=code_key(*BUSI_TRAIN_CODE),
        folder=subpath(output.meta, parent=True),
    message:
        "Fine-tune by {wildcards.method} ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.busi.train_lora"
        " --method {wildcards.method}"
        " --base {params.base:q}"
        " --images {params.images:q}"
        " --train {input.train:q}"
        " --validation {input.validation:q}"
        " --state-folder {params.state:q}/{wildcards.variant}/{wildcards.method}"
        " --tracker-folder {params.tracker:q}/{wildcards.variant}/{wildcards.method}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule busi_draw_curves:
    input:
        metrics=rules.busi_train_lora.output.metrics,
    output:
        loss=report(
            f"{BUSI}/draw_curves/{{variant}}/{{method}}/loss.png",
            caption="captions/busi_loss.rst",
            category="busi",
            labels={"step": "train_lora", "variant": "{variant}", "method": "{method}", "picture": "loss"},
        ),
        meta=f"{BUSI}/draw_curves/{{variant}}/{{method}}/meta.json",
    log:
        f"{LOGS}/busi/draw_curves/{{variant}}/{{method}}.log",
    benchmark:
        f"{BENCHMARKS}/busi/draw_curves/{{variant}}/{{method}}.tsv"
    wildcard_constraints:
        variant=BUSI_RUNS.pattern,
        method="lora|qlora",
    conda:
        "../envs/report.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        code=code_key("scripts.busi.draw_curves", "scripts.common.plots"),
        folder=subpath(output.meta, parent=True),
    message:
        "Draw the curves of {wildcards.method} ({wildcards.variant})"
    shell:
        "{params.step} scripts.busi.draw_curves"
        " --method {wildcards.method}"
        " --metrics {input.metrics:q}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule busi_merge:
    input:
        adapter=rules.busi_train_lora.output.listing,
        prompts=rules.busi_build_conversations.output.validation,
        base=model_folder_files(CONFIG.busi.base.model),
    output:
        listing=f"{BUSI}/merge/{{variant}}/{{method}}/model/files.json",
        parity=f"{BUSI}/merge/{{variant}}/{{method}}/parity.json",
        meta=f"{BUSI}/merge/{{variant}}/{{method}}/meta.json",
    log:
        f"{LOGS}/busi/merge/{{variant}}/{{method}}.log",
    benchmark:
        f"{BENCHMARKS}/busi/merge/{{variant}}/{{method}}.tsv"
    wildcard_constraints:
        variant=BUSI_RUNS.pattern,
        method="lora|qlora",
    conda:
        f"../envs/{BUSI_ENV}.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
        disk_mb=disk_mb("busi_merge"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.busi.images),
        base=outside(BUSI_BASE),
        device=outside(CONFIG.device),
        launcher=launcher("gpu_single"),
        settings=numerics(base="busi.base", merge="busi.merge"),
        code=code_key("scripts.busi.merge"),
        adapter=subpath(input.adapter, parent=True),
        folder=subpath(output.meta, parent=True),
    message:
        "Merge the adapter of {wildcards.method} ({wildcards.variant}) and check that nothing changed"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.busi.merge"
        " --base {params.base:q}"
        " --adapter {params.adapter:q}"
        " --images {params.images:q}"
        " --prompts {input.prompts:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule busi_predict:
    input:
        rows=rules.busi_build_conversations.output.test,
        model=lambda w: (
            model_folder_files(CONFIG.busi.base.model)
            if w.model == "base"
            else [f"{BUSI}/merge/{w.variant}/{w.model}/model/files.json"]
        ),
    output:
        predictions=f"{BUSI}/predict/{{variant}}/{{model}}/predictions.csv",
        meta=f"{BUSI}/predict/{{variant}}/{{model}}/meta.json",
    log:
        f"{LOGS}/busi/predict/{{variant}}/{{model}}.log",
    benchmark:
        f"{BENCHMARKS}/busi/predict/{{variant}}/{{model}}.tsv"
    wildcard_constraints:
        variant=BUSI_RUNS.pattern,
        model="base|lora|qlora",
    conda:
        f"../envs/{BUSI_ENV}.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.busi.images),
        model=(lambda w, output: BUSI_BASE if w.model == "base" else f"{BUSI}/merge/{w.variant}/{w.model}/model"),
        execution=outside(execution(predict="busi.predict")),
        device=outside(CONFIG.device),
        launcher=launcher("gpu_single"),
        settings=numerics(base="busi.base", predict="busi.predict", list="busi.list"),
        code=code_key("scripts.busi.predict"),
    message:
        "Classify the test side with model {wildcards.model} ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.busi.predict"
        " --model {params.model:q}"
        " --images {params.images:q}"
        " --rows {input.rows:q}"
        " --output {output.predictions:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule busi_evaluate:
    input:
        predictions=[
            f"{BUSI}/predict/{BUSI_RUNS.first}/base/predictions.csv",
            *expand(f"{BUSI}/predict/{{{{variant}}}}/{{method}}/predictions.csv", method=CONFIG.busi.methods),
        ],
        train=rules.busi_build_conversations.output.train,
        test=rules.busi_build_conversations.output.test,
        leakage=f"{BUSI}/audit_split/{BUSI_USED}/leakage_report.json",
    output:
        metrics=f"{BUSI}/evaluate/{{variant}}/metrics.json",
        confusion=report(
            f"{BUSI}/evaluate/{{variant}}/confusion.png",
            caption="captions/busi_confusion.rst",
            category="busi",
            labels={"step": "evaluate", "variant": "{variant}", "picture": "confusion matrix"},
        ),
        calibration=report(
            f"{BUSI}/evaluate/{{variant}}/calibration.png",
            caption="captions/busi_calibration.rst",
            category="busi",
            labels={"step": "evaluate", "variant": "{variant}", "picture": "calibration"},
        ),
        scores=report(
            f"{BUSI}/evaluate/{{variant}}/scores.png",
            caption="captions/busi_scores.rst",
            category="busi",
            labels={"step": "evaluate", "variant": "{variant}", "picture": "scores"},
        ),
        meta=f"{BUSI}/evaluate/{{variant}}/meta.json",
    log:
        f"{LOGS}/busi/evaluate/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/busi/evaluate/{{variant}}.tsv"
    wildcard_constraints:
        variant=BUSI_RUNS.pattern,
    conda:
        "../envs/vision.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.busi.images),
        classes=BUSI_CLASSES,
        predictions=lambda w, input: " ".join(
            f"--predictions {m}={shlex.quote(str(p))}" for m, p in zip(BUSI_MODELS, input.predictions)
        ),
        settings=numerics("busi.evaluate"),
        code=code_key("scripts.busi.evaluate", "scripts.common.plots"),
        folder=subpath(output.meta, parent=True),
    message:
        "Evaluate base and fine-tuned models on the test side ({wildcards.variant})"
    shell:
        "{params.step} scripts.busi.evaluate"
        " {params.predictions}"
        " --train {input.train:q}"
        " --test {input.test:q}"
        " --images {params.images:q}"
        " --leakage {input.leakage:q}"
        " --classes {params.classes}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule busi_describe_model:
    input:
        adapter=rules.busi_train_lora.output.meta,
        metrics=rules.busi_evaluate.output.metrics,
        leakage=rules.busi_evaluate.input.leakage,
        parity=rules.busi_merge.output.parity,
    output:
        card=f"{BUSI}/describe_model/{{variant}}/{{method}}/README.md",
        meta=f"{BUSI}/describe_model/{{variant}}/{{method}}/meta.json",
    log:
        f"{LOGS}/busi/describe_model/{{variant}}/{{method}}.log",
    benchmark:
        f"{BENCHMARKS}/busi/describe_model/{{variant}}/{{method}}.tsv"
    wildcard_constraints:
        variant=BUSI_RUNS.pattern,
        method="lora|qlora",
    conda:
        "../envs/vision.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        base=BUSI_CARD,
        code=code_key("scripts.busi.describe_model"),
    message:
        "Describe the model of {wildcards.method} ({wildcards.variant})"
    shell:
        "{params.step} scripts.busi.describe_model"
        " --adapter-meta {input.adapter:q}"
        " --metrics {input.metrics:q}"
        " --method {wildcards.method}"
        " --leakage {input.leakage:q}"
        " --parity {input.parity:q}"
        " {params.base}"
        " --output {output.card:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule busi:
    input:
        BUSI_RUNS.all("train", *rules.busi_evaluate.output),
        BUSI_RUNS.all("train", rules.busi_draw_curves.output.loss, method=CONFIG.busi.methods),
        BUSI_RUNS.all("train", rules.busi_describe_model.output.card, method=CONFIG.busi.methods),
        expand(f"{BUSI}/audit_split/{{split}}/leakage_report.json", split=BUSI_SPLITS),
