"""Check that the demo learned: each headline metric clear of its baseline, by at least a stated effect.

python tests/check_summary.py results/demo/summary.json
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple


class Wanted(NamedTuple):
    """What a metric is compared with, its least value, and how far it is from its baseline: by gain, and by ratio."""

    kind: str
    least: float = 0.0
    gain: float = 0.0
    ratio: float = 0.0


WANTED = {
    ("vase", "classifier_accuracy"): Wanted("majority", least=0.90),
    ("vase", "accepted_quality"): Wanted("before_filtering", gain=0.10),
    ("vase", "best_view_quality"): Wanted("random_view", gain=0.10),
    ("vase", "sft_accuracy"): Wanted("majority", gain=0.15),
    ("vase", "image_grounding"): Wanted("shuffled_images", gain=0.20),
    ("vase", "grpo_reward"): Wanted("before_grpo"),
    ("busi", "balanced_accuracy"): Wanted("chance", least=0.60),
    ("rae", "dinov2_psnr"): Wanted("constant", gain=3.0),
    ("rae", "siglip2_psnr"): Wanted("constant", gain=3.0),
    ("rae", "dinov2_rfid"): Wanted("shrunk_input"),
    ("rae", "siglip2_rfid"): Wanted("shrunk_input"),
    ("coca", "retrieval_r5"): Wanted("chance", ratio=3.0),
    ("coca", "caption_diagnosis_accuracy"): Wanted("most_frequent", gain=0.15),
    ("biomedica", "recall_at_5"): Wanted("chance", ratio=3.0),
    ("biomedica", "hybrid_over_local"): Wanted("local_only"),
}
# technique is a matter of colours: what is shown there is that the model looks at its own picture
MAY_BE_EASY = {"vase.image_grounding"}


def complaints(summary: dict) -> list[str]:
    """What a summary lacks; empty when every wanted effect is there."""
    found = []
    for (pipeline, name), (kind, least, gain, ratio) in WANTED.items():
        one = summary.get(pipeline, {}).get(name)
        where = f"{pipeline}.{name}"
        if one is None:
            found.append(f"{where} is missing")
            continue
        low, high = one["ci95"]
        sign = 1 if one["higher_is_better"] else -1
        clear = low > one["baseline"] if sign > 0 else high < one["baseline"]
        if one["baseline_kind"] != kind:
            found.append(f"{where}: baseline {one['baseline_kind']}, expected {kind}")
        if not clear:
            found.append(f"{where}: interval [{low:.3f}, {high:.3f}] is not clear of {one['baseline']:.3f}")
        if one["value"] < least:
            found.append(f"{where}: {one['value']:.3f} is below {least}")
        if sign * (one["value"] - one["baseline"]) < gain:
            found.append(f"{where}: {one['value']:.3f} is less than {gain} from {one['baseline']:.3f}")
        if one["value"] < ratio * one["baseline"]:
            found.append(f"{where}: {one['value']:.3f} is less than {ratio} x {one['baseline']:.3f}")
        if one.get("trivial") is None:
            found.append(f"{where}: does not say what trivial features reach")
        elif where not in MAY_BE_EASY and sign * (one["value"] - one["trivial"]) <= 0:
            found.append(f"{where}: {one['value']:.3f} is no better than trivial features, {one['trivial']:.3f}")
    return found


if __name__ == "__main__":
    problems = complaints(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print("\n".join(problems) or f"{len(WANTED)} headline metrics are as far from their baselines as they should be")
    sys.exit(bool(problems))
