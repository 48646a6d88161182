#!/usr/bin/env bash
# How the code is written: bash scripts/lint.sh        (--fix: fix what can be fixed)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-dev.txt
if [ "${1:-}" = --fix ]; then
    ruff check --fix .
    exec ruff format .
fi
ruff check .
ruff format --check .
mypy # type hints: in every room, each function has them
