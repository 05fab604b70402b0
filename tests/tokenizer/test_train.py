import json
import logging
import random
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from transformers import AlbertConfig, AutoTokenizer, PreTrainedTokenizerBase

from collab.errors import UserError
from tests.conftest import ARABIC, BENGALI
from tokenizer.train import drawn, main, train_tokenizer

ENGLISH = [
    "The quick brown fox jumps over the lazy dog.",
    "Déjà vu: ½ of the “naïve” costs €3.50, said STRASSE & Straße!",
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)


def test_special_tokens_and_template_are_those_of_albert(tokenizer):
    assert tokenizer.is_fast
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id) == (0, 1, 2)
    assert (tokenizer.sep_token_id, tokenizer.mask_token_id) == (3, 4)
    assert len(tokenizer) == 2048
    pair = tokenizer("the first", "the second")
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and tokens.count("[SEP]") == 2
    middle = tokens.index("[SEP]") + 1
    assert pair["token_type_ids"] == [0] * middle + [1] * (len(tokens) - middle)


def test_the_mask_takes_the_space_before_it(tokenizer):
    ids = tokenizer("the [MASK] of", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁the", "[MASK]", "▁of"]


@pytest.mark.parametrize("sentence", ENGLISH + BENGALI + ARABIC + ["日本語 and 🎉 and Ẹ́"])
def test_text_survives_a_round_trip_up_to_the_normaliser(tokenizer, sentence):
    normalised = tokenizer.backend_tokenizer.normalizer.normalize_str(sentence)
    ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == normalised


def test_normaliser_folds_case_and_width_and_keeps_marks_and_joiners(tokenizer):
    normalize = tokenizer.backend_tokenizer.normalizer.normalize_str
    assert normalize("Ｃafé ﬁNE") == "café fine"
    for sentence in BENGALI[:3] + ARABIC:
        assert normalize(sentence) == sentence


def test_fast_tokenizer_and_sentencepiece_model_agree(tokenizer, tokenizer_folder, corpus):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "spiece.model"))
    normalize = tokenizer.backend_tokenizer.normalizer.normalize_str
    special = re.compile(r"\[(MASK|CLS|SEP)\]|<(pad|unk)>")
    lines = [line for document in corpus for line in document.splitlines() if not special.search(line)]
    for line in [*ENGLISH, *BENGALI, *ARABIC, "]]]]] ***** -----", *lines]:
        fast = tokenizer(line, add_special_tokens=False)["input_ids"]
        assert fast == model.encode(" ".join(normalize(line).split())), line


def test_both_files_hold_the_same_scores_which_float32_adds_up_exactly(tokenizer, tokenizer_folder):
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "spiece.model"))
    scores = [score for _, score in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]]
    assert scores == [model.get_score(index) for index in range(2048)]
    assert all((256 * score).is_integer() for score in scores) and min(scores) < -5


def test_an_albert_checkpoint_beside_it_changes_nothing(tokenizer, tokenizer_folder, tmp_path):
    # transformers' AlbertTokenizer would strip Bengali vowel signs, and AutoTokenizer must not choose it
    tokenizer.save_pretrained(tmp_path)
    AlbertConfig().save_pretrained(tmp_path)
    reopened = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for sentence in ENGLISH + BENGALI + ARABIC:
        assert reopened(sentence)["input_ids"] == tokenizer(sentence)["input_ids"]


def test_case_is_kept_when_asked(tmp_path, corpus):
    train_tokenizer(corpus[:60], tmp_path / "cased", vocab_size=700, lowercase=False)
    cased = AutoTokenizer.from_pretrained(tmp_path / "cased")
    assert cased.decode(cased("Python and PYTHON", add_special_tokens=False)["input_ids"]) == "Python and PYTHON"


def test_the_normaliser_of_the_language_is_part_of_the_tokenizer(tmp_path):
    train_tokenizer(ARABIC * 50, tmp_path / "arabic", vocab_size=300, normalizer="arabic")
    arabic = AutoTokenizer.from_pretrained(tmp_path / "arabic")
    with_marks, without = (arabic(text, add_special_tokens=False)["input_ids"] for text in ("قَرَأْتَ", "قرأت"))
    assert with_marks == without
    assert not any("\u064b" <= character <= "\u0652" for piece in arabic.get_vocab() for character in piece)


def test_a_sample_is_drawn_evenly_from_all_lines():
    lines = [f"{number:010}" for number in range(20_000)]
    sample = drawn(iter(lines), 30_000, random.Random(0))
    assert 27_000 * 0.9 < 10 * len(sample) <= 30_000
    assert sample == sorted(sample)
    assert 9_000 < np.mean([int(line) for line in sample]) < 11_000
    assert drawn(iter(lines), 200_000, random.Random(0)) == lines


def test_no_more_text_is_read_than_wanted(tmp_path, corpus):
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for text in corpus:
            read += len(text.encode())
            yield text

    train_tokenizer(texts(), tmp_path / "few", vocab_size=600, megabytes=0.05)
    assert 50_000 <= read < 50_000 + max(map(len, corpus)) * 2


def test_it_says_how_much_is_left(tmp_path, corpus, monkeypatch, caplog):
    monkeypatch.setattr("tokenizer.train.TELL_EVERY", 0)
    with caplog.at_level(logging.INFO):
        train_tokenizer(corpus, tmp_path / "told", vocab_size=600, megabytes=0.1)
        train_tokenizer(corpus[:60], tmp_path / "told", vocab_size=600)
    assert re.search(r"Read 0 MB of at most 0: \d+ s of reading left", caplog.text)
    assert re.search(r"Read 0 MB, \d+ sentences\n", caplog.text)


def test_same_texts_give_the_same_bytes(tmp_path, corpus, capfd):
    for name in ("one", "two"):
        train_tokenizer(iter(corpus[:60]), tmp_path / name, vocab_size=700)
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == ["spiece.model", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert capfd.readouterr().err == ""  # SentencePiece's own log would be hundreds of lines


def test_paragraphs_longer_than_sentencepiece_takes_are_used(tmp_path):
    # SentencePiece leaves out lines of more than 4,192 bytes in silence
    paragraph = " ".join(f"নদী{number}" for number in range(1000))
    train_tokenizer([paragraph], tmp_path / "long", vocab_size=300)
    assert "▁নদী" in AutoTokenizer.from_pretrained(tmp_path / "long").get_vocab()


def test_an_endless_word_is_used_in_pieces(tmp_path):
    endless = "".join(f"river{number}" for number in range(50_000))
    train_tokenizer([endless], tmp_path / "endless", vocab_size=300)
    assert any("river" in piece for piece in AutoTokenizer.from_pretrained(tmp_path / "endless").get_vocab())


def test_too_little_text_says_the_largest_size_that_works(tmp_path, corpus):
    with pytest.raises(UserError, match=r"too small for a vocabulary of 50000.*at most --vocab_size \d+") as refused:
        train_tokenizer(corpus[:3], tmp_path / "small", vocab_size=50_000)
    largest = int(str(refused.value).rstrip(".").split()[-1])
    train_tokenizer(corpus[:3], tmp_path / "small", vocab_size=largest)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "small")) == largest


def test_too_small_a_vocabulary_is_refused(tmp_path, corpus):
    with pytest.raises(UserError, match=r"of 100 is too small.*Give more, such as --vocab_size \d+"):
        train_tokenizer(corpus[:3], tmp_path / "small", vocab_size=100)


def test_a_failure_leaves_the_old_tokenizer(tmp_path, corpus):
    train_tokenizer(corpus[:60], tmp_path / "kept", vocab_size=700)
    before = (tmp_path / "kept" / "spiece.model").read_bytes()
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["", " \n"], tmp_path / "kept", vocab_size=700)
    assert (tmp_path / "kept" / "spiece.model").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]


def test_an_error_in_the_texts_arrives_as_it_is(tmp_path):
    def texts() -> Iterator[str]:
        yield from (f"A sentence with the number {number}." for number in range(100))
        raise UserError("the network is gone")

    with pytest.raises(UserError, match=r"^the network is gone$"):
        train_tokenizer(texts(), tmp_path / "never", vocab_size=300)


def test_command_line(tmp_path, corpus, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("data.txt").write_text("\n\n".join(corpus[:100]), encoding="utf-8")
    with caplog.at_level(logging.INFO):
        main(["--files", "*.txt", "--vocab_size", "800", "--output", "from_files"])
    assert "Tokenizer of 800 pieces" in caplog.text
    assert len(AutoTokenizer.from_pretrained("from_files")) == 800
    Path("run.yaml").write_text(
        "sources:\n  - files: '*.txt'\nvocab_size: 600\nlowercase: false\nnormalizer: bengali\nother: 1\n"
    )
    main(["--config", "run.yaml", "--output", "from_config"])
    cased = AutoTokenizer.from_pretrained("from_config")
    assert len(cased) == 600
    assert cased.backend_tokenizer.normalizer.normalize_str("A অ\u09be") == "A আ"
    main(["--config", "run.yaml", "--normalizer", "nfkc", "--vocab_size", "650", "--output", "from_both"])
    both = AutoTokenizer.from_pretrained("from_both")
    assert len(both) == 650
    assert both.backend_tokenizer.normalizer.normalize_str("অ\u09be") == "অ\u09be"


def test_documents_are_cleaned_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = "".join(f"<p>the river</p> number {number}\n\n" for number in range(200))
    Path("data.txt").write_text(lines)
    for cleaning in ([], ["markup"]):
        main(["--files", "*.txt", "--vocab_size", "300", "--cleaning", *cleaning, "--output", "out"])
        assert (">" in AutoTokenizer.from_pretrained("out").get_vocab()) == (not cleaning)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("vocab_size: 600", "names no `sources`"),
        ("sources: [", "Cannot read"),
        ("sources: [{file: a.txt}]", "Did you mean files"),
        ("sources: [{embedded: true}]\nnormalizer: bangla", "one of nfkc, bengali, arabic"),
        ("sources: [{embedded: true}]\ncleaning: [url]", "Did you mean urls"),
    ],
)
def test_command_line_refuses_in_one_line(tmp_path, yaml, message):
    (tmp_path / "run.yaml").write_text(yaml)
    with pytest.raises(SystemExit, match=message):
        main(["--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "out")])


def test_the_documented_commands_run(tmp_path, corpus, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "tokenizer.md"
    commands = re.findall(r"^python -m tokenizer\.train (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    for name, text in (
        ("corpus/a.txt", "\n\n".join(corpus[:60])),
        ("configs/our_run.yaml", "sources: [{embedded: true}]"),
    ):
        Path(name).parent.mkdir()
        Path(name).write_text(text, encoding="utf-8")
    for command in commands:
        main([*shlex.split(command), "--vocab_size", "700", "--megabytes", "0.2"])
        assert len(AutoTokenizer.from_pretrained("my_tokenizer")) == 700
