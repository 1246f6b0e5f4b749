# SPDX-License-Identifier: Apache-2.0
"""What goes into a float8 KV cache, worked out by hand, and the calls that are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import opmux
from opmux.kernel import FLOATS
from opmux.op import find

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SLOTS = torch.tensor([3, 0], dtype=torch.int32)


def rounded(value: float, mantissa: int, least: int, top: float) -> float:
    """Round to a float8 type of so many mantissa bits and least exponent, half to even."""
    if math.isnan(value) or value == 0:
        return value
    size = min(abs(value), 2 * top)
    step = 2.0 ** (max(math.floor(math.log2(size)), least) - mantissa)
    near = round(size / step) * step  # Python rounds half to even
    return math.copysign(min(near, top), value)


VALUES = (0.0, 1.0, -1.0, 17.0, 19.0, -21.0, 447.0, 449.0, 1e6, -1e6, 60000.0, 0.001, 0.0013, 3e-5,
          1.5e-5, -7e-6, float("inf"), float("-inf"), float("nan"))  # fmt: skip


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("wide", FLOATS)
@pytest.mark.parametrize("tensor", [False, True])
def test_store_kv_cache_quantises(dtype: torch.dtype, wide: torch.dtype, tensor: bool) -> None:
    """Scaled, saturated, rounded once; k and v by their own scales, as floats and as tensors."""
    k = torch.tensor([VALUES, VALUES[::-1]]).to(wide)
    v = k.flip(0)
    caches = torch.zeros(4, len(VALUES)).to(dtype), torch.zeros(4, len(VALUES)).to(dtype)
    scales: list[Any] = [0.5, 4.0]
    if tensor:
        scales = [torch.tensor([s]) for s in scales]
    opmux.store_kv_cache(*caches, SLOTS, k, v, *scales, backend="reference")
    form = (3, -6, 448.0) if dtype == E4M3 else (2, -14, 57344.0)
    for cache, rows, scale in zip(caches, (k, v), (0.5, 4.0), strict=True):
        wanted = torch.tensor([[rounded(x / scale, *form) for x in row] for row in rows.tolist()])
        torch.testing.assert_close(
            cache[SLOTS.long()].float(), wanted, rtol=0, atol=0, equal_nan=True
        )
        assert not cache[1:3].float().any()


@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16])
def test_equal_dtypes_are_copied_bit_for_bit(dtype: torch.dtype) -> None:
    """A scale of 1 is no scale; payloads of NaN survive."""
    raw = torch.uint8 if dtype.itemsize == 1 else torch.int16
    k = torch.arange(-64, 64, dtype=torch.int32).to(raw).view(2, 64).view(dtype)
    caches = [torch.zeros(4, 64).to(dtype) for _ in range(2)]
    opmux.store_kv_cache(*caches, SLOTS, k, k, 1, 1.0, backend="reference")
    for cache in caches:
        assert torch.equal(cache.view(raw)[SLOTS.long()], k.view(raw))


def _call(cache: torch.dtype, rows: torch.dtype, *scales: Any) -> Callable[[str], None]:
    k_cache, v_cache = torch.zeros(4, 2, 3).to(cache), torch.zeros(4, 5).to(cache)
    k, v = torch.ones(2, 2, 3).to(rows), torch.ones(2, 5).to(rows)
    return lambda backend: opmux.store_kv_cache(
        k_cache, v_cache, SLOTS, k, v, *scales, backend=backend
    )


def _fused(cache: torch.dtype, *scales: Any, other: torch.dtype | None = None) -> Any:
    weight, angles = torch.ones(6), torch.ones(4, 6)
    k_cache, v_cache = torch.zeros(4, 12).to(cache), torch.zeros(4, 1, 6).to(other or cache)
    qkv, positions = torch.ones(2, 36), torch.zeros(2, dtype=torch.int64)
    arguments = (3, 2, 1, 6, 1e-6, weight, weight, angles, True, positions)
    return lambda backend: opmux.fused_qk_norm_rope_store_kv(
        qkv, k_cache, v_cache, SLOTS, *arguments, *scales, backend=backend
    )


MISTAKES = {
    "a scale where rows are copied": (_call(E4M3, E4M3, 0.5), ValueError, "k_scale.*1.*got 0.5"),
    "for v": (_call(torch.float16, torch.float16, 1.0, 2.0), ValueError, "v_scale.*got 2.0"),
    "a tensor where rows are copied": (
        _call(torch.float32, torch.float32, torch.ones(1)), ValueError, "k_scale.*got a tensor",
    ),
    "zero": (_call(E4M3, torch.float32, 0.0), ValueError, "k_scale must be positive, got 0.0"),
    "negative": (_call(E5M2, torch.float32, 1.0, -2.0), ValueError, "v_scale.*got -2.0"),
    "NaN": (_call(E4M3, torch.float32, float("nan")), ValueError, "k_scale.*got nan"),
    "a scale a head": (
        _call(E4M3, torch.float32, torch.ones(2)), ValueError, r"k_scale.*\(1,\), got \(2,\)",
    ),
    "a float64 scale": (
        _call(E4M3, torch.float32, 1.0, torch.ones(1).double()), TypeError, "v_scale.*float64",
    ),
    "another float": (_call(torch.float16, torch.bfloat16), TypeError, "k_cache.*float16"),
    "integers": (_call(E4M3, torch.int8), TypeError, "k_cache must be torch.int8.*float8_e4m3fn"),
    "fp8 to fp8": (_call(E4M3, E5M2), TypeError, "k_cache must be torch.float8_e5m2"),
    "fused: a scale": (_fused(torch.float32, 0.5), ValueError, "k_scale.*got 0.5"),
    "fused: zero": (_fused(E4M3, 1.0, 0.0), ValueError, "v_scale must be positive"),
    "fused: another float": (_fused(torch.float16), TypeError, "k_cache must be torch.float32"),
    "fused: two dtypes": (_fused(E4M3, other=E5M2), TypeError, "v_cache.*both caches alike"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "cpu_amx"])
@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes(what: str, backend: str) -> None:
    """Said in the same words, whoever finds them."""
    if backend not in {"reference", *(b.name for b in opmux.load().backends)}:
        pytest.skip(f"backend {backend} is not installed")
    call, error, message = MISTAKES[what]
    with pytest.raises((error, opmux.NoKernelError), match=f"{message}|no kernel"):
        call(backend)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_fused_store_is_its_parts(dtype: torch.dtype) -> None:
    """The query as in fused_qk_norm_rope; the key and the value as store_kv_cache stores them."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    qkv, weights, angles = normal(2, 36), (normal(6), normal(6)), normal(5, 4)
    rest = (3, 2, 1, 6, 1e-6, *weights, angles, False, torch.tensor([4, 2]))
    caches = [torch.zeros(4, 2, 6).to(dtype), torch.zeros(4, 6).to(dtype)]
    wanted = [cache.clone() for cache in caches]
    apart, before = qkv.clone(), qkv.clone()
    find("fused_qk_norm_rope_store_kv")(
        qkv, *caches, SLOTS, *rest, 0.02, torch.tensor([0.3]), backend="reference"
    )
    find("fused_qk_norm_rope")(apart, *rest, backend="reference")
    assert torch.equal(qkv[:, :18], apart[:, :18])
    assert torch.equal(qkv[:, 18:], before[:, 18:])
    key, value = apart[:, 18:30].reshape(2, 2, 6), apart[:, 30:]
    find("store_kv_cache")(*wanted, SLOTS, key, value, 0.02, 0.3, backend="reference")
    for cache, want in zip(caches, wanted, strict=True):
        assert torch.equal(cache.view(torch.uint8), want.view(torch.uint8))


def test_traces_with_scales() -> None:
    """One graph, with scales as floats and as tensors."""
    for scale in (0.5, torch.tensor([0.5])):
        caches = [torch.zeros(4, 8).to(E4M3) for _ in range(4)]
        rows = torch.linspace(-3, 3, 16).view(2, 8)

        def store(k_cache: Tensor, v_cache: Tensor, k: Tensor, by: Any = scale) -> None:
            opmux.store_kv_cache(k_cache, v_cache, SLOTS, k, k, by, by, backend="reference")

        store(*caches[:2], rows)
        torch.compile(store, fullgraph=True, backend="aot_eager")(*caches[2:], rows)
        for eager, traced in zip(caches[:2], caches[2:], strict=True):
            assert torch.equal(eager.view(torch.uint8), traced.view(torch.uint8))
