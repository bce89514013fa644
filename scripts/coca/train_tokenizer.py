"""The tokenizer: byte-level BPE learnt from the training texts, or a copy of one that exists.

Rule `coca_train_tokenizer`. Every text, in any language, comes back exactly from a byte-level one. No token has more
than 18 bytes, six Chinese characters: in few texts BPE would else make whole phrases one token. Of an existing
tokenizer that lacks a mark (pad, begin, end), or whose pad is one of the others and so would never be learnt, the copy
gets it; [CLS] and [SEP] serve as begin and end.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from scripts.coca import sides
from scripts.coca.settings import TokenizerSettings
from scripts.coca.texts import Texts
from scripts.common import artefacts, step
from scripts.common.errors import KilnError

MARKS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
TOKEN_BYTES = 18


def learn(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) of at most `vocabulary` tokens: the marks are 0, 1, 2,
    then come the 256 bytes, then merges that occur at least twice."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=list(MARKS.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=TOKEN_BYTES,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _with_marks(backend, MARKS)


def copy(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`, with all three marks; nothing is downloaded, and no code of the folder is run.

    Raises:
        KilnError: no folder, no tokenizer, or one without a tokenizer.json and no way to make it.
    """
    if not folder.is_dir():
        raise KilnError(f"{folder}: no such folder", "set coca.tokenizer.path to a folder of a Hugging Face tokenizer")
    try:
        known = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception
        raise KilnError(
            f"{folder}: no tokenizer that can be read: {error}", "give a folder that save_pretrained wrote"
        ) from None
    if not known.is_fast:
        raise KilnError(
            f"{folder}: {type(known).__name__} has no tokenizer.json", "give one that has, or set path to null"
        )
    marks = {
        "bos_token": known.bos_token or known.cls_token or MARKS["bos_token"],
        "eos_token": known.eos_token or known.sep_token or MARKS["eos_token"],
        "pad_token": known.pad_token or MARKS["pad_token"],
    }
    if marks["pad_token"] in (marks["bos_token"], marks["eos_token"]):
        marks["pad_token"] = MARKS["pad_token"]
    return _with_marks(Tokenizer.from_str(known.backend_tokenizer.to_str()), marks)


def _with_marks(backend: Tokenizer, marks: dict[str, str]) -> PreTrainedTokenizerFast:
    backend.no_truncation()
    backend.no_padding()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **marks)


def describe(texts: Texts, corpus: Sequence[str]) -> dict:
    """What the record says: sizes, tokens per text, and how many texts do not come back as they were."""
    encoded = [texts.encode(text, 2**31)[0] for text in corpus]
    tokens = np.array([len(ids) for ids in encoded])
    changed = [text for text, ids in zip(corpus, encoded, strict=True) if texts.decode(ids) != text]
    return {
        "vocabulary": texts.size,
        "texts": len(corpus),
        "tokens_per_text": {"median": float(np.median(tokens)), "most": int(tokens.max())},
        "characters_per_token": round(sum(map(len, corpus)) / max(int((tokens - 2).sum()), 1), 3),
        "changed_texts": len(changed),
        "first_changed": changed[0] if changed else None,
    }


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, TokenizerSettings)
    made.add_argument("--manifest", type=Path, required=True, help="manifest.parquet of rule coca_list_slides")
    made.add_argument("--splits", type=Path, required=True, help="splits.csv of rule coca_split")
    made.add_argument("--output-folder", type=Path, required=True, help="folder of the tokenizer, to make or replace")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Learn or copy a tokenizer."""
    values = step.read_settings(args)
    inputs = {"manifest": args.manifest, "splits": args.splits}
    if values.path and (Path(values.path) / "tokenizer.json").is_file():
        inputs["tokenizer"] = Path(values.path) / "tokenizer.json"
    record = step.record(args, "scripts.coca.train_tokenizer", values, inputs)
    corpus = sides.only(sides.read(args.manifest, args.splits), "train")["text"].tolist()
    tokenizer = copy(Path(values.path)) if values.path else learn(corpus, values.vocabulary)
    with artefacts.atomic_folder(args.output_folder) as temporary:
        tokenizer.save_pretrained(temporary)
        facts = describe(Texts.load(temporary), corpus)
        names = [path.name for path in artefacts.write_listing(temporary)]
    record.facts["tokenizer"] = facts
    step.log.info("%s", facts)
    if facts["changed_texts"]:
        step.log.warning(
            "%d of %d training texts do not come back as they were, such as %r: captions cannot equal them",
            facts["changed_texts"],
            len(corpus),
            facts["first_changed"],
        )
    record.write(args.meta, [args.output_folder / name for name in [*names, "files.json"]], items=len(corpus))


if __name__ == "__main__":
    step.run(main)
