"""Pre-train the demo's tiny Qwen2.5-VL on pictures of shapes: the base that pipelines `vase` and `busi` fine-tune.

Rule `demo_train_vlm`. The pictures are not the pipelines' (see `shapes`): the base has never seen a vase or an
ultrasound picture, nor been asked a pipeline's question. It learns to see coloured forms, and dark blobs on grey
noise, which are far plainer than either; and it learns to repeat the words that the pipelines' answers are made of,
since a LoRA leaves embeddings as they are. While it learns, linear classifiers on the vision encoder's mean output
are asked the same, which teaches the encoder sooner; they are thrown away. Demo only: about a minute, so it does not
resume; a real run takes a published model instead. Equal settings give equal bytes (on a CPU, with as many threads).
"""

import functools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from scripts.common import artefacts, progress, step, tiny_vlm
from scripts.common.errors import KilnError
from scripts.demo import shapes
from scripts.demo.settings import DemoVlmSettings

log = logging.getLogger("kiln")
IGNORED = -100
_SHAPES = (0.4, 0.3, 0.3)  # shares of square, 4:3 and 3:4 grey pictures; coloured ones are square
Turn = tuple[str, str]  # question, answer


def say(word: str) -> Turn:
    """The question that asks to repeat a word."""
    return f"Say {word}.", word


def corpus(values: DemoVlmSettings) -> list[str]:
    """The texts that the tokens are made of; a word that occurs is one token, with a space before it or not."""
    words = [*values.words, *(a for known in shapes.answers().values() for a in known)]
    questions = [text for sort in shapes.QUESTIONS.values() for text in sort.values()]
    described = [
        *(f"a {c} {f} with {c} {p}" for c in shapes.COLOURS for f in shapes.FORMS for p in shapes.PATTERNS),
        *(f"a {o} {e} blob with {b} below" for o in shapes.OUTLINES for e in shapes.EXTENTS for b in shapes.BELOW),
        "no blob",
    ]
    chat = "system\nuser\nassistant\nYou are a helpful assistant."
    return [chat, *values.texts, *questions, *described, *words, *(say(word)[0] for word in words)]


class Pool(NamedTuple):
    """Pictures of one size.

    Attributes:
        grid: (1, rows, columns) of patches.
        patches: [N, rows * columns, 588] float32, normalised; a patch's two frames are equal, so one is kept.
        samples: what each picture is.
    """

    grid: tuple[int, int, int]
    patches: torch.Tensor
    samples: list[shapes.Sample]


def draw_pools(processor, values: DemoVlmSettings, count: int, stream: int) -> list[Pool]:
    """`count` pictures of both sorts, grouped by size; each `stream` gives others."""
    rng = np.random.default_rng([values.seed, stream])
    side = 1.25 * values.image_side  # the processor reduces them, as it does with what users have
    square, wide = (round(side),) * 2, (round(side * math.sqrt(4 / 3)), round(side * math.sqrt(3 / 4)))
    drawn: dict[tuple[int, int], list[shapes.Sample]] = {square: [], wide: [], wide[::-1]: []}
    for number in progress.bar(range(count), "draw"):
        sort = "coloured" if number < round(values.coloured * count) else "grey"
        size = square
        if sort == "grey":
            size = list(drawn)[rng.choice(3, p=_SHAPES)]
        drawn[size].append(shapes.draw(rng, sort, size))
    return [_pool(processor.image_processor, samples) for samples in drawn.values() if samples]


def _pool(image_processor, samples: list[shapes.Sample], chunk: int = 250) -> Pool:
    patches = []
    for start in range(0, len(samples), chunk):  # in chunks: all frames of all pictures are twice the memory
        part = [sample.picture for sample in samples[start : start + chunk]]
        made = image_processor(images=part, return_tensors="pt")
        grid = made["image_grid_thw"][0]
        frames = made["pixel_values"].view(len(part), int(grid.prod()), 3, 2, -1)
        patches.append(frames[:, :, :, 0].flatten(2).clone())
    return Pool(tuple(grid.tolist()), torch.cat(patches), samples)


def pixel_values(patches: torch.Tensor) -> torch.Tensor:
    """What the model takes, [N * P, 1176], for `Pool.patches` [N, P, 588]."""
    frames = patches.unflatten(2, (3, 1, -1)).expand(-1, -1, -1, 2, -1)
    return frames.reshape(patches.shape[0] * patches.shape[1], -1)


class Chat:
    """Conversations about a picture, in the processor's chat template."""

    def __init__(self, processor):
        self.processor = processor
        self.ids = functools.cache(lambda text: processor.tokenizer(text)["input_ids"])
        self.opening = functools.cache(self._opening)

    def _opening(self, question: str, image_tokens: int) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text.replace(tiny_vlm.IMAGE, tiny_vlm.IMAGE * image_tokens)

    def encode(self, image_tokens: int, turns: Sequence[Turn]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [T] of a conversation, and labels [T]: the answers with their end tokens, else `IGNORED`."""
        ids, labels = [], []
        for number, (question, answer) in enumerate(turns):
            if number == 0:
                asked = self.ids(self.opening(question, image_tokens))
            else:
                asked = self.ids(f"\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
            given = self.ids(answer + tiny_vlm.END)
            ids += asked + given
            labels += [IGNORED] * len(asked) + given
        return torch.tensor(ids), torch.tensor(labels)


def choose_turns(sample: shapes.Sample, words: Sequence[str], share: float, rng: np.random.Generator) -> list[Turn]:
    """A conversation about a picture: its description, or the other questions in any order.

    A description that followed them could be copied from their answers, without a look at the picture. For each
    question one more, to say a word, comes in with probability `share`, anywhere.
    """
    questions = shapes.QUESTIONS[sample.sort]
    kinds = [kind for kind in questions if kind != "describe"] if rng.random() < 2 / 3 else ["describe"]
    turns = [(questions[kind], sample.answers[kind]) for kind in kinds]
    turns += [say(words[rng.integers(len(words))]) for _ in range(rng.binomial(len(kinds), share))]
    return [turns[i] for i in rng.permutation(len(turns))]


def make_batch(model, chat: Chat, pool: Pool, rows: Sequence[int], turns: Sequence[Sequence[Turn]]) -> dict:
    """The model's inputs for conversations about the pictures `rows` of a pool, padded at the end."""
    tokens = math.prod(pool.grid) // 4
    pairs = [chat.encode(tokens, conversation) for conversation in turns]
    ids = pad_sequence([i for i, _ in pairs], True, model.config.text_config.pad_token_id)
    mask = pad_sequence([torch.ones_like(i) for i, _ in pairs], True, 0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": pad_sequence([labels for _, labels in pairs], True, IGNORED),
        "pixel_values": pixel_values(pool.patches[list(rows)]),
        "image_grid_thw": torch.tensor([pool.grid] * len(pairs)),
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
    }


class Classifiers(nn.Module):
    """A linear classifier for each question but `describe`, on the mean of what the vision encoder hands over."""

    def __init__(self, model):
        super().__init__()
        self.answers = shapes.answers()
        width = model.config.text_config.hidden_size
        self.heads = nn.ModuleDict({"_".join(key): nn.Linear(width, len(a)) for key, a in self.answers.items()})
        model.model.visual.merger.register_forward_hook(self._keep)

    def _keep(self, module, inputs, output) -> None:
        self.seen = output  # of the last forward pass: [pictures * tokens, width]

    def loss(self, samples: Sequence[shapes.Sample]) -> torch.Tensor:
        """Mean cross-entropy over the questions, for the pictures of the last forward pass."""
        means = self.seen.unflatten(0, (len(samples), -1)).mean(1)
        losses = []
        for (sort, kind), known in self.answers.items():
            rows = [row for row, sample in enumerate(samples) if sample.sort == sort]
            if rows:
                wanted = torch.tensor([known.index(samples[row].answers[kind]) for row in rows])
                losses.append(nn.functional.cross_entropy(self.heads[f"{sort}_{kind}"](means[rows]), wanted))
        return torch.stack(losses).mean()


def train(model, chat: Chat, pools: Sequence[Pool], values: DemoVlmSettings) -> list[float]:
    """Train in place; the language model's loss in each step."""
    rng = np.random.default_rng([values.seed, 2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(values.seed)
        classifiers = Classifiers(model)
    parameters = [*model.parameters(), *classifiers.parameters()]
    optimizer = torch.optim.AdamW(parameters, values.lr, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, values.lr, values.steps, pct_start=values.warmup)
    sizes = np.array([len(pool.samples) for pool in pools])
    losses = []
    model.train()
    for _ in progress.bar(range(values.steps), "train"):
        pool = pools[rng.choice(len(pools), p=sizes / sizes.sum())]  # pictures of one size have as many tokens
        rows = rng.integers(len(pool.samples), size=values.batch_size)
        samples = [pool.samples[row] for row in rows]
        turns = [choose_turns(sample, values.words, values.say, rng) for sample in samples]
        loss = model(**make_batch(model, chat, pool, rows, turns)).loss
        optimizer.zero_grad(set_to_none=True)
        (loss + values.classify * classifiers.loss(samples)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    if not math.isfinite(losses[-1]):
        raise KilnError("the demo's vision-language model diverged: its loss is not finite", "lower demo.vlm.lr")
    return losses


@torch.inference_mode()
def right_answers(model, chat: Chat, pool: Pool, turns: Sequence[Turn], batch_size: int = 100) -> np.ndarray:
    """Whether greedy generation gives exactly the answer, bool [N], asked of each picture alone.

    It does exactly when every token of the answer, and the end token, is the most probable after those before it.
    """
    right = []
    for start in range(0, len(turns), batch_size):
        rows = range(start, min(start + batch_size, len(turns)))
        batch = make_batch(model, chat, pool, rows, [[turns[row]] for row in rows])
        labels = batch.pop("labels")[:, 1:]
        guesses = model(**batch).logits[:, :-1].argmax(-1)
        right.append(((guesses == labels) | (labels == IGNORED)).all(1))
    return torch.cat(right).numpy()


def measure(model, chat: Chat, pools: Sequence[Pool], words: Sequence[str]) -> dict[str, dict]:
    """{sort: {kind of question: {accuracy, most_frequent, n}}}; `most_frequent` is the share of that answer."""
    found: dict[str, dict] = {}
    for sort, questions in shapes.QUESTIONS.items():
        chosen = [pool._replace(**_of_sort(pool, sort)) for pool in pools]
        chosen = [pool for pool in chosen if pool.samples]
        found[sort] = {}
        for kind, text in questions.items():
            answers = [[sample.answers[kind] for sample in pool.samples] for pool in chosen]
            right = np.concatenate(
                [
                    right_answers(model, chat, pool, [(text, a) for a in known])
                    for pool, known in zip(chosen, answers, strict=True)
                ]
            )
            known = [answer for part in answers for answer in part]
            found[sort][kind] = {
                "accuracy": float(right.mean()),
                "most_frequent": max(map(known.count, set(known))) / len(known),
                "n": len(known),
            }
    pool = pools[0]
    some = [say(words[i % len(words)]) for i in range(len(pool.samples))]
    right = right_answers(model, chat, pool, some)
    found["words"] = {"say": {"accuracy": float(right.mean()), "most_frequent": 1 / len(words), "n": len(some)}}
    return found


def _of_sort(pool: Pool, sort: str) -> dict:
    rows = [i for i, sample in enumerate(pool.samples) if sample.sort == sort]
    return {"patches": pool.patches[rows], "samples": [pool.samples[i] for i in rows]}


def main(argv: Sequence[str] | None = None) -> None:
    made = step.parser(__doc__, DemoVlmSettings)
    made.add_argument("--output-folder", type=Path, required=True, help="folder of the model, to make or replace")
    args = made.parse_args(argv)
    values = step.read_settings(args)
    record = step.record(args, "scripts.demo.train_vlm", values, {})
    torch.set_num_threads(step.threads(args))
    transformers.utils.logging.disable_progress_bar()

    folder = args.output_folder
    with artefacts.atomic_folder(folder) as temporary:
        model, processor = tiny_vlm.build(
            temporary,
            corpus(values),
            seed=values.seed,
            hidden=values.hidden,
            layers=values.layers,
            vision_hidden=values.vision_hidden,
            vision_depth=values.vision_depth,
            image_side=values.image_side,
        )
        chat = Chat(processor)
        losses = train(model, chat, draw_pools(processor, values, values.pictures, 0), values)
        metrics = measure(model, chat, draw_pools(processor, values, values.held_out, 1), values.words)
        for sort, kinds in metrics.items():
            log.info("%s: %s", sort, ", ".join(f"{k} {m['accuracy']:.2f}" for k, m in kinds.items()))
        tiny_vlm.save(temporary, model, processor)
        shown = [round(float(part.mean()), 4) for part in np.array_split(losses, min(20, len(losses)))]
        artefacts.write_json(temporary / "metrics.json", {"held_out": metrics, "train_loss": shown})
        names = sorted(path.name for path in temporary.iterdir())
        artefacts.write_json(temporary / "files.json", artefacts.describe_files(temporary / name for name in names))
    outputs = [folder / name for name in [*names, "files.json"]]
    record.write(args.meta, outputs, items=values.steps * values.batch_size)


if __name__ == "__main__":
    step.run(main)
