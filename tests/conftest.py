"""What every test has: random numbers that are the same in every run, and the smoke runs."""

import collections
import json

import numpy as np
import pytest
import torch

import processes

# Minutes each: begun among the last, they would keep one process busy while the other waits.
FIRST = ("test_sweep", "test_experiments", "test_conditions", "test_huggingface_runs")


@pytest.hookimpl(tryfirst=True)  # before pytest deselects what is slow
def pytest_collection_modifyitems(items):
    """Begin with the longest files; mark as slow all but n cases of a test with ``sample(n)``."""
    items.sort(key=lambda item: item.path.stem not in FIRST)
    cases = collections.defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("sample"):
            cases[item.path, item.originalname, mark.args[0]].append(item)
    for (_, _, n), of_one in cases.items():
        kept = set(np.linspace(0, len(of_one) - 1, n).round())
        for i, item in enumerate(of_one):
            if i not in kept:
                item.add_marker("slow")


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
