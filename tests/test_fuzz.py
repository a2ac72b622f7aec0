"""Some hundred mutated files of each kind are read, or refused by the error that is stated."""

import os

import pytest

import fuzz

pytest.importorskip("safetensors.torch")
pytest.importorskip("altair")


@pytest.mark.parametrize(
    ("case", "count"),
    [
        (fuzz.checkpoint, 400),
        (fuzz.torch_weights, 100),
        (fuzz.optimizer, 150),
        (fuzz.schedule, 1500),
        (fuzz.settings, 200),
        (fuzz.study, 200),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_mutated_files_are_read_or_refused(case, count):
    read, refused = fuzz.run(case, count)
    assert min(read, refused) > count / 50  # both happen
    assert "MIRRORFLOW_TRAPPED" not in os.environ
