#!/usr/bin/env bash
# Install Chromium, in which tests open the report, where that can be done: Debian's package, as root. Without it: say
# loudly that pages are not opened, and exit with 3.
set -euo pipefail

without() {
    printf '%s\n' "" "== NO BROWSER HERE: $1." "== Tests marked \`browser\` do not run." "" >&2
    exit 3
}

command -v chromium >/dev/null && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || without "it takes root and apt-get to install chromium"
{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
    >/tmp/kiln-browser-install.log 2>&1 || without "chromium cannot be installed (/tmp/kiln-browser-install.log)"
