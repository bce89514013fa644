"""
Pipeline vase, second half: questions about the vases to a reinforced vision-language model and its scores.

REQUIRED INPUTS (config section `vase`, beside those of the first half):
    dataset.captions    published captions and conversations (JSON), or
    dataset.questions   questions and answers (JSON, JSONL)
    vlm.model           the model to start from

OUTPUTS (below {results}/vase/), for each run of a variant that another one's do not serve:
    build_dataset/{variant}/    sft_*.jsonl, grpo_*.jsonl, test.jsonl, dropped.tsv, summary.json; one per classifier
    train_sft/{variant}/        best/, last/ (adapters, or models), metrics.json, loss.png
    merge_sft/{variant}/        model/, parity.json; only for an adapter
    estimate_memory/{variant}/  memory.json: what the trainings will need of a GPU
    check_reward/{variant}/     reward_check.json: that rewards of a group vary before GRPO starts
    train_grpo/{variant}/       last/, completions.jsonl, metrics.json, reward.png
    merge_grpo/{variant}/       model/, parity.json; only for an adapter
    predict/{variant}/          predictions.parquet: answers of base, SFT and GRPO model
    evaluate/{variant}/         metrics.json, scores.png
    export_megatron/{variant}/  mcore/, where `megatron.export` is set
    describe_model/{variant}/   README.md (the card), model/ (links to the final weights, the card beside them)

STEPS: build the dataset, estimate memory, SFT, merge, check the reward, GRPO, merge, predict, evaluate, describe.

Estimating memory comes early by its priority and is no input of the trainings: a setting of GRPO would retrain SFT.
Checking the reward is one of GRPO's, and rerun by what reruns GRPO alone; hence its narrow code key.
Answers of all runs are scored by the reward of `main`, whichever they were trained on, so that they compare; each is
read in the format that it was trained to write. All answers of a run come from one step, since SFT's samples are drawn
under the system prompt of the run's GRPO.
"""

VASE_BASE = model_folder(CONFIG.vase.vlm.model)
VASE_BASE_FILES = model_folder_files(CONFIG.vase.vlm.model)
VASE_GPUS = GPUS[CONFIG.vase.train_resources] * resource_class(CONFIG.vase.train_resources).nodes
VASE_CLIP = model_folder(CONFIG.vase.clip.model)
VASE_CLIP_FILES = model_files(CONFIG.vase.clip.model, "open_clip_config.json", "open_clip_model.safetensors")
VASE_SYSTEMS = {  # run: file of GRPO's system prompt, or nothing
    name: one.vase.grpo.system
    or (f"{ROOT}/config/prompts/think_answer.txt" if one.vase.reward.format == "think_answer" else "")
    for name, one in VASE_RUNS.configs.items()
}
VASE_SFT_MODELS = {  # tuner: the model that SFT ends with
    "lora": f"{VASE}/merge_sft/{{variant}}/model/files.json",
    "full": f"{VASE}/train_sft/{{variant}}/best/files.json",
}
VASE_GRPO_MODELS = {
    "lora": f"{VASE}/merge_grpo/{{variant}}/model/files.json",
    "full": f"{VASE}/train_grpo/{{variant}}/last/files.json",
}
VASE_SFT_MODEL = lambda w: VASE_RUNS.path("sft", VASE_SFT_MODELS[VASE_RUNS.of(w).vase.sft.tuner.tuner], **w)
VASE_GRPO_MODEL = lambda w: VASE_RUNS.path("grpo", VASE_GRPO_MODELS[VASE_RUNS.of(w).vase.grpo.tuner.tuner], **w)
VASE_CAPTIONS = lambda w: optional_table(or_stop(layouts.captions_of, CONFIG.vase.dataset))(w)
VASE_SFT_CODE = ("scripts.common.devices", "scripts.vase.swift_flags", "scripts.vase.swift_template")
VASE_GRPO_CODE = (*VASE_SFT_CODE, "scripts.vase.reward_plugin")


rule vase_build_dataset:
    input:
        manifest=rules.vase_list_images.output.manifest,
        accepted=rules.vase_accept_images.output.table,
        best_views=rules.vase_select_views.output.table,
        splits=rules.vase_split.output.splits,
        captions=VASE_CAPTIONS,
        questions=optional_table(CONFIG.vase.dataset.questions),
    output:
        sft_train=f"{VASE}/build_dataset/{{variant}}/sft_train.jsonl",
        sft_validation=f"{VASE}/build_dataset/{{variant}}/sft_validation.jsonl",
        grpo_train=f"{VASE}/build_dataset/{{variant}}/grpo_train.jsonl",
        grpo_validation=f"{VASE}/build_dataset/{{variant}}/grpo_validation.jsonl",
        test=f"{VASE}/build_dataset/{{variant}}/test.jsonl",
        dropped=f"{VASE}/build_dataset/{{variant}}/dropped.tsv",
        summary=f"{VASE}/build_dataset/{{variant}}/summary.json",
        meta=f"{VASE}/build_dataset/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/build_dataset/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/build_dataset/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/tables.yaml"
    threads: class_threads("cpu")
    resources:
        **class_resources("cpu"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.vase.images),
        sources=outside(
            " ".join(
                f"--{name} {shlex.quote(path)}"
                for name, path in (
                    ("captions", CONFIG.vase.dataset.captions),
                    ("questions", CONFIG.vase.dataset.questions),
                )
                if path
            )
        ),
        settings=numerics("vase.dataset"),
        code=code_key("scripts.vase.build_dataset"),
        folder=subpath(output.meta, parent=True),
    message:
        "Build rows for SFT, GRPO and scoring ({wildcards.variant})"
    shell:
        "{params.step} scripts.vase.build_dataset"
        " --images {params.images:q}"
        " --manifest {input.manifest:q}"
        " --accepted {input.accepted:q}"
        " --best-views {input.best_views:q}"
        " --splits {input.splits:q}"
        " {params.sources}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_estimate_memory:
    input:
        VASE_BASE_FILES,
    output:
        memory=f"{VASE}/estimate_memory/{{variant}}/memory.json",
        meta=f"{VASE}/estimate_memory/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/estimate_memory/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/estimate_memory/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    priority: 100
    conda:
        "../envs/vlm.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        model=outside(VASE_BASE),
        gpus=VASE_GPUS,
        settings=VASE_RUNS.numerics(vlm="vase.vlm", sft="vase.sft", grpo="vase.grpo"),
        code=code_key("scripts.vase.estimate_memory"),
    message:
        "Estimate the memory that SFT and GRPO need of each GPU ({wildcards.variant})"
    shell:
        "{params.step} scripts.vase.estimate_memory"
        " --model {params.model:q}"
        " --gpus {params.gpus}"
        " --output {output.memory:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_train_sft:
    input:
        train=VASE_RUNS.at("classifier", rules.vase_build_dataset.output.sft_train),
        validation=VASE_RUNS.at("classifier", rules.vase_build_dataset.output.sft_validation),
        model=VASE_BASE_FILES,
    output:
        best=f"{VASE}/train_sft/{{variant}}/best/files.json",
        last=f"{VASE}/train_sft/{{variant}}/last/files.json",
        metrics=f"{VASE}/train_sft/{{variant}}/metrics.json",
        meta=f"{VASE}/train_sft/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/train_sft/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/train_sft/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/swift.yaml"
    threads: class_threads(CONFIG.vase.train_resources)
    resources:
        **class_resources(CONFIG.vase.train_resources),
        disk_mb=disk_mb("vase_train_sft"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.vase.images),
        model=outside(VASE_BASE),
        execution=VASE_RUNS.execution(sft="vase.sft"),
        device=outside(CONFIG.device),
        launcher=launcher(CONFIG.vase.train_resources),
        state=outside(f"{STATE}/vase/train_sft"),
        tracker=outside(f"{LOGS}/vase/train_sft"),
        settings=VASE_RUNS.numerics(vlm="vase.vlm", sft="vase.sft"),
        code=code_key(*VASE_SFT_CODE),
        folder=subpath(output.meta, parent=True),
    message:
        "Fine-tune the vision-language model (SFT, {wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.vase.train_sft"
        " --model {params.model:q}"
        " --images {params.images:q}"
        " --train {input.train:q}"
        " --validation {input.validation:q}"
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


rule vase_merge_sft:
    input:
        adapter=rules.vase_train_sft.output.best,
        prompts=VASE_RUNS.at("classifier", rules.vase_build_dataset.output.sft_validation),
        model=VASE_BASE_FILES,
    output:
        model=f"{VASE}/merge_sft/{{variant}}/model/files.json",
        parity=f"{VASE}/merge_sft/{{variant}}/parity.json",
        meta=f"{VASE}/merge_sft/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/merge_sft/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/merge_sft/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/swift.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
        disk_mb=disk_mb("vase_merge_sft", "vase_merge_grpo"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.vase.images),
        base=outside(VASE_BASE),
        device=outside(CONFIG.device),
        launcher=launcher("gpu_single"),
        settings=numerics(vlm="vase.vlm", merge="vase.merge"),
        code=code_key("scripts.vase.merge"),
        adapter=subpath(input.adapter, parent=True),
        folder=subpath(output.meta, parent=True),
    message:
        "Merge the adapter of SFT and check that nothing changed ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.vase.merge"
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


rule vase_check_reward:
    input:
        rows=VASE_RUNS.at("classifier", rules.vase_build_dataset.output.grpo_train),
        model=VASE_SFT_MODEL,
    output:
        check=f"{VASE}/check_reward/{{variant}}/reward_check.json",
        meta=f"{VASE}/check_reward/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/check_reward/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/check_reward/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/swift.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.vase.images),
        model=subpath(input.model, parent=True),
        system=lambda w, output: f"--system {shlex.quote(VASE_SYSTEMS[w.variant])}" if VASE_SYSTEMS[w.variant] else "",
        texts=lambda w: [file_digest(VASE_SYSTEMS[w.variant]), file_digest(VASE_RUNS.of(w).vase.reward.plugin)],
        device=outside(CONFIG.device),
        launcher=launcher("gpu_single"),
        settings=VASE_RUNS.numerics(vlm="vase.vlm", grpo="vase.grpo", reward="vase.reward"),
        code=code_key("scripts.vase.reward_plugin"),
    message:
        "Check that rewards vary within groups of samples ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.vase.check_reward"
        " --model {params.model:q}"
        " --images {params.images:q}"
        " --rows {input.rows:q}"
        " {params.system}"
        " --output {output.check:q}"
        " --settings {params.settings:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_train_grpo:
    input:
        train=VASE_RUNS.at("classifier", rules.vase_build_dataset.output.grpo_train),
        validation=VASE_RUNS.at("classifier", rules.vase_build_dataset.output.grpo_validation),
        check=rules.vase_check_reward.output.check,
        model=VASE_SFT_MODEL,
    output:
        last=f"{VASE}/train_grpo/{{variant}}/last/files.json",
        completions=f"{VASE}/train_grpo/{{variant}}/completions.jsonl",
        metrics=f"{VASE}/train_grpo/{{variant}}/metrics.json",
        meta=f"{VASE}/train_grpo/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/train_grpo/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/train_grpo/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/swift.yaml"
    threads: class_threads(CONFIG.vase.train_resources)
    resources:
        **class_resources(CONFIG.vase.train_resources),
        disk_mb=disk_mb("vase_train_grpo"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.vase.images),
        model=subpath(input.model, parent=True),
        system=lambda w, output: f"--system {shlex.quote(VASE_SYSTEMS[w.variant])}" if VASE_SYSTEMS[w.variant] else "",
        texts=lambda w: [file_digest(VASE_SYSTEMS[w.variant]), file_digest(VASE_RUNS.of(w).vase.reward.plugin)],
        execution=VASE_RUNS.execution(grpo="vase.grpo"),
        device=outside(CONFIG.device),
        launcher=launcher(CONFIG.vase.train_resources),
        state=outside(f"{STATE}/vase/train_grpo"),
        tracker=outside(f"{LOGS}/vase/train_grpo"),
        settings=VASE_RUNS.numerics(vlm="vase.vlm", grpo="vase.grpo", reward="vase.reward"),
        code=code_key(*VASE_GRPO_CODE),
        folder=subpath(output.meta, parent=True),
    message:
        "Reinforce the fine-tuned model (GRPO, {wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.vase.train_grpo"
        " --model {params.model:q}"
        " --images {params.images:q}"
        " --train {input.train:q}"
        " --validation {input.validation:q}"
        " {params.system}"
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


rule vase_draw_curves:
    input:
        metrics=f"{VASE}/train_{{stage}}/{{variant}}/metrics.json",
    output:
        picture=report(
            f"{VASE}/draw_curves/{{variant}}/{{stage}}.png",
            caption="captions/vase_curves.rst",
            category="vase",
            labels={"step": "train_{stage}", "variant": "{variant}", "picture": "curves"},
        ),
        meta=f"{VASE}/draw_curves/{{variant}}/{{stage}}.meta.json",
    log:
        f"{LOGS}/vase/draw_curves/{{variant}}/{{stage}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/draw_curves/{{variant}}/{{stage}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
        stage="sft|grpo",
    conda:
        "../envs/report.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        code=code_key("scripts.vase.draw_curves", "scripts.common.plots"),
    message:
        "Draw the curves of {wildcards.stage} ({wildcards.variant})"
    shell:
        "{params.step} scripts.vase.draw_curves"
        " --stage {wildcards.stage}"
        " --metrics {input.metrics:q}"
        " --output {output.picture:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


use rule vase_merge_sft as vase_merge_grpo with:
    input:
        adapter=rules.vase_train_grpo.output.last,
        prompts=VASE_RUNS.at("classifier", rules.vase_build_dataset.output.sft_validation),
        model=VASE_SFT_MODEL,
    output:
        model=f"{VASE}/merge_grpo/{{variant}}/model/files.json",
        parity=f"{VASE}/merge_grpo/{{variant}}/parity.json",
        meta=f"{VASE}/merge_grpo/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/merge_grpo/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/merge_grpo/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    params:
        step=outside(STEP),
        images=outside(CONFIG.vase.images),
        base=subpath(input.model, parent=True),
        device=outside(CONFIG.device),
        launcher=launcher("gpu_single"),
        settings=numerics(vlm="vase.vlm", merge="vase.merge"),
        code=code_key("scripts.vase.merge"),
        adapter=subpath(input.adapter, parent=True),
        folder=subpath(output.meta, parent=True),
    message:
        "Merge the adapter of GRPO and check that nothing changed ({wildcards.variant})"


rule vase_predict:
    input:
        rows=VASE_RUNS.at("classifier", rules.vase_build_dataset.output.test),
        base=VASE_BASE_FILES,
        sft=VASE_SFT_MODEL,
        grpo=VASE_GRPO_MODEL,
    output:
        predictions=f"{VASE}/predict/{{variant}}/predictions.parquet",
        meta=f"{VASE}/predict/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/predict/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/predict/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/swift.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.vase.images),
        base=outside(VASE_BASE),
        sft=subpath(input.sft, parent=True),
        grpo=subpath(input.grpo, parent=True),
        system=(
            lambda w, output: (
                f"--system grpo={shlex.quote(VASE_SYSTEMS[w.variant])}" if VASE_SYSTEMS[w.variant] else ""
            )
        ),
        texts=lambda w: [file_digest(VASE_SYSTEMS[w.variant])],
        execution=outside(execution(predict="vase.predict")),
        device=outside(CONFIG.device),
        launcher=launcher("gpu_single"),
        state=outside(f"{STATE}/vase/predict"),
        settings=numerics(vlm="vase.vlm", predict="vase.predict"),
        code=code_key("scripts.vase.predict"),
    message:
        "Answer the test side's questions with base, SFT and GRPO model ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.vase.predict"
        " --model base={params.base:q}"
        " --model sft={params.sft:q}"
        " --model grpo={params.grpo:q}"
        " {params.system}"
        " --images {params.images:q}"
        " --rows {input.rows:q}"
        " --output {output.predictions:q}"
        " --state-folder {params.state:q}/{wildcards.variant}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_evaluate:
    input:
        predictions=rules.vase_predict.output.predictions,
        rows=VASE_RUNS.at("classifier", rules.vase_build_dataset.output.test),
        train=VASE_RUNS.at("classifier", rules.vase_build_dataset.output.sft_train),
        clip=VASE_CLIP_FILES,
    output:
        metrics=f"{VASE}/evaluate/{{variant}}/metrics.json",
        scores=report(
            f"{VASE}/evaluate/{{variant}}/scores.png",
            caption="captions/vase_vqa_scores.rst",
            category="vase",
            labels={"step": "evaluate", "variant": "{variant}", "picture": "answers"},
        ),
        meta=f"{VASE}/evaluate/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/evaluate/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/evaluate/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/swift.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
    params:
        step=outside(STEP),
        images=outside(CONFIG.vase.images),
        clip=outside(VASE_CLIP),
        execution=outside(execution(clip="vase.clip")),
        device=outside(CONFIG.device),
        launcher=launcher("gpu_single"),
        texts=[file_digest(CONFIG.vase.reward.plugin)],
        settings=lambda w: changed(
            numerics(evaluate="vase.evaluate", reward="vase.reward", clip="vase.clip"),
            reward={"format": VASE_RUNS.of(w).vase.reward.format},
        ),
        code=code_key("scripts.vase.evaluate", "scripts.common.plots"),
        folder=subpath(output.meta, parent=True),
    message:
        "Score the answers of base, SFT and GRPO model ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.vase.evaluate"
        " --predictions {input.predictions:q}"
        " --rows {input.rows:q}"
        " --train {input.train:q}"
        " --images {params.images:q}"
        " --clip-model {params.clip:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --settings {params.execution:q}"
        " --device {params.device}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_export_megatron:
    input:
        model=VASE_GRPO_MODEL,
    output:
        listing=f"{VASE}/export_megatron/{{variant}}/mcore/files.json",
        meta=f"{VASE}/export_megatron/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/export_megatron/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/export_megatron/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/swift.yaml"
    threads: class_threads("gpu_single")
    resources:
        **class_resources("gpu_single"),
        disk_mb=disk_mb("vase_export_megatron"),
    params:
        step=outside(STEP),
        model=subpath(input.model, parent=True),
        launcher=launcher("gpu_single"),
        settings=numerics(vlm="vase.vlm", megatron="vase.megatron"),
        code=code_key("scripts.vase.export_megatron"),
        folder=subpath(output.meta, parent=True),
    message:
        "Export the final model to Megatron-Core's format ({wildcards.variant})"
    shell:
        "{params.step} scripts.common.launch {params.launcher} -- scripts.vase.export_megatron"
        " --model {params.model:q}"
        " --output-folder {params.folder:q}"
        " --settings {params.settings:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule vase_describe_model:
    input:
        metrics=rules.vase_evaluate.output.metrics,
        training=rules.vase_train_grpo.output.meta,
        dataset=VASE_RUNS.at("classifier", rules.vase_build_dataset.output.summary),
        model=VASE_GRPO_MODEL,
        parity=lambda w: (
            VASE_RUNS.path("grpo", rules.vase_merge_grpo.output.parity, **w)
            if VASE_RUNS.of(w).vase.grpo.tuner.tuner == "lora"
            else []
        ),
    output:
        card=f"{VASE}/describe_model/{{variant}}/README.md",
        model=f"{VASE}/describe_model/{{variant}}/model/files.json",
        meta=f"{VASE}/describe_model/{{variant}}/meta.json",
    log:
        f"{LOGS}/vase/describe_model/{{variant}}.log",
    benchmark:
        f"{BENCHMARKS}/vase/describe_model/{{variant}}.tsv"
    wildcard_constraints:
        variant=VASE_RUNS.pattern,
    conda:
        "../envs/vision.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        base=model_card_options(CONFIG.vase.vlm.model),
        demo="--demo" if CONFIG.vase.images.startswith(f"{DEMO}/") else "",
        parity=lambda w, input: f"--parity {shlex.quote(str(input.parity))}" if input.parity else "",
        weights=subpath(input.model, parent=True),
        code=code_key("scripts.vase.describe_model"),
        folder=subpath(output.meta, parent=True),
    message:
        "Describe the final model ({wildcards.variant})"
    shell:
        "{params.step} scripts.vase.describe_model"
        " --metrics {input.metrics:q}"
        " --training-meta {input.training:q}"
        " --dataset {input.dataset:q}"
        " {params.parity}"
        " --model grpo"
        " {params.base} {params.demo}"
        " --weights {params.weights:q}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


VASE_ASKED = CONFIG.vase.dataset.questions or CONFIG.vase.dataset.captions


rule vase:
    input:
        rules.vase_images.input,
        VASE_RUNS.all("sft", rules.vase_draw_curves.output.picture, stage="sft"),
        VASE_RUNS.all("grpo", rules.vase_draw_curves.output.picture, stage="grpo"),
        VASE_RUNS.all(
            "grpo",
            *rules.vase_estimate_memory.output,
            *rules.vase_evaluate.output,
            *rules.vase_describe_model.output,
            *([rules.vase_export_megatron.output.listing] if CONFIG.vase.megatron.export else []),
        ),


VASE_TARGETS = rules.vase.input if VASE_ASKED else rules.vase_images.input
VASE_METRIC_PATTERNS += [("grpo", rules.vase_evaluate.output.metrics)] if VASE_ASKED else []
VASE_METRICS = VASE_RUNS.headline(*[pattern for _, pattern in VASE_METRIC_PATTERNS])
VASE_FUNNEL = [rules.vase_build_dataset.output.summary] if VASE_ASKED else []
