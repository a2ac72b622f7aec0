"""Truncated LoRA products from r x r work against dense SVDs, kohya's resize script, and PEFT's.

64 products of width 4,096 and 768, r = 16 truncated to 8. What forms the product is timed on one
of them and taken times their number: they are alike. The resize script of kohya's sd-scripts forms
it in float32 and takes ``torch.svd_lowrank`` with q = 2 k and two iterations where both sides
exceed 2,048, else a dense SVD; `peft.convert_to_lora` takes a dense SVD in float32. Beside the
times is how far each result is from the truncated dense SVD in float64. A whole file, read, planned
and written, is timed as well.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks._measure import kept, once, timings
from mirrorflow.spectrum.truncate import truncate
from mirrorflow.spectrum.truncation import truncated_product

CASES = (  # name, products, n = m
    ("LoRA r = 16 to 8, 64 products of width 768", 64, 768),
    ("LoRA r = 16 to 8, 64 products of width 4,096", 64, 4096),
)
R, RANK, TARGET = 16, 8, 1000
LARGE, ITERATIONS = 2048, 2  # from where on, and how often, the resize script iterates

Factors = tuple[Tensor, Tensor]


def factors(count: int, n: int) -> Factors:
    """Make weights as they are stored in float32, with singular values that fall."""
    generator = torch.Generator().manual_seed(0)
    fall = torch.logspace(0, -1.5, R)
    B = torch.randn(count, n, R, generator=generator) * fall
    return B, torch.randn(count, R, n, generator=generator) / n**0.5


def ours(B: Tensor, A: Tensor) -> list[Factors]:
    """Truncate all products, to factors in float32."""
    found = (truncated_product(b, a, rank=RANK) for b, a in zip(B, A, strict=True))
    return [(product.left.float(), product.right.float()) for product in found]


def dense(b: Tensor, a: Tensor) -> Factors:
    """Truncate one product by a dense SVD in float64."""
    U, values, Vh = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
    return U[:, :RANK] * values[:RANK], Vh[:RANK]


def resized(b: Tensor, a: Tensor) -> Factors:
    """Truncate one product as kohya's resize script does, with its defaults."""
    product = b @ a
    if min(product.shape) > LARGE:
        U, values, V = torch.svd_lowrank(product, q=2 * RANK, niter=ITERATIONS)
        Vh = V.mT
    else:
        U, values, Vh = torch.linalg.svd(product)
    return U[:, :RANK] * values[:RANK], Vh[:RANK]


def converting(b: Tensor, a: Tensor) -> Callable[[], Factors]:
    """Make a model of one layer, which `peft.convert_to_lora` truncates."""
    import peft

    n = len(b)
    model = torch.nn.Sequential(torch.nn.Linear(n, n, bias=False))
    config = peft.LoraConfig(r=R, lora_alpha=R, target_modules=["0"])
    adapted = peft.get_peft_model(model, config)
    weights = {name: weight for name, weight in adapted.named_parameters() if "lora_" in name}
    for name, weight in weights.items():
        weight.data.copy_(a if "lora_A" in name else b)

    def convert() -> Factors:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is LoRA already
            _, state = peft.convert_to_lora(adapted, rank=RANK)
        found = {name.split("lora_")[1][0]: weight for name, weight in state.items()}
        return found["B"], found["A"]

    return convert


def off(found: Factors, exact: Factors) -> float:
    """Return the relative distance of two products of rank k, without forming them."""
    left = torch.cat([found[0].double(), exact[0].double()], 1)
    right = torch.cat([found[1].double(), -exact[1].double()])
    core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.mT, mode="r").R.mT
    whole = torch.linalg.qr(exact[0].double(), mode="r").R
    return (torch.linalg.norm(core) / torch.linalg.norm(whole)).item()


def product(name: str, count: int, n: int) -> dict:
    """Compare the truncation of ``count`` products."""
    B, A = factors(count, n)
    found: dict[str, Factors] = {}
    calls = {
        "dense": lambda: dense(B[0], A[0]),
        "kohya": lambda: resized(B[0], A[0]),
        "PEFT": converting(B[0], A[0]),
    }
    one = once(kept(calls, found))
    if n < LARGE:
        one |= {k: median(v) for k, v in timings(calls, 3).items()}
    one |= {"kohya": median(timings({"kohya": calls["kohya"]}, 3)["kohya"])}
    seconds = median(timings({"ours": lambda: ours(B, A)}, 7)["ours"])
    exact = found["dense"]
    return {
        "case": name,
        "seconds": seconds,
        "dense SVDs in float64, seconds (one, times their number)": one["dense"] * count,
        "ratio": one["dense"] * count / seconds,
        "target": TARGET if n > LARGE else None,
        "kohya's resize, seconds (one, times their number)": one["kohya"] * count,
        "ratio to kohya's resize": one["kohya"] * count / seconds,
        "peft.convert_to_lora, seconds (one, times their number)": one["PEFT"] * count,
        "ratio to peft.convert_to_lora": one["PEFT"] * count / seconds,
        "off the dense SVD, relative": off(ours(B[:1], A[:1])[0], exact),
        "kohya's resize off it": off(found["kohya"], exact),
        "peft.convert_to_lora off it": off(found["PEFT"], exact),
    }


def file(count: int = 64, n: int = 4096) -> dict:
    """Measure the truncation of a file: read, planned with all errors, written."""
    from safetensors.torch import save_file

    B, A = factors(count, n)
    with tempfile.TemporaryDirectory() as folder:
        weights = {}
        for i in range(count):
            weights |= {
                f"m{i}.lora_up.weight": B[i].contiguous(),
                f"m{i}.lora_down.weight": A[i].contiguous(),
                f"m{i}.alpha": torch.tensor(float(R)),
            }
        source = Path(folder) / "x.safetensors"
        save_file(weights, source)
        turns = iter(range(99))
        call = {"file": lambda: truncate(source, rank=RANK, out=Path(folder) / str(next(turns)))}
        return {
            "case": f"a file of {count} products of width {n:,}, r = {R} to {RANK}",
            "size, MB": source.stat().st_size / 2**20,
            "seconds": median(timings(call, 3)["file"]),
        }


def run() -> list[dict]:
    """Measure products and a file."""
    return [*(product(*case) for case in CASES), file()]
