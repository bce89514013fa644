"""
The embedded data: what `config/demo.yaml` runs every pipeline on.

REQUIRED INPUTS: none.

OUTPUTS:
    {results}/demo/draw_vases/   images/, labelled/, clip/, published/, truth.parquet, vases.parquet
    {results}/demo/train_clip/   a small CLIP that open_clip loads as local-dir:
    {results}/demo/draw_ultrasound/   images/ in class folders with masks, published/, planted.parquet
    {results}/demo/train_vlm/         a small Qwen2.5-VL, trained on coloured shapes
    {results}/demo/draw_digits/       images/ in ten class folders: handwritten digits among shapes
    {results}/demo/draw_slides/       slides/ of tile embeddings, labels.json, patients.csv, truth.parquet
    {results}/demo/draw_figures/      local/*.tar and hub/: figures with captions in shards, truth.parquet
    {results}/demo/serve_hub/         address of a small hub on this machine, one for each job that reads from it
    {results}/demo/initialise_encoder/{encoder}/   a small DINOv2 and SigLIP2 with random weights
and, for config/smoke.yaml, published architectures with random weights:
    {results}/demo/initialise_vlm/    a Qwen2.5-VL
    {results}/demo/initialise_clip/   a CLIP that open_clip loads as local-dir:
    {results}/demo/initialise_weights/{name}.pth   VGG16 and Inception

Drawing is a checkpoint: which files there are is known, and sharded, only when it is done.
"""

DEMO = f"{RESULTS}/demo"


checkpoint demo_draw_vases:
    output:
        listing=f"{DEMO}/draw_vases/files.json",
        meta=f"{DEMO}/draw_vases.meta.json",
    log:
        f"{LOGS}/demo/draw_vases.log",
    benchmark:
        f"{BENCHMARKS}/demo/draw_vases.tsv"
    conda:
        "../envs/tables.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        settings=numerics("demo.draw"),
        code=code_key("scripts.demo.draw_vases"),
        folder=subpath(output.listing, parent=True),
    message:
        "Draw the demo's vases"
    shell:
        "{params.step} scripts.demo.draw_vases"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule demo_train_clip:
    input:
        listing=rules.demo_draw_vases.output.listing,
    output:
        weights=f"{DEMO}/train_clip/open_clip_model.safetensors",
        config=f"{DEMO}/train_clip/open_clip_config.json",
        metrics=f"{DEMO}/train_clip/metrics.json",
        meta=f"{DEMO}/train_clip/meta.json",
    log:
        f"{LOGS}/demo/train_clip.log",
    benchmark:
        f"{BENCHMARKS}/demo/train_clip.tsv"
    conda:
        "../envs/clip.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
    params:
        step=outside(STEP),
        settings=numerics("demo.clip"),
        code=code_key("scripts.demo.train_clip"),
        folder=subpath(output.meta, parent=True),
        data=subpath(input.listing, parent=True),
    message:
        "Train the demo's small CLIP on pictures of other vases"
    shell:
        "{params.step} scripts.demo.train_clip"
        " --data {params.data:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


checkpoint demo_draw_ultrasound:
    output:
        listing=f"{DEMO}/draw_ultrasound/files.json",
        meta=f"{DEMO}/draw_ultrasound.meta.json",
    log:
        f"{LOGS}/demo/draw_ultrasound.log",
    benchmark:
        f"{BENCHMARKS}/demo/draw_ultrasound.tsv"
    conda:
        "../envs/tables.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        settings=numerics("demo.ultrasound"),
        code=code_key("scripts.demo.draw_ultrasound"),
        folder=subpath(output.listing, parent=True),
    message:
        "Draw the demo's breast ultrasound pictures"
    shell:
        "{params.step} scripts.demo.draw_ultrasound"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule demo_train_vlm:
    output:
        listing=f"{DEMO}/train_vlm/files.json",
        metrics=f"{DEMO}/train_vlm/metrics.json",
        meta=f"{DEMO}/train_vlm/meta.json",
    log:
        f"{LOGS}/demo/train_vlm.log",
    benchmark:
        f"{BENCHMARKS}/demo/train_vlm.tsv"
    conda:
        "../envs/vlm.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
    params:
        step=outside(STEP),
        settings=numerics("demo.vlm"),
        code=code_key("scripts.demo.train_vlm"),
        folder=subpath(output.meta, parent=True),
    message:
        "Train the demo's small vision-language model on coloured shapes"
    shell:
        "{params.step} scripts.demo.train_vlm"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


checkpoint demo_draw_digits:
    output:
        listing=f"{DEMO}/draw_digits/files.json",
        meta=f"{DEMO}/draw_digits.meta.json",
    log:
        f"{LOGS}/demo/draw_digits.log",
    benchmark:
        f"{BENCHMARKS}/demo/draw_digits.tsv"
    conda:
        "../envs/vision.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        settings=numerics("demo.digits"),
        code=code_key("scripts.demo.draw_digits"),
        folder=subpath(output.listing, parent=True),
    message:
        "Draw the demo's pictures of digits among shapes"
    shell:
        "{params.step} scripts.demo.draw_digits"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


checkpoint demo_draw_slides:
    output:
        listing=f"{DEMO}/draw_slides/files.json",
        meta=f"{DEMO}/draw_slides.meta.json",
    log:
        f"{LOGS}/demo/draw_slides.log",
    benchmark:
        f"{BENCHMARKS}/demo/draw_slides.tsv"
    conda:
        "../envs/coca.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        settings=numerics("demo.slides"),
        code=code_key("scripts.demo.draw_slides"),
        folder=subpath(output.listing, parent=True),
    message:
        "Draw the demo's slides"
    shell:
        "{params.step} scripts.demo.draw_slides"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


checkpoint demo_draw_figures:
    output:
        listing=f"{DEMO}/draw_figures/files.json",
        meta=f"{DEMO}/draw_figures.meta.json",
    log:
        f"{LOGS}/demo/draw_figures.log",
    benchmark:
        f"{BENCHMARKS}/demo/draw_figures.tsv"
    conda:
        "../envs/streaming.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        settings=numerics("demo.figures"),
        code=code_key("scripts.demo.draw_figures"),
        folder=subpath(output.listing, parent=True),
    message:
        "Draw the demo's figures"
    shell:
        "{params.step} scripts.demo.draw_figures"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule demo_serve_hub:
    input:
        listing=rules.demo_draw_figures.output.listing,
    output:
        url=service(f"{DEMO}/serve_hub/{{consumer}}.url"),
    log:
        f"{LOGS}/demo/serve_hub/{{consumer}}.log",
    benchmark:
        f"{BENCHMARKS}/demo/serve_hub/{{consumer}}.tsv"
    conda:
        "../envs/tables.yaml"
    threads: 0  # it waits most of the time, and would keep a core from the next training
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        folder=subpath(input.listing, parent=True),
        code=code_key("scripts.demo.serve_hub"),
    message:
        "Serve the demo's hub to {wildcards.consumer}"
    shell:
        "exec {params.step} scripts.demo.serve_hub"
        " --folder {params.folder:q}/hub"
        " --unavailable-every 10 --retry-after 0 --cut-once --slow-once --slow-seconds 1"
        " --port-file {output.url:q}"
        " > {log:q} 2>&1"


rule demo_initialise_encoder:
    output:
        listing=f"{DEMO}/initialise_encoder/{{encoder}}/files.json",
        meta=f"{DEMO}/initialise_encoder/{{encoder}}/meta.json",
    log:
        f"{LOGS}/demo/initialise_encoder/{{encoder}}.log",
    benchmark:
        f"{BENCHMARKS}/demo/initialise_encoder/{{encoder}}.tsv"
    wildcard_constraints:
        encoder="dinov2|siglip2",
    conda:
        "../envs/rae.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        settings=lambda wildcards: numerics(f"demo.encoders.{wildcards.encoder}"),
        code=code_key("scripts.demo.initialise_encoder"),
        folder=subpath(output.meta, parent=True),
    message:
        "Initialise the demo's small {wildcards.encoder}"
    shell:
        "{params.step} scripts.demo.initialise_encoder"
        " --name {wildcards.encoder}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule demo_initialise_vlm:
    output:
        listing=f"{DEMO}/initialise_vlm/files.json",
        meta=f"{DEMO}/initialise_vlm/meta.json",
    log:
        f"{LOGS}/demo/initialise_vlm.log",
    benchmark:
        f"{BENCHMARKS}/demo/initialise_vlm.tsv"
    conda:
        "../envs/vlm.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        settings=numerics("demo.published.vlm"),
        code=code_key("scripts.demo.initialise_vlm"),
        folder=subpath(output.meta, parent=True),
    message:
        "Initialise a Qwen2.5-VL of a published size"
    shell:
        "{params.step} scripts.demo.initialise_vlm"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule demo_initialise_clip:
    output:
        config=f"{DEMO}/initialise_clip/open_clip_config.json",
        weights=f"{DEMO}/initialise_clip/open_clip_model.safetensors",
        meta=f"{DEMO}/initialise_clip/meta.json",
    log:
        f"{LOGS}/demo/initialise_clip.log",
    benchmark:
        f"{BENCHMARKS}/demo/initialise_clip.tsv"
    conda:
        "../envs/clip.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        settings=numerics("demo.published.clip"),
        code=code_key("scripts.demo.initialise_clip"),
        folder=subpath(output.meta, parent=True),
    message:
        "Initialise a CLIP of a published size"
    shell:
        "{params.step} scripts.demo.initialise_clip"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule demo_initialise_weights:
    output:
        weights=f"{DEMO}/initialise_weights/{{name}}.pth",
        meta=f"{DEMO}/initialise_weights/{{name}}.meta.json",
    log:
        f"{LOGS}/demo/initialise_weights/{{name}}.log",
    benchmark:
        f"{BENCHMARKS}/demo/initialise_weights/{{name}}.tsv"
    wildcard_constraints:
        name="vgg16|inception",
    conda:
        "../envs/rae.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        settings=numerics("demo.published.weights"),
        code=code_key("scripts.demo.initialise_weights"),
    message:
        "Initialise {wildcards.name}"
    shell:
        "{params.step} scripts.demo.initialise_weights"
        " --name {wildcards.name}"
        " --output {output.weights:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"
