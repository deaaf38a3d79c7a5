#!/usr/bin/env bash
# The checks and the measurements that need a CUDA GPU: sets up, then runs them. Without a GPU it says so and fails.
# Usage: bash scripts/gpu_check.sh [tests|ops|pipeline|train|large] [more arguments of what it runs]
#   tests (default)  the tests marked gpu: the kernels for real, against float64
#   ops              every fused operation timed, 0.6B and 1.6B, at 32k tokens and as one image with guidance
#   pipeline         0.6B and 1.6B at 512 and 1024 pixels, batch 1 and 16, beside diffusers, eager and compiled
#   train            a training step of 0.6B at 512 pixels, batch 64, beside a loop over diffusers' network
#   large            2048 and 4096 pixels, batch 1: denoising and decoding, and a whole picture of 0.6B
# Reports go to output/bench. Compiled code is kept in output/bench/compiled, so only the first run compiles; each first call
# is in the reports. At the end the script says how long it took: a second run is the one without compilation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

what=tests
case "${1:-}" in
  tests|ops|pipeline|train|large) what="$1"; shift ;;
esac
python="$(bash environment_setup.sh)"
"$python" -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "gpu_check.sh: no CUDA GPU is visible")'
if [[ "$what" == tests ]]; then
  exec "$python" -m pytest -m gpu "$@"
fi

export TORCHINDUCTOR_CACHE_DIR="$PWD/output/bench/compiled" TRITON_CACHE_DIR="$PWD/output/bench/compiled/triton"
failed=0
# One report; a wrong or failed one does not keep the others from being made.
measure() {
  local report="$1" script="$2"
  shift 2
  echo "== $report"
  "$python" "scripts/$script" --output "output/bench/$report.json" "$@" || failed=1
}

began=$SECONDS
case "$what" in
  ops)
    for model in 0.6B 1.6B; do
      measure "ops_${model}_b32" bench_ops.py --model "$model" --batch 32 --side 32 "$@"
      measure "ops_${model}_b2" bench_ops.py --model "$model" --batch 2 --side 32 "$@"
      measure "ops_${model}_4096" bench_ops.py --model "$model" --batch 2 --side 128 "$@"
    done ;;
  pipeline)
    for model in 0.6B 1.6B; do
      for size in 512 1024; do
        measure "pipeline_${model}_${size}" bench_pipeline.py --model "$model" --size "$size" --stage denoise,all \
          --batch 1,16 --repeats 3 "$@"
      done
    done ;;
  train)
    measure train_0.6B_512 bench_train.py --model 0.6B --size 512 --batch 64 "$@"
    measure train_0.6B_512_compiled bench_train.py --model 0.6B --size 512 --batch 64 \
      --implementations ours_compiled,diffusers "$@" ;;
  large)
    for size in 2048 4096; do
      measure "pipeline_0.6B_$size" bench_pipeline.py --model 0.6B --size "$size" --stage denoise,decode,all \
        --implementations ours,ours_compiled,diffusers,diffusers_compiled --repeats 2 "$@"
      measure "pipeline_1.6B_$size" bench_pipeline.py --model 1.6B --size "$size" --stage denoise \
        --implementations ours,ours_compiled,diffusers,diffusers_compiled --steps 4 --repeats 2 "$@"
    done ;;
esac
echo "gpu_check.sh: $what took $((SECONDS - began)) s, compilation included where output/bench/compiled lacked it"
exit "$failed"
