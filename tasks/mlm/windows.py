"""Pieces of text that can be found again, and the windows of documents that are read from them at a time.

A piece is what a source can be cut into: a range of a plain file, a row group of a Parquet table, a whole compressed
file. A window is a part of a piece that fits into memory. The position in a source is then a few small numbers, and
reading goes on from there without what came before.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from collab.errors import UserError
from tasks.mlm.corpus import SURROGATE, is_heldout

LONGEST = 100_000  # characters; a longer document is cut at white space, so that no later step meets 50 MB at once

SPACE = re.compile(r"\s*")

Part = Literal["train", "heldout"]


class Damaged(UserError):
    """Text that cannot be read, now or later: the file is broken, or not what it should be."""


class Unavailable(UserError):
    """Text that cannot be read at present: no network, no permission, a file that is gone."""


class Fault(NamedTuple):
    """Something that was skipped.

    :param kind: as the end of a sentence, "... because they are not UTF-8"; faults are counted by it
    :param message: where it was, what is wrong and how to mend it
    """

    kind: str
    message: str


EMPTY = "they are empty"
DAMAGED = "they cannot be read"


@dataclass(slots=True)
class Window:
    """Some documents of a piece.

    :param number: its place in the piece; rises from window to window, not always by one
    """

    number: int
    texts: list[str]
    faults: list[Fault] = field(default_factory=list)


class Piece(Protocol):
    """A part of a source that is read on its own."""

    @property
    def size(self) -> int:
        """Bytes of text in it, roughly."""

    @property
    def sequential(self) -> bool:
        """Whether it has several windows, of which the later ones cost the reading of the earlier ones."""

    def windows(self, low: float, high: float, start: int, order: str | None) -> Iterator[Window]:
        """Read the windows between two shares of the piece's length, from number `start` on.

        (0, x) and (x, 1) together give every window once, for each x.

        :param order: the name of an order of its windows, if they can be read in any; None for the stored one
        :raises Damaged: now or between windows; what was given before is good
        :raises Unavailable: the same; reading may be tried again
        """


@dataclass
class Bundle:
    """Small pieces as one window, so that a folder of many small files is no more work than a few large ones."""

    pieces: list[Piece]
    sequential = False

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def windows(self, low: float, high: float, start: int, order: str | None) -> Iterator[Window]:
        if start > 0:
            return
        whole = Window(0, [])
        for piece in self.pieces:
            try:
                for window in piece.windows(0.0, 1.0, 0, None):
                    whole.texts += window.texts
                    whole.faults += window.faults
            except Damaged as error:
                whole.faults.append(Fault(DAMAGED, str(error)))
        yield whole


def bundled(pieces: list[Piece], size: int) -> list[Piece]:
    """Put neighbours together up to `size` bytes."""
    bundles: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if piece.size > room:
            bundles.append([])
            room = size
        bundles[-1].append(piece)
        room -= piece.size
    return [bundle[0] if len(bundle) == 1 else Bundle(bundle) for bundle in bundles]


def admitted(texts: Iterable[str], part: Part) -> tuple[list[str], int]:
    """The documents of one part, stripped, cut where they are too long, and without half characters.

    :returns: them, and how many documents belong to the other part
    """
    found, others = [], 0
    wanted = part == "heldout"
    for stored in texts:
        text = stored.strip()
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:  # half a character, out of a JSON escape: no tokenizer can encode it
                text = SURROGATE.sub("\ufffd", text)
        for document in [text] if len(text) <= LONGEST else cut(text):
            if is_heldout(document) == wanted:
                found.append(document)
            else:
                others += 1
    return found, others


def cut(text: str) -> Iterator[str]:
    """Cut a text into parts of at most LONGEST characters, at white space where there is some; nothing else is lost."""
    at = 0
    while (at := SPACE.match(text, at).end()) < len(text):  # type: ignore[union-attr]
        head = text[at : at + LONGEST]
        if at + LONGEST < len(text) and not text[at + LONGEST].isspace():
            words = head.rsplit(None, 1)
            if len(words) == 2:
                head = words[0]
        at += len(head)
        yield head.rstrip()


def seeded(name: str) -> np.random.Generator:
    """Random numbers that everybody who knows the name draws alike."""
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "big"))


class Draws:
    """Random numbers in [0, 1) whose whole state is how many were drawn."""

    BLOCK = 1024

    def __init__(self, name: str, drawn: int = 0) -> None:
        self.name = name
        self.drawn = drawn
        self.block = self._block() if drawn % self.BLOCK else []

    def __call__(self) -> float:
        at = self.drawn % self.BLOCK
        if at == 0:
            self.block = self._block()
        self.drawn += 1
        return self.block[at]

    def _block(self) -> list[float]:
        return seeded(f"{self.name} {self.drawn // self.BLOCK}").random(self.BLOCK).tolist()


# ---------------------------------------------------------------------------------- what stands in a column


def no_document(value: Any, column: str, where: str) -> Fault:
    """The fault of a value that is no text, or a text without a word."""
    if value is None or isinstance(value, str):
        return Fault(EMPTY, f"{where} holds no text in the column {column!r}.")
    return Fault("they are not text", f"{where} {no_text(column, type(value).__name__)}")


def no_column(column: str, columns: Iterable[str]) -> str:
    return (
        f"has no column {column!r}; it has {', '.join(columns) or 'none'}. Name the one with the text: `column: NAME`."
    )


def no_text(column: str, kind: str) -> str:
    return f"holds {kind} in the column {column!r}, not text. Name the column that holds the text: `column: NAME`."


def is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def texts_of_column(values: pa.Array, column: str, where: str, first: int, window: Window) -> None:
    """Add the texts of an Arrow array to a window.

    :param where: with {} for the row, which is counted from `first`
    """
    try:
        texts = values.to_pylist()
    except UnicodeDecodeError:
        texts = [decoded_scalar(value) for value in values]
    for row, text in enumerate(texts, first):
        if text and isinstance(text, str) and not text.isspace():
            window.texts.append(text)
        elif isinstance(text, UnicodeDecodeError):
            window.faults.append(Fault("they are not UTF-8", f"{where.format(row)} is not UTF-8: {text}."))
        else:
            window.faults.append(no_document(text, column, where.format(row)))


def decoded_scalar(value: pa.Scalar) -> str | UnicodeDecodeError | None:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error
