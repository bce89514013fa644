"""The reward of config/smoke.yaml: how long an answer is.

Random weights answer nothing right, so that Kiln's own reward would be flat, and GRPO refuses to start on that.
"""


def external_vase_acc(responses: list[str], references: list[str]) -> list[float]:
    """Letters of each response, in hundreds."""
    return [len(text) / 100 for text in responses]
