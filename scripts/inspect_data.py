"""Look at a run's data before the run is started: its batches as a person reads them, and what they consist of.

    python scripts/inspect_data.py --config configs/demo.yaml
    python scripts/inspect_data.py --config configs/demo.yaml --overlap

It takes the run's options, makes the tokenizer and the batches as the run does, and prints some samples of the first
batches and statistics of many. With --overlap it measures instead how many documents two peers have in common.
"""

import contextlib
import itertools
import logging
import math
import re
import shutil
import sys
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from transformers import PreTrainedTokenizerBase  # noqa: E402

from arguments import AGREED, agreed_settings, option, parse, pick, require  # noqa: E402
from collab.console import Console, bar, duration  # noqa: E402
from collab.errors import UserError  # noqa: E402
from collab.processes import run_program  # noqa: E402
from tasks import Batch, find_task  # noqa: E402
from tasks.mlm.encoder import Encoder  # noqa: E402
from tasks.mlm.instances import IN_ORDER, NO_ORDER, SWAPPED  # noqa: E402
from tasks.mlm.sources import Documents, Overlap, Source, overlap  # noqa: E402
from tasks.mlm.task import MaskedLM  # noqa: E402

MASK = "▮"
ORDERS = {IN_ORDER: "in order", SWAPPED: "swapped", NO_ORDER: "one segment"}
COLOURS = {"masked": "33", "replaced": "35", "kept": "4", "unknown": "31"}  # of ANSI terminals; 4 underlines
WIDTH = 100  # columns where there is no terminal
MICRO_BATCH = 16
BINS = 8
SETTLED = 500  # batches; text is read ahead in growing portions, until half of these are made
SIGMAS = 3.0


@dataclass
class InspectArguments:
    """What is looked at."""

    _argument_group_name = "what is looked at"

    batches: int = option(1, "Batches of which samples are shown.")
    samples: int = option(3, "Samples shown of each of them.")
    statistics: int = option(
        SETTLED, f"Batches that the statistics are made of; {SETTLED} or more for the speed, that of the second half."
    )
    step: int = option(0, "Global step of which the batches are, for runs with seq_length_warmup_steps.")
    micro_batch_size: int = option(
        0, f"Samples of seq_length tokens in a batch, or more shorter ones. 0: {MICRO_BATCH}."
    )
    cache_dir: str = option("~/.cache/samiti", "Folder for prepared text and tokenizers, the same as the run's.")
    overlap: bool = option(False, "Measure how many documents peers have in common; all text is read once for it.")
    peers: int = option(4, "Peers that are compared with --overlap; more make the figure more exact.")
    documents: int = option(2000, "Documents that each of them begins with, from all sources together.")

    def __post_init__(self) -> None:
        self.cache_dir = str(Path(self.cache_dir).expanduser())
        for key, least in {
            "batches": 0, "samples": 1, "statistics": 1, "step": 0, "micro_batch_size": 0, "peers": 2, "documents": 1,
        }.items():  # fmt: skip
            require(getattr(self, key) >= least, key, getattr(self, key), f"at least {least}")


def main(argv: Sequence[str] | None = None) -> None:
    given = parse(__doc__ or "", (InspectArguments, *AGREED), argv)
    mine = pick(InspectArguments, given)
    settings = agreed_settings({"run_id": "inspection"} | given)
    if not issubclass(find_task(settings["task"]), MaskedLM):
        raise UserError(
            f"The batches of the task {settings['task']!r} are no text that could be shown: only mlm's are. Set `task` "
            f"to mlm, or leave it out."
        )
    console = Console()
    for name in ("tasks", "tokenizer"):
        logging.getLogger(name).setLevel(logging.INFO)
        logging.getLogger(name).addHandler(Notes(console))
    if mine.overlap:
        compare_peers(console, settings, mine)
    else:
        look_at_batches(console, settings, mine)


class Notes(logging.Handler):
    """Prints what a module logs, each message once: the text is read several times, and what is wrong comes again."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console, self.printed = console, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self.printed:
            self.printed.add(message)
            self.console.line(message)


# ---- batches -----------------------------------------------------------------------------------------------------


class TextMeter:
    """The documents of a peer, and how much text has gone by."""

    def __init__(self, documents: Documents) -> None:
        self.documents = documents
        self.bytes = 0

    def __iter__(self) -> "TextMeter":
        return self

    def __next__(self) -> str:
        text = next(self.documents)
        self.bytes += len(text.encode("utf-8", "surrogatepass"))
        return text

    def state_dict(self) -> dict[str, Any]:
        return self.documents.state_dict()

    def close(self) -> None:
        self.documents.close()


class ObservedLM(MaskedLM):
    """The run's task, with a meter between its text and its batches."""

    def texts(self, place: str, state: dict[str, Any] | None = None) -> TextMeter:
        self.meter = TextMeter(cast(Documents, super().texts(place, state)))
        return self.meter


def look_at_batches(console: Console, settings: Mapping[str, Any], mine: InspectArguments) -> None:
    cache_dir, micro_batch = Path(mine.cache_dir), mine.micro_batch_size or MICRO_BATCH
    console.live("Preparing the tokenizer and the model as at the start of the run ...")
    with tempfile.TemporaryDirectory(prefix="samiti-") as scratch:
        for name, content in ObservedLM.prepare(settings, cache_dir).items():
            Path(scratch, name).write_bytes(content)
        task = ObservedLM(settings, Path(scratch), cache_dir)
    reader, statistics, speed = Reader(task.tokenizer, task.encoder), Statistics(task.encoder), Speed()

    began, last = time.monotonic(), max(mine.batches, mine.statistics)
    stream = task.batches(lambda: micro_batch, "inspection", step=lambda: mine.step)
    with contextlib.closing(task.meter.documents):
        for number in range(1, last + 1):
            with speed.measured(task.meter):
                batch = next(stream)
            if number == 1:
                start = time.monotonic() - began
            if number <= mine.batches:
                show_batch(console, reader, batch, number, mine.samples)
            if number <= mine.statistics:
                statistics.add(batch)
                speed.tokens = statistics.tokens
            if number == mine.statistics // 2:  # until now, more text was read ahead than batches were made of
                speed = Speed(tokens_before=statistics.tokens)
            left = (time.monotonic() - began) / number * (last - number)
            console.live(f"Batch {number} of {last}, {duration(left)} left")

    console.line(f"\nStatistics of {mine.statistics:,} batches")
    show_statistics(console, statistics, settings["seq_length"])
    show_sources(console, task.meter.documents.report())
    console.line(f"\nSpeed on this computer (first batch after {start:.1f} s)")
    if mine.statistics >= SETTLED:
        show_speed(console, speed)
    else:
        console.line(f"  It shows in {SETTLED} batches and more, but --statistics is {mine.statistics}.")


@dataclass(frozen=True)
class Piece:
    """A part of a segment, as it is shown.

    :param kind: plain; unknown; or what happened to a word that is to be restored: kept as it is, masked (some of its
        tokens may be kept), replaced (at least one of its tokens)
    :param spaced: white space stands before it
    :param breaks: a line may begin with it
    """

    text: str
    kind: str = "plain"
    spaced: bool = False
    breaks: bool = False


class Reader:
    """Turns samples back into text, in any script.

    What the model has to restore is shown as [what was written→what the model sees], word by word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: Encoder) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder
        tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(list(range(encoder.vocab_size)))]
        self.is_wordpiece = sum(token.startswith("##") for token in tokens) > 1
        self.spaced = np.array([token.startswith(("▁", "Ġ")) for token in tokens])
        if self.is_wordpiece:
            self.spaced = encoder.begins_word

    def segments(self, batch: Batch, row: int) -> list[list[Piece]]:
        """A, and B where there is one, of one sample of a batch."""
        seen, labels, types = (batch[name][row].numpy() for name in ("input_ids", "labels", "token_type_ids"))
        length = int(batch["attention_mask"][row].sum())
        parted = length - int(types[:length].sum())  # [CLS] A [SEP] have type 0; B [SEP], if it is there, have 1
        spans = [span for span in ((1, parted - 1), (parted, length - 1)) if span[0] < span[1]]
        return [self.pieces(seen[start:stop], labels[start:stop]) for start, stop in spans]

    def pieces(self, seen: np.ndarray, labels: np.ndarray) -> list[Piece]:
        """The parts of a segment.

        :param seen: int64 [tokens]
        :param labels: int64 [tokens], what they were; less than 0 for what is not to be restored
        """
        chosen = labels >= 0
        original = np.where(chosen, labels, seen)
        unknown = original == self.encoder.unk_id
        begins, spaced = self.encoder.begins_word[original], self.spaced[original]
        starts = begins | spaced | unknown
        starts[1:] |= (chosen[1:] != chosen[:-1]) | unknown[:-1]
        starts[:1] = True
        found = []
        for start, stop in itertools.pairwise([*np.flatnonzero(starts).tolist(), len(seen)]):
            text, kind = self.text(original[start:stop]), "plain"
            if unknown[start]:
                kind = "unknown"
            elif chosen[start]:
                text, kind = self.change(text, original[start:stop], seen[start:stop])
            found.append(Piece(text, kind, bool(spaced[start]), bool(begins[start] or spaced[start])))
        return found

    def change(self, text: str, original: np.ndarray, seen: np.ndarray) -> tuple[str, str]:
        """How a word that is to be restored is shown, and its kind (see `Piece`)."""
        parts = itertools.groupby(seen.tolist(), lambda token: token == self.encoder.mask_id)
        shown = "".join(MASK * len(list(ids)) if masked else self.text(list(ids)) for masked, ids in parts)
        is_mask, is_kept = seen == self.encoder.mask_id, seen == original
        kind = "kept" if is_kept.all() else "masked" if (is_mask | is_kept).all() else "replaced"
        return f"[{text or '▁'}→{shown or '▁'}]", kind

    def text(self, ids: Iterable[int]) -> str:
        text = str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)).strip()
        return printable(text.removeprefix("##") if self.is_wordpiece else text)


def printable(text: str) -> str:
    """Text from anywhere must not move the cursor or change the terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", text)


def show_batch(console: Console, reader: Reader, batch: Batch, number: int, samples: int) -> None:
    rows, width = batch["input_ids"].shape
    if number == 1:
        console.line(
            f"\nA word that the model has to restore is shown as [word→what the model sees]; {MASK} is one "
            f"{reader.tokenizer.mask_token}."
        )
    lengths = batch["attention_mask"].sum(1)
    console.line(f"\nBatch {number}: {rows} samples of {lengths.min()} to {lengths.max()} tokens, padded to {width}")
    for row in range(min(samples, rows)):
        order = ORDERS[int(batch["sentence_order_label"][row])]
        console.line(f"\n  Sample {row + 1}: {lengths[row]} tokens, {order}")
        for name, pieces in zip("AB", reader.segments(batch, row), strict=False):
            console.line(f"  {name}  {wrapped(pieces, line_width() - 5, colour=console.is_terminal)}")


def line_width() -> int:
    return max(40, shutil.get_terminal_size((WIDTH, 24)).columns) - 1


def wrapped(pieces: Iterable[Piece], width: int, *, colour: bool) -> str:
    """Pieces as lines of at most `width` columns if no word is wider; the further ones are indented by 5."""
    lines, column = [""], 0
    for word in words_of(pieces):
        spaced, size = word[0].spaced, sum(columns(piece.text) for piece in word)
        if column and column + spaced + size > width:
            lines.append("")
            column = 0
        if column and spaced:
            lines[-1] += " "
            column += 1
        for piece in word:
            marked = colour and piece.kind in COLOURS
            lines[-1] += f"\x1b[{COLOURS[piece.kind]}m{piece.text}\x1b[0m" if marked else piece.text
        column += size
    return ("\n" + " " * 5).join(lines)


def words_of(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Pieces that stay together on a line."""
    words: list[list[Piece]] = []
    for piece in pieces:
        if piece.breaks or not words:
            words.append([])
        words[-1].append(piece)
    return words


def columns(text: str) -> int:
    """How wide a terminal shows it: Chinese characters and emoji take two columns, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.category(char) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


# ---- statistics --------------------------------------------------------------------------------------------------


@dataclass
class Statistics:
    """What some batches consist of.

    :ivar positions: rows times columns
    :ivar real: positions that are no padding
    :ivar tokens: real ones that are not special either; `words`, `unknown` and `chosen` are of these
    :ivar chosen: tokens to restore; `masked` and `kept` are of these, the others were replaced
    """

    encoder: Encoder
    positions: int = 0
    real: int = 0
    tokens: int = 0
    words: int = 0
    unknown: int = 0
    chosen: int = 0
    masked: int = 0
    kept: int = 0
    orders: Counter[int] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)

    def add(self, batch: Batch) -> None:
        seen, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
        real, chosen = batch["attention_mask"].numpy() == 1, labels >= 0
        original = np.where(chosen, labels, seen)
        is_text = real & (original != self.encoder.cls_id) & (original != self.encoder.sep_id)
        begins = self.encoder.begins_word[original]
        begins[:, 1:] |= ~is_text[:, :-1]  # a segment may begin within a very long word
        self.positions += seen.size
        self.real += int(real.sum())
        self.tokens += int(is_text.sum())
        self.words += int((begins & is_text).sum())
        self.unknown += int((is_text & (original == self.encoder.unk_id)).sum())
        self.chosen += int(chosen.sum())
        self.masked += int((chosen & (seen == self.encoder.mask_id)).sum())
        self.kept += int((chosen & (seen == labels)).sum())
        self.orders.update(batch["sentence_order_label"].tolist())
        self.lengths.update(batch["attention_mask"].sum(1).tolist())

    @property
    def samples(self) -> int:
        return self.lengths.total()


def show_statistics(console: Console, found: Statistics, seq_length: int) -> None:
    orders = ", ".join(f"{name} {percent(found.orders[order], found.samples)}" for order, name in ORDERS.items())
    replaced = found.chosen - found.masked - found.kept
    for name, text in {
        "samples": f"{found.samples:,} ({orders})",
        "tokens": f"{found.tokens:,}, special ones and padding not counted",
        "padding": f"{percent(found.positions - found.real, found.positions)} of all positions",
        "tokens per word": f"{found.tokens / found.words:.2f}",
        "unknown tokens": percent(found.unknown, found.tokens, 3),
        "to restore": f"{percent(found.chosen, found.tokens)} of the tokens: {percent(found.masked, found.chosen)} "
        f"masked, {percent(replaced, found.chosen)} replaced, {percent(found.kept, found.chosen)} kept",
    }.items():
        console.line(f"  {name:<18}{text}")
    mean = sum(length * count for length, count in found.lengths.items()) / found.samples
    console.line(f"\nTokens in a sample: {min(found.lengths)} to {max(found.lengths)}, {mean:.0f} on average")
    for first, last, count in histogram(found.lengths, seq_length):
        share = count / found.samples
        console.line(f"  {f'{first} to {last}':<18}{bar(share, 40)} {share:6.1%}")


def histogram(lengths: Counter[int], seq_length: int) -> Iterator[tuple[int, int, int]]:
    """First length, last length and number of samples of each bin."""
    for index in range(BINS):
        first, last = seq_length * index // BINS + 1, seq_length * (index + 1) // BINS
        yield first, last, sum(count for length, count in lengths.items() if first <= length <= last)


def percent(part: int, whole: int, digits: int = 1) -> str:
    return f"{part / whole:.{digits}%}" if whole else "none"


def show_sources(console: Console, report: Sequence[Mapping[str, Any]]) -> None:
    console.line("\nDocuments read, also for the batches to come")
    for source in report:
        skipped = ", ".join(f"{count:,} because {reason}" for reason, count in source["skipped"].items()) or "none"
        console.line(f"  {source['source']}")
        console.line(f"    {source['documents']:,}, now in pass {source['passes'] + 1}; skipped: {skipped}")
        if source["left_out"]:
            console.line("    It cannot be read at present, and is left out.")


@dataclass
class Speed:
    """What it costs to make batches.

    :ivar bytes: of text that was read
    :ivar tokens: see `Statistics`
    """

    tokens_before: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @contextlib.contextmanager
    def measured(self, meter: TextMeter) -> Iterator[None]:
        size, wall, cpu = meter.bytes, time.monotonic(), time.process_time()
        yield
        self.bytes += meter.bytes - size
        self.seconds += time.monotonic() - wall
        self.cpu_seconds += time.process_time() - cpu


def show_speed(console: Console, speed: Speed) -> None:
    console.line(f"  {'':<18}{'MB of text':>12}{'tokens':>14}")
    for name, seconds in (("per CPU second", speed.cpu_seconds), ("per second", speed.seconds)):
        tokens = (speed.tokens - speed.tokens_before) / seconds
        console.line(f"  {name:<18}{speed.bytes / 1e6 / seconds:>12.2f}{tokens:>14,.0f}")


# ---- overlap -----------------------------------------------------------------------------------------------------


def compare_peers(console: Console, settings: Mapping[str, Any], mine: InspectArguments) -> None:
    """Source by source: in a mixture, what is chance follows from how much each of them has to give.

    The status of the program is 1 if peers have more in common than by chance.
    """
    sources = [Source.from_mapping(mapping) for mapping in settings["sources"]]
    total_weight = sum(source.weight for source in sources)
    console.line(
        f"\nWhat two peers have in common of the documents that they begin with, the mean over {mine.peers} peers\n\n"
        f"  in common  by chance  documents      of all  source"
    )
    too_much = False
    for number, source in enumerate(sources, 1):
        console.live(f"Reading source {number} of {len(sources)} ({source.describe()}) to its end ...")
        found = overlap(
            [source],
            seed=settings["seed"],
            cache_dir=Path(mine.cache_dir),
            shuffle_buffer=settings["shuffle_buffer"],
            first=max(1, round(mine.documents * source.weight / total_weight)),
            peers=mine.peers,
        )
        verdict = judge(found, mine.peers)
        too_much |= verdict == "MORE than by chance"
        shares = f"{found.shared:>11.1%}{found.chance:>11.1%}"
        console.line(f"{shares}{found.first:>11,}{found.total:>12,}  {source.describe()}: {verdict}")
    if too_much:
        sys.exit(1)


def judge(found: Overlap, peers: int) -> str:
    if found.first >= found.total:
        return "too small: each peer reads all of it"
    # Of documents drawn at random the number in common is hypergeometric.
    variance = found.chance * (1 - found.chance) ** 2 / found.first * found.total / max(found.total - 1, 1)
    noise = max(found.error, math.sqrt(variance / math.comb(peers, 2)))
    return "no more than by chance" if found.shared <= found.chance + SIGMAS * noise else "MORE than by chance"


if __name__ == "__main__":
    run_program(main)
