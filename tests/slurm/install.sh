#!/usr/bin/env bash
# Install what with_cluster.sh needs, where that can be done: Debian's or Ubuntu's packages, as root. No service is
# started. Without them: say loudly why there is no cluster, and exit with 3.
set -euo pipefail
WANTED=(slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin munge mariadb-server iproute2)

without() {
    printf '%s\n' "" "== NO TEST CLUSTER HERE: $1." "== Tests marked \`cluster\` do not run." "" >&2
    exit 3
}

missing=()
for package in "${WANTED[@]}"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
[ "$(id -u)" = 0 ] || without "it takes root to make its namespaces"
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || without "missing are ${missing[*]}, and there is no apt-get"
    # Packages must not start their daemons: the cluster starts its own.
    if [ ! -e /usr/sbin/policy-rc.d ]; then
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
    fi
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } \
        >/tmp/kiln-slurm-install.log 2>&1 || without "missing are ${missing[*]}, and they cannot be installed (/tmp/kiln-slurm-install.log)"
fi
unshare --mount --net --pid --fork --mount-proc true 2>/dev/null || without "this container may not make namespaces"
