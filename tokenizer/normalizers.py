"""The normalisers of languages: one part of the tokenizer, so that a published model reads as it was trained."""

from tokenizers import Regex
from tokenizers import normalizers as parts

from collab.errors import UserError

JOINERS = r"[\x{200c}\x{200d}]"
BENGALI = r"\x{0980}-\x{09cc}\x{09ce}-\x{09ff}"  # without the hasanta
ARABIC = r"\x{0610}-\x{061a}\x{0620}-\x{064a}\x{0653}-\x{06ed}\x{06fa}-\x{06ff}\x{0750}-\x{077f}\x{08a0}-\x{08c9}"

# What each of them does after NFKC and before lower-casing: regular expressions (Oniguruma's) and what stands in the
# place of what they match. A new language is a new entry. A rule must not look across white space, because words are
# encoded one by one, and must find nothing more when it is applied again; tests hold every entry to both.
NORMALIZERS: dict[str, tuple[tuple[str, str], ...]] = {
    "nfkc": (),
    # NFKC spells ড়, ঢ়, য় with a nukta of its own and ো, ৌ as one sign, however they were typed. Bengali.AI's and the
    # Indic NLP Library's normalisers go on to remove every joiner (but that of র‍্য) and to rewrite rare letters; here
    # only what looks the same becomes the same.
    "bengali": (
        (r"\x{0985}\x{09be}", "\u0986"),  # অ + া: Unicode (chapter 12.2) has আ as the one spelling
        (r"\x{09f7}", "\u0964"),  # the numerator ৷ typed for a danda
        # A joiner says something beside a hasanta only (র‍্যাব, ক্‌ষ); elsewhere keyboards and web pages left it.
        (rf"(?<=[\x{{09cd}}{BENGALI}]{JOINERS}){JOINERS}+", ""),
        (r"\x{09a4}\x{09cd}\x{200d}(?![\x{0995}-\x{09b9}])", "\u09ce"),  # ৎ before Unicode 4.1
        (rf"(?<![\x{{09cd}}{BENGALI}]){JOINERS}+(?=[{BENGALI}])", ""),
        (rf"(?<=[{BENGALI}]){JOINERS}(?!\x{{09cd}})", ""),
    ),
    # NFKC makes letters of the presentation forms (ﻻ is ل and ا). As AraBERT's preprocessing (Antoun et al. 2020), it
    # drops vowel marks and tatweel, and leaves أ إ آ ى ة alone, which others fold at the cost of meaning. Persian and
    # Urdu need the non-joiner inside words.
    "arabic": (
        (r"[\x{064b}-\x{0652}]", ""),  # tanwin, short vowels, shadda, sukun
        (r"\x{0640}+(?![\x{0653}-\x{0655}\x{0670}])", ""),  # tatweel, unless it carries a hamza or a small alef
        (rf"(?<=[{ARABIC}]{JOINERS}){JOINERS}+", ""),
        (rf"(?<![{ARABIC}])\x{{200c}}+(?=[{ARABIC}])", ""),
        (rf"(?<=[{ARABIC}])\x{{200c}}(?![{ARABIC}])", ""),
    ),
}


def make_normalizer(name: str, lowercase: bool) -> parts.Normalizer:
    """NFKC, the rules of the language and, if wanted, lower-casing, as they are written into tokenizer.json.

    :param name: a key of NORMALIZERS
    :raises UserError: for any other name
    """
    if name not in NORMALIZERS:
        raise UserError(f"There is no normalizer {name!r}. Set `normalizer` to one of {', '.join(NORMALIZERS)}.")
    rules: list[parts.Normalizer] = [
        parts.Replace(Regex(pattern), replacement) for pattern, replacement in NORMALIZERS[name]
    ]
    if rules:
        rules.append(parts.NFC())  # what a joiner has kept apart may go together now
    return parts.Sequence([parts.NFKC(), *rules, *([parts.Lowercase()] if lowercase else [])])
