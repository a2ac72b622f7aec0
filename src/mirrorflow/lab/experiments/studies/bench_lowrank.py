"""Low-rank recovery: MatrixSensing beside the nuclear norm, soft-impute and hard-impute."""

from __future__ import annotations

import statistics
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from ...framework import contract
from ...framework.contract import Part, Record, Recorder, Trajectory, Verdict, checksum
from ._lowrank_data import SYNTHETIC, Entries, LowRankData, drawn, faces, medians, pixels

if TYPE_CHECKING:
    from altair import TopLevelMixin
    from matplotlib.figure import Figure

    from ._lowrank_methods import Fitted

NAME = "bench_lowrank"
TITLE = "Low-rank recovery: when to switch the decay off, and when to keep it"
PAPER = "Figures of our own: a study that the paper does not have"
OFF, KEPT = "mirrorflow (decay off)", "mirrorflow (decay kept)"
CONVEX = "nuclear norm (CVXPY)"
ALL = (OFF, KEPT, "soft-impute", "hard-impute", CONVEX)
CLOSE = 1.02  # times the least error: as good as the best

Array = NDArray[np.float64]


class Config(contract.Config):
    """The cells of the study.

    Attributes
    ----------
    small, large, measured : (int, int)
        Shapes: of matrices that CVXPY completes too, of those that it does not, and of those that
        are known by <A_i, X> with random A_i.
    ranks, large_rank : tuple of int, int
        Of the truth.
    seens, noises : tuples of float
        The fraction of the entries that is known (of measurements: as many as that), and the
        standard deviation of their noise relative to the entries' own.
    images : tuple of str
        "china" and "flower" (photographs, grey), "digits" and "faces" (one image a row; the
        Olivetti faces, left out where they are not at hand).
    shrink : int
        Photographs keep one pixel, a mean, of so many in each direction.
    max_rank, image_rank : int
        The largest rank that methods may use.
    methods : tuple of str
        Names in `_lowrank_methods.METHODS`; those whose package is missing are left out, and the
        records say so.
    seeds : tuple of int
        One draw of each synthetic cell; images are masked with the first.
    """

    small: tuple[int, int] = (30, 24)
    large: tuple[int, int] = (150, 120)
    measured: tuple[int, int] = (16, 12)
    ranks: tuple[int, ...] = (1, 3)
    large_rank: int = Field(default=5, ge=0)
    seens: tuple[float, ...] = Field(default=(0.3, 0.5), min_length=1)
    noises: tuple[float, ...] = Field(default=(0.0, 0.1, 0.5), min_length=1)
    images: tuple[Literal["china", "flower", "digits", "faces"], ...] = (
        "china", "flower", "digits", "faces",
    )  # fmt: skip
    shrink: int = Field(default=4, ge=1)
    max_rank: int = Field(default=10, ge=1)
    image_rank: int = Field(default=30, ge=1)
    methods: tuple[str, ...] = ALL
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)

    @field_validator("methods")
    @classmethod
    def _known(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse unknown methods, and studies without our own."""
        if not {OFF, KEPT} <= set(values) or not set(values) <= set(ALL):
            raise ValueError(f"methods must hold {OFF!r} and {KEPT!r}, among {', '.join(ALL)}")
        return values

    @classmethod
    def preset(cls, name: str) -> Config:
        """Return smoke (tiny matrices and a photograph), cpu (three draws), or full (ten draws)."""
        if name == "smoke":
            return cls(
                small=(8, 6), large=(14, 12), measured=(4, 3), ranks=(1,), large_rank=2,
                seens=(0.6,), noises=(0.0, 0.1), images=("china",), shrink=32, max_rank=2,
                image_rank=2, methods=(OFF, KEPT, "soft-impute", "hard-impute"), seeds=(0,),
            )  # fmt: skip
        return cls(seeds=tuple(range(10)), shrink=2) if name == "full" else cls()


def run(config: Config, recorder: Recorder) -> list[Record]:
    """Fit every method in every cell."""
    from ._lowrank_methods import OPTIONAL, available

    methods = [m for m in config.methods if available(m)]
    absent = [(m, f"{OPTIONAL[m]} is not installed") for m in config.methods if m not in methods]
    parts = [(f"{kind}{i}", "cells", partial(_cell, config, methods, kind, *cell))
             for kind in ("small", "large", "measured")
             for i, cell in enumerate(_cells(config, kind))]  # fmt: skip
    for name in config.images:
        if name == "faces" and faces() is None:
            absent.append((name, "the Olivetti faces are not at hand"))
            continue
        parts += [(f"{name}{i}", "cells", partial(_image, config, methods, name, seen))
                  for i, seen in enumerate(config.seens)]  # fmt: skip
    left_out = [{"data": "left out", "method": name, "reason": why} for name, why in absent]
    return [*left_out, *recorder.records(parts)]


def _cells(config: Config, kind: str) -> list[tuple[int, float, float]]:
    """Return (rank, seen, noise) of each cell of a kind."""
    ranks = (config.large_rank,) if kind == "large" else config.ranks
    return list(product(ranks, config.seens, config.noises))


def _cell(
    config: Config, methods: list[str], kind: str, rank: int, seen: float, noise: float
) -> Part:
    """Fit the methods to every draw of one cell."""
    shape = {"small": config.small, "large": config.large, "measured": config.measured}[kind]
    chosen = [m for m in methods if not (kind == "large" and m == CONVEX)]
    if kind == "measured":
        chosen = [m for m in chosen if "impute" not in m]
    records, last = [], np.zeros(0)
    for seed in config.seeds:
        rng = np.random.default_rng([seed, *shape, rank, round(100 * seen), round(100 * noise)])
        truth = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
        problem = drawn(kind, truth, seen, noise, rng)
        last = problem.adjoint()
        cell: Record = {"data": kind, "rank": rank, "seen": seen, "noise": noise, "seed": seed}
        for method in chosen:
            found = _fit(method, problem, config.max_rank, seed)
            error = float(np.linalg.norm(found.X - truth) / np.linalg.norm(truth))
            records.append({**cell, **_outcome(method, found), "error": error})
    return Part(records, {}, checksum(last))


def _fit(method: str, problem: LowRankData, max_rank: int, seed: int) -> Fitted:
    """Fit a method, with a rank that the shape allows."""
    from ._lowrank_methods import fit

    return fit(method, problem, min(max_rank, *problem.shape), seed)


def _outcome(method: str, found: Fitted) -> Record:
    """Return what a record says of a fit, except its error."""
    s = np.linalg.svd(found.X, compute_uv=False)
    return {
        "method": method,
        "found": int((s > 1e-3 * max(s.max(), 1e-300)).sum()),
        "knob": found.knob,
        "seconds": found.seconds,
        "settled": int(found.settled),
    }


def _image(config: Config, methods: list[str], name: str, seen: float) -> Part:
    """Hide pixels, and measure on them; the mean of what is seen is taken off before."""
    truth, seed = pixels(name, config.shrink), config.seeds[0]
    known = np.random.default_rng([seed, round(100 * seen)]).random(truth.shape) < seen
    mean = truth[known].mean()
    problem = Entries(np.where(known, truth - mean, np.nan))
    spread = np.linalg.norm((truth - mean)[~known])
    pictures = {"truth": _grey(truth), "seen": _grey(np.where(known, truth, 1.0))}
    records = []
    for method in (m for m in methods if m != CONVEX):
        found = _fit(method, problem, config.image_rank, seed)
        error = float(np.linalg.norm((found.X + mean - truth)[~known]) / spread)
        pictures[method] = _grey(found.X + mean)
        cell: Record = {"data": name, "seen": seen, "seed": seed}
        records.append({**cell, **_outcome(method, found), "error": error})
    shown = name in ("china", "flower") and seen == max(config.seens)
    return Part(records, pictures if shown else {}, checksum(truth))


def _grey(X: Array) -> NDArray[np.uint8]:
    """Return the grey levels 0 to 255 of numbers in [0, 1]."""
    return np.clip(np.round(255 * X), 0, 255).astype(np.uint8)


# --- What the page shows of it --------------------------------------------------------------------

CELL = ("data", "rank", "seen", "noise")


def verdicts(records: list[Record]) -> list[Verdict]:
    """Say what the run shows, with its numbers."""
    groups: dict[str, list[Record]] = {"without noise": [], "with noise": [], "on images": []}
    for r in (r for r in records if "error" in r):
        synthetic = r["data"] in SYNTHETIC
        name = ("with noise" if r["noise"] else "without noise") if synthetic else "on images"
        groups[name].append(r)
    present = {name: found for name, found in groups.items() if found}
    return [
        *((f"Decay off brings a smaller error than kept, {k}", _ahead(v))
          for k, v in present.items()),
        *((f"Cells with the least error, or within {CLOSE - 1:.0%} of it, {k}", _leaders(v))
          for k, v in present.items()),
        (f"Times as multiples of {OFF}'s (medians over the cells)", _times(records)),
        *_left_out(records),
    ]  # fmt: skip


def _ahead(records: list[Record]) -> str:
    """Say in how many cells the decay is better switched off than kept."""
    found = list(medians(records, CELL).values())
    return f"{sum(m[OFF]['error'] < m[KEPT]['error'] for m in found)} of {len(found)} cells"


def _leaders(records: list[Record]) -> str:
    """Say in how many cells each method has the least error, or almost."""
    found = list(medians(records, CELL).values())
    wins: dict[str, int] = {}
    for methods in found:
        least = min(m["error"] for m in methods.values())
        for name, m in methods.items():
            wins[name] = wins.get(name, 0) + (m["error"] <= CLOSE * least)
    taking_part = {name: sum(name in methods for methods in found) for name in wins}
    ranked = sorted(wins, key=lambda name: -wins[name] / taking_part[name])
    return ", ".join(f"{name} {wins[name]} of {taking_part[name]}" for name in ranked)


def _times(records: list[Record]) -> str:
    """Say how long the methods take compared with the first of ours."""
    cells = medians(records, CELL).values()
    names = dict.fromkeys(r["method"] for r in records if "error" in r and r["method"] != OFF)
    ratios = {
        name: statistics.median(c[name]["seconds"] / c[OFF]["seconds"] for c in cells if name in c)
        for name in names
    }
    return ", ".join(f"{name} {ratio:.2g}" for name, ratio in ratios.items())


def _left_out(records: list[Record]) -> list[Verdict]:
    """Say what is missing, and why."""
    found = [f"{r['method']} ({r['reason']})" for r in records if r["data"] == "left out"]
    return [("Left out", ", ".join(found))] if found else []


def table(records: list[Record]) -> list[Record]:
    """Return a row for each kind of data, noise and method: medians over the rest."""
    rows = []
    for (data, noise), methods in medians(records, ("data", "noise")).items():
        for name, m in methods.items():
            rows.append(
                {
                    "data": SYNTHETIC.get(data, data),
                    "noise": noise,
                    "method": name,
                    "relative error": m["error"],
                    "rank found": m["found"],
                    "seconds": m["seconds"],
                }
            )
    return rows


def draw(records: list[Record], trajectory: Trajectory) -> Figure:
    """Draw the error against the noise for each kind of matrix, and for each image."""
    from ._lowrank_figures import draw_figure

    return draw_figure(records)


def charts(records: list[Record], trajectory: Trajectory) -> list[tuple[str, TopLevelMixin]]:
    """Make the interactive versions, and show the photographs."""
    from ._lowrank_figures import make_charts

    return make_charts(records, trajectory)
