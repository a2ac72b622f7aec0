"""Training of small networks: what control and measurement cost, and six at once or in turn.

The plain loop is what one writes without mirrorflow: the same model, data and optimizer, without a
schedule, a ledger, spectra or states. The part of the matmul peak is what the multiplications of
forward and backward pass would take at the speed of large matrices, over the time taken.
"""

import time
from typing import Any

import numpy as np
import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from benchmarks._measure import measure
from mirrorflow.lab.experiments.networks import tab02_fig03b_fig13_vit as tab02
from mirrorflow.lab.experiments.networks import tab03_fig03a_lora as tab03
from mirrorflow.lab.experiments.networks._language import (
    Tokens,
    characters,
    loss_of,
    own_model,
    with_lora,
)
from mirrorflow.lab.experiments.networks._training import Session, controlled
from mirrorflow.lab.experiments.networks._vision import Images, parameter_groups, vit
from mirrorflow.lab.experiments.networks._vision import loss_of as image_loss
from mirrorflow.schedule import SwitchOff
from mirrorflow.spectrum import SpectralTracker

STEPS = 20


def run() -> list[dict[str, Any]]:
    return [
        images_per_second(), tokens_per_second(), compiled(), *(stacked(*size) for size in SIZES)
    ]  # fmt: skip


def peak() -> float:
    """Measure the multiplications and additions per second of a large float32 product."""
    a = torch.randn(1500, 1500)
    return 2 * 1500**3 / measure({"mm": lambda: a @ a})["mm"]


def random_images(count: int, size: int) -> Images:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return Images(pixels, rng.integers(0, 10, count), 10, size)


def multiplications(model: torch.nn.Module, tokens: int, length: int) -> float:
    """Count what forward and backward pass of all linear layers and attention multiply and add."""
    weights = sum(m.weight.numel() for m in model.modules() if hasattr(m, "weight")
                  and m.weight is not None and m.weight.ndim >= 2
                  and not isinstance(m, torch.nn.Embedding))  # fmt: skip
    config: Any = model.config
    attention = 2 * length * config.hidden_size * config.num_hidden_layers
    return 6.0 * tokens * (weights + attention)


def images_per_second() -> dict[str, Any]:
    config = tab02.Config.preset("cpu")
    data, batch = random_images(2048, 32), config.batch
    model, plain = (vit("own", 32, config.patch, config.width, config.layers, config.heads, 10, 0)
                    for _ in range(2))  # fmt: skip
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), 1e-3)
    session = Session(
        model, optimizer, controlled(optimizer, SwitchOff(0.1, at=1000)), np.full(10**6, 1e-3),
        lambda step: image_loss(model, data.batch(0, step, batch, augment=False)),
        dict, SpectralTracker(model), config.every,
    )  # fmt: skip
    other = torch.optim.AdamW(parameter_groups(plain, 0.1), 1e-3)
    inputs = [data.batch(0, s, batch, augment=False) for s in range(STEPS)]
    taken = measure(
        {"session": lambda: steps_of(session), "plain": lambda: plain_steps(plain, other, inputs)}
    )
    tokens = batch * ((32 // config.patch) ** 2 + 1)
    flops = multiplications(model, tokens, tokens // batch)
    return {
        "case": f"ViT 32/{config.patch}, {config.width} wide, {config.layers} layers, "
        f"batch {batch}",
        "images per second": batch * STEPS / taken["session"],
        "of a plain loop": batch * STEPS / taken["plain"],
        "time to plain": taken["session"] / taken["plain"],
        "part of the matmul peak": flops * STEPS / taken["session"] / peak(),
    }


def steps_of(session: Session) -> None:
    """Take steps with a measurement of the spectra at the end, as every 75 in the experiment."""
    for step in range(STEPS):
        session.step(step)


def plain_steps(model: Any, optimizer: Any, inputs: list[Any]) -> None:
    for pixels, labels in inputs:
        torch.nn.functional.cross_entropy(model(pixels).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def tokens_per_second() -> dict[str, Any]:
    config = tab03.Config.preset("cpu")
    base, _ = own_model(config.width, config.layers, config.heads, config.length, 0)
    text = characters("It is a truth universally acknowledged. " * 5000)
    tokens = Tokens(text, config.length)
    model, plain = (with_lora(base, config.rank, config.scaling, 0) for _ in range(2))
    sgd = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.01, momentum=0.9)
           for m in (model, plain)]  # fmt: skip
    session = Session(
        model, sgd[0], controlled(sgd[0], SwitchOff(0.01, at=1000)), np.full(10**6, 0.01),
        lambda step: loss_of(model, tokens.batch(0, step, config.batch)),
        dict, SpectralTracker(model), config.every,
    )  # fmt: skip
    inputs = [tokens.batch(0, s, config.batch) for s in range(STEPS)]

    def plainly() -> None:
        for windows in inputs:
            logits = plain(input_ids=windows[:, :-1]).logits
            target = windows[:, 1:].flatten()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), target).backward()
            sgd[1].step()
            sgd[1].zero_grad()

    taken = measure({"session": lambda: steps_of(session), "plain": plainly})
    count = config.batch * config.length * STEPS
    return {
        "case": f"LoRA on a GPT-2, {config.width} wide, {config.layers} layers, "
        f"{config.batch} x {config.length} tokens",
        "tokens per second": count / taken["session"],
        "of a plain loop": count / taken["plain"],
        "time to plain": taken["session"] / taken["plain"],
    }


def compiled() -> dict[str, Any]:
    """Compare a step of the ViT with that of its compiled twin, and count when it pays."""
    config = tab02.Config.preset("cpu")
    batch = random_images(config.batch, 32).batch(0, 0, config.batch, augment=False)
    eager, twin = (vit("own", 32, config.patch, config.width, config.layers, config.heads, 10, 0)
                   for _ in range(2))  # fmt: skip
    fast = torch.compile(twin)
    started = time.perf_counter()
    image_loss(fast, batch).backward()
    compiling = time.perf_counter() - started
    taken = measure(
        {"eager": lambda: image_loss(eager, batch).backward(),
         "compiled": lambda: image_loss(fast, batch).backward()}
    )  # fmt: skip
    saved = taken["eager"] - taken["compiled"]
    return {
        "case": "forward and backward pass of the ViT under torch.compile",
        "eager, seconds": taken["eager"],
        "compiled, seconds": taken["compiled"],
        "times faster compiled": taken["eager"] / taken["compiled"],
        "seconds to compile": compiling,
        "steps until it pays": compiling / saved if saved > 0 else "never",
    }


# --- Six configurations at once -------------------------------------------------------------------

# (pixels, patch, width, layers, heads, batch): that of the cpu preset, and ever smaller ones.
SIZES = ((32, 8, 64, 6, 4, 128), (32, 8, 32, 2, 2, 32), (8, 4, 16, 2, 2, 16))


def stacked(
    size: int, patch: int, width: int, layers: int, heads: int, batch: int
) -> dict[str, Any]:
    """Take the gradients of six models by vmap over stacked weights, and one after the other."""
    models = [vit("own", size, patch, width, layers, heads, 10, seed) for seed in range(6)]
    pixels, labels = random_images(batch, size).batch(0, 0, batch, augment=False)
    params, buffers = stack_module_state(models)
    skeleton = vit("own", size, patch, width, layers, heads, 10, 0).to("meta")

    def loss(p: Any, b: Any) -> torch.Tensor:
        logits = functional_call(skeleton, (p, b), (pixels,)).logits
        return torch.nn.functional.cross_entropy(logits, labels)

    together = vmap(grad(loss))

    def in_turn() -> None:
        for model in models:
            model.zero_grad()
            torch.nn.functional.cross_entropy(model(pixels).logits, labels).backward()

    in_turn()
    found = together(params, buffers)
    for i, model in enumerate(models):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad, rtol=2e-3, atol=1e-5)
    taken = measure({"stacked": lambda: together(params, buffers), "in turn": in_turn})
    return {
        "case": f"gradients of six ViTs {size}/{patch}, {width} wide, {layers} layers, "
        f"batch {batch}",
        "stacked, seconds": taken["stacked"],
        "in turn, seconds": taken["in turn"],
        "times faster stacked": taken["in turn"] / taken["stacked"],
    }
