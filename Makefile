# One command for each wish. `make` alone says what there is.
.DEFAULT_GOAL := help
.PHONY: help install install-dev demo demo-distributed up up-distributed down test test-fast test-postgresql \
	test-distributed check bench chaos lock dist clean

BIN := .venv/bin
# Real guests need root; the tests' and the demo's own environment goes with it.
ROOT := $(shell [ "$$(id -u)" -eq 0 ] || echo sudo)
DIR ?=
ARGS ?=

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

install: ## host packages, .venv and pinned packages; starts nothing
	@packaging/install.sh run

install-dev: ## the same with what the tests need
	@packaging/install.sh dev

demo: install ## a real guest through its whole life on two hosts, then nothing is left (2 to 4 minutes) [ARGS=--one-host]
	@$(ROOT) $(BIN)/instar demo $(ARGS)

up: install ## a cloud that stays up until Ctrl-C [DIR=…] [ARGS="--port 9000"]
	@$(ROOT) $(BIN)/instar up $(if $(DIR),--dir $(DIR)) $(ARGS)

up-distributed: ## a cloud of many processes, on PostgreSQL and RabbitMQ, until Ctrl-C [DIR=…] [ARGS="--apis 3"]
	@packaging/install.sh distributed
	@$(ROOT) $(BIN)/instar distributed up --dir $(or $(DIR),/var/lib/instar-distributed) $(ARGS)

demo-distributed: ## the same walk through a guest's life, on such a cloud (3 to 6 minutes)
	@packaging/install.sh distributed
	@$(ROOT) $(BIN)/instar demo --distributed $(ARGS)

down: ## ends the guests of a stopped cloud and removes its networks [DIR=…] [ARGS=--delete]
	@$(ROOT) $(BIN)/instar down $(if $(DIR),--dir $(DIR)) $(ARGS)

# First what needs no host, then the rest by files, those that take longest first.
test: install-dev ## everything: units, real guests, crashes, real clients (15 to 20 minutes on two cores)
	@status=0; \
	$(ROOT) $(BIN)/python -m pytest -n 4 --dist worksteal -m "not host and not guest" $(ARGS) || [ $$? -eq 5 ] || status=1; \
	$(ROOT) $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "host or guest" $(ARGS) \
		|| [ $$? -eq 5 ] || status=1; \
	exit $$status

test-fast: install-dev ## what needs no host and no guest (one to three minutes)
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "not host and not guest and not slow" $(ARGS)

test-postgresql: install-dev ## all rooms' tests that need no host, on PostgreSQL in the place of SQLite [ARGS=tests/images]
	@INSTAR_TEST_DATABASE=postgresql $(BIN)/python -m pytest -n 2 -m "not host and not guest" $(ARGS)

# A conductor is stopped for a minute there, and every operation is broken at every step.
test-distributed: test-postgresql ## the same; then all operations on PostgreSQL and RabbitMQ, and the servers' own tests
	@INSTAR_TEST_DATABASE=postgresql INSTAR_TEST_BUS=rabbitmq INSTAR_TEST_LEASE_S=6 INSTAR_TEST_STOPPED_S=60 \
		$(BIN)/python -m pytest -n 2 -m "not guest" tests/lifecycle tests/engine tests/api tests/bus $(ARGS)

check: install-dev ## ruff, strict types, and who may import whom
	@$(BIN)/ruff check src tests bench
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench: install-dev ## the numbers to hold, measured on this machine
	@$(ROOT) $(BIN)/python -m bench.run $(ARGS)

chaos: install-dev ## random work and random kills on a private cloud of many processes [ARGS="--seed 1 --minutes 2"]
	@$(ROOT) $(BIN)/python -m bench.chaos_report $(ARGS)

lock: install-dev ## writes the pinned requirement files anew
	@packaging/lock.sh

dist: install-dev ## source archive and wheel in dist/
	@$(BIN)/python -m build --outdir dist .

clean: ## caches and build results; .venv stays
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache src/*.egg-info
