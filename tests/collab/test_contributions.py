"""What volunteers have given is neither lost nor made up."""

from collab.contributions import FILE, PROTOCOL, Contributions, counted_by_organizer
from tests.collab.test_monitor import record


def test_nothing_is_lost_when_records_are_missed_and_peers_or_the_organizer_start_anew(tmp_path):
    counted = Contributions(tmp_path / FILE)
    counted.update([record("a", 1, samples_total=10), record("b", 1, samples_total=70)])
    counted.update([record("a", 5, samples_total=50)])
    again = Contributions(tmp_path / FILE)
    again.update([record("a", 5, samples_total=50)])
    assert again.of_names() == {"name of b": 70, "name of a": 50}
    again.update([record("a", 9, samples_total=20)])
    assert again.of_names() == {"name of a": 70, "name of b": 70}


def test_one_person_with_two_computers_is_one_name(tmp_path):
    counted = Contributions(tmp_path / FILE)
    counted.update([record(peer, 1, name="Asha", samples_total=10) for peer in "ab"])
    assert counted.of_names() == {"Asha": 20} and len(counted.of_peers) == 2


def test_nobody_gives_more_than_a_global_step_takes(tmp_path):
    counted = Contributions(tmp_path / FILE, most=100)
    counted.update([record("a", 2, samples_total=10**12)])
    assert counted.of_names() == {"name of a": 200}
    counted.update([record("a", 3, samples_total=2 * 10**12)])
    assert counted.of_names() == {"name of a": 300}


def test_volunteers_learn_what_the_organizer_has_counted(start_peer, tmp_path):
    organizer = start_peer()
    volunteer = start_peer(initial_peers=organizer.addresses())
    assert counted_by_organizer(volunteer, organizer.peer_id, "name of a") is None
    counted = Contributions(tmp_path / FILE)
    organizer.serve(PROTOCOL, tmp_path / FILE)
    assert counted_by_organizer(volunteer, organizer.peer_id, "name of a") is None, "nothing was counted yet"
    counted.update([record("a", 1, samples_total=10)])
    assert counted_by_organizer(volunteer, organizer.peer_id, "name of a") == 10
    assert counted_by_organizer(volunteer, organizer.peer_id, "somebody") is None
