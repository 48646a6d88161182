#!/usr/bin/env bash
# From a fresh clone to a fine-tuned, merged and scored tiny model, on any Linux machine, with or without a GPU.
#   bash scripts/quickstart.sh
#   MODE=glm2 TRAIN_TYPE=ptuning bash scripts/quickstart.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python scripts/quickstart.py --mode "${MODE:-glm3}" --train_type "${TRAIN_TYPE:-lora}"
