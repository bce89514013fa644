"""Texts as token ids and back, and the class that a text names."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from scripts.common.errors import KilnError


class Texts:
    """The tokenizer of a folder that rule `coca_train_tokenizer` made.

    Attributes:
        pad_id, bos_id, eos_id: ids of the marks that fill up, begin and end.
        size: count of ids, marks included.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.pad_id, self.bos_id, self.eos_id = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
        self.size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, folder: Path) -> "Texts":
        """The tokenizer in `folder`; nothing is downloaded.

        Raises:
            KilnError: there is none, or it lacks a mark.
        """
        identity(folder)
        try:
            made = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # tokenizers raises plain Exception
            raise KilnError(f"{folder}: no tokenizer: {error}", "make it anew by rule coca_train_tokenizer") from None
        missing = [name for name in ("pad", "bos", "eos") if getattr(made, f"{name}_token_id") is None]
        if missing:
            raise KilnError(
                f"{folder}: no {' and no '.join(missing)} token",
                "name the folder in coca.tokenizer.path: rule coca_train_tokenizer makes a copy that has them",
            )
        return cls(made)

    def encode(self, text: str, max_len: int) -> tuple[list[int], bool]:
        """([bos, ..., eos] of at most `max_len` ids, whether text was cut off)."""
        self._backend.encode_special_tokens = True  # a mark that a text spells out is text; not kept by pickle
        ids = self._backend.encode(text, add_special_tokens=False).ids
        kept = ids[: max_len - 2]
        return [self.bos_id, *kept, self.eos_id], len(kept) < len(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, marks left out."""
        marks = {self.pad_id, self.bos_id, self.eos_id}
        return self._backend.decode([int(one) for one in ids if int(one) not in marks], skip_special_tokens=False)


def identity(folder: Path) -> dict[str, Path]:
    """{name: file} whose hashes identify the tokenizer in `folder`.

    Raises:
        KilnError: no tokenizer there.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise KilnError(f"{folder}: no tokenizer (no tokenizer.json there)", "run rule coca_train_tokenizer")
    listing = folder / "files.json"
    return {f"tokenizer {path.name}": path for path in ([listing] if listing.is_file() else [file])}


def class_of(text: str, classes: Mapping[str, Sequence[str]]) -> str | None:
    """The class in {class: terms} whose term `text` holds, in any letter case; None if it holds none, or those of two.

    Of terms that begin at the same place the longest counts, and what is part of a longer one before it does not. A
    term in Latin letters begins at the begin of a word (no adenoma in fibroadenoma), but may go on (carcinomas).
    """
    names = {term.casefold(): name for name, terms in classes.items() for term in terms}
    longest_first = sorted(names, key=len, reverse=True)
    pattern = "|".join(rf"{_START if term[0].isascii() else ''}{re.escape(term)}" for term in longest_first)
    found = {names[match[0]] for match in re.finditer(pattern, text.casefold())} if names else set()
    return found.pop() if len(found) == 1 else None


_START = r"(?<![a-z0-9\u00df-\u024f])"  # Chinese has no spaces between words: 为adenoma
