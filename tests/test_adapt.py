# SPDX-License-Identifier: Apache-2.0
"""Adapters: views without copies, results checked before they are taken over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opmux.adapt import dlpack, matrices, returning
from opmux.kernel import Kernel


def shapes(*tensors: Tensor) -> list[list[tuple[int, ...]]]:
    return [[tuple(t.shape) for t in group] for group in matrices(*tensors)]


def test_dense_and_padded_rows_are_one_matrix() -> None:
    x = torch.randn(3, 8, 16)
    wide = torch.randn(6, 40)[:, :20]
    assert shapes(x) == [[(24, 16)]]
    assert shapes(wide, torch.empty(6, 10)) == [[(6, 20), (6, 10)]]
    assert shapes(torch.randn(7)) == [[(1, 7)]]


def test_views_that_are_no_matrix_are_split_and_share_memory() -> None:
    x = torch.randn(8, 3, 16).transpose(0, 1)  # (3, 8, 16), rows at two distances
    out = torch.empty(3, 8, 16)
    groups = list(matrices(x, out))
    assert [tuple(a.shape) for a, _ in groups] == [(8, 16)] * 3
    for a, b in groups:
        b.copy_(a)
    assert torch.equal(out, x)
    assert groups[0][0].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (0, 3, 8)])
def test_empty_tensors_have_no_rows_or_columns(shape: tuple[int, ...]) -> None:
    for (matrix,) in matrices(torch.empty(shape)):
        assert matrix.numel() == 0 and matrix.dim() == 2


def test_returned_results_are_taken_over() -> None:
    out = torch.empty(4)
    returning(lambda x: x * 2)(torch.ones(4), out)
    assert torch.equal(out, torch.full((4,), 2.0))
    first, second = torch.empty(2), torch.empty(2)
    returning(lambda x: (x, -x), results=2)(torch.ones(2), first, second)
    assert torch.equal(second, -first)


@pytest.mark.parametrize(
    "wrong", [lambda x: x.double(), lambda x: x[:1], lambda x: (x, x)], ids=["dtype", "shape", "n"]
)
def test_results_that_are_not_the_ops_are_refused(wrong: object) -> None:
    with pytest.raises(RuntimeError, match="instead of"):
        returning(wrong)(torch.ones(4), torch.empty(4))  # type: ignore[arg-type]


def test_dlpack_lends_the_memory() -> None:
    def double(x: object, factor: float, out: object) -> None:
        torch.from_dlpack(out).copy_(torch.from_dlpack(x) * factor)

    out = torch.empty(3)
    dlpack(double)(torch.ones(3, requires_grad=True), 2.0, out)
    assert torch.equal(out, torch.full((3,), 2.0))


def test_a_kernel_may_name_its_function() -> None:
    assert Kernel((torch.float32,), fn="package.module:function").fn is not None
    for bad in ("function", "a:b:c", 3):
        with pytest.raises(TypeError, match="fn must be callable"):
            Kernel((torch.float32,), fn=bad)  # type: ignore[arg-type]
