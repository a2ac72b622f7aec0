"""What the scheduler and the tracker add to a LoRA training step of a model of GPT-2-small's size.

Plain steps and steps with both take turns; beside them the time of the two alone, which is far
below the noise of a step.
"""

from __future__ import annotations

import warnings

import torch

import mirrorflow as mf
from benchmarks._measure import measure

EVERY, TOKENS = 10, 128


def training():
    """Make a LoRA step of GPT-2 small with random weights, rank 8, on 128 tokens."""
    import peft
    import transformers

    config = transformers.GPT2Config(bos_token_id=0, eos_token_id=0)
    settings = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), settings)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.1)
    tokens = torch.randint(0, config.vocab_size, (1, TOKENS))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return model, step


class Nothing(torch.optim.Optimizer):
    """An optimizer whose step takes no time: what is left is the scheduler's."""

    def __init__(self, tensors: int) -> None:
        weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(tensors)]
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        super().__init__(weights, {"lr": 0.1, "weight_decay": 0.1})

    def step(self, closure: object = None) -> None:
        """Do nothing."""


def run() -> list[dict]:
    """Measure a plain step, and what is added to it."""
    model, step = training()
    for _ in range(2):  # both LoRA factors differ from 0 from then on
        step()
    plain = measure({"step": step}, 5)["step"]
    bare, hooked = Nothing(48), Nothing(48)
    scheduler = mf.WeightDecayScheduler(hooked, mf.SwitchOff(0.1, at=100), coupling="decoupled")
    alone = measure(
        {"bare": bare.step, "hooked": lambda: (hooked.step(), scheduler.step())}, repeats=9
    )
    tracker = mf.SpectralTracker(model)
    tracked = measure({"measure": tracker.measure}, 5)["measure"]
    account = tracker.account()
    accounted = measure({"step": lambda: account.step(1 - 1e-5)}, 9)["step"]
    rows = [
        ("scheduler, one group of 48 tensors", alone["hooked"] - alone["bare"], 0.001),
        (f"tracking {len(tracker.pairs)} LoRA updates every {EVERY} steps", tracked / EVERY, 0.01),
        (f"account of D of {len(tracker.pairs)} LoRA updates at each step", accounted, 0.02),
    ]
    return [
        {
            "case": f"LoRA step of GPT-2 small, {TOKENS} tokens: {name}",
            "seconds": added,
            "plain step, seconds": plain,
            "part of a step": added / plain,
            "target": target,
        }
        for name, added, target in rows
    ]
