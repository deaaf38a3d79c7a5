#!/usr/bin/env bash
# Start a training on all GPUs of this machine (one process without any).
#
#   bash train_scripts/train.sh [CONFIG.yaml] [--np=N] [--KEY=VALUE ...]
#
# CONFIG defaults to Sana-tiny's. --np=N, or NP=N, sets the number of processes. Everything else goes to train.py; later
# arguments override earlier ones. A run goes on from its newest checkpoint when it is started again.
set -euo pipefail
cd "$(dirname "$0")/.."

config=configs/sana_config/tiny/Sana_tiny_img256.yaml
case "${1:-}" in *.yaml) config=$1; shift ;; esac

np=${NP:-}
arguments=()
for argument in "$@"; do
    case "$argument" in
        --np=*) np=${argument#--np=} ;;
        *) arguments+=("$argument") ;;
    esac
done
if [ -z "$np" ]; then
    np=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
    [ "$np" -gt 0 ] || np=1
fi

python="$(bash environment_setup.sh)"
exec "$python" -m torch.distributed.run --nproc_per_node="$np" --master_port="${MASTER_PORT:-$((20000 + RANDOM % 10000))}" \
    train_scripts/train.py --config_path="$config" --resume_from=latest "${arguments[@]}"
