"""
Published numbers beside ours, and the one command that would reproduce those of a pipeline.

REQUIRED INPUTS: the metrics of the pipelines; config/paper_targets.csv, config/paper_costs.csv.

OUTPUTS:
    {results}/paper.csv, paper.md, paper.html            those of `pipelines`, by target `paper`
    {results}/paper/{pipeline}.csv, .md, .html           one pipeline, by target `reproduce_{pipeline}`

STEPS: compare each published number with the run that is nearest to its protocol.

Target `reproduce_{pipeline}` is the pipeline's own and its table. Where encoders are retrieved ones, the authors' decoders
are scored, too.
"""

from scripts.report.drawn import uses_drawn_data

PAPER_TARGETS = f"{ROOT}/config/paper_targets.csv"
PAPER_COSTS = f"{ROOT}/config/paper_costs.csv"
PAPER_RELEASED = {
    expand(rules.rae_score_published.output.metrics, encoder=name)[0]: f"released/{name}"
    for name, one in RAE_ENCODERS.items()
    if one.model in MODELS and RAE_PUBLISHED[name].decoder in MODELS
}
PAPER_RUNS = REPORT_RUNS | {"rae": REPORT_RUNS["rae"] | PAPER_RELEASED}
PAPER_DRAWN = [
    name for name in PAPER_RUNS if uses_drawn_data({"results": RESULTS, name: getattr(CONFIG, name).model_dump()})
]
PAPER_FRONT = f"--front-page {shlex.quote(RESULTS)}/index.html"
PAPER_PIPELINES = {"paper": REPORT, **{f"paper/{pipeline}": [pipeline] for pipeline in PAPER_RUNS}}  # by table


rule report_compare_paper:
    input:
        lambda wildcards: [file for pipeline in PAPER_PIPELINES[wildcards.table] for file in PAPER_RUNS[pipeline]],
    output:
        table=f"{RESULTS}/{{table}}.csv",
        page=f"{RESULTS}/{{table}}.md",
        html=f"{RESULTS}/{{table}}.html",
        meta=f"{RESULTS}/{{table}}.meta.json",
    log:
        f"{LOGS}/report/compare_paper/{{table}}.log",
    benchmark:
        f"{BENCHMARKS}/report/compare_paper/{{table}}.tsv"
    wildcard_constraints:
        table="|".join(PAPER_PIPELINES),
    conda:
        "../envs/report.yaml"
    threads: class_threads("light")
    resources:
        **class_resources("light"),
    params:
        step=outside(STEP),
        runs=lambda wildcards, output: " ".join(
            f"--{pipeline} {' '.join(shlex.quote(f'{run}={file}') for file, run in PAPER_RUNS[pipeline].items())}"
            for pipeline in PAPER_PIPELINES[wildcards.table]
        ),
        pipelines=lambda wildcards, output: PAPER_PIPELINES[wildcards.table],
        drawn=lambda wildcards: [name for name in PAPER_PIPELINES[wildcards.table] if name in PAPER_DRAWN],
        front=lambda wildcards, output: PAPER_FRONT if wildcards.table == "paper" else "",
        targets=outside(PAPER_TARGETS),
        costs=outside(PAPER_COSTS),
        models=outside(MODELS_TABLE),
        tables=[file_digest(PAPER_TARGETS), file_digest(PAPER_COSTS), file_digest(MODELS_TABLE)],
        code=code_key("scripts.report.compare_paper"),
    message:
        "Compare with published numbers ({wildcards.table})"
    shell:
        "{params.step} scripts.report.compare_paper"
        " {params.runs}"
        " --pipelines {params.pipelines}"
        " --drawn {params.drawn}"
        " {params.front}"
        " --targets {params.targets:q}"
        " --costs {params.costs:q}"
        " --models {params.models:q}"
        " --output {output.table:q}"
        " --code-key {params.code}"
        " --threads {threads}"
        " --meta {output.meta:q}"
        " 2>&1 | tee {log:q}"


rule paper:
    input:
        expand(rules.report_compare_paper.output, table="paper"),
    localrule: True


for pipeline, wanted in REPORT_TARGETS.items():

    rule:
        name:
            f"reproduce_{pipeline}"
        input:
            wanted,
            expand(rules.report_compare_paper.output, table=f"paper/{pipeline}"),
        localrule: True
