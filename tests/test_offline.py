"""tests/offline.sh: the loopback works, all else is out of reach, and where it cannot be done nothing is run."""

import json
import os
import subprocess
import sys

LOOK = """
import json, os, socket
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname(), 5).close()
try:
    socket.create_connection(("192.0.2.1", 80), 5)
    out = "connected"
except OSError as error:
    out = os.strerror(error.errno)
names = [name for _, name in socket.if_nameindex()]
print(json.dumps({"names": names, "out": out, "net": os.readlink("/proc/self/ns/net")}))
"""


def test_nothing_but_the_loopback_is_there(offline):
    done = offline(sys.executable, "-c", LOOK)
    seen = json.loads(done.stdout)
    assert seen.pop("net") != os.readlink("/proc/self/ns/net")
    assert seen == {"names": ["lo"], "out": "Network is unreachable"}


def test_the_status_and_the_arguments_of_the_command_are_kept(offline):
    done = offline("sh", "-c", 'echo "$1|$2"; exit 7', "sh", "a b", "$c")
    assert (done.returncode, done.stdout) == (7, "a b|$c\n")


def test_without_namespaces_nothing_is_run(root, tmp_path):
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho unshare failed: Operation not permitted >&2\nexit 1\n")
    refusing.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [str(root / "tests/offline.sh"), "touch", str(tmp_path / "ran")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 3 and not (tmp_path / "ran").exists()
    assert "NOT RUN" in done.stderr and "Operation not permitted" in done.stderr and "Hint: " in done.stderr
