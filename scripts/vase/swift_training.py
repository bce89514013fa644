"""A training by ms-swift, from flags to written outputs: what `train_sft` and `train_grpo` share.

ms-swift's own command lines run inside this process (`sft_main`, `rlhf_main`), so its imports are paid for once, and
under torchrun each process runs them. The state folder is ms-swift's output folder: its name is a fingerprint of
settings, inputs and code, so a changed setting never carries on from a stale state.
"""

import argparse
import contextlib
import errno
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from scripts.common import artefacts, step, trackers
from scripts.common.errors import KilnError
from scripts.common.spent import let_go
from scripts.common.trainer_checkpoints import WholeCheckpoints, from_rank_0, newest_complete, step_of
from scripts.common.trainer_log import history
from scripts.vase.settings import SwiftTrainSettings, VlmSettings
from scripts.vase.swift_flags import image_tokens, with_extra

# what ms-swift and the Trainer put into a checkpoint beside the model
_NOT_MODEL = (
    "optimizer",
    "scheduler",
    "rng_state",
    "trainer_state",
    "training_args",
    "args.json",
    "COMPLETE",
    "latest",
)
_NOT_MODEL += ("zero_to_fp32", "global_step", "README", "scaler")


def set_environment(images: Path, model: Path, vlm: VlmSettings, cache: Path) -> None:
    """What ms-swift reads from the environment; before it is imported."""
    os.environ |= {
        **image_tokens(model, vlm),
        "ROOT_IMAGE_DIR": str(images.absolute()),
        "USE_HF": "1",
        "MODELSCOPE_CACHE": str(cache.absolute()),
        "HF_DATASETS_CACHE": str(cache.absolute()),
    }


def rank() -> int:
    """Number of this process among those of the training."""
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def explained(section: str, folder: Path):
    """Turn what users can mend into messages; other errors pass.

    Args:
        section: of the configuration, for hints.
        folder: where the block writes.

    Raises:
        KilnError: memory or the disk are full, or an adapter belongs to another base.
    """
    try:
        yield
    except KilnError:
        raise
    except Exception as error:
        known = _known(error, section, folder)
        if known is None:
            raise
        raise known from error


def _known(error: Exception, section: str, folder: Path) -> Exception | None:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno is not None:
        found = artefacts.explain_os_error(error, folder)
        return found if found is not error else None
    # safetensors and torch report a full disk in words of their own
    if any(words in text for words in ("No space left on device", "os error 28", "PytorchStreamWriter failed writing")):
        return artefacts.explain_os_error(OSError(errno.ENOSPC, text), folder)
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text.lower():
        return KilnError(
            f"out of memory: {text[:300]}",
            f"lower vase.vlm.max_pixels or {section}.batch_size (raising accumulation), set "
            f"{section}.gradient_checkpointing=true, {section}.tuner.tuner=lora, or {section}.deepspeed=zero3 on "
            "several GPUs",
        )
    if "size mismatch" in text:
        return KilnError(f"adapter and base do not fit: {text[:300]}", "use the base it was made for")
    return None


def add_arguments(made: argparse.ArgumentParser) -> None:
    """Paths that both trainings take."""
    step.add_device(made)
    made.add_argument("--model", type=Path, required=True, help="folder of the model to start from")
    made.add_argument("--images", type=Path, required=True, help="folder of the images")
    made.add_argument("--train", type=Path, required=True, help="rows to train on, of rule vase_build_dataset")
    made.add_argument("--validation", type=Path, required=True, help="rows to validate on, of the same rule")
    made.add_argument("--state-folder", type=Path, required=True, help="where the resumable state lies")
    made.add_argument("--tracker-folder", type=Path, required=True, help="TensorBoard or W&B files")
    made.add_argument("--output-folder", type=Path, required=True, help="adapters or models, metrics.json, a plot")


def run(
    kind: str,
    flags_for: Callable[[Path | None], dict[str, Any]],
    values: SwiftTrainSettings,
    section: str,
    folder: Path,
    tracker_folder: Path,
    on_cpu: bool,
) -> dict[str, Any]:
    """Train to the end, resuming from the newest whole checkpoint in `folder`; the Trainer's last state.

    Args:
        kind: "sft" or "grpo".
        flags_for: flags for a checkpoint to carry on from, or None.
        section: of the configuration, for hints.

    Raises:
        OutOfTime, Interrupted: the time is used up, or a signal came; the state is saved.
        KilnError: see `explained`.
    """
    import swift  # slow, and it reads the environment

    from scripts.vase import swift_hooks, swift_template

    swift_hooks.set_up_logging()
    if processes() > 1:
        PartialState(cpu=on_cpu)  # starts the group of processes, which ms-swift then finds
    resumed = from_rank_0(newest_complete(folder) if rank() == 0 else None)
    if resumed and rank() == 0:
        _take_back_logs(folder, step_of(resumed))
        step.log.info("resumed from %s", resumed)
    if resumed and step_of(resumed) == _max_steps(resumed):
        return artefacts.read_json(resumed / "trainer_state.json")
    keeper = WholeCheckpoints(values.save_total_limit, None, values.budget_minutes, values.stall_minutes)
    shown = values.tracker if rank() == 0 else "none"
    writer = trackers.tracker(tracker_folder, shown, step_of(resumed) + 1 if resumed else 0)
    swift_template.take_image_tokens_from_tokenizer()
    swift_hooks.register_callbacks(keeper, writer, values.logging_steps, f"lower {section}.lr, or set precision bf16")
    flags = flags_for(resumed) | {"disable_tqdm": not sys.stderr.isatty()}
    arguments = with_extra(flags, values.extra_args, section)
    if rank() == 0:
        step.log.info("ms-swift: %s", " ".join(arguments))
    with contextlib.closing(writer), keeper.running(folder), explained(section, folder):
        (swift.sft_main if kind == "sft" else swift.rlhf_main)(arguments)
    last = from_rank_0(newest_complete(folder) if rank() == 0 else None)
    if last is None:
        raise KilnError(f"{folder}: ms-swift ended without a checkpoint", "read the log above")
    return artefacts.read_json(last / "trainer_state.json")


def _max_steps(checkpoint: Path) -> int:
    return artefacts.read_json(checkpoint / "trainer_state.json")["max_steps"]


def _take_back_logs(folder: Path, done: int) -> None:
    """Truncate ms-swift's logs to the checkpoint of step `done`."""

    def step_in_log(line: str) -> bool:
        progress = json.loads(line).get("global_step/max_steps")
        return progress is not None and int(progress.partition("/")[0]) <= done

    _keep_lines(folder / "logging.jsonl", step_in_log)
    _keep_lines(folder / "completions.jsonl", lambda line: int(json.loads(line)["step"][0]) <= done)


def _keep_lines(path: Path, wanted: Callable[[str], bool]) -> None:
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if line.endswith("\n") and wanted(line)), encoding="utf-8")


def write_model(checkpoint: Path, folder: Path, base_name: str) -> Path:
    """Copy adapter or weights of a checkpoint to `folder` with a listing; the listing's path."""
    with artefacts.atomic_folder(folder) as temporary:
        for path in sorted(checkpoint.iterdir()):
            if path.is_file() and not path.name.startswith(_NOT_MODEL):
                shutil.copyfile(path, temporary / path.name)
        adapter = temporary / "adapter_config.json"
        if adapter.is_file():
            artefacts.write_json(adapter, _portable(artefacts.read_json(adapter), base_name))
        listing = artefacts.describe_files(sorted(p for p in temporary.iterdir() if p.is_file()))
        artefacts.write_json(temporary / "files.json", listing)
    return folder / "files.json"


def _portable(config: Mapping[str, Any], base_name: str) -> dict[str, Any]:
    """An adapter's configuration without a path of this machine, and with names in order: they come out of sets."""

    def ordered(value):
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return sorted(value)
        if isinstance(value, str):  # a pattern of ms-swift's: ...(q_proj|v_proj|up_proj)
            return re.sub(r"\(([\w|]+)\)", lambda found: f"({'|'.join(sorted(found[1].split('|')))})", value)
        return value

    listed = {name: ordered(value) for name, value in config.items()}
    return {**listed, "base_model_name_or_path": base_name, "revision": None}


def write_metrics(folder: Path, state: Mapping[str, Any], floors: Mapping[str, float]) -> Path:
    """metrics.json: what the Trainer logged, and `floors` {label: value} to draw beside it; its path."""
    metrics = folder / "metrics.json"
    best = {"best_step": state.get("best_global_step"), "best_metric": state.get("best_metric")}
    artefacts.write_json(
        metrics, {"steps": state["global_step"], **best, "floors": dict(floors), **history(state["log_history"])}
    )
    return metrics


def quiet_other_ranks() -> None:
    """Only rank 0 speaks."""
    if rank():
        step.log.setLevel(logging.WARNING)


def finish(state_folder: Path, record: Path) -> None:
    """End the group of processes; rank 0 lets the state go, since `record`, the training's meta.json, stands."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank() == 0:
        let_go(state_folder, record)
