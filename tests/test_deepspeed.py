"""DeepSpeed really run on the CPU: what acts under ZeRO 0 to 3 is what the ledger says."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.deepspeed

OFF, LR, DECAY, STEPS = 3, 0.01, 0.5, 6
CFG = {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True,
       "zero_force_ds_cpu_optimizer": False}  # fmt: skip

# One process runs all cases, as DeepSpeed takes seconds to import: it prints a line for each.
PRELUDE = """
import json, math, sys, torch
torch.set_num_threads(1)
import deepspeed
from deepspeed import ops
ops.__compatible_ops__ |= {"shm_comm": False, "deepspeed_shm_comm": False}  # nothing is compiled
import mirrorflow as mf
OFF, LR, DECAY, STEPS, CFG = json.loads(sys.argv[1])
cases = json.loads(sys.argv[2])

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))

def adamw(model):  # two groups, which ZeRO 1 and 2 step one by one
    sides = [[p for p in model.parameters() if p.ndim == n] for n in (2, 1)]
    groups = [{"params": params} for params in sides]
    return torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY)

def scheduled(optimizer, model, **options):
    return mf.WeightDecayScheduler(optimizer, mf.SwitchOff(DECAY, at=OFF), model=model, **options)

def norm(model):
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        whole = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    return float(whole.norm())

def say(case, scheduler, model, start, **more):
    found = {"steps": scheduler.steps, "ledger": sum(scheduler.accumulated) / 2}
    print(json.dumps({**case, **found, "true": math.log(norm(model) / start), **more}), flush=True)
"""
PLAIN = (
    PRELUDE
    + """
for case in cases:
    model = net()
    optimizer, options = adamw(model), {"decoupled": True} if case["outside"] else {}
    if case["when"] == "before":
        scheduler = scheduled(optimizer, model, **options)
    zero = {"stage": case["stage"], **({"sub_group_size": 40} if case["parts"] else {})}
    config = {**CFG, "zero_optimization": zero, "bf16": {"enabled": case["bf16"]}}
    engine, made, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if case["when"] == "after":
        scheduler = scheduled(made, engine.module, **options)
    start = norm(model)
    for _ in range(STEPS):
        x = torch.randn(4, 8, dtype=torch.bfloat16 if case["bf16"] else torch.float32)
        engine.backward(engine(x).float().square().mean() * 0)  # nothing but the decay moves
        engine.step()
    say(case, scheduler, model, start, engine=type(made).__name__)
"""
)
ACCELERATE = (
    PRELUDE
    + """
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
for case in cases:
    AcceleratorState._reset_state(True)
    config = {**CFG, "zero_optimization": {"stage": case["stage"]},
              "gradient_accumulation_steps": 1}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = net()
    optimizer = adamw(model)
    if case["when"] == "before":
        scheduler = scheduled(optimizer, model)
    engine, prepared = accelerator.prepare(model, optimizer)
    if case["when"] == "after":
        scheduler = scheduled(prepared, accelerator.unwrap_model(engine))
    start = norm(model)
    for _ in range(STEPS):
        accelerator.backward(engine(torch.randn(4, 8)).square().mean() * 0)
        prepared.step()
        prepared.zero_grad()
    say(case, scheduler, model, start, engine=type(engine).__name__)
"""
)
TRAINER = (
    PRELUDE
    + """
import warnings
sys.path.insert(0, sys.argv[3])
import test_huggingface as hf
from mirrorflow.integrations.huggingface import control_decay
warnings.simplefilter("ignore")
for case in cases:
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    config = {**CFG, **auto, "zero_optimization": {"stage": case["stage"]}}
    trainer = hf.trainer(sys.argv[4], steps=STEPS, deepspeed=config, save_strategy="no",
                         learning_rate=LR, weight_decay=DECAY, log_level="error",
                         logging_strategy="no", use_cpu=False)
    control = control_decay(trainer, mf.SwitchOff(DECAY, at=OFF), track_every=case["track"])
    try:
        trainer.train()
    except ValueError as error:
        print(json.dumps({**case, "said": str(error)}), flush=True)
        continue
    scheduler = control.scheduler
    print(json.dumps({
        **case, "steps": scheduler.steps, "ledger": scheduler.accumulated[0],
        "engine": type(trainer.model_wrapped).__name__,
        "measured": [step for step, _ in control.measurements],
    }), flush=True)
"""
)


def run(script, cases, *more, ranks=1, port=29561):
    """Run a script on so many processes; return what the first one printed of each case."""
    if find_spec("deepspeed") is None:
        pytest.skip("needs the extra deepspeed")
    command = [sys.executable, "-c", script, json.dumps([OFF, LR, DECAY, STEPS, CFG]),
               json.dumps(cases), *map(str, more)]  # fmt: skip
    started = []
    for rank in range(ranks):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
               "OMP_NUM_THREADS": "1"}  # fmt: skip
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=env, **pipes))
    said = [process.communicate(timeout=900) for process in started]
    assert [process.returncode for process in started] == [0] * ranks, said[0][1][-3000:]
    found = [json.loads(line) for line in said[0][0].splitlines() if line.startswith('{"stage"')]
    assert len(found) == len(cases)
    return found


def assert_acted(found):
    """All steps are counted, and the weights have shrunk by what the ledger says."""
    for case in found:
        assert case["steps"] == STEPS, case
        assert case["ledger"] == pytest.approx(-OFF * LR * DECAY, rel=1e-6), case
        close = 0.02 if case.get("bf16") else 1e-4  # the weights of bf16 are rounded ones
        assert case["true"] == pytest.approx(OFF * math.log1p(-LR * DECAY), rel=close), case


PLAIN_CASES = [
    {"stage": stage, "when": when, "parts": parts, "bf16": bf16, "outside": outside}
    for stage, parts, bf16, outside in [
        (0, False, False, False), (1, False, False, False), (2, False, False, False),
        (3, False, False, False), (3, True, False, False), (1, False, True, False),
        (2, False, True, False), (2, False, False, True), (3, True, False, True),
    ]
    for when in ("before", "after")
]  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_acts_through_initialize_is_what_the_ledger_says(ranks):
    found = run(PLAIN, PLAIN_CASES, ranks=ranks)
    assert_acted(found)
    kinds = {case["stage"]: case["engine"] for case in found}
    assert kinds[1] == kinds[2] == "DeepSpeedZeroOptimizer"  # it is really there
    assert kinds[3] == "DeepSpeedZeroOptimizer_Stage3"


def test_what_acts_through_accelerate_is_what_the_ledger_says():
    cases = [{"stage": s, "when": w} for s in range(4) for w in ("before", "after")]
    found = run(ACCELERATE, cases, port=29562)
    assert_acted(found)
    assert {case["engine"] for case in found} == {"DeepSpeedEngine"}


def test_what_acts_through_the_trainer_is_what_the_ledger_says(tmp_path):
    cases = [{"stage": s, "track": track} for s in (0, 2, 3) for track in (0, 2)]
    *found, last = run(TRAINER, cases, Path(__file__).parent, tmp_path, port=29563)
    assert "ZeRO-3 has divided the weights between processes" in last["said"]
    for case in found:
        assert case["steps"] == STEPS and case["engine"] == "DeepSpeedEngine"
        assert case["ledger"] == pytest.approx(-OFF * LR * DECAY)
        assert case["measured"] == ([0, 2, 4, 6] if case["track"] else [])
