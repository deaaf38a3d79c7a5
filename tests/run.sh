#!/usr/bin/env bash
# Runs the tests, after setting up the environment if need be.
# Usage: bash tests/run.sh [--slow] [pytest arguments]
#   --slow   the slow tests instead of the fast ones; those that need a GPU or the network have markers of their own
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="$(bash environment_setup.sh)"
speed="not slow"
if [[ "${1:-}" == "--slow" ]]; then
    speed="slow"
    shift
fi
export HF_HUB_OFFLINE=1 # no test below may reach for the network, not even to look whether a file is new
exec "$python" -m pytest -n 2 -m "$speed and not gpu and not network" "$@"
