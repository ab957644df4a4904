"""Finds a token's id by its text or bytes, as servers that hide ids report it."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_LETTERS = {letter: number for number, letter in bytes_to_unicode().items()}


class TokenTexts:
    """The tokens of a vocabulary by their bytes. Calling it is `columns.Spelled`."""

    def __init__(self, tokenizer: Any) -> None:
        """Read a fast tokenizer's vocabulary.

        Raises:
            ValueError: its tokens are neither bytes nor text with a mark for spaces.
        """
        decoder = str(tokenizer.backend_tokenizer.decoder)
        self._byte_level = "ByteLevel" in decoder
        if not self._byte_level and "▁" not in decoder:
            raise ValueError("this tokenizer's tokens have no bytes; give token ids")
        added = {number: one.content for number, one in tokenizer.added_tokens_decoder.items()}
        self._ids: defaultdict[bytes, list[int]] = defaultdict(list)
        for piece, number in tokenizer.get_vocab().items():
            self._ids[self._bytes(piece, added.get(number))].append(number)

    def _bytes(self, piece: str, added: str | None) -> bytes:
        if added is not None:
            return added.encode()
        if self._byte_level:
            return bytes(_LETTERS[letter] for letter in piece)
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("▁", " ").encode()

    def __call__(self, text: str, given: list[int] | None) -> int:
        """The id of a token.

        Raises:
            ValueError: none or several tokens have this text.
        """
        spelling = text.encode() if given is None else bytes(given)
        # A server reports an end of turn by its name, some without bytes.
        found = self._ids.get(spelling) or self._ids.get(text.encode()) or []
        if len(found) != 1:
            many = f"{len(found)} tokens have" if found else "no token of the student has"
            raise ValueError(f"{many} the text {text!r}")
        return found[0]
