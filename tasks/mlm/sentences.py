"""Splitting text into sentences in many scripts, with rules alone: nothing is downloaded, nothing is lost."""

import re
from collections.abc import Iterator

# A full stop of the Latin script also ends abbreviations, initials and parts of numbers, so `ends_sentence` judges it.
# The marks of other scripts end a sentence wherever they stand. The Arabic semicolon and Greek ano teleia end none.
# The pattern begins with one set of characters because `re` runs through ordinary text ten times as fast then.
# Possessive quantifiers and the look-behind of two keep a line of ten thousand dots linear.
SENTENCE_END = re.compile(
    r"""
    [.…?!؟۔।॥։።፧។៕။᠃᠉。！？｡]
    (?:
        (?<=[.…?!]) (?<![.…?!]{2}) [.…?!]*+      (?P<closing> ["'”’»›)\]}]*+ ) (?: \s+ | $ )
      # Arabic and Urdu, Indic, Armenian, Ethiopic, Khmer, Burmese
      | (?<=[؟۔।॥։።፧។៕။᠃᠉]) [؟۔।॥։።፧។៕။᠃᠉]*+  ["'”’»›)\]}]*+ \s*+
      # Chinese and Japanese: no space follows
      | (?<=[。！？｡]) [。！？｡]*+                [」』】）》〉"'”’)]*+ \s*+
    )
    """,
    re.VERBOSE,
)
# After these a sentence goes on; a single letter ("J. R.", "z. B.", "ড.") needs no entry.
ABBREVIATIONS = frozenset(
    """
    mr mrs ms dr drs prof rev hon sr jr gen col capt lt sgt gov sen rep messrs
    e.g i.e cf vs viz al approx ca nos vol vols pp fig figs eq eqs sec secs ed eds inc ltd dept
    univ jan feb apr aug sep sept oct nov dec
    bzw evtl ggf inkl nr usw vgl mme mlle sra srta dra ud uds pág págs núm sig sigg dott avv
    """.split()  # noqa: SIM905 (a list of words reads better without their quotes)
)
BEFORE_NUMBER = frozenset(["no", "art", "ch", "p"])  # words by themselves, abbreviations before a number
LONGEST = max(map(len, ABBREVIATIONS))
LAST_SPACE = re.compile(r"\s\S*\Z")
LAST_WORD = re.compile(r"[^\W_](?:[\w.'’-]*\w)?\Z")


def split_sentences(text: str) -> list[str]:
    """Split `text` into its sentences, each stripped of the white space around it; none is empty.

    A line break ends a sentence, as paragraphs do in corpora with one paragraph on a line. Joined together, the
    sentences hold every character of the text except white space. Languages that write no mark at all between
    sentences (Thai, Lao) give one sentence for a paragraph; the code that packs sentences into instances cuts it.
    """
    sentences = []
    for line in text.splitlines():
        start = 0
        for mark in SENTENCE_END.finditer(line):
            if mark.end() == len(line):
                break  # whatever the mark says, the sentence ends with the line
            if mark["closing"] is None or ends_sentence(line, start, mark):
                sentences.append(line[start : mark.end()].strip())
                start = mark.end()
        rest = line[start:].strip()
        if rest:
            sentences.append(rest)
    return sentences


def ends_sentence(line: str, start: int, mark: re.Match[str]) -> bool:
    """Tell whether the marks of the Latin script found in `mark` end the sentence that began at `start`."""
    stop = mark.start()
    marks = line[stop : mark.start("closing")]
    if "?" in marks or "!" in marks:
        return True
    following = line[mark.end() : mark.end() + 1]
    if following.islower():
        return False  # "approx. three", "Wait... what"
    if len(marks) > 1 or mark["closing"]:
        return True
    if stop - start > LONGEST and line[stop - LONGEST - 1 : stop].isalpha():
        return True  # what follows would say the same of so long a word, and takes five times as long
    last_word = LAST_WORD.search(line, max(start, stop - 20, line.rfind(" ", start, stop) + 1), stop)
    if last_word is None:
        return True
    word = last_word[0]
    if word.isdigit() and not line[start : last_word.start()].strip():
        return False  # "1. The first point"
    if following.isdigit() and word.lower() in BEFORE_NUMBER:
        return False
    is_initial = len(word) == 1 and word.isalpha() and word != "I"
    return not is_initial and word.lower() not in ABBREVIATIONS


def cut_at_spaces(text: str, most: int) -> Iterator[str]:
    """Cut `text` into pieces of at most `most` characters: before white space, or in a word that is longer."""
    start = 0
    while len(text) - start > most:
        window = text[start : start + most + 1]
        space = LAST_SPACE.search(window, 1)
        end = start + (space.start() if space else most)
        yield text[start:end]
        start = end
    yield text[start:]
