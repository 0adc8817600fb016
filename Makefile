# make demo        install, start the stack, train on real data, say where to look     (ORC_HOME=… for another data directory)
# make test        every test tier that needs nothing but Python; ends with pytest's summary     (TESTS=tests/unit for one tier, ARGS=-n0 in one process)
# make check       format, lint, layers, types           make format       mends format and import order
# make chaos       all fault tests, with root and strace, and half an hour of `make nemesis` (not with ARGS)
# make nemesis     breaks everything at random under a job and a sweep and compares what they come to (ARGS="--seconds 600 --seed 7")
# make ui-test      the web pages of a stack in a headless Chromium
# make campaign    kills parts of delivery at random until 1,000 kills landed and 1,000,000 points are there (ARGS="--kills 5000 --seed 7")
# make bench-ls    how long `orc ls` takes over 10,000 runs, beside the interpreter's own start; build/bench/ls.json
# make bench-metrics  what metrics cost and how much the tracker takes, beside W&B, MLflow, Aim, tensorboardX (ARGS="--only log"); 40 minutes
# make bench-checkpoints  what a save costs a training, beside torch.save, DCP, Ray Train and others (ARGS="--only stall"); about an hour
# make campaign-checkpoints  kills trainers and writers 200 times at random and checks what loads after each, beside DCP and Ray Train
# make bench-sweeps  what a sweep costs, beside Ray Tune over TorchTrainer and bare processes (ARGS="--only asha", "--quick"); an hour and a half
# make bench-failures  what a killed worker, a lost node, killed services and the guards cost (ARGS="--only kill"); three quarters of an hour
# make campaign-sweeps  kills drivers, workers, groups, trackers and heads of sweeps at random and compares the tables of trials
# PYTHON=/path/to/python3.11 chooses the interpreter, VENV=/path another place for the environment.

VENV ?= .venv
PYTHON ?=
export VENV PYTHON
RUN = "$(VENV)/bin/python" -m
TESTS ?= tests/unit tests/services tests/ray tests/chaos tests/journeys
PYTEST = $(RUN) pytest -p tests.plugins.tiers
LANES = -n 2 --no-loadscope-reorder
CODE = orchestrator actors jobs cluster tests tools setup.py

.PHONY: demo test check format chaos campaign campaign-checkpoints campaign-sweeps ui-test bench-ls bench-metrics bench-checkpoints bench-sweeps bench-failures nemesis venv

demo:
	@tools/venv demo
	@"$(VENV)/bin/python" tools/demo.py

venv:
	@tools/venv test,check,demo

test: venv
	@$(PYTEST) $(LANES) $(TESTS) $(ARGS)

check: venv
	@$(RUN) ruff format --check --output-format concise $(CODE)
	@$(RUN) ruff check --output-format concise $(CODE)
	@"$(VENV)/bin/lint-imports"
	@$(RUN) mypy orchestrator actors jobs cluster

format: venv
	@$(RUN) ruff format $(CODE)
	@$(RUN) ruff check --fix $(CODE)

chaos: venv
	@tools/needs root strace unshare
	@$(PYTEST) -m "" tests/chaos $(ARGS)
	@[ -n "$(ARGS)" ] || $(RUN) tests.plugins.nemesis

nemesis: venv
	@$(RUN) tests.plugins.nemesis $(ARGS)

campaign: venv
	@$(RUN) tests.plugins.campaign $(ARGS)

campaign-checkpoints: venv
	@$(RUN) tests.plugins.checkpoint_campaign $(ARGS)

campaign-sweeps: venv
	@$(RUN) tests.plugins.sweep_campaign $(ARGS)

bench-ls: venv
	@"$(VENV)/bin/python" tools/bench/ls.py

bench-metrics: venv
	@"$(VENV)/bin/python" tools/bench/metrics $(ARGS)

bench-checkpoints: venv
	@"$(VENV)/bin/python" tools/bench/checkpoints $(ARGS)

bench-sweeps: venv
	@"$(VENV)/bin/python" tools/bench/sweeps $(ARGS)

bench-failures: venv
	@"$(VENV)/bin/python" tools/bench/failures $(ARGS)

ui-test: venv
	@tools/needs chromium
	@$(PYTEST) -m "" tests/ui $(ARGS)
