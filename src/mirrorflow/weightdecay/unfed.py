"""What a closed loop that nobody feeds says: while it acts, once it is late, and in the end."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

__all__ = ["Unfed"]

_LONG = 1000  # steps that a loop may wait, where nobody has said how long it will have to
_INTERVALS = 3  # of those that were announced
_SHORT = 20  # steps: a run that ends before is a trial


class Unfed:
    """The steps for which a loop has set the decay, and nobody has fed it.

    Parameters
    ----------
    loop : Feedback
        Not kept, so that it ends when nobody else keeps it; in the end that is looked at, too.
    step : int
        The optimizer step that comes next.
    resumed : bool
        Whether it goes on from a checkpoint: it may have been fed before.

    Examples
    --------
    >>> from mirrorflow.weightdecay import OffBelow
    >>> unfed = Unfed(OffBelow(0.1, target=2.0), step=0, resumed=False)
    >>> unfed.acts_at(500, every=0)
    >>> unfed.fed()
    """

    def __init__(self, loop: Any, step: int, resumed: bool) -> None:
        self.name, self.rate = type(loop).__name__, loop.current
        self.start, self.step, self.every = step, step, 0
        self.resumed, self.said = resumed, False
        self._end = weakref.finalize(loop, self.over)

    def acts_at(self, step: int, every: int) -> None:
        """Warn, once, if the loop should have been fed by now.

        Parameters
        ----------
        step : int
            The optimizer step that comes next.
        every : int
            After how many steps somebody feeds it, as far as that was announced; else 0.
        """
        if step not in (self.step, self.step + 1):  # a run that is taken up at a later step
            self.start = step
        self.step, self.every = step, every
        longest = max(_SHORT, _INTERVALS * every) if every else _LONG
        if self.step - self.start >= longest:
            self._say(stacklevel=6)

    def over(self) -> None:
        """Warn if the run is over, and the loop was not fed in it."""
        if not self.resumed and self.step - self.start >= _SHORT:
            self._say(stacklevel=2)

    def fed(self) -> None:
        """Take note that it is fed: nothing remains to be said."""
        self.said = True
        self._end.detach()

    def _say(self, stacklevel: int) -> None:
        """Warn, unless that was done."""
        if self.said:
            return
        self.fed()
        how = (
            f"ControlledDecay feeds it every {self.every} steps (track_every), by its own step(), "
            "which has to follow each optimizer.step()"
            if self.every
            else "call its update(step, value) with what is measured, or let "
            "mirrorflow.integrations.loop.ControlledDecay measure"
        )
        warnings.warn(
            f"{self.name} has set the decay of steps {self.start} to {self.step} and was never "
            f"fed, so that it stays at {self.rate}: {how}",
            stacklevel=stacklevel,
        )
