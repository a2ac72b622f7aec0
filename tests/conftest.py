"""What every test has: random numbers that are the same in every run."""

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Seed what draws without a seed of its own."""
    torch.manual_seed(0)
    np.random.seed(0)
