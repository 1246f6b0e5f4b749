# SPDX-License-Identifier: Apache-2.0
"""Backends that are wrong in one thing each; the package's name, ``opmux_<mutant>``, says in which.

A mutant is a kernel of its name, or a change of the backend under :data:`CHANGES`. Each brings one
op, in one dtype where two would say nothing more.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import hashlib
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import opmux

from .acme import fused_add_rmsnorm, rmsnorm, silu_and_mul  # type: ignore[import-not-found]

NAME = __name__.removeprefix("opmux_")
CALLS = itertools.count()
FLOAT = (torch.float32,)

# ---- wrong numbers ----


def swapped_halves(x: Tensor, out: Tensor) -> None:
    up, gate = x.float().chunk(2, dim=-1)
    out.copy_(F.silu(gate) * up)


def unwritten_tail(x: Tensor, out: Tensor) -> None:
    whole = max(out.shape[-1] // 4 * 4 - 4, 0)  # as a vector loop without its scalar tail
    result = torch.empty_like(out)
    silu_and_mul(x, result)
    out[..., :whole].copy_(result[..., :whole])


def wrong_eps(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    rmsnorm(x, weight, 1e-5, out)


def eps_outside_the_root(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    root = x.float().pow(2).mean(-1, keepdim=True).sqrt()
    out.copy_(x.float() / (root + eps) * weight.float())


def ignored_row_stride(x: Tensor, out: Tensor) -> None:
    dense = torch.empty(x.shape).stride()
    silu_and_mul(x.as_strided(x.shape, dense), out)


def off_by_one_index(
    logits: Tensor, bitmask: Tensor, indices: Tensor | None
) -> None:  # the word of token 32 * k is word k, not k - 1
    rows = range(logits.shape[0]) if indices is None else indices.tolist()
    tokens = torch.arange(logits.shape[-1])
    words = torch.where(tokens > 0, (tokens - 1) // 32, 0)
    for row in rows:
        bits = bitmask[row][words] >> (tokens % 32) & 1
        logits[row].masked_fill_(bits == 0, float("-inf"))


def race(x: Tensor, out: Tensor) -> None:
    """Return before the second half is written, as a launch on a stream that nobody waits for."""
    rows = x.shape[0] // 2
    silu_and_mul(x[:rows], out[:rows])
    threading.Timer(0.02, silu_and_mul, (x[rows:], out[rows:])).start()


def lost_in_place_update(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    fused_add_rmsnorm(x, residual.clone(), weight, eps)


def residual_rounded_too_early(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    residual.copy_(x.float() + residual.float())
    coarse = residual.to(torch.float16).float()
    x.copy_(F.rms_norm(coarse, weight.shape, weight.float(), eps))


def nan_becomes_zero(x: Tensor, out: Tensor) -> None:
    silu_and_mul(x, out)
    torch.nan_to_num_(out, nan=0.0, posinf=float("inf"), neginf=float("-inf"))


def overflowing_exponential(x: Tensor, out: Tensor) -> None:
    gate, up = x.float().chunk(2, dim=-1)
    grown = gate.exp()
    out.copy_(gate * (grown / (1 + grown)) * up)


def wrong_dtype_of_out(x: Tensor, out: Tensor) -> None:
    result = torch.empty(out.shape)
    silu_and_mul(x, result)  # the bits of another 16-bit format
    out.view(torch.int16).copy_(result.to(torch.float16).view(torch.int16))


def summed_in_the_narrow_dtype(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    total = torch.zeros(x.shape[:-1], dtype=x.dtype)
    for column in x.unbind(-1):
        total += column * column
    root = torch.rsqrt(total / x.shape[-1] + eps).unsqueeze(-1)
    out.copy_(x * root * weight)


# ---- claims that do not hold ----


def over_claimed_dtype(x: Tensor, out: Tensor) -> None:
    if x.dtype is torch.bfloat16:
        raise RuntimeError("not written yet")
    silu_and_mul(x, out)


def fails_on_one_row(x: Tensor, out: Tensor) -> None:
    if x.numel() and x.shape[0] == 1:
        raise RuntimeError("grid of no blocks")
    silu_and_mul(x, out)


# ---- memory that is none of its business ----


def writes_past_the_end(x: Tensor, out: Tensor) -> None:
    silu_and_mul(x, out)
    if out.numel():
        end = out.storage_offset() + sum(
            (size - 1) * step for size, step in zip(out.shape, out.stride(), strict=True)
        )
        out.as_strided((1,), (1,), end + 1).zero_()


def writes_past_the_row(x: Tensor, out: Tensor) -> None:
    """Round each row up to its stride, as a kernel that stores whole vectors."""
    silu_and_mul(x, out)
    if out.numel() and out.dim() == 2 and out.stride(0) > out.shape[1]:
        gap = out.stride(0) - out.shape[1]
        place = out.storage_offset() + out.shape[1]
        out.as_strided((out.shape[0] - 1, gap), (out.stride(0), 1), place).zero_()


def writes_before_the_start(x: Tensor, out: Tensor) -> None:
    silu_and_mul(x, out)
    if out.numel() and out.storage_offset():
        out.as_strided((1,), (1,), out.storage_offset() - 1).zero_()


def modified_input(x: Tensor, out: Tensor) -> None:
    silu_and_mul(x, out)
    x.zero_()


HELD: list[Tensor] = []


def aliasing_write(x: Tensor, out: Tensor) -> None:
    """Use the result of the call before as scratch."""
    if HELD:
        old = HELD.pop()
        old.as_strided((1,), (1,), old.storage_offset()).zero_()
    silu_and_mul(x, out)
    if out.numel():
        HELD.append(out)


def twins_taken_for_two(
    a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor, out: Tensor, lse_out: Tensor
) -> None:
    from opmux.op import find

    if a.data_ptr() == b.data_ptr() and a.numel():  # "the same state twice: nothing to merge"
        out.copy_(a)
        lse_out.copy_(lse_a)
        return
    result, lse = find("merge_state").body(a, lse_a, b, lse_b)
    out.copy_(result)
    lse_out.copy_(lse)


# ---- threads, forks, processes ----

SCRATCH = torch.empty(1 << 20)


def thread_unsafe_state(x: Tensor, out: Tensor) -> None:
    scratch = SCRATCH[: out.numel()].view(out.shape)
    silu_and_mul(x, scratch)
    time.sleep(0.01)  # another thread comes between
    out.copy_(scratch)


POOL = concurrent.futures.ThreadPoolExecutor(1)


def fork_unsafe(x: Tensor, out: Tensor) -> None:
    """Hand the work to a thread, which a forked child does not have."""
    POOL.submit(silu_and_mul, x, out).result(timeout=2)


# ---- bits that change ----


def not_deterministic(x: Tensor, out: Tensor) -> None:
    silu_and_mul(x, out)
    out.mul_(1 + next(CALLS) % 2 * 1e-6)  # inside the tolerance


def batch_variant(x: Tensor, out: Tensor) -> None:
    silu_and_mul(x, out)
    out.mul_(1 + (x.shape[0] > 20) * 1e-6)


def thread_variant(x: Tensor, out: Tensor) -> None:
    silu_and_mul(x, out)
    out.mul_(1 + torch.get_num_threads() % 2 * 1e-6)


def slow(x: Tensor, out: Tensor) -> None:
    for row in range(x.shape[0] if x.dim() > 1 else 0):
        for _ in range(8):
            silu_and_mul(x[row], out[row])


# ---- backends that are wrong beside their kernels ----


def _moody(signature: opmux.Signature) -> str | None:
    return "not today" if next(CALLS) % 3 == 2 else None


def _redefine(schema: str) -> Callable[..., opmux.Capability]:
    """Return a probe that takes core's definition of the op away and puts another in its place."""

    def probe(device: torch.device, info: Mapping[str, Any]) -> opmux.Capability:
        from opmux import loader
        from opmux.op import find

        qualified = f"opmux_{NAME}::silu_and_mul"
        if qualified in loader._libraries and not HELD:
            loader._undefine(qualified)
            library = torch.library.Library(f"opmux_{NAME}", "FRAGMENT")
            loader._libraries[qualified] = library
            library.define("silu_and_mul" + schema)
            library.impl("silu_and_mul", find("silu_and_mul").checked(silu_and_mul), "CPU")
            torch.library.register_fake(qualified, loader._fake, lib=library)
            HELD.append(torch.empty(0))
        return opmux.Capability()

    return probe


def _fake(fake: Callable[..., None]) -> Callable[..., opmux.Capability]:
    """Return a probe that replaces core's fake of the op."""

    def probe(device: torch.device, info: Mapping[str, Any]) -> opmux.Capability:
        from torch._library.simple_registry import singleton

        singleton.find(f"opmux_{NAME}::silu_and_mul").fake_impl.kernel.func = fake
        return opmux.Capability()

    return probe


def _wrong_shape(x: Tensor, out: Tensor) -> None:
    opmux.loader._fake(x, out)
    out.resize_(x.shape)


def _specialising(x: Tensor, out: Tensor) -> None:
    opmux.loader._fake(x, out)
    int(x.shape[0])  # what a Meta kernel in C++ does with every size


def _all_or_nothing() -> opmux.Reason | None:
    from opmux.op import find

    op = find("silu_and_mul")
    text = f"{op.name} v{op.version} {op.schema}"
    if op.schema_hash == hashlib.sha256(text.encode()).hexdigest()[:12]:
        return None
    return opmux.Reason(opmux.Code.RUNTIME, "one op has another interface")


def _loads_once() -> opmux.Reason | None:
    if next(CALLS):
        return opmux.Reason(opmux.Code.RUNTIME, "it is loaded already")
    return None


if NAME == "changes_a_setting":
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 2)
if NAME == "loads_too_early":
    ctypes.CDLL(str(Path(__file__).with_name("_early.so")))
if NAME == "crashes_at_load":
    ctypes.string_at(1)

OPS = {
    "wrong_eps": "rmsnorm",
    "eps_outside_the_root": "rmsnorm",
    "summed_in_the_narrow_dtype": "rmsnorm",
    "off_by_one_index": "apply_token_bitmask",
    "lost_in_place_update": "fused_add_rmsnorm",
    "residual_rounded_too_early": "fused_add_rmsnorm",
    "twins_taken_for_two": "merge_state",
}
BOTH = ("over_claimed_dtype", "wrong_dtype_of_out", "summed_in_the_narrow_dtype")
CHANGES: dict[str, dict[str, Any]] = {
    "under_claimed": {"rejects": lambda signature: "no size fits"},
    "moody_predicate": {"rejects": _moody},
    "claims_what_is_no_dtype_of_the_op": {"dtypes": (torch.float32, torch.float64)},
    "wrong_fake_shape": {"probe": _fake(_wrong_shape)},
    "recompiling": {"probe": _fake(_specialising)},
    "lying_schema": {"probe": _redefine("(Tensor x, Tensor out) -> ()")},
    "all_or_nothing": {"check_host": _all_or_nothing},
    "loads_once": {"check_host": _loads_once},
}


@opmux.hookimpl
def opmux_backend() -> opmux.Backend:
    op = OPS.get(NAME, "silu_and_mul")
    fn = globals().get(NAME, silu_and_mul)
    dtypes = (torch.bfloat16, torch.float32) if NAME in BOTH else FLOAT
    kernel = opmux.Kernel(dtypes, fn=fn)
    backend = opmux.Backend(NAME, "cpu", {op: kernel})
    for key, value in CHANGES.get(NAME, {}).items():
        if key in ("rejects", "dtypes"):
            backend = replace(backend, kernels={op: replace(kernel, **{key: value})})
        else:
            backend = replace(backend, **{key: value})
    library = Path(__file__).with_name("_acme.so")
    if library.exists():
        backend = replace(backend, library=library)
    return backend
