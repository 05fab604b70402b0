import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tasks.mlm.encoder import Encoder, open_encoder
from tasks.mlm.instances import IN_ORDER, LONGEST_WORD, NO_ORDER, SWAPPED, Instances, Pool, make_instances
from tasks.mlm.sentences import split_sentences
from tests.conftest import BENGALI


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def encoder(tokenizer_folder: Path) -> Encoder:
    return open_encoder(tokenizer_folder)


def made(
    documents: str | list[str], encoder: Encoder, seq_length: int = 64, seed: int = 0, parted: bool = True
) -> tuple[Pool, Instances]:
    pool = Pool.of([documents] if isinstance(documents, str) else documents, encoder)
    return pool, make_instances(pool, pool.ranges(), seq_length, np.random.default_rng(seed), parted=parted)


def segments(pool: Pool, instances: Instances) -> Iterator[list[list[int]]]:
    """The one or two segments of each instance, as the model will see them."""
    for start, middle, stop, order in zip(*(vars(instances)[name].tolist() for name in vars(instances)), strict=True):
        parts = [pool.ids[start:middle].tolist(), pool.ids[middle:stop].tolist()]
        assert (parts[1] == []) == (order == NO_ORDER) and parts[0]
        yield parts[: 1 if order == NO_ORDER else 2][:: -1 if order == SWAPPED else 1]


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


WORDS = st.sampled_from(["river", "of", "x" * 60, "নদী", "日本語", "[MASK]", "[SEP]", "a.b", "!", "?", ".", "\n", "।"])


@given(st.lists(st.lists(WORDS, max_size=60), max_size=5), st.integers(16, 80), st.integers(0, 99), st.booleans())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_every_token_is_in_one_instance_and_documents_are_not_mixed(encoder, documents, seq_length, seed, parted):
    texts = [" ".join(words) for words in documents]
    pool, built = made(texts, encoder, seq_length, seed, parted)
    assert (built.lengths <= seq_length).all()
    pieces = sorted(zip(built.start.tolist(), built.stop.tolist(), strict=True))
    assert [start for start, _ in pieces] + [len(pool.ids)] == [0] + [stop for _, stop in pieces] or not len(pool.ids)
    assert set(pool.document_ends.tolist()) <= set(built.stop.tolist())
    expected = [encoder.encode(split_sentences(text))[0].tolist() for text in texts]
    assert [pool.ids[start:stop].tolist() for start, stop in pool.ranges()] == [ids for ids in expected if ids]


@given(st.text(max_size=400))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_every_character_of_a_document_is_in_an_instance(encoder, tokenizer, text):
    """Up to the tokenizer's normaliser, and to white space."""
    pool, built = made(text, encoder, 16)
    order = np.argsort(built.start)
    ids = flat(pool.ids[start:stop].tolist() for start, stop in zip(built.start[order], built.stop[order], strict=True))
    normalised = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    kept = "".join(tokenizer.decode(ids, skip_special_tokens=False).split())
    assert kept == "".join(normalised.split()).replace("▁", "")


def test_real_documents_fill_the_length(encoder, corpus):
    _, built = made(corpus[:200], encoder, 128)
    assert 96 < built.lengths.mean() <= built.lengths.max() <= 128


def test_half_are_swapped_and_the_text_tells_which(encoder, tokenizer):
    sentences = [f"The number {number} is here." for number in range(400)]
    pool, built = made(" ".join(sentences), encoder)
    for parts, order in zip(segments(pool, built), built.order.tolist(), strict=True):
        first, second = ([int(word) for word in tokenizer.decode(part).split() if word.isdigit()] for part in parts)
        if first and second:  # an instance of one sentence parts it before or after its number
            assert (max(first) < min(second)) == (order == IN_ORDER)
            assert (max(second) < min(first)) == (order == SWAPPED)
    _, many = made([" ".join(sentences)] * 50, encoder)
    assert 0.45 < np.mean(many.order == SWAPPED) < 0.55


def test_segments_are_parted_between_sentences_anywhere(encoder):
    sentence = "The number is here. "
    [length] = {len(encoder.encode([sentence.strip()])[0])}
    built = [made(sentence * 6, encoder, seed=seed)[1] for seed in range(80)]
    middles = {instances.middle.item() for instances in built if len(instances) == 1}
    assert middles == {length * number for number in range(1, 6)}


def test_one_instance_in_ten_is_shorter(encoder):
    _, built = made("ab " * 100 + ". it is. " * 20_000, encoder, 128)
    lengths = built.lengths[1:-1]
    assert 0.07 < (lengths < 118).mean() < 0.13
    assert lengths.min() < 40


def test_one_sentence_is_parted_between_words(encoder, tokenizer):
    for seed in range(20):
        pool, built = made("this is a list of all the names", encoder, seed=seed)
        [parts] = segments(pool, built)
        assert built.order.item() in (IN_ORDER, SWAPPED)
        for part in parts:
            assert tokenizer.convert_ids_to_tokens(part)[0].startswith("▁")


def test_what_is_not_parted_is_one_segment_and_longer_by_a_token(encoder, corpus):
    pool, built = made(corpus[:200], encoder, 128, parted=False)
    assert set(built.order.tolist()) == {NO_ORDER} and (built.middle == built.stop).all()
    assert (built.lengths == built.stop - built.start + 2).all()
    assert (built.stop - built.start).max() == 126  # a pair has 125: one [SEP] more
    assert 96 < built.lengths.mean() <= built.lengths.max() == 128
    assert len(list(segments(pool, built))) == len(built)


def test_one_word_has_no_order(encoder):
    pool, built = made("the", encoder)
    assert built.order.tolist() == [NO_ORDER] and built.lengths.tolist() == [len(pool.ids) + 2]


@pytest.mark.parametrize("nothing", ["", " \n\t "])
def test_no_text_no_instance(encoder, nothing):
    assert len(made([nothing, nothing], encoder)[1]) == len(made([], encoder)[1]) == 0
    pool, built = made([nothing, "the end", nothing], encoder)
    assert pool.ranges() == [(0, len(pool.ids))] and len(built) == 1


def words_of(pool: Pool, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    begins = [*pool.word_starts.tolist(), len(pool.ids)]
    return [str(tokenizer.decode(pool.ids[start:stop].tolist())) for start, stop in itertools.pairwise(begins)]


def test_words_are_whole(encoder, tokenizer):
    text = "uncommon documentations happened. " + BENGALI[1]
    pool = Pool.of([text], encoder)
    assert words_of(pool, tokenizer) == text.lower().split()
    assert pool.word_of.tolist() == (np.searchsorted(pool.word_starts, np.arange(len(pool.ids)), "right") - 1).tolist()


def test_an_endless_word_and_a_script_without_spaces_are_many_words(encoder):
    for text in ("x7q" * 500, "日本語の文章" * 100):
        pool, built = made(text, encoder)
        assert np.bincount(pool.word_of[pool.word_of >= 0]).max() <= LONGEST_WORD
        assert NO_ORDER not in built.order


def test_text_that_speaks_of_special_tokens_holds_none(encoder, tokenizer):
    pool, _ = made("the [MASK] token and the [SEP] token and [CLS] too, and <pad>.", encoder)
    assert not set(pool.ids.tolist()) & (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})


def test_wordpiece_continuations_belong_to_their_word(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##ed", "the", "."]
    backend = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(tmp_path)
    encoder = open_encoder(tmp_path)
    pool, built = made("the playing played.", encoder)
    assert pool.word_of.tolist() == [0, 1, 1, 2, 2, 3]
    assert pool.ids.tolist() == [8, 5, 6, 5, 7, 9] and len(built) == 1
    assert Pool.of(["xyz the"], encoder).word_of.tolist() == [-1, 1]  # nothing can be learnt from an unknown token
    assert len(made("\x00\x01", encoder)[1]) == 0  # all of which this normaliser drops


def test_same_rng_same_instances(encoder, corpus):
    one, two = (made(corpus[:20], encoder)[1] for _ in range(2))
    assert all((vars(one)[name] == vars(two)[name]).all() for name in vars(one))


def test_too_short_a_length_is_refused(encoder):
    with pytest.raises(ValueError, match="at least 16"):
        made("the", encoder, 15)
