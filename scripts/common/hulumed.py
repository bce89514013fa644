"""Hulu-Med, by its own remote code: run only when that code is pinned, and only from a local folder.

Calling convention (ZJUI-AI4H/Hulu-Med, README, "Using HuggingFace Transformers"): the processor takes
`conversation=[...]` whose pictures are `{"type": "image", "image": {"image_path": ...}}`; the model takes
`pixel_values` [patches, 588], `grid_sizes` [images, 3] (time, rows, columns), `merge_sizes` [images] and `modals`,
one word for each picture.

This module runs with transformers 4.51 too, see envs/hulumed.in.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from scripts.common import artefacts
from scripts.common.errors import KilnError
from scripts.common.listed_images import open_listed
from scripts.common.vlm import Family

LOCK = Path(__file__).resolve().parents[2] / "config/models.lock.json"
VISION = ("pixel_values", "grid_sizes", "merge_sizes")


def code_files(folder: Path) -> dict[str, str]:
    """{relative name: hex sha256} of all Python files of a model's folder, sorted by name."""
    files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*.py"))
    return {name: artefacts.sha256_file(path) for name, path in files}


def code_digest(folder: Path) -> str:
    """Hex sha256 over a model's Python files: what `cd FOLDER; LC_ALL=C sha256sum *.py | sha256sum` prints."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in code_files(folder).items())
    return hashlib.sha256(lines.encode()).hexdigest()


def foreign_code(value: Any) -> Iterator[str]:
    """References to code of another repository (`owner/name--file.Class`) in the `auto_map`s of a JSON value."""
    if isinstance(value, list):
        for one in value:
            yield from foreign_code(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            if key == "auto_map":
                yield from (reference for reference in _texts(one) if "--" in reference)
            else:
                yield from foreign_code(one)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


class HuluMed(Family):
    """Hulu-Med 4B and 7B, or another model of its calling convention.

    Args:
        code_sha256: `code_digest` of code that its user has read; None if only retrieved models are to run.
        lock: of the retrieved models. It lies outside the model's folder: what a folder says of itself proves nothing.
    """

    frozen = ("vision_encoder", "mm_projector")
    projector = "mm_projector"
    code = "*.py"

    def __init__(self, code_sha256: str | None = None, lock: Path = LOCK):
        self.code_sha256, self.lock = code_sha256, lock

    def require_pinned(self, folder: Path) -> None:
        """Return if the code in `folder` is that of a retrieved model, or has the digest that its user gave.

        A merged model holds its base's code, and passes with it.

        Raises:
            KilnError: there is no code, it is another one, or a configuration asks for code from elsewhere.
        """
        files = code_files(folder)
        if not files:
            raise KilnError(
                f"{folder}: no remote code (*.py), so no model of family hulumed",
                "give the folder of a Hulu-Med model, or set busi.base.family to that of the model",
            )
        for path in sorted(folder.glob("*config.json")):
            for reference in foreign_code(artefacts.read_json(path)):
                raise KilnError(
                    f"{path}: auto_map asks for {reference}, code of another repository, which nothing pins",
                    "copy that code beside the model and name it without `owner/name--`",
                )
        entries = artefacts.read_json(self.lock) if self.lock.is_file() else {}
        retrieved = [
            {name: one["sha256"] for name, one in entry["files"].items() if name.endswith(".py")}
            for entry in entries.values()
        ]  # fmt: skip
        digest = code_digest(folder)
        if files not in retrieved and digest != self.code_sha256:
            raise KilnError(
                f"{folder}: the code there is not pinned: {', '.join(files)} have digest {digest}; expected "
                f"{self.code_sha256 or 'no busi.base.code_sha256 is set'}, or the code of a model in {self.lock}",
                "loading the model runs these files: read them, then set busi.base.code_sha256 to that digest; a model "
                "of config/models.csv is pinned by its retrieval",
            )

    def load_model(self, folder: Path, **options: Any):
        """The model in `folder`; `options` as of `Family.load_model`.

        Raises:
            KilnError: its code is not pinned.
        """
        self.require_pinned(folder)
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # it fills a log file
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        config.use_token_compression = False  # it drops patches of videos only, and refuses batches of two
        if "dtype" in options:
            options["torch_dtype"] = options.pop("dtype")  # transformers 4 knows no other name
        # upstream's eager attention adds its mask as numbers, so that pictures of one batch see each other
        options = {"attn_implementation": "sdpa", "use_safetensors": True, **options}
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=True, **options)
        model.model.vision_encoder.register_forward_pre_hook(_cast, with_kwargs=True)
        return model

    def load_processor(self, folder: Path):
        """The processor in `folder`.

        Raises:
            KilnError: its code is not pinned.
        """
        self.require_pinned(folder)
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    def prompt(self, processor, image: Path, text: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # Handed over as a plain picture: upstream's loader skips what it cannot read, clips 16 bits and ignores EXIF.
        with tempfile.NamedTemporaryFile(suffix=".png") as copy:
            open_listed(image, None).save(copy, "PNG", compress_level=0)
            copy.flush()
            content = [{"type": "image", "image": {"image_path": copy.name}}, {"type": "text", "text": text}]
            made = processor(
                conversation=[{"role": "user", "content": content}], add_generation_prompt=True, return_tensors="pt"
            )  # fmt: skip
        missing = [name for name in ("input_ids", *VISION) if name not in made]
        if missing:
            raise KilnError(
                f"{image}: the processor returned {', '.join(made)}, without {', '.join(missing)}",
                "give a model of Hulu-Med's calling convention, with the processor that belongs to it",
            )
        return made["input_ids"].view(-1), {name: made[name] for name in VISION}

    def inputs(self, config, input_ids: torch.Tensor, vision: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {**vision, "modals": ["image"] * len(vision["grid_sizes"])}

    def positions_after(self, model, lengths: torch.Tensor, count: int) -> torch.Tensor:
        # Upstream numbers padding too. Rotary positions count by their differences alone, so that left-padded
        # prompts are right, and what follows goes on after the longest one in every row.
        return (lengths.max() + torch.arange(count, device=lengths.device)).expand(len(lengths), -1)


def _cast(encoder: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pixels in the encoder's dtype, which upstream leaves to the caller; a forward pre-hook."""
    dtype = next(encoder.parameters()).dtype

    def cast(value):
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}
