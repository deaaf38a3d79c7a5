#!/usr/bin/env bash
# Start a training on all GPUs of this machine (one process without any), or on those of several machines.
#
#   bash train_scripts/train.sh [CONFIG.yaml] [--np=N] [--plan] [--KEY=VALUE ...]
#   NNODES=4 NODE_RANK=0 MASTER_ADDR=HOST bash train_scripts/train.sh ...    on each machine, NODE_RANK counting from 0
#
# CONFIG defaults to Sana-tiny's. --np=N, or NP=N, sets the number of processes on this machine. --plan prints parameters,
# memory of each GPU and steps, and trains nothing; it needs neither weights nor a GPU. Everything else goes to
# train.py; later arguments override earlier ones. A run goes on from its newest checkpoint when it is started again.
# SIGTERM saves and ends it, with status 143; it then has ten minutes for that.
set -euo pipefail
cd "$(dirname "$0")/.."

config=configs/sana_config/tiny/Sana_tiny_img256.yaml
case "${1:-}" in *.yaml) config=$1; shift ;; esac

np=${NP:-}
plan=
arguments=()
for argument in "$@"; do
    case "$argument" in
        --np=*) np=${argument#--np=} ;;
        --plan) plan=yes ;;
        *) arguments+=("$argument") ;;
    esac
done
if [ -z "$np" ]; then
    np=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
    [ "$np" -gt 0 ] || np=1
fi
[[ "$np" =~ ^[1-9][0-9]*$ ]] || { echo "train.sh: error: --np: expected a number of at least 1, got $np" >&2; exit 2; }

nodes=${NNODES:-1}
python="$(bash environment_setup.sh)"
if [ -n "$plan" ]; then
    exec "$python" train_scripts/train.py --config_path="$config" --plan="$((nodes * np))" "${arguments[@]}"
fi

if [ "$nodes" -gt 1 ]; then # every machine must name the same port
    port=${MASTER_PORT:-29500}
else
    port=${MASTER_PORT:-$((20000 + RANDOM % 10000))}
fi
exec "$python" -m sana.training.launch --nnodes="$nodes" --node_rank="${NODE_RANK:-0}" --nproc_per_node="$np" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="$port" --shutdown_timeout=600 \
    train_scripts/train.py --config_path="$config" --resume_from=latest "${arguments[@]}"
