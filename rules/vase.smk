"""
Pipeline vase, first half: raw photographs of vases to the best view of each.

REQUIRED INPUTS (config section `vase`):
    images      folder of raw photographs, any depth
    labelled    folder with 0/ (low quality) and 1/ (high quality)
    attributes  optional table by vase, to stratify the split by
    truth       optional table of known quality, to score the filter against

OUTPUTS (below {results}/vase/):
    list_images/        manifest.parquet, quarantine.tsv, duplicates.tsv, summary.json
    split_labelled/     labelled.parquet: a side for each labelled image
    split/              splits.parquet: a side for each vase, decided once
    embed_images/       CLIP embeddings by shard
    score_images/       scores.parquet: each image against the prompts
  and for each run of a variant (`main` is the configuration itself; one that shares a classifier has none of its own):
    train_classifier/{variant}/  classifier.safetensors, metrics.json, used.parquet
    draw_classifier/{variant}/   loss.png, accuracy.png, confusion.png
    classify_images/{variant}/   probability of high quality, by shard
    link_classes/{variant}/      classes/0, classes/1 (links), predictions.parquet
    choose_threshold/{variant}/  threshold.json, percentiles.csv, scores.png
    accept_images/{variant}/     accepted/, rejected/ (links), filtering_report.json, funnel.png, samples.png
    select_views/{variant}/      best_views/ (links), best_views_report.json, filtering_stats.json, views.png
    audit_split/{variant}/       audit.json: no vase is chosen on what it is scored on
    evaluate_filter/{variant}/   metrics.json, where `truth` is set

STEPS: inspect (by shard), list, split, train, classify (by shard), embed (by shard), score, choose a
threshold, accept, select, audit, evaluate. What leads to the classifier has priority: the longest chain starts there.
"""

from scripts.vase import view_names

VASE = f"{RESULTS}/vase"
VASE_RUNS = Runs("vase")
VASE_NAMES = functools.partial(view_names.require_match, pattern=CONFIG.vase.list.view_pattern)
VASE_SHARDS = ShardedFolder(
    "vase", CONFIG.vase.images, CONFIG.vase.images_per_shard, f"{VASE}/inspect_images", VASE_NAMES
)
VASE_LOOK = functools.partial(layouts.require_classes, classes=("0", "1"))
VASE_BACKBONES = {name: one.vase.classifier.weights for name, one in VASE_RUNS.configs.items()}
VASE_CLASSIFIER_CODE = ("scripts.common.devices", "scripts.vase.classifier", "scripts.vase.classifier_training")


rule vase_inspect_images:
    input:
        drawn(CONFIG.vase.images),
    output:
        table=of_shard(f"{VASE}/inspect_images/{{shard}}.parquet"),
        meta=f"{VASE}/inspect_images/{{shard}}.meta.json",
    log:
        f"{LOGS}/vase/inspect_images/{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/inspect_images/{{shard}}.tsv"
    conda:
        "../envs/tables.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.vase.images),
        kept=kept("vase/inspect_images"),
        shard_table=outside(VASE_SHARDS.table),
        settings=numerics("vase.inspect"),
        code=code_key("scripts.vase.inspect_images"),
        files=VASE_SHARDS.digest,
    message:
        "Inspect images of shard {wildcards.shard}"
    shell:
        "{params.step} scripts.vase.inspect_images"
        " --images {params.images:q}"
        " --shard-table {params.shard_table:q}"
        " --shard {wildcards.shard}"
        " {params.kept}"
        " --output {output.table:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_list_images:
    input:
        shards=VASE_SHARDS.expand(f"{VASE}/inspect_images/{{shard}}.parquet"),
    output:
        manifest=f"{VASE}/list_images/manifest.parquet",
        quarantine=f"{VASE}/list_images/quarantine.tsv",
        duplicates=f"{VASE}/list_images/duplicates.tsv",
        summary=f"{VASE}/list_images/summary.json",
        meta=f"{VASE}/list_images/meta.json",
    log:
        f"{LOGS}/vase/list_images.log",
    benchmark:
        f"{BENCHMARKS}/vase/list_images.tsv"
    conda:
        "../envs/tables.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        settings=numerics("vase.list"),
        code=code_key("scripts.vase.list_images"),
        ignored=VASE_SHARDS.ignored,
        folder=subpath(output.meta, parent=True),
    message:
        "List all images in one manifest"
    shell:
        "{params.step} scripts.vase.list_images"
        " --shards {input.shards:q}"
        " --ignored {params.ignored}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_list_labelled:
    input:
        drawn(CONFIG.vase.labelled),
    output:
        table=f"{VASE}/list_labelled/labelled.parquet",
        quarantine=f"{VASE}/list_labelled/quarantine.tsv",
        summary=f"{VASE}/list_labelled/summary.json",
        meta=f"{VASE}/list_labelled/meta.json",
    log:
        f"{LOGS}/vase/list_labelled.log",
    benchmark:
        f"{BENCHMARKS}/vase/list_labelled.tsv"
    priority: 50
    conda:
        "../envs/tables.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.vase.labelled),
        settings=numerics(inspect="vase.inspect", list="vase.list"),
        code=code_key("scripts.vase.list_labelled"),
        files=folder_digest(CONFIG.vase.labelled, look=VASE_LOOK),
        folder=subpath(output.meta, parent=True),
    message:
        "List the labelled images"
    shell:
        "{params.step} scripts.vase.list_labelled"
        " --images {params.images:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_split_labelled:
    input:
        labelled=rules.vase_list_labelled.output.table,
        attributes=optional_table(CONFIG.vase.attributes),
    output:
        labelled=f"{VASE}/split_labelled/labelled.parquet",
        summary=f"{VASE}/split_labelled/summary.json",
        meta=f"{VASE}/split_labelled/meta.json",
    log:
        f"{LOGS}/vase/split_labelled.log",
    benchmark:
        f"{BENCHMARKS}/vase/split_labelled.tsv"
    priority: 50
    conda:
        "../envs/tables.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        attributes=outside(f"--attributes {shlex.quote(CONFIG.vase.attributes)}" if CONFIG.vase.attributes else ""),
        settings=numerics("vase.split"),
        code=code_key("scripts.vase.split_labelled"),
        folder=subpath(output.meta, parent=True),
    message:
        "Split labelled vases into train, validation and test"
    shell:
        "{params.step} scripts.vase.split_labelled"
        " --labelled {input.labelled:q}"
        " {params.attributes}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_split:
    input:
        manifest=rules.vase_list_images.output.manifest,
        labelled=rules.vase_split_labelled.output.labelled,
        attributes=optional_table(CONFIG.vase.attributes),
    output:
        splits=f"{VASE}/split/splits.parquet",
        summary=f"{VASE}/split/summary.json",
        meta=f"{VASE}/split/meta.json",
    log:
        f"{LOGS}/vase/split.log",
    benchmark:
        f"{BENCHMARKS}/vase/split.tsv"
    conda:
        "../envs/tables.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        attributes=outside(f"--attributes {shlex.quote(CONFIG.vase.attributes)}" if CONFIG.vase.attributes else ""),
        settings=numerics("vase.split"),
        code=code_key("scripts.vase.split"),
        folder=subpath(output.meta, parent=True),
    message:
        "Split all vases into train, validation and test"
    shell:
        "{params.step} scripts.vase.split"
        " --manifest {input.manifest:q}"
        " --labelled {input.labelled:q}"
        " {params.attributes}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_train_classifier:
    input:
        labelled=rules.vase_split_labelled.output.labelled,
        weights=lambda w: model_files(VASE_BACKBONES[w.variant]) if VASE_BACKBONES[w.variant] else [],
        init=lambda w: [one for one in [VASE_RUNS.of(w).vase.classifier.init_from] if one],
    output:
        weights=f"{VASE}/train_classifier/{{variant}}/classifier.safetensors",
        metrics=f"{VASE}/train_classifier/{{variant}}/metrics.json",
        used=f"{VASE}/train_classifier/{{variant}}/used.parquet",
        meta=f"{VASE}/train_classifier/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/train_classifier/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/train_classifier/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    priority: 50
    conda:
        "../envs/vision.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
        disk_mb=disk_mb("vase_train_classifier"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.vase.labelled),
        execution=VASE_RUNS.execution("vase.classifier"),
        device=outside(CONFIG.device),
        launcher=launcher("gpu_single"),
        state=outside(f"{STATE}/vase/train_classifier"),
        tracker=outside(f"{LOGS}/vase/train_classifier"),
        settings=VASE_RUNS.numerics("vase.classifier"),
        code=code_key(*VASE_CLASSIFIER_CODE),
        folder=subpath(output.meta, parent=True),
        weights=lambda w, output: (
            f"--weights {shlex.quote(model_file(VASE_BACKBONES[w.variant]))}" if VASE_BACKBONES[w.variant] else ""
        ),
    message:
        "Train the image-quality classifier ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.vase.train_classifier"
        " --images {params.images:q}"
        " --labelled {input.labelled:q}"
        " {params.weights}"
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


rule vase_draw_classifier:
    input:
        metrics=rules.vase_train_classifier.output.metrics,
    output:
        loss=report(
            f"{VASE}/draw_classifier/{{variant}}/loss.png",
            caption="captions/vase_loss.rst",
            category="vase",
            labels={"step": "train_classifier", "variant": "{variant}", "picture": "loss"},
        ),
        accuracy=report(
            f"{VASE}/draw_classifier/{{variant}}/accuracy.png",
            caption="captions/vase_accuracy.rst",
            category="vase",
            labels={"step": "train_classifier", "variant": "{variant}", "picture": "accuracy"},
        ),
        confusion=report(
            f"{VASE}/draw_classifier/{{variant}}/confusion.png",
            caption="captions/vase_confusion.rst",
            category="vase",
            labels={"step": "train_classifier", "variant": "{variant}", "picture": "confusion matrix"},
        ),
        meta=f"{VASE}/draw_classifier/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/draw_classifier/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/draw_classifier/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/report.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        code=code_key("scripts.vase.draw_classifier", "scripts.common.plots"),
        folder=subpath(output.meta, parent=True),
    message:
        "Draw the curves of the quality classifier ({wildcards.variant})"
    shell:
        "{params.step} scripts.vase.draw_classifier"
        " --metrics {input.metrics:q}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_classify_images:
    input:
        shard=rules.vase_inspect_images.output.table,
        classifier=rules.vase_train_classifier.output.weights,
    output:
        table=of_shard(f"{VASE}/classify_images/{{variant}}/{{shard}}.parquet"),
        meta=f"{VASE}/classify_images/{{variant}}/{{shard}}.meta.json",
    log:
        f"{LOGS}/vase/classify_images/{{variant}}/{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/classify_images/{{variant}}/{{shard}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/vision.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.vase.images),
        kept=kept("vase/classify_images"),
        execution=outside(execution("vase.classify")),
        device=outside(CONFIG.device),
        launcher=launcher("gpu_single"),
        settings=numerics("vase.classify"),
        code=code_key("scripts.vase.classify_images"),
    message:
        "Classify images of shard {wildcards.shard} ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.vase.classify_images"
        " --images {params.images:q}"
        " --shard {input.shard:q}"
        " --classifier {input.classifier:q}"
        " {params.kept}"
        " --output {output.table:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_link_classes:
    input:
        manifest=rules.vase_list_images.output.manifest,
        predictions=VASE_SHARDS.expand(f"{VASE}/classify_images/{{variant}}/{{shard}}.parquet"),
    output:
        predictions=f"{VASE}/link_classes/{{variant}}/predictions.parquet",
        links=f"{VASE}/link_classes/{{variant}}/classes/files.json",
        summary=f"{VASE}/link_classes/{{variant}}/summary.json",
        meta=f"{VASE}/link_classes/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/link_classes/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/link_classes/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/vision.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        images=CONFIG.vase.images,
        code=code_key("scripts.vase.link_classes"),
        folder=subpath(output.meta, parent=True),
    message:
        "Link images by class ({wildcards.variant})"
    shell:
        "{params.step} scripts.vase.link_classes"
        " --images {params.images:q}"
        " --manifest {input.manifest:q}"
        " --predictions {input.predictions:q}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_embed_images:
    input:
        shard=rules.vase_inspect_images.output.table,
        model=model_files(CONFIG.vase.clip.model, "open_clip_config.json", "open_clip_model.safetensors"),
    output:
        embeddings=of_shard(f"{VASE}/embed_images/{{shard}}.arrow"),
        meta=f"{VASE}/embed_images/{{shard}}.meta.json",
    log:
        f"{LOGS}/vase/embed_images/{{shard}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/embed_images/{{shard}}.tsv"
    conda:
        "../envs/clip.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
        disk_mb=disk_mb("vase_embed_images", measure=VASE_SHARDS.count),
    params:
        step=outside(STEP),
        images=outside(CONFIG.vase.images),
        kept=kept("vase/embed_images"),
        execution=outside(execution("vase.clip")),
        device=outside(CONFIG.device),
        launcher=launcher("gpu_single"),
        settings=numerics("vase.clip"),
        code=code_key("scripts.vase.embed_images"),
        model=lambda w, input: str(Path(input.model[0]).parent),
    message:
        "Embed images of shard {wildcards.shard} by CLIP"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.vase.embed_images"
        " --images {params.images:q}"
        " --shard {input.shard:q}"
        " --model {params.model:q}"
        " {params.kept}"
        " --output {output.embeddings:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_score_images:
    input:
        embeddings=VASE_SHARDS.expand(f"{VASE}/embed_images/{{shard}}.arrow"),
        model=rules.vase_embed_images.input.model,
    output:
        scores=f"{VASE}/score_images/scores.parquet",
        meta=f"{VASE}/score_images/meta.json",
    log:
        f"{LOGS}/vase/score_images.log",
    benchmark:
        f"{BENCHMARKS}/vase/score_images.tsv"
    conda:
        "../envs/clip.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        settings=numerics("vase.prompts"),
        code=code_key("scripts.vase.score_images"),
        model=lambda w, input: str(Path(input.model[0]).parent),
    message:
        "Score images against the prompts"
    shell:
        "{params.step} scripts.vase.score_images"
        " --embeddings {input.embeddings:q}"
        " --model {params.model:q}"
        " --output {output.scores:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_choose_threshold:
    input:
        scores=rules.vase_score_images.output.scores,
        predictions=rules.vase_link_classes.output.predictions,
        splits=rules.vase_split.output.splits,
    output:
        threshold=f"{VASE}/choose_threshold/{{variant}}/threshold.json",
        percentiles=f"{VASE}/choose_threshold/{{variant}}/percentiles.csv",
        sample=f"{VASE}/choose_threshold/{{variant}}/sample.parquet",
        scores=report(
            f"{VASE}/choose_threshold/{{variant}}/scores.png",
            caption="captions/vase_scores.rst",
            category="vase",
            labels={"step": "choose_threshold", "variant": "{variant}", "picture": "scores"},
        ),
        meta=f"{VASE}/choose_threshold/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/choose_threshold/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/choose_threshold/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/vision.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        settings=numerics("vase.threshold"),
        code=code_key("scripts.vase.choose_threshold"),
        folder=subpath(output.meta, parent=True),
    message:
        "Choose the acceptance threshold ({wildcards.variant})"
    shell:
        "{params.step} scripts.vase.choose_threshold"
        " --scores {input.scores:q}"
        " --predictions {input.predictions:q}"
        " --splits {input.splits:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_accept_images:
    input:
        manifest=rules.vase_list_images.output.manifest,
        predictions=rules.vase_link_classes.output.predictions,
        scores=rules.vase_score_images.output.scores,
        threshold=rules.vase_choose_threshold.output.threshold,
        timed=lambda w: [
            rules.vase_score_images.output.meta,
            *VASE_SHARDS.expand(f"{VASE}/embed_images/{{shard}}.meta.json")(w),
        ],
    output:
        table=f"{VASE}/accept_images/{{variant}}/accepted.parquet",
        report=f"{VASE}/accept_images/{{variant}}/filtering_report.json",
        accepted=f"{VASE}/accept_images/{{variant}}/accepted/files.json",
        rejected=f"{VASE}/accept_images/{{variant}}/rejected/files.json",
        summary=f"{VASE}/accept_images/{{variant}}/summary.json",
        funnel=f"{VASE}/accept_images/{{variant}}/funnel.png",
        samples=report(
            f"{VASE}/accept_images/{{variant}}/samples.png",
            caption="captions/vase_samples.rst",
            category="vase",
            labels={"step": "accept_images", "variant": "{variant}", "picture": "accepted and rejected"},
        ),
        meta=f"{VASE}/accept_images/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/accept_images/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/accept_images/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/vision.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        images=CONFIG.vase.images,
        code=code_key("scripts.vase.accept_images"),
        folder=subpath(output.meta, parent=True),
    message:
        "Accept or reject images ({wildcards.variant})"
    shell:
        "{params.step} scripts.vase.accept_images"
        " --images {params.images:q}"
        " --manifest {input.manifest:q}"
        " --predictions {input.predictions:q}"
        " --scores {input.scores:q}"
        " --threshold {input.threshold:q}"
        " --timed {input.timed:q}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_select_views:
    input:
        manifest=rules.vase_list_images.output.manifest,
        accepted=rules.vase_accept_images.output.table,
        timed=[rules.vase_score_images.output.meta],
    output:
        table=f"{VASE}/select_views/{{variant}}/best_views.parquet",
        report=f"{VASE}/select_views/{{variant}}/best_views_report.json",
        stats=f"{VASE}/select_views/{{variant}}/filtering_stats.json",
        links=f"{VASE}/select_views/{{variant}}/best_views/files.json",
        summary=f"{VASE}/select_views/{{variant}}/summary.json",
        sheet=report(
            f"{VASE}/select_views/{{variant}}/views.png",
            caption="captions/vase_views.rst",
            category="vase",
            labels={"step": "select_views", "variant": "{variant}", "picture": "best views"},
        ),
        meta=f"{VASE}/select_views/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/select_views/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/select_views/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/vision.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        images=CONFIG.vase.images,
        code=code_key("scripts.vase.select_views"),
        folder=subpath(output.meta, parent=True),
    message:
        "Select the best view of each vase ({wildcards.variant})"
    shell:
        "{params.step} scripts.vase.select_views"
        " --images {params.images:q}"
        " --manifest {input.manifest:q}"
        " --accepted {input.accepted:q}"
        " --timed {input.timed:q}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_audit_split:
    input:
        splits=rules.vase_split.output.splits,
        classifier=rules.vase_train_classifier.output.used,
        sample=rules.vase_choose_threshold.output.sample,
    output:
        audit=f"{VASE}/audit_split/{{variant}}/audit.json",
        meta=f"{VASE}/audit_split/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/audit_split/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/audit_split/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/tables.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        code=code_key("scripts.vase.audit_split"),
    message:
        "Audit that no vase is chosen on what it is scored on ({wildcards.variant})"
    shell:
        "{params.step} scripts.vase.audit_split"
        " --splits {input.splits:q}"
        " --classifier {input.classifier:q}"
        " --sample {input.sample:q}"
        " --output {output.audit:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_evaluate_filter:
    input:
        manifest=rules.vase_list_images.output.manifest,
        splits=rules.vase_split.output.splits,
        scores=rules.vase_score_images.output.scores,
        accepted=rules.vase_accept_images.output.table,
        best_views=rules.vase_select_views.output.table,
        truth=optional_table(CONFIG.vase.truth),
    output:
        metrics=f"{VASE}/evaluate_filter/{{variant}}/metrics.json",
        meta=f"{VASE}/evaluate_filter/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/evaluate_filter/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/evaluate_filter/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/vision.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.vase.images),
        truth=outside(CONFIG.vase.truth),
        code=code_key("scripts.vase.evaluate_filter"),
    message:
        "Score the filter against known quality ({wildcards.variant})"
    shell:
        "{params.step} scripts.vase.evaluate_filter"
        " --images {params.images:q}"
        " --truth {params.truth:q}"
        " --manifest {input.manifest:q}"
        " --splits {input.splits:q}"
        " --scores {input.scores:q}"
        " --accepted {input.accepted:q}"
        " --best-views {input.best_views:q}"
        " --output {output.metrics:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


VASE_METRIC_PATTERNS = [  # with the stages whose runs have them
    ("classifier", rules.vase_train_classifier.output.metrics),
    *([("classifier", rules.vase_evaluate_filter.output.metrics)] if CONFIG.vase.truth else []),
]


rule vase_quality:
    input:
        VASE_RUNS.all("classifier", *rules.vase_choose_threshold.output),


rule vase_images:
    input:
        VASE_RUNS.all("classifier", *rules.vase_select_views.output, *rules.vase_audit_split.output),
        VASE_RUNS.all("classifier", *rules.vase_draw_classifier.output),
        [path for stage, pattern in VASE_METRIC_PATTERNS for path in VASE_RUNS.all(stage, pattern)],
