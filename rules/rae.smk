"""
Pipeline rae: image folders to a representation autoencoder for each encoder, and its rFID.

REQUIRED INPUTS (config section `rae`):
    images      folder with train/<class>/ and val/ (by class, or flat with a label file), or class folders alone;
                or an Arrow folder; or none, where dataset.source is hub: rule retrieve_dataset brings dataset.repo
    encoders    DINOv2, SigLIP2, SigLIP; `use` names those to build for
    weights     VGG16 (LPIPS), DINO (discriminator), Inception (rFID)

OUTPUTS (below {results}/rae/):
    build_arrow/                     dataset/ for datasets.load_from_disk, quarantine.tsv, summary.json
    compute_latent_stats/{encoder}/  stat.pt: mean and variance of clean latents
    compute_reference_stats/         features of the validation pictures and of poor copies; floor.json
  and for each run of a variant (`main` is the configuration itself), all scored by main's networks:
    train_autoencoder/{variant}/{encoder}/  autoencoder.safetensors (EMA decoder, statistics), metrics.json
    draw_curves/{variant}/{encoder}/        loss.png
    reconstruct/{variant}/{encoder}/        features.safetensors, images.parquet, reconstructions.png
    evaluate/{variant}/{encoder}/           metrics.json: rFID, PSNR, SSIM, LPIPS
    export/{variant}/{encoder}/             model/: decoder and statistics as safetensors and in the published layout
    describe_model/{variant}/{encoder}/     README.md (the card), model/ (links to the export, the card beside it)
and, by target rae_evaluate_published, without training:
    import_published/{encoder}/      autoencoder.safetensors of a published decoder and its statistics
    reconstruct_published/{encoder}/, evaluate_published/{encoder}/   as above

STEPS: build the dataset, latent statistics, train, reference statistics, reconstruct, evaluate, export, describe.
"""

from scripts.rae.settings import published_encoders

RAE = f"{RESULTS}/rae"
RAE_RUNS = Runs("rae")
RAE_ENCODERS = {name: getattr(CONFIG.rae.encoders, name) for name in CONFIG.rae.use}
RAE_ENCODER = "|".join(RAE_ENCODERS)
RAE_FOLDERS = {name: model_folder(one.model) for name, one in RAE_ENCODERS.items()}
RAE_ENCODER_FILES = {name: model_folder_files(one.model) for name, one in RAE_ENCODERS.items()}
RAE_WEIGHTS = {  # {run: {option: file of each network that is used as it comes}}
    run: {
        "vgg": one.rae.perceptual.weights,
        "dino": None if one.rae.discriminator.recipe == "free" else one.rae.discriminator.weights,
        "inception": None if one.rae.evaluate.extractor == "kiln-random" else one.rae.evaluate.inception,
        "init-from": one.rae.autoencoder.init_from,
    }
    for run, one in RAE_RUNS.configs.items()
}
RAE_FILES = {
    run: {option: model_files(one) if one else [] for option, one in weights.items()}
    for run, weights in RAE_WEIGHTS.items()
}
RAE_OPTIONS = {
    run: {option: f"--{option} {shlex.quote(model_file(one))}" if one else "" for option, one in weights.items()}
    for run, weights in RAE_WEIGHTS.items()
}
RAE_SCORE_FILES = RAE_FILES[RAE_RUNS.first]  # one LPIPS scores all runs
RAE_SCORE_OPTIONS = RAE_OPTIONS[RAE_RUNS.first]
RAE_PROCESSES = class_processes(CONFIG.rae.resources)
RAE_TRAIN_CODE = ("scripts.common.devices", "scripts.rae.autoencoder_training")
RAE_PUBLISHED = {name: getattr(CONFIG.rae.published, name) for name in CONFIG.rae.use}
RAE_PUBLISHED_ENCODER = "|".join(name for name, one in RAE_PUBLISHED.items() if one.decoder) or "(?!)"
RAE_DEMO = "--demo" if CONFIG.rae.images.startswith(f"{DEMO}/") else ""
RAE_IN_FOLDERS = CONFIG.rae.dataset.source == "folders"
RAE_IMAGES = CONFIG.rae.images
RAE_SOURCE = lambda wildcards: or_stop(of_folder, RAE_IMAGES, layouts.arrow_splits, Path(RAE_IMAGES))
if CONFIG.rae.dataset.source == "hub":
    RAE_IMAGES = f"{CONFIG.datasets}/{CONFIG.rae.dataset.repo}"
    RAE_SOURCE = [f"{RAE_IMAGES}/files.json"]
RAE_LOOK = functools.partial(layouts.require_class_folders, train_split=CONFIG.rae.dataset.train_split)
RAE_FACTS = once_drawn(RAE_IMAGES, lambda w: folder_facts(RAE_IMAGES)) if RAE_IN_FOLDERS else None
RAE_BYTES = functools.partial(needs.rae_bytes, CONFIG, RAE_IMAGES, RAE_FACTS)
RAE_PICTURES = functools.partial(needs.rae_pictures, CONFIG, RAE_FACTS)


rule rae_build_arrow:
    input:
        images=drawn(CONFIG.rae.images),
        labels=optional_table(CONFIG.rae.dataset.labels),
        source=[] if RAE_IN_FOLDERS else RAE_SOURCE,
    output:
        listing=f"{RAE}/build_arrow/dataset/files.json",
        quarantine=f"{RAE}/build_arrow/quarantine.tsv",
        summary=f"{RAE}/build_arrow/summary.json",
        meta=f"{RAE}/build_arrow/meta.json",
    log:
        f"{LOGS}/rae/build_arrow.log",
    benchmark:
        f"{BENCHMARKS}/rae/build_arrow.tsv"
    conda:
        "../envs/rae.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
        disk_mb=disk_mb("rae_build_arrow", measure=RAE_BYTES),
    params:
        step=outside(STEP),
        images=outside(RAE_IMAGES),
        execution=outside(execution("rae.dataset")),
        state=outside(f"{STATE}/rae/build_arrow"),
        settings=lambda wildcards: numerics("rae.dataset"),  # it holds {split}, which is no wildcard
        code=code_key("scripts.rae.build_arrow"),
        files=folder_digest(RAE_IMAGES, look=RAE_LOOK) if RAE_IN_FOLDERS else [],
        folder=subpath(output.meta, parent=True),
    message:
        "Build the Arrow dataset"
    shell:
        "{params.step} scripts.rae.build_arrow"
        " --images {params.images:q}"
        " --state-folder {params.state:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule rae_compute_latent_stats:
    input:
        dataset=rules.rae_build_arrow.output.listing,
        encoder=lambda wildcards: RAE_ENCODER_FILES[wildcards.encoder],
    output:
        statistics=f"{RAE}/compute_latent_stats/{{encoder}}/stat.pt",
        meta=f"{RAE}/compute_latent_stats/{{encoder}}/meta.json",
    log:
        f"{LOGS}/rae/compute_latent_stats/{{encoder}}.log",
    benchmark:
        f"{BENCHMARKS}/rae/compute_latent_stats/{{encoder}}.tsv"
    wildcard_constraints:
        encoder=RAE_ENCODER,
    conda:
        "../envs/rae.yaml"
    threads: class_threads(CONFIG.rae.resources)
    resources:
        **class_resources(CONFIG.rae.resources),
    params:
        step=outside(STEP),
        encoder=lambda wildcards, output: RAE_FOLDERS[wildcards.encoder],
        execution=outside(execution(latent_stats="rae.latent_stats")),
        device=outside(CONFIG.device),
        launcher=launcher(CONFIG.rae.resources),
        state=outside(f"{STATE}/rae/compute_latent_stats"),
        dataset=subpath(input.dataset, parent=True),
        settings=lambda wildcards: numerics(
            encoder=f"rae.encoders.{wildcards.encoder}", image_size="rae.image_size", latent_stats="rae.latent_stats"
        ),
        code=code_key("scripts.rae.compute_latent_stats"),
    message:
        "Compute the latent statistics of {wildcards.encoder}"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.rae.compute_latent_stats"
        " --dataset {params.dataset:q}"
        " --encoder {params.encoder:q}"
        " --state-folder {params.state:q}/{wildcards.encoder}"
        " --output {output.statistics:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule rae_train_autoencoder:
    input:
        dataset=rules.rae_build_arrow.output.listing,
        encoder=lambda wildcards: RAE_ENCODER_FILES[wildcards.encoder],
        statistics=rules.rae_compute_latent_stats.output.statistics,
        weights=lambda wildcards: RAE_FILES[wildcards.variant]["vgg"] + RAE_FILES[wildcards.variant]["dino"],
        # before any job: does the global batch divide among the GPUs?
        init=lambda wildcards: or_stop(RAE_RUNS.of(wildcards).rae.autoencoder.check_share, RAE_PROCESSES)
        or RAE_FILES[wildcards.variant]["init-from"],
        # of rFID while training, always: an input that comes and goes with a setting would retrain
        inception=ancient(model_files(CONFIG.rae.evaluate.inception) if CONFIG.rae.evaluate.inception else []),
    output:
        weights=f"{RAE}/train_autoencoder/{{variant}}/{{encoder}}/autoencoder.safetensors",
        metrics=f"{RAE}/train_autoencoder/{{variant}}/{{encoder}}/metrics.json",
        meta=f"{RAE}/train_autoencoder/{{variant}}/{{encoder}}/meta.json",
    log:
        f"{LOGS}/rae/train_autoencoder/{{variant}}/{{encoder}}.log",
    benchmark:
        f"{BENCHMARKS}/rae/train_autoencoder/{{variant}}/{{encoder}}.tsv"
    wildcard_constraints:
        variant=RAE_RUNS.pattern,
        encoder=RAE_ENCODER,
    conda:
        "../envs/rae.yaml"
    threads: class_threads(CONFIG.rae.resources)
    resources:
        **class_resources(CONFIG.rae.resources),
        disk_mb=disk_mb("rae_train_autoencoder"),
    params:
        step=outside(STEP),
        encoder=lambda wildcards, output: RAE_FOLDERS[wildcards.encoder],
        execution=RAE_RUNS.execution(autoencoder="rae.autoencoder"),
        device=outside(CONFIG.device),
        launcher=launcher(CONFIG.rae.resources),
        state=outside(f"{STATE}/rae/train_autoencoder"),
        dataset=subpath(input.dataset, parent=True),
        networks=lambda wildcards, output: " ".join(RAE_OPTIONS[wildcards.variant].values()),
        extractor=outside(CONFIG.rae.evaluate.extractor),
        tracker=outside(f"{LOGS}/rae/train_autoencoder"),
        settings=RAE_RUNS.numerics(
            encoder="rae.encoders.{encoder}",
            image_size="rae.image_size",
            decoder="rae.decoder",
            perceptual="rae.perceptual",
            discriminator="rae.discriminator",
            autoencoder="rae.autoencoder",
        ),
        code=code_key(*RAE_TRAIN_CODE),
        folder=subpath(output.meta, parent=True),
    message:
        "Train the autoencoder of {wildcards.encoder} ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.rae.train_autoencoder"
        " --name {wildcards.encoder}"
        " --dataset {params.dataset:q}"
        " --encoder {params.encoder:q}"
        " --statistics {input.statistics:q}"
        " {params.networks}"
        " --extractor {params.extractor}"
        " --state-folder {params.state:q}/{wildcards.variant}/{wildcards.encoder}"
        " --tracker-folder {params.tracker:q}/{wildcards.variant}/{wildcards.encoder}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule rae_draw_curves:
    input:
        metrics=rules.rae_train_autoencoder.output.metrics,
    output:
        loss=report(
            f"{RAE}/draw_curves/{{variant}}/{{encoder}}/loss.png",
            caption="captions/rae_loss.rst",
            category="rae",
            labels={"step": "train_autoencoder", "variant": "{variant}", "encoder": "{encoder}", "picture": "loss"},
        ),
        meta=f"{RAE}/draw_curves/{{variant}}/{{encoder}}/meta.json",
    log:
        f"{LOGS}/rae/draw_curves/{{variant}}/{{encoder}}.log",
    benchmark:
        f"{BENCHMARKS}/rae/draw_curves/{{variant}}/{{encoder}}.tsv"
    wildcard_constraints:
        variant=RAE_RUNS.pattern,
        encoder=RAE_ENCODER,
    conda:
        "../envs/report.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        code=code_key("scripts.rae.draw_curves", "scripts.common.plots"),
        folder=subpath(output.meta, parent=True),
    message:
        "Draw the curves of {wildcards.encoder} ({wildcards.variant})"
    shell:
        "{params.step} scripts.rae.draw_curves"
        " --name {wildcards.encoder}"
        " --metrics {input.metrics:q}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule rae_compute_reference_stats:
    input:
        dataset=rules.rae_build_arrow.output.listing,
        inception=RAE_SCORE_FILES["inception"],
    output:
        reference=f"{RAE}/compute_reference_stats/reference.safetensors",
        shrunk=f"{RAE}/compute_reference_stats/shrunk.safetensors",
        colour=f"{RAE}/compute_reference_stats/colour.safetensors",
        floor=f"{RAE}/compute_reference_stats/floor.json",
        meta=f"{RAE}/compute_reference_stats/meta.json",
    log:
        f"{LOGS}/rae/compute_reference_stats.log",
    benchmark:
        f"{BENCHMARKS}/rae/compute_reference_stats.tsv"
    conda:
        "../envs/rae.yaml"
    threads: class_threads(CONFIG.rae.resources)
    resources:
        **class_resources(CONFIG.rae.resources),
        disk_mb=disk_mb("rae_compute_reference_stats", measure=RAE_PICTURES),
    params:
        step=outside(STEP),
        execution=outside(execution(evaluate="rae.evaluate")),
        device=outside(CONFIG.device),
        launcher=launcher(CONFIG.rae.resources),
        state=outside(f"{STATE}/rae/compute_reference_stats"),
        dataset=subpath(input.dataset, parent=True),
        inception=outside(RAE_SCORE_OPTIONS["inception"]),
        settings=numerics(image_size="rae.image_size", evaluate="rae.evaluate"),
        code=code_key("scripts.rae.compute_reference_stats"),
        folder=subpath(output.meta, parent=True),
    message:
        "Compute the features of the validation pictures"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.rae.compute_reference_stats"
        " --dataset {params.dataset:q}"
        " {params.inception}"
        " --state-folder {params.state:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule rae_reconstruct:
    input:
        dataset=rules.rae_build_arrow.output.listing,
        encoder=lambda wildcards: RAE_ENCODER_FILES[wildcards.encoder],
        checkpoint=rules.rae_train_autoencoder.output.weights,
        weights=RAE_SCORE_FILES["vgg"] + RAE_SCORE_FILES["inception"],
    output:
        features=f"{RAE}/reconstruct/{{variant}}/{{encoder}}/features.safetensors",
        images=f"{RAE}/reconstruct/{{variant}}/{{encoder}}/images.parquet",
        sheet=report(
            f"{RAE}/reconstruct/{{variant}}/{{encoder}}/reconstructions.png",
            caption="captions/rae_reconstructions.rst",
            category="rae",
            labels={
                "step": "reconstruct",
                "variant": "{variant}",
                "encoder": "{encoder}",
                "picture": "reconstructions",
            },
        ),
        meta=f"{RAE}/reconstruct/{{variant}}/{{encoder}}/meta.json",
    log:
        f"{LOGS}/rae/reconstruct/{{variant}}/{{encoder}}.log",
    benchmark:
        f"{BENCHMARKS}/rae/reconstruct/{{variant}}/{{encoder}}.tsv"
    wildcard_constraints:
        variant=RAE_RUNS.pattern,
        encoder=RAE_ENCODER,
    conda:
        "../envs/rae.yaml"
    threads: class_threads(CONFIG.rae.resources)
    resources:
        **class_resources(CONFIG.rae.resources),
        disk_mb=disk_mb("rae_reconstruct", "rae_reconstruct_published", measure=RAE_PICTURES),
    params:
        step=outside(STEP),
        encoder=lambda wildcards, output: RAE_FOLDERS[wildcards.encoder],
        execution=outside(execution(evaluate="rae.evaluate")),
        device=outside(CONFIG.device),
        launcher=launcher(CONFIG.rae.resources),
        state=lambda wildcards, output: f"{STATE}/rae/reconstruct/{wildcards.variant}/{wildcards.encoder}",
        dataset=subpath(input.dataset, parent=True),
        vgg=outside(RAE_SCORE_OPTIONS["vgg"]),
        inception=outside(RAE_SCORE_OPTIONS["inception"]),
        settings=numerics(perceptual="rae.perceptual", evaluate="rae.evaluate"),
        code=code_key("scripts.rae.reconstruct"),
        folder=subpath(output.meta, parent=True),
    message:
        "Reconstruct the validation pictures by {wildcards.encoder} ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.rae.reconstruct"
        " --dataset {params.dataset:q}"
        " --checkpoint {input.checkpoint:q}"
        " --encoder {params.encoder:q}"
        " {params.vgg}"
        " {params.inception}"
        " --state-folder {params.state:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule rae_evaluate:
    input:
        reference=rules.rae_compute_reference_stats.output.reference,
        shrunk=rules.rae_compute_reference_stats.output.shrunk,
        colour=rules.rae_compute_reference_stats.output.colour,
        floor=rules.rae_compute_reference_stats.output.floor,
        features=rules.rae_reconstruct.output.features,
        images=rules.rae_reconstruct.output.images,
        dataset=rules.rae_build_arrow.output.summary,
    output:
        metrics=f"{RAE}/evaluate/{{variant}}/{{encoder}}/metrics.json",
        meta=f"{RAE}/evaluate/{{variant}}/{{encoder}}/meta.json",
    log:
        f"{LOGS}/rae/evaluate/{{variant}}/{{encoder}}.log",
    benchmark:
        f"{BENCHMARKS}/rae/evaluate/{{variant}}/{{encoder}}.tsv"
    wildcard_constraints:
        variant=RAE_RUNS.pattern,
        encoder=RAE_ENCODER,
    conda:
        "../envs/rae.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        reference=subpath(input.reference, parent=True),
        reconstructions=subpath(input.features, parent=True),
        settings=numerics(perceptual="rae.perceptual"),
        code=code_key("scripts.rae.scores"),
    message:
        "Score the reconstructions by {wildcards.encoder} ({wildcards.variant})"
    shell:
        "{params.step} scripts.rae.evaluate"
        " --name {wildcards.encoder}"
        " --reference {params.reference:q}"
        " --reconstructions {params.reconstructions:q}"
        " --dataset-summary {input.dataset:q}"
        " --output {output.metrics:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule rae_export:
    input:
        encoder=lambda wildcards: RAE_ENCODER_FILES[wildcards.encoder],
        checkpoint=rules.rae_train_autoencoder.output.weights,
        training=rules.rae_train_autoencoder.output.meta,
    output:
        listing=f"{RAE}/export/{{variant}}/{{encoder}}/model/files.json",
        meta=f"{RAE}/export/{{variant}}/{{encoder}}/meta.json",
    log:
        f"{LOGS}/rae/export/{{variant}}/{{encoder}}.log",
    benchmark:
        f"{BENCHMARKS}/rae/export/{{variant}}/{{encoder}}.tsv"
    wildcard_constraints:
        variant=RAE_RUNS.pattern,
        encoder=RAE_ENCODER,
    conda:
        "../envs/rae.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        encoder=lambda wildcards, output: RAE_FOLDERS[wildcards.encoder],
        code=code_key("scripts.rae.export"),
        folder=subpath(output.listing, parent=True),
    message:
        "Export the autoencoder of {wildcards.encoder} ({wildcards.variant})"
    shell:
        "{params.step} scripts.rae.export"
        " --checkpoint {input.checkpoint:q}"
        " --training-meta {input.training:q}"
        " --encoder {params.encoder:q}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule rae_describe_model:
    input:
        metrics=rules.rae_evaluate.output.metrics,
        training=rules.rae_train_autoencoder.output.meta,
        dataset=rules.rae_build_arrow.output.summary,
        sheet=rules.rae_reconstruct.output.sheet,
        model=rules.rae_export.output.listing,
    output:
        card=f"{RAE}/describe_model/{{variant}}/{{encoder}}/README.md",
        sheet=f"{RAE}/describe_model/{{variant}}/{{encoder}}/reconstructions.png",
        model=f"{RAE}/describe_model/{{variant}}/{{encoder}}/model/files.json",
        meta=f"{RAE}/describe_model/{{variant}}/{{encoder}}/meta.json",
    log:
        f"{LOGS}/rae/describe_model/{{variant}}/{{encoder}}.log",
    benchmark:
        f"{BENCHMARKS}/rae/describe_model/{{variant}}/{{encoder}}.tsv"
    wildcard_constraints:
        variant=RAE_RUNS.pattern,
        encoder=RAE_ENCODER,
    conda:
        "../envs/rae.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        base=lambda wildcards: model_card_options(RAE_ENCODERS[wildcards.encoder].model),
        demo=RAE_DEMO,
        weights=subpath(input.model, parent=True),
        code=code_key("scripts.rae.describe_model"),
        folder=subpath(output.meta, parent=True),
    message:
        "Describe the autoencoder of {wildcards.encoder} ({wildcards.variant})"
    shell:
        "{params.step} scripts.rae.describe_model"
        " --metrics {input.metrics:q}"
        " --training-meta {input.training:q}"
        " --dataset {input.dataset:q}"
        " --sheet {input.sheet:q}"
        " --weights {params.weights:q}"
        " {params.base} {params.demo}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule rae_import_published:
    input:
        encoder=lambda wildcards: RAE_ENCODER_FILES[wildcards.encoder],
        decoder=lambda wildcards: model_files(RAE_PUBLISHED[wildcards.encoder].decoder),
        statistics=lambda wildcards: model_files(RAE_PUBLISHED[wildcards.encoder].stats),
    output:
        weights=f"{RAE}/import_published/{{encoder}}/autoencoder.safetensors",
        meta=f"{RAE}/import_published/{{encoder}}/meta.json",
    log:
        f"{LOGS}/rae/import_published/{{encoder}}.log",
    benchmark:
        f"{BENCHMARKS}/rae/import_published/{{encoder}}.tsv"
    wildcard_constraints:
        encoder=RAE_PUBLISHED_ENCODER,
    conda:
        "../envs/rae.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        encoder=lambda wildcards, output: RAE_FOLDERS[wildcards.encoder],
        decoder=lambda wildcards, output: model_file(RAE_PUBLISHED[wildcards.encoder].decoder),
        statistics=lambda wildcards, output: model_file(RAE_PUBLISHED[wildcards.encoder].stats),
        settings=lambda wildcards: numerics(
            encoder=f"rae.encoders.{wildcards.encoder}",
            image_size="rae.image_size",
            published=f"rae.published.{wildcards.encoder}",
        ),
        code=code_key("scripts.rae.import_published"),
    message:
        "Import the published decoder of {wildcards.encoder}"
    shell:
        "{params.step} scripts.rae.import_published"
        " --name {wildcards.encoder}"
        " --encoder {params.encoder:q}"
        " --decoder {params.decoder:q}"
        " --statistics {params.statistics:q}"
        " --output {output.weights:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


use rule rae_reconstruct as rae_reconstruct_published with:
    input:
        dataset=rules.rae_build_arrow.output.listing,
        encoder=lambda wildcards: RAE_ENCODER_FILES[wildcards.encoder],
        checkpoint=rules.rae_import_published.output.weights,
        weights=RAE_SCORE_FILES["vgg"] + RAE_SCORE_FILES["inception"],
    output:
        features=f"{RAE}/reconstruct_published/{{encoder}}/features.safetensors",
        images=f"{RAE}/reconstruct_published/{{encoder}}/images.parquet",
        sheet=report(
            f"{RAE}/reconstruct_published/{{encoder}}/reconstructions.png",
            caption="captions/rae_reconstructions.rst",
            category="rae",
            labels={"step": "reconstruct_published", "encoder": "{encoder}", "picture": "reconstructions"},
        ),
        meta=f"{RAE}/reconstruct_published/{{encoder}}/meta.json",
    log:
        f"{LOGS}/rae/reconstruct_published/{{encoder}}.log",
    benchmark:
        f"{BENCHMARKS}/rae/reconstruct_published/{{encoder}}.tsv"
    params:
        state=lambda wildcards, output: f"{STATE}/rae/reconstruct_published/{wildcards.encoder}",
    message:
        "Reconstruct the validation pictures by the published decoder of {wildcards.encoder}"


use rule rae_evaluate as rae_score_published with:
    input:
        reference=rules.rae_compute_reference_stats.output.reference,
        shrunk=rules.rae_compute_reference_stats.output.shrunk,
        colour=rules.rae_compute_reference_stats.output.colour,
        floor=rules.rae_compute_reference_stats.output.floor,
        features=rules.rae_reconstruct_published.output.features,
        images=rules.rae_reconstruct_published.output.images,
        dataset=rules.rae_build_arrow.output.summary,
    output:
        metrics=f"{RAE}/evaluate_published/{{encoder}}/metrics.json",
        meta=f"{RAE}/evaluate_published/{{encoder}}/meta.json",
    log:
        f"{LOGS}/rae/evaluate_published/{{encoder}}.log",
    benchmark:
        f"{BENCHMARKS}/rae/evaluate_published/{{encoder}}.tsv"
    message:
        "Score the reconstructions by the published decoder of {wildcards.encoder}"


rule rae_evaluate_published:
    input:
        lambda wildcards: expand(
            rules.rae_score_published.output.metrics, encoder=or_stop(published_encoders, CONFIG.rae)
        ),


rule rae:
    input:
        RAE_RUNS.all("train", rules.rae_evaluate.output.metrics, encoder=RAE_ENCODERS),
        RAE_RUNS.all("train", rules.rae_draw_curves.output.loss, encoder=RAE_ENCODERS),
        RAE_RUNS.all("train", rules.rae_export.output.listing, encoder=RAE_ENCODERS),
        RAE_RUNS.all("train", rules.rae_describe_model.output.card, encoder=RAE_ENCODERS),
