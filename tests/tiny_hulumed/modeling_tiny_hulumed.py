"""A tiny model that is called like Hulu-Med: the same arguments, module names, assertions and omissions."""

import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen3ForCausalLM, Qwen3Model
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_tiny_hulumed import TinyHulumedConfig


def patch_positions(grid_sizes, merge_sizes):
    """Row and column [patches, 2] of each patch; the patches of a merged square follow each other."""
    found = []
    for (frames, rows, columns), merge in zip(grid_sizes.tolist(), merge_sizes.tolist(), strict=True):
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places = torch.stack([row, column], -1).view(rows // merge, merge, columns // merge, merge, 2)
        found.append(places.transpose(1, 2).reshape(-1, 2).repeat(frames, 1))
    return torch.cat(found).to(grid_sizes.device)


def rotate(states, positions):
    """Rotary embedding of `states` [heads, patches, size]: a half of the pairs by row, a half by column."""
    pairs = states.shape[-1] // 4
    speeds = 100.0 ** (-torch.arange(pairs, device=states.device) / pairs)
    angles = (positions[:, :, None] * speeds).flatten(1)
    first, second = states.float().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(states.dtype)


class VisionAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, states, mask, positions):
        query, key, value = (
            layer(states).view(len(states), self.heads, -1).transpose(0, 1)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, positions), rotate(key, positions)
        seen = functional.scaled_dot_product_attention(query[None], key[None], value[None], mask[None])[0]
        return self.out_proj(seen.transpose(0, 1).reshape(len(states), -1))


class VisionMlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, states):
        return self.fc2(functional.gelu(self.fc1(states), approximate="tanh"))


class VisionLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn, self.mlp = VisionAttention(width, heads), VisionMlp(width)

    def forward(self, states, mask, positions):
        states = states + self.self_attn(self.layer_norm1(states), mask, positions)
        return states + self.mlp(self.layer_norm2(states))


class VisionEncoder(nn.Module):
    """Flat patches [N, 3 * 14 * 14] of pictures of any shape to features [N / merge^2, width]."""

    def __init__(self, config):
        super().__init__()
        width, side = config.vision_width, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, side, side)
        self.layers = nn.ModuleList([VisionLayer(width, config.vision_heads) for _ in range(config.vision_depth)])
        self.post_layernorm = nn.LayerNorm(width)

    def forward(self, pixel_values, grid_sizes, merge_sizes):
        side = self.patch_embedding.kernel_size[0]
        states = self.patch_embedding(pixel_values.view(-1, 3, side, side)).flatten(1)
        sizes = grid_sizes.prod(1)
        picture = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
        mask = picture[:, None] == picture[None]
        positions = patch_positions(grid_sizes, merge_sizes)
        for layer in self.layers:
            states = layer(states, mask, positions)
        parts = self.post_layernorm(states).split(sizes.tolist())
        merged = [
            part.view(-1, merge**2, part.shape[-1]).mean(1)
            for part, merge in zip(parts, merge_sizes.tolist(), strict=True)
        ]
        return torch.cat(merged)


class Projector(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.readout = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, features):
        return self.readout(features)


class TinyHulumedModel(Qwen3Model):
    config_class = TinyHulumedConfig

    def __init__(self, config):
        super().__init__(config)
        self.vision_encoder = VisionEncoder(config)
        self.mm_projector = Projector(config.vision_width, config.hidden_size)
        self.post_init()


class TinyHulumedForCausalLM(Qwen3ForCausalLM):
    config_class = TinyHulumedConfig

    def __init__(self, config):
        super(Qwen3ForCausalLM, self).__init__(config)
        self.model = TinyHulumedModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, attention_mask, labels, pixel_values, grid_sizes, merge_sizes, modals
    ):
        if pixel_values is None or input_ids.shape[1] == 1:
            return input_ids, attention_mask, None, labels
        batch = len(input_ids)
        flat = input_ids.view(-1)
        counts = grid_sizes.prod(1).div(merge_sizes**2).long()
        features = self.model.vision_encoder(
            pixel_values=pixel_values, grid_sizes=grid_sizes, merge_sizes=merge_sizes
        )  # fmt: skip
        features = self.model.mm_projector(features)
        kept = [torch.full((int(n),), modal != "text") for n, modal in zip(counts, modals)]  # noqa: B905
        features = features[torch.cat(kept).to(features.device)]
        if self.config.use_token_compression:
            assert batch == 1, "Token compression is only supported for batch_size=1"
        embeds = self.model.embed_tokens(flat).clone()
        shown = flat == self.config.image_token_index
        embeds[shown] = embeds[shown] * 0.0 + features
        return None, attention_mask, embeds.view(batch, -1, embeds.shape[-1]), labels

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
        cache_position=None,
        num_logits_to_keep=0,
        pixel_values=None,
        grid_sizes=None,
        merge_sizes=None,
        modals=None,
        **loss_kwargs,
    ):
        if inputs_embeds is None:
            input_ids, attention_mask, inputs_embeds, labels = self.prepare_inputs_labels_for_multimodal(
                input_ids, attention_mask, labels, pixel_values, grid_sizes, merge_sizes, modals
            )
        optional = {
            "cache_position": cache_position,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{name: value for name, value in optional.items() if value is not None},
        )
        states, loss = outputs[0], None
        if labels is None:
            logits = self.lm_head(states[:, -num_logits_to_keep:])
        else:  # logits of the learned tokens alone, in one row
            learned = labels[:, 1:] != -100
            logits = self.lm_head(states[:, :-1][learned])
            items = loss_kwargs.get("num_items_in_batch")
            loss = functional.cross_entropy(logits, labels[:, 1:][learned], reduction="sum" if items else "mean")
            loss = loss / items if items else loss
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def generate(self, pixel_values=None, grid_sizes=None, merge_sizes=None, modals=None, **kwargs):
        """New tokens only: the prompt is handed over as embeddings."""
        input_ids, attention_mask = kwargs.pop("input_ids"), kwargs.pop("attention_mask", None)
        if "inputs_embeds" in kwargs:
            raise NotImplementedError("`inputs_embeds` is not supported")
        if pixel_values is None:
            embeds = self.model.embed_tokens(input_ids)
        else:
            _, attention_mask, embeds, _ = self.prepare_inputs_labels_for_multimodal(
                input_ids, attention_mask, None, pixel_values, grid_sizes, merge_sizes, modals
            )
        return super().generate(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)
