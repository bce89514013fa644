"""The packaged Chinese font, cut down to what a page uses, so that the page shows its text on every machine."""

import base64
import io

from fontTools import subset
from fontTools.ttLib import TTFont

from scripts.common.plots import CJK_FAMILY, cjk_font_file


def embedded_face(text: str) -> str:
    """CSS that holds the glyphs of the characters of `text` from U+2E80 on; empty without such, or without the font."""
    wanted = {ord(character) for character in text if ord(character) >= 0x2E80}
    path = cjk_font_file() if wanted else None
    if path is None:
        return ""
    font = TTFont(path, recalcTimestamp=False)
    options = subset.Options(layout_features=[], name_IDs=[], hinting=False)
    cut = subset.Subsetter(options)
    cut.populate(unicodes=wanted)
    cut.subset(font)
    font.flavor, held = "woff", io.BytesIO()
    font.save(held)
    data = base64.b64encode(held.getvalue()).decode()
    return f'@font-face {{ font-family: "{CJK_FAMILY}"; src: url(data:font/woff;base64,{data}) format("woff"); }}'
