r"""PEFT's patterns of module names, matched within a bound on the steps.

PEFT takes the first pattern for which ``re.match(rf"(.*\.)?({pattern})$", module)`` succeeds. A
file may hold patterns for which the backtracking of `re` takes longer than the universe has been
there. Those that offer more than a few choices are matched by the set of all positions that a part
of them can reach, which costs steps in the product of lengths, and the steps are counted.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Patterns"]

STEPS = 3_000_000  # some seconds; the longest lists of real adapters take a hundredth
LENGTH = 1000  # of a pattern
# Backtracking over these is quick: one repetition, of no group, and a few alternatives.
REPEATED = re.compile(r"[*+?]|\{\d")
TOKEN = re.compile(
    r"(?P<zero>\^|\$|\\[AbBZ])"
    r"|(?P<one>\\(?:[dDsSwWafnrtv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|\W)|\[\^?\]?(?:\\.|[^\]\\])*\])"
    r"|(?P<open>\((?:\?:|\?P<\w+>|(?!\?)))|(?P<close>\))|(?P<bar>\|)"
    r"|(?P<repeat>(?:[*+?]|\{(?:\d+(?:,\d*)?|,\d*)\})(?!\+)\??)"
    r"|(?P<plain>[^\\(*+?\[]|\{)",
    re.DOTALL,
)

Starts = set[int]
Part = Callable[[str, Starts], Starts]  # from where it starts, to where it may end


class Patterns:
    """Values by patterns of module names, as rank_pattern and alpha_pattern of PEFT hold them.

    Parameters
    ----------
    values : mapping of str to number
    source : str
        The file and the field, for the messages.

    Raises
    ------
    ValueError
        If a pattern is not a regular expression as PEFT writes it, or a search takes too long.

    Examples
    --------
    >>> patterns = Patterns({"(a+)+x": 4, "^q": 2}, "alpha_pattern")
    >>> [patterns.value(name, 1) for name in ("a" * 60, "layers.aax", "q", "layers.q")]
    [1, 4, 2, 1]
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self._source = source
        self._steps = STEPS
        self._matchers = {pattern: self._matcher(pattern) for pattern in values}

    def value(self, module: str, default: Any) -> Any:
        """Return the value of the first pattern that a module's name ends in, as PEFT does."""
        for pattern, ends in self._matchers.items():
            if ends(module):
                return self._values[pattern]
        return self._values.get(module, default)

    def _matcher(self, pattern: str) -> Callable[[str], bool]:
        """Return what tells whether a pattern matches a name."""
        if len(pattern) > LENGTH:
            raise ValueError(self._refused(pattern, f"it has more than {LENGTH} characters"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of sets that another version may read otherwise
                whole = re.compile(rf"(.*\.)?({pattern})$")
                part = None if _is_quick(pattern) else _Parser(pattern, self._count).whole()
        except (re.error, OverflowError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ValueError(self._refused(pattern, reason)) from error
        if part is None:
            return lambda module: whole.match(module) is not None
        return lambda module: self._reaches_end(part, module)

    def _reaches_end(self, part: Part, module: str) -> bool:
        """Whether a part matches from the beginning, or from behind a dot, to the end."""
        starts = {0} | {match.end() for match in re.finditer(r"\.", module.partition("\n")[0])}
        ends = part(module, starts)
        return len(module) in ends or (module.endswith("\n") and len(module) - 1 in ends)

    def _count(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise ValueError(
                f"{self._source} must hold patterns that match in {STEPS} steps, got some that do "
                "not. Write the names of modules out."
            )

    def _refused(self, pattern: str, reason: str) -> str:
        return (
            f"{self._source} must hold regular expressions that PEFT can match, got "
            f"{pattern[:60]!r}: {reason}"
        )


def _is_quick(pattern: str) -> bool:
    """Whether backtracking over a pattern has few choices."""
    if ")" in pattern and re.search(r"\)[*+?{]", pattern):
        return False
    return len(REPEATED.findall(pattern)) <= 1 and pattern.count("|") <= 8


class _Parser:
    """Makes of a regular expression a function from starts to ends; it knows what has no memory."""

    def __init__(self, pattern: str, count: Callable[[int], None]) -> None:
        self._pattern = pattern
        self._count = count
        self._place = 0

    def whole(self) -> Part:
        """Return the part that the whole pattern is."""
        part = self._choice()
        if self._place < len(self._pattern):
            raise re.error(f"its part {self._pattern[self._place :][:20]!r} is not supported")
        return part

    def _next(self, *kinds: str) -> re.Match[str] | None:
        """Take the next token, if it is of these kinds."""
        match = TOKEN.match(self._pattern, self._place)
        if match is None or match.lastgroup not in kinds:
            return None
        self._place = match.end()
        return match

    def _choice(self) -> Part:
        """Read alternatives."""
        parts = [self._sequence()]
        while self._next("bar"):
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else lambda text, starts: _any(parts, text, starts)

    def _sequence(self) -> Part:
        """Read parts that follow each other."""
        parts: list[Part] = []
        while (part := self._atom()) is not None:
            while repeat := self._next("repeat"):
                part = self._repeated(part, *_bounds(repeat[0]))
            parts.append(part)
        return lambda text, starts: _after(parts, text, starts)

    def _atom(self) -> Part | None:
        """Read a group, a character, or a place; None where there is none."""
        if self._next("open"):
            part = self._choice()
            return part if self._next("close") else None
        if found := self._next("zero", "one", "plain"):
            brace = found.lastgroup == "plain" and found[0] in "{}]"
            return self._tested(re.compile(re.escape(found[0]) if brace else found[0]))
        return None

    def _tested(self, test: re.Pattern[str]) -> Part:
        """Return the part of one character, or of none."""

        def ends(text: str, starts: Starts) -> Starts:
            self._count(len(starts) + 1)
            found = (test.match(text, start) for start in starts)
            return {match.end() for match in found if match}

        return ends

    def _repeated(self, part: Part, low: int, high: int | None) -> Part:
        """Return a part so many times: more often than a text is long changes nothing."""

        def ends(text: str, starts: Starts) -> Starts:
            self._count(len(starts) + 1)
            for _ in range(min(low, len(text) + 1)):
                starts = part(text, starts)
            found, new = set(starts), starts
            for _ in range(len(text) + 1 if high is None else min(high - low, len(text) + 1)):
                new = part(text, new) - found
                if not new:
                    break
                found |= new
            return found

        return ends


def _any(parts: list[Part], text: str, starts: Starts) -> Starts:
    return set().union(*(part(text, starts) for part in parts))


def _after(parts: list[Part], text: str, starts: Starts) -> Starts:
    for part in parts:
        if not starts:
            break
        starts = part(text, starts)
    return starts


def _bounds(repeat: str) -> tuple[int, int | None]:
    """Return the least and the largest number of times of ``*``, ``+``, ``?`` or ``{2,3}``."""
    if repeat[0] in "*+?":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[repeat[0]]
    low, comma, high = repeat.rstrip("?")[1:-1].partition(",")
    first = int(low or 0)
    return first, (int(high) if high else None) if comma else first
