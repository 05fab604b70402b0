"""Training an ALBERT-like Unigram tokenizer from the sources of a run: `python -m tokenizer.train --help`."""

import argparse
import io
import itertools
import logging
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from collab.errors import UserError
from collab.files import replacing_folder
from tasks.mlm.sentences import split_sentences
from tasks.mlm.sources import Source, documents

PAD, UNK, CLS, SEP, MASK = "<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"  # ids 0 to 4, as in ALBERT
MAX_LENGTH = 512  # positions of ALBERT; only a warning in the tokenizer
LINE = 1000  # characters; SentencePiece drops lines of more than 4,192 bytes without a word, and UTF-8 takes up to 4
SAMPLE = 2_000_000  # sentences from which the vocabulary is made; about 2 GB of memory in SentencePiece
COVERAGE = 0.9999  # share of the characters that get a piece of their own; the rest is spelled in bytes
THREADS = 4  # fixed: sums are added up in another order on another number, and then the model's bytes differ

logger = logging.getLogger(__name__)


def train_tokenizer(
    texts: Iterable[str], folder: Path, *, vocab_size: int, lowercase: bool = True, seed: int = 0
) -> None:
    """Train a tokenizer and write it to `folder`, where `AutoTokenizer.from_pretrained(folder)` opens it.

    SentencePiece's Unigram model (Kudo 2018) as in ALBERT (Lan et al. 2019, section 4.1), with ALBERT's special tokens
    and ids. The normaliser is NFKC and, if wanted, lower-casing. It keeps accents and vowel signs, which
    transformers' own AlbertTokenizer strips unless it is told otherwise, and it keeps the zero-width (non-)joiners
    that Persian and Bengali spelling needs, which SentencePiece's default rule (nmt_nfkc) turns into spaces.
    Characters too rare for a piece of their own are spelled in UTF-8 bytes, so that none is ever unknown. The same
    texts in the same order give the same files.

    :param texts: documents; read once, one at a time. At most SAMPLE sentences drawn from them are kept in memory
    :param folder: gets spiece.model (which expects text already in lower case, as ALBERT's does), tokenizer.json,
        tokenizer_config.json; what stood there before is replaced when all is done
    :param vocab_size: ALBERT has 30,000. A smaller one makes a smaller model and longer sequences
    :param lowercase: changes nothing in scripts without case; turn it off where case matters (German, names)
    :param seed: of the draw, when there are more than SAMPLE sentences
    :raises UserError: when there is no text, or not enough (or too much variety) for this vocabulary; the text says
        which size works
    """
    started = time.monotonic()
    normalizer = normalizers.Sequence([normalizers.NFKC(), *([normalizers.Lowercase()] if lowercase else [])])
    lines = Counted(training_lines(texts, normalizer))
    first = next(lines, None)
    if first is None:
        raise UserError("There is no text to train a tokenizer on: every document is empty. Check the sources.")
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=COVERAGE,
            byte_fallback=True,
            normalization_rule_name="nfkc",
            input_sentence_size=SAMPLE,
            shuffle_input_sentence=True,
            num_threads=THREADS,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece=PAD,
            unk_piece=UNK,
            bos_piece=CLS,
            eos_piece=SEP,
            control_symbols=[MASK],
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.failure is not None:
            raise lines.failure from None  # SentencePiece turns what the texts raised into a RuntimeError
        advice = wrong_size(vocab_size, str(error))
        if advice is None:
            raise
        raise UserError(advice) from error
    with replacing_folder(folder) as scratch:
        (scratch / "spiece.model").write_bytes(model.getvalue())
        fast_tokenizer(model.getvalue(), normalizer).save_pretrained(scratch)
    logger.info(
        "Tokenizer of %d pieces from %d sentences (%.1f million characters) in %.1f s: %s",
        vocab_size, lines.count, lines.characters / 1e6, time.monotonic() - started, folder,
    )  # fmt: skip


class Counted:
    """An iterator of lines that counts them, says now and then how far it is, and keeps the error that ended it."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines = lines
        self.count = self.characters = 0
        self.failure: UserError | None = None

    def __iter__(self) -> "Counted":
        return self

    def __next__(self) -> str:
        try:
            line = next(self.lines)
        except UserError as error:
            self.failure = error
            raise
        self.count += 1
        self.characters += len(line)
        if self.count % 200_000 == 0:
            logger.info("Read %d sentences (%.0f million characters)", self.count, self.characters / 1e6)
        return line


def training_lines(texts: Iterable[str], normalizer: normalizers.Normalizer) -> Iterator[str]:
    """Normalised sentences, cut at white space where they are longer than SentencePiece takes."""
    for text in texts:
        for sentence in split_sentences(normalizer.normalize_str(text)):
            line = " ".join(sentence.split())
            if len(line) <= LINE:
                yield line
            else:
                yield from textwrap.wrap(line, LINE, break_on_hyphens=False)


def wrong_size(vocab_size: int, error: str) -> str | None:
    """SentencePiece knows the size that works, and says it in a sentence for programmers."""
    if largest := re.search(r"<= (\d+)", error):
        return (
            f"The text is too small for a vocabulary of {vocab_size}: it holds fewer pieces worth keeping. Give more "
            f"text, or at most --vocab_size {largest[1]}."
        )
    if smallest := re.search(r"required_chars.* vs (\d+)", error):
        return (
            f"A vocabulary of {vocab_size} is too small: the characters of this text and the bytes for rare ones need "
            f"{smallest[1]} pieces before any word gets one. Give more, such as --vocab_size {10 * int(smallest[1])}."
        )
    return None


def fast_tokenizer(model: bytes, normalizer: normalizers.Normalizer) -> PreTrainedTokenizerFast:
    """The same model for the `tokenizers` library.

    As PreTrainedTokenizerFast, not AlbertTokenizer: transformers 5 builds the latter anew from the vocabulary alone,
    with ALBERT's English normaliser and without the bytes. AutoTokenizer respects that choice beside an ALBERT config.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocabulary = [(pieces.id_to_piece(index), pieces.get_score(index)) for index in range(pieces.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=pieces.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS}:0 $A:0 {SEP}:0",
        pair=f"{CLS}:0 $A:0 {SEP}:0 $B:1 {SEP}:1",
        special_tokens=[(CLS, pieces.bos_id()), (SEP, pieces.eos_id())],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        cls_token=CLS,
        sep_token=SEP,
        bos_token=CLS,
        eos_token=SEP,
        mask_token=AddedToken(MASK, lstrip=True, special=True),  # "a [MASK]" is "a" and the mask, without a lone "▁"
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tokenizer.train", description=__doc__)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--files", help="a pattern for local files, in quotes: 'data/*.txt' (also .jsonl, .parquet, .gz ...)"
    )
    text.add_argument("--config", type=Path, help="a run's YAML: its sources, vocab_size, lowercase and seed are used")
    parser.add_argument("--column", default="text", help="with --files: the column that holds the text")
    parser.add_argument("--vocab_size", type=int, help="pieces in the vocabulary; without it the YAML's, or 30000")
    parser.add_argument("--megacharacters", type=float, default=500, help="stop after so many million characters")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        train_from_options(options)
    except UserError as error:
        sys.exit(str(error))


def train_from_options(options: argparse.Namespace) -> None:
    run: dict[str, Any] = {"sources": [{"files": options.files, "column": options.column}]}
    if options.config:
        run = read_run(options.config)
    with tempfile.TemporaryDirectory() as cache_dir:
        stream = documents(
            [Source.from_mapping(source) for source in run["sources"]],
            seed=run.get("seed", 0),
            place="tokenizer",
            part="train",
            cache_dir=Path(cache_dir),
            shuffle_buffer=1000,
            endless=False,
        )
        train_tokenizer(
            first_characters(stream, int(options.megacharacters * 1e6)),
            options.output,
            vocab_size=options.vocab_size or run.get("vocab_size", 30_000),
            lowercase=run.get("lowercase", True),
            seed=run.get("seed", 0),
        )


def read_run(config: Path) -> dict[str, Any]:
    try:
        run = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"Cannot read {config}: {error}. Give --config a run's YAML file.") from error
    if not isinstance(run, dict) or not isinstance(run.get("sources"), list):
        raise UserError(f"{config} names no `sources`. Add a list, for example:\nsources:\n  - embedded: true")
    return run


def first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text
        limit -= len(text)
        if limit <= 0:
            return


if __name__ == "__main__":
    main()
