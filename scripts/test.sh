#!/usr/bin/env bash
# Runs the tests in the environment that scripts/setup.sh made; arguments go to pytest. Its last line is pytest's own.
set -euo pipefail
cd "$(dirname "$0")/.."
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
