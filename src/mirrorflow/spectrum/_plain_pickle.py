"""Pickles as plain data: read by instructions, of which none imports or calls anything."""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any

__all__ = ["Made", "Name", "plain_pickle"]

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
VALUES = {  # instructions whose argument is the value
    "INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
PUTS, GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Name:
    """What a pickle would import."""

    module: str
    name: str


@dataclass(eq=False)
class Made:
    """What a pickle would make: by which class or function, of which arguments and state."""

    by: Any
    arguments: Any
    state: Any = None

    @property
    def kind(self) -> str:
        """The name of the class or function; empty where it has none."""
        return self.by.name if isinstance(self.by, Name) else ""


def plain_pickle(data: bytes) -> Any:
    """Return what a pickle holds, with `Name` for what it imports and `Made` for its objects.

    Raises
    ------
    ValueError
        If it is damaged, or has an instruction that plain data and dataclasses do not need.

    Examples
    --------
    >>> import pickle
    >>> plain_pickle(pickle.dumps({"a": (1, 2.5, [None, True])}))
    {'a': (1, 2.5, [None, True])}
    >>> plain_pickle(pickle.dumps(print))
    Name(module='builtins', name='print')
    """
    machine = _Machine()
    try:
        for code, argument, _ in pickletools.genops(data):
            if code.name == "STOP":
                return machine.stack[-1]
            machine.take(code.name, argument)
    except (LookupError, TypeError, AttributeError, UnicodeError) as error:
        raise ValueError(f"its pickle is damaged: {type(error).__name__}") from error
    raise ValueError("its pickle has no end")


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def take(self, name: str, argument: Any) -> None:
        """Carry out one instruction on plain values."""
        if name in VALUES:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in TUPLES:
            self.stack.append(tuple(self._last(TUPLES[name])))
        elif name == "MARK":
            self._marks.append(len(self.stack))
        elif name in PUTS or name == "MEMOIZE":
            place = len(self._memo) if name == "MEMOIZE" else argument
            self._memo[place] = self.stack[-1]
        elif name in GETS:
            self.stack.append(self._memo[argument])
        elif name not in ("PROTO", "FRAME"):
            self._combine(name, argument)

    def _last(self, count: int) -> list[Any]:
        """Take values off the stack."""
        if len(self.stack) < count:
            raise LookupError
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _marked(self) -> list[Any]:
        """Take off what stands above the last mark."""
        return self._last(len(self.stack) - self._marks.pop())

    def _combine(self, name: str, argument: Any) -> None:
        """Carry out an instruction that makes one value of several."""
        if name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            found = self._marked()
            made = {"TUPLE": tuple, "LIST": list, "DICT": _pairs, "FROZENSET": frozenset}
            self.stack.append(made[name](found))
        elif name in ("APPEND", "APPENDS"):
            found = self._last(1) if name == "APPEND" else self._marked()
            _container(self.stack[-1], list).extend(found)
        elif name in ("SETITEM", "SETITEMS"):
            found = self._last(2) if name == "SETITEM" else self._marked()
            _container(self.stack[-1], dict).update(_pairs(found))
        elif name == "ADDITEMS":
            found = self._marked()
            _container(self.stack[-1], set).update(found)
        else:
            self._object(name, argument)

    def _object(self, name: str, argument: Any) -> None:
        """Note what would be imported, made, or given a state."""
        if name == "GLOBAL":
            self.stack.append(Name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            module, attribute = self._last(2)
            self.stack.append(Name(str(module), str(attribute)))
        elif name in ("REDUCE", "NEWOBJ"):
            by, arguments = self._last(2)
            self.stack.append(Made(by, arguments))
        elif name == "NEWOBJ_EX":
            by, arguments, _ = self._last(3)
            self.stack.append(Made(by, arguments))
        elif name == "BUILD":
            (state,) = self._last(1)
            _container(self.stack[-1], Made).state = state
        else:
            raise ValueError(f"its pickle has an instruction {name}, which plain data do not need")


def _container(value: Any, kind: type) -> Any:
    """Return a value of a kind; TypeError for another."""
    if not isinstance(value, kind):
        raise TypeError
    return value


def _pairs(found: list[Any]) -> dict[Any, Any]:
    """Return keys and values that follow each other as a dict."""
    return dict(zip(found[::2], found[1::2], strict=True))
