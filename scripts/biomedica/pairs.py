"""Which raw pairs may be used, by one set of rules for local and streamed shards."""

import hashlib
import json
from typing import NamedTuple

from scripts.biomedica.settings import HeldOutSettings, IndexSettings
from scripts.biomedica.sides import article_of, side_of
from scripts.biomedica.tars import Raw
from scripts.common import images

UNKNOWN = "unknown"  # panel type of a pair whose json is missing or does not say


class Pair(NamedTuple):
    """A usable pair: the stripped caption with its id, the image file's bytes with its size in pixels as stored."""

    key: str
    article: str
    side: str
    caption: str
    caption_id: int
    image: bytes
    width: int
    height: int
    panel_type: str
    panel_subtype: str


class Rejected(NamedTuple):
    """`status` is "rejected" (by the data set's own rules) or "quarantined" (broken); `reason` starts with a few words
    that do not depend on the pair, up to a colon if more follows."""

    key: str
    status: str
    reason: str


class _BrokenError(Exception):
    pass


def check(raw: Raw, index: IndexSettings, held_out: HeldOutSettings, decode: bool) -> Pair | Rejected:
    """The pair, or why it is none.

    Rejected: an empty caption, one of `index.no_caption`, a side under `index.min_side`. Quarantined: a caption that
    is not UTF-8, a json that is no object, an image that is over-large, unreadable or, with `decode`, not whole.
    """
    try:
        caption = _caption(raw.text)
        panel_type, panel_subtype = _panel(raw.meta)
        if not caption:
            return Rejected(raw.key, "rejected", "empty caption")
        if caption in index.no_caption:
            return Rejected(raw.key, "rejected", f"no caption: {caption}")
        width, height = images.size(raw.image, index.max_pixels)
        if min(width, height) < index.min_side:
            return Rejected(raw.key, "rejected", f"small image: {width}x{height}, a side under {index.min_side}")
        if decode:
            images.open_rgb(raw.image, index.max_pixels)
    except (images.ImageError, _BrokenError) as error:
        kind = "image: " if isinstance(error, images.ImageError) else ""
        return Rejected(raw.key, "quarantined", f"{kind}{error}")
    article = article_of(raw.key)
    return Pair(
        raw.key, article, side_of(article, held_out), caption, caption_id(caption), raw.image, width, height,
        panel_type, panel_subtype,
    )  # fmt: skip


def caption_id(caption: str) -> int:
    """The same number for the same caption: the first 8 bytes of its sha256, as a signed big-endian int64."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], signed=True)


def _caption(data: bytes) -> str:
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise _BrokenError(f"caption not UTF-8: byte {error.start} of {len(data)}") from None


def _panel(data: bytes | None) -> tuple[str, str]:
    if data is None:
        return UNKNOWN, UNKNOWN
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _BrokenError(f"json: {error}") from None
    if not isinstance(facts, dict):
        raise _BrokenError(f"json: expected an object, got a {type(facts).__name__}")
    return _name(facts.get("image_panel_type")), _name(facts.get("image_panel_subtype"))


def _name(value: object) -> str:
    """Text as it stands, several texts in their order; anything else says nothing."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return ", ".join(one.strip() for one in texts if isinstance(one, str) and one.strip()) or UNKNOWN
