"""`Study`: the configurations of a sweep, as a grid, a list, or both."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import framework

__all__ = ["Study"]

MOST = 10_000  # configurations: all of them are made, and compared, before anything runs


class Study(BaseModel):
    """The configurations of an experiment that a sweep runs.

    Attributes
    ----------
    experiment : str
        Its name.
    preset : str
        What all configurations begin with.
    set : dict
        What is changed in all of them.
    grid : dict of lists
        Every combination of these values.
    runs : list of dict
        Further configurations, one by one; without a grid the only ones.
    seeds : tuple of int
        Every configuration once for each seed; empty for the seeds of the configuration.

    Examples
    --------
    >>> study = Study(
    ...     experiment="fig02_matrix_sensing", preset="smoke", grid={"n": [4, 5]}, seeds=(0, 1)
    ... )
    >>> [changes for changes, _ in study.configurations()]
    [{'n': 4, 'seed': 0}, {'n': 4, 'seed': 1}, {'n': 5, 'seed': 0}, {'n': 5, 'seed': 1}]
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: str
    preset: str = "cpu"
    set: dict[str, Any] = Field(default_factory=dict)
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    runs: list[dict[str, Any]] = Field(default_factory=list)
    seeds: tuple[int, ...] = ()

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a study from a TOML file; ValueError says what is wrong with it."""
        content = framework.read_toml(Path(path))
        try:
            return cls(**content)
        except ValidationError as error:
            wrong = framework.mistakes(error)
            known = ", ".join(cls.model_fields)
            raise ValueError(f"{path}: {wrong} (a study has: {known})") from None

    @property
    def module(self) -> Any:
        """The module of the experiment; ValueError with the names that there are."""
        return framework.load(self.experiment)

    def configurations(self) -> list[tuple[dict[str, Any], Any]]:
        """Return each configuration with what is particular to it; each once.

        Raises
        ------
        ValueError
            For a key or a value that the experiment does not take, and for more than 10,000
            configurations, before anything runs.
        """
        if empty := [key for key, values in self.grid.items() if not values]:
            raise ValueError(f"the grid has no values for {', '.join(empty)}")
        count = (math.prod(map(len, self.grid.values())) + len(self.runs)) * len(self.seeds or [0])
        if count > MOST:
            raise ValueError(
                f"a study must have at most {MOST:,} configurations, got {count:,}. "
                "Shorten the grid or the seeds, or split the study."
            )
        found: dict[str, tuple[dict[str, Any], Any]] = {}
        module = self.module
        for changes in self._changes():
            for seed in self.seeds or (None,):
                seeds = {} if seed is None else {"seeds": (seed,)}
                config = framework.config_from(
                    module, self.preset, None, {**self.set, **changes, **seeds}
                )
                named = changes if seed is None else {**changes, "seed": seed}
                found.setdefault(config.model_dump_json(), (named, config))
        return list(found.values())

    def _changes(self) -> list[dict[str, Any]]:
        """Return the combinations of the grid and the list."""
        grid = [
            dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())
        ]
        return [*(grid if self.grid or not self.runs else []), *self.runs]
