"""
What a user looks at: headline numbers, variants, funnels, costs, and two pages that show it all.

REQUIRED INPUTS: the metrics and pictures of the pipelines that `pipelines` names; rules/paper.smk makes the table of
published numbers, rules/provenance.smk the RO-Crate.

OUTPUTS:
    {results}/index.html     the front page: headline numbers, pictures, costs, links; one file, no network
    {results}/report.html    Snakemake's own report: pictures, run times, the DAG
    {results}/summary.json   {pipeline: {metric: {value, baseline, n, ci95, ...}}}
    {results}/report/compare_variants/   variants.csv, variants.md: the scores of all variants, over their seeds
    {results}/report/draw_funnels/       funnels.csv, and a picture for each pipeline: in, passed on, left out and why
    {results}/report/measure_jobs/       jobs.csv, rules.csv: seconds, peak memory, items a second

STEPS: summarise, compare variants, draw funnels, render, measure jobs, write the index.
"""

REPORT_METRICS = {
    "vase": VASE_METRICS,
    "busi": BUSI_RUNS.headline(rules.busi_evaluate.output.metrics),
    "rae": RAE_RUNS.headline(rules.rae_evaluate.output.metrics, encoder=RAE_ENCODERS),
    "coca": COCA_RUNS.headline(rules.coca_evaluate.output.metrics),
    "biomedica": BIOMEDICA_RUNS.headline(rules.biomedica_evaluate.output.metrics),
}
REPORT_TARGETS = {
    "vase": VASE_TARGETS,
    "busi": rules.busi.input,
    "rae": rules.rae.input,
    "coca": rules.coca.input,
    "biomedica": rules.biomedica.input,
}
REPORT_RUNS = {
    "vase": {
        file: run for stage, pattern in VASE_METRIC_PATTERNS for file, run in VASE_RUNS.metrics(stage, pattern).items()
    },
    "busi": BUSI_RUNS.metrics("train", rules.busi_evaluate.output.metrics),
    "rae": RAE_RUNS.metrics("train", rules.rae_evaluate.output.metrics, encoder=RAE_ENCODERS),
    "coca": COCA_RUNS.metrics("train", rules.coca_evaluate.output.metrics),
    "biomedica": BIOMEDICA_RUNS.metrics("train", rules.biomedica_evaluate.output.metrics),
}
REPORT_FUNNELS = {
    "vase": VASE_RUNS.headline(
        rules.vase_list_images.output.summary,
        rules.vase_accept_images.output.summary,
        rules.vase_select_views.output.summary,
        *VASE_FUNNEL,
    ),
    "busi": [rules.busi_list_images.output.summary, rules.busi_split.output.summary],
    "rae": [rules.rae_build_arrow.output.summary],
    "coca": [rules.coca_list_slides.output.summary, rules.coca_split.output.summary],
    "biomedica": [rules.biomedica_index_local.output.summary],
}
REPORT = CONFIG.pipelines
REPORT_CAPTIONS = COCA_RUNS.headline(rules.coca_caption.output.captions) if "coca" in REPORT else []


rule report_summarise:
    input:
        metrics=[REPORT_METRICS[name] for name in REPORT],
        targets=[REPORT_TARGETS[name] for name in REPORT],
    output:
        summary=f"{RESULTS}/summary.json",
        meta=f"{RESULTS}/summary.meta.json",
    log:
        f"{LOGS}/report/summarise.log",
    benchmark:
        f"{BENCHMARKS}/report/summarise.tsv"
    conda:
        "../envs/tables.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        metrics=outside(" ".join(f"--{name} {shlex.join(REPORT_METRICS[name])}" for name in REPORT)),
        code=code_key("scripts.report.summarise"),
    message:
        "Summarise the headline numbers"
    shell:
        "{params.step} scripts.report.summarise"
        " {params.metrics}"
        " --output {output.summary:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule report_compare_variants:
    input:
        [file for name in REPORT for file in REPORT_RUNS[name]],
    output:
        table=f"{RESULTS}/report/compare_variants/variants.csv",
        page=f"{RESULTS}/report/compare_variants/variants.md",
        meta=f"{RESULTS}/report/compare_variants/meta.json",
    log:
        f"{LOGS}/report/compare_variants.log",
    benchmark:
        f"{BENCHMARKS}/report/compare_variants.tsv"
    conda:
        "../envs/tables.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        runs=outside(
            " ".join(
                f"--{name} {shlex.join(f'{run}={file}' for file, run in REPORT_RUNS[name].items())}" for name in REPORT
            )
        ),
        code=code_key("scripts.report.compare_variants"),
        folder=subpath(output.meta, parent=True),
    message:
        "Compare the variants"
    shell:
        "{params.step} scripts.report.compare_variants"
        " {params.runs}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule report_draw_funnels:
    input:
        [file for name in REPORT for file in REPORT_FUNNELS[name]],
    output:
        table=f"{RESULTS}/report/draw_funnels/funnels.csv",
        pictures=[
            report(
                f"{RESULTS}/report/draw_funnels/{name}.png",
                caption="captions/report_funnel.rst",
                category=name,
                labels={"step": "all", "picture": "what became of the items"},
            )
            for name in REPORT
        ],
        meta=f"{RESULTS}/report/draw_funnels/meta.json",
    log:
        f"{LOGS}/report/draw_funnels.log",
    benchmark:
        f"{BENCHMARKS}/report/draw_funnels.tsv"
    conda:
        "../envs/report.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        summaries=outside(" ".join(f"--{name} {shlex.join(REPORT_FUNNELS[name])}" for name in REPORT)),
        code=code_key("scripts.report.draw_funnels", "scripts.common.plots"),
        folder=subpath(output.meta, parent=True),
    message:
        "Draw what became of the items"
    shell:
        "{params.step} scripts.report.draw_funnels"
        " {params.summaries}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule report_render:
    input:
        summary=rules.report_summarise.output.summary,
        funnels=rules.report_draw_funnels.output.pictures,
    output:
        page=f"{RESULTS}/report.html",
    log:
        f"{LOGS}/report/render.log",
    benchmark:
        f"{BENCHMARKS}/report/render.tsv"
    conda:
        "../envs/report.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        python=outside(PYTHON),
        snakefile=outside(f"{ROOT}/Snakefile"),
        config=outside(f"{RESULTS}/config.yaml"),
    message:
        "Render Snakemake's own report"
    shell:
        "{params.python} -m snakemake --snakefile {params.snakefile:q} --configfile {params.config:q}"
        " --report {output.page:q} --nolock {input.summary:q} {input.funnels:q}"
        " 2>&1 | tee {log:q}"


rule report_measure_jobs:
    input:
        page=rules.report_render.output.page,
    output:
        jobs=f"{RESULTS}/report/measure_jobs/jobs.csv",
        rules=f"{RESULTS}/report/measure_jobs/rules.csv",
        meta=f"{RESULTS}/report/measure_jobs/meta.json",
    log:
        f"{LOGS}/report/measure_jobs.log",
    benchmark:
        f"{BENCHMARKS}/report/measure_jobs.tsv"
    conda:
        "../envs/tables.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        results=outside(RESULTS),
        code=code_key("scripts.report.measure_jobs"),
        folder=subpath(output.meta, parent=True),
    message:
        "Measure what the jobs took"
    shell:
        "{params.step} scripts.report.measure_jobs"
        " --results {params.results:q}"
        " --output-folder {params.folder:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule report_write_index:
    input:
        summary=rules.report_summarise.output.summary,
        variants=rules.report_compare_variants.output.table,
        variants_page=rules.report_compare_variants.output.page,
        funnels=rules.report_draw_funnels.output.table,
        rules=rules.report_measure_jobs.output.rules,
        captions=REPORT_CAPTIONS,
        page=rules.report_render.output.page,
        paper=f"{RESULTS}/paper.html",
        crate=f"{RESULTS}/ro-crate-metadata.json",
    output:
        page=f"{RESULTS}/index.html",
        meta=f"{RESULTS}/index.meta.json",
    log:
        f"{LOGS}/report/write_index.log",
    benchmark:
        f"{BENCHMARKS}/report/write_index.tsv"
    conda:
        "../envs/report.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        results=outside(RESULTS),
        pictures=outside(json.dumps(marked_pictures())),
        captions=lambda w, input: f"--captions {shlex.quote(str(input.captions))}" if input.captions else "",
        code=code_key("scripts.report.write_index"),
    message:
        "Write the front page"
    shell:
        "{params.step} scripts.report.write_index"
        " --results {params.results:q}"
        " --summary {input.summary:q}"
        " --variants {input.variants:q}"
        " --funnels {input.funnels:q}"
        " --rules {input.rules:q}"
        " {params.captions}"
        " --pictures {params.pictures:q}"
        " --links"
        " 'published numbers'={input.paper:q}"
        " 'pictures and DAG'={input.page:q}"
        " 'variants'={input.variants_page:q}"
        " 'RO-Crate'={input.crate:q}"
        " --output {output.page:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule report:
    input:
        rules.report_write_index.output.page,
        rules.report_render.output.page,
        rules.report_summarise.output.summary,
        rules.report_compare_variants.output,
