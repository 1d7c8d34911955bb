#!/usr/bin/env bash
# The tests: installs what they need, and runs them.
#
#   bash scripts/test.sh           all but the slow ones; 7 to 14 minutes on 2 cores
#   bash scripts/test.sh --slow    lists the slow ones and runs them
#   bash scripts/test.sh --faults  faults injected into real processes, files and disks; up to 20 minutes
#
# Further arguments go to pytest, as in: bash scripts/test.sh tests/test_decoder.py -k causal
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh dev
if [ "${1:-}" = --slow ]; then
  shift
  $python -m pytest -m 'slow and not faults' --collect-only "$@"
  exec $python -m pytest -m 'slow and not faults' "$@"
fi
if [ "${1:-}" = --faults ]; then
  shift
  alone=$(unshare -rm true 2>/dev/null && echo unshare -rm || true)  # where disks may be mounted that end with it
  exec $alone $python -m pytest -m faults -n 2 "$@"
fi
exec $python -m pytest -m 'not slow' -n 2 "$@"
