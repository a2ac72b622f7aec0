"""Experiments: one file for each figure or table of the paper, named by it.

`experiments` lists them, `load` imports one, `config_from` makes its configuration, `execute` runs
it into a folder (or finds it there), and `find_results` and `trajectory` read what is stored.
"""

from ._contract import (
    PRESETS,
    Config,
    Experiment,
    Part,
    Recorder,
    config_from,
    execute,
    experiments,
    find_results,
    load,
    result_folder,
    trajectory,
)

__all__ = [
    "PRESETS",
    "Config",
    "Experiment",
    "Part",
    "Recorder",
    "config_from",
    "execute",
    "experiments",
    "find_results",
    "load",
    "result_folder",
    "trajectory",
]
