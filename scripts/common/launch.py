"""Start a training step: one process or several, on one machine or several, with GPUs of its own.

    python -m scripts.common.launch --gpus 2 -- scripts.vase.train_classifier --settings ...
    python -m scripts.common.launch --nodes 2 --gpus 8 -- ...      one process per GPU, in a Slurm job of two nodes

In a Slurm job the GPUs that it handed out are used as they are, and several nodes are started by srun, each with
a launcher of its own. Elsewhere the launcher waits until enough GPUs are free of other launchers, locks them and
shows the step no others; the locks end with the launcher. The step's processes never outlive it, and one that dies
takes all others along. The exit status is the step's, or 128 + n after signal n; of several processes torchrun
reports any failure as 1. SIGTERM, SIGINT and SIGHUP are passed on.
"""

import argparse
import contextlib
import ctypes
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import filelock
import psutil

from scripts.common import locks, step
from scripts.common.errors import KilnError

log = logging.getLogger("kiln")

POLL_SECONDS = 1.0
REMIND_SECONDS = 600.0
TIED = "--tied"
PARENT = "KILN_PARENT_PID"
TORCHRUN = "torch.distributed.run"
DEADLINE = "KILN_DEADLINE"
MEET_SECONDS = 600  # for the slowest node to come up: imports from a busy network disk take minutes
FIRST_PORT, PORTS = 15000, 15000
_PR_SET_PDEATHSIG = 1
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Gpu(NamedTuple):
    """A GPU: `token` names it in CUDA_VISIBLE_DEVICES, `identity` is the same in every container."""

    token: str
    identity: str


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the launcher; ends in `SystemExit` with the step's status."""
    args, command = _parse(sys.argv[1:] if argv is None else argv)
    job = os.environ.get("SLURM_JOB_ID")
    spread = job is not None and args.nodes > 1 and args.rendezvous is None
    child: list[subprocess.Popen] = []

    def forward(number: int, _frame) -> None:
        if not child:
            sys.exit(128 + number)  # still waiting for a GPU
        if spread and number == signal.SIGTERM:
            log.info("SIGTERM is left to Slurm, which sends it to the processes of all nodes: srun would kill them")
        elif job and number == signal.SIGTERM:
            _send(child[0], number)
        else:
            child[0].send_signal(number)

    for number in _FORWARDED:
        # What is ignored stays so, as under nohup; in a Slurm job rules ignore SIGTERM, and steps do not.
        if signal.getsignal(number) is not signal.SIG_IGN or (job and number == signal.SIGTERM):
            signal.signal(number, forward)

    if spread:
        chosen, held = {}, []
        inner = srun_command(args, command, job)
    else:
        chosen, held, inner = _here(args, command, job)
    environment = {**os.environ, **chosen, **deadline(args.minutes, os.environ), PARENT: str(os.getpid())}

    # A process group of its own: Ctrl-C then reaches the step once, through `forward`, and not twice. A
    # background group may not read from the terminal, hence no stdin.
    child.append(subprocess.Popen(tied(inner), env=environment, stdin=subprocess.DEVNULL, process_group=0))
    status = child[0].wait()
    for lock in held:
        lock.release()
    sys.exit(status if status >= 0 else 128 - status)


def _here(
    args: argparse.Namespace, command: Sequence[str], job: str | None
) -> tuple[dict[str, str], list[filelock.BaseFileLock], list[str]]:
    """Environment, GPU locks and command of the processes on this machine."""
    of_several = job is not None and args.nodes > 1
    nodes = 1 if of_several else args.nodes  # without Slurm, this machine stands for all
    gpus = args.gpus * nodes
    if gpus and args.or_cpu and not _uuids():
        if job and "CUDA_VISIBLE_DEVICES" in os.environ:
            # As many processes as asked for: those of other nodes, and the batch, count on them.
            log.info("no GPU driver on this machine, though Slurm handed out GPUs: running on its CPU")
        else:
            log.info("no GPU on this machine: running on its CPU")
            gpus, nodes = 0, 1
    chosen, held = choose_gpus(gpus, args.visible, os.environ, owner=command[0])
    processes = args.processes or max(nodes, gpus)
    if processes > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        chosen["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    group = group_of_nodes(args.nodes, args.rendezvous, job) if of_several else None
    return chosen, held, step_command(command, processes, group)


def _send(child: subprocess.Popen, number: int) -> None:
    """Send a signal to the step: to each process of a group, past torchrun, which would end them all."""
    try:
        started = psutil.Process(child.pid)
        ranks = started.children() if TORCHRUN in started.cmdline() else [started]
    except psutil.NoSuchProcess:
        return
    for process in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.common.launch",
        usage="%(prog)s [OPTIONS] -- MODULE [ARGUMENTS ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpus", type=int, default=0, help="how many GPUs the step gets; 0: it sees none")
    parser.add_argument("--or-cpu", action="store_true", help="with no GPU on this machine, run without one")
    parser.add_argument("--processes", type=int, help="how many processes (default: one per GPU, at least one)")
    parser.add_argument("--nodes", type=int, default=1, help="on how many machines, with as many GPUs on each")
    parser.add_argument("--rendezvous", help="HOST:PORT where the nodes meet; the launcher gives it to those it starts")
    parser.add_argument("--minutes", type=float, help="how long the Slurm job may run; sets KILN_DEADLINE in it")
    parser.add_argument("--visible", help="GPUs to choose from, as in CUDA_VISIBLE_DEVICES (default: that, or all)")
    argv = list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    args, command = parser.parse_args(argv[:split]), argv[split + 1 :]
    if not command:
        parser.error("give the step's module after `--`")
    if args.gpus < 0 or (args.processes is not None and args.processes < 1) or args.nodes < 1:
        parser.error("--gpus must be 0 or more, --processes and --nodes 1 or more")
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


def step_command(module_and_arguments: Sequence[str], processes: int, group: Sequence[str] | None = None) -> list[str]:
    """The command that runs a module in one process, or in several on this machine that form a group.

    Args:
        module_and_arguments: the module, then its arguments.
        processes: how many on this machine.
        group: torchrun's options where they form a group with those of other machines.
    """
    if processes == 1 and group is None:
        return [sys.executable, "-m", *module_and_arguments]
    # --standalone finds a free port itself, so two launches never collide; the local address spares it
    # a look-up of the host's name, which fails or hangs on some machines.
    alone = ["--standalone", "--local-addr=127.0.0.1"]
    torchrun = [TORCHRUN, *(alone if group is None else group), f"--nproc_per_node={processes}"]
    return [
        *(sys.executable, "-m", *torchrun, "--no-python"),
        *tied([sys.executable, "-u", "-m", *module_and_arguments]),
    ]


def srun_command(args: argparse.Namespace, command: Sequence[str], job: str) -> list[str]:
    """The command that starts a launcher on each node of a Slurm job; this process runs on the first of them."""
    inner = ["--nodes", str(args.nodes), "--gpus", str(args.gpus)]
    inner += ["--rendezvous", f"{node_address()}:{free_port(job)}"]
    inner += ["--or-cpu"] if args.or_cpu else []
    inner += ["--processes", str(args.processes)] if args.processes else []
    # One task per node with all that the job has there: without these, srun may bind it to a single CPU.
    placed = [f"--nodes={args.nodes}", f"--ntasks={args.nodes}", "--ntasks-per-node=1", "--cpu-bind=none"]
    launch = [sys.executable, "-m", "scripts.common.launch", *inner, "--", *command]
    return [_program("srun"), *placed, "--kill-on-bad-exit=1", "--mpi=none", *launch]


def group_of_nodes(nodes: int, rendezvous: str, job: str) -> list[str]:
    """torchrun's options on one of the nodes that srun started; the first keeps the store where they meet."""
    first = int(os.environ.get("SLURM_NODEID", "0") == "0")
    waits = f"join_timeout={MEET_SECONDS},read_timeout={MEET_SECONDS}"
    return [
        *(f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}", f"--rdzv-id={job}"),
        *(f"--rdzv-conf=is_host={first},{waits}", f"--local-addr={node_address()}"),
    ]


def node_address() -> str:
    """Where Slurm's other nodes reach this one; a node's name or host name need not resolve.

    Raises:
        KilnError: Slurm does not say.
    """
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    shown = subprocess.run([_program("scontrol"), "show", "node", name], capture_output=True, text=True, check=False)
    found = re.search(r"NodeAddr=(\S+)", shown.stdout)
    if not found:
        raise KilnError(
            f"`scontrol show node {name}` tells no address: {shown.stderr.strip() or shown.stdout.strip()}",
            "run it on that node; `scontrol ping` says whether the controller answers",
        )
    return found[1]


def free_port(job: str) -> int:
    """A free port of this machine, another for each job: below those that the kernel gives to connections."""
    for offset in range(PORTS):
        port = FIRST_PORT + (int(job) + offset) % PORTS
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("", port))
            return port
    raise KilnError(f"no port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} is free here", "look at `ss -tln`")


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise KilnError(f"{name} is not on PATH", "several nodes are started by Slurm's srun; one needs none")
    return found


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
    if "SLURM_JOB_ID" in os.environ:
        # A job is requeued only if its processes are still there when Slurm kills them. So SIGTERM ends none, but
        # for steps that say what to do then; torchrun, which would end its processes, does not get to hear of it.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        deaf = list(command[1:3]) == ["-m", TORCHRUN]
        signal.pthread_sigmask(signal.SIG_BLOCK if deaf else signal.SIG_UNBLOCK, {signal.SIGTERM})
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
    if visible is None and listed is not None and "SLURM_JOB_ID" in environment:
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
            "ask for fewer (0 trains on the CPU), or run a class of several nodes by `--profile slurm`; `make doctor` "
            "says which GPUs there are, `echo $CUDA_VISIBLE_DEVICES` whether it hides some",
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
