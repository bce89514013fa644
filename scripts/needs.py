"""What the rules that write much will write: bytes from the settings and from the sizes of files on disk.

Each function here is named as its rule, and gives its needs from the configuration of the job's run, its wildcards, and
`measured`, what only the workflow knows, such as the count of images in a shard. A model that is not on disk yet has no
known size, and nor has what is trained from it; nothing is guessed. Torch is not needed: these run before every job.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from scripts.busi.settings import BusiSettings
from scripts.coca.settings import CocaSettings
from scripts.common import model_size
from scripts.common.disk import Need
from scripts.common.scans import Facts
from scripts.config import Config
from scripts.rae.settings import VALIDATION, DecoderSettings
from scripts.vase.settings import SwiftTrainSettings

SAVES = 3  # whole states on disk at once: the two that are kept, and the one that is being written
ADAM = 3  # copies of what is trained in a checkpoint of Adam: weights and two moments
FLOAT32 = 4
DECODERS = {"ViT-B": (12, 768, 3072), "ViT-L": (24, 1024, 4096), "ViT-XL": (28, 1152, 4096)}  # layers, width, MLP
GROUPS = 10  # of pictures, whose moments of features are kept apart
INCEPTION = 2048  # its features


class Job:
    """What a need is estimated from.

    Args:
        config: of the job's run.
        wildcards: of the job.
        folder: (name or path of a model) -> its folder or file.
        measured: what only the workflow knows; see the functions. None: it does not, either.
    """

    def __init__(
        self, config: Config, wildcards: Mapping[str, str], folder: Callable[[str], str], measured: int | None
    ):
        self.config, self.wildcards, self.measured, self.folder = config, wildcards, measured, folder

    def model(self, name: str | None) -> Path | None:
        """Where a model is, or will be."""
        return Path(self.folder(name)) if name else None

    def weights(self, name: str | None) -> int | None:
        """Bytes of a model's weights; None: not known."""
        place = self.model(name)
        return model_size.weight_bytes(place) if place else None

    def made(self, step: str, number: float | None, what: str = "results") -> Need:
        """Results of a step such as "rae/build_arrow"."""
        return Need(Path(self.config.results, step), _whole(number), what)

    def state(self, step: str, number: float | None, what: str = "training state") -> Need:
        """What a step keeps meanwhile."""
        return Need(Path(self.config.results, "state", step), _whole(number), what)


def _whole(number: float | None) -> int | None:
    return None if number is None else math.ceil(number)


def _times(factor: float, *numbers: float | None) -> float | None:
    """`factor` times the sum; None if a part is not known."""
    return None if any(one is None for one in numbers) else factor * sum(one for one in numbers if one is not None)


def of_rule(rule: str, job: Job) -> list[Need]:
    """The needs of one job of a rule of this module."""
    return list(RULES[rule](job))


# ---- vase ----------------------------------------------------------------------------------------------------------


def vase_embed_images(job: Job) -> Iterable[Need]:
    """`measured`: images of the shard."""
    folder = job.model(job.config.vase.clip.model)
    width = _json(folder / "open_clip_config.json", "model_cfg", "embed_dim") if folder else None
    images = job.measured
    yield job.made("vase/embed_images", None if None in (width, images) else width * images * FLOAT32, "embeddings")


def vase_train_classifier(job: Job) -> Iterable[Need]:
    weights = job.weights(job.config.vase.classifier.weights)
    yield job.state("vase/train_classifier", _times(SAVES * (ADAM + 1), weights))  # the best weights beside
    yield job.made("vase/train_classifier", weights)


def vase_train_sft(job: Job) -> Iterable[Need]:
    return _swift(job, job.config.vase.sft, "vase/train_sft", results=2)


def vase_train_grpo(job: Job) -> Iterable[Need]:
    return _swift(job, job.config.vase.grpo, "vase/train_grpo", results=1)


def _swift(job: Job, values: SwiftTrainSettings, step: str, results: int) -> Iterable[Need]:
    """A training by ms-swift: so many saves are kept, the best beside them and one being written."""
    place, tuner = job.model(job.config.vase.vlm.model), values.tuner
    saves = values.save_total_limit + 2
    if tuner.tuner == "full":
        weights = job.weights(job.config.vase.vlm.model)
        found = model_size.shapes(place) if place else None
        # DeepSpeed keeps a float32 copy beside the moments; torch keeps the moments in the type of the weights
        moments = _times(2, weights) if values.deepspeed == "none" else found and 3 * FLOAT32 * model_size.count(found)
        yield job.state(step, _times(saves, weights, moments))
        yield job.made(step, _times(results, weights))
        return
    adapter = _adapter(place, tuner.rank, tuner.target_modules, vision=not tuner.freeze_vit)
    yield job.state(step, _times(saves * ADAM, adapter))
    yield job.made(step, _times(results, adapter))


def vase_merge_sft(job: Job) -> Iterable[Need]:
    yield job.made("vase/merge_sft", job.weights(job.config.vase.vlm.model), "merged model")


def vase_export_megatron(job: Job) -> Iterable[Need]:
    yield job.made("vase/export_megatron", job.weights(job.config.vase.vlm.model), "model for Megatron")


def _adapter(model: Path | None, rank: int, targets: Iterable[str], vision: bool) -> int | None:
    """Bytes of a LoRA in float32, whatever its names: of the targets, or of all linear layers but the head."""
    found = model_size.shapes(model) if model else None
    if found is None:
        return None
    number = 0
    for name, shape in found.items():
        parts = name.split(".")
        layer = parts[-2] if len(parts) > 1 and parts[-1] == "weight" else ""
        wanted = layer in targets or ("all-linear" in targets and layer not in ("lm_head", "embed_tokens"))
        if len(shape) == 2 and wanted and (vision or not re.search("visual|vision|mm_projector", name)):
            number += rank * sum(shape)
    return FLOAT32 * number


# ---- busi ----------------------------------------------------------------------------------------------------------


def busi_train_lora(job: Job) -> Iterable[Need]:
    busi: BusiSettings = job.config.busi
    adapter = _adapter(job.model(busi.base.model), busi.lora.rank, busi.lora.target_modules, vision=False)
    yield job.state("busi/train_lora", _times(ADAM * (busi.train.save_total_limit + 1), adapter))
    yield job.made("busi/train_lora", adapter)


def busi_merge(job: Job) -> Iterable[Need]:
    yield job.made("busi/merge", job.weights(job.config.busi.base.model), "merged model")


# ---- rae -----------------------------------------------------------------------------------------------------------


def rae_build_arrow(job: Job) -> Iterable[Need]:
    """`measured`: `rae_bytes`."""
    yield job.made("rae/build_arrow", job.measured, "Arrow")


def rae_bytes(config: Config, folder: str, facts: Callable[[Any], Facts] | None, wildcards: Any) -> int | None:
    """Bytes of Arrow shards that are still to be built; None: not known, since they are yet to be retrieved or drawn.

    Args:
        folder: of images, Arrow or parquet; images are stored byte for byte, and Arrow is linked to.
        facts: gives those of a folder of images.
    """
    source = config.rae.dataset.source
    if source == "arrow":
        return 0
    if source == "folders":
        found = facts(wildcards) if facts else None
        listed = found and found.bytes
    else:
        files = list(Path(folder).rglob("*.parquet"))
        listed = sum(file.stat().st_size for file in files) or None
    states = Path(config.results, "state/rae/build_arrow").glob("*/")
    built = max((sum(file.stat().st_size for file in one.rglob("*.arrow")) for one in states), default=0)
    return None if listed is None else max(0, listed - built)


def rae_pictures(config: Config, facts: Callable[[Any], Facts] | None, wildcards: Any) -> int | None:
    """About how many pictures the validation split has; None: not known before the dataset is there."""
    found = facts(wildcards) if facts else None
    if found is None:
        return None
    dataset, everything = config.rae.dataset, sum(found.tops.values())
    names = [dataset.validation_split] if dataset.validation_split else VALIDATION
    own = sum(found.tops.get(name, 0) for name in names)
    return own or math.ceil(everything * (1 - dataset.train_share))


def rae_train_autoencoder(job: Job) -> Iterable[Need]:
    rae = job.config.rae
    encoder = getattr(rae.encoders, job.wildcards["encoder"])
    place = Path(job.folder(encoder.model))
    width, patch = (
        (_json(place / "config.json", key) for key in ("hidden_size", "patch_size")) if place else (None,) * 2
    )
    decoder = None
    if width and patch:
        decoder = FLOAT32 * decoder_parameters(rae.decoder, width, rae.image_size * patch // encoder.input_size)
    yield job.state("rae/train_autoencoder", _times(SAVES * (ADAM + 1), decoder))  # the average beside
    yield job.made("rae/train_autoencoder", decoder)


def decoder_parameters(decoder: DecoderSettings, latents: int, patch: int) -> int:
    """How many parameters the decoder of a representation autoencoder has.

    Args:
        latents: their width.
        patch: side of the decoder's patches in pixels.
    """
    free = (decoder.layers, decoder.width, decoder.mlp)
    layers, width, mlp = free if decoder.size == "free" else DECODERS[decoder.size]
    block = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
    return layers * block + (latents + 1) * width + width + 2 * width + (width + 1) * patch * patch * 3


def rae_compute_reference_stats(job: Job) -> Iterable[Need]:
    """`measured`: validation pictures."""
    return _moments(job, "rae/compute_reference_stats", kinds=3)


def rae_reconstruct(job: Job) -> Iterable[Need]:
    """`measured`: validation pictures."""
    return _moments(job, "rae/reconstruct", kinds=1)


def _moments(job: Job, step: str, kinds: int) -> Iterable[Need]:
    """Mean and scatter of features, of each part while it works, of each group at the end; in float64."""
    pictures, own = job.measured, job.config.rae.evaluate
    one = kinds * 8 * INCEPTION * (INCEPTION + 1) if own.extractor != "kiln-random" else 0
    if pictures is not None and own.max_images:
        pictures = min(pictures, own.max_images)
    parts = None if pictures is None else GROUPS * math.ceil(pictures / GROUPS / own.images_per_part)
    yield job.state(step, _times(one, parts), "parts of the features")
    yield job.made(step, GROUPS * one, "features")


# ---- coca ----------------------------------------------------------------------------------------------------------


def coca_encode_slides(job: Job) -> Iterable[Need]:
    """`measured`: slides."""
    coca = job.config.coca
    each = (1 + coca.encoder.latents) * coca.encoder.dim * (2 if coca.encode.dtype == "float16" else 4)
    yield job.made("coca/encode_slides", _times(each, job.measured), "latents of slides")


def coca_train(job: Job) -> Iterable[Need]:
    coca = job.config.coca
    weights = FLOAT32 * coca_parameters(coca)
    kept = coca.train.epochs // coca.train.save_every if coca.train.save_every else 0
    yield job.state("coca/train", SAVES * (ADAM + 1) * weights)  # the best weights beside
    yield job.made("coca/train", (2 + kept) * weights, "checkpoints")


def coca_parameters(coca: CocaSettings) -> int:
    """How many parameters the CoCa model has at most, with the slide encoder where that is trained."""
    own, encoder = coca.model, coca.encoder
    dim, inner, ff = own.dim, own.heads * own.dim_head, own.ff_mult * own.dim * own.dim
    block = dim + dim * (inner + 2 * own.dim_head) + 2 * ff + inner * dim + ff
    cross = dim + 2 * dim * inner + 2 * dim * own.dim_head + 3 * ff
    pool = dim + encoder.dim + 2 * dim * inner + 2 * encoder.dim * own.dim_head
    ends = dim * (coca.tokenizer.vocabulary + 1 + own.image_queries + 1 + 2 + 2 * own.dim_latents + 1) + 1
    text = ends + pool + own.unimodal_depth * block + own.multimodal_depth * (block + cross)
    if encoder.is_frozen:
        return text
    width, tiles = encoder.dim, coca.list.tile_dim
    forward = 2 * width + 3 * encoder.mlp_ratio * width * width + 2 * encoder.mlp_ratio * width + width
    attend = 2 * width + 2 * width * width + 2 * tiles * width
    attends = min(encoder.depth, 2) * (attend + forward)
    stack = encoder.transformer_depth * (2 * width + 4 * width * width + forward)
    return text + 4 * width + (1 + encoder.latents) * width + attends + stack


# ---- biomedica -----------------------------------------------------------------------------------------------------


def biomedica_train_clip(job: Job) -> Iterable[Need]:
    biomedica = job.config.biomedica
    weights = job.weights(biomedica.model.weights)
    yield job.state("biomedica/train_clip", _times(SAVES * (ADAM + 1), weights))  # the best weights beside
    yield job.made("biomedica/train_clip", _times(2, weights), "checkpoints")
    if biomedica.remote.cache_folder and biomedica.remote.repo and job.wildcards.get("arm") != "local":
        cache = Path(biomedica.remote.cache_folder)
        there = sum(file.stat().st_size for file in cache.iterdir() if file.is_file()) if cache.is_dir() else 0
        room = max(0, biomedica.remote.cache_gb * 1e9 - there)
        yield Need(cache, math.ceil(room), "cache of streamed shards", shared=True)


# ---- retrieval -----------------------------------------------------------------------------------------------------


def retrieve_model(job: Job) -> Iterable[Need]:
    """`measured`: bytes that the lock tells of."""
    yield Need(Path(job.config.models, job.wildcards["name"]), job.measured, "model")


def retrieve_dataset(job: Job) -> Iterable[Need]:
    """`measured`: bytes that the lock tells of."""
    yield Need(Path(job.config.datasets, job.wildcards["repo"]), job.measured, "data set")


def _json(path: Path, *keys: str) -> int | None:
    """A whole number of a model's configuration, or None; of models of text and images, of the part for images."""
    try:
        place = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not there yet, or for whoever loads it to complain of
    for key in keys:
        place = place.get(key, place.get("vision_config", {}).get(key)) if isinstance(place, dict) else None
    return place if isinstance(place, int) else None


RULES: Mapping[str, Callable[[Job], Iterable[Need]]] = {
    one.__name__: one
    for one in (
        vase_embed_images, vase_train_classifier, vase_train_sft, vase_train_grpo, vase_merge_sft,
        vase_export_megatron, busi_train_lora, busi_merge, rae_build_arrow, rae_train_autoencoder,
        rae_compute_reference_stats, rae_reconstruct, coca_encode_slides, coca_train, biomedica_train_clip,
        retrieve_model, retrieve_dataset,
    )
}  # fmt: skip
