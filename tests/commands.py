"""The command line in this process: a process of its own takes seconds to import torch."""

import sys

import pytest

from mirrorflow import cli


def call(monkeypatch, *args):
    """Run the command line and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["mirrorflow", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0
