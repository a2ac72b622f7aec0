"""Spectra from Gram matrices against dense SVDs of the product, and against reading the factors.

All heads of GPT-2 small, the whole width of its layers, and LoRA r = 8 at widths 768 and 4,096. The
dense SVD of one product is timed and taken times the number of products: they are alike. Both give
singular values, from which norms and ratios cost the same. The target is against float64, whose
digits are ours; float32, which has half of them, is beside it. The audit reads a checkpoint made
here, in a process of its own, whose peak memory is its result.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import mirrorflow.spectrum as spectrum
from benchmarks._measure import measure, timings

CASES = (  # name, products, n = m, r, target, threads (0: as torch chooses)
    ("12 x 12 heads of GPT-2 small", 144, 768, 64, 100, 0),
    ("LoRA r = 8, 24 pairs of width 768", 24, 768, 8, 5000, 0),
    ("LoRA r = 8, 24 pairs of width 768, one thread", 24, 768, 8, 5000, 1),
    ("LoRA r = 8, 64 pairs of width 4,096", 64, 4096, 8, 5000, 0),
    ("W_Q^T W_K over the whole width of GPT-2 small, 12 layers", 12, 768, 768, None, 0),
)
RANK, SMALL = 8, 24  # of LoRA; the number of products that takes less than a millisecond
AUDIT_PAIRS, AUDIT_WIDTH = 16, 2048  # 2 x 16 + 2 x 16 matrices of 16 MB: 1 GB
CHILD = """
import json, sys, time
import torch, safetensors.torch
from mirrorflow.spectrum import audit
def memory(entry):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before, started = memory("VmRSS"), time.perf_counter()
found = audit(sys.argv[1], level="head")
seconds = time.perf_counter() - started
print(json.dumps([seconds, before, memory("VmHWM"), len(found.records)]))
"""


ONE = """
import json, sys
from benchmarks.bench_spectrum import product
print(json.dumps(product(*json.loads(sys.argv[1]))))
"""
RATIO = "ratio, at equal accuracy"


def factors(count: int, n: int, r: int) -> tuple[Tensor, Tensor]:
    """Make the weights as they are stored: Q and K (r, n), or lora_B (n, r) and lora_A, float32."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(count, r, n, generator=generator).mT
    return A.contiguous() if r == RANK else A, torch.randn(count, r, n, generator=generator)


def product(name: str, count: int, n: int, r: int, target: int | None, threads: int = 0) -> dict:
    """Compare `product_spectrum` of a batch with dense SVDs."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        return _product(name, count, n, r, target)
    finally:
        torch.set_num_threads(before)


def in_processes(cases: Sequence[tuple], count: int = 15) -> list[dict]:
    """Return for each case the row of the process with the median ratio, and the ratios' range.

    Where a process has its code and data in memory decides which lines of the cache they share,
    and that makes a fifth of the time of small products; so does what else a shared host does,
    which hits small operations more than dense SVDs. The cases take turns.
    """
    rows = [[_in_process(case) for case in cases] for _ in range(count)]
    return [_middle(list(of_case)) for of_case in zip(*rows, strict=True)]


def _in_process(case: tuple) -> dict:
    command = [sys.executable, "-c", ONE, json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _middle(rows: list[dict]) -> dict:
    """Return the row whose ratio is the median."""
    rows.sort(key=lambda row: row[RATIO])
    spread = [rows[0][RATIO], rows[-1][RATIO]]
    return {**rows[len(rows) // 2], f"ratios of {len(rows)} processes": spread}


def _product(name: str, count: int, n: int, r: int, target: int | None) -> dict:
    A, B = factors(count, n, r)
    ours = spectrum.product_spectrum(A, B).nuclear[0].item()
    exact = torch.linalg.svdvals(A[0].double() @ B[0].double()).sum().item()
    single = torch.linalg.svdvals(A[0] @ B[0]).sum().item()
    calls = {
        "ours": lambda: spectrum.product_spectrum(A, B),
        "read": lambda: (A.sum(), B.sum()),
    }
    dense = {
        "float32": lambda: torch.linalg.svdvals(A[0] @ B[0]),
        "float64": lambda: torch.linalg.svdvals(A[0].double() @ B[0].double()),
    }
    turns = {
        **timings(calls, 15 if r < 100 else 3),
        **timings(dense, 7 if n < 1000 else 1),
    }
    taken = {name: median(times) for name, times in turns.items()}
    fastest = {name: min(times) for name, times in turns.items()}
    return {
        "case": name,
        "seconds": taken["ours"],
        "dense SVDs in float64, seconds": taken["float64"] * count,
        RATIO: taken["float64"] * count / taken["ours"],
        "that ratio, of the fastest turns": fastest["float64"] * count / fastest["ours"],
        "target": target,
        "dense SVDs in float32, seconds": taken["float32"] * count,
        "ratio to float32": taken["float32"] * count / taken["ours"],
        "reading the factors once, seconds": taken["read"],
        "times the limit": taken["ours"] / taken["read"],
        "relative error of the nuclear norm": abs(ours / exact - 1),
        "that of dense SVDs in float32": abs(single / exact - 1),
    }


def tracker() -> dict:
    """Measure the tracker's own cost on the LoRA updates of a GPT-2-small-sized model."""
    model = torch.nn.ModuleList(_Lora(768, 8) for _ in range(24))
    tracked = spectrum.SpectralTracker(model)
    seconds = measure({"measure": tracked.measure}, 15)["measure"]
    return {
        "case": "SpectralTracker.measure, 24 LoRA updates r = 8 of width 768",
        "seconds": seconds,
        "share of a step of 2.1 s, every 10 steps": seconds / 21,
        "target": 0.01,
    }


class _Lora(torch.nn.Module):
    """The weights of a LoRA layer, as PEFT names them."""

    def __init__(self, width: int, r: int) -> None:
        super().__init__()
        self.scaling = {"default": 2.0}
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(width, r, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(r, width, bias=False)})


def audited() -> dict:
    """Measure time and peak memory of `audit` on a checkpoint of 1 GB."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        weights = {
            f"layers.{i}.self_attn.{part}.weight": torch.randn(AUDIT_WIDTH, AUDIT_WIDTH) / 50
            for i in range(AUDIT_PAIRS)
            for part in ("q_proj", "k_proj", "v_proj", "o_proj")
        }
        size = sum(weight.numel() * weight.element_size() for weight in weights.values()) / 2**20
        save_file(weights, Path(folder) / "model.safetensors")
        del weights
        (Path(folder) / "config.json").write_text(json.dumps({"num_attention_heads": 32}))
        command = [sys.executable, "-c", CHILD, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, before, peak, records = json.loads(done.stdout)
    pair = 2 * AUDIT_WIDTH**2 * 4 / 2**20
    return {
        "case": f"audit of {size:.0f} MB, {AUDIT_PAIRS} layers of width {AUDIT_WIDTH}, by head",
        "seconds": seconds,
        "products": records,
        "peak memory above the imports, MB": peak - before,
        "largest pair, MB": pair,
        "times the limit": (peak - before) / pair,
    }


def run() -> list[dict]:
    """Measure products, the tracker and the audit."""
    small = in_processes([case for case in CASES if case[1] == SMALL])
    first, *others = [product(*case) for case in CASES if case[1] != SMALL]
    return [first, *small, *others, tracker(), audited()]
