"""Where the text comes from: the embedded corpus, the Hub and local files, and their endless weighted mixture.

Every source is a `Collection`, which can be read from end to end once (`one_pass`) as often as wanted. The training
part of a run repeats these passes for ever, each in an order of its own; the held-out part is one plain pass.

Two peers should not train on the same documents. A seed for each peer does not give that with streams: read from their
starts through a shuffle buffer, two peers share up to 84 % of their first samples (datasets 5, 4 to 8 shards). Here a
stream is cut into many pieces where its format allows it (Parquet row groups, ranges of a plain file); each peer reads
the pieces in its own order, and begins in the middle of the pieces that cannot be cut.
"""

import bz2
import contextlib
import difflib
import gzip
import io
import itertools
import json
import lzma
import random
import textwrap
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from collab.errors import UserError
from tasks.mlm.corpus import SURROGATE, embedded_documents, is_heldout

IN_MEMORY = 64 << 20  # bytes of text up to which local files are read into memory and permuted as a whole
EXPANSION = 4  # what compressed text and Parquet grow to, roughly; it only decides about IN_MEMORY
SLICE = 1 << 18  # bytes; the pieces of a plain file are read in any order, so smaller ones mix better
OPEN_PIECES = 4  # read side by side: a file of news after a file of novels should come mixed
SKIPPED_ROWS = 20_000  # of a Hub file that cannot be cut, a peer passes over at most so many: they are downloaded

KEYS = {
    "embedded": {"weight"},
    "hub": {"weight", "config", "split", "column", "revision", "private"},
    "files": {"weight", "column"},
}
TYPES: dict[str, type | tuple[type, ...]] = {"embedded": bool, "private": bool, "weight": (int, float)}  # others: str


@dataclass(frozen=True)
class Source:
    """One entry of `sources` in a run's YAML: exactly one of `embedded`, `hub` and `files` is set.

    :param embedded: the text that ships inside Python: no network, no account (see corpus.py)
    :param hub: the name of a data set on the Hugging Face Hub, read as a stream; nothing is kept on disk
    :param config: the data set's configuration, where it has several ("20231101.bn")
    :param split: the data set's split
    :param revision: a commit or tag of the data set; name a commit when all peers must read the very same text
    :param private: use the login that `hf auth login` stored; a run's YAML goes to everybody and never holds a token
    :param files: a pattern for local files, relative to the current folder; `**` reaches into folders.
        .txt holds documents separated by blank lines; .jsonl one JSON object a line; .parquet a table. Text and JSON
        lines may be compressed (.gz, .bz2, .xz, .zst)
    :param column: the column (JSON lines: the key) that holds the text; .txt files have none
    :param weight: the share of the documents that this source gives, relative to the weights of the others
    """

    embedded: bool = False
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    private: bool = False
    files: str | None = None
    column: str = "text"
    weight: float = 1.0

    @classmethod
    def from_mapping(cls, mapping: Any) -> "Source":
        """Build a source from what stands in the YAML.

        :raises UserError: for an unknown key, a missing or a second kind, a value of the wrong type
        """
        shown = "A source is one of {embedded: true}, {hub: OWNER/NAME, ...} and {files: PATTERN, ...}."
        if not isinstance(mapping, Mapping):
            raise UserError(f"An entry of `sources` is {type(mapping).__name__} where a mapping is meant. {shown}")
        for key in mapping:
            if key not in cls.__dataclass_fields__:
                near = difflib.get_close_matches(str(key), cls.__dataclass_fields__, n=2)
                hint = f"Did you mean {' or '.join(near)}?" if near else f"Keys: {', '.join(cls.__dataclass_fields__)}."
                raise UserError(f"An entry of `sources` has a key {key!r} that no source has. {hint}")
        kinds = [kind for kind in KEYS if kind in mapping]
        if len(kinds) != 1:
            raise UserError(f"An entry of `sources` has {' and '.join(kinds) or 'no kind'}. {shown} Write one of them.")
        for key, value in mapping.items():
            if key not in KEYS[kinds[0]] | {kinds[0]}:
                allowed = ", ".join(sorted(KEYS[kinds[0]]))
                raise UserError(
                    f"`{key}` has no meaning for a source with `{kinds[0]}`. Take it out; allowed: {allowed}."
                )
            expected = TYPES.get(key, str)
            if not isinstance(value, expected) or (key == "weight" and isinstance(value, bool)) or value == "":
                name = {bool: "true or false", str: "a text in quotes"}.get(cast(type, expected), "a number")
                raise UserError(f"`{key}: {value!r}` of a source is {type(value).__name__}. Write {name}.")
        if mapping.get("embedded") is False:
            raise UserError("`embedded: false` names no text. Write `embedded: true`, or take the entry out.")
        if not 0 < mapping.get("weight", 1.0) < float("inf"):
            raise UserError(f"`weight: {mapping['weight']}` of a source is not above 0. Take the source out instead.")
        return cls(**mapping)

    def describe(self) -> str:
        """What it is, in the words of an error or of a model card."""
        if self.embedded:
            return "the embedded corpus"
        if self.hub:
            return f"{self.hub} on the Hub ({f'config {self.config}, ' if self.config else ''}split {self.split})"
        return f"the files {self.files}"


def _documents(
    sources: Sequence[Source],
    *,
    seed: int,
    place: str,
    part: Literal["train", "heldout"],
    cache_dir: Path,
    shuffle_buffer: int,
    endless: bool = True,
) -> Iterator[str]:
    """Stream the documents of a weighted mixture; every source is opened, and checked, before this returns.

    The training part is endless: a source that runs out starts over in another order, so that the mixture keeps its
    weights. The held-out part (about 2 % of each source, see `is_heldout`) is finite and the same for everyone.

    :param seed: of the run; with the same seed and place, the same documents come in the same order
    :param place: this peer's own place, such as its peer id: it decides which documents come first, and their order
    :param part: "train" or "heldout"; no document is in both
    :param cache_dir: folder for the embedded corpus
    :param shuffle_buffer: documents held in memory to shuffle a stream (large files, the Hub). Raise it when the
        neighbours in a corpus resemble each other; the first document comes only when it is full
    :param endless: False for a single pass over the training part, as for training a tokenizer; a source that runs
        out then leaves the mixture to the others
    :raises UserError: now or while reading, for everything that a person can mend: no network, no such data set,
        column or file, damaged or empty files
    """
    if not sources:
        raise UserError("`sources` is empty: there is no text to train on. Add an entry, for example {embedded: true}.")
    collections = [open_source(source, cache_dir, shuffle_buffer) for source in sources]
    streams = []
    for index, (source, collection) in enumerate(zip(sources, collections, strict=True)):
        orders = [None] if part == "heldout" else pass_orders(f"{seed} {place} {index}", endless)
        streams.append(repeated(source, collection, orders, part))
    order = random.Random(f"{seed} mixture" if part == "heldout" else f"{seed} {place} mixture")
    return mixture(streams, [source.weight for source in sources], order)


class documents:  # stub until the real one is merged
    def __init__(self, sources, state=None, **more):
        self.it, self.n = _documents(sources, **more), 0
        for _ in range(state["n"] if state else 0):
            next(self)

    def __iter__(self):
        return self

    def __next__(self):
        text = next(self.it)
        self.n += 1
        return text

    def state_dict(self):
        return {"n": self.n}


def pass_orders(name: str, endless: bool) -> Iterator[random.Random]:
    for number in itertools.count() if endless else range(1):
        yield random.Random(f"{name} {number}")


def mixture(streams: list[Iterator[str]], weights: list[float], order: random.Random) -> Iterator[str]:
    """Draw each document from a stream chosen by weight; a stream that ends leaves, and the others go on."""
    left = list(range(len(streams)))
    while left:
        [index] = order.choices(left, [weights[index] for index in left])
        try:
            yield next(streams[index])
        except StopIteration:
            left.remove(index)


class Collection(Protocol):
    """Documents that can be read again and again."""

    def one_pass(self, order: random.Random | None) -> Iterator[str]:
        """Give every document once: as they are stored for None, otherwise in an order that `order` draws."""


def repeated(
    source: Source, collection: Collection, orders: Iterable[random.Random | None], part: Literal["train", "heldout"]
) -> Iterator[str]:
    """Read one part of a collection once for each of `orders`.

    :raises UserError: when a whole pass gave nothing to train on, instead of looking for it for ever
    """
    for order in orders:
        of_part = others = 0
        for stored in collection.one_pass(order):
            # Half a character, out of a JSON escape, is nothing that a tokenizer can encode.
            text = SURROGATE.sub("\ufffd", stored.strip())
            if not text:
                continue
            if is_heldout(text) == (part == "heldout"):
                of_part += 1
                yield text
            else:
                others += 1
        if of_part == 0 and (part == "train" or others == 0):
            if others:
                what = f"to train on: its {others} documents fell into the held-out part. Add more text."
            else:
                what = "at all: it was read to its end and held only white space. Check its column and text."
            raise UserError(f"There is no document in {source.describe()} {what}")


def open_source(source: Source, cache_dir: Path, shuffle_buffer: int) -> Collection:
    if source.embedded:
        return InMemory(embedded_documents(cache_dir))
    if source.hub:
        return HubStream(source, shuffle_buffer)
    files = matching_files(source)
    size = sum(file.stat().st_size * (1 if file.suffix in READERS else EXPANSION) for file in files)
    fits = size <= IN_MEMORY
    pieces = [piece for file in files for piece in pieces_of_file(file, source.column, IN_MEMORY if fits else SLICE)]
    return InMemory([text for piece in pieces for text in piece(0.0)]) if fits else FileStream(pieces, shuffle_buffer)


@dataclass
class InMemory:
    """A corpus small enough to be permuted as a whole."""

    texts: list[str]

    def one_pass(self, order: random.Random | None) -> Iterator[str]:
        indices = list(range(len(self.texts)))
        if order is not None:
            order.shuffle(indices)
        return (self.texts[index] for index in indices)


# A piece is read from about this share of its length to its end, then from its beginning to where that began.
Piece = Callable[[float], Iterator[str]]


@dataclass
class FileStream:
    """Local files too large for the memory, as the pieces into which they can be cut."""

    pieces: list[Piece]
    shuffle_buffer: int

    def one_pass(self, order: random.Random | None) -> Iterator[str]:
        if order is None:
            return itertools.chain.from_iterable(piece(0.0) for piece in self.pieces)
        return shuffled(side_by_side(order.sample(self.pieces, len(self.pieces)), order), self.shuffle_buffer, order)


def side_by_side(pieces: Sequence[Piece], order: random.Random) -> Iterator[str]:
    """Read OPEN_PIECES pieces at a time, each document from one of them by chance; the first ones from their middle.

    Only the first ones: peers that began at different places stay apart, and to get to the middle of a compressed
    file its first half is read twice.
    """
    opened = (piece(order.random() if number < OPEN_PIECES else 0.0) for number, piece in enumerate(pieces))
    active = list(itertools.islice(opened, OPEN_PIECES))
    while active:
        chosen = order.randrange(len(active))
        try:
            yield next(active[chosen])
        except StopIteration:
            active[chosen : chosen + 1] = itertools.islice(opened, 1)


def shuffled(texts: Iterator[str], size: int, order: random.Random) -> Iterator[str]:
    """Shuffle a stream through a buffer of `size` documents."""
    buffer = list(itertools.islice(texts, max(size, 1)))
    for text in texts:
        chosen = order.randrange(len(buffer))
        yield buffer[chosen]
        buffer[chosen] = text
    order.shuffle(buffer)
    yield from buffer


# ---------------------------------------------------------------------------------------------------- local files
# Plain Python and pyarrow instead of the builders of `datasets`: those neither name the file and the byte at which a
# text stops being UTF-8 nor read a plain file from its middle.


def matching_files(source: Source) -> list[Path]:
    pattern = Path(cast(str, source.files)).expanduser()
    start = Path(pattern.anchor)
    try:
        files = sorted(file for file in start.glob(str(pattern.relative_to(start))) if file.is_file())
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"`files: {source.files}` is no pattern: {error}. Write one such as data/**/*.txt.") from error
    if not files:
        raise UserError(
            f"No file matches `files: {source.files}`, seen from the folder {Path.cwd()}: there is no text to train "
            f"on. Check the pattern with: ls {source.files}"
        )
    return files


def pieces_of_file(file: Path, column: str, step: int) -> list[Piece]:
    """Cut a file where its format allows it: a table into its row groups, plain text into ranges of `step` bytes."""
    if file.suffix == ".parquet":
        return parquet_pieces(file, column)
    decompress = DECOMPRESSORS.get(file.suffix)
    reader = READERS.get(Path(file.stem).suffix if decompress else file.suffix)
    if reader is None:
        raise UserError(
            f"{file} is of no kind that can be read. Text is .txt, JSON lines are .jsonl, .ndjson or .json, tables are "
            f".parquet; text and JSON lines may end in {', '.join(DECOMPRESSORS)} besides. Narrow `files` or rename it."
        )
    if decompress:
        return [partial(read_compressed, file, reader, column)]
    size = file.stat().st_size
    return [partial(read_slice, file, reader, column, at, at + step) for at in range(0, size, step)]


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, pa.ArrowException) as error:
        raise UserError(
            f"{file} cannot be read to its end: {error}. It is damaged, incomplete, of another format, or may "
            f"not be read by you. Copy or download it again, or leave it out of `files`."
        ) from error


Lines = Iterator[tuple[int, bytes]]  # where a line begins (bytes from the start of the text), and the line


def read_slice(file: Path, reader: "Reader", column: str, begin: int, end: int, _share: float) -> Iterator[str]:
    """Read the lines that begin in [begin, end) of a plain file; a text document that crosses `end` becomes two.

    A slice is short and always read from its beginning: where it was cut must not depend on the peer.
    """
    with reading(file), file.open("rb") as stream:
        if begin > 0:
            stream.seek(begin - 1)
            stream.readline()  # the line that is under way belongs to the slice before
        yield from reader(file, column, lines_until(stream, end))


def lines_until(stream: BinaryIO, end: int) -> Lines:
    at = stream.tell()
    while at < end and (line := stream.readline()):
        yield at, line
        at += len(line)


def read_compressed(file: Path, reader: "Reader", column: str, share: float) -> Iterator[str]:
    """Read a compressed file from the given share of its bytes on, then what comes before."""
    decompress = DECOMPRESSORS[file.suffix]
    with reading(file):
        size = file.stat().st_size
        skipped = 0
        with file.open("rb") as raw:
            for text in reader(file, column, counted(decompress(raw))):
                if raw.tell() < share * size:
                    skipped += 1
                else:
                    yield text
        with file.open("rb") as raw:
            yield from itertools.islice(reader(file, column, counted(decompress(raw))), skipped)


def counted(stream: Iterable[bytes]) -> Lines:
    at = 0
    for line in stream:
        yield at, line
        at += len(line)


class ZstandardFile(io.RawIOBase):
    """A zstandard stream that ends with an error when the file ends within a frame, which zstandard's own does not."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.frame = zstandard.ZstdDecompressor().decompressobj()
        self.compressed = self.text = b""
        self.inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.text:
            self.compressed = self.compressed or self.raw.read(1 << 14)
            if not self.compressed:
                if self.inside:
                    raise EOFError("the file ends before its last frame does")
                return 0
            self.text = self.frame.decompress(self.compressed)
            self.inside, self.compressed = not self.frame.eof, self.frame.unused_data
            if self.frame.eof:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
        taken, self.text = self.text[: len(buffer)], self.text[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)


DECOMPRESSORS: dict[str, Callable[[BinaryIO], Iterable[bytes]]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda raw: io.BufferedReader(ZstandardFile(raw), 1 << 17),
}

Reader = Callable[[Path, str, Lines], Iterator[str]]


def text_documents(file: Path, column: str, lines: Lines) -> Iterator[str]:
    """Documents separated by blank lines, the layout of BERT's own corpus files; one of SLICE bytes is cut there."""
    document: list[str] = []
    size = 0
    for at, line in lines:
        text = decoded(file, at, line)
        if text.strip() and size < SLICE:
            document.append(text)
            size += len(line)
        elif document:
            yield "".join(document)
            document, size = [text], len(line)
    if document:
        yield "".join(document)


def json_documents(file: Path, column: str, lines: Lines) -> Iterator[str]:
    for at, line in lines:
        text = decoded(file, at, line)
        if not text.strip():
            continue
        where = f"The line at byte {at} of {file}"
        try:
            row = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}. Each line has to hold one JSON object. Mend it.") from error
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object but {type(row).__name__}. Write {{{column!r}: ...}} lines.")
        yield text_of(row, column, where)


def decoded(file: Path, at: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if at == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8: byte {at + error.start} of its text is 0x{line[error.start]:02x}. Reading on would "
            f"train on garbage. Convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
        ) from error


READERS: dict[str, Reader] = {
    ".txt": text_documents,
    ".jsonl": json_documents,
    ".ndjson": json_documents,
    ".json": json_documents,
}


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a row; an empty one where it is null."""
    if column not in row:
        raise UserError(f"{where} {no_column(column, row)}")
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where} {no_text(column, type(text).__name__)}")
    return text


def no_column(column: str, columns: Iterable[str]) -> str:
    return (
        f"has no column {column!r}; it has {', '.join(columns) or 'none'}. Name the one with the text: `column: NAME`."
    )


def no_text(column: str, kind: str) -> str:
    return f"holds {kind} in the column {column!r}, not text. Name the column that holds the text: `column: NAME`."


def parquet_pieces(file: Path, column: str) -> list[Piece]:
    with reading(file):
        metadata = pq.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
    if column not in schema.names:
        raise UserError(f"{file} {no_column(column, schema.names)}")
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"{file} {no_text(column, str(kind))}")
    return [partial(read_row_group, file, column, group) for group in range(metadata.num_row_groups)]


def read_row_group(file: Path, column: str, group: int, share: float) -> Iterator[str]:
    with reading(file), pq.ParquetFile(file) as table:
        texts = table.read_row_group(group, columns=[column])[column]
        first = int(share * len(texts))
        for text in itertools.chain(texts.slice(first), texts.slice(0, first)):
            yield text.as_py() or ""


# ---------------------------------------------------------------------------------------------------------- the Hub


class HubStream:
    """A data set on the Hub, streamed; Parquet files are cut into their row groups when their turn comes."""

    def __init__(self, source: Source, shuffle_buffer: int) -> None:
        self.source = source
        self.shuffle_buffer = shuffle_buffer
        with reaching_the_hub(source):
            from datasets import load_dataset  # a second to import; runs without the Hub need not wait for it

            self.rows = load_dataset(
                cast(str, source.hub),
                source.config,
                split=source.split,
                revision=source.revision,
                streaming=True,
                token=True if source.private else None,
            )
            columns = self.rows.column_names
        if columns is not None and source.column not in columns:
            raise UserError(f"{source.describe()} {no_column(source.column, columns)}")
        if columns is not None:
            self.rows = self.rows.select_columns([source.column])  # pictures beside the text need not be decoded

    def one_pass(self, order: random.Random | None) -> Iterator[str]:
        if order is None:
            return self.texts(self.rows)
        shards = order.sample(range(self.rows.num_shards), self.rows.num_shards)
        pieces = [partial(self.shard, index, order) for index in shards]
        return shuffled(side_by_side(pieces, order), self.shuffle_buffer, order)

    def shard(self, index: int, order: random.Random, share: float) -> Iterator[str]:
        """Read one file: its row groups in any order, or, where it cannot be cut, rotated like any other piece."""
        with reaching_the_hub(self.source):
            whole = self.rows.shard(self.rows.num_shards, index)
            cut = whole.reshard()  # reads the footer of this one file, which has to be read anyway
        if cut.num_shards > 1:
            for group in order.sample(range(cut.num_shards), cut.num_shards):
                yield from self.texts(cut.shard(cut.num_shards, group))
        else:
            skipped = int(share * SKIPPED_ROWS)
            yield from itertools.islice(self.texts(whole), skipped, None)
            yield from itertools.islice(self.texts(whole), skipped)

    def texts(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
        with reaching_the_hub(self.source):
            for row in rows:
                yield text_of(row, self.source.column, f"A row of {self.source.describe()}")


@contextlib.contextmanager
def reaching_the_hub(source: Source) -> Iterator[None]:
    """Turn what the Hub's clients raise into what a person can do about it."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import httpx

    damage = (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
    try:
        yield
    except (OSError, httpx.HTTPError, ValueError, RuntimeError, DatasetsError, *damage) as error:
        what = textwrap.shorten(str(error) or type(error).__name__, 600).rstrip(".")
        raise UserError(f"Cannot read {source.describe()}: {what}. {hub_advice(error)}") from error


def hub_advice(error: Exception) -> str:
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import LocalTokenNotFoundError, RevisionNotFoundError

    if isinstance(error, LocalTokenNotFoundError):
        return "The source is `private: true`, and nobody has logged in on this machine. Type: hf auth login"
    if isinstance(error, DatasetNotFoundError | RevisionNotFoundError):
        return (
            "A name or `revision` is wrong, or the data set is private or gated. Look it up on "
            "https://huggingface.co/datasets; for a private or gated one, type `hf auth login` and add `private: true`."
        )
    if isinstance(error, DataFilesNotFoundError):
        return "It has no file that can be streamed (Parquet, JSON lines, CSV, text). Choose another data set."
    if isinstance(error, UnicodeDecodeError | EOFError | zlib.error | lzma.LZMAError | pa.ArrowException):
        return "One of its files is damaged or not UTF-8. Tell its owner, or name a good `revision`."
    if isinstance(error, ValueError | RuntimeError):
        return "Check `config` and `split` of the source against the data set's page on the Hub."
    return (
        "The Hub could not be reached, or broke off. Check the network with `curl -I https://huggingface.co` and start "
        "again; without network, use {embedded: true} or {files: PATTERN}."
    )
