"""The installed wheel at work: help, check of a pair, audit of a file made here."""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import mirrorflow

PAIR = """
import torch, mirrorflow as mf
ones = torch.ones(2, dtype=torch.float64)
pair = mf.Hadamard(), mf.WeightDecay(), (0 * ones, ones)
"""


def run(*arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("mirrorflow")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


assert "site-packages" in mirrorflow.__file__, "the wheel is not what is imported"
assert (Path(mirrorflow.__file__).parent / "py.typed").is_file()
with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "own.py").write_text(PAIR)
    name = "base_model.model.layers.0.q_proj.lora_{}.weight"
    factors = {name.format("A"): torch.ones(2, 8), name.format("B"): torch.ones(8, 2)}
    save_file(factors, Path(folder) / "adapter.safetensors")
    assert "audit" in run("--help")
    assert "Theorem 3.2" in run("check", f"{folder}/own.py:pair")
    assert "q_proj" in run("audit", f"{folder}/adapter.safetensors")
print("the wheel works")
