"""Attention cases of `turboserve bench kernels`, and the attention a user would pick otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from turboserve.bench.kernel_case import Case, Work, error_of
from turboserve.kernels import reference


def attention_cases(
    device: torch.device, dtype: torch.dtype, heads: int, dim: int, rows: int, kv: int, n: int, *, ragged: bool
) -> Iterator[Case]:
    generator = torch.Generator(device=device).manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    kv_lens = [max(1, kv * (i + 1) // n) if ragged else kv for i in range(n)]
    q, k, v = rand(n * rows, heads, dim), rand(n, kv, heads, dim), rand(n, kv, heads, dim)
    bounds = np.arange(n + 1) * rows
    slots = np.arange(n)
    flop = sum(4.0 * rows * length * heads * dim for length in kv_lens)
    # A few rows of every segment are checked: scores of all rows in float32 would not fit.
    few = min(rows, 64)
    picked = torch.cat([torch.arange(i * rows, i * rows + few) for i in range(n)]).to(device)

    def error(work: Callable[[], Tensor]) -> float:
        want = reference.attn_varlen_slot(
            q[picked], k, v, torch.arange(n + 1) * few, torch.from_numpy(slots), torch.tensor(kv_lens)
        )
        return error_of(work().view_as(q)[picked], want)

    contenders = _own_attention(q, k, v, bounds, slots, kv_lens)
    baselines, skipped = _attention_baselines(q, k, v, rows, kv_lens, ragged=ragged)
    kind = "ragged" if ragged else "equal"
    for name, ours in contenders.items():
        yield Case(
            name=f"attention/{kind}/{name}",
            shape=f"{n} x {rows} rows, {kv_lens[0]}..{kv_lens[-1]} keys, {heads} x {dim}",
            dtype=dtype,
            floor="matmul",
            work=flop,
            ours=ours,
            baselines=baselines,
            error=lambda ours=ours: error(ours),
            skipped=skipped,
        )


def _own_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: np.ndarray, slots: np.ndarray, kv_lens: list[int]
) -> dict[str, Work]:
    if not q.is_cuda:
        from turboserve.kernels.packed_torch import attend

        def by_segment() -> Tensor:
            parts = [
                attend(q[bounds[i] : bounds[i + 1]], k[i, :length], v[i, :length]) for i, length in enumerate(kv_lens)
            ]
            return torch.cat(parts)

        return {"torch": by_segment}
    from turboserve.kernels import attention

    major, minor = torch.cuda.get_device_capability(q.device)
    config = attention.tile_config(10 * major + minor, q.shape[-1], q.dtype)

    def work_list(block_m: int) -> Tensor:
        return torch.from_numpy(attention.work_list(bounds, slots, np.array(kv_lens), block_m)).to(q.device)

    places = torch.from_numpy(np.stack([slots, slots], 1)).to(q.device) * (k.stride(0) * k.element_size() // 16)
    work = work_list(config.block_m)
    found: dict[str, Work] = {
        "triton": lambda: attention.attn_varlen_placed(q, k[0], v[0], places, work, config),
    }
    if (major, minor) == (9, 0):
        from turboserve.kernels import attention_hopper

        hopper_work = work_list(attention_hopper.BLOCK_M)
        found["gluon"] = lambda: attention_hopper.attn_varlen_hopper(q, k[0], v[0], places, hopper_work)
    return found


def _attention_baselines(
    q: Tensor, k: Tensor, v: Tensor, rows: int, kv_lens: list[int], *, ragged: bool
) -> tuple[dict[str, Work], dict[str, str]]:
    n = len(kv_lens)
    found: dict[str, Work] = {}
    skipped: dict[str, str] = {}
    if not q.is_cuda:

        def naive() -> Tensor:
            parts = []
            for i, length in enumerate(kv_lens):
                one = q[i * rows : (i + 1) * rows].transpose(0, 1)
                keys, values = k[i, :length].transpose(0, 1), v[i, :length].transpose(0, 1)
                weights = (one @ keys.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
                parts.append((weights @ values).transpose(0, 1))
            return torch.cat(parts)

        return {"naive torch": naive}, skipped
    if not ragged:
        dense = [one.transpose(1, 2) for one in (q.view(n, rows, *q.shape[1:]), k, v)]
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def cudnn() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(*dense)

        _keep_if_runs("torch SDPA, cuDNN", cudnn, found, skipped)
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention)
        _keep_if_runs("FlexAttention", lambda: compiled(*dense), found, skipped)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        skipped["torch varlen_attn"] = str(error)
        return found, skipped
    cu_q = torch.arange(n + 1, device=q.device, dtype=torch.int32) * rows
    cu_k = torch.tensor([0, *np.cumsum(kv_lens)], device=q.device, dtype=torch.int32)
    keys, values = (torch.cat([one[i, :length] for i, length in enumerate(kv_lens)]) for one in (k, v))
    _keep_if_runs(
        "torch varlen_attn",
        lambda: varlen_attn(q, keys, values, cu_q, cu_k, rows, max(kv_lens)),
        found,
        skipped,
    )
    return found, skipped


def _keep_if_runs(name: str, work: Work, found: dict[str, Work], skipped: dict[str, str]) -> None:
    """A baseline that this device or this torch lacks is named with its reason, not left out in silence."""
    try:
        work()
        found[name] = work
    except (RuntimeError, NotImplementedError, TypeError) as error:
        skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
