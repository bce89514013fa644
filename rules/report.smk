"""
What a user looks at: the headline numbers and a self-contained page of all pictures.

REQUIRED INPUTS: the metrics and pictures of every pipeline.

OUTPUTS:
    {results}/summary.json   {pipeline: {metric: {value, baseline, n, ci95, ...}}}
    {results}/report/compare_variants/   variants.csv, variants.md: the scores of all variants, over their seeds
    {results}/report.html    Snakemake's own report: pictures, run times, the DAG

STEPS: summarise, compare variants, render.
"""

REPORT_RUNS = {
    "busi": BUSI_RUNS.metrics("train", rules.busi_evaluate.output.metrics),
    "biomedica": BIOMEDICA_RUNS.metrics("train", rules.biomedica_evaluate.output.metrics),
}


rule report_summarise:
    input:
        vase=VASE_METRICS,
        busi=BUSI_RUNS.headline(rules.busi_evaluate.output.metrics),
        rae=expand(rules.rae_evaluate.output.metrics, encoder=RAE_ENCODERS),
        coca=rules.coca_evaluate.output.metrics,
        biomedica=BIOMEDICA_RUNS.headline(rules.biomedica_evaluate.output.metrics),
        targets=[VASE_TARGETS, rules.busi.input, rules.rae.input, rules.coca.input, rules.biomedica.input],
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
        code=code_key("scripts.report.summarise"),
    message:
        "Summarise the headline numbers"
    shell:
        "{params.step} scripts.report.summarise"
        " --vase {input.vase:q}"
        " --busi {input.busi:q}"
        " --rae {input.rae:q}"
        " --coca {input.coca:q}"
        " --biomedica {input.biomedica:q}"
        " --output {output.summary:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule report_compare_variants:
    input:
        [file for runs in REPORT_RUNS.values() for file in runs],
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
                f"--{pipeline} {' '.join(shlex.quote(f'{run}={file}') for file, run in runs.items())}"
                for pipeline, runs in REPORT_RUNS.items()
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


rule report_render:
    input:
        summary=rules.report_summarise.output.summary,
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
        "Render the report"
    shell:
        "{params.python} -m snakemake --snakefile {params.snakefile:q} --configfile {params.config:q}"
        " --report {output.page:q} --nolock {input.summary:q}"
        " 2>&1 | tee {log:q}"


rule report:
    input:
        rules.report_render.output.page,
        rules.report_summarise.output.summary,
        rules.report_compare_variants.output,
