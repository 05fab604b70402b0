"""Where in the data this computer is: one place for each process, taken over by whoever comes next."""

import subprocess
import sys
from pathlib import Path

import pytest

from collab.place import Place

ROOT = Path(__file__).parents[2]


def test_who_comes_back_takes_over_the_place(tmp_path):
    place = Place(tmp_path / "places", name="one")
    assert (place.name, place.state) == ("one", None)
    place.save({"batches": 3})
    place.close()
    again = Place(tmp_path / "places", name="two")
    assert (again.name, again.state) == ("one", {"batches": 3})


def test_trainers_at_the_same_time_have_a_place_each(tmp_path):
    first, second = Place(tmp_path, name="one"), Place(tmp_path, name="two")
    first.save({"batches": 1})
    second.save({"batches": 2})
    third = Place(tmp_path, name="three")
    assert (third.name, third.state) == ("three", None)
    second.close()
    fourth = Place(tmp_path, name="four")
    assert (fourth.name, fourth.state) == ("two", {"batches": 2})


def test_a_killed_process_leaves_its_place_to_others(tmp_path):
    program = (
        "import sys; from collab.place import Place; p = Place(__import__('pathlib').Path(sys.argv[1]), 'killed')\n"
    )
    program += "p.save({'batches': 9}); print('saved', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"saved\n"
        assert Place(tmp_path, name="meanwhile").name == "meanwhile"
        process.kill()
    assert Place(tmp_path, name="later").state == {"batches": 9}


def test_a_new_place_forgets_the_state(tmp_path):
    place = Place(tmp_path, name="one")
    place.save({"batches": 3})
    place.move("one/7")
    assert (place.name, place.state) == ("one/7", None)
    place.save({"batches": 1})
    place.close()
    assert Place(tmp_path, name="two").name == "one/7"


def test_a_checkpoint_brings_its_place_to_a_computer_that_keeps_none(tmp_path):
    place = Place(tmp_path / "here", name="one")
    place.save({"batches": 3})
    there = Place(tmp_path / "there", name="two", record=place.record)
    assert (there.name, there.state) == ("one", {"batches": 3})
    there.save({"batches": 4})
    there.close()
    kept = Place(tmp_path / "there", name="three", record=place.record)
    assert kept.state == {"batches": 4}


@pytest.mark.parametrize("record", [None, 3, {}, {"name": "one"}, {"name": ["one"], "state": {}}])
def test_a_checkpoint_without_a_place_is_no_obstacle(tmp_path, record):
    place = Place(tmp_path, name="one", record=record)
    assert (place.name, place.state) == ("one", None)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": 3, "state": {}}', b'{"name": "one"}', b"\xff\xfe"])
def test_a_damaged_file_is_a_new_start(tmp_path, content):
    place = Place(tmp_path, name="one")
    place.save({"batches": 3})
    place.close()
    [file] = tmp_path.glob("*.json")
    file.write_bytes(content)
    fresh = Place(tmp_path, name="two")
    assert (fresh.name, fresh.state) == ("two", None)
    fresh.save({"batches": 1})
    fresh.close()
    assert Place(tmp_path, name="three").name == "two"


def test_a_folder_that_cannot_be_written_costs_no_more_than_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    place = Place(tmp_path / "file" / "places", name="one")
    place.save({"batches": 3})
    assert (place.name, place.state) == ("one", {"batches": 3})
    place = Place(tmp_path / "places", name="one")
    (tmp_path / "places").rename(tmp_path / "gone")
    (tmp_path / "places").write_text("")
    place.save({"batches": 3})
    place.save({"batches": 4})
    assert caplog.text.count("will see some samples again") == 1
