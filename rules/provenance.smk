"""
What the results are made of, for others to read and to check.

REQUIRED INPUTS: the results of every pipeline, and the report.

OUTPUTS:
    {results}/ro-crate-metadata.json   every artefact and how it was made, as an RO-Crate
    {results}/report/describe_run/     Snakefile, rules, environments and settings, which the crate names

STEPS: describe; `snakemake verify`, which reads all results again, depends on nothing, so that it never makes any.
"""


rule report_describe_run:
    input:
        rules.report_summarise.input,
        rules.report_summarise.output,
        rules.report_compare_variants.output,
        rules.report_render.output.page,
        f"{RESULTS}/paper.html",
    output:
        crate=f"{RESULTS}/ro-crate-metadata.json",
        workflow=f"{RESULTS}/report/describe_run/files.json",
        meta=f"{RESULTS}/ro-crate-metadata.meta.json",
    log:
        f"{LOGS}/report/describe_run.log",
    benchmark:
        f"{BENCHMARKS}/report/describe_run.tsv"
    conda:
        "../envs/report.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        results=outside(RESULTS),
        config=outside(f"{RESULTS}/config.yaml"),
        runs=outside(
            " ".join(
                f"{pipeline}={','.join(sorted(names))}"
                for pipeline, names in kiln_config.current_runs([CONFIG]).items()
            )
        ),
        folder=subpath(output.workflow, parent=True),
        code=code_key("scripts.report.describe_run"),
    message:
        "Describe the results as an RO-Crate"
    shell:
        "{params.step} scripts.report.describe_run"
        " --results {params.results:q}"
        " --config {params.config:q}"
        " --runs {params.runs}"
        " --workflow-folder {params.folder:q}"
        " --output {output.crate:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule verify:
    # Neither input nor output, nor a benchmark, which counts as one: so it always runs, and makes nothing. What it says
    # is its result, and goes to the terminal, too.
    log:
        f"{LOGS}/report/verify_results.log",
    localrule: True
    conda:
        "../envs/tables.yaml"
    threads: class_threads("cpu")
    params:
        step=STEP,
        results=RESULTS,
        raw="--raw" if CONFIG.verify_raw else "",
        code=code_key("scripts.report.verify_results"),
    message:
        "Read all results again"
    shell:
        "{params.step} scripts.report.verify_results {params.results:q} {params.raw}"
        " --threads {threads}"
        " 2>&1 | tee {log:q} >&2"
