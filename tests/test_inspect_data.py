"""Looking at a run's data: marks that say what happened, figures that agree with a count, messages that help."""

import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from collab.console import Console
from collab.errors import UserError
from scripts.inspect_data import MASK, InspectArguments, Notes, Piece, Reader, Statistics, columns, judge, main, wrapped
from tasks import Batch
from tasks.mlm.encoder import Encoder, open_encoder
from tasks.mlm.instances import IN_ORDER, NO_ORDER, Pool, make_instances
from tasks.mlm.masking import IGNORED, collate
from tasks.mlm.sources import Overlap
from tests.conftest import ARABIC, BENGALI

ROOT = Path(__file__).resolve().parents[1]
CHINESE = ["今天天气很好，我们去公园散步吧。", "漢字很多，但是空格没有。"]
DEVANAGARI = ["वह हर सुबह नदी के किनारे टहलने जाता है।"]
CHANGE = re.compile(r"\[(.*?)→(.*?)\]")
COLOUR = re.compile(r"\x1b\[\d+m")


@pytest.fixture(scope="module")
def reader(tokenizer_folder: Path) -> Reader:
    return open_reader(tokenizer_folder)


def open_reader(folder: Path) -> Reader:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return Reader(tokenizer, open_encoder(folder))


def ids_of(text: str, reader: Reader) -> list[int]:
    return reader.encoder.encode([text])[0].tolist()


def batch_of(texts: list[str], encoder: Encoder, mask_probability: float = 0.3) -> Batch:
    pool = Pool.of(texts, encoder)
    instances = make_instances(pool, pool.ranges(), 64, np.random.default_rng(0))
    return collate(pool, instances, encoder, mask_probability=mask_probability, rng=np.random.default_rng(1))


def crafted(reader: Reader, one: list[int], two: list[int], changes: dict[int, int | None]) -> Batch:
    """A batch of one row. :param changes: {position in the row: what the model sees there; None for the mask}."""
    encoder = reader.encoder
    second = [*two, encoder.sep_id] if two else []
    original = [encoder.cls_id, *one, encoder.sep_id, *second, encoder.pad_id]
    seen, labels = list(original), [IGNORED] * len(original)
    for position, shown in changes.items():
        labels[position] = original[position]
        seen[position] = encoder.mask_id if shown is None else shown
    return {
        "input_ids": torch.tensor([seen]),
        "labels": torch.tensor([labels]),
        "attention_mask": torch.tensor([[1] * (len(original) - 1) + [0]]),
        "token_type_ids": torch.tensor([[0] * (2 + len(one)) + [1] * len(second) + [0]]),
        "sentence_order_label": torch.tensor([IN_ORDER if two else NO_ORDER]),
    }


def lines_of(reader: Reader, batch: Batch, row: int = 0) -> list[str]:
    return [wrapped(pieces, 10**6, colour=False) for pieces in reader.segments(batch, row)]


# ---- marks -------------------------------------------------------------------------------------------------------


def test_a_masked_a_replaced_and_a_kept_word_are_told_apart(reader):
    one, two = ids_of("the value of the file", reader), ids_of("this is the name", reader)
    assert (len(one), len(two)) == (5, 4), "every word of this test should be one token"
    batch = crafted(reader, one, two, {2: None, 5: two[3], 8: two[1]})
    assert lines_of(reader, batch) == [f"the [value→{MASK}] of the [file→name]", "this [is→is] the name"]
    kinds = [[piece.kind for piece in pieces if piece.kind != "plain"] for pieces in reader.segments(batch, 0)]
    assert kinds == [["masked", "replaced"], ["kept"]]


def test_a_word_of_several_tokens_is_one_mark_that_shows_each_of_them(reader):
    first, (name,) = ids_of("zygomorphic", reader), ids_of("name", reader)
    assert len(first) >= 4
    changes = dict.fromkeys(range(1, len(first))) | {len(first): name}
    batch = crafted(reader, [*first, name], [], changes)
    assert lines_of(reader, batch) == [f"[zygomorphic→{MASK * (len(first) - 1)}name] name"]


def test_two_masked_neighbours_are_two_marks(reader):
    ids = ids_of("of the file", reader)
    batch = crafted(reader, ids, [], {1: None, 2: None})
    assert lines_of(reader, batch) == [f"[of→{MASK}] [the→{MASK}] file"]


def unigram(folder: Path, texts: list[str]) -> None:
    """Stands for the tokenizer that the runs train."""


def wordpiece(folder: Path, texts: list[str]) -> None:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    train(backend, trainers.WordPieceTrainer(vocab_size=600, special_tokens=SPECIAL), texts, folder)


def byte_level_bpe(folder: Path, texts: list[str]) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet)
    train(backend, trainer, texts, folder)


SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train(backend: Tokenizer, trainer: trainers.Trainer, texts: list[str], folder: Path) -> None:
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, SPECIAL, strict=True))).save_pretrained(folder)


@pytest.mark.parametrize("kind", [unigram, wordpiece, byte_level_bpe])
@pytest.mark.parametrize("script", ["English", "Bengali", "Arabic", "Chinese", "Devanagari"])
def test_without_its_marks_a_segment_is_the_text_that_was_written(kind, script, tokenizer_folder, corpus, tmp_path):
    texts = {
        "English": corpus[:30],
        "Bengali": [" ".join(BENGALI)],
        "Arabic": [" ".join(ARABIC)],
        "Chinese": ["".join(CHINESE)],
        "Devanagari": [" ".join(DEVANAGARI)],
    }[script]
    kind(tmp_path, texts + corpus[:5])
    reader = open_reader(tokenizer_folder if kind is unigram else tmp_path)
    batch = batch_of(texts, reader.encoder)
    marks = 0
    for row in range(len(batch["input_ids"])):
        seen, labels = batch["input_ids"][row], batch["labels"][row]
        original = torch.where(labels >= 0, labels, seen)
        real = (batch["attention_mask"][row] == 1) & (original != reader.encoder.cls_id)
        for number, pieces in enumerate(reader.segments(batch, row)):
            of_segment = real & (batch["token_type_ids"][row] == number) & (original != reader.encoder.sep_id)
            written = str(reader.tokenizer.decode(original[of_segment], clean_up_tokenization_spaces=False))
            read = "".join(without_mark(piece) for piece in pieces)
            # A word of more than LONGEST_WORD tokens has parts, and a character of several bytes may be cut there.
            assert without_space(read) == without_space(written) or "\ufffd" in read
            marks += sum(piece.kind != "plain" for piece in pieces)
    assert marks >= 1


def without_mark(piece: Piece) -> str:
    return piece.text if piece.kind in ("plain", "unknown") else piece.text[1:].partition("→")[0].replace("▁", "")


def without_space(text: str) -> str:
    return "".join(text.split())


def test_what_the_tokenizer_does_not_know_is_seen(tmp_path):
    wordpiece(tmp_path, ["the value of the file is the name of the value."])
    reader = open_reader(tmp_path)
    batch = batch_of(["The value of кириллица is the name. Это file."], reader.encoder)
    pieces = [piece for pieces in reader.segments(batch, 0) for piece in pieces]
    assert [piece.text for piece in pieces if piece.kind == "unknown"] == ["[UNK]", "[UNK]"]
    statistics = Statistics(reader.encoder)
    statistics.add(batch)
    assert statistics.unknown == 2


def test_no_text_can_steer_the_terminal(reader):
    ids = ids_of("a \x1b[2J\x07 b", reader)
    shown = lines_of(reader, crafted(reader, ids, [], {2: None}))[0]
    assert "\x1b" not in shown and "\x07" not in shown and "\ufffd" in shown


@pytest.mark.parametrize("colour", [False, True])
def test_lines_fit_the_terminal_also_with_wide_characters(reader, corpus, colour):
    batch = batch_of([corpus[0], "".join(5 * CHINESE)], reader.encoder)
    for row in range(len(batch["input_ids"])):
        for pieces in reader.segments(batch, row):
            text = wrapped(pieces, 60, colour=colour)
            assert bool(COLOUR.search(text)) == (colour and any(piece.kind != "plain" for piece in pieces))
            lines = COLOUR.sub("", text).split("\n     ")
            unbroken = without_space(wrapped(pieces, 10**6, colour=False))
            assert without_space("".join(lines)) == unbroken
            assert len(lines) <= 1 + columns(unbroken) // 20
            words = "".join("\0" * piece.breaks + " " * piece.spaced + piece.text for piece in pieces).split("\0")
            longest = max(columns(word) for word in words)
            assert all(columns(line) <= max(60, longest) for line in lines)


def test_a_line_breaks_only_where_a_word_begins():
    pieces = [
        Piece("aaaa"),
        Piece("bb", spaced=True, breaks=True),
        Piece("[c→▮]"),
        Piece("dd", spaced=True, breaks=True),
    ]
    assert wrapped(pieces, 7, colour=False).split("\n     ") == ["aaaa", "bb[c→▮]", "dd"]
    assert columns("漢字") == 4 and columns("ক্ষুদ্র") < len("ক্ষুদ্র")


# ---- figures -----------------------------------------------------------------------------------------------------


def test_figures_agree_with_a_count_by_hand(reader, corpus):
    batches = [batch_of(corpus[:20], reader.encoder, 0.15), batch_of(corpus[20:30] + CHINESE, reader.encoder, 0.4)]
    statistics, counted = Statistics(reader.encoder), Counter[str]()
    for batch in batches:
        statistics.add(batch)
        for seen, labels, real, order in zip(
            batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"].tolist(),
            batch["sentence_order_label"].tolist(), strict=True,
        ):  # fmt: skip
            counted["samples"] += 1
            counted[f"order {order}"] += 1
            counted["positions"] += len(seen)
            counted["real"] += sum(real)
            after_special = True
            for token, label in zip(seen[: sum(real)], labels, strict=False):
                original = token if label < 0 else label
                if original in (reader.encoder.cls_id, reader.encoder.sep_id):
                    after_special = True
                    continue
                counted["tokens"] += 1
                counted["words"] += after_special or bool(reader.encoder.begins_word[original])
                after_special = False
                if label >= 0:
                    counted["chosen"] += 1
                    counted["masked"] += token == reader.encoder.mask_id
                    counted["kept"] += token == label
    for name in ("samples", "positions", "real", "tokens", "words", "chosen", "masked", "kept"):
        assert getattr(statistics, name) == counted[name] > 0, name
    assert {f"order {order}": count for order, count in statistics.orders.items()} == {
        name: count for name, count in counted.items() if name.startswith("order")
    }


def test_a_verdict_allows_for_the_noise_and_for_no_more():
    assert judge(Overlap(first=2000, total=100_000, shared=0.021, error=0.0, chance=0.02), peers=4).startswith(
        "no more"
    )
    assert judge(Overlap(first=2000, total=100_000, shared=0.03, error=0.0, chance=0.02), peers=4).startswith("MORE")
    assert judge(Overlap(first=2000, total=100_000, shared=0.03, error=0.01, chance=0.02), peers=4).startswith(
        "no more"
    )
    assert judge(Overlap(first=50, total=50, shared=1.0, error=0.0, chance=1.0), peers=4).startswith("too small")


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("tasks", "tokenizer")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


# ---- the program -------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, corpus: list[str]) -> Path:
    """A corpus of a hundred documents and three lines that are none."""
    lines = [json.dumps({"text": text}) for text in corpus[:100]]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join([*lines, "no JSON", '{"text": " "}', '{"text": 7}']), encoding="utf-8")
    return path


def options(files: Path, tokenizer: Path, *more: str) -> list[str]:
    return [
        "--config", "configs/demo.yaml", "--sources", f"{{files: {files}}}", "--tokenizer", str(tokenizer),
        "--cache_dir", str(files.parent / "cache"), *more,
    ]  # fmt: skip


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/inspect_data.py", *arguments],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_program_shows_samples_and_figures(files, tokenizer_folder):
    answer = run(options(files, tokenizer_folder, "--batches", "2", "--samples", "2", "--micro_batch_size", "4"))
    assert answer.returncode == 0, answer.stderr
    out = answer.stdout
    assert "\x1b" not in out, "colours are for terminals"
    assert len(re.findall(r"^Batch \d+: ", out, re.MULTILINE)) == 2
    assert len(re.findall(r"^  Sample \d+: \d+ tokens, (in order|swapped|one segment)$", out, re.MULTILINE)) == 4
    assert CHANGE.search(out)
    share = re.search(r"to restore +([\d.]+)% of the tokens: ([\d.]+)% masked, ([\d.]+)% replaced, ([\d.]+)% kept", out)
    assert share and [float(number) for number in share.groups()] == pytest.approx([15, 80, 10, 10], abs=3)
    assert re.search(r"unknown tokens +0\.000%", out)
    lengths = re.search(r"Tokens in a sample: (\d+) to (\d+)", out)
    assert lengths and int(lengths[2]) <= 64
    bins = [float(number) for number in re.findall(r"^  \d+ to \d+ .* ([\d.]+)%$", out, re.MULTILINE)]
    assert len(bins) == 8 and sum(bins) == pytest.approx(100, abs=0.5)
    for reason in ("not JSON", "empty"):
        assert re.search(rf"skipped: .*because they are {reason}", out)
    for unit in ("CPU second", "second"):
        speed = re.search(rf"^  per {unit} +([\d.]+) +([\d,]+)$", out, re.MULTILINE)
        assert speed and 1.5 < float(speed[1]) * 1e6 / float(speed[2].replace(",", "")) < 8, "bytes in a token"


def test_samples_are_those_of_the_global_step(files, tokenizer_folder, capsys):
    warmup = ["--seq_length_start", "16", "--seq_length_warmup_steps", "100", "--statistics", "40", "--batches", "0"]
    longest = []
    for step in ("0", "50"):
        main(options(files, tokenizer_folder, *warmup, "--step", step))
        out = capsys.readouterr().out
        found = re.search(r"Tokens in a sample: \d+ to (\d+)", out)
        assert found and "per second" not in out, "so few batches tell nothing about the speed"
        longest.append(int(found[1]))
    assert longest == [16, 40]


def test_overlap_prints_what_peers_have_in_common(files, tokenizer_folder, tmp_path, corpus, capsys):
    few = tmp_path / "few.txt"
    few.write_text("\n\n".join(f"Document {number}." for number in range(20)))
    mixture = ["--sources", f"{{files: {files}, weight: 1}}", f"{{files: {few}, weight: 3}}"]
    main([*options(files, tokenizer_folder, "--overlap", "--documents", "120", "--peers", "3"), *mixture])
    rows = re.findall(r"^ +([\d.]+)% +([\d.]+)% +(\d+) +(\d+)  the files (\S+): (.*)$", capsys.readouterr().out, re.M)
    shared, chance, first, total = map(float, rows[0][:4])
    assert (first, rows[0][4]) == (30, str(files))
    assert chance == pytest.approx(100 * first / total, abs=0.06) and 0 < shared < 60
    assert rows[0][5] == "no more than by chance"
    assert rows[1][2] == rows[1][3] and rows[1][5].startswith("too small")


def test_a_mistake_ends_in_one_clear_message(files, tokenizer_folder):
    answer = run([*options(files, tokenizer_folder), "--sources", "{files: nowhere/*.txt}"])
    assert answer.returncode == 1 and "nowhere/*.txt" in answer.stderr
    assert answer.stderr.count("error: ") == 1 and "Traceback" not in answer.stderr


@pytest.mark.parametrize("wrong, words", [
    (["--statistcs", "3"], "Did you mean --statistics"),
    (["--seq_length", "60"], "seq_length is 60"),
    (["--seq_length", "256"], "128 positions"),
])  # fmt: skip
def test_what_the_run_would_refuse_is_refused(files, tokenizer_folder, wrong, words):
    with pytest.raises(UserError, match=words):
        main([*options(files, tokenizer_folder), *wrong])


@pytest.mark.parametrize("name, value", [("peers", 1), ("statistics", 0), ("samples", 0), ("documents", 0)])
def test_impossible_numbers_are_refused(name, value):
    with pytest.raises(UserError, match=f"{name} is {value}, but it must be at least"):
        InspectArguments(**{name: value})


def test_a_task_without_text_says_so():
    with pytest.raises(UserError, match="'image_classification' are no text"):
        main(["--task", "image_classification"])


def test_a_warning_that_comes_again_is_printed_once(capsys):
    notes = Notes(Console())
    for number in (1, 1, 2):
        notes.handle(logging.makeLogRecord({"msg": "line %d is broken", "args": (number,)}))
    assert capsys.readouterr().out == "line 1 is broken\nline 2 is broken\n"
