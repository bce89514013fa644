"""
What happens before, after and around the jobs: the plan is looked at, results are guarded and described.

REQUIRED INPUTS: none.

OUTPUTS:
    {results}/config.yaml     the resolved configuration of the last run
    {results}/code/           which modules the code keys of a run stand for
    {results}/records/        what Snakemake knows of the results, for copies and other users
    {results}/README.md       which run made this, the tree, and its sizes

STEPS: take over a copied folder, look at the plan (in dry runs too), own the results, run, record, describe.
"""

import threading

from snakemake.settings.types import RerunTrigger

from scripts.common import (
    accept,
    cluster_guard,
    edited,
    file_times,
    job_lines,
    locks,
    moments,
    prune,
    records,
    reshard,
    sizes,
    spent,
)
from scripts.common.artefacts import write_text
from scripts.common.env_key import env_key, require_majors
from scripts.common.failures import Watch
from scripts.report import introduction

METADATA = Path(".snakemake/metadata")
TRAININGS = (
    "vase_train_classifier",
    "vase_train_sft",
    "vase_train_grpo",
    "busi_train_lora",
    "coca_train",
    "rae_train_autoencoder",
    "biomedica_train_clip",
)
IN_MODULE = workflow.modifier.parent_modifier is not None
PLAIN = r"[\w.,-]+"  # a resource that is no expression
CONTROLLER = contextlib.ExitStack()  # what this process holds until it ends
FAILURES = Watch()


def refuse_edited():
    """Stop before the first job if one would read a result that was changed by hand."""
    planned = list(workflow.dag.needrun_jobs())
    remade = {file for job in planned for file in job.output}
    edited.refuse(Path(file) for file in sorted({file for job in planned for file in job.input} - remade))


def check_disk():
    """Stop, or warn in a dry run, if a disk lacks room for what the jobs that will run write."""
    named = ((name, job) for job in workflow.dag.needrun_jobs() for name in WRITES if retrain.is_rule(job, name))
    asked = ((name, need) for name, job in named for need in WRITES[name](job.wildcards))
    disk.require(disk.by_filesystem(asked), advise if workflow.dryrun else None)


def check_packages():
    """Stop, or warn in a dry run, if a job that will run needs packages that only its conda environment has."""
    try:
        require_majors(
            {(job.rule.name, environment_of(job.rule)) for job in workflow.dag.needrun_jobs() if job.rule.conda_env}
        )
    except KilnError as error:
        if not workflow.dryrun:
            raise
        advise(str(error))


def elsewhere():
    """Whether jobs are run on other machines; a dry run tells it only by the resources that it gives to all jobs."""
    return workflow.resource_settings.default_resources is not None if workflow.dryrun else not workflow.local_exec


def check_gpus():
    """Say so if jobs that will run on this machine ask for a GPU, and it has none."""
    if elsewhere():
        return
    one_of = {
        job.rule.name: job for job in workflow.dag.needrun_jobs() if Path(job.rule.basedir) == Path(ROOT, "rules")
    }
    asking = [name for name, job in one_of.items() if asks_for_gpu(job)]
    trainings = [name for name in asking if any(retrain.is_named(name, training) for training in TRAININGS)]
    doctor.advise_on_gpus([*sorted(trainings), *sorted(set(asking) - set(trainings))], CONFIG.device, advise)


def asks_for_gpu(job):
    """Whether a job's class has GPUs; see `class_resources`."""
    return bool(job.resources.get("gpu")) or "--gpus-per-node" in str(job.resources.get("slurm_extra", ""))


def check_account():
    """Say so in a dry run for Slurm if its account is not the user's; a run stops."""
    defaults = workflow.resource_settings.default_resources or {}
    account = str(defaults["slurm_account"].raw) if "slurm_account" in defaults else ""
    if workflow.dryrun and re.fullmatch(PLAIN, account):
        cluster_guard.advise_on_account(account, advise)


def check_names():
    """Stop before anything is planned if a target, or what `make accept` is to keep, is misspelt."""
    rules = [one.name for one in workflow.rules]
    kept = os.environ.get(accept.VARIABLE)
    if kept is not None and not any(retrain.is_named(one, kept) for one in rules):
        raise retrain.no_such_rule(kept, rules)
    asked = workflow.dag_settings
    for name in sorted({*asked.targets, *asked.forcerun, *asked.until, *asked.omit_from}):
        if re.fullmatch(r"[\w-]+", name) and name not in rules and not IN_MODULE:  # all files of ours lie in folders
            raise retrain.no_such_rule(name, rules)


def look_at_plan():
    """Before any job, and in dry runs: keep what `make accept` names, else guard finished trainings."""
    plan = retrain.Plan(workflow, CODES)
    refuse_edited()
    if accept.VARIABLE in os.environ:
        accept.accept(plan, os.environ[accept.VARIABLE], retrain.at_exit)
        records.keep(Path(RESULTS), METADATA)
    else:
        retrain.guard(plan, TRAININGS, CONFIG.confirm_gpu_hours, CONFIG.allow_retrain, retrain.at_exit)
        others = [Path(file).absolute() for file in workflow.config_settings.configfiles]
        if others and USER_FILE not in others and not IN_MODULE:
            kiln_config.advise_on_user_file(Path("config/config.yaml"), os.path.relpath(others[-1]), config, advise)
        if not (IN_ENVIRONMENT or workflow.touch):
            check_packages()
        if not workflow.touch:
            check_gpus()
            check_account()
        if CONFIG.check_disk and not workflow.touch:  # which writes nothing
            check_disk()
        if ADVICE:
            retrain.at_exit("\n" + "\n\n".join(ADVICE))
        if not workflow.dryrun:
            CODES.keep()
    if IN_MODULE and not workflow.dryrun and any(workflow.dag.needrun_jobs()):
        begin()  # of a module, Snakemake leaves `onstart` out


@functools.cache
def own_results():
    """Be the only run that writes in the results folder, until this process ends."""
    CONTROLLER.enter_context(locks.writer_lock(Path(RESULTS), "snakemake", mode=0o666))


def set_future_times():
    """After a clock has jumped back, have nothing lie in the future that jobs of this run are made from."""
    ours = {file for job in workflow.dag.jobs for file in [*job.output, *filter(None, [job.benchmark])]}
    theirs = {file for job in workflow.dag.needrun_jobs() for file in job.input} - ours
    file_times.bring_back_from_future(map(Path, ours), map(Path, theirs))


def guard_cluster():
    """Stop before the first job is submitted to Slurm if another controller, its jobs or the profile are in the way."""
    directory, options = Path.cwd(), workflow.executor_settings
    CONTROLLER.enter_context(cluster_guard.only_controller(directory, "snakemake"))
    cluster_guard.refuse_leftovers(directory, Path(workflow.workdir_init))
    defaults = workflow.resource_settings.default_resources
    stated = {name: str(defaults[name].raw) for name in ("slurm_account", "slurm_partition") if name in defaults}
    plain = {name: value for name, value in stated.items() if re.fullmatch(PLAIN, value)}
    account = None if options.no_account else plain.get("slurm_account")
    file = options.partition_config
    table = yaml.safe_load(Path(workflow.workdir_init, file).read_text())["partitions"] if file else {}
    cluster_guard.check_profile(account, [*table, *filter(None, [plain.get("slurm_partition")])])
    if options.status_command == "squeue":
        cluster_guard.advise_on_job_age(options.init_seconds_before_status_checks, logger.warning)


def begin():
    """Before the first job of a run: own the results, have their clocks in line, leave the configuration with them."""
    if workflow.is_main_process:
        or_stop(own_results)
        if not IN_MODULE:  # the others' files are not ours
            or_stop(set_future_times)
    if workflow.is_main_process and workflow.executor_plugin.name == "slurm":
        or_stop(guard_cluster)
        record_finished()
    write_text(Path(RESULTS, "config.yaml"), kiln_config.to_yaml(CONFIG))


def record_finished():
    """Have Snakemake record the jobs that ended well without a controller, so that later changes rerun them."""
    for job in workflow.dag.jobs:
        if job.output and not workflow.dag.needrun(job) and not workflow.persistence.has_metadata(job):
            if retrain.made_as_now(job):
                workflow.async_run(workflow.persistence.finished(job))


def describe_results():
    """Keep which folders variants name, and write {results}/README.md."""
    made = [str(path) for rule in workflow.rules for path in [*rule.output, *rule.log, rule.benchmark] if path]
    below = [path.removeprefix(f"{RESULTS}/") for path in made if path.startswith(f"{RESULTS}/")]
    try:
        prune.remember_variants(Path(RESULTS), below)
        tree = Path(ROOT, "docs/results.md").read_text(encoding="utf-8")
        tree = introduction.rows_of(tree, Path(RESULTS), RUNS_OF).replace("# The", "## The", 1)
        values = yaml.safe_load(kiln_config.to_yaml(CONFIG))
        text = introduction.introduction(values, workflow.configfiles, sys.argv)
        sizes.write_readme(Path(RESULTS), f"{text}\n{tree}", kiln_config.current_runs([CONFIG]))
    except (KilnError, OSError) as error:  # of a disk that is full, say: the run itself ended well
        logger.warning(f"{RESULTS}/README.md is not up to date: {error}")


def forget_places_of_environments():
    """Have no rule rerun because conda is switched on or off, or an environment lies elsewhere; see `key_environments`."""
    workflow.dag_settings.rerun_triggers = frozenset(workflow.rerun_triggers) - {RerunTrigger.SOFTWARE_ENV}


def environment_of(rule):
    """The environment file of a rule that has one."""
    return Path(os.path.normpath(os.path.join(str(rule.basedir), str(rule.conda_env))))


def key_environments():
    """Have every rule rerun when a package of its environment changes, with conda or without.

    Snakemake's own trigger compares environments with their place on this machine, and only where conda is in use.
    """
    for one in workflow.rules:
        if one.conda_env and environment_of(one).parent == Path(ROOT, "envs"):
            one.set_params(environment=env_key(environment_of(one)))


def show_job_lines():
    """Have the terminal show a line for each finished job of a run on this machine; steps' words go to their logs."""
    here = lambda: workflow.local_exec and not workflow.touch
    lines = job_lines.show(logger, workflow.output_settings, lambda: len(workflow.dag), here, Path(RESULTS))

    def be_calm():
        if here():
            shell.prefix(f"{SHELL_PREFIX}exec > /dev/null; ")  # what `tee` writes beside the log
            threading.Thread(target=lines.name_running, args=(logger.info,), daemon=True).start()

    if lines:
        logger.addHandler(moments.At(moments.PLANNED, be_calm))


key_environments()
if workflow.is_main_process:
    code_keys.keep()
    if not IN_MODULE:
        show_job_lines()
    logger.addHandler(FAILURES)
    or_stop(records.take_over, Path(RESULTS), METADATA)
    logger.addHandler(moments.At(moments.STARTED, check_names))
    logger.addHandler(moments.At(moments.PLANNED, look_at_plan))
    if not IN_MODULE:
        logger.addHandler(moments.At(moments.STARTED, forget_places_of_environments))


onstart:
    begin()


onsuccess:
    spent.sweep(Path(STATE))
    reshard.sweep(Path(STATE))
    or_stop(records.keep, Path(RESULTS), METADATA)
    checked_alone = {job.rule.name for job in workflow.dag.jobs} == {"verify"}  # which makes nothing
    if workflow.is_main_process and not checked_alone:
        describe_results()


onerror:
    spent.sweep(Path(STATE))
    if FAILURES.failed:
        logger.error(f"\n{FAILURES.report(Path.cwd())}\n")
    or_stop(records.keep, Path(RESULTS), METADATA)
