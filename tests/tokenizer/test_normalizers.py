import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collab.errors import UserError
from tests.conftest import ARABIC, BENGALI
from tokenizer.normalizers import NORMALIZERS, make_normalizer

JOINERS = "\u200c\u200d"
ALPHABETS = [
    "".join(BENGALI) + 10 * f"{JOINERS}\u09cd\u09bc\u09be\u09c7\u0985\u09a4\u09f7",
    "".join(ARABIC) + 10 * f"{JOINERS}\u0640\u064e\u0651\u0654\u0653\u0670",
    "Ａﬁé\u0301\u0323🎉👩\ufe0f \u2028" + JOINERS,
]
TEXTS = st.one_of(*(st.text(st.sampled_from(alphabet), max_size=30) for alphabet in ALPHABETS), st.text(max_size=30))


@pytest.mark.parametrize("name", NORMALIZERS)
@given(TEXTS)
@settings(max_examples=500)
def test_a_second_time_changes_nothing(name, text):
    normalize = make_normalizer(name, lowercase=False).normalize_str
    assert normalize(normalize(text)) == normalize(text)


@pytest.mark.parametrize("name", NORMALIZERS)
@given(TEXTS)
@settings(max_examples=500)
def test_words_are_normalised_by_themselves(name, text):
    normalize = make_normalizer(name, lowercase=True).normalize_str
    words = text.replace("\x1c", "").replace("\x1d", "").replace("\x1e", "").replace("\x1f", "").split()
    assert "\n".join(map(normalize, words)) == normalize("\n".join(words))


@pytest.mark.parametrize("name", NORMALIZERS)
def test_text_of_other_languages_is_left_alone(name):
    normalize = make_normalizer(name, lowercase=False).normalize_str
    others = [] if name == "arabic" else ARABIC
    for text in ["RT hello, Moss all", "日本語。", "👩‍👩‍👧 🏳️‍🌈", *others, *(BENGALI[:3])]:
        assert normalize(text) == text


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("\u09dc", "\u09a1\u09bc"),  # ড়, in one character or two
        ("ক\u09c7\u09be", "কো"),
        ("অ\u09beমি", "আমি"),
        ("ত\u09cd\u200dক", "ত\u09cd\u200dক"),
        ("হঠাত\u09cd\u200d", "হঠাৎ"),
        ("র\u200d\u09cdযাব", "র\u200d\u09cdযাব"),
        ("ক\u09cd\u200c\u200cষ", "ক\u09cd\u200cষ"),
        ("আ\u200dমি \u200cযাই\u200c", "আমি যাই"),
        ("যাই৷", "যাই।"),
    ],
)
def test_bengali(typed, meant):
    assert make_normalizer("bengali", lowercase=True).normalize_str(typed) == meant


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("هَلْ قَرَأْتَ الكِتابَ", "هل قرأت الكتاب"),
        ("العــــربية", "العربية"),
        ("\ufefb", "لا"),
        ("شي\u0640\u0654ا", "شي\u0640\u0654ا"),
        ("می\u200cخوانم\u200c \u200cآن", "می\u200cخوانم آن"),
        ("أحمد إلى آخر مدرسة", "أحمد إلى آخر مدرسة"),
    ],
)
def test_arabic(typed, meant):
    assert make_normalizer("arabic", lowercase=True).normalize_str(typed) == meant


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match=r"'arabc'.*nfkc, bengali, arabic"):
        make_normalizer("arabc", lowercase=True)
