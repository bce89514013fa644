"""Layers of CoCa in the layout of CoCa-pytorch, whose names of parameters and buffers they keep.

Attention has one head of keys and values for all query heads (Shazeer 2019, https://arxiv.org/abs/1911.02150), runs
beside the feed-forward part and not before it (GPT-J, PaLM: https://arxiv.org/abs/2204.02311), and turns queries and
keys by their position (Su et al. 2021, https://arxiv.org/abs/2104.09864). Feed-forward parts are SwiGLU (Shazeer 2020,
https://arxiv.org/abs/2002.05202). No layer has biases.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, scaled_dot_product_attention, silu

Rotary = tuple[Tensor, Tensor]
Keys = tuple[Tensor, Tensor]


class LayerNorm(nn.Module):
    """Layer norm over the last dimension with a learnt scale `gamma`; `beta` is a buffer of zeros, as published."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.gamma, self.beta)


class RotaryEmbedding(nn.Module):
    """Rates of the rotary embedding, 10000**(-2i/dim), as buffer `inv_freq` [dim/2]."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, dim, 2).float() / dim))

    def forward(self, positions: Tensor) -> Rotary:
        """Cosines and sines [L,1,dim/2] of integer positions [L], for `rotate`."""
        angles = positions[:, None, None].float() * self.inv_freq.float()
        return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """[B,L,H,dim] with the pairs (i, i + dim/2) turned by the angles of each position."""
    cos, sin = (one.to(x.dtype) for one in rotary)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _SplitLinear(torch.autograd.Function):
    """See `split_linear`. Autograd's own graph would put the weight's gradient together from that of each part."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, first: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.first = first
        return linear(x, weight[:first]), linear(x, weight[first:])

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        rows, first = x.flatten(0, -2), ctx.first
        head, rest = (one.flatten(0, -2) for one in grads)
        wanted, grad_x, grad_weight = ctx.needs_input_grad, None, None
        if wanted[0]:
            grad_x = torch.addmm(head @ weight[:first], rest, weight[first:]).view_as(x)
        if wanted[1]:
            grad_weight = torch.empty_like(weight)  # each product is written where it belongs, without a copy
            torch.mm(head.T, rows, out=grad_weight[:first])
            torch.mm(rest.T, rows, out=grad_weight[first:])
        return grad_x, grad_weight, None


def split_linear(x: Tensor, weight: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """linear(x, weight) of x [..., D] and weight [F,D], its `first` features apart from the rest; follows autocast."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return _SplitLinear.apply(x.to(dtype), weight.to(dtype), first)


class _GatedLinear(torch.autograd.Function):
    """See `gated_linear`. Autograd's own graph would keep two more tensors of half the input's size."""

    @staticmethod
    def forward(ctx, inner: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inner, weight)
        x, gate = inner.chunk(2, dim=-1)
        return linear(silu(gate).mul_(x), weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        inner, weight = ctx.saved_tensors
        x, gate = inner.chunk(2, dim=-1)
        opened = silu(gate)
        wanted, grad_inner, grad_weight = ctx.needs_input_grad, None, None
        if wanted[1]:
            grad_weight = grad.flatten(0, -2).T @ (opened * x).flatten(0, -2)
        if wanted[0]:
            product = grad @ weight
            grad_inner = torch.empty_like(inner)
            by_x, by_gate = grad_inner.chunk(2, dim=-1)  # written in place: a copy would cost as much as a product
            by_x.copy_(product).mul_(opened)
            torch.ops.aten.silu_backward.grad_input(product.mul_(x), gate, grad_input=by_gate)
        return grad_inner, grad_weight


def gated_linear(inner: Tensor, weight: Tensor) -> Tensor:
    """linear(silu(gate) * x, weight) of inner [..., 2F], x before gate, and weight [D,F]: [..., D] in inner's dtype.

    For the backward pass only `inner` is kept.
    """
    return _GatedLinear.apply(inner, weight.to(inner.dtype))


class Residual(nn.Module):
    """A layer `fn` whose result its caller adds to the input; it holds the level `fn` of the published names."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *args: Tensor | Rotary | Keys | None) -> Tensor:
        return x + self.fn(x, *args)


class ParallelBlock(nn.Module):
    """Causal self-attention and SwiGLU side by side, of the same normed input: [B,L,dim] to the same."""

    def __init__(self, dim: int, dim_head: int, heads: int, ff_mult: int):
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        self.norm = LayerNorm(dim)
        self.rotary_emb = RotaryEmbedding(dim_head)
        self.attention = (heads + 2) * dim_head
        self.fused_attn_ff_proj = nn.Linear(dim, self.attention + 2 * ff_mult * dim, bias=False)
        self.attn_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff_out = nn.Sequential(nn.Identity(), nn.Linear(ff_mult * dim, dim, bias=False))

    def _project(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and the key, turned, [B,L,heads+1,dim_head]; values [B,L,dim_head]; the input of the SwiGLU."""
        attention, inner = split_linear(self.norm(x), self.fused_attn_ff_proj.weight, self.attention)
        heads = attention.unflatten(-1, (-1, self.dim_head))
        return rotate(heads[:, :, :-1], rotary), heads[:, :, -1], inner

    def _out(self, attended: Tensor, inner: Tensor) -> Tensor:
        return self.attn_out(attended) + gated_linear(inner, self.ff_out[1].weight)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """What is to be added to x [B,L,dim]; each position sees those up to itself."""
        turned, value, inner = self._project(x, rotary)
        query, key = turned.transpose(1, 2).split((self.heads, 1), dim=1)
        value = value[:, None].expand(-1, self.heads, -1, -1)
        attended = scaled_dot_product_attention(query, key.expand_as(query), value, is_causal=True)
        return self._out(attended.transpose(1, 2).flatten(2), inner)

    def step(self, x: Tensor, rotary: Rotary, position: int, cache: Tensor) -> Tensor:
        """`forward` for the one position [B,1,dim]; cache [2,B,1,max_len,dim_head] holds keys and values before it."""
        turned, value, inner = self._project(x, rotary)
        query, key = turned.split((self.heads, 1), dim=2)
        cache[0, :, :, position], cache[1, :, :, position] = key[:, 0], value
        keys, values = cache[:, :, :, : position + 1].to(query.dtype)
        return self._out(scaled_dot_product_attention(query, keys, values).flatten(2), inner)


class CrossAttention(nn.Module):
    """Attention from x [B,Q,dim] to a context [B,N,context_dim], with a SwiGLU part beside it or without one."""

    def __init__(
        self,
        dim: int,
        context_dim: int,
        dim_head: int,
        heads: int,
        ff_mult: int | None = None,
        norm_context: bool = False,
    ):
        super().__init__()
        self.dim_head = dim_head
        self.norm = LayerNorm(dim)
        self.context_norm = LayerNorm(context_dim) if norm_context else nn.Identity()
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(context_dim, 2 * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)
        self.ff = None
        if ff_mult is not None:
            first = nn.Linear(dim, 2 * ff_mult * dim, bias=False)
            self.ff = nn.Sequential(first, nn.Identity(), nn.Linear(ff_mult * dim, dim, bias=False))

    def keys(self, context: Tensor) -> Keys:
        """Keys and values [B,1,N,dim_head] of a context [B,N,context_dim]."""
        key, value = self.to_kv(self.context_norm(context))[:, None].chunk(2, dim=-1)
        return key, value

    def forward(self, x: Tensor, keys: Keys, mask: Tensor | None = None) -> Tensor:
        """What attention gives x [B or 1,Q,dim], plus the SwiGLU part: [B,Q,dim].

        Args:
            keys: of `keys`.
            mask: bool [B,N], true where the context counts, at least once per row; None: everywhere.
        """
        x = self.norm(x)
        # with one head of keys, heads are as good as further queries, and nothing has to be moved
        query = self.to_q(x).unflatten(-1, (-1, self.dim_head)).flatten(1, 2)[:, None]
        query = query.expand(len(keys[0]), -1, -1, -1)
        mask = None if mask is None else mask[:, None, None]
        attended = scaled_dot_product_attention(query, *keys, attn_mask=mask)
        out = self.to_out(attended[:, 0].unflatten(1, (x.shape[1], -1)).flatten(2))
        return out if self.ff is None else out + gated_linear(self.ff[0](x), self.ff[2].weight)
