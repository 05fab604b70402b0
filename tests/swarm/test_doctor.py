"""The doctor against a real run, and against addresses that lead nowhere; a trainer says the same words."""

import pytest
from hivemind.p2p import P2P

from tests.swarm.conftest import Swarm
from tests.swarm.processes import Program

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(150)]

SOMEBODY = "QmXk1hoyp6R4eRvDFbXPQqRkpV3dNQJ2RDhsiTWRcytnDa"


@pytest.fixture
def patient(swarm: Swarm) -> Swarm:
    """Programs without anybody's accounts."""
    swarm.environment = {"HF_HOME": str(swarm.folder / "hub"), "HF_TOKEN": "", "COLUMNS": "100"}
    return swarm


def marks(program: Program) -> dict[str, str]:
    """Each check's verdict; of several with one name, the last."""
    found = {}
    for line in program.output().splitlines():
        if line.startswith("  ") and line.split()[0] in ("ok", "warning", "failed", "unknown"):
            found[line[10:25].strip()] = line.split()[0]
    return found


def test_a_healthy_run_ends_with_the_line_to_join(patient: Swarm) -> None:
    _, address = patient.start_auxiliary(patient.configure())
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{SOMEBODY}"
    free = patient.folder / "identity.key"
    P2P.generate_identity(str(free))
    own = ("--device", "cpu", "--identity_path", str(free), "--initial_peers", address, dead)
    doctor = patient.start("doctor", "scripts/doctor.py", *own)
    assert doctor.wait() == 0, doctor.output()
    output, found = doctor.output(), marks(doctor)
    for check in (
        "packages",
        "device",
        "codecs",
        f"peer {address[-6:]}",
        "clock",
        "identity",
        "run",
        "data",
        "bandwidth",
        "room",
    ):
        assert found[check] == "ok", output
    assert found[f"peer {dead[-6:]}"] == "warning", output
    assert "test (mlm): step 0 of 6" in output and "Mbit/s down" in output
    assert "What to do next" in output and f"peer {dead[-6:]}: That peer has ended" in output
    command = output.strip().splitlines()[-1]
    assert command.strip().startswith("python run_trainer.py") and f"--initial_peers {address}" in command
    assert "Traceback" not in output


def test_a_dead_address_is_told_in_the_same_words_by_doctor_and_trainer(patient: Swarm) -> None:
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{SOMEBODY}"
    doctor = patient.start("doctor", "scripts/doctor.py", "--initial_peers", dead)
    trainer = patient.start_trainer("trainer", dead)
    assert doctor.wait() == 1 and trainer.wait() == 1, doctor.output() + trainer.output()
    finding = f"{dead}: 127.0.0.1 is there, but nobody listens on port 1."
    advice = "Ask the organizer for the run's current address."
    for program in (doctor, trainer):
        assert finding in program.output() and advice in program.output(), program.output()
        assert "Traceback" not in program.output()
    assert marks(doctor)[f"peer {dead[-6:]}"] == "failed" and marks(doctor)["run"] == "unknown"
    assert "What to do next\n  1. peer" in doctor.output() and "Join with" not in doctor.output()
    assert trainer.output().count("error: ") == 1
