"""Reads data sets from a Hub on this machine and prints what came, for test_hub.py.

A program of its own: the Hub's clients read HF_ENDPOINT when they are imported.
"""

import gzip
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.hub_server import HubServer
from tests.tasks.mlm.texts import TEXTS, json_lines, parquet


def with_a_hole(content: bytes, group: int) -> bytes:
    """A Parquet file in which one row group is nothing but zeros."""
    chunk = pq.read_metadata(BytesIO(content)).row_group(group).column(0)
    at, size = chunk.dictionary_page_offset or chunk.data_page_offset, chunk.total_compressed_size
    return content[:at] + bytes(size) + content[at + size :]


CONFIGS = ["rows", "damaged", "partly", "hole", "blank"]
FILES: dict[str, dict[str, bytes]] = {
    "us/texts": {
        "README.md": "\n".join(
            ["---", "configs:", *(f"- config_name: {name}\n  data_files: {name}/*" for name in CONFIGS), "---", ""]
        ).encode(),
        "rows/0.parquet": parquet(TEXTS[:500], rows=50, id=list(range(500))),
        "rows/1.parquet": parquet(TEXTS[500:1000], rows=50, id=list(range(500))),
        "damaged/0.parquet": b"PAR1 this is none PAR1",
        "partly/0.parquet": parquet(TEXTS[:300], rows=50),
        "partly/1.parquet": parquet(TEXTS[300:600], rows=50)[:5000],
        "hole/0.parquet": with_a_hole(parquet(TEXTS[:500], rows=50), 3),
        "blank/0.parquet": parquet([*TEXTS[:200], None, "  ", *TEXTS[200:300]], rows=50),
    },
    "us/lines": {"train.jsonl": json_lines(TEXTS[:300])},
    "us/zipped": {f"{part}.jsonl.gz": gzip.compress(json_lines(TEXTS[1000 * part :][:1000])) for part in range(4)},
}
FILES["us/secret"] = FILES["us/lines"]
TOKEN = "hf_of_a_friend"


class Clock:
    """Time that only passes while somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def main(folder: Path) -> None:
    hub = HubServer(token=TOKEN)
    hub.datasets, hub.private = FILES, {"us/secret"}
    os.environ.update(HF_ENDPOINT=hub.url, HF_HOME=str(folder / "home"), NO_PROXY="127.0.0.1")
    with hub:
        results = {name: outcome(case, hub, folder) for name, case in CASES.items()}
        hub.paused.set()
    print(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)  # threads that the tests left waiting for an answer must not hold this up


def outcome(case: Callable[[HubServer, Path], Any], hub: HubServer, folder: Path) -> Any:
    from collab.errors import UserError

    hub.file_faults = {}
    hub.paused.set()
    try:
        return case(hub, folder)
    except UserError as error:
        return str(error)


def opened(folder: Path, *sources: dict[str, Any], **options: Any) -> Any:
    from tasks.mlm.sources import Source, documents

    options = dict[str, Any](seed=0, place="here", part="train", shuffle_buffer=50, endless=False) | options
    return documents([Source.from_mapping(source) for source in sources], cache_dir=folder, **options)


def reading(name: str = "us/texts", **options: Any) -> Callable[[HubServer, Path], list[str]]:
    """A case that reads a source to its end."""
    keys = {"place", "part"}
    source = {"hub": name} | {key: value for key, value in options.items() if key not in keys}
    more = {key: value for key, value in options.items() if key in keys}
    return lambda hub, folder: list(opened(folder, source, **more))


def logged_in(hub: HubServer, folder: Path) -> list[str]:
    (folder / "home" / "token").write_text(TOKEN)
    return reading("us/secret", private=True)(hub, folder)


def resumed(source: dict[str, Any]) -> Callable[[HubServer, Path], list[list[str]]]:
    def case(hub: HubServer, folder: Path) -> list[list[str]]:
        whole = [list(itertools.islice(opened(folder, source, endless=True), 1500))]
        for taken in (0, 1, 130, 700, 1200):
            before = opened(folder, source, endless=True)
            first = list(itertools.islice(before, taken))
            state = json.loads(json.dumps(before.state_dict()))
            after = opened(folder, source, endless=True, state=state)
            whole.append(first + list(itertools.islice(after, 1500 - taken)))
        return whole

    return case


def faulty(source: dict[str, Any], path: str, fault: int | str) -> Callable[[HubServer, Path], Any]:
    """A file of a source fails for a while, whatever is tried; then it works again."""

    def case(hub: HubServer, folder: Path) -> Any:
        clock = Clock()
        stream = opened(folder, source, clock=clock, sleep=clock.sleep)
        texts = [next(stream)]
        hub.file_faults = {path: [fault]}
        texts += itertools.islice(stream, 250)
        hub.file_faults = {}
        return {"texts": [*texts, *stream], "skipped": stream.report()[0]["skipped"]}

    return case


def all_down(hub: HubServer, folder: Path) -> Any:
    """The whole Hub fails while the only source is on it."""
    clock = Clock()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        waits.append(seconds)
        if clock.now > 300:
            hub.file_faults = {}

    stream = opened(folder, {"hub": "us/texts", "config": "rows"}, clock=clock, sleep=sleep)
    texts = list(itertools.islice(stream, 20))
    hub.file_faults = {path: ["drop"] for path in FILES["us/texts"]}
    return {"texts": [*texts, *stream], "waits": waits}


def slow(hub: HubServer, folder: Path) -> Any:
    """The Hub does not answer any more, and answers again; a local file has text all the while."""
    from tasks.mlm import stream as module

    module.PATIENCE = 0.3
    (folder / "local.txt").write_text("\n\n".join(f"local {number}" for number in range(200)))
    sources = [{"hub": "us/texts", "config": "rows"}, {"files": str(folder / "local.txt")}]
    stream = opened(folder, *sources, endless=True)
    first = list(itertools.islice(stream, 20))
    hub.paused.clear()
    meanwhile = list(itertools.islice(stream, 1500))
    left_out = stream.report()[0]["left_out"]
    hub.paused.set()
    end = time.monotonic() + 60
    after: list[str] = []
    while stream.report()[0]["left_out"] and time.monotonic() < end:
        after += itertools.islice(stream, 50)
    after += itertools.islice(stream, 500)
    stream.close()
    return {"first": first, "meanwhile": meanwhile, "left_out": left_out, "after": after}


ROWS = {"hub": "us/texts", "config": "rows"}
ZIPPED = {"hub": "us/zipped"}
CASES: dict[str, Callable[[HubServer, Path], Any]] = {
    "rows": reading(config="rows"),
    "rows again": reading(config="rows"),
    "rows elsewhere": reading(config="rows", place="there"),
    "rows held out": reading(config="rows", part="heldout"),
    "lines": reading("us/lines"),
    "lines held out": reading("us/lines", part="heldout"),
    "zipped": reading("us/zipped"),
    "partly damaged": reading(config="partly"),
    "a hole": reading(config="hole"),
    "blank": reading(config="blank"),
    "no data set": reading("us/nothing"),
    "no config": reading(),
    "wrong config": reading(config="row"),
    "wrong split": reading(config="rows", split="test"),
    "wrong column": reading(config="rows", column="body"),
    "wrong column, lines": reading("us/lines", column="body"),
    "wrong type": reading(config="rows", column="id"),
    "wrong revision": reading(config="rows", revision="v9"),
    "damaged": reading(config="damaged"),
    "private, not logged in": reading("us/secret", private=True),
    "private, not said": reading("us/secret"),
    "private, logged in": logged_in,
    "resumed rows": resumed(ROWS),
    "resumed zipped": resumed(ZIPPED),
    **{f"rows {fault}": faulty(ROWS, "rows/1.parquet", fault) for fault in (500, 429, "drop", "cut")},
    **{f"zipped {fault}": faulty(ZIPPED, "2.jsonl.gz", fault) for fault in (500, "cut")},
    "all down": all_down,
    "slow": slow,
}

if __name__ == "__main__":
    time.sleep = lambda seconds: None  # the clients wait half a minute between their own tries
    main(Path(sys.argv[1]))
