"""Names of the same weights in the layouts that checkpoints come in. Ours are those of original Wan checkpoints.

Pure functions from key to key, each with its inverse. A key that a map does not know is returned as it is: whoever
loads then names it as unexpected.
"""

from __future__ import annotations

import re
from collections.abc import Callable

KeyMap = Callable[[str], str]

_ATTENTION = (
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("o", "to_out.0"),
    ("norm_q", "norm_q"),
    ("norm_k", "norm_k"),
)
_IN_BLOCK = {
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION},
    # The norm before cross-attention is Wan's third and diffusers' second; the others have no weights.
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_TOP = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_RES_BLOCK = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_VAE_TOP = {
    "conv2": "post_quant_conv",
    "conv1": "quant_conv",
    "decoder.conv1": "decoder.conv_in",
    "decoder.head.0": "decoder.norm_out",
    "decoder.head.2": "decoder.conv_out",
}
_PARAMETERS = (".weight", ".bias", ".gamma", "")


def _split(key: str) -> tuple[str, str]:
    """(module, parameter with its dot); the parameter is empty for a bare tensor."""
    suffix = next(one for one in _PARAMETERS if key.endswith(one))
    return key[: len(key) - len(suffix)] if suffix else key, suffix


def _inverse(table: dict[str, str]) -> dict[str, str]:
    return {theirs: ours for ours, theirs in table.items()}


def _in_blocks(key: str, in_block: dict[str, str], top: dict[str, str]) -> str:
    module, parameter = _split(key)
    found = re.fullmatch(r"(blocks\.\d+\.)(.+)", module)
    if found:
        return found[1] + in_block.get(found[2], found[2]) + parameter
    return top.get(module, module) + parameter


def transformer_from_diffusers(key: str) -> str:
    """diffusers' WanTransformer3DModel -> original Wan."""
    return _in_blocks(key, _inverse(_IN_BLOCK), _inverse(_TOP))


def transformer_to_diffusers(key: str) -> str:
    """Original Wan -> diffusers' WanTransformer3DModel."""
    return _in_blocks(key, _IN_BLOCK, _TOP)


# Wrappers that training code leaves in the names: FSDP's and torch.compile's anywhere, others in front.
_WRAPPERS_WITHIN = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_WRAPPERS_IN_FRONT = ("module.", "generator.", "model.diffusion_model.", "diffusion_model.", "model.")


def strip_wrappers(key: str) -> str:
    """A key without what training wrappers put in front of or into it."""
    for one in _WRAPPERS_WITHIN:
        key = key.replace(one, "")
    stripped = True
    while stripped:
        stripped = False
        for one in _WRAPPERS_IN_FRONT:
            if key.startswith(one):
                key, stripped = key.removeprefix(one), True
    return key


def vae_from_diffusers(res_blocks: int) -> KeyMap:
    """diffusers' AutoencoderKLWan -> original Wan VAE; `res_blocks` as in the config (a stage has one more)."""
    per_stage = res_blocks + 2
    in_res, top = _inverse(_RES_BLOCK), _inverse(_VAE_TOP)

    def rename(key: str) -> str:
        module, parameter = _split(key)
        found = re.fullmatch(r"decoder\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)", module)
        if found:
            place = 2 * int(found[2]) + (found[1] == "attentions")
            return f"decoder.middle.{place}.{in_res.get(found[3], found[3])}{parameter}"
        found = re.fullmatch(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", module)
        if found:
            within = int(found[3]) if found[2] == "resnets" else res_blocks + 1
            return f"decoder.upsamples.{int(found[1]) * per_stage + within}.{in_res.get(found[4], found[4])}{parameter}"
        return top.get(module, module) + parameter

    return rename


def vae_to_diffusers(res_blocks: int) -> KeyMap:
    """The inverse of `vae_from_diffusers`."""
    per_stage = res_blocks + 2

    def rename(key: str) -> str:
        module, parameter = _split(key)
        found = re.fullmatch(r"decoder\.(middle|upsamples)\.(\d+)\.(.+)", module)
        if not found:
            return _VAE_TOP.get(module, module) + parameter
        place, rest = int(found[2]), _RES_BLOCK.get(found[3], found[3])
        if found[1] == "middle":
            kind, index = ("attentions", 0) if place == 1 else ("resnets", place // 2)
            return f"decoder.mid_block.{kind}.{index}.{rest}{parameter}"
        stage, within = divmod(place, per_stage)
        kind, index = ("upsamplers", 0) if within == res_blocks + 1 else ("resnets", within)
        return f"decoder.up_blocks.{stage}.{kind}.{index}.{rest}{parameter}"

    return rename


_T5_IN_BLOCK = {
    "norm1": "layer.0.layer_norm",
    **{f"attn.{one}": f"layer.0.SelfAttention.{one}" for one in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


def t5_to_transformers(key: str) -> str:
    """Original Wan text encoder (`models_t5_umt5-xxl-enc-bf16.pth`) -> transformers' UMT5EncoderModel."""
    module, parameter = _split(key)
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if found:
        return f"encoder.block.{found[1]}.{_T5_IN_BLOCK.get(found[2], found[2])}{parameter}"
    return {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}.get(module, module) + parameter


def t5_from_transformers(key: str) -> str:
    """The inverse of `t5_to_transformers`."""
    module, parameter = _split(key)
    found = re.fullmatch(r"encoder\.block\.(\d+)\.(.+)", module)
    if found:
        return f"blocks.{found[1]}.{_inverse(_T5_IN_BLOCK).get(found[2], found[2])}{parameter}"
    return {"shared": "token_embedding", "encoder.final_layer_norm": "norm"}.get(module, module) + parameter
