"""What volunteers have given is neither lost nor made up."""

from collab.contributions import FILE, PROTOCOL, Contributions, counted_by_organizer
from collab.monitor import StepSummary
from tests.collab.test_monitor import record


def made(step: int, samples: int = 0) -> list[StepSummary]:
    """A global step that the swarm has completed."""
    return [StepSummary.from_metrics({"step": step, "samples": samples, "time": 0.0})]


def test_nothing_is_lost_when_records_are_missed_and_peers_or_the_organizer_start_anew(tmp_path):
    counted = Contributions(tmp_path / FILE)
    counted.update([record("a", 1, samples_total=10), record("b", 1, samples_total=70)], made(1, 80))
    counted.update([record("a", 5, samples_total=50)], made(5, 10))
    again = Contributions(tmp_path / FILE)
    again.update([record("a", 5, samples_total=50)], [])
    assert again.of_names() == {"name of b": 70, "name of a": 50}
    again.update([record("a", 9, samples_total=20)], made(9, 20))
    assert again.of_names() == {"name of a": 70, "name of b": 70}


def test_a_damaged_file_is_kept_aside_and_counting_goes_on(tmp_path, caplog):
    """Else nobody could start the auxiliary peer again."""
    counted = Contributions(tmp_path / FILE)
    counted.update([record("a", 1, samples_total=10)], made(1, 10))
    half = (tmp_path / FILE).read_bytes()[:-20]
    (tmp_path / FILE).write_bytes(half)
    again = Contributions(tmp_path / FILE)
    again.update([record("a", 2, samples_total=20)], made(2, 10))
    assert again.of_names() == {"name of a": 20}
    assert (tmp_path / "contributions.damaged").read_bytes() == half and "contributions.damaged" in caplog.text


def test_one_person_with_two_computers_is_one_name(tmp_path):
    counted = Contributions(tmp_path / FILE)
    counted.update([record(peer, 1, name="Asha", samples_total=10) for peer in "ab"], made(1, 20))
    assert counted.of_names() == {"Asha": 20} and len(counted.of_peers) == 2


def test_nobody_gives_more_than_a_global_step_takes(tmp_path):
    counted = Contributions(tmp_path / FILE, most=100)
    counted.update([record("a", 2, samples_total=10**12)], made(2, 10**6))
    assert counted.of_names() == {"name of a": 200}
    counted.update([record("a", 3, samples_total=2 * 10**12)], made(3, 10**6))
    assert counted.of_names() == {"name of a": 300}


def test_all_together_get_what_the_swarm_made_and_a_liar_no_more_than_the_diligent(tmp_path):
    counted = Contributions(tmp_path / FILE, most=100)
    for step in range(1, 41):
        records = [record(peer, step, samples_total=45 * step) for peer in "ab"]
        counted.update([*records, record("liar", step, samples_total=10**9 * step)], made(step, 100))
    given = counted.of_ids
    assert sum(given.values()) <= 1.1 * 40 * 100 and given["a"] == given["b"] >= 0.8 * 45 * 40
    assert given["liar"] <= given["a"] + 100


def test_nobody_is_counted_for_a_step_that_the_swarm_has_not_made(tmp_path):
    counted = Contributions(tmp_path / FILE, most=100)
    counted.update([record("a", 10**9, samples_total=10**15)], made(1, 100))
    assert counted.of_names() == {}


def test_what_was_given_while_the_organizer_was_away_is_counted(tmp_path):
    counted = Contributions(tmp_path / FILE, most=100)
    counted.update([record("a", 1, samples_total=90)], made(1, 90))
    later = Contributions(tmp_path / FILE, most=100)
    later.update([record("a", 50, samples_total=4500)], made(50, 90))
    assert later.of_names() == {"name of a": 4500}


def test_volunteers_learn_what_the_organizer_has_counted(start_peer, tmp_path):
    organizer = start_peer()
    volunteer = start_peer(initial_peers=organizer.addresses())
    assert counted_by_organizer(volunteer, organizer.peer_id, "name of a") is None
    counted = Contributions(tmp_path / FILE)
    organizer.serve(PROTOCOL, tmp_path / FILE)
    assert counted_by_organizer(volunteer, organizer.peer_id, "name of a") is None, "nothing was counted yet"
    counted.update([record("a", 1, samples_total=10)], made(1, 10))
    assert counted_by_organizer(volunteer, organizer.peer_id, "name of a") == 10
    assert counted_by_organizer(volunteer, organizer.peer_id, "somebody") is None
