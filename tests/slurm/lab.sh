#!/usr/bin/env bash
# A real SLURM on loopback: slurmctld and virtual nodes in a directory of its own, without systemd, as root.
#
#   lab.sh install             Debian's packages
#   lab.sh up DIR [NODES]      start (all but the last two are in the partitions `high` and `low`, those in `beside`); then SLURM_CONF=DIR/etc/slurm.conf is what sbatch, squeue, ... need
#   lab.sh down DIR            stop everything that `up` started; DIR stays
#   lab.sh kill-node DIR NAME  as a power failure: slurmd, its steps and their tasks, all at once
#   lab.sh start-node DIR NAME
#   lab.sh set DIR NAME [VALUE]  an option of slurm.conf, or its default, from now on
#
# Every node is a slurmd in its own UTS and mount namespace: gethostname() gives the node's name there, and its
# /etc/hosts knows the others. The files of the host are left alone.
set -euo pipefail

CPUS=4 # of a node; may exceed the real ones (config_overrides)
GPUS=2 # likewise: counted, but no devices

die() {
    echo "lab.sh: $*" >&2
    exit 1
}

UNAVAILABLE=69 # exit status where daemons do not run on this machine; any other failure is one of this script

unavailable() { # unavailable WHAT: with the last that the daemons have said
    echo "lab.sh: $*" >&2
    local log
    for log in "$LOG"/*.log; do
        [[ ! -s $log ]] || { echo "$(basename "$log"):" && grep -E 'error|fatal|Error' "$log" | tail -n 5; } >&2 || true
    done
    exit $UNAVAILABLE
}

paths() { # paths DIR: where things are
    LAB=$1 ETC=$1/etc RUN=$1/run LOG=$1/log
    export SLURM_CONF=$ETC/slurm.conf
}

install() {
    local command missing=
    for command in slurmctld slurmd srun munged; do command -v "$command" >/dev/null || missing=1; done
    [[ $missing ]] || return 0
    # a policy that says no: the packages' scripts start no daemons of their own
    local policy=/usr/sbin/policy-rc.d made=
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
        made=1
    fi
    DEBIAN_FRONTEND=noninteractive
    export DEBIAN_FRONTEND
    local packages=(slurmctld slurmd slurm-client munge) status=0
    apt-get install -y -q --no-install-recommends "${packages[@]}" >&2 ||
        { apt-get update -q >&2 && apt-get install -y -q --no-install-recommends "${packages[@]}" >&2; } || status=$?
    [[ -z $made ]] || rm -f $policy
    return $status
}

running() { grep -q '^State:[[:space:]]*[^ZX]' "/proc/$1/status" 2>/dev/null; }

daemon() { # daemon PIDFILE COMMAND: its pid, if it runs
    local pid
    pid=$(cat "$1" 2>/dev/null) && [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$2"* ]] && running "$pid" && echo "$pid"
}

stop_daemon() { # stop_daemon PIDFILE COMMAND
    local pid
    if pid=$(daemon "$1" "$2"); then
        kill "$pid" 2>/dev/null || true
        wait_for 10 not running "$pid" || kill -9 "$pid" 2>/dev/null || true
    fi
    rm -f "$1"
}

not() { ! "$@"; }

wait_for() { # wait_for SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    while ((SECONDS < end)); do
        "$@" >/dev/null 2>&1 && return 0
        sleep 0.1
    done
    return 1
}

nodes() { seq -f 'node%.0f' 1 "$(cat "$LAB/nodes")"; }

in_use() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

choose_port() { # of slurmctld; those of the nodes follow it. Below what Linux gives to outgoing connections
    local port busy offset
    [[ ! -s $LAB/port ]] || return 0
    for ((port = 16817; port < 32000; port += 100)); do
        busy=
        for ((offset = 0; offset <= $(cat "$LAB/nodes"); offset++)); do
            ! in_use $((port + offset)) || busy=1
        done
        [[ $busy ]] || { echo "$port" >"$LAB/port" && return 0; }
    done
    die "no free ports"
}

configure() {
    local node nodes gpu
    nodes=$(cat "$LAB/nodes")
    mkdir -p "$ETC" "$RUN" "$LOG" "$LAB/state" "$LAB/munge"
    chmod 755 "$LAB" "$ETC" "$RUN" "$LOG"
    chmod 700 "$LAB/munge"
    [[ -s $LAB/munge/key ]] || (umask 077 && head -c 128 /dev/urandom >"$LAB/munge/key")
    { cat /etc/hosts && nodes | sed 's/^/127.0.0.1 /'; } >"$ETC/hosts"
    # no cgroups: 22.05 finds none to use by itself, from 23.02 on it has to be told
    local release
    release=$(slurmd -V | grep -o '[0-9]*' | head -n 1)
    if ((release < 23)); then echo CgroupAutomount=no; else echo CgroupPlugin=disabled; fi >"$ETC/cgroup.conf"
    cat >"$ETC/slurm.conf" <<X
ClusterName=lab
# jobs of labs that run side by side have numbers of their own: ports follow from them
FirstJobId=$((($(cat "$LAB/port") - 16817) * 5 + 1))
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$(cat "$LAB/port")
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire, by default (and where less than 5 is said) 120 s, is also how long a requeued job waits before it starts again
AuthInfo=socket=$RUN/munge.socket,cred_expire=5
# bind to what host names resolve to, 127.0.0.1: nothing listens on other interfaces
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd-%n.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
# a machine under load must not look like a dead node
SlurmctldTimeout=60
SlurmdTimeout=60
MessageTimeout=60
BatchStartTimeout=60
KillWait=5
CompleteWait=0
UnkillableStepTimeout=60
TCPTimeout=30
MinJobAge=3600
ReturnToService=2
InactiveLimit=0
X
    for node in $(nodes); do
        mkdir -p "$LAB/spool/$node"
        echo "NodeName=$node NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$(($(cat "$LAB/port") + ${node#node}))" \
            "CPUs=$CPUS RealMemory=4000 Gres=gpu:$GPUS State=UNKNOWN"
    done >>"$ETC/slurm.conf"
    cat >>"$ETC/slurm.conf" <<X
PartitionName=high Nodes=node[1-$((nodes - 2))] Default=YES MaxTime=INFINITE PriorityTier=10 State=UP
PartitionName=low Nodes=node[1-$((nodes - 2))] MaxTime=INFINITE PriorityTier=1 GraceTime=120 State=UP
PartitionName=beside Nodes=node[$((nodes - 1))-$nodes] MaxTime=INFINITE State=UP
X
    # a GPU without a file is not counted; any file will do
    mkdir -p "$LAB/dev"
    for ((gpu = 0; gpu < GPUS; gpu++)); do touch "$LAB/dev/gpu$gpu"; done
    echo "Name=gpu File=$LAB/dev/gpu[0-$((GPUS - 1))]" >"$ETC/gres.conf"
}

start_node() { # start_node NAME
    local node=$1
    daemon "$RUN/slurmd-$node.pid" slurmd >/dev/null && return 0
    unshare --uts --mount sh -c \
        "hostname '$node' && mount --bind '$ETC/hosts' /etc/hosts && exec slurmd -N '$node' -f '$SLURM_CONF'"
}

kill_node() { # kill_node NAME
    local pid namespace process
    pid=$(daemon "$RUN/slurmd-$1.pid" slurmd) || die "$1 is not running"
    namespace=$(readlink "/proc/$pid/ns/uts")
    [[ $namespace != "$(readlink /proc/self/ns/uts)" ]] || die "$1 has no namespace of its own"
    for process in /proc/[0-9]*; do
        [[ $(readlink "$process/ns/uts" 2>/dev/null) != "$namespace" ]] || kill -9 "${process#/proc/}" 2>/dev/null || true
    done
    rm -f "$RUN/slurmd-$1.pid"
}

up() {
    [[ $(id -u) == 0 ]] || unavailable "needs root"
    unshare --uts --mount true 2>/dev/null || unavailable "namespaces cannot be made here"
    mkdir -p "$LAB"
    (($1 >= 3)) || die "at least 3 nodes"
    echo "$1" >"$LAB/nodes"
    choose_port
    configure
    daemon "$RUN/munged.pid" munged >/dev/null ||
        munged --socket="$RUN/munge.socket" --key-file="$LAB/munge/key" --pid-file="$RUN/munged.pid" \
            --log-file="$LOG/munged.log" --seed-file="$LAB/munge/seed" --origin=127.0.0.1 ||
        unavailable "munged does not start"
    munge -S "$RUN/munge.socket" -n | unmunge -S "$RUN/munge.socket" >/dev/null || unavailable "munge does not work"
    daemon "$RUN/slurmctld.pid" slurmctld >/dev/null || slurmctld -f "$SLURM_CONF" ||
        unavailable "slurmctld does not start"
    local node
    for node in $(nodes); do start_node "$node" || unavailable "slurmd of $node does not start"; done
    wait_for 90 ready || unavailable "nodes are not ready: $(sinfo --noheader --Node --format='%N %t %E' 2>&1 | sort -u)"
}

ready() { [[ $(sinfo --noheader --Node --format='%N %t' | sort -u | grep -cE ' (idle|mix|alloc)$') == "$(cat "$LAB/nodes")" ]]; }

set_option() { # set_option NAME [VALUE]
    sed -i "/^$1=/d" "$SLURM_CONF"
    [[ -z ${2:-} ]] || sed -i "1i $1=$2" "$SLURM_CONF"
    scontrol reconfigure
}

down() {
    if daemon "$RUN/slurmctld.pid" slurmctld >/dev/null; then
        scancel --user=root 2>/dev/null || true
        wait_for 15 sh -c '[ -z "$(squeue --noheader)" ]' || true
    fi
    local node
    for node in $(nodes); do stop_daemon "$RUN/slurmd-$node.pid" slurmd & done
    wait
    stop_daemon "$RUN/slurmctld.pid" slurmctld
    stop_daemon "$RUN/munged.pid" munged
}

action=${1:-}
case $action in
    install) install ;;
    # one at a time: two labs must not choose the same ports. The lock is closed here, or daemons would keep it
    up) exec flock --close "${TMPDIR:-/tmp}/lowrank-dist-lab.lock" "$0" up-alone "${@:2}" ;;
    up-alone) paths "$2" && up "${3:-5}" ;;
    down) paths "$2" && down ;;
    kill-node) paths "$2" && kill_node "$3" ;;
    start-node) paths "$2" && start_node "$3" ;;
    set) paths "$2" && set_option "$3" "${4:-}" ;;
    *) die "usage: $0 install | up DIR [NODES] | down DIR | kill-node DIR NAME | start-node DIR NAME | set DIR NAME [VALUE]" ;;
esac
