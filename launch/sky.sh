#!/usr/bin/env bash
# sslx as a managed job of SkyPilot, in whatever cloud has GPUs: fills launch/sky.yaml and starts it.
#
#   launch/sky.sh [--gpus H100:8] [--num-nodes 4] [--infra gcp] [--name mae] [--no-use-spot] \
#     [--dry-run] RECIPE [name=value ...] --workdir s3://BUCKET/RUN
#
# Needs `pip install skypilot` and a cloud that `sky check` accepts. RUN and the data are in a bucket
# that the machines can use: their disks end with them. launch/sky.yaml says what follows an exit
# code.
#
#   sky jobs logs --name mae    sky jobs queue    sky jobs cancel --name mae
#
# The same command goes on from the newest checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

options=(--yes --detach-run) dry=''
while [[ "${1:-}" == --* ]]; do
  case $1 in
    --gpus | --num-nodes | --infra | --name) options+=("$1" "${2:?$1 without its value}") && shift 2 ;;
    --no-use-spot) options+=("$1") && shift ;;
    --dry-run) dry=yes && shift ;;
    *) echo "launch/sky.sh: unknown option $1" >&2 && exit 2 ;;
  esac
done
if [ $# = 0 ]; then
  sed -n '2,/^set /{/^set /d;p}' "$0" >&2
  exit 2
fi
[[ " $*" == *" --workdir "*://* || " $*" == *" --workdir="*://* ]] ||
  { echo "launch/sky.sh: --workdir s3://BUCKET/RUN, as disks of machines end with them" >&2 && exit 2; }

command=(sky jobs launch "${options[@]}" --env "TRAIN=$(printf '%q ' "$@")" launch/sky.yaml)
if [ -n "$dry" ]; then printf '%q ' "${command[@]}" && echo; else "${command[@]}"; fi
