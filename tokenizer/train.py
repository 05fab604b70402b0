"""Training an ALBERT-like Unigram tokenizer from the sources of a run: `python -m tokenizer.train --help`."""

import argparse
import io
import logging
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import yaml
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # protobuf makes it at import
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from collab.errors import UserError
from collab.files import replacing_folder
from tasks.mlm.cleaning import DEFAULT_RULES, RULES, make_cleaner
from tasks.mlm.encoder import GRAIN
from tasks.mlm.sentences import cut_at_spaces, split_sentences
from tasks.mlm.sources import Source, documents
from tokenizer.normalizers import NORMALIZERS, make_normalizer

PAD, UNK, CLS, SEP, MASK = "<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"  # ids 0 to 4, as in ALBERT
MAX_LENGTH = 512  # positions of ALBERT; only a warning in the tokenizer
LINE = 1000  # characters; SentencePiece drops lines of more than 4,192 bytes without a word, and UTF-8 takes up to 4
TELL_EVERY = 10  # seconds between two lines about how far it is
SAMPLE = 60_000_000  # characters from which the vocabulary is made; SentencePiece takes 20 bytes for each
COVERAGE = 0.9999  # share of the characters that get a piece of their own; the rest is spelled in bytes
THREADS = 4  # fixed: sums are added up in another order on another number, and then the model's bytes differ

logger = logging.getLogger(__name__)


def train_tokenizer(
    texts: Iterable[str],
    folder: Path,
    *,
    vocab_size: int,
    normalizer: str = "nfkc",
    lowercase: bool = True,
    megabytes: float = math.inf,
    seed: int = 0,
) -> None:
    """Train a tokenizer and write it to `folder`, where `AutoTokenizer.from_pretrained(folder)` opens it.

    SentencePiece's Unigram model (Kudo 2018) as in ALBERT (Lan et al. 2019, section 4.1), with ALBERT's special tokens
    and ids. The normaliser is NFKC, the rules of the language and, if wanted, lower-casing. It keeps accents and vowel
    signs, which transformers' own AlbertTokenizer strips unless it is told otherwise, and it keeps the zero-width
    (non-)joiners that Persian and Bengali spelling needs, which SentencePiece's default rule (nmt_nfkc) turns into
    spaces. Characters too rare for a piece of their own are spelled in UTF-8 bytes, so that none is ever unknown. The
    same texts in the same order give the same files.

    :param texts: cleaned documents; read once, one at a time. Sentences of SAMPLE characters, drawn evenly from all,
        are kept in memory, so that a longer corpus takes more time and no more memory
    :param folder: gets spiece.model (which expects text that the normaliser of tokenizer.json has gone over),
        tokenizer.json, tokenizer_config.json; what stood there before is replaced when all is done
    :param vocab_size: ALBERT has 30,000. A smaller one makes a smaller model and longer sequences
    :param normalizer: a key of `tokenizer.normalizers.NORMALIZERS`
    :param lowercase: changes nothing in scripts without case; turn it off where case matters (German, names)
    :param megabytes: MB of text (in UTF-8) to read at most
    :param seed: of the draw, when there is more text than SAMPLE
    :raises UserError: when there is no text, or not enough (or too much variety) for this vocabulary; the text says
        which size works
    """
    rules = make_normalizer(normalizer, lowercase)
    lines = Lines(texts, rules, megabytes)
    sample = drawn(lines, SAMPLE, random.Random(seed))
    if not sample:
        raise UserError("There is no text to train a tokenizer on: every document is empty. Check the sources.")
    logger.info(
        "Read %.0f MB, %d sentences; choosing pieces from %d of them", lines.megabytes, lines.count, len(sample)
    )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=COVERAGE,
            byte_fallback=True,
            normalization_rule_name="identity",  # the lines have been normalised
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
        advice = wrong_size(vocab_size, str(error))
        if advice is None:
            raise
        raise UserError(advice) from error
    exact = with_exact_scores(model.getvalue())
    with replacing_folder(folder) as scratch:
        (scratch / "spiece.model").write_bytes(exact)
        fast_tokenizer(exact, rules).save_pretrained(scratch)
    logger.info(
        "Tokenizer of %d pieces from %d sentences (%.1f MB) in %.1f s: %s",
        vocab_size, lines.count, lines.megabytes, time.monotonic() - lines.started, folder,
    )  # fmt: skip


class Lines:
    """Normalised sentences, cut where they have more than LINE characters; says now and then how much is left."""

    def __init__(self, texts: Iterable[str], normalizer: normalizers.Normalizer, most: float) -> None:
        self.texts, self.normalizer, self.most = texts, normalizer, most
        self.count, self.megabytes = 0, 0.0
        self.started = self.told = time.monotonic()

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            for sentence in split_sentences(text):
                for part in cut_at_spaces(sentence, LINE):
                    line = " ".join(self.normalizer.normalize_str(part).split())
                    for short in filter(None, cut_at_spaces(line, LINE)):  # ﷺ alone becomes 18 characters
                        self.count += 1
                        yield short
            self.megabytes += len(text.encode()) / 1e6
            if self.megabytes >= self.most:
                return
            if time.monotonic() - self.told > TELL_EVERY:
                self._tell()

    def _tell(self) -> None:
        self.told = time.monotonic()
        if self.megabytes > 0 and self.most < math.inf:
            left = (self.told - self.started) * (self.most / self.megabytes - 1)
            logger.info("Read %.0f MB of at most %.0f: %.0f s of reading left at most", self.megabytes, self.most, left)
        else:
            logger.info("Read %.0f MB, %d sentences", self.megabytes, self.count)


def drawn(lines: Iterable[str], most: int, rng: random.Random) -> list[str]:
    """Draw lines evenly, as many as make `most` characters at most; their order stays."""
    kept: list[tuple[float, str]] = []
    share, size = 1.0, 0
    for line in lines:
        lot = rng.random()
        if lot < share:
            kept.append((lot, line))
            size += len(line)
        while size > most:
            share *= 0.9
            kept = [(lot, line) for lot, line in kept if lot < share]
            size = sum(len(line) for _, line in kept)
    return [line for _, line in kept]


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


def with_exact_scores(model: bytes) -> bytes:
    """Round the scores of the pieces to what float32 adds up without an error, as tasks/mlm/encoder.py needs it.

    SentencePiece adds in float32, the `tokenizers` library in float64: with rounding errors they choose differently
    between ways to cut a word that are equally good. The scores are natural logarithms of probabilities; a change of
    1/512 is below what training on another sample of the same corpus does to them.
    """
    proto = ModelProto.FromString(model)
    for piece in proto.pieces:
        piece.score = round(piece.score * GRAIN) / GRAIN
    return proto.SerializeToString()


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
    text.add_argument(
        "--config",
        type=Path,
        help="a run's YAML: its sources, cleaning, vocab_size, normalizer, lowercase, tokenizer_megabytes and seed",
    )
    parser.add_argument("--column", default="text", help="with --files: the column that holds the text")
    parser.add_argument("--vocab_size", type=int, help="pieces in the vocabulary; without it the YAML's, or 30000")
    parser.add_argument(
        "--normalizer", choices=NORMALIZERS, help="of the language; without it the YAML's, or nfkc, which suits most"
    )
    parser.add_argument(
        "--cleaning",
        nargs="*",
        metavar="RULE",
        help=f"rules for documents, of {', '.join(RULES)}; without it the YAML's, or {' '.join(DEFAULT_RULES)}",
    )
    parser.add_argument("--megabytes", type=float, help="stop after so many MB of text; without it the YAML's, or 500")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        train_from_options(options)
    except UserError as error:
        sys.exit(str(error))


def train_from_options(options: argparse.Namespace) -> None:
    run: dict[str, Any] = {"sources": [{"files": options.files, "column": options.column}], "tokenizer_megabytes": 500}
    if options.config:
        run = read_run(options.config)
    given = {
        "vocab_size": options.vocab_size,
        "normalizer": options.normalizer,
        "cleaning": options.cleaning,
        "tokenizer_megabytes": options.megabytes,
    }
    run |= {key: value for key, value in given.items() if value is not None}
    seed = run.get("seed", 0)
    clean = make_cleaner(run.get("cleaning", DEFAULT_RULES))
    make_normalizer(run.get("normalizer", "nfkc"), lowercase=True)  # a wrong name is said before any text is read
    with tempfile.TemporaryDirectory() as cache_dir:
        stream = documents(
            [Source.from_mapping(source) for source in run["sources"]],
            seed=seed,
            place="tokenizer",
            part="train",
            cache_dir=Path(cache_dir),
            shuffle_buffer=1000,
            endless=False,
        )
        train_tokenizer(
            map(clean, stream),
            options.output,
            vocab_size=run.get("vocab_size", 30_000),
            normalizer=run.get("normalizer", "nfkc"),
            lowercase=run.get("lowercase", True),
            megabytes=run.get("tokenizer_megabytes", 200),
            seed=seed,
        )


def read_run(config: Path) -> dict[str, Any]:
    try:
        run = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"Cannot read {config}: {error}. Give --config a run's YAML file.") from error
    if not isinstance(run, dict) or not isinstance(run.get("sources"), list):
        raise UserError(f"{config} names no `sources`. Add a list, for example:\nsources:\n  - embedded: true")
    return run


if __name__ == "__main__":
    main()
