# `make serve` runs Precast, `make test` tests it; `make help` lists the rest.

MAKEFLAGS += --no-print-directory
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
PRECAST_HOME ?= $(CURDIR)/.precast
export PRECAST_HOME

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PROTOS := $(shell find protos -name '*.proto')

say = @printf '\033[1m==>\033[0m %s\n'

.PHONY: help
help:
	@sed -n 's/^## \([a-z-]*\): \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

## protos: generate Python code and type stubs from protos/
.PHONY: protos
protos: $(STAMPS)/dev
	@$(BIN)/python scripts/protos.py

## check-protos: fail if the committed generated code is not what protos/ gives
.PHONY: check-protos
check-protos: $(STAMPS)/dev
	@$(BIN)/python scripts/protos.py --check
