# SPDX-License-Identifier: Apache-2.0
"""What the measurements say: the table, the means, the plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .peers import INCUMBENT

Row = dict[str, Any]


def merge(rows: Iterable[Row]) -> list[Row]:
    """Join what the worlds measured of a case.

    A ratio is taken within one world; of opmux's times, one per world, the median-like middle one
    is shown.
    """
    cases: dict[str, Row] = {}
    for row in rows:
        case = cases.setdefault(row["case"], {
            **{k: row[k] for k in ("case", "op", "bytes", "floor_us", "goal", "goal_us")},
            "ours": [], "us": {}, "ratio": {}, "failed": {},
        })  # fmt: skip
        case["failed"] |= row["failed"]
        ours = row["us"].get("opmux")
        if ours is not None:
            case["ours"].append(ours)
        for name, value in row["us"].items():
            if name != "opmux":
                case["us"][name] = value
                if ours is not None:
                    case["ratio"][name] = value / ours
    for case in cases.values():
        taken = sorted(case.pop("ours"))
        case["opmux_us"] = taken[len(taken) // 2] if taken else None
        case["of_copy"] = case["floor_us"] / case["opmux_us"] if taken else None
        ratio = case["ratio"]
        best = min(ratio, key=ratio.__getitem__, default=None)
        case["best_peer"], case["x_best"] = best, ratio.get(best) if best else None
        case["x_sglang"] = min((ratio[n] for n in INCUMBENT if n in ratio), default=None)
        case["met"] = _met(case)
    return list(cases.values())


def _met(case: Row) -> bool | None:
    """Whether the case reaches its goal and no peer is faster; None where ours did not run."""
    if case["opmux_us"] is None:
        return None
    return (
        (not case["goal"] or case["of_copy"] >= case["goal"])
        and (not case["goal_us"] or case["opmux_us"] <= case["goal_us"])
        and (case["x_best"] is None or case["x_best"] >= 1.0)
    )


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Return the geometric mean of those that are numbers."""
    logs = [math.log(v) for v in values if v]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def libraries(cases: Sequence[Row]) -> list[str]:
    """Return the peers that served at least one case, in order of appearance."""
    return list(dict.fromkeys(name for case in cases for name in case["us"]))


def table(cases: Sequence[Row], title: str) -> Table:
    """Return the cases as a table of microseconds; what misses its goal or a peer is marked."""
    names = libraries(cases)
    heads = [name.replace("flashinfer", "fi").replace("sglang ", "sgl ") for name in names]
    result = Table("case", "floor", "opmux", "of copy", "x best", "x sgl", *heads, title=title,
                   box=None, padding=(0, 1, 0, 0))  # fmt: skip
    for column in result.columns[1:]:
        column.justify = "right"
    for case in cases:
        mark = {True: "", False: " !", None: " -"}[case["met"]]
        result.add_row(
            case["case"] + mark, _number(case["floor_us"]), _number(case["opmux_us"]),
            _number(case["of_copy"]), _number(case["x_best"]), _number(case["x_sglang"]),
            *(_number(case["us"].get(name)) for name in names),
        )  # fmt: skip
    return result


def summary(cases: Sequence[Row]) -> dict[str, float | int | None]:
    """Return the means over the cases."""
    best = [case["x_best"] for case in cases]
    return {
        "cases": len(cases),
        "x_best_peer_geometric_mean": geometric_mean(best),
        "x_sglang_geometric_mean": geometric_mean(case["x_sglang"] for case in cases),
        "cases_with_a_peer": sum(x is not None for x in best),
        "cases_behind_a_peer": sum(x is not None and x < 1.0 for x in best),
        "cases_that_miss": sum(case["met"] is False for case in cases),
        "cases_not_run": sum(case["met"] is None for case in cases),
    }


def plot(cases: Sequence[Row], copy_rate: float, empty_us: float, path: Path, title: str) -> None:
    """Draw achieved bandwidth against bytes moved, below the copy and the launch ceilings."""
    import matplotlib as mpl  # type: ignore[import-not-found, unused-ignore]

    mpl.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

    figure, axes = pyplot.subplots(figsize=(10, 6), dpi=120)
    sizes = [10 ** (4 + 0.05 * i) for i in range(120)]
    axes.axhline(copy_rate / 1e12, color="black", linewidth=1, label="copy, this run")
    axes.plot(sizes, [s / (empty_us * 1e-6 + s / copy_rate) / 1e12 for s in sizes], color="black",
              linewidth=1, linestyle=":", label="copy and an empty kernel")  # fmt: skip
    drawn: list[tuple[str, Mapping[str, float]]] = [
        (name, {c["case"]: c["us"][name] for c in cases if name in c["us"]})
        for name in libraries(cases)
    ]
    for name, taken in drawn:
        points = [(c["bytes"], c["bytes"] / taken[c["case"]] / 1e6) for c in cases
                  if c["case"] in taken]  # fmt: skip
        axes.scatter(*zip(*points, strict=True), s=14, alpha=0.6, label=name)
    points = [(c["bytes"], c["bytes"] / c["opmux_us"] / 1e6) for c in cases if c["opmux_us"]]
    if points:
        axes.scatter(*zip(*points, strict=True), s=34, marker="*", color="red", label="opmux",
                     zorder=3)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="bytes that a case must move",
             ylabel="achieved, TB/s", title=title)  # fmt: skip
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    axes.legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
