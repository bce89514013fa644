"""Slides and texts as unit vectors of the model's contrastive space, and how they compare."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from scripts.coca.texts import Texts

BATCH = 64


@torch.inference_mode()
def embed_texts(coca, texts: Texts, strings: Sequence[str], max_len: int, accelerator) -> np.ndarray:
    """Unit vectors [N, dim_latents] float32; of a text of more than `max_len` tokens the first ones count."""
    made = []
    for start in range(0, len(strings), BATCH):
        rows = [torch.tensor(texts.encode(one, max_len)[0]) for one in strings[start : start + BATCH]]
        ids = pad_sequence(rows, batch_first=True, padding_value=texts.pad_id)
        with accelerator.autocast():
            embed, _ = coca.embed_text(ids.to(accelerator.device))
            made.append(coca.text_to_latents(embed).float().cpu().numpy())
    return np.concatenate(made)


@torch.inference_mode()
def embed_images(coca, image_tokens: torch.Tensor, accelerator) -> np.ndarray:
    """Unit vectors [B, dim_latents] float32 of image tokens [B, N, image_dim]."""
    with accelerator.autocast():
        embed, _ = coca.embed_image(image_tokens.to(accelerator.device), None)
        return coca.img_to_latents(embed).float().cpu().numpy()


def scale(coca) -> float:
    """What cosines are multiplied by before a softmax."""
    return float(coca.temperature.detach().exp())
