"""Whether a number of ours may stand beside a published one, by the records of how ours was made.

A protocol is a function of a target and of what is known of our number; it gives every difference that it finds, in
one of the `ASPECTS`. No flag says that a run is comparable: a number is, when nothing differs.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from scripts import config
from scripts.common.settings import merge, of_kind, parse_overrides
from scripts.report.lineage import Made
from scripts.report.paper_tables import Target
from scripts.retrieve.models import Model

ASPECTS = ("samples", "split", "reference", "features", "weights", "settings", "publication")
# of torch-fidelity, as scripts.rae.extractors has it, which needs torch
INCEPTION = "inception-v3-compat"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
IMAGENET = {"classes": 1000, "train": 1_281_167, "validation": 50_000}  # arXiv:1409.0575
FREE = {  # settings that may differ
    # for chance and rounding alone
    "autoencoder.accumulation", "autoencoder.compile", "autoencoder.deterministic", "autoencoder.seed",
    *(f"{stage}.{name}" for stage in ("sft", "grpo")
      for name in ("deepspeed", "deterministic", "eval_batch_size", "gradient_checkpointing", "save_steps",
                   "save_total_limit", "seed")),
    # numbers of a free size, and names of weights, which are compared by their records
    *(f"decoder.{name}" for name in ("heads", "layers", "mlp", "width")),
    *(f"discriminator.{name}" for name in ("depth", "dim", "heads", "patch", "size", "taps")),
    "discriminator.weights", "encoder.model", "perceptual.weights", "vlm.model",
}  # fmt: skip
RELEASED, TRAINED = "scripts.rae.import_published", "scripts.rae.train_autoencoder"
DECODERS = {RELEASED: "as released", TRAINED: "trained"}  # what made them


class Difference(NamedTuple):
    """How our number departs from the published protocol."""

    aspect: str
    text: str


class Comparison(NamedTuple):
    """What was found; `same` where our number may stand beside the published one."""

    differences: tuple[Difference, ...]

    @property
    def same(self) -> bool:
        return not self.differences

    @property
    def aspects(self) -> list[str]:
        """Those that differ."""
        return [name for name in ASPECTS if any(one.aspect == name for one in self.differences)]


class Found(NamedTuple):
    """A number of ours: its entry {value, n, ...}, the metrics.json around it, and what made that."""

    entry: Mapping[str, Any]
    metrics: Mapping[str, Any]
    made: Made | None


def compare(target: Target, found: Found, models: Mapping[str, Model]) -> Comparison:
    """All differences between `target`'s protocol and ours.

    Args:
        models: of config/models.csv, by name.
    """
    if target.protocol == "none":
        return Comparison((Difference("publication", "no number is known"),))
    gaps = [one.strip() for one in target.unknown.split(";") if one.strip()]
    differences = [Difference("publication", f"not known: {one}") for one in gaps]
    if found.entry["n"] != target.n:
        differences.append(Difference("samples", f"n = {found.entry['n']} (published {target.published_n})"))
    if found.made is None:
        differences.append(Difference("weights", "no record fits metrics.json as it is"))
    else:
        differences += PROTOCOLS[target.protocol](target, found.metrics, found.made, models)
    return Comparison(tuple(sorted(dict.fromkeys(differences), key=lambda one: ASPECTS.index(one.aspect))))


def _rae_scores(target: Target, metrics: Mapping, made: Made, reconstructed: Made) -> list[Difference]:
    """Split, reference and features of a score of reconstructions."""
    found, about = [], metrics["features"]
    dataset = made.read("dataset")
    if dataset is None:
        found.append(Difference("split", "no summary of the data set fits the record"))
    else:
        counts = {"classes": dataset["classes"]} | {name: one["ok"] for name, one in dataset["splits"].items()}
        for name in ("classes", "validation"):
            if counts.get(name) != IMAGENET[name]:
                text = f"{name}: {counts.get(name)} (ImageNet-1k: {IMAGENET[name]})"
                found.append(Difference("split", text))
        if dataset["validation"] == "cut from train":
            found.append(Difference("split", "validation is a share cut from train"))
    if about["split"] != "validation":
        found.append(Difference("split", f"scored on {about['split']} (published: validation)"))
    wanted = f"ADM centre crop {config.Config().rae.image_size}, uint8"
    if about["preprocessing"] != wanted:
        found.append(Difference("reference", f"{about['preprocessing']} (published {wanted})"))
    reference = made.input("reference.safetensors")
    if reference is None:
        found.append(Difference("reference", "no record fits the reference statistics"))
    elif reference.hash_of("dataset") != reconstructed.hash_of("dataset"):
        found.append(Difference("reference", "the reference is of another data set than the reconstructions"))
    if target.metric.endswith("_rfid"):
        if about["extractor"] != INCEPTION:
            found.append(Difference("features", f"features of {about['extractor']} (published {INCEPTION})"))
        elif about["weights"] != INCEPTION_SHA256:
            text = f"Inception weights {about['weights'][:12]} (torch-fidelity's: {INCEPTION_SHA256[:12]})"
            found.append(Difference("features", text))
        if not found:  # else they would say the same once more
            found += [Difference("features", one) for one in metrics["warnings"]]
    return found


def _retrieved(what: str, source: Made | None, name: str, models: Mapping[str, Model]) -> list[Difference]:
    """Nothing, where `source` is the retrieval of model `name` of config/models.csv, with the bytes it recorded."""
    if source is None:
        text = f"{what}: no record of a file (published {name})"
    elif source.step != "scripts.retrieve.model":
        text = f"{what}: made by {source.step} (published {name})"
    elif source.record["settings"]["name"] != name:
        text = f"{what}: {source.record['settings']['name']} (published {name})"
    elif source.record["source"] != models[name].source:
        text = f"{what}: from {source.record['source']} (config/models.csv: {models[name].source})"
    else:
        return []
    return [Difference("weights", text)]


def _changed(recorded: Mapping, published: Mapping) -> list[Difference]:
    """The published settings that a record has otherwise, those of a section together."""
    ours, theirs = _flat(recorded), _flat(published)
    sections: dict[str, list[str]] = {}
    for name in theirs:
        if name not in FREE and ours.get(name) != theirs[name]:
            text = f"{name} = {json.dumps(ours.get(name))} (published {json.dumps(theirs[name])})"
            sections.setdefault(name.partition(".")[0], []).append(text)
    return [Difference("settings", ", ".join(texts)) for texts in sections.values()]


def _flat(values: Mapping, place: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{place}{name}.") if isinstance(value, Mapping) else {f"{place}{name}": value}
    return found


def _rae(
    target: Target, metrics: Mapping, made: Made, models: Mapping[str, Model], step: str
) -> tuple[list[Difference], Made | None, Made | None]:
    """Differences in what rae's protocols share; what made the checkpoint, if `step` did; the reconstructions."""
    reconstructed = made.input("features.safetensors")
    if reconstructed is None:
        return [Difference("weights", "no record fits the reconstructions")], None, None
    found = _rae_scores(target, metrics, made, reconstructed)
    encoder = target.metric.rpartition("_")[0]
    name = getattr(config.Config().rae.encoders, encoder).model
    found += _retrieved("encoder", reconstructed.input("model files.json"), name, models)
    checkpoint = reconstructed.input("checkpoint")
    if checkpoint is None or checkpoint.step != step:
        ours = DECODERS.get(checkpoint.step, checkpoint.step) if checkpoint else "of no record"
        return [*found, Difference("weights", f"decoder: {ours} (published: {DECODERS[step]})")], None, reconstructed
    return found, checkpoint, reconstructed


def rae_released(target: Target, metrics: Mapping, made: Made, models: Mapping[str, Model]) -> list[Difference]:
    """The authors' decoder and latent statistics, retrieved and scored as they are."""
    found, checkpoint, _ = _rae(target, metrics, made, models, RELEASED)
    if checkpoint is not None:
        encoder, defaults = target.metric.rpartition("_")[0], config.Config().rae
        own = getattr(defaults.published, encoder)
        found += _retrieved("decoder", checkpoint.input("decoder"), own.decoder, models)
        found += _retrieved("latent statistics", checkpoint.input("statistics"), own.stats, models)
        seen = of_kind(getattr(defaults.encoders, encoder), "numerics")
        published = {"image_size": defaults.image_size, "encoder": seen}
        found += _changed(checkpoint.record["settings"], published)
    return found


def rae_trained(target: Target, metrics: Mapping, made: Made, models: Mapping[str, Model]) -> list[Difference]:
    """A decoder trained here on ImageNet-1k's train split, with the published settings."""
    found, training, reconstructed = _rae(target, metrics, made, models, TRAINED)
    if training is not None:
        encoder, defaults = target.metric.rpartition("_")[0], config.Config().rae
        own = of_kind(defaults, "numerics")
        published = {
            name: own[name] for name in ("image_size", "decoder", "perceptual", "discriminator", "autoencoder")
        }
        published = merge(published | {"encoder": own["encoders"][encoder]}, parse_overrides(target.settings))
        found += _changed(training.record["settings"], published)
        found += _retrieved("VGG16 of LPIPS", training.input("vgg"), defaults.perceptual.weights, models)
        found += _retrieved("DINO of the discriminator", training.input("dino"), defaults.discriminator.weights, models)
        if training.hash_of("dataset") != reconstructed.hash_of("dataset"):
            found.append(Difference("split", "trained on another data set than it is scored on"))
        seen = (made.read("dataset") or {"splits": {}})["splits"].get("train", {}).get("ok")
        if seen != IMAGENET["train"]:
            found.append(Difference("split", f"train: {seen} (ImageNet-1k: {IMAGENET['train']})"))
    return found


def vase_captions(target: Target, metrics: Mapping, made: Made, models: Mapping[str, Model]) -> list[Difference]:
    """Captions of vases by the published base model or what was trained from it, found by CLIP."""
    defaults = config.Config().vase
    predicted = made.input("predictions")
    if predicted is None:
        return [Difference("weights", "no record fits the predictions")]
    model = target.metric.partition("_")[0]
    source, found = predicted.input(f"{model}: model files.json"), []
    for stage in {"base": (), "sft": ("sft",), "grpo": ("grpo", "sft")}[model]:
        if source is not None and source.step == "scripts.vase.merge":
            source = source.input("adapter")
        if source is None or source.step != f"scripts.vase.train_{stage}":
            by = f"made by {source.step}" if source else "of no record"
            return [*found, Difference("weights", f"{stage} model: {by}")]
        own = {name: of_kind(getattr(defaults, name), "numerics") for name in ("vlm", stage)}
        found += _changed(source.record["settings"], merge(own, parse_overrides(target.settings)))
        source = source.input("model files.json")
    found += _retrieved("base model", source, defaults.vlm.model, models)
    if not target.metric.endswith("_lexical_overlap"):
        found += _retrieved("CLIP", made.input("clip"), defaults.clip.model, models)
    return found


PROTOCOLS: Mapping[str, Callable[[Target, Mapping, Made, Mapping[str, Model]], list[Difference]]] = {
    one.__name__: one for one in (rae_released, rae_trained, vase_captions)
}
