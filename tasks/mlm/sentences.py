"""Splitting text into sentences in many scripts, with rules alone: nothing is downloaded, nothing is lost."""

import re

# A full stop of the Latin script also ends abbreviations, initials and parts of numbers, so `ends_sentence` judges it.
# The marks of other scripts end a sentence wherever they stand. The Arabic semicolon and Greek ano teleia end none.
# Possessive quantifiers and the look-behind keep a line of ten thousand dots linear.
SENTENCE_END = re.compile(
    r"""
      (?<![.…?!]) (?P<marks> [.…?!]++ )   (?P<closing> ["'”’»›)\]}]*+ ) (?: \s+ | $ )
    | [؟۔।॥։።፧។៕။᠃᠉]+                  ["'”’»›)\]}]* \s*   # Arabic and Urdu, Indic, Armenian, Ethiopic, Khmer, Burmese
    | [。！？｡]+                        [」』】）》〉"'”’)]* \s*   # Chinese and Japanese: no space follows
    """,
    re.VERBOSE,
)
# After these a sentence goes on; a single letter ("J. R.", "z. B.", "ড.") needs no entry.
ABBREVIATION = re.compile(
    r"""
      mrs? | ms | drs? | prof | rev | hon | sr | jr | gen | col | capt | lt | sgt | gov | sen | rep | messrs
    | e\.g | i\.e | cf | vs | viz | al | approx | ca | nos | vols? | pp | figs? | eqs? | secs? | eds? | inc | ltd | dept
    | univ | jan | feb | apr | aug | sept? | oct | nov | dec
    | bzw | evtl | ggf | inkl | nr | usw | vgl | mme | mlle | sra | srta | dra | uds? | págs? | núm | sigg? | dott | avv
    """,
    re.VERBOSE | re.IGNORECASE,
)
BEFORE_NUMBER = re.compile(r"no|art|ch|p", re.IGNORECASE)  # words by themselves, abbreviations before a number
LAST_WORD = re.compile(r"[^\W_](?:[\w.'’-]*\w)?$")


def split_sentences(text: str) -> list[str]:
    """Split `text` into its sentences, each stripped of the white space around it; none is empty.

    A line break ends a sentence, as paragraphs do in corpora with one paragraph on a line. Joined together, the
    sentences hold every character of the text except white space. Languages that write no mark at all between
    sentences (Thai, Lao) give one sentence for a paragraph; the code that packs sentences into instances cuts it.
    """
    return [sentence for line in text.splitlines() for sentence in sentences_of_line(line)]


def sentences_of_line(line: str) -> list[str]:
    sentences = []
    start = 0
    for mark in SENTENCE_END.finditer(line):
        if mark["marks"] is None or ends_sentence(line, start, mark):
            sentences.append(line[start : mark.end()].strip())
            start = mark.end()
    sentences.append(line[start:].strip())
    return [sentence for sentence in sentences if sentence]


def ends_sentence(line: str, start: int, mark: re.Match[str]) -> bool:
    """Tell whether the marks of the Latin script found in `mark` end the sentence that began at `start`."""
    if not set(mark["marks"]) <= set(".…"):
        return True
    following = line[mark.end() : mark.end() + 1]
    if following.islower():
        return False  # "approx. three", "Wait... what"
    last_word = LAST_WORD.search(line, max(start, mark.start() - 20), mark.start())
    if last_word is None or len(mark["marks"]) > 1 or mark["closing"]:
        return True
    word = last_word[0]
    if word.isdigit() and not line[start : last_word.start()].strip():
        return False  # "1. The first point"
    if following.isdigit() and BEFORE_NUMBER.fullmatch(word):
        return False
    is_initial = len(word) == 1 and word.isalpha() and word != "I"
    return not is_initial and not ABBREVIATION.fullmatch(word)
