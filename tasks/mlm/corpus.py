"""The corpus that needs no download: the English documentation that every Python carries with it."""

import ast
import hashlib
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from collab.files import write_text

BUDGET = 6_000_000  # characters; reading that much out of the sources takes four to seven seconds
SHORTEST = 200  # characters: below, there is rarely a second sentence
FEWEST_DOCSTRINGS = 0.2  # share of a source file; parsing the files below costs most of the time and gives little text
HELDOUT = 50  # one document in this many
SKIPPED_FOLDERS = {"test", "tests", "site-packages"}

TRIPLE_QUOTED = re.compile(rb'"""(.*?)"""', re.DOTALL)
ROLE = re.compile(r":[\w:+.-]+:`([^`<]*?)\s*(?:<[^>]*>)?`")  # :class:`Thing` and :ref:`the text <label>`
SURROGATE = re.compile("[\ud800-\udfff]")
WORD = re.compile(r"[^\W_]")
NEW_PARAGRAPH = re.compile(r"([-*+•@]|\d+[.)]|[:\\.]\w|[\w*.]+ ?(\([^)]*\))? ?:)(\s|\w|$)")


def embedded_documents(cache_dir: Path, budget: int = BUDGET) -> list[str]:
    """Read the documentation topics of Python and the docstrings of its library and of the installed packages.

    The standard library comes first, then the packages by name, until the budget is reached; nothing is imported or
    run. A document is one topic, one class with its methods, or one module with its functions. Two machines with other
    packages have other documents, as two volunteers with other books would.

    :param cache_dir: folder for the result (`embedded_corpus.json`), so that only the first start takes seconds; it
      is made again when it is damaged, or when Python or the installed packages change
    :param budget: characters of text at which to stop; raise it for a run that would see the corpus too often
    :returns: distinct documents, in an order that is the same whenever the installed packages are the same
    :raises UserError: when the cache folder cannot be written
    """
    cache = Path(cache_dir) / "embedded_corpus.json"
    key = [sys.version, budget, sorted(entry.name for entry in site_packages().glob("*.dist-info"))]
    found = read_cache(cache, key)
    if found is not None:
        return found
    documents: dict[str, None] = {}
    size = 0
    for text in documentation():
        if len(text) >= SHORTEST and text not in documents and is_unicode(text):
            documents[text] = None
            size += len(text)
        if size >= budget:
            break
    write_text(cache, json.dumps({"key": key, "digest": digest(list(documents)), "documents": list(documents)}))
    return list(documents)


def is_heldout(text: str) -> bool:
    """Tell whether this document belongs to the held-out part, about 2 % of every corpus.

    The text alone decides, so that all peers hold out the same documents wherever and in whatever order they met them.
    """
    name = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(name, "big") % HELDOUT == 0


def read_cache(cache: Path, key: list) -> list[str] | None:
    """The documents in the cache, or None when there are none, they are of another Python, or the file is damaged."""
    try:
        content = json.loads(cache.read_bytes())
        if content["key"] == key and content["digest"] == digest(content["documents"]):
            return content["documents"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # whatever is wrong with it, it is made again
    return None


def digest(documents: list[str]) -> str:
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()


def is_unicode(text: str) -> bool:
    """Escapes in a docstring can spell half a surrogate pair, which is no text that can be written or tokenized."""
    return SURROGATE.search(text) is None


def site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def documentation() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    yield from topics(library / "pydoc_data" / "topics.py")
    for folder in (library, site_packages()):
        for entry in sorted(folder.iterdir()):
            for file in sorted(entry.rglob("*.py")) if entry.is_dir() else [entry]:
                is_text = file.suffix == ".py" and not SKIPPED_FOLDERS & set(file.relative_to(folder).parts)
                if is_text:
                    yield from documents_of_module(file)


def topics(file: Path) -> Iterator[str]:
    """The pages behind `help("LOOPING")`: one assignment of a dictionary of literals (some distributions omit it)."""
    if not file.exists():
        return
    for statement in ast.parse(file.read_bytes()).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for page in ast.literal_eval(statement.value).values():
                yield plain(page)


def documents_of_module(file: Path) -> Iterator[str]:
    try:
        source = file.read_bytes()
        if sum(map(len, TRIPLE_QUOTED.findall(source))) < FEWEST_DOCSTRINGS * len(source):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the escapes in other people's strings
            module = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return  # packages carry templates, sources of other Pythons and broken links
    yield "\n".join(filter(None, docstrings(module, recurse=False)))
    for statement in module.body:
        if isinstance(statement, ast.ClassDef):
            yield "\n".join(filter(None, docstrings(statement, recurse=True)))


def docstrings(node: ast.Module | ast.ClassDef, recurse: bool) -> Iterator[str]:
    """The docstring of a module or class and of the functions in it; with `recurse`, of the classes in it too."""
    yield plain(ast.get_docstring(node) or "")
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            yield plain(ast.get_docstring(statement) or "")
        elif recurse and isinstance(statement, ast.ClassDef):
            yield from docstrings(statement, recurse)


def plain(docstring: str) -> str:
    """Turn a docstring into running text: a paragraph on one line, without prompts, underlines and role names.

    Lines are joined because a line break in a docstring is no end of a sentence, while everywhere else in this task it
    is. Doctest prompts are dropped, what they print stays; tables and code examples stay too: they are real text.
    """
    paragraphs: list[str] = []
    previous_indent, joins = 0, False
    for line in docstring.expandtabs().splitlines():
        text = ROLE.sub(r"\1", line.strip())
        if not WORD.search(text) or text.startswith((">>>", "...")):
            joins = False
            continue
        indent = len(line) - len(line.lstrip())
        if joins and indent >= previous_indent and not NEW_PARAGRAPH.match(text):
            paragraphs[-1] += " " + text
        else:
            paragraphs.append(text)
        previous_indent, joins = indent, not text.endswith(":")
    return "\n".join(paragraphs)
