"""Start a training step: one process or several, with GPUs of its own.

    python -m scripts.common.launch --gpus 2 -- scripts.vase.train_classifier --settings ...

Under a scheduler that handed out GPUs, these are used as they are. On a workstation the launcher waits
until enough GPUs are free of other launchers, locks them and shows the step no others; the locks end with
the launcher, and the step's processes never outlive it. The exit status is the step's, or 128 + n after
signal n; of several processes torchrun reports any failure as 1. SIGTERM, SIGINT and SIGHUP are passed on.
"""

import argparse
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import filelock

from scripts.common import locks, step
from scripts.common.errors import KilnError

log = logging.getLogger("kiln")

POLL_SECONDS = 1.0
REMIND_SECONDS = 600.0
TIED = "--tied"
PARENT = "KILN_PARENT_PID"
DEADLINE = "KILN_DEADLINE"
_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Gpu(NamedTuple):
    """A GPU: `token` names it in CUDA_VISIBLE_DEVICES, `identity` is the same in every container."""

    token: str
    identity: str


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the launcher; ends in `SystemExit` with the step's status."""
    args, command = _parse(sys.argv[1:] if argv is None else argv)
    child: list[subprocess.Popen] = []

    def forward(number: int, _frame) -> None:
        if not child:
            sys.exit(128 + number)  # still waiting for a GPU
        child[0].send_signal(number)

    for number in _FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, forward)

    if args.gpus and args.or_cpu and not _uuids():
        log.info("no GPU on this machine: running on its CPU")
        args.gpus = 0
    chosen, held = choose_gpus(args.gpus, args.visible, os.environ, owner=command[0])
    environment = {**os.environ, **chosen, **deadline(args.minutes, os.environ), PARENT: str(os.getpid())}
    processes = args.processes or max(1, args.gpus)
    if processes > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))

    # A process group of its own: Ctrl-C then reaches the step once, through `forward`, and not twice. A
    # background group may not read from the terminal, hence no stdin.
    child.append(
        subprocess.Popen(
            tied(step_command(command, processes)), env=environment, stdin=subprocess.DEVNULL, process_group=0
        )
    )
    status = child[0].wait()
    for lock in held:
        lock.release()
    sys.exit(status if status >= 0 else 128 - status)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.common.launch",
        usage="%(prog)s [--gpus N [--or-cpu]] [--nodes M] [--minutes T] [--processes P] [--visible A,B,...] -- MODULE [ARGUMENTS ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpus", type=int, default=0, help="how many GPUs the step gets; 0: it sees none")
    parser.add_argument("--or-cpu", action="store_true", help="with no GPU on this machine, run without one")
    parser.add_argument("--processes", type=int, help="how many processes (default: one per GPU, at least one)")
    parser.add_argument("--nodes", type=int, default=1, help="on how many machines, with as many GPUs on each")
    parser.add_argument("--minutes", type=float, help="how long the Slurm job may run; sets KILN_DEADLINE in it")
    parser.add_argument("--visible", help="GPUs to choose from, as in CUDA_VISIBLE_DEVICES (default: that, or all)")
    argv = list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    args, command = parser.parse_args(argv[:split]), argv[split + 1 :]
    if not command:
        parser.error("give the step's module after `--`")
    if args.gpus < 0 or (args.processes is not None and args.processes < 1):
        parser.error("--gpus must be 0 or more, and --processes 1 or more")
    return args, command


def deadline(minutes: float | None, environment: Mapping[str, str]) -> dict[str, str]:
    """KILN_DEADLINE, the Unix time in seconds at which a training in a Slurm job of so many minutes saves and ends.

    It leaves one minute or 5 % of the job's time, the longer of them, but no more than a third. Outside Slurm, or
    without `minutes`, there is none.
    """
    if minutes is None or "SLURM_JOB_ID" not in environment:
        return {}
    seconds = 60 * minutes
    margin = min(max(60, 0.05 * seconds), seconds / 3)
    return {DEADLINE: f"{time.time() + seconds - margin:.0f}"}


def step_command(module_and_arguments: Sequence[str], processes: int) -> list[str]:
    """The command that runs a module in one process, or in several on this machine that form a group."""
    if processes == 1:
        return [sys.executable, "-m", *module_and_arguments]
    # --standalone finds a free port itself, so two launches never collide; the local address spares it
    # a look-up of the host's name, which fails or hangs on some machines.
    torchrun = ["torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={processes}"]
    return [
        *(sys.executable, "-m", *torchrun, "--no-python"),
        *tied([sys.executable, "-u", "-m", *module_and_arguments]),
    ]


def tied(command: Sequence[str]) -> list[str]:
    """`command`, made to be killed when the thread that starts it dies.

    The kernel does not hand this on to children, so a step that starts a long process of its own (another
    trainer's command line) starts it in this way too, and from its main thread.
    """
    return [sys.executable, "-m", "scripts.common.launch", TIED, *command]


def _run_tied(command: Sequence[str]) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        sys.exit("launch: the process that started this one has gone")  # before the line above took effect
    os.environ[PARENT] = str(os.getpid())  # exec keeps the pid, so this is right for the command's children
    os.execv(command[0], command)


def choose_gpus(
    count: int, visible: str | None, environment: Mapping[str, str], owner: str
) -> tuple[dict[str, str], list[filelock.BaseFileLock]]:
    """Environment variables that show CUDA `count` GPUs, and the locks that keep them; waits until they are free.

    Args:
        count: how many; with 0 CUDA sees no GPU.
        visible: what to choose from, as in CUDA_VISIBLE_DEVICES; None: what `environment` or the machine has.
        environment: where CUDA_VISIBLE_DEVICES and SLURM_JOB_ID are looked up.
        owner: what the GPUs are for, in words.

    Raises:
        KilnError: there are fewer than `count`, or a listed GPU does not exist.
    """
    if count == 0:
        return {"CUDA_VISIBLE_DEVICES": ""}, []
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    handed_out = visible is None and listed is not None and "SLURM_JOB_ID" in environment
    if handed_out:
        tokens = _split(listed)
        if len(tokens) < count:
            raise KilnError(
                f"the step asks for {count} GPU(s); Slurm handed out {len(tokens)} (CUDA_VISIBLE_DEVICES={listed!r})",
                "make the rule's `gpu` resource at least as large as its number of GPUs",
            )
        return {"CUDA_VISIBLE_DEVICES": ",".join(tokens[:count])}, []
    candidates = find_gpus(listed if visible is None else visible)
    if len(candidates) < count:
        raise KilnError(
            f"the step asks for {count} GPU(s); it may choose from {len(candidates)} on this machine",
            "ask for fewer (0 trains on the CPU); `make doctor` says which GPUs there are, `echo "
            "$CUDA_VISIBLE_DEVICES` whether it hides some",
        )
    held = _wait_for(candidates, count, owner)
    tokens = [gpu.token for gpu in candidates if gpu.identity in held]
    # CUDA numbers the fastest GPU 0 unless it is told to count as the driver (and nvidia-smi) does.
    return {"CUDA_VISIBLE_DEVICES": ",".join(tokens), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, list(held.values())


def _wait_for(candidates: Sequence[Gpu], count: int, owner: str) -> dict[str, filelock.BaseFileLock]:
    said, said_at = "", 0.0
    while True:
        held, holders = locks.take_gpus([gpu.identity for gpu in candidates], count, owner)
        if held:
            return held
        lines = [f"  GPU {gpu.token}: {holders[gpu.identity]}" for gpu in candidates if gpu.identity in holders]
        message = "\n".join([f"waiting for {count} free GPU(s) of {len(candidates)}; taken are", *lines])
        if message != said or time.monotonic() - said_at > REMIND_SECONDS:
            log.info("%s", message)
            said, said_at = message, time.monotonic()
        time.sleep(POLL_SECONDS)


def find_gpus(visible: str | None) -> list[Gpu]:
    """The GPUs that `visible` lists, as in CUDA_VISIBLE_DEVICES, or all of this machine if it is None.

    Names that the driver does not know (MIG slices) are taken as they are.

    Raises:
        KilnError: an index or GPU UUID that this machine does not have.
    """
    uuids = _uuids()
    if visible is None:
        return [Gpu(str(index), uuid) for index, uuid in enumerate(uuids)]
    return list(dict.fromkeys(_find(token, uuids) for token in _split(visible)))


def _find(token: str, uuids: Sequence[str]) -> Gpu:
    if not uuids:
        return Gpu(token, token)
    if token.isdigit():
        found = [index for index in range(len(uuids)) if index == int(token)]
    elif token.startswith("GPU-"):
        found = [index for index, uuid in enumerate(uuids) if uuid.startswith(token)]
    else:
        return Gpu(token, token)
    if len(found) != 1:
        raise KilnError(
            f"GPU {token!r} is not one of this machine's {len(uuids)}",
            "correct CUDA_VISIBLE_DEVICES (or --visible); `nvidia-smi -L` lists what there is",
        )
    return Gpu(str(found[0]), uuids[found[0]])


def _split(tokens: str) -> list[str]:
    return [token.strip() for token in tokens.split(",") if token.strip() not in ("", "-1", "NoDevFiles")]


def _uuids() -> list[str]:
    """UUIDs of this machine's GPUs in PCI order, which is nvidia-smi's; none without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [pynvml.nvmlDeviceGetUUID(handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()


if __name__ == "__main__":
    if sys.argv[1:2] == [TIED]:
        _run_tied(sys.argv[2:])
    step.run(main)
