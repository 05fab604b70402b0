import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collab.errors import UserError
from tasks.mlm import local_files, stream
from tasks.mlm import sources as module
from tasks.mlm.corpus import is_heldout
from tasks.mlm.sources import Documents, Source, documents, overlap
from tasks.mlm.windows import LONGEST, cut
from tests.tasks.mlm.texts import COMPRESS, HELDOUT, KINDS, TEXTS, TRAIN, encoded, json_lines, parquet

ROOT = Path(__file__).parents[3]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Documents]:
    """Read sources, written as in the YAML, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)

    def read(*mappings: dict, **options: Any) -> Documents:
        sources = [Source.from_mapping(mapping) for mapping in mappings]
        options = dict[str, Any](seed=0, place="here", part="train", shuffle_buffer=100) | options
        return documents(sources, cache_dir=tmp_path, **options)

    return read


@pytest.fixture(params=["in memory", "streamed"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "streamed":
        monkeypatch.setattr(module, "IN_MEMORY", 1)
        monkeypatch.setattr(local_files, "SLICE", 5000)
        monkeypatch.setattr(local_files, "CHUNK", 256)
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
    assert sorted(read(source, endless=False)) == sorted(TRAIN)
    assert list(read(source, part="heldout")) == HELDOUT
    endless = list(itertools.islice(read(source), 2 * len(TRAIN)))
    assert Counter(endless) == dict.fromkeys(TRAIN, 2)
    assert endless[: len(TRAIN)] != endless[len(TRAIN) :]  # the second time in another order


@pytest.mark.parametrize("kind", [".parquet", ".txt", ".jsonl", ".txt.gz", ".jsonl.gz"])
@pytest.mark.parametrize("files", [1, 4, 20])
def test_two_places_share_no_more_than_chance(tmp_path, size, kind, files):
    for number in range(files):
        (tmp_path / f"{number:02}{kind}").write_bytes(encoded(kind, TEXTS[number::files]))
    source = Source(files=f"{tmp_path}/*{kind}")
    measured = overlap([source], seed=0, cache_dir=tmp_path, shuffle_buffer=100, first=300, peers=30)
    assert measured.total == len(TRAIN) and measured.chance == 300 / len(TRAIN)
    # Chance is 0.077; read from the starts of the files through a buffer, two peers would share 0.75.
    assert measured.shared < measured.chance + 3 * measured.error


def test_overlap_of_everything_is_everything(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(TRAIN[:300]))
    source = Source(files=f"{tmp_path}/a.jsonl")
    measured = overlap([source], seed=0, cache_dir=tmp_path, shuffle_buffer=100, first=10_000, peers=3)
    assert (measured.first, measured.shared, measured.error, measured.chance) == (300, 1.0, 0.0, 1.0)


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


@pytest.mark.parametrize("compression", [kind for kind in COMPRESS if kind])
def test_several_frames_in_a_compressed_file(read, size, compression):
    parts = (TRAIN[:500], TRAIN[500:900])
    frames = [COMPRESS[compression]("\n\n".join(part).encode() + b"\n\n") for part in parts]
    Path(f"corpus.txt{compression}").write_bytes(b"".join(frames) + b"\0" * 8)  # some tools pad
    assert sorted(read({"files": "corpus*"}, endless=False)) == sorted(TRAIN[:900])


# ------------------------------------------------------------------------------------------------- bad input

REFUSED: dict[str, tuple[str, bytes, str]] = {
    "not UTF-8": ("a.txt", "café".encode("latin-1"), r"a.txt is not UTF-8: byte 3 .* 0xe9.*iconv"),
    "no JSON": ("a.jsonl", b'{"text": \n{"text": ', "line at byte 0 of a.jsonl is not JSON"),
    "a JSON list": ("a.jsonl", b"[1]", "not a JSON object but list"),
    "no column": ("a.jsonl", b'{"body": "x", "id": 1}', "no column 'text'; it has body, id.*`column: NAME`"),
    "no text": ("a.jsonl", b'{"text": [1]}', "holds list in the column 'text'"),
    "no column, Parquet": ("a.parquet", parquet([1]).replace(b"text", b"tixt"), "no column 'text'; it has tixt"),
    "no text, Parquet": ("a.parquet", parquet([1, 2]), "holds int64 in the column 'text'"),
    "unreadable Parquet": ("a.parquet", b"PAR1 this is none PAR1", "a.parquet cannot be read to its end"),
    "cut Parquet": ("a.parquet", parquet(TEXTS)[:-2000], "a.parquet cannot be read to its end.*Copy or download it"),
    "no Parquet any more": (
        "a.parquet",
        bytes(len(parquet(TEXTS)) - 9000) + parquet(TEXTS)[-9000:],
        "a.parquet cannot be read",
    ),
    "no gzip": ("a.txt.gz", b"plain text", "a.txt.gz cannot be read to its end"),
    "unknown kind": ("a.doc", b"x", "a.doc is of no kind that can be read"),
    "empty": ("a.txt", b"", "no document in the files a.txt at all: it was read to its end"),
    "white space": ("a.jsonl", b'{"text": " "}\n{"text": null}\n', "no document in the files a.jsonl"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_without_any_text_is_refused_in_one_sentence_that_names_it(read, size, case):
    name, content, message = REFUSED[case]
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(itertools.islice(read({"files": name}), 100_000))


BAD_LINES = [
    b"[1]",
    b'{"body": "x"}',
    b'{"text": 3}',
    b'{"text": "x"} "y"',
    b'{"text": ',
    b'{"text": "\xff"}',
    b'"text"',
]
BAD_LINES += [b'{"text": null}', b'{"text": " "}', b"[" * 100_000]
SKIPPED: dict[str, tuple[str, bytes, list[str], dict[str, int], str]] = {
    "documents that are not UTF-8": (
        "a.txt",
        b"good\n\n" + "caf\xe9\n\nna\xefve".encode("latin-1") + b"\n\nbetter",
        ["good", "better"],
        {"they are not UTF-8": 2},
        "a.txt is not UTF-8: byte 9 of its text is 0xe9.*iconv",
    ),
    "lines of all kinds": (
        "a.jsonl.gz",
        COMPRESS[".gz"](b"\n".join([b'{"text": "good"}', *BAD_LINES, b'{"text": "better"}'])),
        ["good", "better"],
        {
            "they are no JSON objects": 2,
            "their column is missing": 1,
            "they are not text": 1,
            "they are not JSON": 3,
            "they are not UTF-8": 1,
            "they are empty": 2,
        },
        "line at byte 17 of a.jsonl.gz is not a JSON object but list",
    ),
    "nulls and blanks in a table": (
        "a.parquet",
        parquet(["good", None, " \n", "better", ""], rows=2),
        ["good", "better"],
        {"they are empty": 3},
        "Row 1 of row group 0 of a.parquet holds no text",
    ),
    "a table that is not UTF-8": (
        "a.parquet",
        parquet(pa.Array.from_buffers(pa.string(), 3, pa.array([b"good", b"caf\xe9", b"better"]).buffers())),
        ["good", "better"],
        {"they are not UTF-8": 1},
        "Row 1 of row group 0 of a.parquet is not UTF-8",
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_what_is_no_text_is_skipped_counted_and_said(read, size, caplog, case):
    name, content, texts, skipped, message = SKIPPED[case]
    Path(name).write_bytes(content)
    found = read({"files": name}, endless=False)
    assert sorted(found) == sorted(texts)
    assert found.report()[0]["skipped"] == skipped
    assert caplog.records[0].levelno == logging.WARNING
    assert len(caplog.records) == len(skipped)  # one for each kind, however many there are
    caplog.clear()
    list(read({"files": name}, part="heldout"))
    assert any(re.search(message, record.getMessage()) for record in caplog.records)


def test_a_source_that_is_drawn_from_rarely_is_refused_at_the_start(read):
    Path("good.jsonl").write_bytes(json_lines(TRAIN))
    Path("bad.jsonl").write_bytes(json_lines(TRAIN, column="body"))
    with pytest.raises(UserError, match=r"bad.jsonl has no column 'text'"):
        next(read({"files": "good.jsonl", "weight": 1e6}, {"files": "bad.jsonl", "weight": 1e-6}))


def test_what_is_skipped_is_said_at_the_first_tenth_and_hundredth(read, caplog):
    Path("a.jsonl").write_bytes(b'{"text": "good"}\n' + b"{}\n" * 350)
    assert list(read({"files": "a.jsonl"}, endless=False)) == ["good"]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert "line at byte 17 of a.jsonl has no column 'text'" in said[0]
    assert said[2].startswith(
        "100 documents or files of the files a.jsonl were skipped because their column is missing"
    )


@pytest.mark.parametrize("kind", [form + end for form in (".txt", ".jsonl") for end in (".gz", ".xz", ".zst")])
def test_a_compressed_file_that_ends_early_is_used_up_to_there(read, size, caplog, kind):
    content = encoded(kind)  # without .bz2, which brings nothing before a block of 900 kB is complete
    Path(f"a{kind}").write_bytes(content[: len(content) * 3 // 4])
    found = read({"files": "a.*"}, endless=False)
    texts = list(found)
    assert len(set(texts) - set(TRAIN)) <= 1  # the last document may be half of one
    assert len(texts) >= 0.4 * len(TRAIN)  # zstandard loses up to a frame's block of 128 kB
    assert found.report()[0]["skipped"]["they cannot be read"] in (1, 2)  # 2 where reading began behind the damage
    assert any("cannot be read to its end" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("content", [parquet(TEXTS[:1000])[:-2000], b"none", parquet([1, 2]), parquet([1]) + b"x"])
def test_a_bad_table_among_good_ones_costs_only_itself(read, size, content):
    for number, part in enumerate((TRAIN[:500], TRAIN[500:900])):
        Path(f"{number}.parquet").write_bytes(parquet(part))
    Path("bad.parquet").write_bytes(content)
    found = read({"files": "*.parquet"}, endless=False)
    assert sorted(found) == sorted(TRAIN[:900])
    assert found.report()[0]["skipped"] == {"they cannot be read": 1}


@pytest.mark.parametrize("kind", [".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("word", ["word ", "ক্ষ"])
def test_a_document_of_megabytes_is_cut_and_nothing_of_it_lost(read, size, kind, word):
    giant = word * 300_000
    Path(f"a{kind}").write_bytes(encoded(kind, [giant, "small"]))
    texts = [*read({"files": "a*"}, endless=False), *read({"files": "a*"}, part="heldout")]
    assert max(map(len, texts)) <= LONGEST
    assert Counter("".join(texts).replace(" ", "")) == Counter(giant.replace(" ", "") + "small")
    assert "word" not in giant or {word for text in texts for word in text.split()} == {"word", "small"}


def test_a_line_of_json_that_memory_cannot_hold_is_skipped(read, size, monkeypatch):
    monkeypatch.setattr(local_files, "SLICE", 1000)
    monkeypatch.setattr(local_files, "LONGEST_LINE", 5000)
    Path("a.jsonl").write_bytes(json_lines(["before", "x" * 9000, *TRAIN[:100]]))
    found = read({"files": "a.jsonl"}, endless=False)
    assert sorted(found) == sorted(["before", *TRAIN[:100]])
    assert found.report()[0]["skipped"] == {"their lines are too long": 1}


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab \n\tক্ষ\u3000\xa0"), max_size=400), st.integers(5, 60))
def test_cutting_keeps_everything_but_white_space_at_the_cuts(text, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.mlm.windows.LONGEST", longest)
        parts = list(cut(text))
    assert all(0 < len(part) <= longest for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())
    words = text.split()
    if words and max(map(len, words)) < longest:
        assert [word for part in parts for word in part.split()] == words


DOCUMENT = st.text(alphabet=st.sampled_from("ab ক্ষ\n"), min_size=1, max_size=80).map(
    lambda text: "\n".join(line.strip() for line in text.splitlines() if line.strip()) or "empty"
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(DOCUMENT, max_size=40),
    st.integers(8, 300),
    st.sampled_from([".txt", ".jsonl", ".txt.gz", ".jsonl.zst"]),
    st.floats(0, 1, exclude_max=True),
)
def test_slices_give_every_document_once_wherever_they_are_cut(tmp_path_factory, texts, size, kind, share):
    file = tmp_path_factory.mktemp("slices") / f"a{kind}"
    file.write_bytes(encoded(kind, texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_files, "SLICE", size)
        patch.setattr(local_files, "CHUNK", 16)
        pieces = local_files.pieces_of_file(file, "text")
        found = [text for piece in pieces for window in piece.windows(0.0, 1.0, 0, None) for text in window.texts]
        halves = [
            window.texts
            for piece in pieces
            for low, high in ((0.0, share), (share, 1.0))
            for window in piece.windows(low, high, 0, None)
            if piece.sequential
        ]
    if ".jsonl" in kind:
        assert found == texts
    else:  # documents without a blank line for a whole slice are cut
        assert "".join(found).split() == "".join(texts).split() or "".join("".join(found).split()) == "".join(
            "".join(texts).split()
        )
    if halves:
        assert list(itertools.chain(*halves)) == found


# ------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("kind", [".parquet", ".txt", ".jsonl", ".jsonl.gz"])
def test_reading_goes_on_exactly_where_it_was(read, size, kind):
    for number in range(3):
        Path(f"{number}{kind}").write_bytes(encoded(kind, TEXTS[number::3]))
    Path("other.txt").write_text("\n\n".join(f"other {number}" for number in range(700)))
    sources = [{"files": f"?{kind}", "weight": 2.0}, {"files": "other.txt"}]
    uninterrupted = list(itertools.islice(read(*sources), 9000))  # more than a pass of both
    for taken in (0, 1, 5, 333, 2050, 5900, 6100):
        before = read(*sources)
        texts = list(itertools.islice(before, taken))
        state = json.loads(json.dumps(before.state_dict()))
        after = read(*sources, state=state)
        assert after.state_dict() == state
        texts += itertools.islice(after, 9000 - taken)
        assert texts == uninterrupted


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 900), min_size=1, max_size=6))
def test_any_number_of_interruptions_is_invisible(tmp_path_factory, stops):
    folder = tmp_path_factory.mktemp("resume")
    (folder / "a.jsonl.gz").write_bytes(encoded(".jsonl.gz", TEXTS[:1500]))
    (folder / "b.parquet").write_bytes(encoded(".parquet", TEXTS[1500:2500]))
    sources = [Source(files=f"{folder}/a*"), Source(files=f"{folder}/b*", weight=0.5)]
    options: Any = {"seed": 1, "place": "p", "part": "train", "cache_dir": folder, "shuffle_buffer": 60}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "IN_MEMORY", 1)
        patch.setattr(local_files, "SLICE", 4000)
        patch.setattr(local_files, "ROW_GROUP", 4000)
        texts: list[str] = []
        state = None
        for stop in stops:
            stream = documents(sources, state=state, **options)
            texts += itertools.islice(stream, stop)
            state = stream.state_dict()
        assert texts == list(itertools.islice(documents(sources, **options), len(texts)))


def test_a_position_is_small_and_only_open_windows_are_read_again(read, size, monkeypatch):
    Path("a.jsonl").write_bytes(encoded(".jsonl"))
    before = read({"files": "a.jsonl"}, shuffle_buffer=1000)
    next(before)
    assert len(before.state_dict()["sources"][0]["windows"]) == 1  # the first document waits for no full buffer
    list(itertools.islice(before, 2000))
    state = before.state_dict()
    assert len(json.dumps(state)) < 5000
    opened = []
    slices = local_files.plain_blocks

    def counted(file: Path, first: int) -> Any:
        opened.append(first)
        return slices(file, first)

    monkeypatch.setattr(local_files, "plain_blocks", counted)
    next(read({"files": "a.jsonl"}, shuffle_buffer=1000, state=state))
    windows = len(state["sources"][0]["windows"])
    assert len(opened) <= windows + 1 if size == "streamed" else windows == 1


def test_a_position_that_does_not_fit_starts_at_a_new_place_with_one_warning(read, size, caplog):
    for name in ("a", "b"):
        Path(f"{name}.jsonl").write_bytes(encoded(".jsonl", TEXTS[:300]))
    sources = [{"files": "a.jsonl"}, {"files": "b.jsonl"}]
    before = read(*sources)
    list(itertools.islice(before, 100))
    state = before.state_dict()
    rest = list(itertools.islice(before, 200))

    Path("b.jsonl").write_bytes(encoded(".jsonl", TEXTS[:400]))
    changed = list(itertools.islice(read(*sources, state=state), 200))
    assert changed != rest and len(changed) == 200
    [warning] = caplog.records
    assert "does not fit the files b.jsonl any more" in warning.getMessage()
    caplog.clear()
    assert len(list(itertools.islice(read(sources[0], state=state), 200))) == 200
    [warning] = caplog.records
    assert "the files b.jsonl" in warning.getMessage()
    wrongs: list[Any] = [{}, {"version": 1}, [], state | {"sources": [{}, {}]}, state | {"sources": None}]
    for wrong in wrongs:
        caplog.clear()
        assert list(itertools.islice(read(*sources, state=wrong), 100)) == list(itertools.islice(read(*sources), 100))
        [warning] = caplog.records
        assert "cannot be used" in warning.getMessage()
    caplog.clear()
    assert next(read(*sources, place="elsewhere", state=state)) == next(read(*sources, place="elsewhere"))
    assert "another run, peer or version" in caplog.records[0].getMessage()


# ------------------------------------------------------------------------------------------------- failures


class Clock:
    """Time that passes a little with every look at it, and while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self.then: Callable[[], Any] = lambda: None  # what happens after five minutes of sleep

    def __call__(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)
        if sum(self.slept) > 300:
            self.then()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_MEMORY", 1)
    monkeypatch.setattr(module, "SLICE", 5000)
    monkeypatch.setattr(local_files, "SLICE", 5000)


def messages(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


@pytest.mark.parametrize("kind", [".jsonl", ".parquet"])
def test_a_source_that_fails_is_left_out_and_comes_back_with_nothing_lost(read, streamed, clock, caplog, kind):
    caplog.set_level(logging.INFO)
    lost, good = TRAIN[:1500], TRAIN[1500:3500]
    Path(f"lost{kind}").write_bytes(encoded(kind, lost))
    Path("good.jsonl").write_bytes(json_lines(good))
    sources = [{"files": "lost*", "weight": 9.0}, {"files": "good.jsonl"}]
    found = read(*sources, clock=clock, sleep=clock.sleep, endless=False)
    texts = list(itertools.islice(found, 50))
    Path(f"lost{kind}").rename("elsewhere")
    texts += itertools.islice(found, 1800)
    assert set(texts[-300:]) <= set(good)
    assert found.report()[0]["left_out"]
    clock.now += 10.0
    for _ in range(20):
        clock.now += 60.0
        texts.append(next(found))
    [warning] = messages(caplog, "is left out for now")
    assert f"the files lost* is left out for now: lost{kind} cannot be read" in warning
    Path("elsewhere").rename(f"lost{kind}")
    clock.now += stream.LONGEST_PAUSE
    texts += found
    assert sorted(texts) == sorted(lost + good)
    assert len(messages(caplog, "can be read again, and comes back")) == 1
    assert found.report()[0]["skipped"] == {} and not found.report()[0]["left_out"]
    assert clock.slept == []  # it has held up nobody


def test_when_nothing_can_be_read_reading_waits_says_so_and_goes_on(read, streamed, clock, caplog):
    Path("a.jsonl").write_bytes(json_lines(TRAIN[:1000]))
    found = read({"files": "a.jsonl"}, clock=clock, sleep=clock.sleep, endless=False)
    texts = list(itertools.islice(found, 50))
    Path("a.jsonl").rename("elsewhere")
    clock.then = lambda: Path("elsewhere").exists() and Path("elsewhere").rename("a.jsonl")
    texts += found
    assert sorted(texts) == sorted(TRAIN[:1000])
    assert 5 <= len(clock.slept) <= 20 and max(clock.slept) > 60
    assert 2 <= len(messages(caplog, "No text can be read for")) <= 8


def test_nothing_that_could_be_read_from_the_start_is_for_a_person_to_mend(read, streamed, clock):
    Path("a.jsonl").write_bytes(json_lines(TRAIN[:1000]))
    found = read({"files": "a.jsonl"}, clock=clock, sleep=clock.sleep)
    Path("a.jsonl").unlink()
    with pytest.raises(UserError, match=r"a.jsonl cannot be read to its end: .*No such file"):
        next(found)
    assert sum(clock.slept) < 10


def test_a_file_that_is_gone_is_given_up_when_all_others_are_read(read, streamed, clock, caplog):
    for number in range(4):
        Path(f"{number}.jsonl").write_bytes(json_lines(TRAIN[500 * number :][:500]))
    found = read({"files": "*.jsonl"}, clock=clock, sleep=clock.sleep)
    first = list(itertools.islice(found, 20))
    Path("1.jsonl").unlink()
    pass_without = [*first, *itertools.islice(found, 3000)]
    assert set(TRAIN[:500] + TRAIN[1000:2000]) <= set(pass_without)
    assert found.report()[0]["passes"] >= 1
    assert found.report()[0]["skipped"]["they cannot be read"] > 0
    assert messages(caplog, "1.jsonl cannot be read")


def test_closing_ends_a_stream_that_waits(read, streamed, clock):
    Path("a.jsonl").write_bytes(json_lines(TRAIN[:1000]))
    found: Documents = read({"files": "a.jsonl"}, clock=clock, sleep=lambda seconds: found.close())
    list(itertools.islice(found, 50))
    Path("a.jsonl").unlink()
    assert len(list(found)) < 1000


def test_a_program_that_ends_in_the_middle_of_a_file_ends_silently(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(encoded(".jsonl.gz"))
    program = (
        "from pathlib import Path\n"
        "from tasks.mlm import local_files, sources\n"
        "sources.IN_MEMORY, local_files.SLICE = 1, 5000\n"
        "stream = sources.documents([sources.Source(files='a.jsonl.gz')], seed=0, place='', part='train',"
        " cache_dir=Path(), shuffle_buffer=1)\n"
        "next(stream)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_state_taken_during_an_outage_brings_back_what_was_put_off(read, streamed, clock):
    Path("lost.jsonl").write_bytes(json_lines(TRAIN[:1000]))
    Path("good.jsonl").write_bytes(json_lines(TRAIN[1000:2000]))
    sources = [{"files": "lost.jsonl"}, {"files": "good.jsonl"}]
    found = read(*sources, clock=clock, sleep=clock.sleep, endless=False)
    texts = list(itertools.islice(found, 50))
    Path("lost.jsonl").rename("elsewhere")
    texts += itertools.islice(found, 600)
    state = json.loads(json.dumps(found.state_dict()))
    assert state["sources"][0]["put_off"]
    Path("elsewhere").rename("lost.jsonl")
    texts += read(*sources, clock=clock, sleep=clock.sleep, endless=False, state=state)
    assert sorted(texts) == sorted(TRAIN[:2000])


def test_no_file_matches(read, tmp_path):
    with pytest.raises(UserError, match=rf"No file matches `files: data/\*.txt`, seen from the folder {tmp_path}"):
        read({"files": "data/*.txt"})


def test_a_file_that_may_not_be_read(read, monkeypatch, clock):
    Path("a.txt").write_text("x")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a.txt cannot be read to its end: .*Permission denied"):
        next(read({"files": "a.txt"}, clock=clock, sleep=clock.sleep))


def test_only_heldout_documents_do_not_loop_for_ever(read):
    Path("a.txt").write_text(HELDOUT[0])
    with pytest.raises(UserError, match="its 1 documents fell into the held-out part"):
        next(read({"files": "a.txt"}))
    assert list(read({"files": "a.txt"}, part="heldout")) == HELDOUT[:1]
