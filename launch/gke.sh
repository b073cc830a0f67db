#!/usr/bin/env bash
# sslx on TPUs in GKE: fills launch/jobset.yaml and applies it.
#
#   docker build --build-arg EXTRA=[tpu,gs] -t IMAGE . && docker push IMAGE
#   launch/gke.sh --name mae --image IMAGE --tpu tpu-v5-lite-podslice --topology 16x16 \
#     [--slices 2] [--chips 4] [--account NAME] [--dry-run] \
#     RECIPE [name=value ...] --workdir gs://BUCKET/RUN
#
# Needs kubectl with a cluster that has node pools of that TPU and topology, and JobSet 0.10.1 or
# later: kubectl apply --server-side -f
# https://github.com/kubernetes-sigs/jobset/releases/download/v0.10.1/manifests.yaml
# --dry-run prints the filled file. RECIPE is a name, or a path within the image.
#
#   --tpu       tpu-v4-podslice, tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice or tpu7x
#   --chips     of a host: 4, as in ct5lp-hightpu-4t
#   --slices    so many of that topology
#   --account   Kubernetes' service account that may use the buckets: default
#
#   kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=mae --prefix    what the pods print
#   kubectl get jobset mae                                            restarts, and how it ended
#   kubectl delete jobset mae                                         saves and ends; before again
#
# The same command goes on from the newest checkpoint. GPUs in GKE: xpk, whose variables sslx knows.
set -euo pipefail

# shellcheck disable=SC2034  # read by their names, below
NAME='' IMAGE='' TPU='' TOPOLOGY='' SLICES=1 CHIPS=4 ACCOUNT=default RESTARTS=${RESTARTS:-10} dry=''
while [[ "${1:-}" == --* ]]; do
  option=${1#--}
  case $1 in
    --name | --image | --tpu | --topology | --slices | --chips | --account)
      printf -v "${option^^}" %s "${2:?$1 without its value}" && shift 2 ;;
    --dry-run) dry=yes && shift ;;
    *) echo "launch/gke.sh: unknown option $1" >&2 && exit 2 ;;
  esac
done
if [ -z "$NAME" ] || [ -z "$IMAGE" ] || [ -z "$TPU" ] || [ -z "$TOPOLOGY" ] || [ $# = 0 ]; then
  sed -n '2,/^set /{/^set /d;p}' "$0" >&2
  exit 2
fi
[[ " $*" == *" --workdir gs://"* || " $*" == *" --workdir=gs://"* ]] ||
  { echo "launch/gke.sh: --workdir gs://BUCKET/RUN, as disks of pods end with them" >&2 && exit 2; }

HOSTS=$(((${TOPOLOGY//x/*}) / CHIPS))
[ $((HOSTS * CHIPS)) = $((${TOPOLOGY//x/*})) ] ||
  { echo "launch/gke.sh: hosts of $CHIPS chips do not make $TOPOLOGY: see --chips" >&2 && exit 2; }
# shellcheck disable=SC2034
[ "$SLICES" = 1 ] && MEGASCALE='""' || MEGASCALE="--megascale_graph_hang_threshold=10m\
 --megascale_error_reporter_abort_on_hang=true --megascale_error_reporter_abort_on_error=true"
ARGS=''
for word in train "$@"; do
  word=${word//\\/\\\\}
  ARGS+=", \"${word//\"/\\\"}\""
done
ARGS="[${ARGS#, }]"

text=$(<"$(dirname "$0")/jobset.yaml")
for name in NAME IMAGE TPU TOPOLOGY SLICES CHIPS ACCOUNT RESTARTS HOSTS MEGASCALE ARGS; do
  text=${text//"\${$name}"/"${!name}"}
done
if [ -n "$dry" ]; then echo "$text"; else kubectl apply -f - <<<"$text"; fi
