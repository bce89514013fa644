"""
Kiln: five vision and vision-language projects, from raw data to a scored model.

    snakemake --configfile config/demo.yaml --cores all     the embedded demo, minutes on a laptop
    snakemake --profile slurm vase_images                   one target on a cluster
    snakemake -n ...                                        why each job would run
"""

from snakemake.utils import min_version

min_version("9.27")


include: "rules/common.smk"


if DeploymentMethod.APPTAINER in IN_ENVIRONMENT:  # else even its path would be checked, which may have a space in it

    container: f"{ROOT}/containers/kiln.sif"


include: "rules/retrieve.smk"
include: "rules/demo.smk"
include: "rules/vase.smk"
include: "rules/vase_vlm.smk"
include: "rules/busi.smk"
include: "rules/rae.smk"
include: "rules/coca.smk"
include: "rules/biomedica.smk"
include: "rules/report.smk"
include: "rules/paper.smk"
include: "rules/provenance.smk"
include: "rules/guards.smk"


rule all:
    default_target: True
    input:
        rules.report.input,
        rules.report_describe_run.output.crate,
