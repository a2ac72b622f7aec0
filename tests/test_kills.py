"""The command line killed at random moments: the same command afterwards gives the same records."""

import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import mirrorflow.lab.framework as ex
from mirrorflow.lab.experiments.networks import tab02_fig03b_fig13_vit as tab02
from optimizers import MAKE, STEPS, assert_equal, pull, two_groups, weights
from test_sweep import of_session, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc"),
]

KILLS = int(os.environ.get("MIRRORFLOW_KILLS", "100"))  # of all tests together
SHARE = {"run": 0.4, "network": 0.2, "sweep": 0.2, "saves": 0.2}
RUN = "steps = 1500\nswitch = 750\nseeds = [0, 1, 2, 3]\ngrid_alphas = []\ncommuting_time = 10.0\n"
NETWORK = (
    "loops = false\ntimes = []\ndecays = [2.0]\nsteps = 12\nevery = 4\nvalidation = 20\n"
    "seeds = [0]\n"
)
SWEEP = (
    f'experiment = "{tab02.NAME}"\npreset = "smoke"\nseeds = [0]\n[set]\n'
    + NETWORK.replace("seeds = [0]\n", "")
    + "[grid]\noff = [4, 8]\n"
)
ONE = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}  # the same to the bit


def commands(tmp_path):
    """Return the command lines, without --out."""
    for name, text in (("run", RUN), ("network", NETWORK), ("sweep", SWEEP)):
        (tmp_path / f"{name}.toml").write_text(text)
    run = ["run", "fig02_matrix_sensing", "--preset", "smoke", "--config", tmp_path / "run.toml"]
    network = ["run", tab02.NAME, "--preset", "smoke", "--config", tmp_path / "network.toml"]
    return {
        "run": run,
        "network": network,
        "sweep": ["sweep", tmp_path / "sweep.toml", "--workers", "2"],
    }


def start(command, out):
    words = [sys.executable, "-m", "mirrorflow", *map(str, command), "--out", str(out)]
    return subprocess.Popen(
        words, start_new_session=True, env=os.environ | ONE,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process, seconds=None):
    """Let a process end, or kill it after so many seconds; return whether it was killed."""
    try:
        said = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        assert until(lambda: not of_session(process.pid))  # workers end with their driver
        return True
    assert process.returncode == 0, said
    return False


def broken(message):
    raise AssertionError(message)


def records(out):
    return {r["hash"]: r["records"] for r in ex.find_results(out, broken)}


def check(out, expected):
    """Compare with a run that was not killed, to the bit; nothing unfinished is left."""
    assert records(out) == expected
    for folder in (path.parent for path in out.glob("*/*/result.json")):
        assert {p.name for p in folder.iterdir()} == {
            "config.json", "metrics.jsonl", "result.json", "trajectory.npz",
        }  # fmt: skip


@pytest.mark.parametrize("name", ["run", "network", "sweep"])
def test_killed_commands_end_as_if_nothing_had_happened(name, tmp_path):
    command, moments = commands(tmp_path)[name], random.Random(name)
    begun = time.monotonic()
    finish(start(command, tmp_path / "whole"))
    span, expected = time.monotonic() - begun, records(tmp_path / "whole")
    assert expected
    kills, turn = 0, 0
    while kills < round(SHARE[name] * KILLS):
        out = tmp_path / f"out{turn}"
        if finish(start(command, out), moments.uniform(0, span)):
            kills += 1
            assert set(records(out)) <= set(expected)  # nothing half written is taken for whole
        else:
            check(out, expected)
            turn += 1
    finish(start(command, tmp_path / f"out{turn}"))
    check(tmp_path / f"out{turn}", expected)


# Between the optimizer's save and the scheduler's

SAVES = """
    import os, sys, time, warnings
    from pathlib import Path
    import torch
    from mirrorflow.weightdecay import WeightDecayScheduler
    from optimizers import FALL, MAKE, STEPS, pull, two_groups, weights

    warnings.filterwarnings("ignore", ".*the state of WeightDecayScheduler at step.*")
    folder, params = Path(sys.argv[1]), weights()

    def save(name, state):
        torch.save(state, folder / f"{name}.draft")
        os.replace(folder / f"{name}.draft", folder / name)
        time.sleep(0.02)

    def load(name):
        return torch.load(folder / name, weights_only=True)

    optimizer = two_groups(MAKE["adamw"], params)
    scheduler = WeightDecayScheduler(optimizer, FALL)
    if (folder / "training.pt").exists():
        stored = load("training.pt")
        for p, value in zip(params, stored["weights"], strict=True):
            p.data.copy_(value)
        optimizer.load_state_dict(stored["optimizer"])
        if (folder / "scheduler.pt").exists():
            scheduler.load_state_dict(load("scheduler.pt"))
    print("begun", flush=True)
    while scheduler.steps < STEPS:
        pull(params)
        optimizer.step()
        state = {"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}
        save("training.pt", state)
        save("scheduler.pt", scheduler.state_dict())
    save("end.pt", {"accumulated": scheduler.accumulated, "steps": scheduler.steps})
"""


def test_training_killed_between_saves_ends_as_if_nothing_had_happened(tmp_path):
    from mirrorflow.weightdecay import WeightDecayScheduler
    from optimizers import FALL

    whole = weights()
    optimizer = two_groups(MAKE["adamw"], whole)
    expected = WeightDecayScheduler(optimizer, FALL)
    for _ in range(STEPS):
        pull(whole)
        optimizer.step()
    moments, kills, turn = random.Random("saves"), 0, 0
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    while True:
        folder = tmp_path / str(turn)
        folder.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVES), str(folder)], start_new_session=True,
            env=os.environ | ONE | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        enough = kills >= round(SHARE["saves"] * KILLS)
        if finish(process, None if enough else moments.uniform(0, 0.2)):
            kills += 1
            continue
        end = torch.load(folder / "end.pt", weights_only=True)
        stored = torch.load(folder / "training.pt", weights_only=True)
        assert_equal([torch.nn.Parameter(p) for p in stored["weights"]], whole)
        assert end["steps"] == STEPS
        assert end["accumulated"] == pytest.approx(expected.accumulated, rel=1e-12)
        turn += 1
        if enough:
            return
