"""The CLIP model that is trained: one of open_clip's, by name, by configuration, or from a folder."""

import copy
import difflib
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from torch import nn

from scripts.biomedica.settings import ModelSettings
from scripts.common import artefacts
from scripts.common.errors import KilnError

CONFIG = "open_clip_config.json"
ENDINGS = (".safetensors", ".bin", ".pth")  # of weights that open_clip finds beside CONFIG
PARTS = ("embed_dim", "vision_cfg", "text_cfg")


class Clip(NamedTuple):
    """A model and what goes with it.

    Attributes:
        model: on the CPU, weights float32.
        tokenizer: list of n texts -> int64 [n,T].
        name: in words.
        model_cfg, preprocess_cfg: open_clip's, plain JSON values.
    """

    model: nn.Module
    tokenizer: Callable
    name: str
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]


def build(settings: ModelSettings, seed: int, weights: Path | None = None) -> Clip:
    """The model at the start of training; the random generators stay as they are, and nothing is fetched.

    Args:
        seed: of random weights.
        weights: folder with `CONFIG` and weights, which open_clip loads as `local-dir:`; None: random weights.

    Raises:
        KilnError: an unknown name, a configuration that open_clip refuses or that needs the network, weights that are
            missing or do not fit.
    """
    if weights is not None:
        return _from_folder(weights)
    if settings.config is not None:
        name, config, where = "own configuration", settings.config, "biomedica.model.config"
    else:
        name, config, where = settings.name, _by_name(settings.name), settings.name
    _check(config, where)
    if "siglip" in name.lower():
        raise KilnError(f"{where}: its tokenizer must be fetched", "give biomedica.model.weights, a folder with all")
    tokenizer = tokenizer_of(config, where)
    model = assemble(config, where, seed)
    return Clip(model, tokenizer, name, config, _plain(asdict(PreprocessCfg(size=model.visual.image_size))))


def _by_name(name: str) -> dict[str, Any]:
    config = open_clip.get_model_config(name) if ":" not in name else None  # hf-hub: would go to the network
    if config is not None:
        return config
    near = difflib.get_close_matches(name, open_clip.list_models(), n=1, cutoff=0.4)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise KilnError(
        f"biomedica.model.name {name!r}: open_clip has no such model",
        f"{meant}`python -c 'import open_clip; print(open_clip.list_models())'` lists all",
    )


def _check(config: dict[str, Any], where: str) -> None:
    """Refuse what this training or a machine without a network cannot use."""
    missing = [part for part in PARTS if part not in config]
    if missing:
        raise KilnError(f"{where}: no {', '.join(missing)}", f"open_clip's model_cfg has {', '.join(PARTS)}")
    if "multimodal_cfg" in config:
        raise KilnError(f"{where}: a CoCa model, whose decoder this loss does not train", "take a CLIP model")
    if config["text_cfg"].get("hf_model_name"):
        raise KilnError(f"{where}: its text tower must be fetched", "take a model with open_clip's own text tower")


def assemble(config: dict[str, Any], where: str, seed: int = 0) -> nn.Module:
    """The model of `config`, with random weights of `seed`.

    Raises:
        KilnError: open_clip refuses the configuration.
    """
    config = copy.deepcopy(config)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    if "timm_model_name" in config["vision_cfg"]:
        config["vision_cfg"]["timm_model_pretrained"] = False  # true would go to the network
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
            return kind(**config)
    except (AssertionError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise KilnError(f"{where}: no model of open_clip: {error}", "compare it with one of its own, by name") from None


def tokenizer_of(config: dict[str, Any], where: str, folder: Path | None = None) -> Callable:
    """The tokenizer of a configuration: open_clip's own, or of `folder` where the configuration names another.

    Raises:
        KilnError: it would have to be fetched, is missing, or has more tokens than the model.
    """
    text = config["text_cfg"]
    if not text.get("hf_tokenizer_name"):
        options = text.get("tokenizer_kwargs", {})
        made = open_clip.SimpleTokenizer(context_length=text.get("context_length", 77), **options)
        if text.get("vocab_size", made.vocab_size) < made.vocab_size:
            raise KilnError(
                f"{where}: text_cfg.vocab_size {text['vocab_size']}, fewer than the {made.vocab_size} tokens of "
                "open_clip's tokenizer", "raise it, or leave it out",
            )  # fmt: skip
        return made
    if folder is None:
        raise KilnError(
            f"{where}: its tokenizer {text['hf_tokenizer_name']!r} must be fetched",
            "give biomedica.model.weights, a folder that holds it beside configuration and weights",
        )
    try:
        return open_clip.get_tokenizer(f"local-dir:{folder}")
    except (OSError, ImportError, ValueError, TypeError, KeyError) as error:
        raise KilnError(f"{folder}: no tokenizer: {str(error)[:300]}", "fetch the folder anew, whole") from None


def weight_files(folder: Path) -> list[Path]:
    """What decides the model of `folder`: its configuration, then all else but hidden files, sorted.

    Raises:
        KilnError: no configuration, or no weights.
    """
    if not (folder / CONFIG).is_file():
        raise KilnError(f"{folder / CONFIG}: no such file", f"biomedica.model.weights needs a folder with {CONFIG}")
    files = sorted(one for one in folder.iterdir() if one.is_file() and not one.name.startswith("."))
    if not any(one.suffix in ENDINGS for one in files):
        # open_clip would go on with random weights and a warning
        raise KilnError(f"{folder}: no weights beside {CONFIG}", f"expected a file with {', '.join(ENDINGS)}")
    return files


def _from_folder(folder: Path) -> Clip:
    weight_files(folder)
    found = artefacts.read_json(folder / CONFIG)
    config = found.get("model_cfg") if isinstance(found, dict) else None
    if not isinstance(config, dict):
        raise KilnError(f"{folder / CONFIG}: no model_cfg", "fetch the folder anew, whole")
    _check(config, str(folder / CONFIG))
    tokenizer = tokenizer_of(config, str(folder), folder)
    try:
        with torch.random.fork_rng(devices=[]):
            model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
    except (RuntimeError, KeyError, ValueError, TypeError, SafetensorError, pickle.UnpicklingError) as error:
        raise KilnError(
            f"{folder}: its weights do not fit {CONFIG}: {str(error)[:500]}", "fetch the folder anew, whole"
        ) from None
    return Clip(model.float(), tokenizer, folder.name, config, _plain(open_clip.get_model_preprocess_cfg(model)))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))
