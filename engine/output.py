"""What commands print: text that a terminal shows as text, on streams that may fail.

A name, a row or a library's message may hold escape sequences that change the terminal, or a
hundred thousand characters. Streams may be closed, full or without a reader, or take ASCII alone.
No run may be lost for one of these.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

LONGEST_LINE = 2000
"""Characters of a printed line; the middle of a longer one is left out."""
_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of characters that are no text: controls, formats, surrogates, line ends."""
_TAIL = 500
"""Characters that are kept of its end, where a message names the remedy."""


def visible(text: str) -> str:
    r"""`text` with control characters, surrogates, changes of direction and Unicode's own line ends
    as escapes (\x1b)."""
    return "".join(
        character.encode("unicode_escape").decode()
        if character not in "\n\t" and unicodedata.category(character) in _ESCAPED
        else character
        for character in text
    )


def printable(text: str) -> str:
    """`visible` text without the middle of lines that are longer than LONGEST_LINE."""
    return "\n".join(map(_shortened, text.split("\n")))


def _shortened(line: str) -> str:
    if len(line) > LONGEST_LINE:
        head = LONGEST_LINE - _TAIL
        omitted = f" [{len(line) - LONGEST_LINE:,} characters omitted] "
        return visible(line[:head]) + omitted + visible(line[-_TAIL:])
    return visible(line)


class _Stream:
    """A text stream that drops what cannot be written.

    Attributes:
        error: the first error of the stream; None if it had none.
    """

    def __init__(self, stream: IO[str] | None) -> None:
        if stream is None:  # its descriptor was closed when Python started
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self._stream = stream
        self.error: Exception | None = None
        with suppress(AttributeError, ValueError):  # not a text file, or closed
            cast(Any, stream).reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            self.error = self.error or error
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self.error = self.error or error

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:
            return False

    def release(self) -> None:
        """Discard text that a failed stream still holds: Python would fail to write it at exit."""
        self.flush()
        if self.error is not None:
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def tolerant_streams() -> Iterator[_Stream]:
    """Within the context, stdout and stderr drop what cannot be written; yields stdout."""
    for number in range(3):  # else a file that is opened later gets the number, and the text
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)  # by worker processes
    before = sys.stdout, sys.stderr
    streams = _Stream(sys.stdout), _Stream(sys.stderr)
    sys.stdout, sys.stderr = cast(tuple[IO[str], IO[str]], streams)
    try:
        yield streams[0]
    finally:
        for stream in streams:
            stream.release()
        sys.stdout, sys.stderr = before
