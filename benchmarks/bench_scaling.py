"""How time grows with the size of the problem: end points, cross-validation, completion.

Each case is measured at sizes that double; its exponent is the slope of log(time) against log(size)
by least squares. ``python -m benchmarks.bench_scaling`` draws the stored rows into
results/bench_scaling.svg.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mirrorflow as mf
from benchmarks._measure import RESULTS, measure

REPEATS = 3
SIZES: dict[str, tuple[int, ...]] = {
    "limit, n": (50, 100, 200, 400),
    "limit, d": (500, 1000, 2000, 4000),
    "MirrorFlowRegressorCV, n": (50, 100, 200, 400),
    "MirrorFlowRegressorCV, d": (250, 500, 1000, 2000),
    "MatrixSensing, side": (200, 400, 800, 1600),
    "MatrixSensing, rank": (2, 4, 8, 16),
}


def end_point(n: int, d: int) -> Callable[[], Any]:
    """Solve for an end point of moderate sparsity, of data without a sparse truth."""
    rng = np.random.default_rng(n + d)
    Z, y = rng.standard_normal((n, d)), rng.standard_normal(n)
    start = torch.full((d,), 1e-2, dtype=torch.float64)
    R = mf.legendre(mf.Hadamard(), mf.WeightDecay(), (torch.zeros_like(start), start))
    return lambda: mf.limit(R, Z, y, 0.0)


def regression(n: int, d: int) -> Callable[[], Any]:
    """Cross-validate the regressor on a sparse truth, a tenth of the rows long, at SNR 10."""
    rng = np.random.default_rng(n + d)
    X, truth = rng.standard_normal((n, d)), np.zeros(d)
    truth[rng.choice(d, max(1, n // 10), replace=False)] = 1.0
    signal = X @ truth
    y = signal + rng.standard_normal(n) * signal.std() / np.sqrt(10)
    return lambda: mf.MirrorFlowRegressorCV().fit(X, y)


def completion(side: int, rank: int) -> Callable[[], Any]:
    """Complete a square matrix of which ten times as many entries as it has unknowns are seen."""
    rng = np.random.default_rng(side + rank)
    X = rng.standard_normal((side, rank)) @ rng.standard_normal((rank, side))
    share = min(0.9, 20 * rank / side)
    seen = np.where(rng.random(X.shape) < share, X, np.nan)
    return lambda: mf.MatrixSensing(min(2 * rank, side), tol=1e-4).fit(seen)


CASES: dict[str, Callable[[int], Callable[[], Any]]] = {
    "limit, n": lambda n: end_point(n, 2000),
    "limit, d": lambda d: end_point(100, d),
    "MirrorFlowRegressorCV, n": lambda n: regression(n, 1000),
    "MirrorFlowRegressorCV, d": lambda d: regression(100, d),
    "MatrixSensing, side": lambda side: completion(side, 5),
    "MatrixSensing, rank": lambda rank: completion(400, rank),
}
FIXED = {
    "limit, n": "d = 2,000",
    "limit, d": "n = 100",
    "MirrorFlowRegressorCV, n": "d = 1,000",
    "MirrorFlowRegressorCV, d": "n = 100",
    "MatrixSensing, side": "rank 5, about 10 entries for each unknown",
    "MatrixSensing, rank": "400 x 400, about 10 entries for each unknown",
}


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the slope of log(seconds) against log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def grown(name: str, sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Measure one case at all sizes; they take turns."""
    seconds = measure({str(size): CASES[name](size) for size in sizes}, repeats)
    taken = [seconds[str(size)] for size in sizes]
    return {
        "case": f"{name} ({FIXED[name]})",
        "seconds": taken[-1],
        "exponent": exponent(sizes, taken),
        "sizes": list(sizes),
        "seconds of each size": taken,
    }


def run(
    sizes: dict[str, tuple[int, ...]] | None = None, repeats: int = REPEATS
) -> list[dict[str, Any]]:
    """Measure every case."""
    return [grown(name, values, repeats) for name, values in (sizes or SIZES).items()]


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    """Draw time against size on logarithmic axes, a panel for each kind of problem."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    kinds = list(dict.fromkeys(row["case"].split(",")[0] for row in rows))
    figure = Figure(figsize=(3.4 * len(kinds), 3.2), layout="constrained")
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        own = [row for row in rows if row["case"].split(",")[0] == kind]
        for row, style, colour in zip(own, ("o-", "s--"), ("#000000", "#0072B2"), strict=False):
            what = row["case"].split(", ", 1)[1].split(" (")[0]
            label = f"{what}: time ~ {what}^{row['exponent']:.2f}"
            axis.loglog(row["sizes"], row["seconds of each size"], style, color=colour, label=label)
        names = " or ".join(row["case"].split(", ", 1)[1].split(" (")[0] for row in own)
        axis.set(title=kind, xlabel=names, ylabel="seconds", ylim=_room(own))
        for scale in (axis.xaxis, axis.yaxis):  # labels at powers of ten alone: others run together
            scale.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, loc="upper left")
    with rc_context({"svg.hashsalt": "mirrorflow"}):  # the same file for the same rows
        figure.savefig(path, metadata={"Date": None})
    return path


def _room(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Return limits in whole powers of ten, with a free stripe above for the legend."""
    times = np.log10([t for row in rows for t in row["seconds of each size"]])
    return 10.0 ** np.floor(times.min()), 10.0 ** (np.ceil(times.max()) + 0.8)


if __name__ == "__main__":
    stored = json.loads((RESULTS / "bench_scaling.json").read_text(encoding="utf-8"))
    print(draw(stored["rows"], RESULTS / "bench_scaling.svg"))
