"""What names the state of a piece of work: everything that decides its numbers."""

from collections.abc import Mapping
from typing import Any

from scripts.common.artefacts import sha256_text
from scripts.common.settings import to_json


def fingerprint(numerics: Mapping[str, Any], inputs: Mapping[str, str], code: str) -> str:
    """Name of a state folder: hex digest of settings, {input: sha256} and the code key."""
    return sha256_text(to_json(dict(numerics)), to_json(dict(inputs)), code)[:16]
