r"""Schedules alpha(t) as values, with the exact integral that the theory needs.

The theory knows a schedule only through ``a_t = -int_0^t alpha_s ds`` (Theorem 3.2).
"""

from .combinators import Cyclic, Joined, join
from .schedules import Constant, Cosine, Linear, Piecewise, Schedule, SwitchOff
from .serialization import schedule_from_dict, schedule_to_dict

__all__ = [
    "Constant",
    "Cosine",
    "Cyclic",
    "Joined",
    "Linear",
    "Piecewise",
    "Schedule",
    "SwitchOff",
    "join",
    "schedule_from_dict",
    "schedule_to_dict",
]
