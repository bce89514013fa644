"""From `--device` and a precision to an `accelerate.Accelerator`, with threads and determinism set."""

import os
import re

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from scripts.common.errors import KilnError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def prepare(device: str, precision: str, threads: int, deterministic: bool = False) -> bool:
    """Set threads, device and determinism of this process; whether it computes on the CPU.

    Args:
        device: "auto" (a GPU if there is one), "cpu" or "cuda:N".
        precision: "fp32", "bf16", "fp16" or "auto".
        threads: CPU threads of torch.
        deterministic: only kernels whose result does not vary from run to run.

    Raises:
        KilnError: an unknown device, a GPU that is not there, or fp16 on a CPU.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise KilnError(f"--device {device!r}: no such device", "give auto, cpu, or cuda:N")
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise KilnError(f"--device {device}, but torch sees no GPU", "use --device auto, or run `make doctor`")
        os.environ["ACCELERATE_TORCH_DEVICE"] = device
    else:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if on_cpu and precision == "fp16":
        raise KilnError("precision fp16 on a CPU", "set precision to fp32 or bf16 there")
    if deterministic or on_cpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=on_cpu)
        torch.backends.cudnn.benchmark = False
    elif torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
    return on_cpu


def make_accelerator(device: str, precision: str, threads: int, deterministic: bool = False) -> Accelerator:
    """The accelerator of this process; arguments and errors are those of `prepare`, `auto` precision excepted.

    Half precisions are autocast, weights stay fp32. What an earlier accelerator of the process left is forgotten: its
    device, its precision, and whether it was in the midst of an accumulation, when optimisers skip their steps.
    """
    on_cpu = prepare(device, precision, threads, deterministic)
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=on_cpu, mixed_precision=PRECISIONS[precision])


def choose_precision(precision: str, on_cpu: bool) -> str:
    """`auto` by the hardware: bf16 where the GPU has it, else fp16; fp32 on a CPU. Others as they are."""
    if precision != "auto":
        return precision
    if on_cpu:
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
