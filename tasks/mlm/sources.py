"""Where the text comes from: the embedded corpus, the Hub and local files, and their endless weighted mixture.

Every source is cut into pieces (local_files.py, hub.py), which a stream reads pass after pass (stream.py); the mixture
draws each document from one of the streams. Its position is a few numbers for each source, so that a peer goes on
exactly where it was.

Two peers should not train on the same documents. A seed for each peer does not give that with streams: read from their
starts through a shuffle buffer, two peers share up to 84 % of their first samples (datasets 5, 4 to 8 shards). Here
each peer reads the pieces in its own order, and begins in the middle of the pieces that cannot be cut.
"""

import difflib
import hashlib
import itertools
import logging
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from collab.errors import UserError
from tasks.mlm.corpus import embedded_documents
from tasks.mlm.hub import shards_of_dataset
from tasks.mlm.local_files import DECOMPRESSORS, EXPANSION, SLICE, matching_files, pieces_of_files
from tasks.mlm.stream import TRIES, Collection, Stream
from tasks.mlm.windows import Bundle, Draws, Part, Window, bundled

IN_MEMORY = 64 << 20  # bytes of text up to which local files are read into memory and permuted as a whole
VERSION = 1  # of a state; raise it when the same numbers mean another place

logger = logging.getLogger(__name__)

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


def documents(
    sources: Sequence[Source],
    *,
    seed: int,
    place: str,
    part: Part,
    cache_dir: Path,
    shuffle_buffer: int,
    endless: bool = True,
    state: Mapping[str, Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Any] | None = None,
) -> "Documents":
    """Stream the documents of a weighted mixture; every source is opened, and checked, before this returns.

    The training part is endless: a source that runs out starts over in another order, so that the mixture keeps its
    weights. The held-out part (about 2 % of each source, see `is_heldout`) is finite and the same for everyone.

    :param seed: of the run; with the same seed and place, the same documents come in the same order
    :param place: this peer's own place, such as its peer id: it decides which documents come first, and their order
    :param part: "train" or "heldout"; no document is in both
    :param cache_dir: folder for the embedded corpus
    :param shuffle_buffer: documents of each source held in memory to shuffle it (large files, the Hub). Raise it when
        the neighbours in a corpus resemble each other. It is filled while documents are already given
    :param endless: False for a single pass over the training part, as for training a tokenizer; a source that runs
        out then leaves the mixture to the others
    :param state: what `Documents.state_dict` gave, to go on from there. A source that it does not fit, because its
        files or the entries in `sources` have changed, starts at a new place, and a warning says so
    :param clock: seconds, increasing
    :param sleep: waits so many seconds; the default one ends early when the documents are closed
    :raises UserError: now or while reading, for everything that a person can mend: no network, no such data set,
        column or file, damaged or empty files. Once documents were read, none of this ends the stream: see `Documents`
    """
    if not sources:
        raise UserError("`sources` is empty: there is no text to train on. Add an entry, for example {embedded: true}.")
    train = part == "train"
    # The held-out part is one plain pass, and the same for everyone.
    name = f"{seed} {place}" if train else f"{seed}"
    collections = [open_source(source, cache_dir) for source in sources]

    def begin() -> Documents:
        streams = [
            Stream(
                collection,
                name=f"{name} {index}",
                part=part,
                buffer=shuffle_buffer if train else 0,
                endless=endless and train,
                clock=clock,
            )
            for index, collection in enumerate(collections)
        ]
        weights = [source.weight for source in sources]
        return Documents(streams, weights, f"{name} mixture", clock=clock, sleep=sleep)

    found = begin()
    if state is None:
        return found
    try:
        found.restore(state)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        logger.warning("The saved position in the data cannot be used (%r): reading begins anew.", error)
        return begin()
    return found


class Documents(Iterator[str]):
    """Documents drawn from several streams by weight; made by `documents`.

    A source that cannot be read does not hold up the others: it is tried again after pauses that double, and left out
    meanwhile, the others keeping their proportion. When none can be read, `next` waits. Text that is damaged, empty or
    no text is skipped and counted. All of it is said once as a warning and stands in `report`.
    """

    def __init__(
        self,
        streams: list[Stream],
        weights: list[float],
        name: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] | None = None,
    ) -> None:
        self.streams = streams
        self.weights = weights
        self.name = name
        self._draws = Draws(name)
        self._closed = threading.Event()
        self._clock, self._sleep = clock, sleep or self._closed.wait
        self._started = False
        self._left = self._candidates()
        weakref.finalize(self, release, streams, timeout=1.0)  # also when Python ends before anybody closed this

    def __next__(self) -> str:
        if not self._started:
            self._start()
        waited, candidates = 0.0, self._left
        while self._left and not self._closed.is_set():
            index = self._choose(candidates)
            text = self.streams[index].take()
            if text is not None:
                return text
            candidates = [other for other in candidates if other != index]
            if self.streams[index].finished:
                self._left = self._candidates()
            if self._left and not candidates:
                waited = self._wait(waited)
                candidates = self._left
        raise StopIteration

    def _start(self) -> None:
        """Read a little of every source, so that what is wrong with one is said now and not after hours."""
        for stream in self.streams:
            stream.ask()
        for stream in self.streams:
            if not stream.windows:
                stream.replenish()
        self._started = True
        self._left = self._candidates()

    def _candidates(self) -> list[int]:
        return [index for index, stream in enumerate(self.streams) if not stream.finished]

    def _choose(self, candidates: list[int]) -> int:
        """Draw a stream by weight."""
        at = self._draws() * sum([self.weights[index] for index in candidates])
        for index in candidates:
            at -= self.weights[index]
            if at < 0.0:
                return index
        return candidates[-1]

    def _wait(self, waited: float) -> float:
        """Sleep until a source may be read again, and say so after 10 seconds, 20, 40 ...

        :returns: seconds waited since the last document
        :raises UserError: when nothing could be read from the beginning: that is for a person to mend
        """
        streams = [self.streams[index] for index in self._left]
        errors = [stream.error for stream in streams if stream.error]
        if not any(stream.good for stream in self.streams) and all(stream.failures >= TRIES for stream in streams):
            raise errors[0]
        pause = min(stream.due() for stream in streams)
        before = self._clock()
        self._sleep(max(pause, 0.01))
        after = waited + self._clock() - before
        if after >= 10.0 and (waited < 10.0 or int(after / 10).bit_length() > int(waited / 10).bit_length()):
            reason = errors[-1] if errors else "no answer yet."
            logger.warning("No text can be read for %.0f seconds now; training waits for it. %s", after, reason)
        return after

    def state_dict(self) -> dict[str, Any]:
        """Where reading has got to, as plain JSON of some kilobytes; `documents(..., state=...)` goes on from there.

        Ask for it in the thread that reads, between two documents.
        """
        return {
            "version": VERSION,
            "name": hashlib.blake2b(self.name.encode(), digest_size=8).hexdigest(),
            "drawn": self._draws.drawn,
            "sources": [stream.state_dict() for stream in self.streams],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; a source that it does not fit starts at a new place.

        :raises KeyError, TypeError, ValueError, IndexError, AttributeError: for a state that is none, or another's
        """
        if state["version"] != VERSION or state["name"] != self.state_dict()["name"]:
            raise ValueError("it is of another run, peer or version")
        self._draws = Draws(self.name, int(state["drawn"]))
        new = []
        for stream, stored in itertools.zip_longest(self.streams, state["sources"]):
            if stream is None or stored is None or stored["source"] != stream.collection.name:
                new.append(stream.collection.name if stream else stored["source"])
            elif stored["fingerprint"] != stream.collection.fingerprint:
                stream.start_after(stored)
                new.append(stream.collection.name)
            else:
                stream.restore(stored)
        if new:
            logger.warning(
                "The saved position in the data does not fit %s any more: there, reading starts at a new place.",
                ", ".join(new),
            )
        self._left = self._candidates()

    def report(self) -> list[dict[str, Any]]:
        """For each source: documents read, passes, what was skipped and why, whether it is left out at present."""
        return [stream.report() for stream in self.streams]

    def close(self) -> None:
        """End the iteration, also one that waits in another thread, and the threads that read."""
        self._closed.set()
        release(self.streams, timeout=5.0)


def release(streams: list[Stream], timeout: float) -> None:
    for stream in streams:
        stream.close(timeout)


@dataclass
class Texts:
    """Texts that are in memory already, as a piece."""

    texts: list[str]
    size = 0
    sequential = False

    def windows(self, low: float, high: float, start: int, order: str | None) -> Iterator[Window]:
        if start == 0:
            yield Window(0, self.texts)


def open_source(source: Source, cache_dir: Path) -> Collection:
    name = source.describe()
    if source.embedded:
        texts = embedded_documents(cache_dir)
        return Collection(name, [Texts(texts)], f"{len(texts)} documents, {sum(map(len, texts))} characters", keep=True)
    if source.hub:
        pieces, fingerprint = shards_of_dataset(source)
        return Collection(name, pieces, fingerprint, remote=True)
    files = matching_files(cast(str, source.files))
    pieces = pieces_of_files(files, source.column)
    sizes = [file.stat().st_size for file in files]
    listing = repr((SLICE, source.column, [file.name for file in files], sizes))
    fingerprint = hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()
    size = sum(
        size * (EXPANSION if file.suffix in DECOMPRESSORS or file.suffix == ".parquet" else 1)
        for file, size in zip(files, sizes, strict=True)
    )
    if size <= IN_MEMORY:
        return Collection(name, [Bundle(pieces)], fingerprint, keep=True)
    return Collection(name, bundled(pieces, SLICE), fingerprint)


@dataclass(frozen=True)
class Overlap:
    """How many documents two peers have in common.

    :param first: the documents of each peer that were compared
    :param total: documents there are
    :param shared: share of the first documents that two peers have in common, the mean over all pairs of peers
    :param error: standard error of `shared`
    :param chance: what peers that draw `first` of `total` documents at random share on average: first / total
    """

    first: int
    total: int
    shared: float
    error: float
    chance: float


def overlap(
    sources: Sequence[Source], *, seed: int, cache_dir: Path, shuffle_buffer: int, first: int = 2000, peers: int = 4
) -> Overlap:
    """Measure the share of the first documents that two peers have in common; all text is read once to count it.

    :param first: documents of each peer to compare
    :param peers: at least 2; more give a smaller error
    """

    def read(place: str, endless: bool) -> Documents:
        return documents(
            sources,
            seed=seed,
            place=place,
            part="train",
            cache_dir=cache_dir,
            shuffle_buffer=shuffle_buffer,
            endless=endless,
        )

    def identity(text: str) -> bytes:
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    total = len({identity(text) for text in read("count", False)})
    first = min(first, total)
    seen = [{identity(text) for text in itertools.islice(read(f"peer {peer}", True), first)} for peer in range(peers)]
    shares = [len(one & other) / first for one, other in itertools.combinations(seen, 2)]
    # The pairs are not independent; each peer counts once.
    error = statistics.pstdev(shares) / peers**0.5
    return Overlap(first, total, statistics.fmean(shares), error, first / total)
