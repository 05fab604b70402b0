"""The public address that an auxiliary peer finds out, from services on this computer instead of the real ones."""

import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from collab import public_address
from collab.public_address import ask_public_ip, public_addresses

PUBLIC = "93.184.216.34"
FIXED = ["/ip4/0.0.0.0/tcp/31337"]


@pytest.fixture
def service() -> Iterator[Callable[[bytes], str]]:
    """Starts a service with this answer, and gives its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(content: bytes, status: int = 200) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def behind_a_router(monkeypatch):
    monkeypatch.setattr(public_address, "own_ips", lambda: {"127.0.0.1", "192.168.1.5", "fe80::1"})


def test_the_address_that_works_from_outside_comes_first(service, behind_a_router, caplog):
    caplog.set_level("INFO", "collab")
    assert public_addresses(FIXED, [service(f"{PUBLIC}\n".encode())]) == [
        f"/ip4/{PUBLIC}/tcp/31337",
        "/ip4/192.168.1.5/tcp/31337",
    ]
    assert "forwarded to 192.168.1.5" in caplog.text and f"nc -vz {PUBLIC} 31337" in caplog.text


def test_the_next_service_is_asked(service):
    with socket.socket() as closed, socket.socket() as mute:
        closed.bind(("127.0.0.1", 0))
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        dead = [f"http://127.0.0.1:{each.getsockname()[1]}" for each in (closed, mute)]
        nonsense = [
            service(content) for content in (b"<html>", b"10.0.0.1", b"2001:db8::1", b"", b"\xff", b"1" * 10**6)
        ]
        failing = service(PUBLIC.encode(), 503)
        began = time.monotonic()
        assert ask_public_ip([*dead, *nonsense, failing, service(PUBLIC.encode())], seconds=0.5) == PUBLIC
        assert ask_public_ip(dead, seconds=0.5) is None
        assert time.monotonic() - began < 5


def test_nobody_knows(behind_a_router, caplog):
    caplog.set_level("INFO", "collab")
    assert public_addresses(FIXED, []) == []
    assert len(caplog.records) == 1 and "--announce_maddrs /ip4/PUBLIC_IP/tcp/31337" in caplog.text


@pytest.mark.parametrize(
    "host_maddrs", [["/ip4/0.0.0.0/tcp/0"], ["/ip4/127.0.0.1/tcp/31337"], ["/ip4/0.0.0.0/udp/31337/quic-v1"], []]
)
def test_a_port_that_nobody_can_open_is_not_asked_for(behind_a_router, monkeypatch, host_maddrs):
    monkeypatch.setattr(public_address, "ask_public_ip", lambda _: pytest.fail("it asked"))
    assert public_addresses(host_maddrs) == []


def test_a_public_address_of_its_own_needs_no_question(monkeypatch):
    monkeypatch.setattr(public_address, "own_ips", lambda: {"127.0.0.1", PUBLIC})
    monkeypatch.setattr(public_address, "ask_public_ip", lambda _: pytest.fail("it asked"))
    assert public_addresses(FIXED) == []
