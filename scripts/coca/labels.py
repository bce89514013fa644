"""What users say of slides: `labels.json`, {slide: text}, and a CSV of patients; both in UTF-8."""

import io
import json
import re
from collections import Counter
from pathlib import Path

import pandas as pd

from scripts.common.errors import KilnError


class _Pairs(list):
    """The members of a JSON object in order; a dict would keep the last of equal names."""


def read_labels(path: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The texts {slide: text}, and the entries that are none, as (slide, reason), one for each.

    Texts are kept as they stand. No text of a slide with two entries is taken.

    Raises:
        KilnError: not UTF-8 (it says which byte, and what it may be), not JSON, no object, or no entries.
    """
    try:
        entries = json.loads(read_text(path), object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise KilnError(f"{path}: not JSON: {error}", 'expected {"slide": "text", ...}') from None
    if not isinstance(entries, _Pairs):
        raise KilnError(f"{path}: {_kind(entries)}, expected an object", 'write {"slide": "text", ...}')
    if not entries:
        raise KilnError(f"{path}: no entries", 'write {"slide": "text", ...}')
    times = Counter(name for name, _ in entries)
    texts, bad = {}, []
    for name, value in entries:
        reason = f"double: {times[name]} entries" if times[name] > 1 else _fault(name, value)
        if reason:
            bad.append((name.encode("utf-8", "backslashreplace").decode(), reason))
        else:
            texts[name] = value
    return texts, bad


def _kind(value: object) -> str:
    kinds = {_Pairs: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _fault(name: str, value: object) -> str | None:
    if not isinstance(value, str):
        return f"no string: {_kind(value)}"
    if not value.strip():
        return "empty text"
    if _has_surrogates(name + value):
        return "no Unicode: half of a surrogate pair"
    return None


def _has_surrogates(text: str) -> bool:
    return re.search("[\ud800-\udfff]", text) is not None


def read_patients(path: Path) -> dict[str, str]:
    """{slide: patient} of a CSV with columns slide and patient; ids are text, 007 too. Rows without a patient are left
    out, equal rows count once.

    Raises:
        KilnError: not UTF-8, no CSV, a missing column, or a slide with two patients.
    """
    try:
        frame = pd.read_csv(io.StringIO(read_text(path)), dtype=str, keep_default_na=False)
    except (ValueError, pd.errors.ParserError) as error:
        raise KilnError(f"{path}: no CSV: {error}", "expected columns slide,patient") from None
    missing = [name for name in ("slide", "patient") if name not in frame.columns]
    if missing:
        raise KilnError(
            f"{path}: no column {', '.join(missing)}; it has {', '.join(frame.columns)}", "expected slide,patient"
        )
    frame = frame[["slide", "patient"]].apply(lambda column: column.str.strip())
    patients: dict[str, str] = {}
    for row, (slide, patient) in enumerate(frame.itertuples(index=False), start=2):
        if patient and patients.setdefault(slide, patient) != patient:
            raise KilnError(
                f"{path}: row {row}: slide {slide!r} is of patient {patient!r}, and above of {patients[slide]!r}",
                "keep one of the rows",
            )
    return patients


def read_text(path: Path) -> str:
    """The UTF-8 text of `path`, with or without a byte-order mark.

    Raises:
        KilnError: it cannot be read, or is in another encoding.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise KilnError(f"{path}: cannot be read ({error.strerror})", "check the path") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        place = f"byte {error.start} (0x{data[error.start]:02x}, line {line})"
        guess, sample = _guess(data)
        if guess is None:
            raise KilnError(
                f"{path}: not UTF-8: it fails at {place}; nor is it GB18030 (GBK) or UTF-16",
                "save it as UTF-8 in the program that wrote it",
            ) from None
        raise KilnError(
            f"{path}: not UTF-8: it fails at {place}; as {guess} it reads {sample!r}",
            f"if that is right, convert it: iconv -f {guess.split()[0]} -t UTF-8 {path.name} > utf8{path.suffix}",
        ) from None


def _guess(data: bytes) -> tuple[str | None, str]:
    """The encoding that `data` may be in, and what its first text beyond ASCII then reads."""
    for name, says, fits in (
        ("utf-16", "UTF-16", data[:2] in (b"\xff\xfe", b"\xfe\xff")),
        ("gb18030", "GB18030 (GBK)", True),
    ):
        try:
            text = data.decode(name)
        except UnicodeDecodeError:
            continue
        found = re.search(r"[^\x00-\x7f]{1,12}", text)
        if fits:
            return says, found[0] if found else text[:12]
    return None, ""
