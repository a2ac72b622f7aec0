"""Weight decay under control while a model trains.

- `WeightDecayScheduler` writes the decay of a schedule before each step that an optimizer takes,
  or applies it from outside, and keeps the account of what has been absorbed.
- `WeightDecaySchedulers` is several of them as one, `WeightDecayLR` one in the shape of a
  learning-rate scheduler for frameworks that insist on it.
- `preview` shows what will really act, learning rate included; `WeightDecayScheduler.audit`
  what did.
- `convert`, `budget` and `scale_to_budget` translate between the units of a decay.
"""

from .adapters import WeightDecayLR, WeightDecaySchedulers
from .coupling import CoupledDecayWarning, coupling
from .preview import Preview, learning_rates, preview, table
from .scheduler import WeightDecayScheduler
from .units import Scaled, budget, convert, scale_to_budget

__all__ = [
    "CoupledDecayWarning",
    "Preview",
    "Scaled",
    "WeightDecayLR",
    "WeightDecayScheduler",
    "WeightDecaySchedulers",
    "budget",
    "convert",
    "coupling",
    "learning_rates",
    "preview",
    "scale_to_budget",
    "table",
]
