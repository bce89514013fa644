"""
Kiln: five vision and vision-language projects, from raw data to a scored model.

    snakemake --configfile config/demo.yaml --cores all     the embedded demo, minutes on a laptop
    snakemake --profile slurm vase_images                   one target on a cluster
    snakemake -n ...                                        why each job would run
"""

from snakemake.exceptions import WorkflowError
from snakemake.sourcecache import LocalSourceFile
from snakemake.utils import min_version

min_version("9.27")

if not isinstance(workflow.current_basedir, LocalSourceFile):
    raise WorkflowError(
        f"{workflow.current_basedir.get_path_or_uri(secret_free=True)}: Kiln's steps are Python modules beside its rules,"
        " and a module by its URL brings the rules alone\n"
        "Hint: clone Kiln, or add it as a git submodule, and give the path of its workflow/Snakefile (docs/modules.md)"
    )


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
