#!/usr/bin/env bash
# All tests, two at a time: bash scripts/test.sh [pytest arguments; -n 0: one at a time, as --pdb needs]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-test.txt
export OMP_NUM_THREADS=1 # a core for each
# A file stays together, since its tests share what they made; the longest (tests/faults) begin.
exec python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
