"""Export a trained CLIP model: a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads.

Rule `biomedica_export`. Before the folder is put in place, open_clip loads it, and its embeddings must be the
checkpoint's.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from scripts.biomedica import checkpoints, transforms
from scripts.biomedica import model as models
from scripts.common import artefacts, step
from scripts.common.errors import KilnError

WEIGHTS = "open_clip_model.safetensors"
TOKENIZER = (".json", ".txt", ".model", ".jinja")  # endings of a tokenizer's files
TEXTS = ["", "a bar chart of counts per group", "Western blot, n = 3; β-actin " * 30]


def config_of(facts: checkpoints.Facts) -> dict:
    """The content of `open_clip_config.json`; the size of images is that of the model."""
    preprocess = {key: value for key, value in facts.preprocess_cfg.items() if key != "size"}
    return {"model_cfg": facts.model_cfg, "preprocess_cfg": preprocess}


def tokenizer_files(folder: Path | None, facts: checkpoints.Facts) -> list[Path]:
    """Files of the tokenizer in a folder of weights; none for open_clip's own, which comes with it."""
    if folder is None or not facts.model_cfg["text_cfg"].get("hf_tokenizer_name"):
        return []
    others = (models.CONFIG, "files.json")
    return [one for one in models.weight_files(folder) if one.suffix in TOKENIZER and one.name not in others]


def write(folder: Path, trained: checkpoints.Trained, tokenizer: Sequence[Path]) -> None:
    """Write configuration, weights and tokenizer files into an empty folder."""
    artefacts.write_json(folder / models.CONFIG, config_of(trained.facts))
    tensors = {name: tensor.contiguous() for name, tensor in trained.model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    for path in tokenizer:
        shutil.copyfile(path, folder / path.name)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results are the same but for rounding, which varies with where in memory the weights lie."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def check(folder: Path, trained: checkpoints.Trained) -> None:
    """Refuse a folder from which open_clip makes another model: it merely warns of much that does not fit.

    Raises:
        KilnError: other weights, preprocessing, tokens or embeddings than the checkpoint's.
    """
    loaded, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    size, loaded = trained.facts.preprocess_cfg["size"], loaded.eval()
    longer = 2 * max(size if isinstance(size, list) else [size]) + 3
    pixels = np.random.default_rng(0).integers(0, 256, (longer, longer + 10, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    wanted = transforms.normalise(trained.transform(picture)[None], trained.facts.preprocess_cfg)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    found = transform(picture)[None]
    own, others = trained.model.state_dict(), loaded.state_dict()
    same = {
        "weights": own.keys() == others.keys() and all(torch.equal(one, others[name]) for name, one in own.items()),
        "preprocessing": close(found, wanted),
        "tokens": torch.equal(tokens, trained.tokenizer(TEXTS)),
        "image embeddings": close(loaded.encode_image(wanted), trained.model.encode_image(wanted)),
        "text embeddings": close(loaded.encode_text(tokens), trained.model.encode_text(tokens)),
    }
    other = [name for name, one in same.items() if not one]
    if other:
        raise KilnError(
            f"the exported folder gives other {', '.join(other)} than the checkpoint",
            "nothing was exported; does open_clip-torch have the version of the training? Else this is a defect",
        )


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__)
    made.add_argument("--checkpoint", type=Path, required=True, help="model.safetensors of rule biomedica_train_clip")
    made.add_argument("--weights", type=Path, help="folder of weights that training started from, if any")
    made.add_argument("--output-folder", type=Path, required=True, help="becomes the exported folder")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Export what `args` name.

    Raises:
        KilnError: the checkpoint is damaged, or open_clip makes another model of the exported folder.
    """
    inputs = {"checkpoint": args.checkpoint}
    inputs |= {f"weights {path.name}": path for path in (models.weight_files(args.weights) if args.weights else ())}
    record = step.record(args, "scripts.biomedica.export", None, inputs)
    torch.set_num_threads(step.threads(args))
    trained = checkpoints.load(args.checkpoint, args.weights)
    with artefacts.atomic_folder(args.output_folder) as temporary:
        write(temporary, trained, tokenizer_files(args.weights, trained.facts))
        check(temporary, trained)
        artefacts.write_listing(temporary)
    listing = args.output_folder / "files.json"
    for name, one in artefacts.read_json(listing).items():
        step.log.info("%s: %.1f MB", name, one["bytes"] / 1e6)
    record.write(args.meta, [listing])


if __name__ == "__main__":
    step.run(main)
