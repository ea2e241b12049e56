#!/usr/bin/env bash
# A Slurm of one node, on this machine alone, for tests/test_slurm.py. Needs root and Debian or Ubuntu.
#   tests/start_slurm.sh        install it if it is missing, start it, return once the node takes jobs
#   tests/start_slurm.sh stop   stop it; its state stays
# STATE (default: /var/tmp/test-slurm) names the directory of state and logs. The four GPUs are fake: jobs see their
# numbers in CUDA_VISIBLE_DEVICES, and have to say --device cpu. CPUs and memory are what the configuration says, not
# what the machine has.
set -euo pipefail
state=${STATE:-/var/tmp/test-slurm}
config=/etc/slurm/slurm.conf
host=$(hostname -s)
die() { echo "start_slurm.sh: $*" >&2; exit 1; }
node() { timeout 5 sinfo --noheader --format=%T 2>/dev/null || true; }
munge_works() { munge -n 2>/dev/null | unmunge >/dev/null 2>&1; }
stop() { # stop COMMAND PID_FILE
  local pid
  pid=$(cat "$2" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ] || return 0
  kill "$pid"
  for _ in {1..100}; do
    [ -d "/proc/$pid" ] || break
    sleep 0.1
  done
}
stop_slurm() {
  stop slurmd "$state/slurmd.pid"
  stop slurmctld "$state/slurmctld.pid"
}

[ "$(id -u)" = 0 ] || die "has to run as root"
[ ! -e "$config" ] || grep -qx ClusterName=test "$config" || die "$config is there and is no test's; left as it is"

if [ "${1:-}" = stop ]; then
  stop_slurm
  stop munged /run/munge/munged.pid
  exit
fi
(($# == 0)) || { sed -n '2,7s/^# //p' "$0" >&2; exit 2; }
case $(node) in idle | mixed | allocated) exit ;; esac
mkdir -p "$state" /etc/slurm

if ! { command -v slurmctld && command -v slurmd && command -v munged; } >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update && apt-get install --yes --no-install-recommends slurm-wlm munge; } >"$state/apt.log" 2>&1 ||
    die "apt-get failed; see $state/apt.log"
fi

for i in 0 1 2 3; do # Slurm wants a device of its own for each GPU
  [ -e "$state/gpu$i" ] || mknod "$state/gpu$i" c 1 3
done
cat >/etc/slurm/gres.conf <<END
NodeName=$host Name=gpu Type=a100 File=$state/gpu[0-1]
NodeName=$host Name=gpu Type=h100 File=$state/gpu[2-3]
END
cat >"$config" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
NodeName=$host NodeAddr=127.0.0.1 CPUs=8 RealMemory=32000 Gres=gpu:a100:2,gpu:h100:2
PartitionName=main Nodes=ALL Default=YES DefaultTime=60
PartitionName=other Nodes=ALL DefaultTime=60
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmUser=root
AuthInfo=cred_expire=10
ProctrackType=proctrack/linuxproc
MpiDefault=none
ReturnToService=2
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2
StateSaveLocation=$state/slurmctld
SlurmdSpoolDir=$state/slurmd
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd.pid
SlurmctldLogFile=$state/slurmctld.log
SlurmdLogFile=$state/slurmd.log
END
# cred_expire: a requeued job waits that long, 120 s where it is not set. MinJobAge: how long scontrol knows ended jobs.

munge_works || {
  install -d -o munge -g munge /run/munge
  [ -e /etc/munge/munge.key ] || runuser -u munge -- mungekey --create
  runuser -u munge -- munged
}
mkdir -p "$state"/{slurmctld,slurmd}
stop_slurm
slurmctld
slurmd
for _ in {1..120}; do
  case $(node) in
    idle | mixed | allocated) exit ;;
    down* | drain*) scontrol update nodename="$host" state=resume 2>/dev/null || true ;;
  esac
  sleep 0.5
done
tail -n 15 "$state"/slurm{ctld,d}.log >&2
die "the node does not come up"
