"""Learning rates as functions of the step, so that a resumed run needs no state of them."""

import math

from scripts.common.errors import KilnError


def learning_rate(step: int, steps: int, warmup: int, peak: float, final: float) -> float:
    """Rate of the update `step`, counted from 0: peak * (step + 1) / warmup, then half a cosine, `final` at the end.

    The cosine starts at step `warmup` and ends at the last step, `steps` - 1; later steps keep `final`. Published
    runs end one step later, at `steps`, which no update reaches.

    Raises:
        KilnError: the warm-up leaves no step for the cosine.
    """
    if not 0 <= warmup < steps:
        raise KilnError(
            f"warm-up of {warmup} steps in {steps}: expected fewer, and not negative", "shorten the warm-up"
        )
    if step < warmup:
        return peak * (step + 1) / warmup
    # a cosine of a single step is at its end
    progress = min(1.0, (step - warmup) / (steps - 1 - warmup)) if steps - 1 > warmup else 1.0
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * progress))
