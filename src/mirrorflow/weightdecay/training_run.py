"""A run as its settings describe it, before there is a model: what `mirrorflow plan` looks at."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from ..schedule import Constant, Schedule, schedule_from_dict
from .coupling import CoupledDecayWarning
from .feedback import number, whole
from .preview import Preview, preview
from .scheduler import WeightDecayScheduler

__all__ = ["TrainingRun"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SIDE = 128  # of the weights that stand in for the model's
_UNSAID = (
    "TrainingArguments do not say the precision of the weights: {} is assumed. bf16=True and "
    "fp16=True leave them as they were loaded; print(next(model.parameters()).dtype) tells"
)


class _Lion(torch.optim.AdamW):
    """Stands in for Lion, which torch does not have: its decay is decoupled as well."""


_Lion.__name__ = "Lion"  # as the sentences and the law call it
_CLASSES: dict[str, type[Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "lion": _Lion,
    "sgd": torch.optim.SGD,
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}
# The Trainer's names of the same steps, in another precision of the state or other kernels
_TRAINERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_xla", "adamw_anyprecision"), "adamw"),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit", "adamw_bnb_8bit"), "adamw"),
    **dict.fromkeys(("adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"), "adamw"),
    **dict.fromkeys(("adamw_torch_fused", "adamw_torch_npu_fused"), "adamw_fused"),
    **dict.fromkeys(("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"), "lion"),
    **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), "rmsprop"),
}
_FUSED = {"adamw_fused": "adamw", "adam_fused": "adam", "sgd_fused": "sgd"}


def _linear(t: int, steps: int) -> float:
    """Fall from 1 to 0."""
    return max(0.0, (steps - t) / max(1, steps))


def _cosine(t: int, steps: int) -> float:
    """Fall from 1 to 0 along half a cosine."""
    return max(0.0, 0.5 * (1 + math.cos(math.pi * t / max(1, steps))))


_SHAPES: dict[str, Callable[[int, int], float]] = {
    "constant": lambda t, steps: 1.0,
    "constant_with_warmup": lambda t, steps: 1.0,
    "linear": _linear,
    "cosine": _cosine,
}


@dataclass(frozen=True)
class TrainingRun:
    """The settings of a run that decide what its weight decay comes to.

    Parameters
    ----------
    steps : int
        The optimizer steps, >= 1.
    lr : float
        The highest learning rate, > 0.
    decay : float, mapping or Schedule
        The weight decay, >= 0, or its schedule, also as `schedule_from_dict` takes it.
    optimizer : str
        "adamw", "adam", "nadam", "radam", "adamax", "lion", "sgd", "adafactor", "adagrad",
        "rmsprop"; "adamw_fused", "adam_fused", "sgd_fused"; or one of the Trainer's names for them.
    lr_schedule : {"constant", "constant_with_warmup", "linear", "cosine"}
        The shape of the learning rate, as transformers has them.
    warmup : int
        Steps in which it rises from 0; not of "constant".
    momentum : float
        Of SGD, in [0, 1).
    dtype : {"float32", "bfloat16", "float16"}
        The precision of the weights, not that of autocast.
    outside : bool
        Whether `WeightDecayScheduler` applies the decay, ``decoupled=True``.
    remarks : tuple of str
        What the settings leave open.

    Raises
    ------
    TypeError, ValueError
        If a setting is not of this kind.

    Examples
    --------
    >>> run = TrainingRun(steps=3000, lr=5e-6, decay=0.1)
    >>> round(run.preview().outlooks[0].a, 5)
    -0.00075
    """

    steps: int
    lr: float
    decay: Any
    optimizer: str = "adamw"
    lr_schedule: str = "linear"
    warmup: int = 0
    momentum: float = 0.0
    dtype: str = "float32"
    outside: bool = False
    remarks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse settings that no run has."""
        whole("steps", self.steps)
        number("lr", self.lr, 0.0, strict=True)
        whole("warmup", self.warmup, 0)
        if not 0 <= number("momentum", self.momentum, 0.0) < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum!r}")
        _choose("dtype", self.dtype, _DTYPES)
        known = (*_CLASSES, *_FUSED, *_TRAINERS)
        advice = " For another optimizer, make it in Python and call mf.preview."
        _choose("optimizer", self.optimizer, known, (*_CLASSES, *_FUSED), advice)
        advice = " For another shape, call mf.preview in Python with your scheduler."
        _choose("lr_schedule", self.lr_schedule, _SHAPES, _SHAPES, advice)
        if isinstance(self.schedule, Constant) and self.schedule.rate(0) == 0:
            raise ValueError(
                "decay must be > 0 for there to be something to plan, got 0, which is the default "
                "of TrainingArguments. Give a decay, such as 0.1"
            )

    @property
    def schedule(self) -> Schedule:
        """The decay as a schedule."""
        if isinstance(self.decay, Schedule):
            return self.decay
        if isinstance(self.decay, Mapping):
            return schedule_from_dict(self.decay)
        return Constant(number("decay", self.decay, 0.0))

    @property
    def learning_rates(self) -> list[float]:
        """The learning rate of each step, as transformers has it: a warmup begins at 0.

        Examples
        --------
        >>> TrainingRun(steps=4, lr=1.0, decay=0.1, warmup=2).learning_rates
        [0.0, 0.5, 1.0, 0.5]
        """
        warmup = 0 if self.lr_schedule == "constant" else self.warmup
        shape = _SHAPES[self.lr_schedule]
        return [
            self.lr * (t / warmup if t < warmup else shape(t - warmup, self.steps - warmup))
            for t in range(self.steps)
        ]

    @classmethod
    def from_arguments(cls, arguments: Any, **changes: Any) -> TrainingRun:
        """Return the run that transformers' TrainingArguments describe.

        Parameters
        ----------
        arguments : TrainingArguments or mapping
            The object, or what its ``to_dict`` or ``to_json_string`` gives.
        **changes
            Settings of this class that count instead. ``steps`` is needed where ``max_steps`` is
            not set, since the size of the data is not in the arguments; ``dtype`` never is.

        Raises
        ------
        TypeError, ValueError
            If a setting is missing or of no known kind.

        Examples
        --------
        >>> arguments = {"max_steps": 100, "learning_rate": 1e-3, "weight_decay": 0.1}
        >>> run = TrainingRun.from_arguments(arguments, dtype="float32")
        >>> run.steps, run.lr_schedule, run.optimizer
        (100, 'linear', 'adamw_torch')
        """
        values = arguments if isinstance(arguments, Mapping) else _attributes(arguments)
        if "learning_rate" not in values and "lr" not in changes:
            raise ValueError(
                "arguments must hold learning_rate, as TrainingArguments do, got the keys "
                f"{', '.join(sorted(map(str, values))[:8]) or 'none'}. Give lr"
            )
        settings = _settings(values) | changes
        if settings["steps"] is None:
            raise ValueError(
                "steps must be given where max_steps is not set: the arguments do not hold the "
                "size of the data. It is epochs x batches / gradient_accumulation_steps"
            )
        steps = whole("steps" if "steps" in changes else "max_steps", settings["steps"])
        settings["warmup"] = changes.get("warmup", _warmup(values, steps))
        if "dtype" not in changes:
            settings["remarks"] = (_UNSAID.format("float32"),)
        return cls(**settings)

    def preview(
        self, *, size: float | None = None, start: float | None = None, target: float = 0.5
    ) -> Preview:
        """Return what `preview` says of the run, with normal weights in the place of the model's.

        Parameters
        ----------
        size, start, target
            The scale of the products, and what they shall shrink by, as for `preview`.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CoupledDecayWarning)
            scheduler = WeightDecayScheduler(
                self._optimizer(), self.schedule, decoupled=self.outside
            )
        with scheduler:
            seen = preview(
                scheduler,
                self.steps,
                self.learning_rates,
                size=size,
                start=start,
                target=target,
            )
        said = [str(w.message) for w in caught if issubclass(w.category, CoupledDecayWarning)]
        return replace(seen, remarks=[*seen.remarks, *said, *self.remarks])

    def _optimizer(self) -> Optimizer:
        """Return the optimizer, of a weight that stands in for all."""
        name = _TRAINERS.get(self.optimizer, self.optimizer)
        cls = _CLASSES[_FUSED.get(name, name)]
        drawn = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
        settings: dict[str, Any] = {"lr": self.lr, "weight_decay": 1.0}
        if cls is torch.optim.SGD:
            settings["momentum"] = self.momentum
        if name in _FUSED:
            settings["fused"] = True
        weight = torch.nn.Parameter(drawn.to(_DTYPES[self.dtype]))
        return cls([weight], **settings)


def _choose(what: str, given: Any, known: Any, named: Any = None, advice: str = "") -> None:
    """Raise unless a setting is one of those that are known."""
    if not isinstance(given, str) or given not in known:
        raise ValueError(
            f"{what} must be one of {', '.join(named or known)}, got {given!r}.{advice}"
        )


def _attributes(arguments: Any) -> Mapping[str, Any]:
    """Return the settings of an object of TrainingArguments."""
    if not hasattr(arguments, "learning_rate"):
        raise TypeError(
            "arguments must be TrainingArguments, or a mapping of their settings, got "
            f"{type(arguments).__name__}"
        )
    names = ("learning_rate", "weight_decay", "optim", "lr_scheduler_type", "max_steps")
    names += ("warmup_steps", "warmup_ratio", "lr_scheduler_kwargs")
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run out of those of the Trainer."""
    if kwargs := values.get("lr_scheduler_kwargs"):
        raise ValueError(
            f"lr_scheduler_kwargs must be empty, got {kwargs!r}. Call mf.preview in Python with "
            "the scheduler that the Trainer makes"
        )
    steps: Any = values.get("max_steps")
    unset = steps is None or (isinstance(steps, (int, float)) and steps <= 0)
    return {
        "steps": None if unset else steps,
        "lr": values.get("learning_rate"),
        "decay": values.get("weight_decay", 0.0),
        "optimizer": _plain(values.get("optim", "adamw_torch")),
        "lr_schedule": _plain(values.get("lr_scheduler_type", "linear")),
    }


def _plain(value: Any) -> Any:
    """Return the value of an enumeration's member."""
    return getattr(value, "value", value)


def _warmup(values: Mapping[str, Any], steps: int) -> int:
    """Return the steps of the warmup: a number, or a part of the run below 1 (transformers 5)."""
    name = "warmup_steps" if values.get("warmup_steps") else "warmup_ratio"
    given = number(name, values.get(name) or 0, 0.0)
    return int(given) if given >= 1 else math.ceil(given * steps)
