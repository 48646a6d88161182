#!/usr/bin/env bash
# Several hosts tried on one machine, about ten minutes: network namespaces, scripts/train_hosts.sh over them, a killed
# process, a cut cable, a host that does not start ...  Needs root, iproute2 and util-linux; openssh-server and pdsh for
# the trial through ssh. What is missing is named, and left out.   bash scripts/try_hosts.sh [--inputs "cable cut"]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" requirements-test.txt
exec python tests/faults/soak.py --only hosts "$@"
