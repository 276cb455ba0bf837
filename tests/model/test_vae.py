"""Streamed decoding against whole clips: Wan VAE against diffusers, light decoder against its parallel form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from turboserve.model.interface import state_bytes
from turboserve.model.key_maps import vae_from_diffusers
from turboserve.model.light_decoder import LightDecoder, LightDecoderConfig, MemoryBlock, TimeGrow
from turboserve.model.random_weights import fill_random
from turboserve.model.vae import VaeConfig, WanVaeDecoder, to_uint8

TINY = VaeConfig(
    latent_channels=4,
    base_channels=8,
    res_blocks=1,
    channel_factors=(2, 2, 2, 1),
    latent_mean=(0.1, -0.2, 0.3, 0.0),
    latent_std=(1.5, 0.7, 1.1, 2.0),
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def fresh_cache(decoder, height, width, dtype="float32"):
    fields = decoder.cache_fields(height, width, dtype)
    return {one.name: torch.zeros(one.shape, dtype=getattr(torch, one.dtype)) for one in fields}


def reference_vae(config: VaeConfig, seed: int):
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=config.base_channels,
        z_dim=config.latent_channels,
        dim_mult=list(config.channel_factors[::-1]),
        num_res_blocks=config.res_blocks,
        temperal_downsample=list(config.time_doubling[::-1]),
        latents_mean=list(config.latent_mean),
        latents_std=list(config.latent_std),
    ).eval()
    fill_random(vae, seed)
    return vae


def test_streamed_wan_vae_equals_diffusers_on_the_whole_clip():
    theirs = reference_vae(TINY, 1)
    ours = WanVaeDecoder(TINY).eval()
    rename, named = vae_from_diffusers(TINY.res_blocks), ours.state_dict()
    given = {rename(key): one for key, one in theirs.state_dict().items()}
    assert {key for key in given if key not in named} == {
        key for key in given if key.startswith(("encoder.", "conv1."))
    }
    ours.load_state_dict({key: given[key] for key in named})
    latents = torch.randn(7, 4, 6, 8, generator=torch.Generator().manual_seed(2))
    mean, std = torch.tensor(TINY.latent_mean), torch.tensor(TINY.latent_std)
    with torch.no_grad():
        denormalised = latents * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
        expected = theirs.decode(denormalised.transpose(0, 1)[None]).sample[0].transpose(0, 1)
    assert expected.abs().max() <= 1 and (expected.abs() < 1).float().mean() > 0.5  # not all clamped away

    cache = fresh_cache(ours, 6, 8)
    chunks = [ours.decode(latents[:3], cache, True)]
    assert chunks[0].shape == (9, 3, 48, 64)
    chunks += [ours.decode(latents[at : at + 2], cache, False) for at in (3, 5)]
    assert chunks[1].shape[0] == 8
    streamed = torch.cat(chunks) * 2 - 1
    assert streamed.shape == expected.shape
    assert (streamed - expected).abs().max() <= 1e-5


def test_a_first_frame_leaves_the_doubling_convolutions_untouched():
    ours = WanVaeDecoder(TINY).eval()
    fill_random(ours, 3)
    cache = fresh_cache(ours, 2, 2)
    latents = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(4))
    ours.decode(latents[:1], cache, True)
    untouched = {name for name, one in cache.items() if not one.any()}
    assert len(untouched) == sum(TINY.time_doubling)
    # Its one frame stands in the newer half of all others; the half before it is the padding in front of a clip.
    for name in cache.keys() - untouched:
        assert not cache[name][:, 0].any() and cache[name][:, 1].any()
    ours.decode(latents[1:], cache, False)
    assert all(one.any() for one in cache.values())


def test_cache_of_the_published_vae_is_as_large_as_measured():
    with torch.device("meta"):
        fields = WanVaeDecoder().cache_fields(60, 104, "bfloat16")
        light = LightDecoder().cache_fields(60, 104, "bfloat16")
    assert len(fields) == 32
    assert fields[0].shape == (16, 2, 60, 104)
    assert fields[-1].shape == (96, 2, 480, 832)
    assert state_bytes(fields) == 1_888_573_440
    assert len(light) == 9
    assert state_bytes(light) == 67_092_480


def test_the_published_shape_is_that_of_diffusers_defaults():
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        theirs, ours = AutoencoderKLWan(), WanVaeDecoder()
    rename = vae_from_diffusers(ours.config.res_blocks)
    shapes = {rename(key): one.shape for key, one in theirs.state_dict().items()}
    assert {key: one.shape for key, one in ours.state_dict().items()}.items() <= shapes.items()


def parallel(decoder: LightDecoder, latents: torch.Tensor) -> torch.Tensor:
    """The whole clip at once, layer by layer: memory is the clip moved on by one frame."""
    x = latents
    for layer in decoder.decoder:
        if isinstance(layer, MemoryBlock):
            past = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]
            x = torch.relu(layer.conv(torch.cat([x, past], 1)) + x)
        elif isinstance(layer, TimeGrow):
            x = layer.conv(x).reshape(-1, layer.width, *x.shape[2:])
        else:
            x = layer(x)
    if decoder.config.patch > 1:
        x = F.pixel_shuffle(x, decoder.config.patch)
    return x[decoder.config.time_factor - 1 :].clamp(0, 1)


@pytest.mark.parametrize("patch", [1, 2])
def test_light_decoder_streamed_equals_parallel(patch):
    decoder = LightDecoder(LightDecoderConfig(latent_channels=4, widths=(16, 12, 8, 8), patch=patch)).eval()
    fill_random(decoder, 5)
    latents = torch.randn(6, 4, 5, 3, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = parallel(decoder, latents)
    assert expected.std() > 0.05
    cache = fresh_cache(decoder, 5, 3)
    streamed = torch.cat([decoder.decode(latents[a:b], cache, a == 0) for a, b in ((0, 3), (3, 5), (5, 6))])
    assert streamed.shape == expected.shape == (21, 3, 40 * patch, 24 * patch)
    assert (streamed - expected).abs().max() <= 1e-5


def test_frames_are_rounded_bytes():
    pixels = torch.tensor([0.0, 0.5, 0.999, 1.2, -1.0, 1 / 255]).view(1, 3, 1, 2)
    frames = to_uint8(pixels)
    assert frames.dtype == torch.uint8 and frames.shape == (1, 1, 2, 3)
    assert frames.flatten().tolist() == [0, 255, 0, 128, 255, 1]
