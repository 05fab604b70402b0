"""Whom a peer dials back, and what a person reads who cannot be reached."""

import json

import pytest
from hivemind.utils.multiaddr import Multiaddr

from collab import reachability
from collab.reachability import (
    PROBLEMS,
    Reachability,
    addresses_to_dial,
    advice,
    client_message,
    problem_in,
    unreachable_auxiliary_message,
)

SOMEBODY = "QmXk1hoyp6R4eRvDFbXPQqRkpV3dNQJ2RDhsiTWRcytnDa"


def test_what_is_dialed():
    def dialed(seen_at: str, *transports: object) -> list[str]:
        return [str(each) for each in addresses_to_dial(Multiaddr(seen_at), json.dumps(transports).encode())]

    here = "/ip4/198.51.100.7"
    assert dialed(f"{here}/tcp/50000", "/tcp/31337", "/udp/7/quic-v1") == [f"{here}/tcp/31337", f"{here}/udp/7/quic-v1"]
    assert dialed("/ip6/2001:db8::7/tcp/1", "/tcp/2") == ["/ip6/2001:db8::7/tcp/2"]
    assert (
        dialed(f"{here}/tcp/50000", "/tcp/99999", "/tcp/-1", "/ip4/1.2.3.4/tcp/1", "/dns4/example.org/tcp/1", 5) == []
    )
    assert len(dialed(f"{here}/tcp/50000", *(f"/tcp/{port}" for port in range(1, 100)))) <= 4
    assert dialed(f"{here}/tcp/50000/p2p/{SOMEBODY}/p2p-circuit", "/tcp/31337") == [], "that IP is the relay's"
    assert addresses_to_dial(Multiaddr(f"{here}/tcp/50000"), b"\xff") == []


@pytest.fixture
def computer(monkeypatch):
    """A computer at 192.168.1.5, on Linux, with these programs."""
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(reachability, "own_ips", lambda: {"127.0.0.1", "192.168.1.5"})
    monkeypatch.setattr(reachability, "_local_ip", lambda: "192.168.1.5")
    monkeypatch.setattr(reachability, "_in_container", lambda: False)
    monkeypatch.setattr("sys.platform", "linux")

    def install(*programs: str) -> None:
        monkeypatch.setattr("shutil.which", lambda name, **_: f"/usr/sbin/{name}" if name in programs else None)

    install()
    return install


def unreachable(address: str = "/ip4/192.168.1.5/tcp/4001") -> Reachability:
    return Reachability("unreachable", PROBLEMS["silence"], address, SOMEBODY)


ANY_PORT, FIXED_PORT = ["/ip4/0.0.0.0/tcp/0"], ["/ip4/0.0.0.0/tcp/4001"]


@pytest.mark.parametrize(
    ("programs", "command"),
    [
        (["ufw", "iptables"], "`sudo ufw allow 4001/tcp`"),
        (["firewall-cmd", "iptables"], "`sudo firewall-cmd --add-port=4001/tcp`"),
        (["iptables"], "`sudo iptables -I INPUT -p tcp --dport 4001 -j ACCEPT`"),
        ([], "TCP port 4001"),
    ],
)
def test_the_firewall_of_this_computer(computer, programs, command):
    computer(*programs)
    said = advice(unreachable(), FIXED_PORT)
    assert command in said and said.endswith("start again") and "router" not in said
    assert "--host_maddrs" not in said, "it has that port already"


def test_a_port_that_changes_with_every_start_has_to_be_fixed(computer):
    assert advice(unreachable(), ANY_PORT).endswith("start again with --host_maddrs /ip4/0.0.0.0/tcp/31337")


def test_behind_a_router(computer):
    said = advice(unreachable("/ip4/198.51.100.7/tcp/4001"), FIXED_PORT)
    assert "forward TCP port 4001 to 192.168.1.5" in said and "--announce_maddrs /ip4/198.51.100.7/tcp/4001" in said
    with_port = advice(unreachable("/ip4/198.51.100.7/tcp/50321"), ANY_PORT)
    assert "--host_maddrs /ip4/0.0.0.0/tcp/31337 --announce_maddrs /ip4/198.51.100.7/tcp/31337" in with_port


def test_in_a_container(computer, monkeypatch):
    monkeypatch.setattr(reachability, "_in_container", lambda: True)
    said = advice(unreachable("/ip4/198.51.100.7/tcp/4001"), FIXED_PORT)
    assert "`-p 4001:4001`" in said and "--announce_maddrs /ip4/198.51.100.7/tcp/4001" in said


@pytest.mark.parametrize(("variable", "name"), [("COLAB_RELEASE_TAG", "Colab"), ("KAGGLE_KERNEL_RUN_TYPE", "Kaggle")])
def test_notebooks_have_no_port_to_open(computer, monkeypatch, variable, name):
    monkeypatch.setenv(variable, "x")
    said = advice(unreachable("/ip4/198.51.100.7/tcp/4001"), FIXED_PORT)
    assert name in said and "lets no connection in" in said and "forward" not in said


def test_the_message_says_what_was_tried_why_it_failed_and_what_it_means(computer):
    for message in (client_message, unreachable_auxiliary_message):
        text = message(unreachable(), FIXED_PORT)
        for part in (
            "/ip4/192.168.1.5/tcp/4001",
            SOMEBODY[-6:],
            PROBLEMS["silence"],
            advice(unreachable(), FIXED_PORT),
        ):
            assert part in text
    assert "trains and averages like everybody else" in client_message(unreachable(), FIXED_PORT)


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        ("failed to dial: dial tcp4 1.2.3.4:5: connect: connection refused", "refused"),
        ("failed to dial: dial tcp4 1.2.3.4:5: i/o timeout", "silence"),
        ("dial tcp4 1.2.3.4:5: connect: no route to host", "no_route"),
        ("peer id mismatch: expected A, but remote key matches B", "stranger"),
        ("something new", "other"),
    ],
)
def test_what_libp2p_says_is_understood(error, problem):
    assert problem_in(error) == problem and problem in PROBLEMS
