#!/usr/bin/env bash
# Run a command on a Slurm cluster of this machine's own: two nodes with two GPUs each, which are stand-ins.
#
#     tests/slurm/with_cluster.sh COMMAND...     (as root, with the packages of install.sh)
#
# Everything lives in namespaces that end with the command: its processes, its network (loopback alone), its
# /etc/slurm, /etc/munge and /run/munge. So nothing is left behind, a Slurm that this machine belongs to is not
# touched, several clusters can stand side by side, and nothing that runs here can reach a network.
#
# The cluster: partitions cpu, gpu, preempt (lower priority, requeued) and short (one minute); account ml; a job
# that takes more memory than it asked for is killed within a second or two. Accounting is slurmdbd's.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
if [ "${KILN_CLUSTER_INSIDE:-}" != 1 ]; then
    folder=$(mktemp -d "${TMPDIR:-/tmp}/kiln-slurm-XXXXXX")
    trap 'rm -rf "$folder"' EXIT
    status=0
    KILN_CLUSTER_INSIDE=1 KILN_CLUSTER="$folder" \
        unshare --mount --net --pid --fork --mount-proc --kill-child "$HERE/with_cluster.sh" "$@" || status=$?
    exit $status
fi

R=$KILN_CLUSTER
NODES=2 GPUS=2 CPUS=8 MEMORY=12000
HOST=$(hostname -s)

fail() { echo "Error: the test cluster did not start: $1" >&2; echo "Hint: the logs are in $R/log" >&2; tail -n 20 "$R"/log/* >&2; exit 1; }
wait_for() { # wait_for SECONDS COMMAND...: on an idle machine; a busy one may take ten times as long
    local until=$((SECONDS + 10 * $1))
    shift
    while [ $SECONDS -le $until ]; do timeout 30 "$@" >/dev/null 2>&1 && return; sleep 0.2; done
    fail "$*"
}
trap 'fail "line $LINENO: $BASH_COMMAND"' ERR

ip link set lo up
ip address add 192.0.2.1/32 dev lo # leads nowhere; Slurm binds no socket where all that there is is 127.0.0.1
mkdir -p "$R"/{etc,munge-key,munge-run,log,state/ctld,dev}
chmod 755 "$R"

# What the daemons look for at fixed places; Snakemake's plugin drops SLURM_CONF, so /etc/slurm it must be.
mkdir -p /etc/slurm /etc/munge /run/munge
mount --bind "$R/etc" /etc/slurm
mount --bind "$R/munge-key" /etc/munge
mount --bind "$R/munge-run" /run/munge
{ cat /etc/hosts; echo "127.0.0.1 $HOST"; } >"$R/hosts"
mount --bind "$R/hosts" /etc/hosts

head -c 1024 /dev/urandom >/etc/munge/munge.key
chown -R munge: /etc/munge /run/munge /var/lib/munge /var/log/munge
chmod 700 /etc/munge; chmod 400 /etc/munge/munge.key; chmod 755 /run/munge
runuser -u munge -- /usr/sbin/munged --log-file=/run/munge/munged.log --seed-file=/run/munge/munged.seed --pid-file=/run/munge/munged.pid
wait_for 5 sh -c 'munge -n | unmunge'

cat >/etc/slurm/slurm.conf <<END
ClusterName=test
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=15 # so long a requeued job waits; two minutes by default
StateSaveLocation=$R/state/ctld
SlurmdSpoolDir=$R/state/%n
SlurmctldPidFile=$R/slurmctld.pid
SlurmdPidFile=$R/slurmd-%n.pid
SlurmctldLogFile=$R/log/slurmctld.log
SlurmdLogFile=$R/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0,requeue_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MinJobAge=300
SlurmdTimeout=20
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStorageEnforce=associations,limits,qos,safe
AccountingStorageTRES=gres/gpu
NodeName=node[1-$NODES] NodeHostname=$HOST NodeAddr=127.0.0.1 Port=[7101-$((7100 + NODES))] CPUs=$CPUS RealMemory=$MEMORY Gres=gpu:h200:$GPUS
PartitionName=cpu     Nodes=ALL Default=YES MaxTime=1-0 PriorityTier=2
PartitionName=gpu     Nodes=ALL MaxTime=2-0 PriorityTier=2
PartitionName=preempt Nodes=ALL MaxTime=2-0 PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=short   Nodes=ALL MaxTime=1 PriorityTier=2
END

# Slurm refuses GPUs that are no device files: these are copies of /dev/null.
: >/etc/slurm/gres.conf
for node in $(seq $NODES); do
    mkdir -p "$R/dev/node$node" "$R/state/node$node"
    for gpu in $(seq 0 $((GPUS - 1))); do mknod "$R/dev/node$node/nvidia$gpu" c 1 3; done
    echo "NodeName=node$node Name=gpu Type=h200 File=$R/dev/node$node/nvidia[0-$((GPUS - 1))]" >>/etc/slurm/gres.conf
done

# A temporary table's file is named by the process's number, which two clusters, each counting its own, share.
SOCKET=$R/mysqld.sock
mkdir "$R/state/mysql-tmp"
mariadb-install-db --no-defaults --user=root --datadir="$R/state/mysql" --tmpdir="$R/state/mysql-tmp" --skip-test-db \
    >"$R/log/mariadb-install.log" 2>&1
mariadbd --no-defaults --user=root --datadir="$R/state/mysql" --tmpdir="$R/state/mysql-tmp" --socket="$SOCKET" \
    --pid-file="$R/mariadbd.pid" \
    --bind-address=127.0.0.1 --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 \
    --innodb-flush-log-at-trx-commit=0 >"$R/log/mariadbd.log" 2>&1 </dev/null &
wait_for 60 mysqladmin --no-defaults --socket="$SOCKET" ping
mariadb --no-defaults --socket="$SOCKET" -e "CREATE DATABASE slurm_acct_db;
    CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
    CREATE USER 'slurm'@'localhost' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost';"
cat >/etc/slurm/slurmdbd.conf <<END
AuthType=auth/munge
DbdHost=localhost
DbdAddr=127.0.0.1
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StorageUser=slurm
StoragePass=slurm
PidFile=$R/slurmdbd.pid
LogFile=$R/log/slurmdbd.log
END
chmod 600 /etc/slurm/slurmdbd.conf
slurmdbd
wait_for 30 sacctmgr -n list cluster
account() { # account WORDS LISTING NAME: add an entry, which may be there although the answer came too late
    wait_for 30 sh -c "sacctmgr -i add $1; sacctmgr -nP list $2 | grep -qx $3"
}
account "cluster test" "cluster format=cluster" test
account "account ml Cluster=test Description=ml Organization=ml" "account format=account" ml
account "user root account=ml DefaultAccount=ml" "assoc user=root account=ml format=user" root

slurmctld
wait_for 20 scontrol ping
for node in $(seq $NODES); do slurmd -N "node$node"; done
wait_for 30 sh -c "[ \"\$(sinfo -h -N -p cpu -t idle -o %N | wc -l)\" = $NODES ]"

trap - ERR
status=0
"$@" || status=$?
exit $status
