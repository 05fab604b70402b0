"""Names that strangers give themselves, for people to read."""

import unicodedata

NAME_LENGTH = 40


def public_name(name: str, length: int = NAME_LENGTH) -> str:
    """A stranger's name as one short line: no control or invisible characters, which could reorder what is around it.

    It is still text and has to be escaped for the place where it is put.
    """
    visible = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in name)
    line = " ".join(visible.split()) or "anonymous"
    return line if len(line) <= length else f"{line[: length - 1]}…"
