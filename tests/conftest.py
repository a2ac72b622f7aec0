"""What every test has: random numbers that are the same in every run, and the smoke runs."""

import json

import numpy as np
import pytest
import torch

import processes


@pytest.fixture(autouse=True)
def seeded():
    """Seed what draws without a seed of its own."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """Return (module, folder, result, curves) of an experiment's smoke preset, which runs once."""
    import mirrorflow.lab.framework as ex

    out, made = processes.shared_folder(tmp_path_factory, "smoke"), {}

    def run(name):
        if name not in made:
            module = ex.load(name)
            with processes.one_at_a_time(out / f"{name}.lock"):  # other workers want it as well
                folder = ex.execute(module, ex.config_from(module, "smoke"), out)
            result = json.loads((folder / "result.json").read_text())
            made[name] = module, folder, result, ex.trajectory(folder)
        return made[name]

    run.out = out
    return run
