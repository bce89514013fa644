"""Classify images: the likelihood of each answer, the class it gives, and the text that the model writes.

Rule `busi_predict`, on the test side; by hand on any folder:

    python -m scripts.busi.predict --model results/busi/merge/main/lora/model --images DIR --output predictions.csv

The model is a base, a merged one, or a base with `--adapter`. Without `--rows` every image of the folder is
classified, masks left out; files that cannot be read go to a `.quarantine.tsv` beside the output.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch.utils.data import DataLoader

from scripts.busi import scoring
from scripts.busi.chat_examples import ChatExamples
from scripts.busi.chat_rows import read_rows
from scripts.busi.list_images import image_of_mask
from scripts.busi.settings import PROMPT, BaseSettings, ListSettings, PredictSettings, Settings
from scripts.common import artefacts, devices, images, model_folders, progress, shards, step, tables, vlm
from scripts.common.errors import KilnError
from scripts.common.inspection import inspect_files


class PredictStepSettings(Settings):
    """Settings of this step."""

    base: BaseSettings = BaseSettings()
    predict: PredictSettings = PredictSettings()
    list: ListSettings = ListSettings()
    prompt: str = PROMPT


def new_rows(folder: Path, values: PredictStepSettings, threads: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows of the readable images of a folder, as `read_rows` gives them; path and reason of the others).

    Raises:
        KilnError: no image can be read.
    """
    paths = [item.path for item in shards.scan(folder, images.EXTENSIONS).items]
    wanted = [path for path in paths if image_of_mask(path) is None]
    found = pd.DataFrame(inspect_files(folder, wanted, values.list.max_pixels, threads))
    bad = found[found["status"] != "ok"][["path", "reason"]] if len(found) else found
    ok = found[found["status"] == "ok"] if len(found) else found
    tables.reconcile("busi_predict", len(paths), ok=len(ok), quarantined=len(bad), masks=len(paths) - len(wanted))
    if ok.empty:
        raise KilnError(f"{folder}: none of {len(paths)} files is an image that can be read", "check the folder")
    rows = pd.DataFrame({"image": ok["path"], "sha256": ok["sha256"], "label": pd.NA, "group": pd.NA})
    return rows.assign(prompt=values.prompt, answer=""), bad


def load(args: argparse.Namespace, values: PredictStepSettings, family: vlm.Family):
    """The model, in evaluation mode, on its device."""
    on_cpu = devices.prepare(args.device, values.predict.precision, step.threads(args))
    dtype = devices.DTYPES[devices.choose_precision(values.predict.precision, on_cpu)]
    device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
    model = family.load_model(args.model, dtype=dtype, device_map={"": device})
    if args.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter)
    return model.eval(), device


def predict(args, values: PredictStepSettings, rows: pd.DataFrame) -> pd.DataFrame:
    """The columns of predictions.csv for `rows`, in their order."""
    family = vlm.family(values.base.family, values.base.code_sha256)
    processor = family.load_processor(args.model)
    tokenizer = processor.tokenizer
    model, device = load(args, values, family)
    classes = values.list.classes
    answers = scoring.encode_answers(tokenizer, classes)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def collate(items):
        errors = [item for item in items if isinstance(item, KilnError)]
        if errors:
            return errors[0]
        batch = family.collate(model.config, items, pad, "left")
        del batch["labels"]
        return batch

    loader = DataLoader(
        ChatExamples(args.images, rows, family, processor, taught=False),
        values.predict.batch_size, collate_fn=collate, num_workers=values.predict.workers,
    )  # fmt: skip
    sums, texts = [], []
    for batch in progress.bar(loader, "predict"):
        if isinstance(batch, KilnError):
            raise batch
        batch = vlm.to_device(batch, device)
        sums.append(scoring.log_likelihoods(model, family, batch, answers))
        texts += scoring.greedy_texts(model, batch, tokenizer, values.predict.max_new_tokens)
    return table(rows, torch.cat(sums), answers, texts, values)


def table(
    rows: pd.DataFrame, sums: torch.Tensor, answers, texts: list[str], values: PredictStepSettings
) -> pd.DataFrame:
    """predictions.csv's rows.

    Raises:
        KilnError: a likelihood is not finite.
    """
    classes = values.list.classes
    if not sums.isfinite().all():
        first = rows["image"].iloc[int((~sums.isfinite()).any(1).nonzero()[0])]
        raise KilnError(f"{first}: the log-likelihoods are not finite", "set busi.predict.precision to fp32 or bf16")
    scores = scoring.normalise(sums, answers, values.predict.normalisation)
    probabilities = scores.softmax(1)
    made = pd.DataFrame(
        {"path": rows["image"].to_numpy(), "label": rows["label"].to_numpy(), "group": rows["group"].to_numpy()}
    )
    for number, name in enumerate(classes):
        made[f"loglik_{name}"] = sums[:, number].numpy()
        made[f"tokens_{name}"] = len(answers[number])
        made[f"p_{name}"] = probabilities[:, number].numpy()
    made["predicted"] = scores.argmax(1).numpy()
    made["text"] = texts
    made["parsed"] = pd.array([scoring.parse_answer(text, classes) for text in texts], dtype="Int64")
    return made.sort_values("path", kind="stable")


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, PredictStepSettings, by_hand=True)
    step.add_device(made)
    made.add_argument("--model", type=Path, required=True, help="folder of a base or merged model")
    made.add_argument("--adapter", type=Path, help="final_model of rule busi_train_lora, on top of --model")
    made.add_argument("--images", type=Path, required=True, help="folder of the images")
    made.add_argument("--rows", type=Path, help="chat rows (.jsonl) to classify; default: every image of the folder")
    made.add_argument("--output", type=Path, required=True, help="predictions.csv")
    run(made.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Classify what `args` name."""
    values = step.read_settings(args)
    inputs = model_folders.identity(args.model)
    if args.adapter:
        inputs["adapter"] = args.adapter / "adapter_model.safetensors"
    if args.rows:
        inputs["rows"] = args.rows
    record = step.record(args, "scripts.busi.predict", values, inputs)
    outputs = [args.output]
    if args.rows:
        rows = read_rows(args.rows)
    else:
        rows, bad = new_rows(args.images, values, step.threads(args))
        outputs.append(args.output.with_suffix(".quarantine.tsv"))
        artefacts.write_text(outputs[1], bad.to_csv(sep="\t", index=False))
    made = predict(args, values, rows)
    artefacts.write_text(args.output, made.to_csv(index=False))
    unanswered = int(made["parsed"].isna().sum())
    step.log.info("%d images; %d greedy texts name no class", len(made), unanswered)
    record.write(step.meta_beside(args, args.output), outputs, items=len(made))


if __name__ == "__main__":
    step.run(main)
