#!/usr/bin/env bash
# A Slurm cluster of one node on this machine, as the user who calls; nothing of the system changes.
#
#   apt-get install --no-install-recommends slurm-wlm munge
#   tests/slurm.sh start DIR          # DIR is made; its path is short enough for a socket
#   export SLURM_CONF=DIR/slurm.conf  # then sbatch, squeue, scancel, scontrol as on any cluster
#   tests/slurm.sh stop DIR
#
# Everything is in DIR: keys, sockets, states, logs. Ports are free ones of the loopback interface.
# Jobs that are requeued start again at once, where Slurm's default is two minutes (cred_expire).
set -euo pipefail
PATH=$PATH:/usr/sbin

start() {
  umask 022
  mkdir -p "$1"/{state,spool}
  chmod 755 "$1"
  dd if=/dev/urandom of="$1/munge.key" bs=128 count=1 status=none
  chmod 600 "$1/munge.key"
  # --force: munge would have its files in directories that nobody else can write to
  munged --force --key-file="$1/munge.key" --socket="$1/munge.socket" --seed-file="$1/munge.seed" \
    --pid-file="$1/munged.pid" --log-file="$1/munged.log" 2>>"$1/munged.log"
  cat >"$1/slurm.conf" <<END
ClusterName=one
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$(free_port)
SlurmdPort=$(free_port)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$1/munge.socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoAddrCache
StateSaveLocation=$1/state
SlurmdSpoolDir=$1/spool
SlurmctldPidFile=$1/slurmctld.pid
SlurmdPidFile=$1/slurmd.pid
SlurmctldLogFile=$1/slurmctld.log
SlurmdLogFile=$1/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=30
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 CPUs=8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=YES
END
  export SLURM_CONF=$1/slurm.conf
  slurmctld
  slurmd -N localhost
  for _ in {1..100}; do
    [ "$(sinfo --noheader --format=%t 2>/dev/null)" != idle ] || return 0
    sleep 0.1
  done
  tail -n 20 "$1"/*.log >&2
  exit 1
}

stop() {
  export SLURM_CONF=$1/slurm.conf
  scancel --full --signal=KILL --state=RUNNING --user="$(id -un)" || true
  for daemon in slurmd slurmctld munged; do
    [ ! -e "$1/$daemon.pid" ] || kill "$(cat "$1/$daemon.pid")" || true
  done
  for _ in {1..50}; do # each removes its file when it ends
    compgen -G "$1/*.pid" >/dev/null || return 0
    sleep 0.1
  done
}

free_port() {
  python3 -c 'import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])'
}

"$@"
