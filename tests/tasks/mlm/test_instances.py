import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from collab.errors import UserError
from tasks.mlm.instances import LONGEST_WORD, Instance, instances
from tasks.mlm.sentences import split_sentences
from tests.conftest import BENGALI


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def segments(instance: Instance, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The one or two segments of an instance; checks its frame on the way."""
    ids, types, words = instance.input_ids.tolist(), instance.token_type_ids.tolist(), instance.word_ids.tolist()
    assert len(ids) == len(types) == len(words)
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    parts = [
        list(part) for is_sep, part in itertools.groupby(ids[1:], lambda i: i == tokenizer.sep_token_id) if not is_sep
    ]
    assert types == [0] * (len(parts[0]) + 2) + [1] * (len(parts[1]) + 1 if len(parts) == 2 else 0)
    special = np.isin(instance.input_ids, tokenizer.all_special_ids)
    assert (instance.word_ids[special] == -1).all() and (instance.word_ids[~special] >= 0).all()
    return parts


def in_document_order(instance: Instance, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    parts = segments(instance, tokenizer)
    assert len(parts) == (1 if instance.order_label == -100 else 2)
    return flat(reversed(parts) if instance.order_label == 1 else parts)


def tokens_of(document: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    sentences = [tokenizer(sentence, add_special_tokens=False)["input_ids"] for sentence in split_sentences(document)]
    return [token if token > 4 else tokenizer.unk_token_id for token in flat(sentences)]


def made(document: str, tokenizer: PreTrainedTokenizerBase, seq_length: int = 64, seed: int = 0) -> list[Instance]:
    return list(instances(iter([document]), tokenizer, seq_length, np.random.default_rng(seed)))


WORDS = st.sampled_from(["river", "of", "x" * 60, "নদী", "日本語", "[MASK]", "[SEP]", "a.b", "!", "?", ".", "\n", "।"])


@given(st.lists(WORDS, max_size=120), st.integers(16, 80), st.integers(0, 99))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_all_text_ends_up_in_instances_in_order_once_unswapped(tokenizer, words, seq_length, seed):
    document = " ".join(words)
    built = made(document, tokenizer, seq_length, seed)
    assert all(len(instance.input_ids) <= seq_length for instance in built)
    assert flat(in_document_order(instance, tokenizer) for instance in built) == tokens_of(document, tokenizer)


def test_real_documents_lose_nothing_and_fill_the_length(tokenizer, corpus):
    everything = list(instances(iter(corpus[:200]), tokenizer, 128, np.random.default_rng(0)))
    expected = flat(tokens_of(document, tokenizer) for document in corpus[:200])
    assert flat(in_document_order(instance, tokenizer) for instance in everything) == expected
    lengths = np.array([len(instance.input_ids) for instance in everything])
    assert 96 < lengths.mean() <= lengths.max() <= 128


def test_half_are_swapped_and_the_text_tells_which(tokenizer):
    sentences = [f"the number {number} is here." for number in range(400)]
    built = made(" ".join(sentences), tokenizer)
    for instance in built:
        first, second = (
            [int(word) for word in tokenizer.decode(part).split() if word.isdigit()]
            for part in segments(instance, tokenizer)
        )
        if first and second:  # an instance of one sentence parts it before or after its number
            assert (max(first) < min(second)) == (instance.order_label == 0)
            assert (max(second) < min(first)) == (instance.order_label == 1)
    many = list(instances(iter([" ".join(sentences)] * 10), tokenizer, 64, np.random.default_rng(0)))
    assert 0.45 < np.mean([instance.order_label == 1 for instance in many]) < 0.55


def test_one_instance_in_ten_is_shorter(tokenizer):
    document = "ab " * 100 + ". it is. " * 20_000
    lengths = np.array([len(instance.input_ids) for instance in made(document, tokenizer, 128)][1:-1])
    assert 0.07 < (lengths < 118).mean() < 0.13
    assert lengths.min() < 40


def test_one_sentence_is_parted_between_words(tokenizer):
    for seed in range(20):
        [instance] = made("this is a list of all the names", tokenizer, seed=seed)
        assert instance.order_label in (0, 1)
        for segment in segments(instance, tokenizer):
            assert tokenizer.convert_ids_to_tokens(segment)[0].startswith("▁")


def test_one_word_has_no_order(tokenizer):
    [instance] = made("the", tokenizer)
    assert instance.order_label == -100
    assert tokenizer.decode(instance.input_ids) == "[CLS] the[SEP]"


@pytest.mark.parametrize("nothing", ["", " \n\t "])
def test_no_text_no_instance(tokenizer, nothing):
    assert made(nothing, tokenizer) == []


def test_words_are_whole_and_counted_through_the_instance(tokenizer):
    text = "uncommon documentations happened. " + BENGALI[1]
    [instance] = made(text, tokenizer, 128)
    words: dict[int, list[int]] = {}
    for token, word in zip(instance.input_ids.tolist(), instance.word_ids.tolist(), strict=True):
        if word >= 0:
            words.setdefault(word, []).append(token)
    spelled = {tokenizer.decode(tokens) for tokens in words.values()}
    assert {"uncommon", "documentations"} <= spelled <= set(text.lower().split())


def test_an_endless_word_and_a_script_without_spaces_are_many_words(tokenizer):
    for text in ("x7q" * 500, "日本語の文章" * 100):
        for instance in made(text, tokenizer):
            words = instance.word_ids[instance.word_ids >= 0]
            assert np.bincount(words).max() <= LONGEST_WORD
            assert instance.order_label in (0, 1)


def test_text_that_speaks_of_special_tokens_holds_none(tokenizer):
    [instance] = made("the [MASK] token and the [SEP] token and [CLS] too.", tokenizer)
    ids = instance.input_ids.tolist()
    assert (ids.count(tokenizer.mask_token_id), ids.count(tokenizer.sep_token_id)) == (0, 2)
    assert ids.count(tokenizer.cls_token_id) == 1


def test_wordpiece_continuations_belong_to_their_word():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##ed", "the", "."]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    [instance] = made("the playing played.", tokenizer)
    pairs = zip(tokenizer.convert_ids_to_tokens(instance.input_ids.tolist()), instance.word_ids.tolist(), strict=True)
    words = {token: word for token, word in pairs if word >= 0}
    assert words["##ing"] != words["##ed"]
    assert len(set(words.values())) == 4  # the, playing, played and the full stop
    assert made("\x00\x01", tokenizer) == []  # all of which this normaliser drops


def test_a_tokenizer_without_word_marks_is_refused():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(UserError, match="neither the beginning"):
        made("the", tokenizer)


def test_same_rng_same_instances(tokenizer, corpus):
    for one, two in zip(made(corpus[0], tokenizer), made(corpus[0], tokenizer), strict=True):
        assert one.input_ids.tolist() == two.input_ids.tolist()
        assert one.order_label == two.order_label


def test_too_short_a_length_is_refused(tokenizer):
    with pytest.raises(ValueError, match="at least 16"):
        made("the", tokenizer, 15)
