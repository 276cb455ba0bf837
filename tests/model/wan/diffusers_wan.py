"""diffusers' Wan transformer with our weights, and a way to give it a mask: what we are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from turboserve.model.weights import diffusers_state


def diffusers_transformer(ours, channels: int):
    """WanTransformer3DModel of our transformer's config, filled through the key maps."""
    from diffusers import WanTransformer3DModel

    c = ours.config
    theirs = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=c.heads,
        attention_head_dim=c.head_dim,
        in_channels=channels,
        out_channels=channels,
        text_dim=c.text_dim,
        freq_dim=c.freq_dim,
        ffn_dim=c.ffn_dim,
        num_layers=c.layers,
    ).eval()
    theirs.load_state_dict(diffusers_state(ours))
    return theirs


class MaskedAttention:
    """diffusers' self-attention with a mask, which its own processor has no way to take."""

    def __init__(self, mask):
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        def turned(x):
            pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
            angle = torch.complex(rotary_emb[0][..., 0::2].double(), rotary_emb[1][..., 1::2].double())
            return torch.view_as_real(pairs * angle).flatten(-2).float()

        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        q, k, v = (one.transpose(1, 2) for one in (turned(q), turned(k), v))
        y = F.scaled_dot_product_attention(q, k, v, self.mask).transpose(1, 2).flatten(2)
        return attn.to_out[0](y)
