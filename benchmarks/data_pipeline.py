"""From text to batches on one core: our pipeline beside raw tokenization, and beside the way of the recipes of 2021.

Everything is measured in turn on text of the same kind, English documentation, once whole and once as short documents.
"""

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.report import Report, run_benchmark
from tasks.loader import Loader
from tasks.mlm.batches import BatchStream, Shape
from tasks.mlm.cleaning import DEFAULT_RULES, make_cleaner
from tasks.mlm.corpus import embedded_documents
from tasks.mlm.encoder import open_encoder
from tasks.mlm.sentences import split_sentences
from tasks.mlm.sources import Source, documents
from tokenizer.train import train_tokenizer

VOCABULARY, SEQ_LENGTH, SAMPLES, MASK = 8192, 512, 16, 0.15
SHAPE = Shape(SAMPLES * SEQ_LENGTH, SEQ_LENGTH)
SHORT = 300  # characters
CHARACTERS = 24_000_000  # twice what is read
RAW_BYTES, REFERENCE_BYTES = 4_000_000, 150_000
POOLS_BEFORE, POOLS = 6, 1  # pools grow until the sixth; nobody measures a start
MEGABYTE = 10**6

Batch = dict[str, torch.Tensor]


@dataclass
class Cost:
    """What some text has cost, and what came out."""

    seconds: float
    """CPU."""
    megabytes: float
    tokens: int
    """Real ones."""
    positions: int = 0
    words: int = 0
    """Real tokens that are not special."""
    masked: int = 0

    @property
    def per_megabyte(self) -> float:
        return self.seconds / self.megabytes


class Texts:
    """Documents from memory, which count their bytes. None comes twice: words that were seen before are cheaper."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = iter(texts)
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text = next(self._texts)
        self.size += len(text.encode())
        return text

    def state_dict(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Nothing is open."""


def count(batches: list[Batch], folder: Path) -> dict[str, int]:
    """What is in the batches."""
    special = torch.tensor(AutoTokenizer.from_pretrained(folder).all_special_ids)
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    shown = torch.cat([batch["input_ids"].flatten() for batch in batches])
    return {
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "positions": len(labels),
        "words": int((~torch.isin(torch.where(labels >= 0, labels, shown), special)).sum()),
        "masked": int((labels >= 0).sum()),
    }


def raw(texts: list[str], folder: Path) -> Cost:
    """The fast tokenizer alone, once over whole documents."""
    tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    some = up_to(texts, RAW_BYTES)
    began = time.process_time()
    encodings = tokenizer.encode_batch_fast(some, add_special_tokens=False)
    seconds = time.process_time() - began
    tokens = sum(len(encoding.ids) for encoding in encodings)
    return Cost(seconds, sum(len(text.encode()) for text in some) / MEGABYTE, tokens)


def batches_of(source: Any, folder: Path) -> BatchStream:
    """All that a trainer does with documents, with the settings' defaults."""
    return BatchStream(
        lambda state: source,
        open_encoder(folder),
        clean=make_cleaner(DEFAULT_RULES),
        shape=lambda: SHAPE,
        mask_probability=MASK,
        seed="benchmark",
    )


def ours(texts: list[str], folder: Path) -> Cost:
    """Our batches, from documents in memory."""
    source = Texts(texts)
    stream = batches_of(source, folder)
    return between_pools(stream, stream, lambda: source.size, folder)


def ours_loaded(texts: list[str], folder: Path) -> Cost:
    """The same as a trainer gets them: from a file, through the mixture of sources, and the loader's thread."""
    file = folder / f"{len(texts)}.jsonl"
    if not file.exists():
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    mean = sum(len(text.encode()) for text in texts) / len(texts)
    source = documents(
        [Source(files=str(file))], seed=0, place="benchmark", part="train", cache_dir=folder, shuffle_buffer=2000
    )
    stream = batches_of(source, folder)
    loader = Loader(stream)

    def size() -> float:
        return mean * sum(state["documents"] for state in pools.values())

    pools: dict[int, dict[str, Any]] = {}

    def batches() -> Iterator[Batch]:
        for batch in loader:
            state = loader.state_dict()
            pools[state["pools"]] = state
            yield batch

    try:
        return between_pools(batches(), loader, size, folder)
    finally:
        loader.close()


def between_pools(batches: Iterator[Batch], stream: Any, size: Callable[[], float], folder: Path) -> Cost:
    """What POOLS pools cost, from the first batch of one to the last: as much is read meanwhile as is given out."""
    while stream.state_dict()["pools"] < POOLS_BEFORE:
        next(batches)
    before, began = size(), time.process_time()
    taken = []
    while stream.state_dict()["pools"] < POOLS_BEFORE + POOLS:
        taken.append(next(batches))
    return Cost(time.process_time() - began, (size() - before) / MEGABYTE, **count(taken, folder))


# ---- as in 2021


def reference(texts: list[str], folder: Path) -> Cost:
    """The structure of the recipes of 2021: datasets' stream, sentences tokenized by themselves to learn their length,
    pairs tokenized again and padded to 512, words masked token by token in Python, a DataLoader around it.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    some = up_to(texts, REFERENCE_BYTES)
    order = random.Random(0)
    rows = IterableDataset.from_generator(lambda: ({"text": text} for text in some))
    examples = rows.map(
        lambda batch: pairs(batch["text"], tokenizer, order), batched=True, batch_size=100, remove_columns=["text"]
    ).with_format("torch")
    loader = DataLoader(examples, batch_size=SAMPLES, collate_fn=lambda batch: mask(batch, tokenizer, order))
    began = time.process_time()
    batches = list(loader)
    return Cost(
        time.process_time() - began, sum(len(text.encode()) for text in some) / MEGABYTE, **count(batches, folder)
    )


def reference_core(texts: list[str], folder: Path) -> Cost:
    """The same without datasets and DataLoader."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    some = up_to(texts, REFERENCE_BYTES)
    order = random.Random(0)
    began = time.process_time()
    columns = pairs(some, tokenizer, order)
    examples = [{name: column[row] for name, column in columns.items()} for row in range(len(columns["input_ids"]))]
    batches = [mask(examples[at : at + SAMPLES], tokenizer, order) for at in range(0, len(examples), SAMPLES)]
    return Cost(
        time.process_time() - began, sum(len(text.encode()) for text in some) / MEGABYTE, **count(batches, folder)
    )


def pairs(texts: list[str], tokenizer: PreTrainedTokenizerBase, order: random.Random) -> dict[str, list[Any]]:
    """Two segments and their order, for as many instances as the texts give."""
    columns: dict[str, list[Any]] = {}
    for text in texts:
        chunk: list[str] = []
        length = 0
        sentences = split_sentences(text)
        for number, sentence in enumerate(sentences):
            chunk.append(sentence)
            length += len(tokenizer.tokenize(sentence))
            if length < SEQ_LENGTH - 3 and number + 1 < len(sentences):
                continue
            middle = order.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
            segments = [" ".join(chunk[:middle]), " ".join(chunk[middle:])]
            swapped = order.random() < 0.5
            if swapped:
                segments.reverse()
            instance = tokenizer(
                *segments, max_length=SEQ_LENGTH, truncation=True, padding="max_length", return_special_tokens_mask=True
            )
            for name, values in instance.items():
                columns.setdefault(name, []).append(values)
            columns.setdefault("sentence_order_label", []).append(int(swapped))
            chunk, length = [], 0
    return columns


def mask(examples: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, order: random.Random) -> Batch:
    """Whole-word masks, one token after the other."""
    rows = []
    for example in examples:
        tokens = tokenizer.convert_ids_to_tokens([int(token) for token in example["input_ids"]])
        words: list[list[int]] = []
        for at, token in enumerate(tokens):
            if token in tokenizer.all_special_tokens:
                continue
            if words and not token.startswith("▁"):
                words[-1].append(at)
            else:
                words.append([at])
        order.shuffle(words)
        budget = max(1, round(sum(map(len, words)) * MASK))
        chosen: set[int] = set()
        for word in words:
            if len(chosen) + len(word) <= budget:
                chosen.update(word)
        rows.append([int(at in chosen) for at in range(len(tokens))])
    ids = torch.tensor([[int(token) for token in example["input_ids"]] for example in examples])
    is_masked = torch.tensor(rows).bool()
    labels = ids.where(is_masked, -100)
    draw = torch.rand(ids.shape)
    ids = torch.where(is_masked & (draw < 0.8), tokenizer.mask_token_id, ids)
    ids = torch.where(is_masked & (draw >= 0.8) & (draw < 0.9), torch.randint(len(tokenizer), ids.shape), ids)
    attention = torch.tensor([[int(value) for value in example["attention_mask"]] for example in examples])
    return {"input_ids": ids, "attention_mask": attention, "labels": labels}


def up_to(texts: list[str], size: int) -> list[str]:
    """Documents of about so many bytes, from all over the corpus."""
    order = random.Random(1)
    some: list[str] = []
    for text in order.sample(texts, len(texts)):
        if size <= 0:
            break
        size -= len(text.encode())
        some.append(text)
    return some


WAYS: dict[str, Callable[[list[str], Path], Cost]] = {
    "raw fast tokenization": raw,
    "ours": ours,
    "ours, from a file through the loader": ours_loaded,
    "as in 2021, core": reference_core,
    "as in 2021": reference,
}


def measure(report: Report, rounds: int) -> None:
    """All ways in turn, on one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="samiti-") as scratch:
        folder = Path(scratch, "tokenizer")
        texts = embedded_documents(Path(scratch), budget=CHARACTERS)
        random.Random(0).shuffle(texts)
        train_tokenizer(texts[:1500], folder, vocab_size=VOCABULARY)
        short = [text[at : at + SHORT] for text in texts for at in range(0, len(text) - SHORT, SHORT)]
        for name, corpus in {"whole documents": texts, "short documents": short}.items():
            costs: dict[str, list[Cost]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way, work in WAYS.items():
                    costs[way].append(work(corpus, folder))
            seconds = {way: statistics.median(cost.per_megabyte for cost in each) for way, each in costs.items()}
            for way, each in costs.items():
                report.figure(f"{name}: {way}", seconds[way], "CPU s/MB")
                report.figure("  real tokens", each[-1].tokens / each[-1].seconds, "per CPU s")
                if each[-1].masked:
                    report.figure("  masked", each[-1].masked / each[-1].words, "of the text's tokens")
            base = seconds["raw fast tokenization"]
            for way in ("ours", "ours, from a file through the loader"):
                report.at_most(f"{name}: {way}, to raw", seconds[way] / base, "x", 0.5)
                share = costs[way][-1].tokens / costs[way][-1].positions
                report.at_least("  share of real tokens", share, "", 0.97)
                report.at_least("  as in 2021, to this", seconds["as in 2021"] / seconds[way], "x", 60)
            for old in ("as in 2021", "as in 2021, core"):
                report.figure(f"{name}: {old}, to raw", seconds[old] / base, "x")
                report.figure("  share of real tokens", costs[old][-1].tokens / costs[old][-1].positions, "")


if __name__ == "__main__":
    run_benchmark(__doc__ or "", measure, rounds=3)
