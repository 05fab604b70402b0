"""What a stranger may send: any value, and real messages with damage; and what must not happen while it is read."""

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

import psutil
from hivemind.utils import ValueWithExpiration
from hypothesis import strategies as st

HANG_SECONDS = 20
SPARE_BYTES = 1 << 30
FORBIDDEN = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"}

_watching = False
_seen: list[str] = []


def _note(event: str, _arguments: tuple[Any, ...]) -> None:
    if _watching and event in FORBIDDEN:
        _seen.append(event)


sys.addaudithook(_note)  # for good, as Python has it


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Whatever is read in here does not hang, takes no gigabyte, starts nothing, connects to nobody."""
    global _watching
    _seen.clear()

    def hang(*_: object) -> None:
        raise AssertionError(f"it hung for {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    memory = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + SPARE_BYTES, memory[1]))
    signal.alarm(HANG_SECONDS)
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, memory)
        signal.signal(signal.SIGALRM, before)
    assert not _seen, f"it did {_seen}"


NUMBERS = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 1e308, -0.0, 1e-320, float("nan"), float("inf")]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20), st.binary(max_size=40))
KEYS = st.one_of(st.text(max_size=12), st.binary(max_size=12), st.integers(-3, 3))
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=10
)
"""What MessagePack and the DHT can carry."""
JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=10,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A real message with up to four pieces cut out, put in, repeated or overwritten; sometimes the message itself."""
    data = whole
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 1, 2, 4, 8, 64, 10**9])))
        patch = draw(st.one_of(st.binary(max_size=12), st.just(data[start:end] * 2), st.just(b"\x00" * (end - start))))
        data = data[:start] + patch[: len(whole) + 64] + data[end:]
    return data


@st.composite
def altered(draw: st.DrawFn, whole: dict[str, Any], values: st.SearchStrategy[Any] = VALUES) -> dict[str, Any]:
    """A real record in which some fields have other values, are missing, or are new."""
    record = dict(whole)
    for name in draw(st.lists(st.sampled_from(sorted(whole)), max_size=4)):
        record[name] = draw(values)
    for name in draw(st.lists(st.sampled_from(sorted(whole)), max_size=1)):
        record.pop(name)
    return record | draw(st.dictionaries(st.text(max_size=8), values, max_size=1))


def answers(keys: st.SearchStrategy[Any], values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What `DHT.get` may give for a key under which peers keep a record each."""
    expiration = st.floats(0, 1e12)
    entry = st.builds(ValueWithExpiration, values, expiration)
    told = st.dictionaries(keys, entry | values, max_size=4) | values
    return st.none() | st.builds(ValueWithExpiration, told, expiration)


def examples(most: int = 150) -> int:
    """How many inputs to try: `SAMITI_FUZZ=40` makes it 40 times as many (`make fuzz`)."""
    return int(most * float(os.environ.get("SAMITI_FUZZ", "1")))
