#!/usr/bin/env bash
# Do the tests notice small faults in the code? bash scripts/mutate.sh [--only PATTERN] [--jobs N]; see --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-test.txt
exec python scripts/mutate.py "$@"
