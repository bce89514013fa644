"""A CoCa model with the slide encoder before it, or without one where a frozen encoder's latents are stored."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from scripts.coca.model import CoCa, Outputs
from scripts.coca.perceiver import Perceiver
from scripts.coca.settings import EncoderSettings, ModelSettings
from scripts.common.errors import KilnError

ENCODER = ("dim", "latents", "depth", "transformer_depth", "heads", "mlp_ratio")


class SlideModel(nn.Module):
    """Slides and texts to latents and logits.

    Args:
        encoder: from tiles to the latents that `coca` sees; None where slides are given as such latents.
        coca: the model of images and texts.
    """

    def __init__(self, encoder: Perceiver | None, coca: CoCa):
        super().__init__()
        self.encoder, self.coca = encoder, coca

    def image_tokens(
        self, slides: Tensor, mask: Tensor | None = None, chunk: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What CoCa sees of slides, [B,N,image_dim] float32, and its mask, bool [B,N] or None.

        Args:
            slides: tiles [B,N,tile_dim] of any float type; without an encoder, its latents [B,latents,image_dim],
                without the one that stands for the slide.
            mask: bool [B,N], true where there is a tile.
            chunk: see `Perceiver.forward`.

        Raises:
            KilnError: they are of another width.
        """
        if self.encoder is not None:
            return self.encoder(slides, mask, chunk)[1], None
        width = self.coca.img_attn_pool.to_kv.in_features
        if slides.ndim != 3 or slides.shape[2] != width:
            raise KilnError(
                f"the model got latents of shape {list(slides.shape)}, expected [B, N, {width}]",
                "give latents of the slide encoder that it was trained with, by rule coca_encode_slides",
            )
        return slides.float(), mask

    def forward(self, ids: Tensor, slides: Tensor, mask: Tensor | None = None, captions: bool = True) -> Outputs:
        """Token ids [B,L] and slides as in `image_tokens` to what losses need; see `CoCa.forward`."""
        return self.coca(ids, *self.image_tokens(slides, mask), captions)


def encoder_shape(encoder: EncoderSettings) -> dict[str, int]:
    """The settings that decide the slide encoder's tensors."""
    return {name: getattr(encoder, name) for name in ENCODER}


def assemble(
    model: ModelSettings,
    encoder: Mapping[str, int],
    tile_dim: int | None,
    vocabulary: int,
    pad_id: int,
    temperature: float = 1.0,
) -> SlideModel:
    """A model with random weights; `tile_dim` None leaves the encoder, whose shape is `encoder`, out."""
    coca = CoCa(
        vocabulary, **model.model_dump(), image_dim=encoder["dim"], pad_id=pad_id, temperature=temperature
    )  # fmt: skip
    return SlideModel(None if tile_dim is None else Perceiver(tile_dim, **encoder), coca)


def build(
    model: ModelSettings,
    encoder: EncoderSettings,
    tile_dim: int,
    vocabulary: int,
    pad_id: int,
    seed: int,
    temperature: float = 1.0,
    weights: Path | None = None,
) -> SlideModel:
    """The model that training starts from, on the CPU; torch's global generator stays as it was.

    Args:
        tile_dim: width of the tiles; of no meaning with a frozen encoder, which is left out.
        vocabulary, pad_id: of the tokenizer.
        temperature: initial logarithm of the scale of similarities.
        weights: of a slide encoder that is trained further; the settings' own path is not looked at.

    Raises:
        KilnError: the weights are another encoder's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        frozen = encoder.is_frozen
        made = assemble(
            model, encoder_shape(encoder), None if frozen else tile_dim, vocabulary, pad_id, temperature
        )  # fmt: skip
    if weights is not None and made.encoder is not None:
        made.encoder.load_weights(weights)
    return made
