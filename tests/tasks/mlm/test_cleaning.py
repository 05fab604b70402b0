import pytest
from hypothesis import given
from hypothesis import strategies as st

from collab.errors import UserError
from tasks.mlm.cleaning import DEFAULT_RULES, RULES, make_cleaner
from tests.conftest import ARABIC, BENGALI

PIECES = [
    "<",
    ">",
    "<b>",
    "<br/>",
    "<!--",
    "-->",
    "<script>",
    "</script>",
    "&amp;",
    "&",
    "http://a.b",
    "@",
    "x@y.zz",
    "|",
]
PIECES += ["।", "ه", "?", "!!!!!", "\x00", "\ud83d", "\ude00", "\u200d", " ", "\n", "a", "নদী", "1111111"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "text",
    [
        "The committee's book-keeper is all right, RT said; see the URL of Moss and Ross & Co.",
        "if a < b and c > d: List<int> x; Map<String, List<T>> y; AT&T; R&D; a<b and c>d; <module>; f(x) <- y",
        "3.1415926535000000 10000000 ১০০০০০০ \u0660\u0660\u0660\u0660\u0660",
        "    def f():\n\n\n\n\n        return 1\t\t\t\t\tx",
        "good cool Schifffahrt www hmm... wait!!! -- so --- ok",
        *BENGALI,
        *ARABIC,
        "日本語。「はい！」 👩‍👩‍👧 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 भाषा ภาษา\u200bไทย",
        "table: | a | b |",
    ],
)
def test_clean_text_is_left_alone(rule, text):
    assert make_cleaner([rule])(text) == text


@pytest.mark.parametrize(
    ("rule", "text", "cleaned"),
    [
        (
            "controls",
            "a\x00b\x07c\x7f\x9f \ufeffsoft\xadhyphen \u202eleft\u202c zero\u200bwidth",
            "abc softhyphen left zerowidth",
        ),
        ("controls", "one\x1etwo\x1fthree", "one\ntwo\nthree"),
        ("markup", "<p class='x'>One <b>two</b></p><P>three<br/>four</P>", "\nOne two\n\nthree\nfour\n"),
        ("markup", "<tr><td>a</td><td>b</td></tr>", "\n a  b \n"),
        ("markup", 'see <a href="http://x.y/?a>b" target=_blank disabled>this</a>', "see this"),
        ("markup", "a<script type='x'>if (a<b) {}</script >b<style>p {}</STYLE>c<!-- d <b> -->e", "abce"),
        ("markup", "<!DOCTYPE html><?xml version='1.0'?>x", "\n\nx"),
        ("markup", "write <script> first, <!-- then &lt;b&gt;", "write <script> first, <!-- then <b>"),
        ("markup", "R&amp;D caf&eacute; &#2453;&#x995; &nbsp;&notit; &copy=1", "R&D café কক \xa0&notit; &copy=1"),
        (
            "urls",
            "See https://example.org/a(b)?c=d, or www.example.org. Mail a.b+c@mail.example.org!",
            "See , or . Mail !",
        ),
        ("urls", "见https://example.org/a。然后，(http://নদী.com/জল)।", "见。然后，()।"),
        ("urls", "@name, me @ home, a@b, http:// is a scheme", "@name, me @ home, a@b,  is a scheme"),
        ("bengali", "আমি যাই| তুমি৷", "আমি যাই। তুমি।"),
        ("arabic", "هل تسمع? نعم, 1,5; a, b?", "هل تسمع؟ نعم، 1,5; a, b?"),
        ("repeats", "Sooooo!!!!!!! -------- 😂😂😂😂😂 ।।।।।। good", "Sooo!!! --- 😂😂😂 ।।। good"),
    ],
)
def test_rules(rule, text, cleaned):
    assert make_cleaner([rule])(text) == cleaned


def test_rules_go_in_their_own_order():
    text = "&#60;&#33;&#33;&#33;&#33;&#33;<b>"
    assert make_cleaner(["repeats", "markup"])(text) == make_cleaner(["markup", "repeats"])(text) == "<!!!"


def test_invalid_unicode_is_made_valid_without_any_rule():
    clean = make_cleaner([])
    assert clean("a\ud83d\ude00b\ud83dc\ude00") == "a😀b\ufffdc\ufffd"
    assert clean(" <b>&amp;\x00!!!!!! ") == " <b>&amp;\x00!!!!!! "


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.characters()), max_size=40).map("".join))
def test_any_text_comes_out_as_valid_unicode_and_no_longer(text):
    cleaned = make_cleaner(list(RULES))(text)
    cleaned.encode()
    assert len(cleaned) <= len(text)


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.characters(codec="utf-8")), max_size=40).map("".join))
def test_the_default_rules_find_nothing_more_the_second_time(text):
    clean = make_cleaner(DEFAULT_RULES)
    assert clean(clean(text)) == clean(text)


@pytest.mark.parametrize(
    "piece", [*PIECES, "<a ", '<a x="', "<a x='\"", '<a x="<a x=" y="', "a@b.", "&#", "<!--<script>"]
)
def test_a_line_of_millions_of_the_same_mark(piece):
    # what takes quadratic time would not end here
    make_cleaner(list(RULES))(piece * (2_000_000 // len(piece)))


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match=r"no rule 'repeat'\. Did you mean repeats"):
        make_cleaner(["controls", "repeat"])
    with pytest.raises(UserError, match="There are markup, urls, controls"):
        make_cleaner(["xyz"])
