"""Strangers' words: short, visible, and without anybody's address."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collab.public_text import LINE_LENGTH, public_line, public_name


@pytest.mark.parametrize(
    "text, shown",
    [
        ("dial /ip4/203.0.113.7/tcp/31337 failed", "dial /ip4/[address]/tcp/31337 failed"),
        ("dial /ip6/2001:db8::1/tcp/1 failed", "dial /ip6/[address]/tcp/1 failed"),
        ("from [::ffff:192.0.2.1]:80", "from [[address]]:80"),
        ("at 12:34:56 step 1.5 of hivemind 1.1.12", "at 12:34:56 step 1.5 of hivemind 1.1.12"),
        ("10.0.0.1", "[address]"),
    ],
)
def test_addresses_are_taken_out_and_nothing_else(text: str, shown: str) -> None:
    assert public_line(text) == shown


@given(st.ip_addresses(), st.text(max_size=20), st.text(max_size=20))
def test_no_address_survives(address: ipaddress.IPv4Address | ipaddress.IPv6Address, before: str, after: str) -> None:
    if len(str(address)) >= 7:  # "::1" is nobody's
        assert str(address) not in public_line(f"{before} {address} {after}")


@given(st.text(max_size=300))
def test_any_text_becomes_one_visible_line(text: str) -> None:
    line = public_line(text)
    assert line.isprintable() or "\n" not in line
    assert len(line) <= LINE_LENGTH and len(line.splitlines()) <= 1


def test_ten_megabytes_of_text_cost_nothing() -> None:
    assert len(public_name("x" * 10_000_000)) == 40
