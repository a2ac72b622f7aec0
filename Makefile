# Every target starts from Python 3.11 and make alone: it creates .venv, installs, and does its job.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
PIP := $(BIN)/pip install -q --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# One thread per process: the tests run in two processes, and the problems are small.
THREADS := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
# What differs between machines: vector instructions, threads, the order of the tests, neighbours.
MACHINES := on-old-instructions on-two-threads in-any-order beside-a-busy-process
SEED ?= $(shell date +%s)
# A file's tests go to one process, so that what they share is made once; in the order that
# conftest.py gives them, the longest files first, so that the two processes end together.
PYTEST := $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# What the core alone can run; the other tests need frameworks.
CORE_TESTS := $(addprefix tests/test_,$(addsuffix .py,architecture schedule schedule_refusals conditions conditions_refusals legendre \
	legendre_edges laws flow limit limit_input descent estimator estimator_cv estimator_net estimator_ridge coder completion \
	spectrum weightdecay weightdecay_resume ledger units feedback feedback_reports lint))

# Two installs into one .venv at the same time would spoil it.
.NOTPARALLEL:
.PHONY: help demo test test-slow test-deepspeed fuzz test-browser test-machines $(MACHINES) \
	test-lowest lint bench docs wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 16

demo: .venv/.installed-lab ## run the main experiment and make a page with the pictures
	$(BIN)/mirrorflow demo --out demo

test: .venv/.installed-test ## run the tests (minutes)
	$(THREADS) $(PYTEST)

test-slow: .venv/.installed-cluster ## run the slow tests, those of a Ray cluster too
	$(THREADS) $(PYTEST) -m "slow and not gpu and not download"

test-deepspeed: .venv/.installed-test ## run DeepSpeed on the CPU (minutes; builds it from source)
	$(PIP) setuptools wheel && DS_BUILD_OPS=0 $(PIP) --no-build-isolation 'deepspeed>=0.19'
	$(THREADS) $(BIN)/pytest -q -m deepspeed

test-machines: ## run the tests as on other machines; says on which of them they fail (an hour)
	@failed=; for machine in $(MACHINES); do \
		echo "== $$machine"; $(MAKE) --no-print-directory $$machine || failed="$$failed $$machine"; \
	done; if [ "$$failed" ]; then echo "failed:$$failed"; exit 1; fi; echo "passed: $(MACHINES)"

on-old-instructions: .venv/.installed-test
	OPENBLAS_CORETYPE=Prescott ATEN_CPU_CAPABILITY=default $(THREADS) $(PYTEST)

on-two-threads: .venv/.installed-test
	OPENBLAS_CORETYPE=Haswell ATEN_CPU_CAPABILITY=avx2 $(subst =1,=2,$(THREADS)) $(PYTEST)

# Repeat an order that fails by SEED=... The tests seed themselves, so the plugin need not.
in-any-order: .venv/.installed-test
	$(THREADS) $(PYTEST) -p randomly --randomly-seed=$(SEED) --randomly-dont-reset-seed

beside-a-busy-process: .venv/.installed-test
	@$(BIN)/python -c "while True: pass" & busy=$$!; trap "kill $$busy" EXIT INT TERM; \
		$(THREADS) $(PYTEST)

test-lowest: ## run the tests of the core on the lowest versions that pyproject.toml admits
	rm -rf .venv-lowest && $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python .ci/lowest.py pyproject.toml > .venv-lowest/lowest.txt
	.venv-lowest/bin/pip install -q --disable-pip-version-check -c .venv-lowest/lowest.txt torch
	.venv-lowest/bin/pip install -q --disable-pip-version-check -c .venv-lowest/lowest.txt -e '.[test-core]'
	$(THREADS) .venv-lowest/bin/pytest -q -n 2 $(CORE_TESTS)

fuzz: .venv/.installed-test ## hand mutated files to everything that reads files (minutes)
	$(THREADS) $(BIN)/python tests/fuzz.py $(SEED)

test-browser: .venv/.installed-test ## run the tests of the page; fails where there is no Chromium
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ echo "no Chromium: put chromium or google-chrome on PATH"; exit 1; }
	MIRRORFLOW_REQUIRE_BROWSER=1 $(BIN)/pytest -q -m browser

lint: .venv/.installed-dev ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest -q -m "" tests/test_packaging.py -k type_checkers

bench: .venv/.installed-bench ## measure the speeds that the README quotes, into results/
	$(BIN)/python -m benchmarks

wheel: .venv/.installed ## build the wheel, install it into an empty environment, and run it there
	rm -rf dist .venv-wheel && $(BIN)/pip wheel -q --no-deps -w dist . && $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/pip install -q --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) torch
	.venv-wheel/bin/pip install -q --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) dist/*.whl
	cd .venv-wheel && bin/python ../.ci/wheel.py

docs: .venv/.installed-docs ## build the documentation into docs/_build
	$(THREADS) $(BIN)/sphinx-build -W -q docs docs/_build/html

clean: ## remove what make has made
	rm -rf .venv .venv-lowest .venv-wheel dist demo docs/_build

# torch comes first and alone, so that the constraint decides which build pip takes.
.venv/.torch: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mirrorflow needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) torch
	touch $@

.venv/.installed: .venv/.torch pyproject.toml
	$(PIP) -e .
	touch $@

.venv/.installed-%: .venv/.installed pyproject.toml
	$(PIP) -e '.[$*]'
	touch $@
