"""A data set on the Hugging Face Hub, streamed by `datasets` as Arrow batches."""

import contextlib
import lzma
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa

from tasks.mlm.windows import (
    DAMAGED,
    Damaged,
    Fault,
    Piece,
    Unavailable,
    Window,
    is_text,
    no_column,
    no_text,
    seeded,
    texts_of_column,
)

if TYPE_CHECKING:
    from tasks.mlm.sources import Source

ROWS = 1000  # of a window at most
SKIPPED_ROWS = 20_000  # of a file that cannot be cut, a peer passes over at most so many: they are downloaded
RANK = 20  # bits below which a window's number counts the batches of one row group


def shards_of_dataset(source: "Source") -> tuple[list[Piece], str]:
    """Open a data set on the Hub.

    :returns: one piece for each of its files, and what has to be equal for a position in it to have a meaning
    :raises UserError: when there is no such data set, configuration, split, revision or column, or no network
    """
    with reaching_the_hub(source):
        from datasets import config, load_dataset  # a second to import; runs without the Hub need not wait for it

        # Their 20 tries of half a minute each would hide an outage for ten minutes; the stream tries again itself.
        config.STREAMING_OPEN_MAX_RETRIES = config.STREAMING_READ_MAX_RETRIES = 1
        rows = load_dataset(
            cast(str, source.hub),
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=True,
            token=True if source.private else None,
        )
        columns = rows.column_names
    if columns is not None:
        if source.column not in columns:
            raise Damaged(f"{source.describe()} {no_column(source.column, columns)}")
        rows = rows.select_columns([source.column])  # pictures beside the text need not be decoded
    rows = rows.with_format("arrow")
    split = (rows.info.splits or {}).get(source.split)
    pieces: list[Piece] = [Shard(source, rows, index) for index in range(rows.num_shards)]
    return pieces, f"{source.revision} {source.column} {len(pieces)} files, {split and split.num_examples} rows"


@dataclass(slots=True)
class Shard:
    """One file of a data set: its row groups in any order, or, where it cannot be cut, its rows from the first on."""

    source: "Source"
    rows: Any  # IterableDataset
    index: int
    length: int = 0  # windows in it, as far as they have been seen

    @property
    def size(self) -> int:
        return 0

    @property
    def sequential(self) -> bool:
        return True

    def windows(self, low: float, high: float, start: int, order: str | None) -> Iterator[Window]:
        with reaching_the_hub(self.source):
            whole = self.rows.shard(self.rows.num_shards, self.index)
            groups = whole.reshard()  # reads the footer of this one file, which has to be read anyway
            count = groups.num_shards
            if count > 1:
                ranks = seeded(order).permutation(count).tolist() if order else list(range(count))
                for rank in range(max(int(low * count), start >> RANK), int(high * count)):
                    yield from self.row_group(groups.shard(count, ranks[rank]), ranks[rank], rank << RANK, start)
            elif high < 1.0:
                for number, table in enumerate(islice(whole.iter(batch_size=ROWS), self.middle(whole, high))):
                    if number >= start:
                        yield self.window(number, table, "row {}", ROWS * number)
            else:
                begin = int(low * SKIPPED_ROWS) // ROWS
                yield from self.rows_from(whole, max(begin, start))
                if self.length <= begin:
                    yield from self.rows_from(whole, max(self.middle(whole, low), start))

    def row_group(self, rows: Any, index: int, base: int, start: int) -> Iterator[Window]:
        """Read one row group, with windows counted from `base`; when it is damaged, the others need not be."""
        try:
            with reaching_the_hub(self.source):
                for number, table in enumerate(rows.iter(batch_size=ROWS)):
                    if base + number >= start:
                        yield self.window(base + number, table, f"row {{}} of row group {index}", ROWS * number)
        except Damaged as error:
            yield Window(base + (1 << RANK) - 1, [], [Fault(DAMAGED, str(error))])

    def rows_from(self, whole: Any, begin: int) -> Iterator[Window]:
        for number, table in enumerate(whole.iter(batch_size=ROWS)):
            self.length = max(self.length, number + 1)
            if number >= begin:
                yield self.window(number, table, "row {}", ROWS * number)

    def middle(self, whole: Any, share: float) -> int:
        """The window from which on a peer reads first: at most SKIPPED_ROWS behind the beginning."""
        wanted = int(share * SKIPPED_ROWS) // ROWS
        if self.length <= wanted:
            self.length = sum(1 for _ in islice(whole.iter(batch_size=ROWS), wanted + 1))
        return wanted % max(min(self.length, wanted + 1), 1)

    def window(self, number: int, table: pa.Table, where: str, first: int) -> Window:
        column, name = self.source.column, self.source.describe()
        if column not in table.column_names:
            raise Damaged(f"A row of {name} {no_column(column, table.column_names)}")
        kind = table.schema.field(column).type
        if not is_text(kind) and not pa.types.is_null(kind):
            raise Damaged(f"A row of {name} {no_text(column, str(kind))}")
        window = Window(number, [])
        texts_of_column(table[column], column, f"In file {self.index} of {name}, {where}", first, window)
        return window


@contextlib.contextmanager
def reaching_the_hub(source: "Source") -> Iterator[None]:
    """Turn what the Hub's clients raise into what a person can do about it."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.utils import httpx

    damage = (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException)
    try:
        yield
    except (OSError, httpx.HTTPError, ValueError, RuntimeError, DatasetsError, *damage) as error:
        what = textwrap.shorten(str(error) or type(error).__name__, 600).rstrip(".")
        message = f"Cannot read {source.describe()}: {what}. {hub_advice(error)}"
        content = isinstance(error, (ValueError, RuntimeError, DatasetsError, *damage)) or arrow_damage(error)
        raise (Damaged if content else Unavailable)(message) from error


def arrow_damage(error: Exception) -> bool:
    """Whether pyarrow means the file's content by an OSError, rather than the network or the system."""
    return type(error) is OSError and error.errno is None


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
    damage = UnicodeDecodeError | EOFError | zlib.error | lzma.LZMAError | pa.ArrowException
    if isinstance(error, damage) or arrow_damage(error):
        return "One of its files is damaged or not UTF-8. Tell its owner, or name a good `revision`."
    if isinstance(error, ValueError | RuntimeError):
        return "Check `config` and `split` of the source against the data set's page on the Hub."
    return (
        "The Hub could not be reached, or broke off. Check the network with `curl -I https://huggingface.co` and start "
        "again; without network, use {embedded: true} or {files: PATTERN}."
    )
