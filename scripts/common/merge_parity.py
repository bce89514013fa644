"""The gate behind every merge of an adapter: merged weights must answer as base and adapter did.

On fixed prompts with images, the next-token logits of base + adapter are compared with the merged model's. What
the adapter changes at all is measured beside it: an error as large as that would mean that it was lost.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from scripts.common.errors import KilnError

# Relative error (root mean square) that rounding explains: some times the dtype's own relative step, over the
# layers of a deep model. A wrong scale or a missed layer shows as the adapter's whole effect.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.inference_mode()
def logits_at_answer(model, batches: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Logits [prompts, vocabulary] float32, on the CPU, of the token after each left-padded prompt."""
    model.eval()
    return torch.cat([model(**batch).logits[:, -1].float().cpu() for batch in batches])


def compare(adapted: torch.Tensor, merged: torch.Tensor, base: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """How far the merged logits are from those of base + adapter, all [prompts, vocabulary] float32.

    Returns: `relative_error`, ||merged - adapted|| over ||adapted - its mean||; `tolerance` for `dtype`;
    `largest_difference`; `top1_agreement` of the prompts; `adapter_effect`, the relative distance of adapted and base.
    """
    scale = (adapted - adapted.mean(1, keepdim=True)).norm()
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "prompts": len(adapted),
        "relative_error": float((merged - adapted).norm() / scale),
        "tolerance": TOLERANCE[dtype],
        "largest_difference": float((merged - adapted).abs().max()),
        "top1_agreement": float((merged.argmax(1) == adapted.argmax(1)).double().mean()),
        "adapter_effect": float((base - adapted).norm() / scale),
    }


def require_parity(report: dict[str, Any], say: Callable[..., None]) -> None:
    """Stop when the merged model is another one; warn when rounding takes much of what was learnt.

    Raises:
        KilnError: the error is over the tolerance, or is no number.
    """
    error, tolerance, effect = (report[name] for name in ("relative_error", "tolerance", "adapter_effect"))
    if not error <= tolerance:
        raise KilnError(
            f"the merged model is not base + adapter: relative error of logits {error:.3g} on {report['prompts']} "
            f"prompts, tolerance {tolerance:g} for {report['dtype']} (the adapter changes them by {effect:.3g})",
            "check that base and adapter belong together; nothing was written",
        )
    if error > effect / 2:
        say(
            "merging in %s loses much of the adapter: error %.3g, effect of the adapter %.3g; use base + adapter",
            report["dtype"], error, effect,
        )  # fmt: skip
