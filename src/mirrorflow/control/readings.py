"""The numbers of a controlled run: what loops answer to, what is logged, and rows for a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..spectrum import Measurement
from ..spectrum.pairs import label
from ..spectrum.records import COLUMNS, Record
from ..weightdecay import WeightDecayScheduler
from ..weightdecay.conventions import strength

__all__ = ["by_layer", "decay_numbers", "finite", "rows", "spectrum_numbers", "value_of"]

_Acting = tuple[float, float, float]  # decay, lr x decay, and what has been absorbed
Metric = str | Callable[[Measurement], float]


def value_of(found: Measurement, metric: Metric) -> float:
    """Return what a loop answers to: a mean over the products that have a ratio, or what is asked.

    Examples
    --------
    >>> value_of(Measurement(()), "ratio"), value_of(Measurement(()), lambda found: 2)
    (nan, 2.0)
    """
    if isinstance(metric, str):
        return found.summary()[f"mean_{metric}"]
    value = metric(found)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {metric!r} gives {value!r}: a number is needed") from error


def by_layer(found: Measurement) -> dict[str, Measurement]:
    """Divide a measurement by the product, whose heads stay together."""
    records: dict[str, list[Record]] = {}
    for record in found.records:
        name = label(record.name, record.kind, record.adapter)
        records.setdefault(name, []).append(record)
    return {name: Measurement(tuple(some)) for name, some in records.items()}


def decay_numbers(scheduler: WeightDecayScheduler, layers: Mapping[int, str]) -> dict[str, float]:
    """Return decay, lr x decay, their sum and the time scale: the largest, and of each set.

    Parameters
    ----------
    scheduler : WeightDecayScheduler
    layers : mapping of int to str
        The names of the layers that loops of their own act on, by the ids of the loops.

    Returns
    -------
    dict of str to float
        ``weight_decay``, ``decay_per_step``, ``absorbed_decay`` and ``decay_timescale`` (in
        steps; infinite without decay), and for layers or several sets the same with ``/name``: of
        the layer, or of the group, with a number if several sets share it.
    """
    sets: dict[tuple[str, int], list[_Acting]] = {}
    decays = scheduler.get_last_weight_decay()
    for target, decay, entry, a in zip(
        scheduler.targets, decays, scheduler.account.entries, scheduler.accumulated, strict=True
    ):
        if target.schedule is not None:
            group, key = scheduler.optimizer.param_groups[target.group], id(target.schedule)
            name = layers.get(key) or str(group.get("name", target.group))
            acting = strength(decay, group, entry.coupling)
            sets.setdefault((name, key), []).append((decay, acting, 0.0 - a))
    numbers = _largest([row for of_set in sets.values() for row in of_set], "")
    if len(sets) > 1 or layers:
        for suffix, of_set in zip(_suffixes([n for n, _ in sets]), sets.values(), strict=True):
            numbers |= _largest(of_set, suffix)
    return numbers


def _suffixes(names: list[str]) -> list[str]:
    """Tell apart the sets of one group: /0.0 and /0.1."""
    before = [names[:i].count(name) for i, name in enumerate(names)]
    return [
        f"/{name}.{place}" if names.count(name) > 1 else f"/{name}"
        for name, place in zip(names, before, strict=True)
    ]


def _largest(found: Iterable[_Acting], suffix: str) -> dict[str, float]:
    """Return the largest of decay, lr x decay and sum, and the shortest time scale."""
    decay, acting, absorbed = (
        math.nan if any(map(math.isnan, values)) else max(values)
        for values in zip(*found, strict=True)
    )
    return {
        f"weight_decay{suffix}": decay,
        f"decay_per_step{suffix}": acting,
        f"absorbed_decay{suffix}": absorbed,
        f"decay_timescale{suffix}": 1 / acting if acting else math.inf,
    }


def spectrum_numbers(found: Measurement, metric: Metric, layers: Iterable[str]) -> dict[str, float]:
    """Return the means of a measurement, and what the loops of layers have answered to."""
    means = {key.removeprefix("mean_"): value for key, value in found.summary().items()}
    numbers = {f"spectrum/{name}": value for name, value in means.items()}
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
    if name not in COLUMNS:
        numbers["spectrum/metric"] = value_of(found, metric)
    parts = by_layer(found)
    return numbers | {f"{name}/{layer}": value_of(parts[layer], metric) for layer in layers}


def finite(numbers: Mapping[str, float]) -> dict[str, float]:
    """Leave out what is NaN or infinite: not every logger takes it."""
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def rows(measurements: Iterable[tuple[int, Measurement]]) -> list[dict[str, Any]]:
    """Return measurements as flat rows, one for each product or head and step.

    Returns
    -------
    list of dict
        step, layer, kind, adapter, head, n, r, m, status, the numbers of `Record`, and its notes;
        as ``csv.DictWriter`` and ``pandas.DataFrame`` take them.
    """
    return [_row(step, record) for step, found in measurements for record in found.records]


def _row(step: int, record: Record) -> dict[str, Any]:
    """Return a record as a row."""
    numbers = ("nuclear", "frobenius", "spectral", "ratio", "effective_rank", "stable_rank")
    numbers += ("gap", "imbalance", "scale")
    return {
        "step": step,
        "layer": record.name,
        "kind": record.kind,
        "adapter": record.adapter,
        "head": record.head,
        **dict(zip("nrm", record.shape, strict=True)),
        "status": record.status,
        **{name: getattr(record, name) for name in numbers},
        "notes": "; ".join(record.notes),
    }
