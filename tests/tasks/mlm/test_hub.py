import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks.mlm.corpus import is_heldout
from tests.tasks.mlm.texts import TEXTS

ROOT = Path(__file__).parents[3]


def read_from_hub(folder: Path) -> dict[str, Any]:
    (folder / "home").mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.tasks.mlm.hub_reader", folder],
        cwd=ROOT, env=environment, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return {"warnings": done.stderr.decode(), **json.loads(done.stdout)}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> dict[str, Any]:
    """What the cases of hub_reader.py brought: texts, or the message of a UserError."""
    return read_from_hub(tmp_path_factory.mktemp("hub"))


def train(texts: list[str]) -> list[str]:
    return [text for text in texts if not is_heldout(text)]


def test_a_data_set_on_the_hub_is_streamed_whole(hub):
    assert sorted(hub["rows"]) == sorted(hub["rows elsewhere"]) == sorted(train(TEXTS[:1000]))
    assert hub["rows"] == hub["rows again"] != hub["rows elsewhere"]
    assert hub["rows held out"] == [text for text in TEXTS[:1000] if is_heldout(text)]
    assert sorted(hub["lines"]) == sorted(train(TEXTS[:300]))
    assert hub["lines held out"] == [text for text in TEXTS[:300] if is_heldout(text)]
    assert sorted(hub["zipped"]) == sorted(train(TEXTS))
    assert sorted(hub["private, logged in"]) == sorted(hub["lines"])


def test_places_read_other_row_groups_first(hub):
    one, two = set(hub["rows"][:100]), set(hub["rows elsewhere"][:100])
    assert len(one & two) < 50  # from the starts of two files it would be nearly all


@pytest.mark.parametrize("name", ["resumed rows", "resumed zipped"])
def test_reading_goes_on_exactly_where_it_was(hub, name):
    uninterrupted, *others = hub[name]
    assert len(others) == 5
    for number, other in enumerate(others):
        assert other == uninterrupted, number


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("rows 500", TEXTS[:1000]),
        ("rows 429", TEXTS[:1000]),
        ("rows drop", TEXTS[:1000]),
        ("rows cut", TEXTS[:1000]),
        ("zipped 500", TEXTS),
        ("zipped cut", TEXTS),
    ],
)
def test_a_file_that_fails_for_a_while_is_read_later_once_and_whole(hub, name, texts):
    assert sorted(hub[name]["texts"]) == sorted(train(texts))
    assert hub[name]["skipped"] == {}


def test_when_everything_fails_reading_waits_longer_and_longer_and_goes_on(hub):
    assert sorted(hub["all down"]["texts"]) == sorted(train(TEXTS[:1000]))
    waits = hub["all down"]["waits"]
    assert sum(waits) > 300 and len(waits) < 30
    assert max(waits) >= 64


def test_a_hub_that_does_not_answer_holds_up_nobody(hub):
    slow = hub["slow"]
    here = {text for text in slow["meanwhile"] if text.startswith("local")}
    assert slow["left_out"] and len(here) > 150
    assert all(text.startswith("local") for text in slow["meanwhile"][-500:])
    assert 100 < sum(not text.startswith("local") for text in slow["after"][-500:]) < 400
    remote = [text for part in ("first", "meanwhile", "after") for text in slow[part] if not text.startswith("local")]
    assert len(set(remote[:980])) == len(remote[:980])  # nothing twice in a pass


def test_a_damaged_file_costs_only_itself(hub):
    assert sorted(hub["partly damaged"]) == sorted(train(TEXTS[:300]))
    assert sorted(hub["a hole"]) == sorted(train(TEXTS[:150] + TEXTS[200:500]))
    assert sorted(hub["blank"]) == sorted(train(TEXTS[:300]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no data set", r"Cannot read us/nothing on the Hub.*hf auth login"),
        ("no config", r"Please pick one among the available configs: \['rows', .*Check `config`"),
        ("wrong config", r"'row' not found. Available: \['rows', .*Check `config`"),
        ("wrong split", r"Bad split: test. Available splits: \['train'\].*Check `config` and `split`"),
        ("wrong column", r"no column 'body'; it has text, id.*`column: NAME`"),
        ("wrong column, lines", r"no column 'body'; it has id, text.*`column: NAME`"),
        ("wrong type", r"holds int64 in the column 'id', not text"),
        ("wrong revision", r"v9.*A name or `revision` is wrong"),
        ("damaged", r"One of its files is damaged"),
        ("private, not logged in", r"nobody has logged in.*hf auth login"),
        ("private, not said", r"private or gated.*add `private: true`"),
    ],
)
def test_what_goes_wrong_on_the_hub_is_one_sentence(hub, name, message):
    assert isinstance(hub[name], str)
    assert re.search(message, hub[name]), hub[name]


def test_no_network(tmp_path):
    program = (
        "import time, pathlib; time.sleep = lambda seconds: None\n"
        "from tasks.mlm.sources import Source, documents\n"
        "documents([Source(hub='us/texts')], seed=0, place='', part='train', cache_dir=pathlib.Path(),"
        " shuffle_buffer=1)"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    message = done.stderr.splitlines()[-1]
    assert re.search(r"Cannot read us/texts on the Hub.*could not be reached.*\{embedded: true\}", message), message
