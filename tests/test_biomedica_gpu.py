"""What only a GPU shows of pipeline biomedica's training: half precision, deterministic kernels, passes."""

import pytest
import torch
from accelerate.state import AcceleratorState
from test_biomedica_training import first_step, nothing, open_fit, run, torch_bytes, weights

pytestmark = pytest.mark.gpu
GPU = "cuda:0"


@pytest.fixture(autouse=True)
def exact_and_apart(monkeypatch):
    """No TF32, and no device, precision or determinism that outlives its test."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "")
    monkeypatch.delenv("ACCELERATE_TORCH_DEVICE")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.use_deterministic_algorithms(False)


def test_a_gpu_trains_as_a_cpu_does():
    ours, other = run(open_fit(device=GPU)).at.history, run(open_fit()).at.history
    for mine, theirs in zip(ours, other, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_as_full(precision):
    """fp16 leaves steps out while its scale finds its place."""
    half, full = (run(open_fit(device=GPU, precision=one)) for one in (precision, "fp32"))
    assert half.at.history[-1]["loss"] < 0.9 * half.at.history[0]["loss"]
    assert half.at.history[-1]["loss"] == pytest.approx(full.at.history[-1]["loss"], rel=0.3)
    assert all(value.isfinite().all() for value in weights(half).values())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deterministic_runs_are_equal_to_the_byte(precision):
    options = {"device": GPU, "precision": precision, "deterministic": True, "micro_batch": 5}
    one, two = (run(open_fit(**options)) for _ in range(2))
    assert one.at.history == two.at.history
    assert all(torch.equal(value, weights(two)[name]) for name, value in weights(one).items())


@pytest.mark.parametrize("changes", [{"micro_batch": 5}, {"gradient_checkpointing": True}])
def test_passes_equal_one_big_batch(changes):
    wanted, found = (first_step(open_fit(device=GPU, clip_grad=0, **more)) for more in ({}, changes))
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resumed_it_ends_with_the_same_bytes(precision):
    """fp16 has a loss scale to go on from."""
    options, states = {"device": GPU, "precision": precision, "deterministic": True}, []
    whole = open_fit(**options)
    whole.run(lambda fit: states.append(torch_bytes(fit.state())), nothing)
    again = open_fit(**options)
    again.load_state(torch.load(states[6], weights_only=True))
    run(again)
    assert again.at.history == whole.at.history
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(again).items())
