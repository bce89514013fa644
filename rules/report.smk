"""
What a user looks at: the headline numbers and a self-contained page of all pictures.

REQUIRED INPUTS: the metrics and pictures of every pipeline.

OUTPUTS:
    {results}/summary.json   {pipeline: {metric: {value, baseline, n, ci95, ...}}}
    {results}/report.html    Snakemake's own report: pictures, run times, the DAG

STEPS: summarise, render.
"""


rule report_summarise:
    input:
        vase=VASE_METRICS,
        busi=BUSI_RUNS.headline(rules.busi_evaluate.output.metrics),
        rae=RAE_RUNS.headline(rules.rae_evaluate.output.metrics, encoder=RAE_ENCODERS),
        coca=COCA_RUNS.headline(rules.coca_evaluate.output.metrics),
        biomedica=rules.biomedica_evaluate.output.metrics,
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
