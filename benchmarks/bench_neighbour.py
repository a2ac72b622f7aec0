"""Calls beside a process that keeps one core busy, against the same calls without it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

import mirrorflow as mf
from benchmarks import bench_regression, bench_scaling
from benchmarks._measure import timings

BUSY = "print(flush=True)\nwhile True: pass"
REPEATS = 21
TARGET = 1.2  # times the idle time


def calls() -> dict[str, Callable[[], Any]]:
    """Return calls of moderate size, one of each kind."""
    X, y, _ = bench_regression.problem(100, 500, 10)
    spectra = bench_regression.spectra(215, 100)
    attention = torch.randn(768, 64), torch.randn(64, 768)
    return {
        "MirrorFlowRegressorCV, 100 x 500": lambda: mf.MirrorFlowRegressorCV().fit(X, y),
        "MirrorFlowRegressorCV, 215 x 100 spectra": lambda: mf.MirrorFlowRegressorCV().fit(
            *spectra
        ),
        "MirrorFlowRegressor, 100 x 500": lambda: mf.MirrorFlowRegressor().fit(X, y),
        "MirrorFlowRegressor(interpolate=True), 100 x 500": lambda: mf.MirrorFlowRegressor(
            interpolate=True
        ).fit(X, y),
        "entropy_path of 8, 100 x 500": lambda: mf.entropy_path(X, y, np.linspace(4, -20, 8)),
        "limit, 100 x 1000": bench_scaling.end_point(100, 1000),
        "limit, 200 x 2000": bench_scaling.end_point(200, 2000),
        "MatrixSensing, 400 x 400": bench_scaling.completion(400, 5),
        "product_spectrum, 768 x 64 x 768": lambda: mf.product_spectrum(*attention),
        "the machine itself: 30,000 products by a 215 x 100 matrix": lambda: products(spectra[0]),
    }


def products(X: np.ndarray) -> None:
    """Multiply on one thread: what any program without a second thread loses to a neighbour."""
    with threadpool_limits(1):
        v = np.ones(X.shape[1])
        for _ in range(15_000):
            v = X.T @ (X @ v)
            v /= np.linalg.norm(v)


@contextmanager
def neighbour() -> Iterator[None]:
    """Keep one core busy meanwhile."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.2)  # it starts on our core, from which the system has to move one of us
            yield
        finally:
            process.kill()


def compare(chosen: Mapping[str, Callable[[], Any]], repeats: int) -> list[dict[str, Any]]:
    """Time calls without a neighbour and with one, in turns."""
    idle: dict[str, list[float]] = {name: [] for name in chosen}
    busy: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(repeats):
        for name, call in chosen.items():
            idle[name] += timings({name: call}, 1)[name]
            with neighbour():
                busy[name] += timings({name: call}, 1)[name]
    return [
        {
            "case": f"{name}, with a busy neighbour",
            "seconds": median(busy[name]),
            "without, seconds": median(idle[name]),
            "ratio": median(busy[name]) / median(idle[name]),
            "target": TARGET,
        }
        for name in chosen
    ]


def run() -> list[dict[str, Any]]:
    """Measure every call; on a machine that is not idle both times are those of a crowd."""
    return compare(calls(), REPEATS)
