"""The parts of the doctor that need no swarm: accounts, the run's text, the link, and the report itself."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hivemind.utils.crypto import RSAPrivateKey

from arguments import PeerArguments, TrainerArguments, agreed_settings
from collab.bandwidth import Bandwidth
from collab.diagnosis import Finding
from collab.errors import UserError
from collab.manifest import Manifest
from collab.reachability import Reachability
from scripts import doctor
from scripts.doctor import Report, Visit, check_hub_token, check_reachable, check_swarm, check_wandb_login
from tests.hub_server import HubServer
from tests.swarm.conftest import TINY_MODEL

# ---- accounts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    with HubServer(token="hf_good") as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        yield hub


def test_a_good_token_is_whose_it_is(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert check_hub_token() == Finding("Hub token", "ok", "It is asha's.")


def test_a_bad_token_is_refused_and_never_shown(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    finding = check_hub_token()
    assert finding.verdict == "failed" and "hf auth login" in finding.advice and "HF_TOKEN" in finding.advice
    assert "hf_secret" not in str(finding)


def test_without_an_answer_nothing_is_known_about_the_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.faults.append(418)
    assert check_hub_token().verdict == "unknown"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    finding = check_hub_token()
    assert finding.verdict == "unknown" and "hf_secret" not in str(finding)


def test_the_login_of_wandb_is_looked_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert check_wandb_login().verdict == "failed"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert check_wandb_login().verdict == "ok"
    monkeypatch.setenv("NETRC", str(tmp_path / "nothing"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert check_wandb_login().verdict == "ok"


# ---- the run's text, and the link --------------------------------------------------------------------------------


@pytest.fixture
def visit_to(tmp_path: Path, tokenizer_folder: Path):
    """A stay in a run with these settings."""

    def visit(**settings: Any) -> Visit:
        files = {path.name: path.read_bytes() for path in tokenizer_folder.iterdir()}
        files["config.json"] = TINY_MODEL.replace("{", '{"vocab_size": 2048, ', 1).encode()
        found = Visit(peer=None, cache_dir=tmp_path, organizer=None)  # type: ignore[arg-type]
        given = agreed_settings({"run_id": "ours", "seq_length": 32} | settings)
        found.manifest = Manifest.found(given, files, RSAPrivateKey())
        return found

    return visit


def test_a_sample_is_made_of_the_runs_text(visit_to, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"Here is a river. It has the number {n}." for n in range(100)))
    visit = visit_to(sources=[{"files": str(tmp_path / "corpus.txt")}])
    assert visit.check_data().verdict == "ok" and visit.parameters > 10_000


def test_text_that_is_not_there_is_told_in_the_tasks_own_words(visit_to, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No file matches `files: .*nothing.txt`"):
        visit_to(sources=[{"files": str(tmp_path / "nothing.txt")}]).check_data()


def test_a_link_is_judged_by_the_size_of_the_model(visit_to) -> None:
    visit = visit_to(grad_compression="none", averaging_timeout=60.0)
    visit.parameters = 10**6  # 4 MB, twice: 64 megabits
    assert visit.judge(Bandwidth(64.0, 32.0), "to A").verdict == "ok"
    assert ": 2.0 s for each averaging" in visit.judge(Bandwidth(64.0, 32.0), "to A").message
    slow = visit.judge(Bandwidth(64.0, 1.6), "to A")
    assert slow.verdict == "warning" and "40.0 s" in slow.message and "--bandwidth 2" in slow.advice


@pytest.mark.parametrize(
    ("verdict", "mark", "words"),
    [("reachable", "ok", "at /ip4/a"), ("unreachable", "warning", "timed out"), ("unknown", "unknown", "timed out")],
)
def test_what_others_say_about_this_computers_port(
    monkeypatch: pytest.MonkeyPatch, verdict: Any, mark: str, words: str
) -> None:
    found = Reachability(verdict, "timed out", "/ip4/a/tcp/1", "QmAsked")
    monkeypatch.setattr(doctor, "check_reachability", lambda peer: found)
    peer: Any = SimpleNamespace(client_mode=False, host_maddrs=["/ip4/0.0.0.0/tcp/0"])
    finding = check_reachable(peer)
    assert finding.verdict == mark and words in finding.message
    assert ("To accept connections:" in finding.advice) == (mark == "warning")
    peer.client_mode = True
    assert check_reachable(peer).verdict == "ok"


# ---- the report --------------------------------------------------------------------------------------------------


def test_without_an_address_only_this_computer_is_looked_at(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hub: HubServer
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("sys.argv", ["doctor.py", "--device", "cpu", "--cache_dir", str(tmp_path / "file" / "cache")])
    for of_the_whole_process in ("silence_libraries", "guard_children"):
        monkeypatch.setattr(doctor, of_the_whole_process, lambda: None)
    with pytest.raises(SystemExit) as ended:
        doctor.main()
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "Only this computer was looked at" in printed and "The swarm" not in printed and "hf_secret" not in printed
    assert printed.count("\n  failed ") == 2, printed
    assert "disk: What stood there before is untouched." in printed and "Hub token: Log in again" in printed


def test_an_address_that_is_none_is_refused_as_the_trainer_refuses_it(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    check_swarm(report, {}, PeerArguments(initial_peers=["nonsense"]), TrainerArguments())
    assert [finding.check for finding in report.findings if finding.verdict == "failed"] == ["joining"]
    assert "'nonsense' is not an address" in capsys.readouterr().out


def test_whatever_happens_in_a_check_becomes_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> Finding:
        raise UserError("It is too old. Take a newer one.")

    ended = threading.Event()
    report = Report()
    report.run("broken", lambda: Finding("x", "ok", str(1 / 0)))
    report.run("endless", lambda: Finding("x", "ok", str(ended.wait(60))), seconds=0.1)
    ended.set()
    report.run("refused", refuse)
    report.run("fine", lambda: Finding("fine", "ok", "It is fine."))
    assert [finding.verdict for finding in report.findings] == ["unknown", "unknown", "failed", "ok"]
    printed = capsys.readouterr().out
    assert "ZeroDivisionError" in printed and "Not done within" in printed and "Traceback" not in printed


def test_the_report_ends_with_what_to_do_worst_first(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report()
    report.add(Finding("disk", "warning", "It is small.", "Free some."))
    report.add(Finding("peer a", "failed", "It is dead.", "Ask the organizer."))
    report.add(Finding("peer b", "failed", "It is dead.", "Ask the organizer."))
    report.add(Finding("mood", "unknown", "Nobody knows."))
    with pytest.raises(SystemExit) as ended:
        report.end(["ADDRESS"])
    assert ended.value.code == 1
    todo = capsys.readouterr().out.partition("What to do next\n")[2]
    assert todo == "  1. peer a, peer b: Ask the organizer.\n  2. disk: Free some.\n"


def test_with_warnings_alone_one_can_join(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["doctor.py", "--initial_peers", "ADDRESS", "--public_name", "A B"])
    report = Report()
    report.add(Finding("disk", "warning", "It is small.", "Free some."))
    report.end(["ADDRESS"])
    printed = capsys.readouterr().out
    assert "1. disk: Free some." in printed
    assert printed.endswith("python run_trainer.py --initial_peers ADDRESS --public_name 'A B'\n")
