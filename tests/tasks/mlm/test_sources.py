import bz2
import gzip
import itertools
import json
import lzma
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from collab.errors import UserError
from tasks.mlm import local_files
from tasks.mlm import sources as module
from tasks.mlm.corpus import is_heldout
from tasks.mlm.sources import Source, documents

ROOT = Path(__file__).parents[3]
RANDOM = np.random.default_rng(0)
TEXTS = [f"{number} {RANDOM.bytes(40).hex()}\n{RANDOM.bytes(10).hex()}" for number in range(4000)]
TRAIN = [text for text in TEXTS if not is_heldout(text)]
HELDOUT = [text for text in TEXTS if is_heldout(text)]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def json_lines(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, column: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def parquet(texts: list[Any], rows: int = 100, **more: list[Any]) -> bytes:
    buffer = BytesIO()
    pq.write_table(pa.table({"text": texts, **more}), buffer, row_group_size=rows)
    return buffer.getvalue()


def encoded(kind: str, texts: list[str] = TEXTS) -> bytes:
    """A file of the given ending, such as .jsonl.gz, with these texts."""
    if kind == ".parquet":
        return parquet(texts)
    form, compression = re.fullmatch(r"(\.\w+?)(\.\w+)?", kind).groups()  # type: ignore[union-attr]
    return COMPRESS[compression or ""](json_lines(texts) if form == ".jsonl" else "\n\n".join(texts).encode())


KINDS = [".parquet", *(form + compression for form in (".txt", ".jsonl") for compression in COMPRESS)]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Iterator[str]]:
    """Read sources, written as in the YAML, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)

    def read(*mappings: dict, part: Any = "train", place: str = "here", seed: int = 0, **more: Any) -> Iterator[str]:
        sources = [Source.from_mapping(mapping) for mapping in mappings]
        return documents(sources, seed=seed, place=place, part=part, cache_dir=tmp_path, shuffle_buffer=100, **more)

    return read


@pytest.fixture(params=["in memory", "streamed"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "streamed":
        monkeypatch.setattr(module, "IN_MEMORY", 1)
        monkeypatch.setattr(local_files, "SLICE", 5000)
        monkeypatch.setattr(module, "SLICE", 5000)
    return request.param


# ------------------------------------------------------------------------------------------------- what stands in YAML


def test_defaults_and_all_keys():
    assert Source.from_mapping({"embedded": True}) == Source(embedded=True, weight=1.0)
    assert Source.from_mapping({"files": "a.txt", "weight": 2}) == Source(files="a.txt", weight=2)
    keys: dict[str, Any] = {
        "hub": "a/b",
        "config": "c",
        "split": "s",
        "column": "t",
        "revision": "r",
        "private": True,
        "weight": 0.5,
    }
    assert Source.from_mapping(keys) == Source(**keys)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("embedded", "str where a mapping is meant"),
        ({"hubs": "a/b"}, "'hubs' that no source has. Did you mean hub"),
        ({"hub": "a/b", "colum": "x"}, "'colum' .* Did you mean column"),
        ({"hub": "a/b", "token": "hf_x"}, "'token' that no source has. Keys: "),
        ({"weight": 1.0}, "no kind"),
        ({"hub": "a/b", "files": "c"}, "hub and files"),
        ({"embedded": True, "column": "x"}, "`column` has no meaning for a source with `embedded`"),
        ({"files": "a", "private": True}, "`private` has no meaning"),
        ({"embedded": False}, "names no text"),
        ({"embedded": "yes"}, "true or false"),
        ({"hub": 3}, "a text in quotes"),
        ({"hub": ""}, "a text in quotes"),
        ({"hub": "a/b", "config": 20231101}, "a text in quotes"),
        ({"files": "a", "weight": "1"}, "a number"),
        ({"files": "a", "weight": True}, "a number"),
        ({"files": "a", "weight": 0}, "not above 0"),
        ({"files": "a", "weight": -1.0}, "not above 0"),
        ({"files": "a", "weight": float("nan")}, "not above 0"),
    ],
)
def test_a_wrong_entry_is_named(mapping, message):
    with pytest.raises(UserError, match=message):
        Source.from_mapping(mapping)


def test_no_sources_at_all(read):
    with pytest.raises(UserError, match="`sources` is empty"):
        read()


# ------------------------------------------------------------------------------------------------- local files


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_gives_every_document_once_and_the_parts_are_disjoint(read, size, kind):
    Path(f"corpus{kind}").write_bytes(encoded(kind))
    source = {"files": f"corpus{kind}"}
    if size == "streamed" and kind == ".txt":  # documents that cross the end of a slice become two
        lines = Counter(line for text in TEXTS for line in text.splitlines())
        everything = [*read(source, endless=False), *read(source, part="heldout")]
        assert Counter(line for text in everything for line in text.splitlines()) == lines
        assert len(TEXTS) <= len(everything) < len(TEXTS) + 200
        return
    assert sorted(read(source, endless=False)) == sorted(TRAIN)
    assert list(read(source, part="heldout")) == HELDOUT
    endless = list(itertools.islice(read(source), 2 * len(TRAIN)))
    assert Counter(endless) == dict.fromkeys(TRAIN, 2)
    assert endless[: len(TRAIN)] != endless[len(TRAIN) :]  # the second time in another order


@pytest.mark.parametrize("kind", [".parquet", ".txt", ".jsonl", ".txt.gz", ".jsonl.gz"])
@pytest.mark.parametrize("files", [1, 4])
def test_two_places_share_no_more_than_chance(read, size, kind, files):
    for number in range(files):
        Path(f"part{number}{kind}").write_bytes(encoded(kind, TEXTS[number::files]))
    shared = []
    for pair in range(12):
        one, two = (set(itertools.islice(read({"files": "part*"}, place=f"peer {pair} {side}"), 300)) for side in "ab")
        shared.append(len(one & two) / 300)
    # Chance is 300 of 3,900; a shuffle buffer of 100 alone would share three quarters. A single file that can only be
    # read from somewhere in its middle on gives two peers windows that overlap now and then.
    assert np.mean(shared) < (0.25 if size == "streamed" and kind.count(".") > 1 else 0.12)


def test_same_seed_and_place_give_the_same_order_and_another_seed_another(read, size):
    Path("corpus.txt").write_bytes(encoded(".txt"))
    first, again, other = (list(itertools.islice(read({"files": "*.txt"}, seed=seed), 500)) for seed in (1, 1, 2))
    assert first == again != other


def test_two_sources_with_the_same_text_have_orders_of_their_own(read):
    for name in ("one", "two"):
        Path(f"{name}.jsonl").write_bytes(encoded(".jsonl", TRAIN))
    drawn = list(itertools.islice(read({"files": "one.jsonl"}, {"files": "two.jsonl"}), 1000))
    assert len(set(drawn)) > 900  # the same order twice would give each document twice


def test_heldout_is_the_same_for_everyone(read, size):
    Path("corpus.jsonl").write_bytes(encoded(".jsonl"))
    sources = [{"files": "*.jsonl"}, {"files": "*.jsonl", "weight": 3.0}]
    one, two = (list(read(*sources, part="heldout", place=place)) for place in ("a", "b"))
    assert one == two
    assert Counter(one) == dict.fromkeys(HELDOUT, 2)


def test_an_endless_mixture_keeps_its_weights_when_a_source_starts_over(read):
    Path("small.txt").write_text("\n\n".join(f"small {number}" for number in range(50)))
    Path("large.txt").write_text("\n\n".join(f"large {number}" for number in range(5000)))
    mixture = read({"files": "small.txt", "weight": 3}, {"files": "large.txt", "weight": 1})
    for _ in range(3):
        drawn = Counter(text.split()[0] for text in itertools.islice(mixture, 2000))
        assert drawn["small"] / 2000 == pytest.approx(0.75, abs=0.04)


def test_embedded_corpus_is_a_source(read, tmp_path, monkeypatch, corpus):
    monkeypatch.setattr(module, "embedded_documents", lambda cache_dir: corpus)
    train = [text for text in corpus if not is_heldout(text)]
    assert sorted(read({"embedded": True}, endless=False)) == sorted(train)
    assert [*read({"embedded": True}, place="a", endless=False)] != [
        *read({"embedded": True}, place="b", endless=False)
    ]


def test_pattern_reaches_into_folders_and_layouts_are_read_as_documented(read):
    Path("a/b").mkdir(parents=True)
    Path("a/b/one.txt").write_bytes("\ufefffirst\r\nstill first\r\n \r\nsecond".encode())
    Path("a/two.jsonl").write_text('{"body": "third"}\n\n{"body": null}\n{"body": " "}\n{"body": "half \\ud83d"}\n')
    Path("a/three.parquet").write_bytes(parquet([1, 2], body=["fourth", None]))
    expected = ["first\r\nstill first", "fourth", "half \ufffd", "second", "third"]
    for pattern in ("a/**/*.*", f"{Path.cwd()}/a/**/*.*"):
        assert sorted(read({"files": pattern, "column": "body"}, endless=False)) == expected


def test_several_frames_in_a_zstandard_file(read):
    frames = [COMPRESS[".zst"]("\n\n".join(part).encode() + b"\n\n") for part in (TRAIN[:500], TRAIN[500:900])]
    Path("corpus.txt.zst").write_bytes(b"".join(frames))
    assert sorted(read({"files": "*.zst"}, endless=False)) == sorted(TRAIN[:900])


WRONG_FILES: dict[str, tuple[str, bytes, str]] = {
    "not UTF-8": ("a.txt", b"good\n\n" + "café".encode("latin-1"), r"a.txt is not UTF-8: byte 9 .* 0xe9.*iconv"),
    "not UTF-8, compressed": ("a.jsonl.gz", gzip.compress(b'{"text": "\xff"}'), "byte 10 of its text is 0xff"),
    "no JSON": ("a.jsonl", b'{"text": "x"}\n{"text": ', "line at byte 14 of a.jsonl is not JSON"),
    "a JSON list": ("a.jsonl", b"[1]", "not a JSON object but list"),
    "no column": ("a.jsonl", b'{"body": "x", "id": 1}', "no column 'text'; it has body, id.*`column: NAME`"),
    "no text": ("a.jsonl", b'{"text": [1]}', "holds list in the column 'text'"),
    "no column, Parquet": ("a.parquet", parquet([1]).replace(b"text", b"tixt"), "no column 'text'; it has tixt"),
    "no text, Parquet": ("a.parquet", parquet([1, 2]), "holds int64 in the column 'text'"),
    "unreadable Parquet": ("a.parquet", b"PAR1 this is none PAR1", "a.parquet cannot be read to its end"),
    "cut Parquet": ("a.parquet", parquet(TEXTS)[:-2000], "a.parquet cannot be read to its end"),
    "damaged Parquet": ("a.parquet", bytes(30_000) + parquet(TEXTS)[30_000:], "a.parquet cannot be read to its end"),
    "no gzip": ("a.txt.gz", b"plain text", "a.txt.gz cannot be read to its end"),
    "unknown kind": ("a.doc", b"x", "a.doc is of no kind that can be read"),
    "empty": ("a.txt", b"", "no document in the files a.txt at all: it was read to its end"),
    "white space": ("a.jsonl", b'{"text": " "}\n{"text": null}\n', "no document in the files a.jsonl"),
} | {
    f"cut {kind}": (f"a{kind}", encoded(kind)[:-40], rf"a{kind} cannot be read to its end.*Copy or download it again")
    for kind in KINDS
    if kind.startswith(".txt.")
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_file_is_one_sentence_that_names_it(read, size, case):
    name, content, message = WRONG_FILES[case]
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(itertools.islice(read({"files": name}), 100_000))


def test_no_file_matches(read, tmp_path):
    with pytest.raises(UserError, match=rf"No file matches `files: data/\*.txt`, seen from the folder {tmp_path}"):
        read({"files": "data/*.txt"})


def test_a_file_that_may_not_be_read(read, monkeypatch):
    Path("a.txt").write_text("x")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a.txt cannot be read to its end: .*Permission denied"):
        read({"files": "a.txt"})


def test_only_heldout_documents_do_not_loop_for_ever(read):
    Path("a.txt").write_text(HELDOUT[0])
    with pytest.raises(UserError, match="its 1 documents fell into the held-out part"):
        next(read({"files": "a.txt"}))
    assert list(read({"files": "a.txt"}, part="heldout")) == HELDOUT[:1]


# ------------------------------------------------------------------------------------------------- the Hub
# The real client of `datasets` against a server on this machine that speaks as much of the Hub's API as it needs. In a
# process of its own: the clients read HF_ENDPOINT when they are imported.

CONFIGS = b"---\nconfigs:\n" + b"".join(
    b"- config_name: %b\n  data_files: %b/*\n" % (name, name) for name in (b"rows", b"damaged", b"broken")
) + b"---\n"  # fmt: skip
HUB_FILES = {
    "us/texts": {
        "README.md": CONFIGS,
        "rows/0.parquet": parquet(TEXTS[:500], rows=50, id=list(range(500))),
        "rows/1.parquet": parquet(TEXTS[500:1000], rows=50, id=list(range(500))),
        "damaged/0.parquet": b"PAR1 this is none PAR1",
        "broken/0.parquet": parquet(TEXTS[:100]),
    },
    "us/lines": {"train.jsonl": json_lines(TEXTS[:300])},
}
HUB_FILES["us/secret"] = HUB_FILES["us/lines"]
COMMIT = "a" * 40
TOKEN = "hf_of_a_friend"


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, content: Any) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = re.fullmatch(r"/(api/)?datasets/(us/\w+)(?:/(\w+|paths-info)/([^/]+)/?(.*))?", self.path.split("?")[0])
        api, repo, verb, revision, name = found.groups("") if found else [""] * 5
        secret = repo == "us/secret" and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        if repo not in HUB_FILES or secret:
            return self.answer(401 if secret else 404, X_Error_Code="RepoNotFound")
        if revision not in ("", "main", COMMIT):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = HUB_FILES[repo]
        if name.startswith("broken/") and self.command == "GET" and not api:
            self.close_connection = True  # as a router that goes down in the middle of a download
            return None
        if not api:
            return self.answer_file(files.get(name))
        if verb == "tree":
            return self.answer_json(listing(files, name))
        if verb == "paths-info":
            entries = [entry for folder in ("", "rows", "damaged", "broken") for entry in listing(files, folder)]
            return self.answer_json([entry for entry in entries if entry["path"] in parse_qs(body.decode())["paths"]])
        siblings = [{"rfilename": file} for file in files]
        return self.answer_json({"id": repo, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    do_GET = do_HEAD = do_POST = handle_request

    def answer_file(self, content: bytes | None) -> None:
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        headers = {"X_Repo_Commit": COMMIT, "ETag": f'"{len(content)}"', "X_Linked_Size": str(len(content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.answer(200, content, **headers)
        start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1)
        span = f"bytes {start}-{stop}/{len(content)}"
        return self.answer(206, content[start : stop + 1], Content_Range=span, **headers)


def listing(files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
    inside = [name for name in files if name.startswith(f"{folder}/" if folder else "")]
    below = {name.split("/")[0] for name in inside if "/" in name and not folder}
    return [{"type": "directory", "path": name, "oid": COMMIT} for name in sorted(below)] + [
        {"type": "file", "path": name, "size": len(files[name]), "oid": COMMIT}
        for name in inside
        if name.count("/") == bool(folder)
    ]


READ_FROM_HUB = """
import json, os, pathlib, sys, time
time.sleep = lambda seconds: None  # the client waits half a minute between its attempts
from collab.errors import UserError
from tasks.mlm.sources import Source, documents
results = []
for case in json.loads(sys.argv[1]):
    if "login" in case:
        pathlib.Path(os.environ["HF_HOME"], "token").write_text(case["login"])
        continue
    options = {"seed": 0, "cache_dir": pathlib.Path(), "shuffle_buffer": 50, "endless": False} | case["options"]
    try:
        results.append(list(documents([Source.from_mapping(case["source"])], **options)))
    except UserError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def read_from_hub(endpoint: str, home: Path, cases: list[dict[str, Any]]) -> list[Any]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", READ_FROM_HUB, json.dumps(cases)], cwd=ROOT, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def case(part: str = "train", place: str = "here", **source: Any) -> dict[str, Any]:
    return {"source": {"hub": "us/texts"} | source, "options": {"part": part, "place": place}}


HUB_CASES = {
    "rows": case(config="rows"),
    "rows again": case(config="rows"),
    "rows elsewhere": case(config="rows", place="there"),
    "rows held out": case(config="rows", part="heldout"),
    "lines": case(hub="us/lines"),
    "lines held out": case(hub="us/lines", part="heldout"),
    "no data set": case(hub="us/nothing"),
    "no config": case(),
    "wrong config": case(config="row"),
    "wrong split": case(config="rows", split="test"),
    "wrong column": case(config="rows", column="body"),
    "wrong column, lines": case(hub="us/lines", column="body"),
    "wrong type": case(config="rows", column="id"),
    "wrong revision": case(config="rows", revision="v9"),
    "damaged": case(config="damaged"),
    "broken off": case(config="broken"),
    "private, not logged in": case(config="rows", private=True),
    "private, not said": case(hub="us/secret"),
    "login": {"login": TOKEN},
    "private, logged in": case(hub="us/secret", private=True),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What became of each of HUB_CASES: a list of documents, or the text of a UserError."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    results = read_from_hub(endpoint, tmp_path_factory.mktemp("hub"), list(HUB_CASES.values()))
    yield dict(zip([name for name in HUB_CASES if name != "login"], results, strict=True))
    server.shutdown()
    server.server_close()


def test_a_data_set_on_the_hub_is_streamed_whole(hub):
    train = [text for text in TEXTS[:1000] if not is_heldout(text)]
    assert sorted(hub["rows"]) == sorted(hub["rows elsewhere"]) == sorted(train)
    assert hub["rows"] == hub["rows again"] != hub["rows elsewhere"]
    assert hub["rows held out"] == [text for text in TEXTS[:1000] if is_heldout(text)]
    assert sorted(hub["lines"]) == sorted(text for text in TEXTS[:300] if not is_heldout(text))
    assert hub["lines held out"] == [text for text in TEXTS[:300] if is_heldout(text)]
    assert sorted(hub["private, logged in"]) == sorted(hub["lines"])


def test_places_read_other_row_groups_first(hub):
    one, two = set(hub["rows"][:100]), set(hub["rows elsewhere"][:100])
    assert len(one & two) < 50  # from the starts of two files it would be nearly all


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no data set", r"Cannot read us/nothing on the Hub.*hf auth login"),
        ("no config", r"Please pick one among the available configs: \['rows', 'damaged', 'broken'\].*Check `config`"),
        ("wrong config", r"'row' not found. Available: \['rows', 'damaged', 'broken'\].*Check `config`"),
        ("wrong split", r"Bad split: test. Available splits: \['train'\].*Check `config` and `split`"),
        ("wrong column", r"no column 'body'; it has text, id.*`column: NAME`"),
        ("wrong column, lines", r"no column 'body'; it has id, text.*`column: NAME`"),
        ("wrong type", r"holds int in the column 'id', not text"),
        ("wrong revision", r"v9.*A name or `revision` is wrong"),
        ("broken off", r"could not be reached, or broke off"),
        ("damaged", r"One of its files is damaged"),
        ("private, not logged in", r"nobody has logged in.*hf auth login"),
        ("private, not said", r"private or gated.*add `private: true`"),
    ],
)
def test_what_goes_wrong_on_the_hub_is_one_sentence(hub, name, message):
    assert isinstance(hub[name], str)
    assert re.search(message, hub[name]), hub[name]


def test_no_network(tmp_path):
    [message] = read_from_hub("http://127.0.0.1:9", tmp_path, [case(config="rows")])
    assert re.search(r"Cannot read us/texts on the Hub.*could not be reached.*\{embedded: true\}", message), message
