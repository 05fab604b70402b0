"""Strangers' words made fit for everybody: one short line, nothing invisible, nobody's network address."""

import ipaddress
import re
import unicodedata

NAME_LENGTH = 40
LINE_LENGTH = 200
READ_LENGTH = 2_000  # more of a stranger's text is not even looked at
ADDRESS = re.compile(r"(?<![\w.])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}"
                     r"(?:\d{0,3}(?:\.\d{1,3}){3})?)(?![\w])")  # fmt: skip


def public_name(name: str) -> str:
    """A stranger's name as one short line: no control or invisible characters, which could reorder what is around it.

    It is still text and has to be escaped for the place where it is put.
    """
    return public_line(name, NAME_LENGTH) or "anonymous"


def public_line(text: str, length: int = LINE_LENGTH) -> str:
    """`text` on one line of at most `length` characters, without control characters and without IP addresses.

    An error's text may quote the address at which a volunteer could not be reached: that is nobody else's business.
    """
    visible = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text[:READ_LENGTH])
    line = without_addresses(" ".join(visible.split()))
    return line if len(line) <= length else f"{line[: length - 1]}…"


def without_addresses(text: str) -> str:
    """`text` with "[address]" in place of each IPv4 and IPv6 address."""
    return ADDRESS.sub(lambda found: "[address]" if _is_address(found[0]) else found[0], text)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return bool(re.fullmatch(r"[\d.]+", text))  # 999.1.1.1 and 010.0.0.1 are meant as one
    return True
