"""The `shapes` network: word embeddings in front of the shared transformer, and the fixed numbers of both."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from turboserve.kernels.packed import Rotation
from turboserve.model.dit import CausalVideoTransformer, TransformerConfig, Visible, init_weights
from turboserve.model.rotary import RotaryTable
from turboserve.model.shapes import vocabulary as v
from turboserve.model.shapes.codec import TOKEN_DIM
from turboserve.model.shapes.spec import TOKENS
from turboserve.model.shapes.start_map import START_DIM

CONFIG = TransformerConfig(
    layers=6,
    dim=192,
    heads=6,
    ffn_dim=768,
    patch_dim=TOKEN_DIM,
    text_dim=64,
    text_tokens=v.SLOT_COUNT,
    condition_dim=START_DIM,
    rope_theta=100.0,
    position_tokens=TOKENS,
)


class ShapesNetwork(nn.Module):
    """Predicts clean latents. Tokens in are [.., 36, TOKEN_DIM + START_DIM], out TOKEN_DIM; prompts [.., SLOT_COUNT]
    token ids.
    """

    def __init__(self, config: TransformerConfig = CONFIG) -> None:
        super().__init__()
        self.words = nn.Embedding(v.TOKEN_COUNT, config.text_dim)
        self.slots = nn.Parameter(torch.zeros(v.SLOT_COUNT, config.text_dim))
        self.transformer = CausalVideoTransformer(config)

    def text(self, prompt: Tensor) -> Tensor:
        """Text features [..., SLOT_COUNT, text_dim]."""
        return self.words(prompt) + self.slots

    def forward(
        self,
        tokens: Tensor,
        timestep: Tensor,
        prompt: Tensor,
        visible: Visible,
        rotations: Mapping[int, Rotation],
    ) -> Tensor:
        return self.transformer.forward_dense(tokens, timestep, self.text(prompt), visible, rotations)


def rotary_table(config: TransformerConfig = CONFIG) -> RotaryTable:
    return RotaryTable(config.head_dim, config.rope_theta, v.TOKENS_PER_SIDE, v.TOKENS_PER_SIDE)


def fresh_network(seed: int, config: TransformerConfig = CONFIG) -> ShapesNetwork:
    """Seeded random weights."""
    network = ShapesNetwork(config)
    init_weights(network.transformer, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        network.words.weight.normal_(0, 1, generator=generator)
        network.slots.normal_(0, 1, generator=generator)
    return network
