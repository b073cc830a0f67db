#!/usr/bin/env bash
# sslx on one host with several GPUs: one process uses all of them; started again where that helps.
#
#   launch/gpu_host.sh RECIPE [name=value ...] --workdir RUN
#   launch/gpu_host.sh --dry-run RECIPE [name=value ...] --workdir RUN    prints what would run
#
# `sslx` must be on the PATH: pip install -e '.[cuda]'. CUDA_VISIBLE_DEVICES=0,1 in front takes some
# of the GPUs. Every start goes on from the newest checkpoint. With `nohup` in front it outlives the
# terminal. Options before RECIPE are those of launch/local.py, as `--restart 0` or, for a process
# for each of eight GPUs, `-n 8`. Several such hosts: launch/slurm.sh.
set -euo pipefail

# NVIDIA JAX-Toolbox, docs/GPU_performance.md, 2026-07; what is set already stays.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.9} # jax's default is .75
export JAX_OPTIMIZATION_LEVEL=${JAX_OPTIMIZATION_LEVEL:-O1} # overlaps communication with arithmetic
case $(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null) in
  *H100* | *H200* | *H800*) export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} ;;
esac # Hopper alone: Blackwell is slower with it

[[ " $* " != *" --dry-run "* ]] || env | grep -E '^(XLA|JAX|NCCL|CUDA)_' | sort
exec python3 "$(dirname "$0")/local.py" --restart "${RESTARTS:-10}" "$@"
