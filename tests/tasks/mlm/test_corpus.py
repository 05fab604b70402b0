import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from collab.errors import UserError
from tasks.mlm import corpus as module
from tasks.mlm.corpus import documents_of_module, embedded_documents, is_heldout, plain

ROOT = Path(__file__).parents[3]


def test_real_text_several_megabytes_of_it(tmp_path):
    found = embedded_documents(tmp_path)
    assert sum(map(len, found)) > 3_000_000
    assert len(set(found)) == len(found) > 1000
    assert any("context manager" in text for text in found)  # prose ...
    assert not any(line.startswith(">>>") for text in found for line in text.splitlines())  # ... and no sessions
    heldout = sum(map(is_heldout, found)) / len(found)
    assert 0.01 < heldout < 0.03


def test_cache_is_used_and_made_again_when_it_is_damaged_or_of_another_python(tmp_path, monkeypatch):
    first = embedded_documents(tmp_path, budget=50_000)
    [cache] = tmp_path.iterdir()
    monkeypatch.setattr(module, "documentation", lambda: iter(["anything else " * 100]))
    assert embedded_documents(tmp_path, budget=50_000) == first
    whole = cache.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole.replace(b"the", b"thx", 1), b"\xff\xfe", b"[]", b""):
        cache.write_bytes(damaged)
        assert embedded_documents(tmp_path, budget=50_000) == ["anything else " * 100]
    cache.write_bytes(whole)
    monkeypatch.setattr(module.sys, "version", "4.0")
    assert embedded_documents(tmp_path, budget=50_000) == ["anything else " * 100]


def test_same_order_in_another_process(tmp_path):
    program = (
        "import hashlib, pathlib, sys; from tasks.mlm.corpus import embedded_documents as read;"
        "print(hashlib.sha256('|'.join(read(pathlib.Path(sys.argv[1]), 200_000)).encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, tmp_path / name], capture_output=True, check=True, cwd=ROOT
        ).stdout
        for name in ("one", "two")
    }
    assert len(digests) == 1


def test_nothing_is_imported_or_run(tmp_path):
    file = tmp_path / "dangerous.py"
    file.write_text(f'"""A module. {"It says much. " * 20}"""\nraise SystemExit("was run")\n')
    assert next(documents_of_module(file)).startswith("A module. It says much.")


@pytest.mark.parametrize(
    "source", [b'"""unclosed', b'"""x"""\n\0', b"\xff\xfe\xfa" * 9, b'"""{{template}}"""\nprint "two"']
)
def test_files_that_are_no_python_are_passed_over(tmp_path, source):
    (tmp_path / "odd.py").write_bytes(source)
    assert list(documents_of_module(tmp_path / "odd.py")) == []


def test_a_broken_link_is_passed_over(tmp_path):
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    assert list(documents_of_module(tmp_path / "gone.py")) == []


def test_module_with_functions_and_class_with_methods_are_documents(tmp_path):
    (tmp_path / "code.py").write_text(
        '"""The module."""\ndef f():\n    """The function."""\n'
        'class A:\n    """The class."""\n    async def g(self):\n        """The method."""\n'
        '    class B:\n        """The inner class."""\n'
    )
    assert list(documents_of_module(tmp_path / "code.py")) == [
        "The module.\nThe function.",
        "The class.\nThe method.\nThe inner class.",
    ]


def test_plain_joins_lines_of_a_paragraph_and_drops_noise():
    docstring = ast.literal_eval(
        '''"""Return the :class:`Thing` of
    that :meth:`name <Thing.name>`.

    Notes
    -----
    - one point that
      goes on
    - another point

    :param size: how many
        there are
    :param weight: how heavy

    >>> thing(
    ...     1)
    'a result'
    """'''
    )
    assert plain(inspect.cleandoc(docstring)).splitlines() == [
        "Return the Thing of that name.",
        "Notes",
        "- one point that goes on",
        "- another point",
        ":param size: how many there are",
        ":param weight: how heavy",
        "'a result'",
    ]


def test_heldout_depends_on_the_text_alone():
    texts = [f"document number {number}" for number in range(20_000)]
    heldout = [text for text in texts if is_heldout(text)]
    assert 300 < len(heldout) < 500
    assert [text for text in reversed(texts) if is_heldout(text)] == heldout[::-1]
    assert not any(map(is_heldout, ["\ud800"]))  # half a character must not stop a run


def test_an_unwritable_cache_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        embedded_documents(tmp_path / "file" / "cache", budget=1000)
