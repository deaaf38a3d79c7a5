#!/usr/bin/env bash
# From a fresh clone to pictures: sets up, then draws eight prompts with the embedded model, and a sheet of them all.
# Usage: bash scripts/demo.sh [arguments of scripts/inference.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="$(bash environment_setup.sh)"
exec "$python" scripts/inference.py --txt_file=asset/samples_mini.txt --bs=8 \
    --work_dir=output/demo --grid=output/demo/grid.png "$@"
