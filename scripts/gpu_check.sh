#!/usr/bin/env bash
# The checks that need a CUDA GPU: sets up, then runs them. Without a GPU it says so and fails.
# Usage: bash scripts/gpu_check.sh [tests|ops] [arguments of pytest, or of scripts/bench_ops.py]
#   tests (default)  the tests marked gpu: the kernels for real, against float64
#   ops              every fused operation timed, 0.6B and 1.6B, at 32k tokens and as one image with guidance
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

what=tests
case "${1:-}" in
  tests|ops) what="$1"; shift ;;
esac
python="$(bash environment_setup.sh)"
"$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu_check.sh: no CUDA GPU is visible")'
if [[ "$what" == tests ]]; then
  exec "$python" -m pytest -m gpu "$@"
fi
for model in 0.6B 1.6B; do
  "$python" scripts/bench_ops.py --model "$model" --batch 32 --side 32 --output "output/bench/ops_${model}_b32.json" "$@"
  "$python" scripts/bench_ops.py --model "$model" --batch 2 --side 32 --output "output/bench/ops_${model}_b2.json" "$@"
  "$python" scripts/bench_ops.py --model "$model" --batch 2 --side 128 --output "output/bench/ops_${model}_4096.json" "$@"
done
