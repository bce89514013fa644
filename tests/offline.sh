#!/usr/bin/env bash
# Run a command where there is no network: in a network namespace of its own, in which the loopback alone is up.
#
#     tests/offline.sh COMMAND...     its exit status, or 3 if this machine allows no such namespace
set -euo pipefail
[ $# -gt 0 ] || { echo "Usage: tests/offline.sh COMMAND..." >&2; exit 2; }
alone=(unshare --net)
[ "$(id -u)" = 0 ] || alone+=(--map-current-user --keep-caps)
if ! said=$("${alone[@]}" ip link set lo up 2>&1); then
    echo "NOT RUN OFFLINE, NOT RUN AT ALL: $*" >&2
    echo "Error: no network namespace with a loopback can be made here: $said" >&2
    echo "Hint: run as root with iproute2 installed, or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1)" >&2
    exit 3
fi
exec "${alone[@]}" sh -c 'ip link set lo up && exec "$@"' offline "$@"
