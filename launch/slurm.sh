#!/usr/bin/env bash
# sslx on a Slurm cluster: one task a node, which takes all of its GPUs; a requeued job goes on.
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 launch/slurm.sh \
#     RECIPE [name=value ...] --workdir RUN
#   bash launch/slurm.sh --dry-run RECIPE [name=value ...] --workdir RUN    prints what would run
#
# From RECIPE on, everything is given to `sslx train`. `sslx` must be on the PATH where sbatch is
# called; RUN and the data are on a disk that all nodes share. Options of sbatch before the script
# replace those below; for a part of a node delete --exclusive and --mem, and say --cpus-per-task.
# What all tasks print is in sslx-JOB.log, one start after the other.
#
#   the time is up       SIGTERM comes five minutes before; saved, 143, requeued by this script
#   scancel -s TERM JOB  the same, now
#   preemption, scontrol requeue JOB, a lost node   saved if there was time; requeued by Slurm
#   codes 1, 42, ...     requeued by this script until the job has started RESTARTS (20) times
#   codes 2, 3, 4        not requeued (launch/README.md)
#   scancel JOB          saved, and ended
#
#SBATCH --job-name=sslx
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=TERM@300
set -uo pipefail

if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then # as in launch/gpu_host.sh
  export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.9}
  export JAX_OPTIMIZATION_LEVEL=${JAX_OPTIMIZATION_LEVEL:-O1}
fi
# Else srun would leave a task one core, for all of its data workers.
export SRUN_CPUS_PER_TASK=$((${SLURM_CPUS_ON_NODE:-1} / ${SLURM_NTASKS_PER_NODE:-1}))

# srun ends with the largest code of its tasks, and kills the others when one has failed. So a code
# that forbids another start is made larger than all of them, and a task that failed waits for a
# while before it ends: after a save, or without a peer, the others end by themselves.
# shellcheck disable=SC2016  # it is the task's shell that expands this
task='trap : TERM
sslx train "$@"
code=$?
case $code in 0) exit ;; 2 | 3 | 4) code=$((code + 200)) ;; esac
sleep "${GRACE:-30}" & wait
exit $code'
step=(srun --kill-on-bad-exit=1 bash -c "$task" sslx)

if [ "${1:-}" = --dry-run ]; then
  shift
  echo sbatch "$0" "$(printf '%q ' "$@")"
  printf '%q ' "${step[@]}" "$@"
  echo
  exit
fi
if [ -z "${SLURM_JOB_ID:-}" ] || [ $# = 0 ]; then
  sed -n '2,/^#SBATCH/{/^#SBATCH/d;p}' "$0" >&2
  exit 2
fi

"${step[@]}" "$@"
code=$?
[ $code -lt 202 ] || code=$((code - 200)) # srun itself ends with 1 for 253
case $code in
  0 | 2 | 3 | 4) ;;
  143) scontrol requeue "$SLURM_JOB_ID" ;;
  *) [ "${SLURM_RESTART_COUNT:-0}" -ge "${RESTARTS:-20}" ] || scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit $code
