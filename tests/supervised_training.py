"""A small training with everything that a state holds, as a program; its argument is JSON that says what goes wrong.

Keys: `state`, `out` (folders), `workers`, `options` (of `TrainingState`); at batch number `at` what `does` says:
data that never comes ("no data"), a step that hangs in Python ("hang") or in the kernel ("deep hang"), a validation
of two seconds ("validation"), signals ("term", "int twice", "like slurm").
"""

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from scripts.common import step, supervision
from scripts.common.data_order import EpochBatches
from scripts.common.training_state import TrainingState

STEPS = 12


class Data(torch.utils.data.Dataset):
    def __init__(self, at: int | None):
        self.rows, self.at = torch.linspace(-1, 1, 48).reshape(12, 4), at

    def __getitem__(self, key):
        epoch, index = key
        if self.at is not None and epoch == self.at // 3 and index == next(iter(batches(epoch, self.at % 3)))[0][1]:
            np.random.rand()  # a save must not know of it
            torch.rand(1)
            time.sleep(1e6)
        return self.rows[index]


def batches(epoch: int, start: int) -> EpochBatches:
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return EpochBatches(12, 4, 7, epoch, rank, ranks, start)


def disturb(does: str, state: TrainingState) -> None:
    if does == "term" and state.rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    elif does == "like slurm":  # it signals every process of a job, and the launcher passes its own on
        for process in [*multiprocessing.active_children(), multiprocessing.current_process()] * 2:
            os.kill(process.pid, signal.SIGTERM)
    elif does == "int twice":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)  # still the same one
        print("goes on", flush=True)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    elif does == "hang":
        time.sleep(1e6)
    elif does == "deep hang":
        mutex = ctypes.create_string_buffer(64)
        libc = ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    elif does == "validation":
        state.paused(time.sleep)(2)


def main(_) -> None:
    told = json.loads(sys.argv[1])
    does, at, workers = told.get("does"), told.get("at"), told.get("workers", 0)
    supervision.ANSWER_SECONDS = 1.0
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo")
    barrier = dist.barrier if ranks > 1 else lambda: None
    torch.manual_seed(100 + rank)
    np.random.seed(rank)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
    )  # fmt: skip
    with torch.no_grad():
        [p.fill_(0.1) for p in model.parameters()]
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    state = TrainingState(Path(told["state"]), "f", rank, ranks, barrier, **told.get("options", {}))
    saved, done = state.load(), 0
    if saved:
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        done = saved["step"]

    def payload() -> dict:
        return {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": done}

    with state.running(STEPS):
        while done < STEPS:
            epoch, start = divmod(done, 3)
            data = Data(at if does == "no data" else None)
            sampler = batches(epoch, start)
            for batch in DataLoader(data, batch_sampler=sampler, num_workers=workers, generator=torch.Generator()):
                loss = (model(batch) - float(np.random.rand())).square().mean()
                if done == at:
                    disturb(does, state)
                optimiser.zero_grad()
                loss.backward()
                if ranks > 1:
                    [dist.all_reduce(p.grad) for p in model.parameters()]
                    [dist.broadcast(buffer, 0) for buffer in model.buffers()]
                optimiser.step()
                done += 1
                state.checkpoint(done, payload, loss.item())
    out = Path(told["out"])
    out.mkdir(exist_ok=True)
    tensors = [*model.state_dict().values(), torch.rand(4), torch.from_numpy(np.random.rand(4))]
    (out / f"{rank}.bin").write_bytes(b"".join(one.numpy().tobytes() for one in tensors))
    state.close()


if __name__ == "__main__":
    step.run(main)
