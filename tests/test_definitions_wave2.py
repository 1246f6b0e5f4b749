# SPDX-License-Identifier: Apache-2.0
"""Definitions of quantisation, routing, positions and helpers against naive loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import opmux
from opmux.op import find
from opmux.samples import Tolerance

pytestmark = [
    # torch's own, while it traces
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
FP8 = torch.float8_e4m3fn
E4M3 = sorted(
    v for v in torch.arange(256, dtype=torch.uint8).view(FP8).float().tolist() if not math.isnan(v)
)
NEW = (
    "silu_and_mul_per_token_group_quant", "silu_and_mul_masked_per_token_group_quant", "layernorm",
    "rmsnorm_per_token_quant", "fused_add_rmsnorm_per_token_quant", "rmsnorm_per_token_group_quant",
    "fused_add_rmsnorm_per_token_group_quant", "mrope", "fused_qk_norm_rope",
    "fused_qk_norm_rope_store_kv", "per_tensor_quant", "per_token_quant", "per_token_group_quant",
    "topk_softmax", "topk_sigmoid", "moe_fused_gate", "moe_align_block_size", "prepare_moe_input",
    "shuffle_rows", "apply_shuffle_mul_sum", "moe_sum", "moe_sum_reduce", "merge_state",
    "concat_mla_k", "concat_mla_absorb_q", "apply_penalties",
)  # fmt: skip


def run(name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(opmux, name)(*args, backend="reference", **kwargs)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(actual: Tensor, wanted: Any, tolerance: float = 1e-5) -> None:
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(
        actual.double(), wanted, rtol=tolerance, atol=tolerance, equal_nan=True
    )


# ---- quantisation ----


def nearest(value: float, int8: bool) -> float:
    """The quantised value nearest to a number; of two, the one whose last bit is 0."""
    if int8:
        return float(max(-127, min(127, round(value))))
    value = max(-448.0, min(448.0, value))
    best = min(abs(e - value) for e in E4M3)
    ties = [e for e in E4M3 if abs(e - value) == best]
    codes = torch.tensor(ties).to(FP8).view(torch.uint8).tolist()
    return next(t for t, code in zip(ties, codes, strict=True) if len(ties) == 1 or code % 2 == 0)


def quantised(group: list[float], int8: bool, power: bool = False) -> tuple[list[float], float]:
    scale = max([abs(v) for v in group] + [1e-10]) / (127 if int8 else 448)
    if power:
        scale = 2.0 ** math.ceil(math.log2(scale))
    return [nearest(v / scale, int8) for v in group], scale


def check_groups(out: tuple[Tensor, Tensor], value: Tensor, size: int, int8: bool, layout: int):
    q, s = out
    tokens, width = value.shape
    groups = width // size
    padded = (tokens + 3) // 4 * 4
    shape = {0: (tokens, groups), 1: (groups, padded), 2: (-(-groups // 4), padded)}[layout]
    assert q.dtype == (torch.int8 if int8 else FP8) and tuple(s.shape) == shape
    wrong = 0
    for t in range(padded):
        for g in range(groups if layout < 2 else 4 * shape[0]):
            if layout == 2:
                found = int(s[g // 4, t]) >> (8 * (g % 4)) & 0xFF
            else:
                found = float(s[g, t]) if layout else float(s[t, g]) if t < tokens else 0.0
            if t >= tokens or g >= groups:
                assert found == 0
                continue
            part = value[t, g * size : (g + 1) * size].double().tolist()
            wanted, scale = quantised(part, int8, layout == 2)
            if layout == 2:
                assert found == round(math.log2(scale)) + 127
            else:
                assert found == pytest.approx(scale, rel=1e-5)
            got = q[t, g * size : (g + 1) * size].float().tolist()
            wrong += sum(a != b for a, b in zip(got, wanted, strict=True))
    assert wrong <= 1 + value.numel() // 256


LAYOUTS = [(int8, layout) for int8 in (False, True) for layout in (0, 1, 2)]


@pytest.mark.parametrize(("int8", "layout"), LAYOUTS)
def test_per_token_group_quant(int8: bool, layout: int):
    x = normal(5, 160)
    x[1, :32] = 0
    x[2, 32:64] = 448.0  # a scale of exactly one
    check_groups(run("per_token_group_quant", x, 32, int8, layout), x, 32, int8, layout)


@pytest.mark.parametrize(("int8", "layout"), LAYOUTS)
def test_silu_and_mul_per_token_group_quant(int8: bool, layout: int):
    x = normal(3, 128)
    gate, up = x.double().chunk(2, -1)
    out = run("silu_and_mul_per_token_group_quant", x, 32, int8, layout)
    check_groups(out, gate / (1 + torch.exp(-gate)) * up, 32, int8, layout)


@pytest.mark.parametrize(("int8", "layout"), LAYOUTS)
def test_silu_and_mul_masked_per_token_group_quant(int8: bool, layout: int):
    experts, tokens, width = 5, 5, 96
    x = normal(experts, tokens, 2 * width).bfloat16()
    counts = torch.tensor([0, 2, 5, 9, -3], dtype=torch.int32)
    dtype = torch.int8 if int8 else FP8
    out_q = torch.full((experts, tokens, width), 7).to(dtype)
    _, like = run("per_token_group_quant", x[0, :, :width], 32, int8, layout)
    out_s = torch.full((experts, *like.shape), 77, dtype=like.dtype)
    run("silu_and_mul_masked_per_token_group_quant", x, out_q, out_s, counts, 32, layout)
    for e, count in enumerate((0, 2, 5, 5, 0)):
        assert bool((out_q[e, count:].float() == 7).all())
        q, s = run("silu_and_mul_per_token_group_quant", x[e], 32, int8, layout)
        assert torch.equal(out_q[e, :count].float(), q[:count].float())
        if layout:
            assert torch.equal(out_s[e, :, :count], s[:, :count])
            assert bool((out_s[e, :, count:] == 77).all())
        else:
            assert torch.equal(out_s[e, :count], s[:count])
            assert bool((out_s[e, count:] == 77).all())


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight.double()


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("int8", "layout"), [*LAYOUTS, (False, -1), (True, -1)])
def test_quantised_rmsnorm(add: bool, int8: bool, layout: int):
    x, residual, weight = normal(3, 96).bfloat16(), normal(3, 96, seed=1).bfloat16(), normal(96)
    weight = weight.bfloat16()
    total = x.float() + residual.float() if add else x.float()
    inputs = (x, residual, weight) if add else (x, weight)
    name = "fused_add_rmsnorm" if add else "rmsnorm"
    before = x.clone()
    if layout < 0:
        out = run(f"{name}_per_token_quant", *inputs, 1e-3, int8)
        check_groups(out, rms(total, weight, 1e-3), 96, int8, 0)
    else:
        out = run(f"{name}_per_token_group_quant", *inputs, 1e-3, 32, int8, layout)
        check_groups(out, rms(total, weight, 1e-3), 32, int8, layout)
    assert torch.equal(x, before)
    if add:
        assert torch.equal(residual, total.bfloat16())


@pytest.mark.parametrize("int8", [False, True])
def test_per_token_quant(int8: bool):
    x = normal(4, 33)
    check_groups(run("per_token_quant", x, int8), x, 33, int8, 0)


@pytest.mark.parametrize("int8", [False, True])
def test_per_tensor_quant(int8: bool):
    x = normal(4, 33) * 3
    q, s = run("per_tensor_quant", x, None, int8)
    wanted, scale = quantised(x.flatten().double().tolist(), int8)
    assert float(s) == pytest.approx(scale, rel=1e-6)
    assert (q.float().flatten() != torch.tensor(wanted)).sum() <= 1
    given = torch.tensor([2.0**-7])  # saturates
    q, s = run("per_tensor_quant", x, given, int8)
    wanted = [nearest(v * 2**7, int8) for v in x.flatten().tolist()]
    assert torch.equal(q.float().flatten(), torch.tensor(wanted))
    assert torch.equal(s, given) and s.data_ptr() != given.data_ptr()
    q, s = run("per_tensor_quant", torch.empty(0, 8), None, int8)
    assert q.shape == (0, 8) and float(s) > 0


@pytest.mark.parametrize("int8", [False, True])
def test_quantised_special_values(int8: bool):
    inf, nan, huge = float("inf"), float("nan"), torch.finfo(torch.float32).max
    q, s = run("per_token_quant", torch.tensor([[1.0, -2.0, nan], [1.0, -inf, nan]]), int8)
    top = 127 if int8 else 448
    close(s, [[2 / top], [huge / top]], 1e-6)
    assert q[:, 1].float().tolist() == [-top, -top]
    assert [nan if math.isnan(v) else v for v in q[:, 2].float().tolist()] == (
        [0, 0] if int8 else pytest.approx([nan, nan], nan_ok=True)
    )
    q, s = run("per_token_quant", torch.zeros(1, 5), int8)
    assert not q.float().any()
    assert float(s) == pytest.approx(1e-10 / top)


def test_tolerance_of_quantised_values():
    tolerance = Tolerance(quantized=(1, 2**-8))
    for dtype in (FP8, torch.int8):
        value = (normal(1024) * 50).clamp(-127, 127).to(dtype)
        near, far, many = (value.view(torch.uint8).clone() for _ in range(3))
        near[:4] ^= 1
        far[0] ^= 8
        many[:99] ^= 1
        tolerance.check("near", near.view(dtype), value)
        for bad in (far, many):
            with pytest.raises(AssertionError, match="steps"):
                tolerance.check("bad", bad.view(dtype), value)
        assert tolerance.covers(dtype) and not Tolerance().covers(dtype)
    codes = torch.tensor([0x7E, 0x7F, 0x00], dtype=torch.uint8)  # 448, NaN, 0
    with pytest.raises(AssertionError):
        tolerance.check("nan", codes.flip(0).view(FP8), codes.view(FP8))
    signed = torch.tensor([0xFE, 0xFF, 0x80], dtype=torch.uint8)
    tolerance.check("signs", signed[1:].view(FP8), codes[1:].view(FP8))


# ---- norm ----


def test_layernorm():
    x, weight, bias = normal(2, 3, 33) * 2 + 100, normal(33), normal(33, seed=1)
    for b in (None, bias):
        wanted = torch.empty(2, 3, 33, dtype=torch.float64)
        for i in range(2):
            for j in range(3):
                row = x[i, j].double()
                mean = sum(row.tolist()) / 33
                variance = sum((v - mean) ** 2 for v in row.tolist()) / 33
                wanted[i, j] = (row - mean) / math.sqrt(variance + 1e-5) * weight.double()
                wanted[i, j] += 0 if b is None else b.double()
        close(run("layernorm", x, weight, b), wanted, 1e-4)


# ---- position ----


def turn(head: list[float], angles: list[tuple[float, float]], is_neox: bool) -> list[float]:
    half, out = len(angles), list(head)
    for i, (cos, sin) in enumerate(angles):
        a, b = (i, i + half) if is_neox else (2 * i, 2 * i + 1)
        out[a], out[b] = head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin
    return out


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("interleaved", [True, False])
def test_mrope(is_neox: bool, interleaved: bool):
    tokens, head_dim, sections = 4, 26, (4, 4, 3)
    positions = torch.randint(0, 9, (3, tokens), generator=torch.Generator().manual_seed(1))
    cache = normal(9, 22)
    query, key = normal(tokens, 3, head_dim), normal(tokens, 2 * head_dim, seed=1)
    # written out by hand from the two models' descriptions
    rows = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1] if interleaved else [0] * 4 + [1] * 4 + [2] * 3
    wanted = []
    for tensor in (query, key):
        heads = tensor.reshape(tokens, -1, head_dim).double().tolist()
        for t in range(tokens):
            at = [int(positions[rows[i], t]) for i in range(11)]
            angles = [(float(cache[p, i]), float(cache[p, 11 + i])) for i, p in enumerate(at)]
            heads[t] = [turn(head, angles, is_neox) for head in heads[t]]
        wanted.append(torch.tensor(heads, dtype=torch.float64).view(tensor.shape))
    run("mrope", positions, query, key, head_dim, cache, *sections, interleaved, is_neox)
    close(query, wanted[0])
    close(key, wanted[1])


def test_mrope_with_equal_rows_is_rotary_embedding():
    positions = torch.tensor([3, 0, 7])
    query, cache = normal(3, 64), normal(8, 16)
    again = query.clone()
    run("rotary_embedding", positions, query, None, 32, cache)
    for interleaved in (False, True):
        other = again.clone()
        run("mrope", positions.expand(3, 3), other, None, 32, cache, 2, 3, 3, interleaved)
        assert torch.equal(other, query)


def _qk_case(is_neox: bool) -> tuple[Tensor, list[Any], Tensor]:
    tokens, (hq, hk, hv), dim = 3, (3, 2, 1), 10
    qkv = normal(tokens, (hq + hk + hv) * dim)
    weights = normal(dim, seed=1), normal(dim, seed=2)
    cache, positions = normal(5, 8), torch.tensor([4, 0, 2])
    wanted = qkv.double().view(tokens, -1, dim).tolist()
    for t in range(tokens):
        for h in range(hq + hk):
            weight = weights[h >= hq].tolist()
            head = wanted[t][h]
            norm = math.sqrt(sum(v * v for v in head) / dim + 1e-3)
            head = [v / norm * w for v, w in zip(head, weight, strict=True)]
            row = cache[int(positions[t])].tolist()
            wanted[t][h] = turn(head, list(zip(row[:4], row[4:], strict=True)), is_neox)
    rest = [hq, hk, hv, dim, 1e-3, *weights, cache, is_neox, positions]
    return qkv, rest, torch.tensor(wanted, dtype=torch.float64).view(qkv.shape)


@pytest.mark.parametrize("is_neox", [True, False])
def test_fused_qk_norm_rope(is_neox: bool):
    qkv, rest, wanted = _qk_case(is_neox)
    value = qkv[:, 50:].clone()
    run("fused_qk_norm_rope", qkv, *rest)
    close(qkv, wanted)
    assert torch.equal(qkv[:, 50:], value)


@pytest.mark.parametrize("is_neox", [True, False])
def test_fused_qk_norm_rope_store_kv(is_neox: bool):
    qkv, rest, wanted = _qk_case(is_neox)
    before = qkv.clone()
    k_cache, v_cache = normal(6, 2, 10), normal(6, 10)
    k_old, v_old = k_cache.clone(), v_cache.clone()
    slots = torch.tensor([5, -1, 0], dtype=torch.int32)
    run("fused_qk_norm_rope_store_kv", qkv, k_cache, v_cache, slots, *rest)
    close(qkv[:, :30], wanted[:, :30])
    assert torch.equal(qkv[:, 30:], before[:, 30:])
    for t, slot in ((0, 5), (2, 0)):
        close(k_cache[slot].flatten(), wanted[t, 30:50])
        assert torch.equal(v_cache[slot], before[t, 50:])
    assert torch.equal(k_cache[1:5], k_old[1:5])
    assert torch.equal(v_cache[1:5], v_old[1:5])


# ---- routing ----


def pick(keys: list[float], count: int) -> list[int]:
    return sorted(range(len(keys)), key=lambda e: (-keys[e], e))[:count]


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ["topk_softmax", "topk_sigmoid"])
def test_topk(name: str, biased: bool, renormalize: bool, cap: float):
    x, bias = normal(6, 13) * 3, normal(13, seed=1) if biased else None
    x[1, 4] = x[1, 9] = 20.0  # equals: the lower id first
    extra = (renormalize, cap, bias) if name == "topk_softmax" else (renormalize, bias)
    weights, ids = run(name, x, 4, *extra)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    for t in range(6):
        row = x[t].double().tolist()
        if name == "topk_sigmoid":
            scores = [1 / (1 + math.exp(-v)) for v in row]
        else:
            capped = [cap * math.tanh(v / cap) if cap else v for v in row]
            total = sum(math.exp(v) for v in capped)
            scores = [math.exp(v) / total for v in capped]
        keys = row if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        chosen = pick(keys, 4)
        assert ids[t].tolist() == chosen
        wanted = [scores[e] for e in chosen]
        close(weights[t], [w / (sum(wanted) if renormalize else 1) for w in wanted])


@pytest.mark.parametrize("name", ["topk_softmax", "topk_sigmoid"])
def test_topk_of_special_values(name: str):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[nan, 1.0, -inf, inf], [-inf] * 4, [nan] * 4])
    weights, ids = run(name, x, 2, True)
    assert ids.tolist() == [[3, 1], [0, 1], [0, 1]]
    assert bool(weights.isfinite().all())
    one = [1.0, 0.0] if name == "topk_softmax" else [0.5777, 0.4223]
    close(weights[0], one, 1e-4)
    # softmax of equals, and sigmoids that are all zero
    close(weights[1:], [[0.5, 0.5]] * 2 if name == "topk_softmax" else [[0.0, 0.0]] * 2)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("on_output", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (12, 7)])
def test_moe_fused_gate(groups: int, kept: int, renormalize: bool, on_output: bool, shared: int):
    x, bias = normal(5, 12), normal(12, seed=1)
    weights, ids = run(
        "moe_fused_gate", x, bias, groups, kept, 3 + shared, shared, 2.5, on_output, renormalize
    )
    size = 12 // groups
    for t in range(5):
        scores = [1 / (1 + math.exp(-v)) for v in x[t].double().tolist()]
        keys = [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        best = [
            sum(sorted(keys[g * size : (g + 1) * size], reverse=True)[:2]) for g in range(groups)
        ]
        allowed = pick(best, kept)
        chosen = [e for e in pick(keys, 12) if e // size in allowed][:3]
        wanted = [scores[e] for e in chosen]
        total = sum(wanted)
        wanted += [total / 2.5] * shared
        factor = (2.5 if on_output else 1.0) / (total if renormalize else 1.0)
        assert ids[t].tolist() == chosen + [12, 13][:shared]
        close(weights[t], [w * factor for w in wanted])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "experts", "block"), [(7, 5, 4), (1, 5, 4), (40, 3, 16), (0, 3, 4)]
)
def test_moe_align_block_size(tokens: int, experts: int, block: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(tokens)
    topk_ids = torch.randint(-1, experts + 1, (tokens, 3), generator=generator, dtype=dtype)
    ids, owners, total = run("moe_align_block_size", topk_ids, experts, block)
    flat = topk_ids.flatten().tolist()
    wanted: list[int] = []
    wanted_owners: list[int] = []
    for e in range(experts):
        mine = [slot for slot, expert in enumerate(flat) if expert == e]
        mine += [len(flat)] * (-len(mine) % block)
        wanted += mine
        wanted_owners += [e] * (len(mine) // block)
    assert total.tolist() == [len(wanted)]
    assert ids.tolist() == wanted + [len(flat)] * (len(ids) - len(wanted))
    assert owners.tolist() == wanted_owners + [-1] * (len(owners) - len(wanted_owners))
    assert len(ids) == len(owners) * block


def test_moe_align_block_size_has_room_for_the_worst_routing():
    for numel in range(1, 12):
        for experts in (1, 2, 5):
            for block in (1, 3, 4):
                spread = (torch.arange(numel) % experts).view(-1, 1)  # most experts
                ids, _, total = run("moe_align_block_size", spread, experts, block)
                assert sorted(i for i in ids.tolist() if i < numel) == list(range(numel))
                assert int(total) <= len(ids)


def test_prepare_moe_input_and_shuffles():
    experts, n, k = 4, 5, 6
    topk_ids = torch.tensor([[2, 0], [2, -1], [0, 9], [2, 3]], dtype=torch.int32)
    offsets, scales, sizes1, sizes2, tokens, rows = run(
        "prepare_moe_input", topk_ids, experts, n, k
    )
    assert offsets.tolist() == [0, 2, 2, 5, 6]
    assert scales.tolist() == [0, 128, 128, 256, 384]
    assert sizes1.tolist() == [[m, 10, 6] for m in (2, 0, 3, 1)]
    assert sizes2.tolist() == [[m, 6, 5] for m in (2, 0, 3, 1)]
    assert tokens.tolist() == [0, 2, 0, 1, 3, 3, -1, -1]
    assert rows.tolist() == [[2, 0], [3, -1], [1, -1], [4, 5]]
    x, factors = normal(4, k), normal(4, 2, seed=1)
    shuffled = run("shuffle_rows", x, tokens)
    assert torch.equal(shuffled, torch.cat((x[tokens[:6].long()], torch.zeros(2, k))))
    # undoing the shuffle weighs each token by its slots that were kept
    result = run("apply_shuffle_mul_sum", shuffled, rows, factors)
    kept = torch.tensor([[1, 1], [1, 0], [1, 0], [1, 1]])
    close(result, x.double() * (factors.double() * kept).sum(1, keepdim=True))
    close(run("apply_shuffle_mul_sum", shuffled, rows), x.double() * kept.sum(1, keepdim=True))


def test_shuffle_rows_copies_bits():
    raw = torch.arange(256, dtype=torch.uint8).view(16, 16)
    out = run("shuffle_rows", raw.view(FP8), torch.tensor([3, 15, -7]))
    assert torch.equal(out.view(torch.uint8)[:2], raw[[3, 15]])
    assert not out.view(torch.uint8)[2].any()
    assert run("shuffle_rows", normal(0, 4), torch.tensor([-1])).tolist() == [[0.0] * 4]


def test_apply_shuffle_mul_sum_leaves_out_nan_of_negative_indices():
    x, nan = normal(2, 3), float("nan")
    out = run("apply_shuffle_mul_sum", x, torch.tensor([[1, -1]]), torch.tensor([[2.0, nan]]))
    close(out, 2 * x[1:].double())


def test_moe_sums():
    x = normal(3, 4, 5)
    wanted = [[sum(x[t, :, h].double().tolist()) for h in range(5)] for t in range(3)]
    close(run("moe_sum", x), wanted)
    close(run("moe_sum_reduce", x), wanted)
    close(run("moe_sum_reduce", x, 2.5), 2.5 * torch.tensor(wanted))


# ---- attention ----


def test_merge_state_is_attention_over_both_halves():
    q, k, v = normal(3, 8), normal(10, 8, seed=1).double(), normal(10, 8, seed=2).double()
    scores = q.double() @ k.T

    def part(keys: slice) -> tuple[Tensor, Tensor]:
        value = torch.softmax(scores[:, keys], -1) @ v[keys]
        return value[:, None].float(), torch.logsumexp(scores[:, keys], -1)[:, None].float()

    value, lse = run("merge_state", *part(slice(0, 3)), *part(slice(3, 10)))
    close(value, part(slice(0, 10))[0], 1e-4)
    close(lse, part(slice(0, 10))[1], 1e-4)


def test_merge_state_ignores_a_side_without_keys():
    nan, inf = float("nan"), float("inf")
    good, bad = torch.ones(4, 1, 2), torch.full((4, 1, 2), nan)
    value, lse = run(
        "merge_state", bad, torch.tensor([[-inf], [inf], [-inf], [inf]]),
        good, torch.tensor([[3.0], [-500.0], [-inf], [-inf]]),
    )  # fmt: skip
    assert value[:, 0, 0].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert lse.flatten().tolist() == [3.0, -500.0, -inf, -inf]


def test_concat_mla():
    nope, rope, k = normal(2, 3, 5), normal(2, 1, 4), torch.empty(2, 3, 9)
    run("concat_mla_k", k, nope, rope)
    for t in range(2):
        for h in range(3):
            assert k[t, h].tolist() == nope[t, h].tolist() + rope[t, 0].tolist()
    b = normal(2, 3, 4)
    out = run("concat_mla_absorb_q", nope, b)
    for t in range(2):
        for h in range(3):
            assert out[t, h].tolist() == nope[t, h].tolist() + b[t, h].tolist()


# ---- sampling ----


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
def test_apply_penalties(per_row: bool, prompt: bool):
    logits = normal(2, 7) * 3
    logits[0, 0] = float("-inf")
    counts = torch.tensor([[1, 0, 2, 0, -1, 3, 0], [0, 0, 0, 1, 0, 5, 1]], dtype=torch.int32)
    mask = torch.tensor([[0, 1, 1, 0, 0, 0, 0]] * 2).bool() if prompt else None
    repetition, frequency, presence = [1.5, 0.5], [0.25, 2.0], [0.125, -1.0]
    if not per_row:
        repetition, frequency, presence = repetition[:1] * 2, frequency[:1] * 2, presence[:1] * 2
    wanted = logits.double().tolist()
    for b in range(2):
        for v in range(7):
            if counts[b, v] > 0 or (mask is not None and mask[b, v]):
                wanted[b][v] *= 1 / repetition[b] if wanted[b][v] > 0 else repetition[b]
            if counts[b, v] > 0:
                wanted[b][v] -= frequency[b] * int(counts[b, v]) + presence[b]
    penalties = [torch.tensor(p) if per_row else p[0] for p in (repetition, frequency, presence)]
    run("apply_penalties", logits, counts, *penalties, mask)
    close(logits, wanted)


# ---- mistakes ----

X, I32 = torch.ones(2, 64), torch.zeros(2, 3, dtype=torch.int32)
QKV: tuple[Any, ...] = (
    1, 1, 1, 8, 1e-6, torch.ones(8), torch.ones(8), torch.ones(4, 8), True, torch.tensor([0, 3]),
)  # fmt: skip
MISTAKES: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("per_token_group_quant", (X, 48), ValueError, "group_size must be positive and divide"),
    ("per_token_group_quant", (X, 0), ValueError, "group_size"),
    ("per_token_group_quant", (X, 32, False, 3), ValueError, "scale_layout must be 0"),
    ("per_token_group_quant", (X[0], 32), ValueError, "two dimensions"),
    ("per_token_group_quant", (X.double(), 32), TypeError, "float64"),
    ("per_token_quant", (X[0],), ValueError, "two dimensions"),
    ("per_tensor_quant", (X[0],), ValueError, "two dimensions"),
    ("per_tensor_quant", (X, torch.ones(2)), ValueError, r"shape \(1,\)"),
    ("per_tensor_quant", (X, torch.ones(1).half()), TypeError, "scale must be float32"),
    ("silu_and_mul_per_token_group_quant", (torch.ones(2, 33), 1), ValueError, "even"),
    ("silu_and_mul_masked_per_token_group_quant",
     (torch.ones(2, 2, 64), torch.zeros(2, 2, 32), torch.ones(2, 2, 1), I32[0, :2], 32),
     TypeError, "out_q must be float8_e4m3fn or int8"),
    ("silu_and_mul_masked_per_token_group_quant",
     (torch.ones(2, 2, 64), torch.zeros(2, 2, 32).to(FP8), torch.ones(2, 2, 1), I32[0, :2], 32, 1),
     ValueError, "out_scale must have shape"),
    ("layernorm", (X, torch.ones(64), torch.ones(63)), ValueError, "bias must have shape"),
    ("layernorm", (X, torch.ones(64), torch.ones(64).half()), TypeError, "bias must have the dt"),
    ("rmsnorm_per_token_quant", (X, torch.ones(63)), ValueError, "weight must have shape"),
    ("fused_add_rmsnorm_per_token_quant", (X, X[:1], torch.ones(64)), ValueError, "residual"),
    ("rmsnorm_per_token_group_quant", (X, torch.ones(64), 1e-6, 24), ValueError, "group_size"),
    ("fused_add_rmsnorm_per_token_group_quant", (X, X.half(), torch.ones(64)), TypeError, "resid"),
    ("mrope", (torch.zeros(3, 2).long(), X, None, 64, torch.ones(4, 8), 1, 1, 1), ValueError,
     "rot_dim / 2 = 4, got 1"),
    ("mrope", (torch.full((3, 2), 4), X, None, 64, torch.ones(4, 8), 2, 1, 1), ValueError,
     "positions must be at least 0 and below 4, got 4"),
    ("mrope", (torch.zeros(2, 2).long(), X, None, 64, torch.ones(4, 8), 2, 1, 1), ValueError,
     "positions must have shape"),
    ("fused_qk_norm_rope", (X, *QKV), ValueError, r"must be \(1 \+ 1 \+ 1\) \* 8, got 64"),
    ("fused_qk_norm_rope", (X[:, :24], 0, *QKV[1:]), ValueError, "must be positive"),
    ("fused_qk_norm_rope", (X[:1, :24], *QKV), ValueError, "positions"),
    ("fused_qk_norm_rope_store_kv",
     (X[:, :24], X[:, :8], X[:, :8], torch.tensor([0, 2]), *QKV), ValueError, "below 2, got 2"),
    ("fused_qk_norm_rope_store_kv",
     (X[:, :24], X[:, :9], X[:, :8], torch.tensor([0, 1]), *QKV), ValueError, "k_cache must have"),
    ("topk_softmax", (X, 65), ValueError, "topk must be within 1 and 64"),
    ("topk_softmax", (X, 2, False, -1.0), ValueError, "moe_softcapping"),
    ("topk_softmax", (X, 2, False, 0.0, torch.ones(64).half()), TypeError, "float32"),
    ("topk_sigmoid", (X, 0), ValueError, "topk must be"),
    ("topk_sigmoid", (X, 2, False, torch.ones(63)), ValueError, "correction_bias must have"),
    ("moe_fused_gate", (X, torch.ones(64), 5, 1, 2), ValueError, "num_expert_group must divide"),
    ("moe_fused_gate", (X, torch.ones(64), 4, 5, 2), ValueError, "topk_group must be"),
    ("moe_fused_gate", (X, torch.ones(64), 32, 1, 3), ValueError, "at most the 2 experts"),
    ("moe_fused_gate", (X, torch.ones(64), 4, 2, 2, 2), ValueError, "topk must be"),
    ("moe_fused_gate", (X, torch.ones(64), 4, 2, 2, 0, 0.0), ValueError, "must not be 0"),
    ("moe_align_block_size", (I32, 0, 16), ValueError, "num_experts"),
    ("moe_align_block_size", (I32, 4, 0), ValueError, "block_size"),
    ("moe_align_block_size", (X, 4, 16), TypeError, "topk_ids must be"),
    ("prepare_moe_input", (I32[0], 4, 1, 1), ValueError, "two dimensions"),
    ("shuffle_rows", (X, torch.tensor([2])), ValueError, "must be below 2, got 2"),
    ("apply_shuffle_mul_sum", (X, torch.tensor([[2]])), ValueError, "must be below 2, got 2"),
    ("apply_shuffle_mul_sum", (X, I32 * 0, torch.ones(2, 2)), ValueError, "factors"),
    ("moe_sum", (X,), ValueError, r"\(tokens, topk, h\)"),
    ("moe_sum_reduce", (X,), ValueError, r"\(tokens, topk, h\)"),
    ("merge_state", (X[None], X[:1], X[None], X[:1, :2]), ValueError, "s_a must have shape"),
    ("merge_state", (X[None], X[:1, :2], X[None].half(), X[:1, :2]), TypeError, "v_b must be"),
    ("concat_mla_k", (X[None], X[None], X[None]), ValueError, "k_rope must have shape"),
    ("concat_mla_k", (X[:, None], X[:, None], X[:, None]), ValueError, r"must be 64 \+ 64"),
    ("concat_mla_absorb_q", (X[None], X[:1, None]), ValueError, "b must have shape"),
    ("concat_mla_absorb_q", (X[None], X[None].half()), TypeError, "b must have the dtype"),
    ("apply_penalties", (X, X), TypeError, "token_counts must be"),
    ("apply_penalties", (X, I32), ValueError, "token_counts must have the shape"),
    ("apply_penalties", (X, X.int(), torch.ones(3)), ValueError, "repetition_penalty"),
    ("apply_penalties", (X, X.int(), 1.0, 0.0, 0.0, X), TypeError, "prompt_mask must be"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "kind", "message"), MISTAKES)
def test_mistakes_are_refused(
    name: str, args: tuple[Any, ...], kind: type[Exception], message: str
):
    with pytest.raises(kind, match=message) as found:
        run(name, *args)
    assert str(found.value).startswith(f"{name}: ")


def test_every_definition_has_a_mistake():
    assert {name for name, *_ in MISTAKES} == set(NEW)


# ---- compilation ----


def _clones(values: list[Any]) -> list[Any]:
    return [v.clone() if isinstance(v, Tensor) else v for v in values]


@pytest.mark.parametrize("name", NEW)
def test_compiles(name: str):
    op = find(name)
    public: Callable[..., Any] = getattr(opmux, name)
    samples = [s for s in op.draw() if "0x" not in f"-{s}".replace("-", " ").split()[0]]
    sample = min(
        samples, key=lambda s: sum(math.prod(a.shape) for a in s.args if hasattr(a, "fill"))
    )
    dtypes = op.dtypes or (torch.float32,)
    args, kwargs = sample.make(torch.bfloat16 if torch.bfloat16 in dtypes else dtypes[0])
    torch.compiler.reset()

    def call(*values: Any) -> Any:
        return public(*values, **kwargs, backend="reference")

    eager, traced = _clones(args), _clones(args)
    wanted = call(*eager)
    got = torch.compile(call, backend="aot_eager", fullgraph=True)(*traced)
    pairs = [p for p in zip(traced, eager, strict=True) if isinstance(p[0], Tensor)]
    if wanted is not None:
        outs = (got, wanted) if isinstance(wanted, tuple) else ((got,), (wanted,))
        pairs += zip(*outs, strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
