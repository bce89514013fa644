"""Training states: whole or absent after any kill, found again by what decides numbers, refused when wrong."""

import errno
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scripts.common import training_state
from scripts.common.data_order import EpochBatches, epoch_order, item_seed
from scripts.common.errors import KilnError
from scripts.common.fingerprint import fingerprint
from scripts.common.training_state import OutOfTime, TrainingState

ROOT = Path(__file__).resolve().parents[1]
PRINT = fingerprint({"lr": 0.1}, {"data": "00"}, "c0de")


@pytest.fixture
def state(tmp_path):
    """A maker of states below one root; all are closed in the end."""
    made = []

    def make(name: str = PRINT, **options) -> TrainingState:
        made.append(TrainingState(tmp_path / "state", name, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name != "writer.lock")


def draws() -> list:
    """The next numbers of every random generator."""
    return [
        *(random.random() for _ in range(3)), random.gauss(0, 1),
        *np.random.rand(3).tolist(), np.random.standard_normal(),
        *torch.rand(3).tolist(), *torch.randn(17).tolist(), int(torch.randperm(1000)[0]),
    ]  # fmt: skip


@pytest.mark.parametrize("warm", [0, 1, 5])
def test_all_random_generators_go_on(state, warm):
    random.seed(warm)
    np.random.seed(warm)
    torch.manual_seed(warm)
    for _ in range(warm):
        draws()  # an odd number of gaussians, so that one is cached
    first = state()
    first.save(1, {})
    expected = draws()
    first.close()
    draws()
    state().load()
    assert draws() == expected


def test_a_payload_comes_back_to_the_bit(state):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, 2)
    for _ in range(3):
        optimiser.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimiser.step()
        schedule.step()
    payload = {
        "model": model.state_dict(), "optimiser": optimiser.state_dict(), "schedule": schedule.state_dict(),
        "scaler": {}, "odd": [1, 2.5, None, "花", (True, float("inf"))], "half": torch.tensor([1 / 3]).bfloat16(),
    }  # fmt: skip
    one = state()
    one.save(3, payload)
    one.close()
    back = state().load()
    assert back.keys() == payload.keys()
    assert (back["odd"], back["scaler"], back["schedule"]) == (payload["odd"], {}, payload["schedule"])
    assert torch.equal(back["half"], payload["half"])
    assert back["half"].dtype == torch.bfloat16
    assert all(torch.equal(back["model"][name], value) for name, value in payload["model"].items())
    for number, moments in payload["optimiser"]["state"].items():
        assert all(torch.equal(back["optimiser"]["state"][number][k], v) for k, v in moments.items())
    assert back["optimiser"]["param_groups"] == payload["optimiser"]["param_groups"]


@pytest.mark.parametrize("steps", [[1], [9, 10], [99, 100, 101], [10, 9, 999_999_999]])
def test_the_newest_is_found_and_few_are_kept(state, steps):
    one = state()
    for step in steps:
        one.save(step, {"step": step})
    one.close()
    two = state()
    assert two.load() == {"step": max(steps)}
    assert files(two.folder) == [f"step-{step:09d}" for step in sorted(steps)[-training_state.KEEP :]]


def test_without_a_state_there_is_none(state):
    assert state().load() is None


def test_unfinished_states_are_ignored_and_removed(state):
    one = state()
    one.save(5, {"step": 5})
    partial = one.folder / "step-000000007.partial"
    partial.mkdir()
    (partial / "shared.pt").write_bytes(b"half")
    assert one.load() == {"step": 5}
    one.close()
    assert state().load() == {"step": 5}
    assert files(one.folder) == ["step-000000005"]


def test_saving_a_step_again_keeps_the_later_state(state):
    one = state()
    for number in range(4):
        one.save(7, {"number": number})
        assert one.load() == {"number": number}
        assert len(files(one.folder)) <= training_state.KEEP
    one.save(8, {"number": 8})
    assert one.load() == {"number": 8}


@pytest.mark.parametrize("step", [7, 8])
@pytest.mark.parametrize("call", ["mkdir", "open", "fsync", "rename"])
def test_a_failing_save_keeps_the_state_before(state, monkeypatch, call, step):
    one = state()
    one.save(7, {"number": 1})

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*{"mkdir": (Path, "mkdir"), "open": (Path, "open"), "fsync": (os, "fsync"),
                        "rename": (os, "rename")}[call], refuse)  # fmt: skip
        with pytest.raises(KilnError, match="the disk is full") as caught:
            one.save(step, {"number": 2})
    assert caught.value.hint
    assert files(one.folder) == ["step-000000007"]
    assert one.load() == {"number": 1}


@pytest.mark.parametrize("other", [
    fingerprint({"lr": 0.2}, {"data": "00"}, "c0de"),
    fingerprint({"lr": 0.1, "more": None}, {"data": "00"}, "c0de"),
    fingerprint({"lr": 0.1}, {"data": "01"}, "c0de"),
    fingerprint({"lr": 0.1}, {"atad": "00"}, "c0de"),
    fingerprint({"lr": 0.1}, {"data": "00"}, "c0df"),
])  # fmt: skip
def test_another_fingerprint_starts_afresh(state, other):
    state().save(1, {"step": 1})
    assert other != PRINT
    assert state(other).load() is None


def test_a_fingerprint_does_not_know_the_order_of_keys():
    assert fingerprint({"b": 1, "a": {"d": 2, "c": 3}}, {"y": "1", "x": "2"}, "k") == fingerprint(
        {"a": {"c": 3, "d": 2}, "b": 1}, {"x": "2", "y": "1"}, "k"
    )
    assert fingerprint({"lr": 0.1}, {"data": "00"}, "c0de") == PRINT


def test_a_save_is_made_when_it_is_due(state, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    one = state(save_minutes=10)
    made = []

    def payload():
        made.append(now[0])
        return {}

    for step in range(1, 31):
        now[0] += 60
        one.checkpoint(step, payload)
    assert made == [1600.0, 2200.0, 2800.0]
    assert files(one.folder) == ["step-000000020", "step-000000030"]


def test_zero_minutes_save_after_every_step(state):
    one = state(save_minutes=0)
    for step in (1, 2, 3):
        one.checkpoint(step, lambda: {})
    assert files(one.folder) == ["step-000000002", "step-000000003"]


def test_a_time_budget_saves_and_stops(state, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    one = state(save_minutes=60, budget_minutes=5)
    one.checkpoint(1, lambda: pytest.fail("saved too early"))
    now[0] = 301
    with pytest.raises(OutOfTime) as caught:
        one.checkpoint(2, lambda: {"step": 2})
    assert isinstance(caught.value, KilnError)  # so that a step ends with a hint and a status that is not zero
    assert "step 2" in caught.value.message
    one.close()
    two = state(save_minutes=60, budget_minutes=5)
    assert two.load() == {"step": 2}
    two.checkpoint(3, lambda: pytest.fail("a new run has its budget whole"))


def test_another_number_of_processes_is_refused(state):
    state().save(1, {})
    root = state("other").folder.parent
    other = TrainingState(root, PRINT, rank=1, ranks=2)
    with pytest.raises(KilnError) as caught:
        other.load()
    assert "saved by 1 processes, but there are 2" in caught.value.message
    assert caught.value.hint


def test_two_writers_are_refused(state, tmp_path):
    one = state()
    with pytest.raises(KilnError, match="another process writes here"):
        state()
    done = python(f"TrainingState(Path({str(tmp_path / 'state')!r}), {PRINT!r})")
    assert "another process writes here" in done.stderr
    state("another fingerprint")
    one.close()
    state()


def test_an_abandoned_writer_lets_go(state, tmp_path):
    """As when a training raises, and its process lives on."""
    TrainingState(tmp_path / "state", PRINT)
    state()


def test_remove_leaves_nothing(state):
    old = state("of earlier settings")
    old.save(1, {})
    old.close()
    one = state()
    one.save(1, {})
    one.save(2, {})
    one.remove(Path("meta.json"))
    assert not one.folder.parent.exists()
    one.remove(Path("meta.json"))
    state()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["shared.pt", "rank-0.pt"])
@pytest.mark.parametrize("writer", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_malicious_pickle_is_refused(state, tmp_path, name, writer):
    one = state()
    one.save(1, {})
    writer(Malicious(str(tmp_path / "owned")), one.saved()[-1] / name)
    with pytest.raises(KilnError) as caught:
        one.load()
    assert name in caught.value.message
    assert "weights_only" not in str(caught.value)  # torch's own message tells how to run it
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["shared.pt", "rank-0.pt"])
@pytest.mark.parametrize("damage", ["empty", "half", "zeros", "gone"])
def test_a_damaged_state_is_named_and_the_one_before_can_be_used(state, name, damage):
    one = state()
    one.save(1, {"step": 1})
    one.save(2, {"weights": torch.ones(1000)})
    path = one.saved()[-1] / name
    whole = path.read_bytes()
    path.write_bytes({"half": whole[: len(whole) // 2], "zeros": bytes(len(whole))}.get(damage, b""))
    if damage == "gone":
        path.unlink()
    with pytest.raises(KilnError) as caught:
        one.load()
    assert str(path.parent) in caught.value.message
    assert caught.value.hint
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    assert one.load() == {"step": 1}


def python(text: str, **options) -> subprocess.CompletedProcess:
    """A program with `TrainingState` and `Path` at hand."""
    head = "import sys\nfrom pathlib import Path\nfrom scripts.common.training_state import TrainingState\n"
    command = [sys.executable, "-c", head + textwrap.dedent(text)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)


# Forks, so that torch is imported once: a child saves states of its own step without pause, and the parent kills it.
SAVE_AND_KILL = """
    import os, random, signal, time
    import torch

    root = Path(sys.argv[1])
    random.seed(int(sys.argv[2]))
    torch.set_num_threads(1)
    delays = [random.uniform(0.0, 0.03) for _ in range(int(sys.argv[3]))]
    reached = 0
    for number, delay in enumerate(delays):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            state = TrainingState(root, "f")
            saved = state.load()
            step = saved["step"] if saved else 0
            while True:
                step += 1
                state.save(step, {"step": step, "ones": torch.full((20000,), float(step))})
                if step % 3 == 0:
                    state.save(step, {"step": step, "ones": torch.full((20000,), float(step))})
                os.write(writer, b"%d " % step)
        os.close(writer)
        os.read(reader, 1)  # at least one save is done
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        told = b""
        while part := os.read(reader, 65536):
            told += part
        os.close(reader)
        state = TrainingState(root, "f")
        payload = state.load()
        step = payload["step"]
        assert (payload["ones"] == step).all(), step
        last = int(told.split()[-1]) if told.split() else reached
        assert step >= max(reached, last - 1), (step, reached, told)
        assert not list(state.folder.glob("*.partial"))
        assert len(state.saved()) <= 3
        state.close()
        reached = step
    print("survived", reached)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_kill_while_saving_always_leaves_a_whole_state(tmp_path, seed):
    head = "import sys\nfrom pathlib import Path\nfrom scripts.common.training_state import TrainingState\n"
    command = [sys.executable, "-c", head + textwrap.dedent(SAVE_AND_KILL), str(tmp_path / "state"), str(seed), "40"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 40


# A training with dropout, momentum and shuffled data on each rank, whose end depends on everything that a state holds.
TRAINING = """
    import os, signal
    import numpy as np, torch, torch.distributed as dist
    from scripts.common.data_order import EpochBatches

    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo")
    barrier = dist.barrier if ranks > 1 else lambda: None
    root, out, die_at, die_rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.manual_seed(100 + rank)
    np.random.seed(rank)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    with torch.no_grad():
        [p.fill_(0.1) for p in model.parameters()]
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    data = torch.linspace(-1, 1, 48).reshape(12, 4)
    state = TrainingState(root, "f", rank, ranks, barrier, save_minutes=0)
    saved = state.load()
    step = 0
    if saved:
        model.load_state_dict(saved["model"]); optimiser.load_state_dict(saved["optimiser"]); step = saved["step"]
    resumed = step
    for step in range(step, 12):
        epoch, start = divmod(step, 3)
        batch = next(iter(EpochBatches(12, 4, 7, epoch, rank, ranks, start)))
        loss = (model(data[[i for _, i in batch]]) - float(np.random.rand())).square().mean()
        optimiser.zero_grad()
        loss.backward()
        if ranks > 1:
            [dist.all_reduce(p.grad) for p in model.parameters()]
        optimiser.step()
        if step == die_at and rank == die_rank:
            os.kill(os.getpid(), signal.SIGKILL)
        make = lambda: {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}
        state.checkpoint(step + 1, make)
    out.mkdir(exist_ok=True)
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters()) + torch.rand(4).numpy().tobytes()
    (out / f"{rank}.bin").write_bytes(weights)
    (out / "resumed").write_text(str(resumed))
    barrier()
    state.remove(out / "meta.json")
"""


def train(folder: Path, name: str, ranks: int, port: int, die_at: int = -1, die_rank: int = -1) -> list[int]:
    """Exit statuses of a training with its outputs in `folder/name`; the others are stopped when one dies."""
    head = "import sys\nfrom pathlib import Path\nfrom scripts.common.training_state import TrainingState\n"
    arguments = [str(folder / f"state-{name}"), str(folder / name), str(die_at), str(die_rank)]
    processes = []
    for rank in range(ranks):
        facts = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", head + textwrap.dedent(TRAINING), *arguments],
                cwd=ROOT,
                env={**os.environ, **{k: str(v) for k, v in facts.items()}},
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
        )
    if die_rank >= 0:
        processes[die_rank].wait()
        for process in processes:
            process.kill()
    return [process.wait() for process in processes]


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "die_rank"), [(1, 0), (2, 1)])
def test_a_killed_training_ends_with_the_same_bytes(tmp_path, ranks, die_rank):
    """Every rank: weights and the random numbers that come next. With two processes they meet through gloo."""
    assert train(tmp_path, "whole", ranks, free_port()) == [0] * ranks
    assert -signal.SIGKILL in train(tmp_path, "killed", ranks, free_port(), die_at=7, die_rank=die_rank)
    assert not (tmp_path / "killed").exists()
    assert train(tmp_path, "killed", ranks, free_port()) == [0] * ranks
    assert (tmp_path / "killed/resumed").read_text() == "7"
    for rank in range(ranks):
        assert (tmp_path / f"killed/{rank}.bin").read_bytes() == (tmp_path / f"whole/{rank}.bin").read_bytes()
    assert not (tmp_path / "state-killed").exists()
    if ranks == 2:
        assert (tmp_path / "whole/0.bin").read_bytes() != (tmp_path / "whole/1.bin").read_bytes()  # own generators


@pytest.mark.gpu
def test_the_gpus_generators_go_on(state):
    torch.cuda.manual_seed_all(3)
    torch.rand(5, device="cuda")
    one = state()
    one.save(1, {"weights": torch.ones(2, device="cuda")})
    expected = torch.rand(5, device="cuda")
    one.close()
    assert state().load("cuda")["weights"].is_cuda
    assert torch.equal(torch.rand(5, device="cuda"), expected)


@given(st.integers(0, 60), st.integers(0, 2**62), st.integers(0, 2**40))
def test_an_order_is_a_permutation(items, seed, epoch):
    order = epoch_order(items, seed, epoch)
    assert sorted(order.tolist()) == list(range(items))
    assert order.dtype == np.int64
    np.testing.assert_array_equal(order, epoch_order(items, seed, epoch))


def test_orders_are_the_same_on_every_machine():
    """Golden values: another order would silently train another model."""
    assert epoch_order(10, 42, 3).tolist() == [8, 4, 7, 1, 6, 3, 0, 2, 9, 5]
    assert item_seed(42, 3, 7) == 297063541186536824


def test_orders_differ_by_seed_and_epoch_and_ignore_the_global_generator():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    np.random.seed(0)
    first = epoch_order(50, 1, 1)
    np.random.seed(1)
    np.testing.assert_array_equal(first, epoch_order(50, 1, 1))


def test_every_item_gets_to_every_place():
    """Mean place of each item over many epochs is the middle, within five standard errors."""
    places = np.argsort(np.stack([epoch_order(20, 9, epoch) for epoch in range(2000)]), axis=1).mean(axis=0)
    assert np.abs(places - 9.5).max() < 5 * np.sqrt((20**2 - 1) / 12 / 2000)


@given(st.integers(0, 50), st.integers(1, 6), st.sampled_from([1, 2, 3, 4]), st.integers(0, 9), st.integers(0, 5))
def test_batches_partition_an_epoch_across_ranks(extra, per_rank, ranks, seed, epoch):
    size = per_rank * ranks
    items = ranks + extra
    shares = [list(EpochBatches(items, size, seed, epoch, rank, ranks)) for rank in range(ranks)]
    count = max(1, items // size)
    assert [len(share) for share in shares] == [count] * ranks
    one = list(EpochBatches(items, size, seed, epoch))
    order = epoch_order(items, seed, epoch).tolist()
    for number, whole in enumerate(one):
        assert whole == [(epoch, index) for index in order[number * size : (number + 1) * size]]
        parts = [share[number] for share in shares]
        assert sorted(key for part in parts for key in part) == sorted(whole)  # each item once, whatever the ranks
        assert {len(part) for part in parts} <= ({per_rank} if items >= size else set(range(1, per_rank + 1)))


@given(st.integers(1, 40), st.integers(1, 10), st.integers(0, 40), st.booleans())
def test_a_later_start_is_the_tail(items, size, start, second):
    ranks, rank = (2, 1) if second else (1, 0)
    size, items = size * ranks, items + ranks
    whole = EpochBatches(items, size, 5, 2, rank, ranks)
    start = min(start, whole.total())
    tail = EpochBatches(items, size, 5, 2, rank, ranks, start)
    assert list(tail) == list(whole)[start:]
    assert len(tail) == len(list(tail))
    assert tail.total() == whole.total()


@pytest.mark.parametrize("options", [
    {"items": 10, "batch_size": 5, "ranks": 2},  # uneven shares weigh images differently
    {"items": 3, "batch_size": 8, "ranks": 4},  # a rank without an image waits for ever
    {"items": 0, "batch_size": 8, "ranks": 1},
])  # fmt: skip
def test_shares_that_cannot_be(options):
    with pytest.raises(KilnError) as caught:
        EpochBatches(seed=0, epoch=0, **options)
    assert caught.value.hint


@given(st.tuples(*[st.integers(0, 10**6)] * 3), st.tuples(*[st.integers(0, 10**6)] * 3))
def test_item_seeds(one, other):
    assert 0 <= item_seed(*one) < 2**63
    assert (item_seed(*one) == item_seed(*other)) == (one == other)
    torch.Generator().manual_seed(item_seed(*one))
