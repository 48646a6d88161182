#!/usr/bin/env bash
# The long reliability checks, about an hour on two CPU cores: bash scripts/soak.sh [--only kills ...]; see --help
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-test.txt
exec python tests/faults/soak.py "$@"
