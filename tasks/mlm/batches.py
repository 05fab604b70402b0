"""An endless stream of batches that keeps ahead of the device, fills them with real tokens, and knows where it is.

Documents are tokenized once, some hundreds at a time. Their instances are sorted by length and cut into batches of
about the same number of positions, so that 97 % and more of these are real tokens; the batches come in a random order.
(Rows of one instance each need no mask inside, and every one begins with the [CLS] that sentence order is judged by.)
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch

from collab.errors import UserError
from tasks.mlm.encoder import Encoder
from tasks.mlm.instances import SHORTEST, Instances, Pool, make_instances
from tasks.mlm.masking import collate, width_of
from tasks.mlm.windows import seeded

Batch = dict[str, torch.Tensor]
State = dict[str, Any]

FIRST_BATCHES, MOST_BATCHES = 4, 128
"""So many batches are made of the documents of one pool: few at first, as somebody waits; more sort better."""
AT_ONCE, CHARACTERS_AT_ONCE = 1024, 250_000  # documents that are tokenized in one call
AHEAD_OF_NEED = 1.25
GIVE_UP = 20_000  # documents without a single token
MOST_DOCUMENTS = 1_000_000  # of a pool

logger = logging.getLogger(__name__)


class Texts(Protocol):
    """Documents without end, that can be taken up again where they were left."""

    def __next__(self) -> str: ...

    def __iter__(self) -> Iterator[str]: ...

    def state_dict(self) -> State:
        """Where the next document stands. JSON."""

    def close(self) -> None:
        """End; also somebody else's waiting for the next document."""


@dataclass(frozen=True)
class Shape:
    """What batches look like now; it may change at any time.

    :param positions: rows times columns of a batch at most, if it has more than one row
    :param seq_length: tokens in the longest instance
    """

    positions: int
    seq_length: int


class BatchStream:
    """Batches, one after the other, deterministic given the texts, the seed, and the shapes asked for.

    :param open_texts: the documents, from the beginning or from a state of theirs
    :param clean: what documents go through first
    :param shape: the shape of the next batch; asked for each of them
    :param parted: whether instances are pairs of segments (see `make_instances`)
    :param seed: of everything that is drawn, with the number of the pool or of the batch
    :param state: of an earlier stream, to go on where it was: no document is read a second time and none left out. It
      reads the documents of the pool that was under way again, a second's work
    """

    def __init__(
        self,
        open_texts: Callable[[State | None], Texts],
        encoder: Encoder,
        *,
        clean: Callable[[str], str] = str,
        shape: Callable[[], Shape],
        mask_probability: float,
        parted: bool = True,
        seed: str,
        state: State | None = None,
    ) -> None:
        self._parted = parted
        self._encoder, self._shape, self._mask_probability, self._seed = encoder, shape, mask_probability, seed
        self._state: State = {"texts": None, "documents": 0, "pools": 0, "batches": 0, "taken": []}
        if state is not None and not _is_state(state):
            logger.warning("The saved place in the data cannot be used: reading begins anew.")
        elif state is not None:
            self._state = dict(state)
        self._clean = clean
        self._coming = _Reading(open_texts(self._state["texts"]), clean, encoder)
        self._pool: Pool  # from the first batch on
        self._plan: list[Instances] = []
        self._planned, self._planned_for = 0, Shape(0, 0)
        if self._state["pools"]:
            self._return()

    def state_dict(self) -> State:
        """Where the next batch stands. JSON."""
        return self._state

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> Batch:
        shape = self._shape()
        if not self._plan:
            self._take_pool(shape)
        elif shape != self._planned_for:
            self._make_plan(shape, unused(self._pool, self._plan))
        instances, number = self._plan.pop(), self._state["batches"]
        self._note(
            batches=number + 1, taken=[*self._state["taken"][:-1], [*astuple(shape), self._planned - len(self._plan)]]
        )
        # For each batch somewhat more than it takes: nobody waits when the pool is empty.
        self._coming.read(int(self._wanted(shape) * min(1.0, AHEAD_OF_NEED * (1 - len(self._plan) / self._planned))))
        return collate(
            self._pool,
            instances,
            self._encoder,
            mask_probability=self._mask_probability,
            rng=self._rng("mask", number),
        )

    def close(self) -> None:
        """Close the texts."""
        self._coming.texts.close()

    def _wanted(self, shape: Shape) -> int:
        return shape.positions * min(MOST_BATCHES, FIRST_BATCHES << min(self._state["pools"], 20))

    def _take_pool(self, shape: Shape) -> None:
        read = self._coming
        read.read(self._wanted(shape))
        self._adopt(read)
        self._note(texts=read.began, documents=read.documents, pools=self._state["pools"] + 1, taken=[])
        self._make_plan(shape, self._pool.ranges())

    def _adopt(self, read: "_Reading") -> None:
        self._pool, self._coming = joined(read.pools), _Reading(read.texts, self._clean, self._encoder)

    def _return(self) -> None:
        """Read the pool that was under way again, and plan it as it was planned."""
        taken = self._state["taken"]
        self._coming.read_documents(self._state["documents"])
        self._adopt(self._coming)
        self._note(taken=[])
        ranges = self._pool.ranges()
        for positions, seq_length, batches in taken:
            self._make_plan(Shape(positions, seq_length), ranges)
            del self._plan[len(self._plan) - batches :]
            self._note(taken=[*self._state["taken"][:-1], [positions, seq_length, batches]])
            ranges = unused(self._pool, self._plan)

    def _make_plan(self, shape: Shape, ranges: Sequence[tuple[int, int]]) -> None:
        """Cut what is left of the pool into batches of this shape."""
        rng = self._rng("plan", self._state["pools"], len(self._state["taken"]))
        instances = make_instances(self._pool, ranges, shape.seq_length, rng, parted=self._parted)
        self._plan = plan(instances, shape.positions, rng)
        self._planned, self._planned_for = len(self._plan), shape
        self._note(taken=[*self._state["taken"], [*astuple(shape), 0]])

    def _note(self, **changed: Any) -> None:
        self._state = self._state | changed

    def _rng(self, *what: object) -> np.random.Generator:
        return seeded(f"{self._seed} {what}")


def _is_state(state: State) -> bool:
    """Whether this may be a `BatchStream.state_dict`; a checkpoint from anywhere can hold anything."""
    counts = [state.get(key) for key in ("documents", "pools", "batches")]
    shapes = state.get("taken")
    return (
        all(isinstance(count, int) and count >= 0 for count in counts)
        and state["documents"] <= MOST_DOCUMENTS
        and isinstance(state.get("texts"), dict if state["pools"] else type(None))
        and isinstance(shapes, list)
        and all(
            isinstance(shape, list)
            and len(shape) == 3
            and all(isinstance(number, int) for number in shape)
            and shape[0] >= 1
            and shape[1] >= SHORTEST
            and shape[2] >= 0
            for shape in shapes
        )
    )


class _Reading:
    """Documents on their way into a pool, tokenized."""

    def __init__(self, texts: Texts, clean: Callable[[str], str], encoder: Encoder) -> None:
        self.texts, self._clean, self._encoder = texts, clean, encoder
        self.began = texts.state_dict()
        self.documents = self.tokens = 0
        self.pools: list[Pool] = []

    def read(self, tokens: int) -> None:
        """Go on until so many tokens are there."""
        while self.tokens < tokens:
            if not self.tokens and self.documents >= GIVE_UP:
                raise UserError(
                    f"The tokenizer makes no token of {self.documents:,} documents. Look at the text with: "
                    f"python scripts/inspect_data.py --config YOUR.yaml"
                )
            self._tokenize(self._some(AT_ONCE))

    def read_documents(self, number: int) -> None:
        """Go on until so many documents are there."""
        while self.documents < number:
            self._tokenize(self._some(number - self.documents))

    def _some(self, most: int) -> list[str]:
        documents: list[str] = []
        characters = 0
        for document in islice(self.texts, most):
            documents.append(document)
            characters += len(document)
            if characters >= CHARACTERS_AT_ONCE:
                break
        if not documents:
            raise StopIteration  # the texts were closed
        return documents

    def _tokenize(self, documents: list[str]) -> None:
        self.pools.append(Pool.of(map(self._clean, documents), self._encoder))
        self.documents += len(documents)
        self.tokens += len(self.pools[-1].ids)


def joined(pools: list[Pool]) -> Pool:
    """All documents of several pools in one."""
    tokens = np.cumsum([0, *(len(pool.ids) for pool in pools)])
    words = np.cumsum([0, *(len(pool.word_starts) for pool in pools)])
    return Pool(
        ids=np.concatenate([pool.ids for pool in pools]),
        word_of=np.concatenate(
            [np.where(pool.word_of < 0, -1, pool.word_of + before) for pool, before in zip(pools, words, strict=False)]
        ),
        **{
            name: np.concatenate([getattr(pool, name) + before for pool, before in zip(pools, tokens, strict=False)])
            for name in ("word_starts", "sentence_ends", "document_ends")
        },
    )


def plan(instances: Instances, positions: int, rng: np.random.Generator) -> list[Instances]:
    """Cut instances into batches of similar lengths, in a random order.

    :param positions: rows times columns of a batch at most, if it has more than one row
    """
    # The longest first: what is left for the last batch is short then.
    order = np.argsort(-(instances.lengths + rng.random(len(instances))))
    lengths = instances.lengths[order].tolist()
    batches, first = [], 0
    while first < len(order):
        rows = max(1, positions // width_of(lengths[first]))
        batches.append(instances[order[first : first + rows]])
        first += rows
    return [batches[index] for index in rng.permutation(len(batches))]


def unused(pool: Pool, batches: Iterable[Instances]) -> list[tuple[int, int]]:
    """The ranges of the pool's tokens that instances in these batches hold; neighbours in a document become one."""
    ranges = sorted(pair for batch in batches for pair in zip(batch.start.tolist(), batch.stop.tolist(), strict=True))
    ends = set(pool.document_ends.tolist())
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start and start not in ends:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged
