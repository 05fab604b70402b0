import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.mlm.sentences import cut_at_spaces, split_sentences

MARKS = ".!?…।॥؟۔؛。！？」”\"') \n\t\u2028"


@given(st.text(st.one_of(st.sampled_from(MARKS), st.characters()), max_size=80))
@settings(max_examples=500)
def test_nothing_but_white_space_is_lost(text):
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() for sentence in sentences)


@pytest.mark.parametrize(
    "sentences",
    [
        ["It rains.", "We stay at home!", "Do you?", "Yes."],
        ["Dr. Rahman met Mrs. J. K. Ahmed at 3.14 p.m. on Monday.", "They talked."],
        ["See e.g. Fig. 3 and p. 12 of vol. 2.", "It is there."],
        ["“Really?”", "“Yes,” she said (and left).", "He stayed."],
        ["Wait... what is that?", "Version 3.11 of example.org is out."],
        ["1. The first point.", "2. The second point."],
        ["Das ist z. B. gut.", "Prof. Weiß kommt."],
        ["আমি ভাত খাই।", "তুমি কোথায় যাচ্ছ?", "সে বলল, “আমি যাব।”", "ড. ইউনূস এলেন।", "শেষ॥"],
        ["धर्मक्षेत्रे कुरुक्षेत्रे समवेता युयुत्सवः।", "मामकाः पाण्डवाश्चैव किमकुर्वत सञ्जय॥"],
        ["هل تسمع؟", "نعم، أسمع؛ ثم ذهب.", "انتهى!"],
        ["یہ ایک کتاب ہے۔", "وہ کہاں ہے؟"],
        ["አንድ ነው።", "ሁለት ነው።"],
    ],
)
def test_sentences_apart_by_spaces(sentences):
    assert split_sentences(" ".join(sentences)) == sentences


@pytest.mark.parametrize(
    "sentences", [["今天天气很好。", "你去哪里？", "「好！」", "他说。"], ["নদী।", "জল।"], ["یہ۔", "وہ۔"]]
)
def test_sentences_without_spaces(sentences):
    assert split_sentences("".join(sentences)) == sentences


def test_line_ends_are_paragraph_ends():
    assert split_sentences("A headline\nThe text. More\r\n\n \nLast") == ["A headline", "The text.", "More", "Last"]
    assert split_sentences(" \n\t") == []


@pytest.mark.parametrize("piece", [".", "!", "?.", "।", "a.", ". ", '")', "…", "'", "A. "])
def test_time_is_linear(piece):
    started = time.process_time()
    split_sentences(piece * 100_000 + "x")
    assert time.process_time() - started < 3


@given(st.text(st.sampled_from("ab \t\u2028"), max_size=80), st.integers(1, 20))
def test_long_text_is_cut_before_spaces(text, most):
    parts = list(cut_at_spaces(text, most))
    assert "".join(parts) == text
    assert all(0 < len(part) <= most for part in parts) or text == ""
    for part, following in itertools.pairwise(parts):
        if not following[0].isspace():  # cut inside a word: there was no place before
            assert not any(character.isspace() for character in part[1:])
