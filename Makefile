# Every target prints the command that it runs; type those yourself whenever you like.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements.lock
INSTALLED := $(VENV)/installed
CONDA := .venv-conda/installed
CORES ?= all
TEST_PROCESSES ?= 2
RESULTS ?= results
PIPELINES ?= vase busi rae coca biomedica
PRUNED = $(if $(filter-out file,$(origin RESULTS)),--results $(RESULTS))
DEMO := $(BIN)/snakemake --configfile config/demo.yaml --cores $(CORES)

.PHONY: help install demo smoke test test-long test-cluster test-conda lint format config docs dag status compare prune accept adopt rehash reshard doctor lock dvc clean-env clean-demo
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# A lock newer than the stamp, as after a checkout of another commit, reinstalls what differs. Bytecode is made
# here: where PYTHONDONTWRITEBYTECODE is set, as in many containers, each step would compile its imports for 10 to 20 s.
install: $(INSTALLED) ## the locked environment in .venv

$(INSTALLED): $(LOCK)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Error: $(PYTHON) is Python {v[0]}.{v[1]}, expected 3.11 or newer.\nHint: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)")'
	@[ "$$(uname -sm)" = "Linux x86_64" ] || { echo "Error: the lock is for Linux x86_64, this is $$(uname -sm)."; echo "Hint: use a Linux machine or container."; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { echo "Hint: install your system's venv package (Debian: python3-venv)."; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet $$(grep '^uv==' $(LOCK))
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirement $(LOCK)
	@touch $@

demo: install ## all five pipelines on embedded data; ends with the headline numbers and where the time went
	$(DEMO) --prioritize vase  # the longest chain
	$(BIN)/python -m scripts.report.overview results/demo

smoke: install ## all five pipelines at their published sizes, 5 steps each, random weights (one GPU); `make smoke PIPELINES=rae`
	$(BIN)/snakemake --configfile config/smoke.yaml --cores $(CORES) $(PIPELINES)

test: install ## all tests that this machine can run, but for `make test-long`
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --durations 20

test-long: install ## the tests of a quarter of an hour and more, which the others leave out
	$(BIN)/python -m pytest --long tests/test_vase_three_seeds.py tests/test_smoke_gpu.py
	tests/slurm/install.sh
	$(CLUSTER_TESTS) --long $(SOAK) -k whole

# Outages are felt by every job, so they have a cluster of their own, and the soak, which has a time limit, the machine.
CLUSTER_TESTS = tests/slurm/with_cluster.sh $(BIN)/python -m pytest -m cluster --durations 10
OUTAGES := tests/test_cluster_outages.py
SOAK := tests/test_cluster_soak.py
test-cluster: install ## the tests on a Slurm cluster, which is made for them and taken down (root, Debian packages)
	tests/slurm/install.sh
	$(CLUSTER_TESTS) $(OUTAGES) & $(CLUSTER_TESTS) -n 4 --dist loadfile --ignore $(OUTAGES) --ignore $(SOAK); \
	status=$$?; wait $$! && exit $$status
	$(CLUSTER_TESTS) $(SOAK)

test-conda: $(CONDA) ## the tests that make every conda environment and run rules in them (10 GB of wheels)
	-tests/slurm/install.sh
	KILN_CONDA=1 $(BIN)/python -m pytest -m conda tests/test_conda.py --durations 20

# The conda of these tests (tests/conda) has packages of its own, and hands out the Python that it runs on.
$(CONDA): tests/conda/requirements.txt tests/conda/channel.py | $(INSTALLED)
	$(BIN)/uv venv --quiet --clear --python 3.11 .venv-conda
	$(BIN)/uv pip install --quiet --python .venv-conda/bin/python --requirement tests/conda/requirements.txt
	.venv-conda/bin/python tests/conda/channel.py .venv-conda/channel
	@touch $@

lint: install ## ruff, snakefmt, snakemake --lint, generated files up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile rules workflow/Snakefile
	$(BIN)/snakemake --lint --configfile config/demo.yaml
	$(BIN)/python -m scripts.config --check
	$(BIN)/python -m scripts.envs --check
	$(BIN)/python tests/rerun_cases.py --check

format: install ## ruff and snakefmt, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules workflow/Snakefile

config: install ## make config/default.yaml, config/schema.json, docs/configuration.md, envs/*.yaml and the table in docs/reruns.md anew
	$(BIN)/python -m scripts.config --write
	$(BIN)/python -m scripts.envs --write
	$(BIN)/python tests/rerun_cases.py --write

docs: install ## the documentation as a site in site/, by mkdocs-material in .venv-docs; a broken link fails
	[ -x .venv-docs/bin/mkdocs ] || $(PYTHON) -m venv .venv-docs
	$(BIN)/uv pip install --quiet --python .venv-docs/bin/python --requirement docs/requirements.lock
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

dag: install ## docs/dag.svg, the picture of all rules (needs graphviz; after `make demo`, which shows the shards)
	$(BIN)/snakemake --configfile config/demo.yaml --rulegraph dot | dot -Tsvg -o docs/dag.svg

accept: TARGET ?= $(firstword $(subst _, ,$(RULE)))
accept: install ## keep a result though its inputs, settings or code changed: RULE=rae_train_autoencoder ARGS="..."
	@[ -n "$(RULE)" ] || { echo "Error: accept needs the name of a rule."; echo "Hint: make accept RULE=rae_train_autoencoder"; exit 1; }
	KILN_ACCEPT=$(RULE) $(BIN)/snakemake $(TARGET) $(ARGS) --dry-run --quiet

adopt: install ## wait for the Slurm jobs that a killed Snakemake left, so that the next one carries on
	$(BIN)/python -m scripts.common.adopt

status: install ## the trainings that run or stopped, a line each (RESULTS=results/demo)
	@$(BIN)/python -m scripts.common.status --state $(RESULTS)/state

compare: install ## what differs between two results folders: settings, code, data, packages, scores (A=results/a B=results/b)
	@[ -n "$(A)" ] && [ -n "$(B)" ] || { echo "Error: compare needs two results folders."; echo "Hint: make compare A=results/a B=results/b"; exit 1; }
	@$(BIN)/python -m scripts.common.compare_runs "$(A)" "$(B)" $(ARGS)

prune: install ## list what no configuration names, what is spent or left over; `make prune YES=1` removes it (CONFIGS="a.yaml b.yaml" OLDER_THAN=14)
	@$(BIN)/python -m scripts.prune $(PRUNED) $(addprefix --configfile ,$(CONFIGS)) $(if $(OLDER_THAN),--older-than $(OLDER_THAN)) $(if $(YES),--yes)

rehash: install ## read all images anew, to find changes that kept size and time, and redo those (ARGS="--configfile ...")
	$(BIN)/snakemake --cores $(CORES) $(ARGS) --config rehash=true -- vase_images

reshard: install ## as few shards of images as can be; the next run computes nothing anew (RESULTS=results/demo)
	@$(BIN)/python -m scripts.common.reshard --results $(RESULTS) $(ARGS)

doctor: install ## versions, driver, GPUs, disk, hub: a line each
	$(BIN)/python -m scripts.common.doctor

lock: install ## resolve requirements.in anew into the lock
	$(BIN)/uv pip compile requirements.in --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-annotate --no-header --output-file $(LOCK)

dvc: install ## DVC, which benchmarks compare with, in .venv-dvc: it needs older packages than Kiln
	$(PYTHON) -m venv .venv-dvc
	$(BIN)/uv pip install --quiet --python .venv-dvc/bin/python --requirement benchmarks/dvc.lock

clean-demo: ## remove results/demo
	rm -rf results/demo

clean-env: ## remove .venv, .venv-conda and .venv-docs
	rm -rf $(VENV) .venv-conda .venv-docs
