#!/usr/bin/env bash
# sslx on Cloud TPUs by a queued resource: asks for it, waits, installs, trains; asks again after a
# preemption and goes on; deletes it at the end.
#
#   launch/tpu.sh --name mae --zone us-west4-a --type v5litepod-256 --runtime v2-alpha-tpuv5-lite \
#     [--slices 2] [--spot] [--keep] [--dry-run] RECIPE [name=value ...] --workdir gs://BUCKET/RUN
#
# Needs gcloud, logged in, with a project (`gcloud config set project P`), and for several slices
# `ssh-add ~/.ssh/google_compute_engine`. The files of this clone that git knows, with your changes,
# go to every worker. RUN and the data are in a bucket that the workers' account can use: their disks
# end with them. Types and runtimes: docs.cloud.google.com/tpu/docs/runtimes; tpu7x has no queued
# resources, take launch/gke.sh. `sslx plan` says before whether the recipe fits.
#
#   --slices N   so many of that type, joined by the data-center network
#   --spot       cheaper, and may be taken away: then it is asked for again
#   --keep       leaves the machines, and their cost, at the end
#
# Ctrl-C ends this script, and neither the run nor the machines: the same command comes back to them.
# The exit code is that of the run (launch/README.md). What worker W of slice S prints, and the end
# of it all:
#
#   gcloud compute tpus queued-resources ssh NAME --zone ZONE --node S --worker W \
#     --command 'tail -f sslx.log'
#   gcloud compute tpus queued-resources delete NAME --zone ZONE --force
set -euo pipefail
cd "$(dirname "$0")/.."

name='' zone='' type='' runtime='' slices=1 spot='' keep='' dry=''
while [[ "${1:-}" == --* ]]; do
  case $1 in
    --name | --zone | --type | --runtime | --slices) printf -v "${1#--}" %s "${2:?$1 without its value}" && shift 2 ;;
    --spot) spot=--spot && shift ;;
    --keep) keep=yes && shift ;;
    --dry-run) dry=yes && shift ;;
    *) echo "launch/tpu.sh: unknown option $1" >&2 && exit 2 ;;
  esac
done
if [ -z "$name" ] || [ -z "$zone" ] || [ -z "$type" ] || [ -z "$runtime" ] || [ $# = 0 ]; then
  sed -n '2,/^set /{/^set /d;p}' "$0" >&2
  exit 2
fi
[[ " $*" == *" --workdir gs://"* || " $*" == *" --workdir=gs://"* ]] ||
  { echo "launch/tpu.sh: --workdir gs://BUCKET/RUN, as disks of TPUs end with them" >&2 && exit 2; }

run() { # a command, or what it would be
  if [ -n "$dry" ]; then printf '%q ' "$@" && echo; else "$@"; fi
}
queued() {
  local verb=$1 && shift
  run gcloud compute tpus queued-resources "$verb" "$@" --zone="$zone" --quiet
}
everywhere() { # on all workers of all slices at once: gcloud's 64 at a time would wait for ever
  queued ssh "$name" --node=all --worker=all --batch-size=all --command="$1"
}
state() { # of the queued resource; none if there is none, unknown if Google does not say
  local said
  if said=$(gcloud compute tpus queued-resources describe "$name" --zone="$zone" \
    --format='value(state.state)' 2>&1); then
    echo "${said##*$'\n'}"
  elif [[ $said == *NOT_FOUND* ]]; then echo none; else
    echo "$said" >&2
    echo unknown
  fi
}

create() {
  local nodes=(--node-id="$name")
  [ "$slices" = 1 ] || nodes=(--node-count="$slices" --node-prefix="$name")
  # shellcheck disable=SC2086  # no $spot is no argument
  queued create "$name" --accelerator-type="$type" --runtime-version="$runtime" "${nodes[@]}" $spot
}
delete() { queued delete "$name" --force; }

wait_for_machines() { # and ask for them
  local now
  while [ -z "$dry" ]; do
    now=$(state) && echo "launch/tpu.sh: $name is $now" >&2
    case $now in
      ACTIVE) return ;;
      none) create ;;
      SUSPENDED | FAILED) delete ;;
      *) sleep "${POLL:-30}" ;;
    esac
  done
  create
}

# A slice that hears nothing of another for ten minutes ends, where it would wait: options of the
# runtime, not the compiler's (axlearn common/compiler_options.py, 34aed43).
megascale=''
[ "$slices" = 1 ] || megascale="--megascale_graph_hang_threshold=10m\
 --megascale_error_reporter_abort_on_hang=true --megascale_error_reporter_abort_on_error=true"

worker() { # the script of each worker; it does nothing where it runs already
  cat <<END
{
  exec 9>~/sslx.lock && flock --nonblock 9 || exit 0
  rm -f ~/sslx.code && trap 'echo \$? >~/sslx.code' EXIT && set -e
  mkdir -p ~/sslx && tar xzf ~/sslx.tgz -C ~/sslx && cd ~/sslx
  python3 -m pip install --user --quiet uv # the machine's own Python may be older than 3.11
  test -e ~/venv || ~/.local/bin/uv venv --quiet --python 3.12 ~/venv
  ~/.local/bin/uv pip install --quiet --python ~/venv -e '.[tpu,gs]'
  export PATH=~/venv/bin:\$PATH LIBTPU_INIT_ARGS="$megascale"
  python launch/local.py --restart ${RESTARTS:-10}$(printf ' %q' "$@")
  exit
}
END
}

start() {
  local files
  files=$(mktemp -d)
  worker "$@" >"$files/sslx.sh"
  run bash -c "git ls-files -z | tar --null --files-from=- -czf $files/sslx.tgz"
  [ -z "$dry" ] || cat "$files/sslx.sh"
  queued scp "$files/sslx.tgz" "$files/sslx.sh" "$name:" --node=all --worker=all --batch-size=all
  everywhere 'nohup bash ~/sslx.sh >>~/sslx.log 2>&1 </dev/null &'
  rm -rf "$files"
}

watch() { # until a worker failed or all have ended, with what in `code`; 1 if the machines are gone
  local codes
  while sleep "${POLL:-300}"; do
    case $(state) in ACTIVE | unknown) ;; *) return 1 ;; esac
    codes=$(everywhere 'cat ~/sslx.code 2>/dev/null || echo running' |
      grep -oE '^([0-9]+|running)$') || continue
    for code in $codes; do
      [ "$code" = running ] || [ "$code" = 0 ] || return 0
    done
    grep -q running <<<"$codes" || return 0
  done
}

code=0
while true; do
  wait_for_machines
  start "$@"
  [ -z "$dry" ] || break
  ! watch || break
  echo "launch/tpu.sh: the machines are gone, asking again" >&2
done
[ -n "$keep" ] || delete
exit "$code"
