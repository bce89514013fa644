"""What a training makes sure of before it works: memory on the device."""

import logging
from collections.abc import Sequence

import psutil

from scripts.common.errors import KilnError

log = logging.getLogger("kiln")

OPTIMISER_BYTES = 4  # torch keeps Adam's moments, and master copies, in float32


def estimate_training_memory(
    parameters: int,
    trainable: int,
    optimiser_states: int = 2,
    dtype_bytes: float = 4,
    activation_bytes: int = 0,
    trainable_bytes: float | None = None,
) -> int:
    """Bytes that training needs on each device that holds the whole model (plain or data-parallel).

    The sum is

        weights      (parameters - trainable) * dtype_bytes + trainable * trainable_bytes
        gradients    trainable * trainable_bytes
        optimiser    trainable * optimiser_states * 4
        activations  activation_bytes

    which is the count of Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models" (2020), section 3.1, with frozen weights set apart. Adam on float32 weights, and mixed precision
    with float32 master weights (dtype_bytes=2, optimiser_states=3), both come to its 16 bytes per trained
    parameter. It leaves out fragmentation, temporary buffers, and what CUDA takes for itself.

    Args:
        parameters: number of all parameters.
        trainable: number of those that are trained; the others have no gradient and no optimiser state.
        optimiser_states: float32 values that the optimiser keeps per trained parameter: 2 for Adam and AdamW,
            1 for SGD with momentum, 0 for plain SGD, one more with a float32 master copy.
        dtype_bytes: bytes per parameter: 4 for float32, 2 for bfloat16 and float16, about 0.5 for 4-bit.
        activation_bytes: bytes kept for the backward pass; measured, for it depends on the model and batch.
        trainable_bytes: bytes per trained parameter, where that differs (float32 adapters on a 4-bit model).
    """
    each = dtype_bytes if trainable_bytes is None else trainable_bytes
    weights = (parameters - trainable) * dtype_bytes + trainable * each
    return round(weights + trainable * each + trainable * optimiser_states * OPTIMISER_BYTES + activation_bytes)


def activation_bytes(model, input_shape: Sequence[int]) -> int:
    """Bytes that one forward pass of a torch `model` keeps for its backward pass, on a float32 input.

    Counted without computing anything: a copy of the model runs on the meta device, and every distinct
    storage that autograd saves, weights apart, is added up. Half precision needs about half.
    """
    import copy

    import torch

    shadow = copy.deepcopy(model).to("meta").train()
    weights = {tensor.untyped_storage()._cdata for tensor in [*shadow.parameters(), *shadow.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}  # storages are kept, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        shadow(torch.zeros(*input_shape, device="meta"))
    return sum(storage.nbytes() for storage in saved.values())


def transformer_activation_bytes(
    tokens: int, hidden: int, layers: int, vocabulary: int, checkpointing: bool, dtype_bytes: int = 2
) -> int:
    """About how many bytes a decoder-only transformer keeps for its backward pass.

    Per layer 17 * dtype_bytes * tokens * hidden (Korthikanti et al., "Reducing Activation Recomputation in Large
    Transformer Models" (2022), equation 1, without the attention matrix, which fused kernels never store); with
    checkpointing one layer's, and the input of each. On top come the logits and their gradient in float32.

    Args:
        tokens: batch size times sequence length.
    """
    layer = 17 * dtype_bytes * tokens * hidden
    kept = layer + layers * dtype_bytes * tokens * hidden if checkpointing else layers * layer
    return kept + 2 * 4 * tokens * vocabulary


def require_vram(
    needed: int, device: str, reduced_by: Sequence[str] = ("batch_size", "gradient_checkpointing")
) -> None:
    """Make sure that `needed` bytes are free on `device`; for the CPU this is only logged.

    Args:
        needed: bytes, as `estimate_training_memory` gives them.
        device: `cpu`, `cuda` or `cuda:N`.
        reduced_by: full names of the settings that lower the need, for the error's hint.

    Raises:
        KilnError: a GPU with fewer free bytes.
    """
    if device == "cpu":
        free = psutil.virtual_memory().available
        log.info("training needs about %s of memory; %s are available", in_gb(needed), in_gb(free))
        return
    import torch

    free, total = torch.cuda.mem_get_info(device)
    if free < needed:
        raise KilnError(
            f"{device}: training needs about {in_gb(needed)}; {in_gb(free)} of {in_gb(total)} are free",
            f"change {' or '.join(reduced_by)}, or see with `nvidia-smi` who else uses this GPU",
        )
    log.info("training needs about %s of %s; %s are free", in_gb(needed), device, in_gb(free))


def in_gb(number: float) -> str:
    """Bytes as text in GB (1e9 bytes)."""
    return f"{number / 1e9:.1f} GB"
