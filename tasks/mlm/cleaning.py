"""Cleaning documents before they are cut: rules that a run names in its YAML, each linear in the length of the text."""

import difflib
import html
import html.entities
import re
from collections.abc import Callable, Sequence

import numpy as np

from collab.errors import UserError

DEFAULT_RULES = ("controls", "repeats")  # these destroy no text, whatever the corpus is
MOST_REPEATS = 3  # "!!!", "...", "---" and "sooo" are as people write; what is longer says no more
LONGEST_ENTITY = 33  # characters: &CounterClockwiseContourIntegral;

SURROGATE = re.compile("[\ud800-\udfff]")
# Without a glyph or a meaning for the words around them: C0 and C1 controls but white space, soft hyphens, marks for
# the direction of writing, invisible operators, byte order marks, noncharacters. The zero-width space stays in Thai,
# Lao, Burmese and Khmer, where it parts words; joiners and variation selectors are spelling and stay everywhere.
CONTROL = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\uffff]"
    "(?<!\ufffd)(?<![\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]\u200b)"
)
ASCII_CONTROLS = bytes([*range(9), *range(14, 28), 127])
SEPARATORS = str.maketrans(dict.fromkeys("\x1c\x1d\x1e\x1f", "\n"))  # of records in old formats

# `<b and c>` is no tag: an attribute has a value, or is one of HTML's switches. No quantifier gives back what it took,
# so that a tag is read once, whatever follows.
ATTRIBUTE = r"""[A-Za-z_:@][\w:.-]*+ \s*+ = \s*+ (?: "[^"]*+" | '[^']*+' | [^\s"'=<>`]++ )"""
SWITCH = r"(?: async|checked|controls|defer|disabled|hidden|loop|multiple|muted|nowrap|readonly|required|selected )\b"
TAG = re.compile(
    rf"""
    < (?: (?P<comment> !-- )
        | (?: !doctype | \?xml ) [^<>]*+ >
        | /?+ (?P<name> [a-z][a-z0-9]*+ ) (?: \s++ (?: {ATTRIBUTE} | {SWITCH} ) )*+ \s*+ /?+ >
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)
LINES = frozenset(
    """
    address article aside blockquote body br center dd details dialog div dl dt fieldset figcaption figure footer form
    h1 h2 h3 h4 h5 h6 head header hr html li main menu nav ol option p pre section select summary table tbody tfoot
    thead title tr ul
    """.split()  # noqa: SIM905
)
CELLS = frozenset(["td", "th"])
INLINE = frozenset(
    """
    a abbr acronym audio b base big button canvas caption cite code col colgroup del dfn em embed font i iframe img
    input ins kbd label legend link mark meta nobr noscript object optgroup param picture q rp rt ruby s samp script
    small source span strike strong style sub sup svg textarea time tt u var video wbr
    """.split()  # noqa: SIM905
)
NOT_TEXT = {name: re.compile(rf"</{name}\s*+>", re.IGNORECASE) for name in ("script", "style")}
ENTITY = re.compile(rf"&(?:#[0-9]{{1,7}}|#[xX][0-9a-fA-F]{{1,6}}|[A-Za-z][A-Za-z0-9]{{1,{LONGEST_ENTITY - 2}}});")

# An address ends at white space, quotes and brackets, and at the scripts that put no space after it.
ADDRESS = r"[^\s<>\"।॥،؛؟\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2000-\U0010ffff]"
URL = re.compile(rf"(?:https?://|\bwww\.\w){ADDRESS}*+")
MAIL_HOST = re.compile(r"@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})++")
MAIL_USER = re.compile(r"[\w.+-]{1,64}\Z")
AFTER_ADDRESS = ".,;:!?)]}'"

PIPE_DANDA = re.compile(r"[৷|](?:(?<=৷)|(?<=[\u0980-\u09ff]\|)(?=\s|\Z))")
ARABIC_MARKS = re.compile(r"[?,;](?<=[\u0620-\u064a\u066e-\u06d3].)(?=\s|\Z)")


def make_cleaner(names: Sequence[str]) -> Callable[[str], str]:
    """Build one function out of the rules in RULES that have these names.

    The rules are applied in the order of RULES, whatever the order of the names. A text that is no valid Unicode is
    made so even without any rule, because no tokenizer takes it otherwise.

    :param names: none for text that has been cleaned before
    :raises UserError: for a name that is not in RULES
    """
    for name in names:
        if name not in RULES:
            near = difflib.get_close_matches(str(name), RULES, n=1)
            known = f"Did you mean {near[0]}?" if near else f"There are {', '.join(RULES)}."
            raise UserError(f"`cleaning` has no rule {name!r}. {known}")
    rules = [rule for name, rule in RULES.items() if name in names]

    def clean(text: str) -> str:
        text = valid_unicode(text)
        for rule in rules:
            text = rule(text)
        return text

    return clean


def valid_unicode(text: str) -> str:
    """Join surrogates that belong together (JSON writes 😀 as two), and put U+FFFD in the place of others."""
    if text.isascii() or not SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def without_markup(text: str) -> str:
    """Remove HTML's tags, comments, scripts and style sheets, and resolve its entities.

    Only what is spelled as HTML has it is markup: `a < b`, `List<int>`, `<module>` and `AT&T` stay. Blocks become
    lines, cells are parted by spaces. A script that never ends is left alone, since it may be prose about scripts. Not
    for corpora that were made plain text before, where what looks like markup is text about markup.
    """
    if "<" in text:
        text = "".join(outside_tags(text))
    return ENTITY.sub(resolved, text) if "&" in text else text


def outside_tags(text: str) -> list[str]:
    kept = []
    done = start = 0  # text before `done` has been dealt with; the search goes on at `start`
    endless = set()
    while tag := TAG.search(text, start):
        start = tag.end()
        name = "comment" if tag["comment"] else (tag["name"] or "html").lower()
        if name not in LINES and name not in CELLS and name not in INLINE and name != "comment":
            continue
        end = start
        if name == "comment" or (name in NOT_TEXT and text[tag.start() + 1] != "/"):
            end = -1 if name in endless else end_of(name, text, start)
            if end < 0:
                endless.add(name)  # looking for it again and again would take quadratic time
                continue
        kept += [text[done : tag.start()], "\n" if name in LINES else " " if name in CELLS else ""]
        done = start = end
    kept.append(text[done:])
    return kept


def end_of(name: str, text: str, start: int) -> int:
    if name == "comment":
        end = text.find("-->", start)
        return end + 3 if end >= 0 else -1
    closing = NOT_TEXT[name].search(text, start)
    return closing.end() if closing else -1


def resolved(entity: re.Match[str]) -> str:
    if entity[0][1] == "#":
        return html.unescape(entity[0])
    return html.entities.html5.get(entity[0][1:], entity[0])  # html.unescape would read &notit; as ¬it;


def without_addresses(text: str) -> str:
    """Remove URLs and e-mail addresses; the punctuation after them stays."""
    if "://" in text or "www." in text:
        text = URL.sub(lambda url: url[0][len(url[0].rstrip(AFTER_ADDRESS)) :], text)
    if "@" not in text:
        return text
    kept = []
    done = 0
    for host in MAIL_HOST.finditer(text):
        user = MAIL_USER.search(text, max(done, host.start() - 64), host.start())
        if user:
            kept.append(text[done : user.start()])
            done = host.end()
    return "".join([*kept, text[done:]])


def without_controls(text: str) -> str:
    """Remove characters that show nothing; the separators of old record formats become line breaks."""
    text = text.encode().translate(None, ASCII_CONTROLS).decode() if text.isascii() else CONTROL.sub("", text)
    return text.translate(SEPARATORS) if any(map(text.__contains__, map(chr, SEPARATORS))) else text


def with_dandas(text: str) -> str:
    """Bengali: the danda has no key on many keyboards, so that | and the numerator ৷ are typed for it."""
    return PIPE_DANDA.sub("।", text) if "|" in text or "৷" in text else text


def with_arabic_marks(text: str) -> str:
    """Arabic, Persian, Urdu: question mark, comma and semicolon of a Latin keyboard, where they end an Arabic word."""
    return ARABIC_MARKS.sub(lambda mark: "؟،؛"["?,;".index(mark[0])], text) if not text.isascii() else text


def without_repeats(text: str) -> str:
    """Keep MOST_REPEATS of each character that is repeated more often, but all white space and digits."""
    encoding, width = ("ascii", np.uint8) if text.isascii() else ("utf-32-le", np.uint32)
    codes = np.frombuffer(text.encode(encoding), dtype=width)
    same = codes[1:] == codes[:-1]
    last = len(same) - MOST_REPEATS + 1
    surplus = np.logical_and.reduce([same[start : last + start] for start in range(MOST_REPEATS)])
    at = np.flatnonzero(surplus) + MOST_REPEATS
    if not len(at):
        return text
    meant = [code for code in np.unique(codes[at]) if chr(code).isspace() or chr(code).isdecimal()]
    at = at[~np.isin(codes[at], meant)]
    return np.delete(codes, at).tobytes().decode(encoding) if len(at) else text


RULES: dict[str, Callable[[str], str]] = {
    "markup": without_markup,
    "urls": without_addresses,
    "controls": without_controls,
    "bengali": with_dandas,
    "arabic": with_arabic_marks,
    "repeats": without_repeats,
}
