# SPDX-License-Identifier: Apache-2.0
"""The demo model: its eager ops, its cache, its weights, its text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import opmux
from opmux.demo import (
    Config,
    Model,
    Ops,
    eager,
    generate,
    heldout,
    load_model,
    opmux_ops,
    perplexity,
    save_model,
    throughput,
)
from opmux.demo.corpus import DATA, SHORT, paragraphs, split, unique
from opmux.demo.training import train_logits
from opmux.demo.weights import WEIGHTS
from opmux.op import find

OPS = eager()
SMALL = Config(dim=48, layers=2, num_heads=4, num_kv_heads=2, head_dim=16, ffn_dim=64, context=24)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def shipped() -> Model:
    return load_model()


@pytest.fixture
def small() -> Iterator[Model]:
    """Large random weights, so that attention is far from uniform and every path matters."""
    model = Model(SMALL).requires_grad_(False)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.dim() > 1 else 1.0
        parameter.copy_(scale * torch.randn_like(parameter) + ("norm" in name))
    yield model


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """float32: reordered sums. bfloat16: eager rounds its intermediates, two steps of 2**-8."""
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    x = torch.randn(5, 14).to(dtype)
    gate, up = x.float()[:, :7], x.float()[:, 7:]
    expected = gate / (1 + torch.exp(-gate)) * up
    out = torch.full((5, 7), math.nan, dtype=dtype)
    close(OPS.silu_and_mul(x), expected, dtype)
    assert OPS.silu_and_mul(x, out=out) is out
    close(out, expected, dtype)


def same(actual: Tensor, expected: Tensor) -> None:
    """Logits of order 10 in float32 whose sums were reordered; a wrong position moves them by 1."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, 5, 120).to(dtype).unbind()
    weight, eps = torch.randn(120).to(dtype), 1e-3
    out = torch.full_like(x, math.nan)
    close(OPS.rmsnorm(x, weight, eps), norm(x.float(), weight.float(), eps), dtype)
    close(OPS.rmsnorm(x, weight, eps, out=out), norm(x.float(), weight.float(), eps), dtype)
    total = x.float() + residual.float()
    expected = norm(total, weight.float(), eps)
    OPS.fused_add_rmsnorm(x, residual, weight, eps)
    assert torch.equal(residual, total.to(dtype))
    close(x, expected, dtype)
    if dtype == torch.bfloat16:
        # The sum is not rounded before the norm: values differ only where reordered float32 sums
        # straddle a rounding boundary. Rounding it first moves about every fourth value.
        assert (x == expected.to(dtype)).float().mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_neox", (True, False))
@pytest.mark.parametrize("rotary_dim", (8, 6))  # the whole head, and part of it
def test_rotary_embedding(dtype: torch.dtype, is_neox: bool, rotary_dim: int) -> None:
    head_dim, half = 8, rotary_dim // 2
    fused = torch.randn(5, 3 * head_dim).to(dtype)  # two query heads and one key head, strided
    table = torch.randn(9, rotary_dim)
    positions = torch.tensor([8, 0, 3, 3, 1], dtype=torch.int32)
    expected = fused.float()
    for t, position in enumerate(positions.tolist()):
        for head in range(3):
            for i in range(half):
                pair = (i, i + half) if is_neox else (2 * i, 2 * i + 1)
                a, b = (head * head_dim + p for p in pair)
                cos, sin = table[position, i], table[position, half + i]
                first, second = fused[t, a].float(), fused[t, b].float()
                expected[t, a] = first * cos - second * sin
                expected[t, b] = second * cos + first * sin
    query, key = torch.split(fused, [2 * head_dim, head_dim], dim=-1)
    OPS.rotary_embedding(positions, query, key, head_dim, table, is_neox)
    close(fused, expected, dtype)


def test_store_kv_cache() -> None:
    keys, values = torch.full((2, 6, 2, 4), math.nan)
    k, v = torch.randn(2, 3, 2, 4)
    OPS.store_kv_cache(keys, values, torch.tensor([5, 0, 2], dtype=torch.int32), k, v)
    for cache, new in ((keys, k), (values, v)):
        assert torch.equal(cache[[5, 0, 2]], new)
        assert cache[[1, 3, 4]].isnan().all()


def sampled(row: list[float], top_k: int, top_p: float, uniform: float, joint: bool) -> int:
    """The definition of top_k_top_p_sample, one row in Python floats."""
    mass = [p if p > 0 else 0.0 for p in row]
    kth = sorted(mass, reverse=True)[top_k - 1] if 1 <= top_k <= len(row) else 0.0
    rest = mass if joint else [p if p >= kth else 0.0 for p in mass]
    enough = [t for t in rest if sum(p for p in rest if p >= t) >= top_p * sum(rest)]
    threshold = max(kth, *enough)
    kept = [p if p >= threshold else 0.0 for p in mass]
    running = 0.0
    for token, p in enumerate(kept):
        running += p
        if running > uniform * sum(kept):
            return token
    return -1


@pytest.mark.parametrize("joint", (False, True))
@pytest.mark.parametrize("top_k", (0, 1, 3, 40))  # all, greedy, cut inside ties, beyond the row
@pytest.mark.parametrize("top_p", (0.0, 0.5, 0.9, 1.0))
def test_top_k_top_p_sample(joint: bool, top_k: int, top_p: float) -> None:
    # Multiples of 1/8 are exact in float32: ties are real and sums have no rounding.
    probs = torch.randint(0, 5, (64, 12)) / 8
    probs[0], probs[1, 3], probs[2, 5] = 0, math.nan, -1
    uniform = torch.rand(64)
    uniform[3:9] = 0
    rows = zip(probs.tolist(), uniform.tolist(), strict=True)
    expected = [sampled(row, top_k, top_p, u, joint) for row, u in rows]
    actual = OPS.top_k_top_p_sample(probs, top_k, top_p, uniform, joint)
    per_row = OPS.top_k_top_p_sample(
        probs, torch.full((64,), top_k), torch.full((64,), top_p), uniform, joint
    )
    assert actual.dtype == torch.int32
    assert actual.tolist() == per_row.tolist() == expected


def test_decode_and_chunks_equal_one_prefill(small: Model) -> None:
    tokens = torch.randint(0, 256, (3, SMALL.context))
    whole = small.prefill(OPS, tokens, small.new_cache(3))
    cache, static = small.new_cache(3), small.new_cache(3)
    parts = [small.prefill(OPS, tokens[:, :5], cache)]
    parts.append(small.prefill(OPS, tokens[:, 5:11], cache, start=5))
    small.prefill(OPS, tokens[:, :11], static)
    for i in range(11, SMALL.context):
        at = torch.full((3,), i)
        parts.append(small.decode(OPS, tokens[:, i], at, cache, length=i + 1)[:, None])
        same(small.decode(OPS, tokens[:, i], at, static), whole[:, i])
    same(torch.cat(parts, dim=1), whole)


def test_decode_at_mixed_positions(small: Model) -> None:
    tokens = torch.randint(0, 256, (2, 9))
    whole = small.prefill(OPS, tokens, small.new_cache(2))
    cache = small.new_cache(2)
    small.prefill(OPS, tokens, cache)
    mixed = small.decode(OPS, tokens[[0, 1], [4, 8]], torch.tensor([4, 8]), cache)
    same(mixed, whole[[0, 1], [4, 8]])


def test_training_forward_is_the_same_function(small: Model) -> None:
    tokens = torch.randint(0, 256, (3, SMALL.context))
    expected = small.prefill(OPS, tokens, small.new_cache(3))
    small.requires_grad_(True)
    logits = train_logits(small, tokens)
    same(logits, expected)
    torch.autograd.backward(F.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_decode_compiles_to_one_graph(small: Model) -> None:
    tokens, at = torch.randint(0, 256, (2,)), torch.tensor([0, 0])
    expected = small.decode(OPS, tokens, at, small.new_cache(2))
    # aot_eager traces and functionalises like the default backend, without its C++ compiler.
    step = torch.compile(small.decode, fullgraph=True, backend="aot_eager")
    cache = small.new_cache(2)
    same(step(OPS, tokens, at, cache), expected)
    assert cache.keys[:, ::24].abs().sum() > 0


@pytest.fixture(params=("cpu", "cuda"))
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU on this host")
    return str(request.param)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opmux_ops_give_the_same_model(dtype: torch.dtype, device: str) -> None:
    model, text = load_model(device=device, dtype=dtype), heldout()[: Config().context]
    expected = perplexity(model, OPS, text)
    # bfloat16: both sides round differently in every layer, which averages out over 500 bytes.
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    assert perplexity(model, opmux_ops(), text) == pytest.approx(expected, rel=tolerance)
    drawn = [b"".join(generate(model, ops, b"The ", 8, 0)) for ops in (OPS, opmux_ops())]
    assert drawn[0] == drawn[1]


def test_cuda_serves_every_op_of_the_model() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU on this host")
    backend = next((b for b in opmux.load().backends if b.name == "cuda"), None)
    if backend is None:
        pytest.skip("the backend cuda is not installed")
    model = load_model(device="cuda")
    assert len(b"".join(generate(model, opmux_ops(), b"The ", 4))) == 4
    for name in (field.name for field in fields(Ops) if field.name != "name"):
        made = find(name).table.decisions.values()
        served = {d.winner.backend for d in made if d.winner and "cuda" in str(d.signature)}
        assert served == {"cuda"}, name


def test_demo_records_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from opmux.cli.app import cli

    def speed(*_: object, batch: int, compiled: bool, graphed: bool) -> float:
        return 100.0 * batch + 10 * compiled + graphed

    monkeypatch.setattr("opmux.demo.throughput", speed)
    monkeypatch.setattr("opmux.demo.perplexity", lambda *_: 2.5)
    path = tmp_path / "demo.json"
    command = ["demo", "The ", "--tokens", "2", "--compile", "--record", str(path)]
    result = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert result.exit_code == 0
    written = json.loads(path.read_text())
    assert written["device"] == "cpu" and written["batches"] == [1, 16]
    assert [
        (row["name"], row["perplexity"], row["tokens_per_s"]) for row in written["figures"]
    ] == [
        ("eager", 2.5, [100, 1600]),
        ("reference", 2.5, [100, 1600]),
        ("opmux", 2.5, [100, 1600]),
        ("eager, torch.compile", None, [110, 1610]),
        ("opmux, torch.compile", None, [110, 1610]),
    ]
    assert set(written["served"]) >= {f.name for f in fields(Ops)} - {"name"}
    assert "torch.compile" in result.output  # the cells wrap


def test_graphed_decoding_counts_its_tokens(device: str) -> None:
    if device == "cpu":
        pytest.skip("graphs are a GPU's")
    model = load_model(device=device)
    for ops in (OPS, opmux_ops()):
        assert throughput(model, ops, batch=2, tokens=8, repeats=1, graphed=True) > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_shipped_weights_know_the_text(dtype: torch.dtype) -> None:
    # Five windows. Uniform bytes cost 8 bits, byte frequencies 4.7, byte pairs 3.7.
    text = heldout()[: 5 * Config().context]
    assert math.log2(perplexity(load_model(dtype=dtype), OPS, text)) < 2.0


def test_perplexity_counts_every_byte_once(small: Model) -> None:
    data = bytes(range(60))  # two windows of 24 and a rest
    total = 0.0
    for start in range(0, 59, SMALL.context):
        window = torch.tensor(list(data[start : start + SMALL.context + 1]))[None]
        logits = train_logits(small, window[:, :-1])[0]
        total += F.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    assert perplexity(small, OPS, data) == pytest.approx(math.exp(total / 59), rel=1e-5)


def test_generate_repeats_itself_for_a_seed(shipped: Model) -> None:
    def text(seed: int, temperature: float = 0.7) -> bytes:
        return b"".join(generate(shipped, OPS, b"The ", 16, temperature, seed=seed))

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert text(1, temperature=0) == text(2, temperature=0)
    assert len(text(1)) == 16


def test_generate_goes_on_beyond_the_context(small: Model) -> None:
    count = 3 * SMALL.context
    assert len(b"".join(generate(small, OPS, bytes(count), count))) == count
    assert list(generate(small, OPS, b"", 0)) == []


def test_generate_names_the_ops_that_gave_nan(small: Model) -> None:
    small.norm.fill_(math.nan)
    with pytest.raises(RuntimeError, match="op of the set 'eager'"):
        next(generate(small, OPS, b"x", 1))


def test_user_mistakes(small: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        next(generate(small, OPS, b"x", 1, temperature=-1))
    with pytest.raises(ValueError, match="at least 2 bytes, got 1"):
        perplexity(small, OPS, b"x")
    with pytest.raises(ValueError, match="got 25"):
        throughput(small, OPS, tokens=25)


def test_throughput_is_positive(small: Model) -> None:
    assert throughput(small, OPS, batch=2, tokens=4, repeats=1) > 0


def test_weights_survive_their_file(small: Model, tmp_path: Path) -> None:
    save_model(small, tmp_path / "model.safetensors")
    read = load_model(tmp_path / "model.safetensors")
    assert read.config == SMALL
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, small.state_dict()[name].bfloat16()), name
    assert read.cos_sin.dtype == torch.float32


def test_what_the_repository_carries() -> None:
    assert WEIGHTS.stat().st_size <= 4_000_000
    assert (DATA / "corpus.txt").stat().st_size <= 1_000_000
    assert len(heldout()) <= 40_000
    corpus = {" ".join(p.split()) for p in paragraphs((DATA / "corpus.txt").read_text("ascii"))}
    held = {" ".join(p.split()) for p in paragraphs(heldout().decode("ascii"))}
    assert not {p for p in corpus & held if len(p) >= SHORT}


def test_corpus_has_no_repetition_and_whole_topics_apart() -> None:
    sentence = "Topic {} says something “that” no other topic of this test says: {}."
    topics = {f"topic{i}": "\n\n".join(sentence.format(i, j) for j in range(20)) for i in range(60)}
    topics["all"] = topics["topic1"] + "\n\n" + topics["topic2"]
    topics["table"] = "+---+\n| a |\n+---+\n\nThe naïve reader skips this.\n\nA table went before."
    clean = unique(topics)
    assert "topic1" not in clean
    assert clean["table"] == "A table went before."
    train, held = split(clean)
    assert held.isascii() and held.count(sentence[:5])
    assert 0.02 < len(held) / len(train + held) <= 0.06
    assert not set(held.split("\n")) & set(train.split("\n")) - {""}
