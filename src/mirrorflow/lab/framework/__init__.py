"""Experiments: one file for each figure or table of the paper, named by it.

`experiments` lists them, `load` imports one, `config_from` makes its configuration, `execute` runs
it into a folder (or finds it there), and `find_results` and `trajectory` read what is stored.
Training runs are `Timeline`s, whose states `Checkpoints` keeps, so that they share beginnings.
"""

from .contract import (
    PRESETS,
    Config,
    Experiment,
    Part,
    Recorder,
    config_from,
    execute,
    experiments,
    find_results,
    finished,
    load,
    mistakes,
    needs,
    read_result,
    read_toml,
    result_folder,
    trajectory,
    write_json,
)
from .storage import held, hold, remove_drafts, run_lock
from .trunks import Checkpoints, Timeline, steps_saved

__all__ = [
    "PRESETS",
    "Checkpoints",
    "Config",
    "Experiment",
    "Part",
    "Recorder",
    "Timeline",
    "config_from",
    "execute",
    "experiments",
    "find_results",
    "finished",
    "held",
    "hold",
    "load",
    "mistakes",
    "needs",
    "read_result",
    "read_toml",
    "remove_drafts",
    "result_folder",
    "run_lock",
    "steps_saved",
    "trajectory",
    "write_json",
]
