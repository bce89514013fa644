"""Folders that hold a model: what identifies one, and what a retrieved or made one must have."""

from pathlib import Path

from scripts.common.errors import KilnError


def identity(folder: Path) -> dict[str, Path]:
    """{name: file} whose hashes identify the model in `folder`: its files.json, or its configuration and weights.

    Raises:
        KilnError: no such folder, or it holds no weights in safetensors.
    """
    if not (folder / "config.json").is_file():
        raise KilnError(f"{folder}: no model (no config.json there)", "give a folder that from_pretrained loads")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise KilnError(
            f"{folder}: no weights (*.safetensors)", "convert the model by save_pretrained, which writes them"
        )
    listing = folder / "files.json"
    files = [listing] if listing.is_file() else [folder / "config.json", *weights]
    return {f"model {path.name}": path for path in files}
