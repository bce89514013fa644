"""
Pipeline coca: tile embeddings of slides and report texts to a CoCa model, its captions and retrieval scores.

REQUIRED INPUTS (config section `coca`):
    slides      folder of tile embeddings, one .h5 per slide
    labels      {slide: text}, JSON in UTF-8; `list.patients` a CSV of slide,patient
    encoder     optional: weights of a slide encoder, your own copy; without them one is trained with the model
    predict     optional: `slides`, a folder of new slides, and `texts` to compare them with

OUTPUTS (below {results}/coca/):
    list_slides/       manifest.parquet, quarantine.tsv, summary.json
    split/             splits.csv, summary.json: by patient
    train_tokenizer/   tokenizer/: byte-level BPE on training texts
  and for each run of a variant (`main` is the configuration itself):
    encode_slides/{variant}/   latents/: of every slide, memory-mapped; before training by a frozen encoder, once for
                               all runs that share it; else after training
    train/{variant}/           model.safetensors (best by validation), last.safetensors, metrics.json
    draw_curves/{variant}/     loss.png, retrieval.png
    caption/{variant}/         captions.parquet
    evaluate/{variant}/        metrics.json, scores.png, similarity.png, confusion.png
    describe_model/{variant}/  README.md (the card), model/
    predict/{variant}/         predictions.jsonl, predictions.quarantine.tsv: of new slides, if `predict.slides` is set;
                               target coca_predictions makes these alone

STEPS: list, split, train the tokenizer, train (encode before or after it), caption, evaluate, describe, predict.
"""

from scripts.coca.settings import EXTENSIONS as COCA_EXTENSIONS
from scripts.coca.settings import slides_to_predict

COCA = f"{RESULTS}/coca"
COCA_RUNS = Runs("coca")
COCA_FROZEN = COCA_RUNS.agreed("coca.encoder.is_frozen")
COCA_WEIGHTS = lambda wildcards: COCA_RUNS.of(wildcards).coca.encoder.weights or []
COCA_SLIDES = CONFIG.coca.slides
COCA_LATENTS = COCA_RUNS.at(
    "encode" if COCA_FROZEN else "train", f"{COCA}/encode_slides/{{variant}}/latents/index.parquet"
)
COCA_MODEL = f"{COCA}/train/{{variant}}/model.safetensors"
COCA_TRAIN_CODE = ("scripts.common.devices", "scripts.coca.training")
COCA_PICTURES = ("scores", "similarity", *(("confusion",) if CONFIG.coca.evaluate.classes else ()))
COCA_NEW = CONFIG.coca.predict.slides
COCA_GIVEN = CONFIG.coca.predict.model  # a model of another run, to predict with
COCA_COUNT = once_drawn(COCA_SLIDES, lambda w: sum(folder_facts(COCA_SLIDES, COCA_EXTENSIONS).tops.values()))
COCA_DEMO = "--demo" if COCA_SLIDES.startswith(f"{DEMO}/") else ""


rule coca_list_slides:
    input:
        slides=drawn(COCA_SLIDES),
        labels=optional_table(CONFIG.coca.labels),
        patients=optional_table(CONFIG.coca.list.patients),
    output:
        manifest=f"{COCA}/list_slides/manifest.parquet",
        quarantine=f"{COCA}/list_slides/quarantine.tsv",
        summary=f"{COCA}/list_slides/summary.json",
        meta=f"{COCA}/list_slides/meta.json",
    log:
        f"{LOGS}/coca/list_slides.log",
    benchmark:
        f"{BENCHMARKS}/coca/list_slides.tsv"
    conda:
        "../envs/coca.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        slides=outside(COCA_SLIDES),
        labels=outside(CONFIG.coca.labels),
        state=outside(f"{STATE}/coca/list_slides"),
        execution=outside(execution("coca.list")),
        settings=numerics("coca.list"),
        code=code_key("scripts.coca.list_slides"),
        files=folder_digest(COCA_SLIDES, COCA_EXTENSIONS),
        folder=subpath(output.manifest, parent=True),
    message:
        "List the slides"
    shell:
        "{params.step} scripts.coca.list_slides"
        " --slides {params.slides:q}"
        " --labels {params.labels:q}"
        " --state-folder {params.state:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule coca_split:
    input:
        manifest=rules.coca_list_slides.output.manifest,
    output:
        splits=f"{COCA}/split/splits.csv",
        summary=f"{COCA}/split/summary.json",
        meta=f"{COCA}/split/meta.json",
    log:
        f"{LOGS}/coca/split.log",
    benchmark:
        f"{BENCHMARKS}/coca/split.tsv"
    conda:
        "../envs/tables.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        settings=numerics("coca.split"),
        code=code_key("scripts.coca.split"),
        folder=subpath(output.splits, parent=True),
    message:
        "Split the slides by patient"
    shell:
        "{params.step} scripts.coca.split"
        " --manifest {input.manifest:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule coca_train_tokenizer:
    input:
        manifest=rules.coca_list_slides.output.manifest,
        splits=rules.coca_split.output.splits,
    output:
        listing=f"{COCA}/train_tokenizer/tokenizer/files.json",
        meta=f"{COCA}/train_tokenizer/meta.json",
    log:
        f"{LOGS}/coca/train_tokenizer.log",
    benchmark:
        f"{BENCHMARKS}/coca/train_tokenizer.tsv"
    conda:
        "../envs/coca.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        tokenizer=file_digest(CONFIG.coca.tokenizer.path and f"{CONFIG.coca.tokenizer.path}/tokenizer.json"),
        settings=numerics("coca.tokenizer"),
        code=code_key("scripts.coca.train_tokenizer"),
        folder=subpath(output.listing, parent=True),
    message:
        "Train the tokenizer"
    shell:
        "{params.step} scripts.coca.train_tokenizer"
        " --manifest {input.manifest:q}"
        " --splits {input.splits:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule coca_encode_slides:
    input:
        manifest=rules.coca_list_slides.output.manifest,
        encoder=COCA_WEIGHTS if COCA_FROZEN else COCA_MODEL,
    output:
        index=f"{COCA}/encode_slides/{{variant}}/latents/index.parquet",
        meta=f"{COCA}/encode_slides/{{variant}}/meta.json",
    log:
        f"{LOGS}/coca/encode_slides/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/coca/encode_slides/{{variant}}.tsv"
    wildcard_constraints:
        variant=COCA_RUNS.pattern,
    conda:
        "../envs/coca.yaml"
    threads: class_threads(CONFIG.coca.resources)
    resources:
        **class_resources(CONFIG.coca.resources),
        disk_mb=disk_mb("coca_encode_slides", measure=COCA_COUNT),
    params:
        step=outside(STEP),
        slides=outside(COCA_SLIDES),
        source=outside("--encoder-weights" if COCA_FROZEN else "--checkpoint"),
        execution=COCA_RUNS.execution(encoder="coca.encoder", encode="coca.encode"),
        device=outside(CONFIG.device),
        launcher=launcher(CONFIG.coca.resources),
        state=outside(f"{STATE}/coca/encode_slides"),
        settings=COCA_RUNS.numerics(encoder="coca.encoder", encode="coca.encode"),
        code=code_key("scripts.coca.encode_slides"),
        folder=subpath(output.index, parent=True),
    message:
        "Encode the slides ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.coca.encode_slides"
        " --manifest {input.manifest:q}"
        " --slides {params.slides:q}"
        " {params.source} {input.encoder:q}"
        " --state-folder {params.state:q}/{wildcards.variant}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule coca_train:
    input:
        manifest=rules.coca_list_slides.output.manifest,
        splits=rules.coca_split.output.splits,
        tokenizer=rules.coca_train_tokenizer.output.listing,
        latents=COCA_LATENTS if COCA_FROZEN else [],
        weights=[] if COCA_FROZEN else COCA_WEIGHTS,
        init=lambda wildcards: COCA_RUNS.of(wildcards).coca.train.init_from or [],
    output:
        weights=COCA_MODEL,
        last=f"{COCA}/train/{{variant}}/last.safetensors",
        metrics=f"{COCA}/train/{{variant}}/metrics.json",
        meta=f"{COCA}/train/{{variant}}/meta.json",
    log:
        f"{LOGS}/coca/train/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/coca/train/{{variant}}.tsv"
    wildcard_constraints:
        variant=COCA_RUNS.pattern,
    conda:
        "../envs/coca.yaml"
    threads: class_threads(CONFIG.coca.resources)
    resources:
        **class_resources(CONFIG.coca.resources),
        disk_mb=disk_mb("coca_train"),
    params:
        step=outside(STEP),
        source=outside("--latents" if COCA_FROZEN else "--slides"),
        images=subpath(input.latents, parent=True) if COCA_FROZEN else outside(COCA_SLIDES),
        execution=COCA_RUNS.execution(encoder="coca.encoder", train="coca.train"),
        device=outside(CONFIG.device),
        launcher=launcher(CONFIG.coca.resources),
        state=outside(f"{STATE}/coca/train"),
        tracker=outside(f"{LOGS}/coca/train"),
        tokenizer=subpath(input.tokenizer, parent=True),
        loss=lambda wildcards: file_digest(COCA_RUNS.of(wildcards).coca.train.loss_plugin),
        settings=COCA_RUNS.numerics(encoder="coca.encoder", model="coca.model", train="coca.train"),
        code=code_key(*COCA_TRAIN_CODE),
        folder=subpath(output.weights, parent=True),
    message:
        "Train the CoCa model ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.coca.train"
        " --manifest {input.manifest:q}"
        " --splits {input.splits:q}"
        " --tokenizer {params.tokenizer:q}"
        " {params.source} {params.images:q}"
        " --state-folder {params.state:q}/{wildcards.variant}"
        " --tracker-folder {params.tracker:q}/{wildcards.variant}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule coca_draw_curves:
    input:
        metrics=rules.coca_train.output.metrics,
    output:
        loss=report(
            f"{COCA}/draw_curves/{{variant}}/loss.png",
            caption="captions/coca_loss.rst",
            category="coca",
            labels={"step": "train", "variant": "{variant}", "picture": "loss"},
        ),
        retrieval=report(
            f"{COCA}/draw_curves/{{variant}}/retrieval.png",
            caption="captions/coca_retrieval.rst",
            category="coca",
            labels={"step": "train", "variant": "{variant}", "picture": "retrieval"},
        ),
        meta=f"{COCA}/draw_curves/{{variant}}/meta.json",
    log:
        f"{LOGS}/coca/draw_curves/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/coca/draw_curves/{{variant}}.tsv"
    wildcard_constraints:
        variant=COCA_RUNS.pattern,
    conda:
        "../envs/report.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        code=code_key("scripts.coca.draw_curves", "scripts.common.plots"),
        folder=subpath(output.meta, parent=True),
    message:
        "Draw the curves of the CoCa model ({wildcards.variant})"
    shell:
        "{params.step} scripts.coca.draw_curves"
        " --metrics {input.metrics:q}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule coca_caption:
    input:
        manifest=rules.coca_list_slides.output.manifest,
        splits=rules.coca_split.output.splits,
        tokenizer=rules.coca_train_tokenizer.output.listing,
        latents=COCA_LATENTS,
        checkpoint=rules.coca_train.output.weights,
    output:
        captions=f"{COCA}/caption/{{variant}}/captions.parquet",
        meta=f"{COCA}/caption/{{variant}}/meta.json",
    log:
        f"{LOGS}/coca/caption/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/coca/caption/{{variant}}.tsv"
    wildcard_constraints:
        variant=COCA_RUNS.pattern,
    conda:
        "../envs/coca.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
    params:
        step=outside(STEP),
        device=outside(CONFIG.device),
        launcher=launcher("gpu_single"),
        tokenizer=subpath(input.tokenizer, parent=True),
        latents=subpath(input.latents, parent=True),
        settings=numerics("coca.caption"),
        code=code_key("scripts.coca.caption"),
    message:
        "Caption the slides ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.coca.caption"
        " --manifest {input.manifest:q}"
        " --splits {input.splits:q}"
        " --tokenizer {params.tokenizer:q}"
        " --latents {params.latents:q}"
        " --checkpoint {input.checkpoint:q}"
        " --output {output.captions:q}"
        " --settings {params.settings:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule coca_evaluate:
    input:
        captions=rules.coca_caption.output.captions,
        manifest=rules.coca_list_slides.output.manifest,
        splits=rules.coca_split.output.splits,
        tokenizer=rules.coca_train_tokenizer.output.listing,
        latents=COCA_LATENTS,
        checkpoint=rules.coca_train.output.weights,
    output:
        metrics=f"{COCA}/evaluate/{{variant}}/metrics.json",
        pictures=[
            report(
                f"{COCA}/evaluate/{{variant}}/{name}.png",
                caption=f"captions/coca_evaluate_{name}.rst",
                category="coca",
                labels={"step": "evaluate", "variant": "{variant}", "picture": name},
            )
            for name in COCA_PICTURES
        ],
        meta=f"{COCA}/evaluate/{{variant}}/meta.json",
    log:
        f"{LOGS}/coca/evaluate/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/coca/evaluate/{{variant}}.tsv"
    wildcard_constraints:
        variant=COCA_RUNS.pattern,
    conda:
        "../envs/coca.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
    params:
        step=outside(STEP),
        device=outside(CONFIG.device),
        launcher=launcher("gpu_single"),
        tokenizer=subpath(input.tokenizer, parent=True),
        latents=subpath(input.latents, parent=True),
        settings=COCA_RUNS.numerics(evaluate="coca.evaluate", max_seq_len="coca.train.max_seq_len"),
        code=code_key("scripts.coca.evaluate", "scripts.common.plots"),
        folder=subpath(output.metrics, parent=True),
    message:
        "Score captions and retrieval ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.coca.evaluate"
        " --captions {input.captions:q}"
        " --manifest {input.manifest:q}"
        " --splits {input.splits:q}"
        " --tokenizer {params.tokenizer:q}"
        " --latents {params.latents:q}"
        " --checkpoint {input.checkpoint:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule coca_describe_model:
    input:
        metrics=rules.coca_evaluate.output.metrics,
        training=rules.coca_train.output.meta,
        slides=rules.coca_list_slides.output.summary,
        checkpoint=rules.coca_train.output.weights,
        tokenizer=rules.coca_train_tokenizer.output.listing,
    output:
        card=f"{COCA}/describe_model/{{variant}}/README.md",
        model=f"{COCA}/describe_model/{{variant}}/model/files.json",
        meta=f"{COCA}/describe_model/{{variant}}/meta.json",
    log:
        f"{LOGS}/coca/describe_model/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/coca/describe_model/{{variant}}.tsv"
    wildcard_constraints:
        variant=COCA_RUNS.pattern,
    conda:
        "../envs/coca.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        demo=COCA_DEMO,
        tokenizer=subpath(input.tokenizer, parent=True),
        code=code_key("scripts.coca.describe_model"),
        folder=subpath(output.card, parent=True),
    message:
        "Describe the CoCa model ({wildcards.variant})"
    shell:
        "{params.step} scripts.coca.describe_model"
        " --metrics {input.metrics:q}"
        " --training-meta {input.training:q}"
        " --manifest-summary {input.slides:q}"
        " --checkpoint {input.checkpoint:q}"
        " --tokenizer {params.tokenizer:q}"
        " {params.demo}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule coca_predict:
    input:
        slides=lambda wildcards: drawn(or_stop(slides_to_predict, CONFIG.coca))(wildcards),
        checkpoint=f"{COCA_GIVEN}/model.safetensors" if COCA_GIVEN else COCA_MODEL,
        tokenizer=(
            f"{COCA_GIVEN}/tokenizer/tokenizer.json" if COCA_GIVEN else rules.coca_train_tokenizer.output.listing
        ),
        encoder=COCA_WEIGHTS if COCA_FROZEN else [],
    output:
        predictions=f"{COCA}/predict/{{variant}}/predictions.jsonl",
        quarantine=f"{COCA}/predict/{{variant}}/predictions.quarantine.tsv",
        meta=f"{COCA}/predict/{{variant}}/meta.json",
    log:
        f"{LOGS}/coca/predict/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/coca/predict/{{variant}}.tsv"
    wildcard_constraints:
        variant=COCA_RUNS.pattern,
    conda:
        "../envs/coca.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
    params:
        step=outside(STEP),
        slides=outside(COCA_NEW),
        source=outside("--encoder-weights" if COCA_FROZEN else ""),
        texts=" ".join(f"--text={shlex.quote(text)}" for text in CONFIG.coca.predict.texts),
        execution=outside(execution(chunk_tiles="coca.encoder.chunk_tiles")),
        device=outside(CONFIG.device),
        launcher=launcher("gpu_single"),
        tokenizer=subpath(input.tokenizer, parent=True),
        settings=COCA_RUNS.numerics(caption="coca.caption", keys="coca.list.keys", max_seq_len="coca.train.max_seq_len"),
        code=code_key("scripts.coca.predict"),
        files=folder_digest(COCA_NEW, COCA_EXTENSIONS),
    message:
        "Caption the new slides ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.coca.predict"
        " --slides {params.slides:q}"
        " --checkpoint {input.checkpoint:q}"
        " --tokenizer {params.tokenizer:q}"
        " {params.source} {input.encoder:q}"
        " {params.texts}"
        " --output {output.predictions:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule coca_predictions:
    input:
        (
            COCA_RUNS.headline(rules.coca_predict.output.predictions)
            if COCA_GIVEN
            else COCA_RUNS.all("train", rules.coca_predict.output.predictions)
        ),


rule coca:
    input:
        COCA_RUNS.all("train", rules.coca_evaluate.output.metrics),
        COCA_RUNS.all("train", *rules.coca_draw_curves.output),
        COCA_RUNS.all("train", rules.coca_describe_model.output.card),
        rules.coca_predictions.input if COCA_NEW else [],
