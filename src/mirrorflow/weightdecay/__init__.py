"""Weight decay under control while a model trains.

- `WeightDecayScheduler` writes the decay of a schedule before each step that an optimizer takes,
  or applies it from outside, and keeps the account of what has been absorbed.
- `WeightDecaySchedulers` is several of them as one, `WeightDecayLR` one in the shape of a
  learning-rate scheduler for frameworks that insist on it.
- `preview` shows what will really act, learning rate included; `WeightDecayScheduler.audit`
  what did.
- `HoldRatio`, `OffWhenLevel`, `OffBelow` and `OffAtBudget` are schedules that answer to
  measurements, `PerLayer` one of them for each layer.
- `lint` looks for mistakes in how an optimizer decays weights.
- `NoDecayPolicy` says which parameters do not decay, `no_decay_policy` has presets.
- `convert`, `budget` and `scale_to_budget` translate between the units of a decay.
"""

from ._lint_file import lint_file
from ._rounding import RoundingWarning, rounded_fraction
from .adapters import WeightDecayLR, WeightDecaySchedulers
from .controllers import HoldRatio, PerLayer
from .coupling import CoupledDecayWarning, coupling
from .feedback import Feedback, OffAtBudget, OffBelow, OffWhenLevel
from .lint import Finding, lint
from .outlook import Outlook, Product, outlook_table
from .policy import NoDecayPolicy, no_decay_policy
from .preview import Preview, preview, table
from .scheduler import WeightDecayScheduler
from .training_run import TrainingRun
from .units import Scaled, ScaledFunction, budget, convert, learning_rates, scale_to_budget

__all__ = [
    "CoupledDecayWarning",
    "Feedback",
    "Finding",
    "HoldRatio",
    "NoDecayPolicy",
    "OffAtBudget",
    "OffBelow",
    "OffWhenLevel",
    "Outlook",
    "PerLayer",
    "Preview",
    "Product",
    "RoundingWarning",
    "Scaled",
    "ScaledFunction",
    "TrainingRun",
    "WeightDecayLR",
    "WeightDecayScheduler",
    "WeightDecaySchedulers",
    "budget",
    "convert",
    "coupling",
    "learning_rates",
    "lint",
    "lint_file",
    "no_decay_policy",
    "outlook_table",
    "preview",
    "rounded_fraction",
    "scale_to_budget",
    "table",
]
