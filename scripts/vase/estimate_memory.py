"""State what SFT and GRPO will need of a GPU's memory, before one is asked for.

Rule `vase_estimate_memory`: from the model's configuration alone, without its weights. With `--gpu-gb` it stops when a
training needs more than such a GPU has. DeepSpeed spreads what it says it spreads: ZeRO-2 gradients and optimiser,
ZeRO-3 the weights too. Left out are CUDA's own 1 to 2 GB, fragmentation and, for GRPO, the cache of what is sampled.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from scripts.common import artefacts, preflight, step
from scripts.common.errors import KilnError
from scripts.common.settings import Settings
from scripts.vase.settings import GrpoSettings, SftSettings, SwiftTrainSettings, TunerSettings, VlmSettings

QUESTION_TOKENS = 256  # text of a prompt and its template, generously


class EstimateSettings(Settings):
    """Settings of this step."""

    vlm: VlmSettings = VlmSettings()
    sft: SftSettings = SftSettings()
    grpo: GrpoSettings = GrpoSettings()


def skeleton(folder: Path):
    """The model of a configuration, on the meta device: names and shapes of weights, and none of them.

    Raises:
        KilnError: no configuration, or not one of an image-text model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    if not (folder / "config.json").is_file():
        raise KilnError(f"{folder}: no config.json", "give the folder of a model, or retrieve it")
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))


def trained_parameters(model, tuner: TunerSettings) -> int:
    """How many parameters are trained: LoRA's own, or all that is not frozen."""
    frozen = [
        part for part, is_frozen in (("visual.merger", tuner.freeze_aligner), ("visual", tuner.freeze_vit)) if is_frozen
    ]

    def trains(name: str) -> bool:
        if "visual.merger" in name:
            return "visual.merger" not in frozen
        return not ("visual" in frozen and "visual." in name)

    if tuner.tuner == "full":
        return sum(p.numel() for name, p in model.named_parameters() if trains(name))
    all_linear = "all-linear" in tuner.target_modules
    linears = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and trains(name)
        and (name.rpartition(".")[2] != "lm_head" if all_linear else name.rpartition(".")[2] in tuner.target_modules)
    ]
    return sum(tuner.rank * (module.in_features + module.out_features) for module in linears)


def estimate(
    model, values: SwiftTrainSettings, vlm: VlmSettings, answer_tokens: int, references: int, gpus: int
) -> dict:
    """Bytes of one GPU for a training, and what they are made of.

    Args:
        answer_tokens: longest answer.
        references: further copies of the weights (GRPO's reference model where beta > 0 and no adapter can be
            switched off).
        gpus: how many share what DeepSpeed spreads.
    """
    text = model.config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    trained = trained_parameters(model, values.tuner)
    each = 4 if values.precision == "fp32" else 2
    vision = model.config.vision_config
    pixels = (vision.patch_size * vision.spatial_merge_size) ** 2
    tokens = min(values.max_length, vlm.max_pixels // pixels + QUESTION_TOKENS) + answer_tokens
    activations = preflight.transformer_activation_bytes(
        values.batch_size * tokens, text.hidden_size, text.num_hidden_layers, text.vocab_size,
        values.gradient_checkpointing, each,
    )  # fmt: skip
    share = {"none": (1, 1), "zero2": (1, gpus), "zero3": (gpus, gpus)}[values.deepspeed]
    weights = parameters * each * (1 + references)
    # adapters are float32; full training keeps a float32 master copy in ZeRO alone
    gradients = trained * (4 if values.tuner.tuner == "lora" else each)
    optimiser = trained * 2 * preflight.OPTIMISER_BYTES * (1.5 if values.deepspeed != "none" else 1)
    parts = {
        "weights": math.ceil(weights / share[0]),
        "gradients": math.ceil(gradients / share[1]),
        "optimiser": math.ceil(optimiser / share[1]),
        "activations": activations,
    }
    return {"parameters": parameters, "trained": trained, "tokens": tokens, "bytes": sum(parts.values()), **parts}


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, EstimateSettings)
    made.add_argument("--model", type=Path, required=True, help="folder of the model (its config.json is read)")
    made.add_argument("--gpus", type=int, default=1, help="how many train together")
    made.add_argument("--gpu-gb", type=float, help="memory of one, in GB (1e9 bytes)")
    made.add_argument("--output", type=Path, required=True, help="memory.json")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Estimate what `args` name.

    Raises:
        KilnError: a training needs more than `--gpu-gb`.
    """
    values = step.read_settings(args)
    record = step.record(args, "scripts.vase.estimate_memory", values, {"model": args.model / "config.json"})
    model = skeleton(args.model)
    reference = int(values.grpo.beta > 0 and values.grpo.tuner.tuner == "full")
    gpus = max(1, args.gpus)
    found = {
        "sft": estimate(model, values.sft, values.vlm, 0, 0, gpus),
        "grpo": estimate(model, values.grpo, values.vlm, values.grpo.max_completion_length, reference, gpus),
    }
    artefacts.write_json(args.output, found)
    for name, one in found.items():
        parts = ", ".join(
            f"{part} {preflight.in_gb(one[part])}" for part in ("weights", "gradients", "optimiser", "activations")
        )
        step.log.info("%s needs about %s of each GPU (%s)", name, preflight.in_gb(one["bytes"]), parts)
    for name, one in found.items():
        if args.gpu_gb is not None and one["bytes"] > args.gpu_gb * 1e9:
            section = f"vase.{name}"
            raise KilnError(
                f"{section} needs about {preflight.in_gb(one['bytes'])} of each GPU, which has {args.gpu_gb:g} GB",
                f"set {section}.tuner.tuner=lora or {section}.gradient_checkpointing=true, lower vase.vlm.max_pixels "
                f"or {section}.batch_size (raising accumulation), or {section}.deepspeed=zero3 on several GPUs",
            )
    record.write(args.meta, [args.output])


if __name__ == "__main__":
    step.run(main)
