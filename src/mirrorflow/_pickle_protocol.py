"""Pickles of any protocol as pickles of protocol 2, which torch reads with ``weights_only=True``.

Instructions are rewritten and none is carried out: what torch refuses in protocol 2 it refuses
here. Strings are written wherever they are used, because protocol 4 names what it imports by two
strings on the stack, and protocol 2 in one instruction.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
from typing import IO, Any

__all__ = ["in_protocol_2"]

LARGEST = 1 << 32  # bytes of a file that is rewritten in memory
PICKLES = 5  # in a file of torch's format before zip, with raw numbers behind them
STRINGS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
INTEGERS = ("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2")
GETS, PUTS = ("GET", "BINGET", "LONG_BINGET"), ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
LATE = {"LIST": (b"]", b"e"), "DICT": (b"}", b"u")}  # made of what stands above a mark


def in_protocol_2(file: IO[bytes], zipped: bool) -> io.BytesIO:
    """Return a file of ``torch.save`` with its pickles in protocol 2.

    Raises
    ------
    ValueError
        If the file is not such a file, too large, or uses what has no counterpart in protocol 2.
    """
    file.seek(0)
    content = io.BytesIO(file.read(LARGEST + 1))
    if content.getbuffer().nbytes > LARGEST:
        raise ValueError(
            f"it has more than {LARGEST} bytes and another pickle protocol than 2, torch's default"
        )
    if not zipped:
        return io.BytesIO(b"".join(_rewritten(content) for _ in range(PICKLES)) + content.read())
    with zipfile.ZipFile(content, "a") as archive:
        (old,) = [entry for entry in archive.filelist if entry.filename.endswith("/data.pkl")]
        new = _rewritten(io.BytesIO(archive.read(old)))
        archive.filelist.remove(old)
        del archive.NameToInfo[old.filename]
        archive.writestr(old.filename, new)
    content.seek(0)
    return content


def _rewritten(stream: IO[bytes]) -> bytes:
    """Read one pickle and return it in protocol 2."""
    writer = _Writer()
    for code, argument, _ in pickletools.genops(stream):
        writer.take(code.name, code.code.encode("latin-1"), argument)
    return b"".join(writer.parts)


class _Writer:
    """Writes instructions of protocol 2, and knows which places of the memo hold strings."""

    def __init__(self) -> None:
        self.parts: list[bytes] = [b"\x80\x02"]
        self._texts: dict[int, str] = {}  # of parts that push a string
        self._memo: dict[int, str | None] = {}
        self._marks: list[int] = []

    def take(self, name: str, code: bytes, argument: Any) -> None:
        """Write the counterpart of an instruction."""
        if name in STRINGS:
            self._push(argument)
        elif name in BYTES:
            self._bytes(argument)
        elif name in INTEGERS:
            self._integer(argument)
        elif name in PUTS:
            self._put(len(self._memo) if name == "MEMOIZE" else argument)
        elif name in GETS:
            text = self._memo.get(argument)
            self._write(b"j" + struct.pack("<I", argument)) if text is None else self._push(text)
        elif name == "STACK_GLOBAL":
            self._global()
        elif name in LATE:
            self._late(*LATE[name])
        elif name not in ("PROTO", "FRAME"):
            self._as_it_is(name, code, argument)

    def _write(self, part: bytes) -> None:
        self.parts.append(part)

    def _push(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self._texts[len(self.parts)] = text
        self._write(b"X" + struct.pack("<I", len(data)) + data)

    def _bytes(self, data: bytes) -> None:
        """Write bytes as protocol 2 does: a string of Latin letters, encoded."""
        self._write(b"c_codecs\nencode\n")
        self._push(data.decode("latin-1"))
        self._push("latin1")
        self._write(b"\x86R")

    def _integer(self, value: int) -> None:
        if isinstance(value, bool):
            self._write(b"\x88" if value else b"\x89")
        elif -(1 << 31) <= value < 1 << 31:
            self._write(b"J" + struct.pack("<i", value))
        else:
            data = pickle.encode_long(value)
            if len(data) > 255:
                raise ValueError("it holds an integer of more than 255 bytes")
            self._write(b"\x8a" + bytes([len(data)]) + data)

    def _put(self, place: int) -> None:
        text = self._texts.get(len(self.parts) - 1)
        self._memo[place] = text
        if text is None:
            self._write(b"r" + struct.pack("<I", place))

    def _global(self) -> None:
        """Turn two strings into the name of what is imported."""
        last = len(self.parts)
        if {last - 1, last - 2} - set(self._texts):
            raise ValueError("it imports something by no name")
        name, module = (self._texts.pop(last - i) for i in (1, 2))
        if "\n" in module + name:
            raise ValueError("it imports something by no name")
        self.parts[-2:] = [f"c{module}\n{name}\n".encode()]

    def _late(self, empty: bytes, filled: bytes) -> None:
        """Make a list or a dict before what it holds."""
        if not self._marks:
            raise ValueError("it fills a list from nowhere")
        self.parts[self._marks.pop()] = empty + b"("
        self._write(filled)

    def _as_it_is(self, name: str, code: bytes, argument: Any) -> None:
        """Write an instruction that protocol 2 has as well; torch refuses those it has not."""
        if name == "MARK":
            self._marks.append(len(self.parts))
        elif self._marks and name in ("TUPLE", "APPENDS", "SETITEMS"):
            self._marks.pop()
        if name == "GLOBAL":
            code += "{}\n{}\n".format(*argument.split(" ", 1)).encode()
        elif name in ("FLOAT", "BINFLOAT"):
            code = b"G" + struct.pack(">d", argument)
        elif argument is not None:
            raise ValueError(f"it has an instruction {name}, which torch does not read")
        self._write(code)
