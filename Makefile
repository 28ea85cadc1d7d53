# The two commands of the README are `make demo` and `make test`; each does all of its own set-up.
# ARGS goes to the program that a target starts: make test ARGS="tests/unit -k book"

PYTHON := .venv/bin/python
LOCK := $(PYTHON) -m uv pip compile --quiet --universal --python-version 3.11 \
	--no-emit-index-url --no-emit-find-links --no-header --no-annotate $(ARGS)
COMFYUI_URL ?=
A1111_URL ?=
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check fix lock arch coverage drive trace bench setup-demo setup-test

help: ## what can be made
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

demo: setup-demo ## simulated GPUs and engines, a small workload, a live table
	@.venv/bin/gpulane demo $(ARGS)

test: setup-test ## all tests; what is missing on this machine is skipped by name
	@scripts/test.sh $(ARGS)

check: setup-test ## format, lint, types, import contracts, then the tests
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m ruff check
	$(PYTHON) -m basedpyright
	$(PYTHON) scripts/arch.py --check
	@scripts/test.sh -m "not static" $(ARGS)

fix: setup-test ## formats, and mends what the linter can mend
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format

lock: setup-test ## pins the newest packages (one alone: ARGS="--upgrade-package NAME", all: ARGS=--upgrade)
	@$(PYTHON) -m uv --version >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet uv
	$(LOCK) pyproject.toml requirements.in --extra demo -o requirements.txt
	$(LOCK) pyproject.toml requirements.in requirements-dev.in --all-extras -c requirements.txt -o requirements-dev.txt

arch: setup-test ## draws the layers and checks every import against them
	@$(PYTHON) scripts/arch.py

coverage: setup-test ## the tests under coverage, as a table and in htmlcov/
	@rm -rf .cache/coverage && mkdir -p .cache/coverage
	$(PYTHON) -m coverage run -m pytest -m "not static" $(ARGS)
	$(PYTHON) -m coverage combine -q && $(PYTHON) -m coverage html -q && $(PYTHON) -m coverage report

drive: setup-test ## the acceptance flows against real servers: make drive COMFYUI_URL=... A1111_URL=...
	@$(PYTHON) -m tests.drive $(if $(COMFYUI_URL),--comfyui-url $(COMFYUI_URL)) \
		$(if $(A1111_URL),--a1111-url $(A1111_URL)) $(ARGS)

trace: setup-test ## real requests through the whole of it, with a report in docs/
	@$(PYTHON) bench/trace_run.py $(ARGS)

bench: setup-test ## the kept benchmarks, one after the other (about five minutes)
	@for run in decide.py store.py gap.py "gap.py --gpus 2" "gap.py --idle 20" "gap.py --start 100000" \
	  "handoff.py --jobs 12" "handoff.py --jobs 12 --vram-gib 24"; do \
	  echo "== bench/$$run"; $(PYTHON) bench/$$run || exit 1; done


setup-demo:
	@scripts/setup.sh demo

setup-test:
	@scripts/setup.sh test
