"""CoCa: one text decoder whose first half embeds the text alone and whose second half reads the image.

Source: Yu et al., CoCa: Contrastive Captioners are Image-Text Foundation Models, 2022, https://arxiv.org/abs/2205.01917.
The state dict is that of package CoCa-pytorch. It differs from that package where it must: padded image tokens can be
masked, and the text's CLS token follows the text itself and not its padding.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from scripts.coca.layers import CrossAttention, Keys, LayerNorm, ParallelBlock, Residual, Rotary


class Outputs(NamedTuple):
    """What losses are made of.

    Attributes:
        text_latents, image_latents: [B,dim_latents] float32, of unit length.
        logits: [B,L,num_tokens], position t predicting token t + 1; None where they were not asked for.
    """

    text_latents: Tensor
    image_latents: Tensor
    logits: Tensor | None


class Cache(NamedTuple):
    """What generation keeps between steps.

    Attributes:
        unimodal, multimodal: [layers,2,B,1,max_len,dim_head], keys and values of the text so far.
        image: keys and values [B,1,Q,dim_head] of the image, by multimodal layer.
    """

    unimodal: Tensor
    multimodal: Tensor
    image: list[Keys]


class EmbedToLatents(nn.Module):
    """[B,dim] to [B,dim_latents] float32 of unit length."""

    def __init__(self, dim: int, dim_latents: int):
        super().__init__()
        self.to_latents = nn.Linear(dim, dim_latents, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.to_latents(x).float(), dim=-1)


class CoCa(nn.Module):
    """Image tokens and texts to latents of one contrastive space, and to logits of the text's next token.

    Texts are token ids [B,L], int64, padded at the end with `pad_id`. What is returned for padding is of no use.

    Args:
        num_tokens: size of the vocabulary.
        dim: width of the text layers.
        unimodal_depth, multimodal_depth: layers before and after the image is seen.
        dim_latents: width of the contrastive space.
        image_dim: width of the image tokens.
        image_queries: vectors that the attention pooler gives to the multimodal layers.
        dim_head, heads, ff_mult: width and count of query heads, and width of the SwiGLU part by `dim`.
        temperature: initial logarithm of the scale of similarities.
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int = 1024,
        unimodal_depth: int = 6,
        multimodal_depth: int = 6,
        dim_latents: int = 5120,
        image_dim: int = 1280,
        image_queries: int = 256,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        pad_id: int = 0,
        temperature: float = 1.0,
    ):
        super().__init__()
        self.pad_id, self.dim_head = pad_id, dim_head
        self.token_emb = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        self.text_cls_token = nn.Parameter(torch.randn(dim))
        self.img_queries = nn.Parameter(torch.randn(image_queries + 1, dim))
        self.img_attn_pool = CrossAttention(dim, image_dim, dim_head, heads, norm_context=True)
        self.img_attn_pool_norm, self.text_cls_norm = LayerNorm(dim), LayerNorm(dim)
        self.img_to_latents, self.text_to_latents = (EmbedToLatents(dim, dim_latents) for _ in range(2))
        self.temperature = nn.Parameter(torch.tensor([temperature]))

        def block() -> Residual:
            return Residual(ParallelBlock(dim, dim_head, heads, ff_mult))

        def cross() -> Residual:
            return Residual(CrossAttention(dim, dim, dim_head, heads, ff_mult))

        self.unimodal_layers = nn.ModuleList(block() for _ in range(unimodal_depth))
        self.multimodal_layers = nn.ModuleList(nn.ModuleList([block(), cross()]) for _ in range(multimodal_depth))
        self.to_logits = nn.Sequential(LayerNorm(dim), nn.Linear(dim, num_tokens, bias=False))
        self.to_logits[1].weight = self.token_emb.weight

    def _rotary(self, positions: Tensor) -> Rotary:
        return self.unimodal_layers[0].fn.rotary_emb(positions)  # all layers hold the same rates

    def embed_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Text embeddings [B,dim] and tokens [B,L,dim] of ids [B,L], which no amount of padding changes.

        The CLS token, which sees all of the text, takes the place after the text's last token. CoCa-pytorch puts it
        after the padding, whose amount then decides its position and so the embedding.
        """
        places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        lengths = ((ids != self.pad_id) * places).amax(dim=1)
        is_cls = (torch.arange(ids.shape[1] + 1, device=ids.device) == lengths[:, None])[..., None]
        x = torch.where(is_cls, self.text_cls_token, pad(self.token_emb(ids), (0, 0, 0, 1)))
        rotary = self._rotary(torch.arange(x.shape[1], device=x.device))
        for layer in self.unimodal_layers:
            x = layer(x, rotary)
        cls = x[torch.arange(len(x), device=x.device), lengths]
        return self.text_cls_norm(cls), x[:, :-1]

    def embed_image(self, image_tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Image embeddings [B,dim] and what the multimodal layers see, [B,image_queries,dim].

        Args:
            image_tokens: [B,N,image_dim].
            mask: bool [B,N], true where a token counts, at least once per row; None: all count.
        """
        pool = self.img_attn_pool
        pooled = self.img_attn_pool_norm(pool(self.img_queries[None], pool.keys(image_tokens), mask))
        return pooled[:, 0], pooled[:, 1:].contiguous()

    def latents(self, text_embed: Tensor, image_embed: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [B,dim] of texts and images to latents [B,dim_latents], float32 of unit length."""
        return self.text_to_latents(text_embed), self.img_to_latents(image_embed)

    def logits(self, tokens: Tensor, pooled: Tensor) -> Tensor:
        """Tokens [B,L,dim] of `embed_text` and the image of `embed_image` to logits [B,L,num_tokens]."""
        rotary = self._rotary(torch.arange(tokens.shape[1], device=tokens.device))
        for block, cross in self.multimodal_layers:
            tokens = block(tokens, rotary)
            tokens = cross(tokens, cross.fn.keys(pooled))
        return self.to_logits(tokens)

    def forward(self, ids: Tensor, image_tokens: Tensor, mask: Tensor | None = None, captions: bool = True) -> Outputs:
        """Everything that losses need; without `captions` the multimodal half is left out."""
        text_embed, tokens = self.embed_text(ids)
        image_embed, pooled = self.embed_image(image_tokens, mask)
        return Outputs(*self.latents(text_embed, image_embed), self.logits(tokens, pooled) if captions else None)

    def start_cache(self, pooled: Tensor, max_len: int) -> Cache:
        """An empty cache for texts of at most `max_len` tokens on the images of `embed_image` [B,Q,dim]."""
        shape = (2, len(pooled), 1, max_len, self.dim_head)
        unimodal, multimodal = (
            pooled.new_zeros(len(layers), *shape) for layers in (self.unimodal_layers, self.multimodal_layers)
        )
        return Cache(unimodal, multimodal, [cross.fn.keys(pooled) for _, cross in self.multimodal_layers])

    def step(self, ids: Tensor, position: int, cache: Cache) -> Tensor:
        """Logits [B,num_tokens] after the token ids [B,1] at `position`, counted from 0; the cache takes them in.

        Positions are given one after the other. Results are those of `logits` on the whole text.
        """
        x = self.token_emb(ids)
        rotary = self._rotary(torch.tensor([position], device=x.device))
        for layer, own in zip(self.unimodal_layers, cache.unimodal, strict=True):
            x = x + layer.fn.step(x, rotary, position, own)
        for (block, cross), own, keys in zip(self.multimodal_layers, cache.multimodal, cache.image, strict=True):
            x = x + block.fn.step(x, rotary, position, own)
            x = cross(x, keys)
        return self.to_logits(x)[:, 0]
