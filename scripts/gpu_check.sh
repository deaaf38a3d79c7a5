#!/usr/bin/env bash
# The checks that need a CUDA GPU: sets up, then runs the tests marked gpu. Without a GPU it says so and fails.
# Usage: bash scripts/gpu_check.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="$(bash environment_setup.sh)"
"$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu_check.sh: no CUDA GPU is visible")'
exec "$python" -m pytest -m gpu "$@"
