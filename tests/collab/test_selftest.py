"""A machine on which averaging would fail without a word is told so before it joins."""

import logging
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hivemind.compression import NoCompression, serialization

from collab.codecs import CODECS, BlockwiseInt8
from collab.errors import UserError
from collab.selftest import ERROR_BOUNDS, check_codecs, raise_file_limit

ROOT = Path(__file__).resolve().parents[2]


# ---- codecs ------------------------------------------------------------------------------------------------------


def test_here_every_codec_is_healthy(caplog):
    check_codecs(list(CODECS))
    assert ERROR_BOUNDS.keys() == CODECS.keys()


def refused(*names: str) -> str:
    with pytest.raises(UserError) as caught:
        check_codecs(names)
    assert "make setup" in str(caught.value) and "drift" in str(caught.value)
    return str(caught.value)


def test_a_codec_that_cannot_decode_is_told_with_its_reason(monkeypatch):
    """What numpy 2.4 does to hivemind's 8-bit codecs."""

    def extract(self, message):
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    monkeypatch.setattr(BlockwiseInt8, "extract", extract)
    message = refused("none", "int8")
    assert "'int8'" in message and "only 0-dimensional" in message
    check_codecs(["none", "scaled_float16"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensor: 1.05 * tensor,
        lambda tensor: tensor.flip(0),
        lambda tensor: torch.zeros_like(tensor),
        lambda tensor: torch.full_like(tensor, torch.nan),
        lambda tensor: tensor[:-1],
        lambda tensor: tensor.double(),
    ],
    ids=["scaled", "in another order", "zeros", "NaN", "shorter", "another dtype"],
)
def test_a_codec_that_returns_something_else_is_told(monkeypatch, damage):
    right = BlockwiseInt8.extract
    monkeypatch.setattr(BlockwiseInt8, "extract", lambda self, message: damage(right(self, message)))
    assert "'int8'" in refused("int8")


def test_a_codec_that_is_not_registered_is_told(monkeypatch):
    """The decoder is looked up in hivemind's table, not taken from our own."""
    stock = serialization.BlockwiseQuantization()
    monkeypatch.setitem(serialization._BASE_COMPRESSION_TYPES, "BLOCKWISE_8BIT", stock)
    assert "bitsandbytes" in refused("int8")


def test_a_wrong_answer_is_told(monkeypatch):
    """A reducer encodes it with the codec in hivemind's table, not with the one that the run chose."""

    class Doubling(BlockwiseInt8):
        def compress(self, tensor, *args, **kwargs):
            return super().compress(2 * tensor, *args, **kwargs)

    monkeypatch.setitem(serialization._BASE_COMPRESSION_TYPES, "BLOCKWISE_8BIT", Doubling())
    assert "'int8'" in refused("int8")


def test_the_smallest_change_of_an_exact_codec_is_told(monkeypatch):
    right = NoCompression.extract
    monkeypatch.setattr(NoCompression, "extract", lambda self, message: right(self, message) * (1 + 1e-6))
    assert "'none'" in refused("none")


# ---- open files --------------------------------------------------------------------------------------------------


LIMITS = """
    import logging, resource, sys
    from collab.selftest import raise_file_limit

    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    for limits in ((256, 5000), (4500, 5000), (256, 1024)):
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        raise_file_limit(4096)
        print(*resource.getrlimit(resource.RLIMIT_NOFILE), flush=True)
"""


@pytest.mark.skipif(
    0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 5000, reason="this machine admits fewer open files"
)
def test_the_limit_rises_as_far_as_is_wanted_and_the_machine_admits():
    """In a process of its own: a hard limit does not come back."""
    command = [sys.executable, "-c", textwrap.dedent(LIMITS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    raised, never_lowered, warning, admitted = done.stdout.splitlines()
    assert raised == "4096 5000" and never_lowered == "4500 5000" and admitted == "1024 1024"
    assert "1024 files" in warning and "ulimit -n 4096" in warning and "* hard nofile 4096" in warning


def test_too_few_files_are_refused(monkeypatch):
    monkeypatch.setattr("collab.selftest.possible_files", lambda wanted: 40)
    with pytest.raises(UserError, match=r"can open 40 files.*cannot take part.*ulimit -n 4096"):
        raise_file_limit(4096)


def test_enough_is_enough(caplog):
    with caplog.at_level(logging.WARNING):
        raise_file_limit(16)
    assert not caplog.records
