#!/usr/bin/env bash
# All tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-test.txt
exec python -m pytest -q "$@"
