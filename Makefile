# Everything runs in .venv, which `make setup` fills with the releases in constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A service is a dozen Python processes; without compiled files each of them would compile the whole service anew.
unexport PYTHONDONTWRITEBYTECODE
CHECKED := $(wildcard app magcache_core models/recipe benchmarks scripts tests)

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-rest bench chaos gpu-try fuzz lint format manifests metrics dashboards monitoring train clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make .venv with the pinned dependencies (instant when nothing changed)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13) and "Python 3.11 or 3.12 is needed, this is " + sys.version.split()[0] + " (make PYTHON=python3.11 ...)")'
	@# A broken .venv (moved, or its Python gone) is made anew; a whole one is updated in place.
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@echo 'Installing the pinned dependencies into $(VENV); a few minutes the first time'
	@$(BIN)/python -m pip install --no-compile --disable-pip-version-check --progress-bar off --quiet -c constraints.txt -e '.[dev]'
	@# pip would compile on one core. Some packages hold files for other releases of Python, which do not compile.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

demo: setup ## Serve flux-tiny, ask for an image, write out/demo.png, keep serving (ONCE=1: then stop)
	@$(BIN)/python -m scripts.demo $(if $(ONCE),--once) $(ARGS)

serve: setup ## Serve deployments/flux-tiny.yaml (another: CONFIG=deployments/flux.yaml)
	@RAY_USAGE_STATS_ENABLED=0 exec $(BIN)/python -m app.serve $(or $(CONFIG),deployments/flux-tiny.yaml)

test: setup ## Run the tests on two cores, about six minutes (some of them: ARGS="tests/metrics -k merge")
	$(BIN)/python -m pytest $(or $(ARGS),-n 2 --durations 10 -m "not faults and not nodes and not bench")

test-rest: setup ## What make test leaves out: services that break, several Ray nodes (as root), benchmarks, the recipe
	$(BIN)/python -m pytest $(or $(ARGS),-n 2 --durations 10 -m "faults or nodes or bench")

bench: setup ## Measure serving against diffusers' own into docs/performance.md, 12 minutes (ARGS=--quick: does it run?)
	$(BIN)/python -m benchmarks.serving $(or $(ARGS),--page docs/performance.md)

chaos: setup ## Kill, stop and starve a service's processes under load, half an hour (some: ARGS="--only rank --rounds 3")
	@$(BIN)/python -m benchmarks.chaos $(ARGS)

gpu-try: ## Run the GPU benchmark, tiny and on the CPU, with what a GPU machine has (torch 2.11, no Ray; 5 GB)
	@bash benchmarks/gpu_try.sh $(ARGS)

fuzz: setup ## Send a running service some 2,000 requests as its openapi.json describes them (URL=http://...; ARGS="--seed 7")
	$(BIN)/schemathesis run $(or $(URL),http://127.0.0.1:8000)/openapi.json $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

format: setup ## Let ruff format and fix
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

manifests: setup ## Bring k8s/ up to date with deployments/ and the rules
	@$(BIN)/python -m scripts.render_manifests

metrics: setup ## Write docs/metrics.md from the catalogue
	@$(BIN)/python -m app.metrics > docs/metrics.md

dashboards: setup ## Write k8s/base/dashboards/*.json from scripts/dashboards
	@$(BIN)/python -m scripts.dashboards

monitoring: setup ## Watch the running service with Prometheus (needs Debian's package prometheus) on port 9090
	@$(BIN)/python -m scripts.monitoring $(ARGS)

train: setup ## Train models/flux-tiny from scratch (hours; resumes where it stopped)
	$(BIN)/python -m models.recipe $(ARGS)

clean: ## Remove the environment, the caches and out/
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .schemathesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
