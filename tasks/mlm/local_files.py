"""Local files of text, cut into pieces where their format allows it.

Plain Python and pyarrow instead of the builders of `datasets`: those neither name the file and the byte at which a
text stops being UTF-8 nor read a plain file from its middle.
"""

import bz2
import contextlib
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from collab.errors import UserError
from tasks.mlm.windows import (
    Damaged,
    Fault,
    Piece,
    Unavailable,
    Window,
    is_text,
    no_column,
    no_document,
    no_text,
    texts_of_column,
)

SLICE = 1 << 18  # bytes; slices are read in any order, so smaller ones mix better, and larger ones cost less
CHUNK = 1 << 14  # compressed bytes; what is lost at most before the place where a compressed file is damaged
EXPANSION = 4  # what compressed text and Parquet grow to, roughly; it only decides about sizes
LONGEST_LINE = 64 << 20  # bytes; a line of JSON has to be in memory as a whole
ROW_GROUP = 8 << 20  # bytes; a larger row group is read in several windows


def matching_files(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    start = Path(path.anchor)
    try:
        files = sorted(file for file in start.glob(str(path.relative_to(start))) if file.is_file())
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"`files: {pattern}` is no pattern: {error}. Write one such as data/**/*.txt.") from error
    if not files:
        raise UserError(
            f"No file matches `files: {pattern}`, seen from the folder {Path.cwd()}: there is no text to train "
            f"on. Check the pattern with: ls {pattern}"
        )
    return files


def pieces_of_files(files: list[Path], column: str) -> list[Piece]:
    """Cut files into pieces; one that is damaged becomes a piece that says so when it is read.

    :raises UserError: for an ending that is not known, a file that may not be read, and when none of the files is good
    """
    pieces: list[Piece] = []
    broken: list[Piece] = []
    for file in files:
        try:
            pieces += pieces_of_file(file, column)
        except Damaged as error:
            broken.append(Broken(error))
    if broken and not pieces:
        raise cast(Broken, broken[0]).error
    return pieces + broken


def pieces_of_file(file: Path, column: str) -> list[Piece]:
    if file.suffix == ".parquet":
        return row_groups(file, column)
    compressed = file.suffix in DECOMPRESSORS
    form = FORMATS.get(Path(file.stem).suffix if compressed else file.suffix)
    if form is None:
        raise UserError(
            f"{file} is of no kind that can be read. Text is .txt, JSON lines are .jsonl, .ndjson or .json, tables are "
            f".parquet; text and JSON lines may end in {', '.join(DECOMPRESSORS)} besides. Narrow `files` or rename it."
        )
    with reading(file):
        size = file.stat().st_size
    if compressed:
        return [CompressedFile(file, form, column, EXPANSION * size)]
    return [Slice(file, form, column, index, min(SLICE, size - at)) for index, at in enumerate(range(0, size, SLICE))]


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, pa.ArrowException) as error:
        message = (
            f"{file} cannot be read to its end: {error}. It is damaged, incomplete, of another format, or may "
            f"not be read by you. Copy or download it again, or leave it out of `files`."
        )
        # pyarrow and bz2 call damage an OSError, too, but one without the number that the system gives.
        raise (Unavailable if getattr(error, "errno", None) else Damaged)(message) from error


@dataclass
class Broken:
    """A file that could not be opened when the run began."""

    error: Damaged
    size = 0
    sequential = False

    def windows(self, low: float, high: float, start: int, order: str | None) -> Iterator[Window]:
        raise self.error


# ---------------------------------------------------------------------------------- plain and compressed text
# Text is read in blocks of SLICE bytes. A window is what begins in a block; where that is, the block alone tells, so
# that neighbours agree about it without having read each other.


@dataclass(slots=True)
class Block:
    """SLICE bytes of the text of a file, or fewer at its end.

    :param last: nothing follows, because the file ends or because it is damaged behind it
    :param share: of the file's own bytes, how many were read before; the same whenever the file is read
    """

    index: int
    data: bytes
    last: bool
    share: float


class Format(Protocol):
    """How documents lie in a text."""

    def boundary(self, block: Block) -> int | None:
        """The byte where this block's own documents begin; None when all of it belongs to one that began before."""

    def documents(self, file: Path, column: str, at: int, data: bytes, window: Window) -> None:
        """Add the documents in `data`, which lies `at` bytes into the text, to a window."""


@dataclass(slots=True)
class Slice:
    """What begins in one block of a plain file."""

    file: Path
    form: Format
    column: str
    index: int
    size: int

    @property
    def sequential(self) -> bool:
        return False

    def windows(self, low: float, high: float, start: int, order: str | None) -> Iterator[Window]:
        if start <= self.index:
            blocks = plain_blocks(self.file, self.index)
            yield from windows_of_blocks(self.file, self.form, self.column, blocks, until=self.index)


@dataclass(slots=True)
class CompressedFile:
    """A file that can only be read from its beginning; what is passed over is decompressed, not parsed."""

    file: Path
    form: Format
    column: str
    size: int

    @property
    def sequential(self) -> bool:
        return True

    def windows(self, low: float, high: float, start: int, order: str | None) -> Iterator[Window]:
        blocks = itertools.dropwhile(
            lambda block: block.index < start or block.share < low, compressed_blocks(self.file)
        )
        return windows_of_blocks(self.file, self.form, self.column, blocks, high=high)


def plain_blocks(file: Path, first: int) -> Iterator[Block]:
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(first * SLICE)
        for index in itertools.count(first):
            if not (data := stream.read(SLICE)):
                return
            end = index * SLICE + len(data)
            yield Block(index, data, end >= size, 0.0)


def compressed_blocks(file: Path) -> Iterator[Block]:
    """Decompress a file; of a damaged one, give what comes before the damage and raise then."""
    size = file.stat().st_size
    text = bytearray()
    index, share = 0, 0.0
    damage: Exception | None = None
    with file.open("rb") as raw:
        try:
            for part in decompressed(raw, DECOMPRESSORS[file.suffix]):
                text += part
                while len(text) > SLICE:
                    yield Block(index, bytes(text[:SLICE]), False, share)
                    del text[:SLICE]
                    index, share = index + 1, raw.tell() / size
        except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            damage = error
        if text:
            yield Block(index, bytes(text), True, share)
        if damage:
            raise damage


def decompressed(raw: BinaryIO, make: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress one frame after the other: the libraries' own files lose what precedes a sudden end."""
    frame, inside = make(), False
    while compressed := raw.read(CHUNK):
        while compressed:
            if not inside:
                compressed = compressed.lstrip(b"\0")  # padding between frames is allowed
                if not compressed:
                    break
            yield frame.decompress(compressed)
            inside = not frame.eof
            if inside:
                break
            compressed, frame = frame.unused_data, make()
    if inside:
        raise EOFError("the file ends before its text does")


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


def windows_of_blocks(
    file: Path, form: Format, column: str, blocks: Iterator[Block], until: float = float("inf"), high: float = 1.0
) -> Iterator[Window]:
    """Read what begins in each block, up to the one with index `until` and before the share `high` of the file."""
    with reading(file):
        block = next(blocks, None)
        while block is not None and block.index <= until and (block.share < high or high == 1.0):
            first, begin = block, form.boundary(block) if block.index else 0
            if begin is None:
                block = next(blocks, None)
                continue
            window = Window(first.index, [])
            parts, size = [first.data[begin:]], 0
            while not block.last:
                block = next(blocks)
                end = form.boundary(block)
                parts.append(block.data[:end])
                size += len(parts[-1])
                if end is not None:
                    break
                if size > LONGEST_LINE:
                    del parts[1:]
            if size > LONGEST_LINE:
                data, _, _ = parts[0].rpartition(b"\n")
                where = f"A line of {file} that begins about byte {first.index * SLICE + begin + len(data)}"
                advice = "Write one JSON object for each document."
                window.faults.append(
                    Fault("their lines are too long", f"{where} has more than {LONGEST_LINE >> 20} MB. {advice}")
                )
            else:
                data = b"".join(parts)
            at = first.index * SLICE + begin
            if at == 0 and data.startswith(b"\xef\xbb\xbf"):
                at, data = 3, data[3:]
            form.documents(file, column, at, data, window)
            yield window
            if block is first:
                block = next(blocks, None)


class PlainText:
    """Documents separated by blank lines, the layout of BERT's own corpus files."""

    BLANK = re.compile(r"\n(?:[^\S\n]*\n)+")
    BLANK_BYTES = re.compile(rb"\n(?:[ \t\r\f\v]*\n)+")

    def boundary(self, block: Block) -> int | None:
        """Behind the first blank line. A text with none for a whole block is cut between lines, words, characters."""
        if found := self.BLANK_BYTES.search(block.data):
            return found.end()
        if block.last:
            return len(block.data)
        if found := re.search(rb"\n", block.data) or re.search(rb"[ \t\r\f\v]", block.data):
            return found.end()
        return next((at for at, byte in enumerate(block.data[:4]) if byte & 0xC0 != 0x80), 0)

    def documents(self, file: Path, column: str, at: int, data: bytes, window: Window) -> None:
        try:
            texts = self.BLANK.split(data.decode())
        except UnicodeDecodeError:
            texts = []
            ends = [(found.start(), found.end()) for found in self.BLANK_BYTES.finditer(data)]
            for begin, end in zip(
                [0, *(end for _, end in ends)], [*(start for start, _ in ends), len(data)], strict=True
            ):
                try:
                    texts.append(data[begin:end].decode())
                except UnicodeDecodeError as error:
                    window.faults.append(not_utf8(file, at + begin + error.start, error))
        window.texts += [text for text in texts if text and not text.isspace()]


class JsonLines:
    """One JSON object a line."""

    decode = json.JSONDecoder().raw_decode

    def boundary(self, block: Block) -> int | None:
        return block.data.find(b"\n") + 1 or None

    def documents(self, file: Path, column: str, at: int, data: bytes, window: Window) -> None:
        texts, decode = window.texts, self.decode
        for line in data.split(b"\n"):
            try:
                text = line.decode().strip()
                if text:
                    row, end = decode(text)
                    if end < len(text):
                        raise json.JSONDecodeError("Extra data", text, end)
                    text = row[column]
                    if type(text) is str and text and not text.isspace():
                        texts.append(text)
                    else:
                        window.faults.append(no_document(text, column, f"The line at byte {at} of {file}"))
            except UnicodeDecodeError as error:
                window.faults.append(not_utf8(file, at + error.start, error))
            except (ValueError, RecursionError) as error:
                window.faults.append(
                    Fault(
                        "they are not JSON",
                        f"The line at byte {at} of {file} is not JSON: {error}. Each line has to hold one JSON object. "
                        "Mend it.",
                    )
                )
            except (KeyError, TypeError, IndexError):
                where = f"The line at byte {at} of {file}"
                window.faults.append(
                    Fault("their column is missing", f"{where} {no_column(column, row)}")
                    if isinstance(row, dict)
                    else Fault(
                        "they are no JSON objects",
                        f"{where} is not a JSON object but {type(row).__name__}. Write {{{column!r}: ...}} lines.",
                    )
                )
            at += len(line) + 1


FORMATS: dict[str, Format] = {
    ".txt": PlainText(),
    ".jsonl": JsonLines(),
    ".ndjson": JsonLines(),
    ".json": JsonLines(),
}


def not_utf8(file: Path, at: int, error: UnicodeDecodeError) -> Fault:
    return Fault(
        "they are not UTF-8",
        f"{file} is not UTF-8: byte {at} of its text is 0x{error.object[error.start]:02x}. Reading on would train on "
        "garbage. Convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW",
    )


# ---------------------------------------------------------------------------------------------------- Parquet


@lru_cache(maxsize=64)  # the footer of a table with thousands of row groups takes milliseconds to parse
def metadata_of(file: Path, _changed: int) -> pq.FileMetaData:
    return pq.read_metadata(file)


def row_groups(file: Path, column: str) -> list[Piece]:
    with reading(file):
        metadata = metadata_of(file, file.stat().st_mtime_ns)
        schema = metadata.schema.to_arrow_schema()
    if column not in schema.names:
        raise Damaged(f"{file} {no_column(column, schema.names)}")
    if not is_text(schema.field(column).type):
        raise Damaged(f"{file} {no_text(column, str(schema.field(column).type))}")
    pieces: list[Piece] = []
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(number) for number in range(group.num_columns))
        size = sum(chunk.total_uncompressed_size for chunk in columns if chunk.path_in_schema == column)
        pieces.append(RowGroup(file, column, index, group.num_rows, size))
    return pieces


@dataclass(slots=True)
class RowGroup:
    """One row group of a Parquet table, in several windows when it is large."""

    file: Path
    column: str
    index: int
    rows: int
    size: int

    @property
    def sequential(self) -> bool:
        return self.size > ROW_GROUP

    def windows(self, low: float, high: float, start: int, order: str | None) -> Iterator[Window]:
        count = 1 + self.size // ROW_GROUP
        step = max(1, -(-self.rows // count))
        begin, end = max(int(low * count), start), None if high == 1.0 else int(high * count)
        if begin >= (count if end is None else end):
            return
        with reading(self.file):
            metadata = metadata_of(self.file, self.file.stat().st_mtime_ns)
            with pq.ParquetFile(self.file, metadata=metadata) as table:
                batches = table.iter_batches(step, row_groups=[self.index], columns=[self.column], use_threads=False)
                for number, batch in enumerate(itertools.islice(batches, end)):
                    if number >= begin:
                        window = Window(number, [])
                        where = f"Row {{}} of row group {self.index} of {self.file}"
                        texts_of_column(batch[self.column], self.column, where, number * step, window)
                        yield window
