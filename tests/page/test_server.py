"""The page's server: four addresses, strict headers, a port that is taken, and questions that are refused."""

import contextlib
import gzip
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from collab.fill_mask import FillMask
from collab.page_server import OTHER_PORTS, PageServer
from collab.view import RunView, from_json
from tests.page.conftest import FIRST_PORT, Served
from tests.runs import some_run
from tests.swarm.processes import wait_until

JSON = {"Content-Type": "application/json"}


def ask(address: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    request = urllib.request.Request(address, data, {name.replace("_", "-"): text for name, text in headers.items()})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as reply:
            return reply.status, reply.read(), dict(reply.headers)
    except urllib.error.HTTPError as error:
        return error.code, error.read(), dict(error.headers)


def fill(page: Served, text: object) -> tuple[int, dict]:
    code, body, _ = ask(f"{page.address}/fill-mask", json.dumps({"text": text}).encode(), **JSON)
    return code, json.loads(body)


def test_the_page_json_and_prometheus_are_served(page: Served) -> None:
    code, html, headers = ask(f"{page.address}/", Accept_Encoding="gzip")
    assert code == 200 and b"bengali-albert" in gzip.decompress(html)
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    code, _, headers = ask(f"{page.address}/status.json")
    code, again, _ = ask(f"{page.address}/status.json", If_None_Match='"something old"')
    assert code == 200 and from_json(again).global_step == 100
    code, text, headers = ask(f"{page.address}/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b'samiti_global_step{run_id="bengali-albert"} 100\n' in text
    assert ask(f"{page.address}/other")[0] == 404


def test_what_has_not_changed_is_not_sent_again(page: Served) -> None:
    _, _, headers = ask(f"{page.address}/")
    code, body, _ = ask(f"{page.address}/", If_None_Match=headers["etag"])
    assert (code, body) in ((304, b""), (200, body)), "a second may have passed"


def test_a_gap_is_filled_by_the_newest_checkpoint(page: Served) -> None:
    code, answer = fill(page, "The river flows into the [MASK].")
    assert code == 200 and answer["global_step"] == 100
    assert len(answer["guesses"]) == 5
    chances = [guess["probability"] for guess in answer["guesses"]]
    assert chances == sorted(chances, reverse=True) and 0 < sum(chances) <= 1


@pytest.mark.parametrize(
    "text, code, reason",
    [
        ("no gap", 400, "Put [MASK]"),
        ("[MASK] and [MASK]", 400, "Put [MASK]"),
        ("[MASK]" + "x" * 500, 400, "longer than 500"),
        (["[MASK]"], 400, "Send"),
        ("x" * 5_000, 413, "longer than 500"),
    ],
)
def test_other_questions_are_refused_with_the_reason(page: Served, text: object, code: int, reason: str) -> None:
    answered, answer = fill(page, text)
    assert answered == code and reason in answer["error"]


def test_ten_megabytes_are_not_even_read(page: Served) -> None:
    with contextlib.suppress(OSError):  # the server may hang up in the middle
        assert fill(page, "[MASK]" * 2_000_000)[0] == 413
    assert fill(page, "a [MASK]")[0] == 200


def test_a_form_of_another_site_cannot_ask(page: Served) -> None:
    code, _, _ = ask(f"{page.address}/fill-mask", b'{"text": "[MASK]"}', Content_Type="text/plain")
    assert code == 415
    assert ask(f"{page.address}/fill-mask", b"[" * 3000, **JSON)[0] == 400


def test_without_a_checkpoint_and_with_a_broken_one(serve: Callable[[FillMask], Served], tmp_path: Path) -> None:
    assert fill(serve(FillMask(lambda: None)), "a [MASK]")[0] == 503
    page = serve(FillMask(lambda: (1, tmp_path)))
    code, answer = fill(page, "a [MASK]")
    assert code == 503 and str(tmp_path) not in answer["error"]
    health = page.server.health
    assert health.failures == 1 and "could not answer" in health.last_error and str(tmp_path) not in health.last_error
    assert fill(page, "no gap")[0] == 400 and page.server.failures == 1, "a bad question is no failure of the page's"


def test_a_checkpoint_that_is_removed_while_it_is_opened_makes_way_for_the_newer_one(serve, checkpoint, tmp_path):
    answers = iter([(98, tmp_path / "removed"), (98, tmp_path / "removed")])
    code, answer = fill(serve(FillMask(lambda: next(answers, (100, checkpoint)))), "a [MASK]")
    assert code == 200 and answer["global_step"] == 100


def test_many_questions_are_told_to_wait(serve: Callable[[FillMask], Served], checkpoint: Path) -> None:
    page = serve(FillMask(lambda: (1, checkpoint), seconds_between=3600))
    codes: list[int] = []
    threads = [threading.Thread(target=lambda: codes.append(fill(page, "a [MASK]")[0])) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(codes) == [200, 429, 429, 429, 429]


def test_two_pages_on_one_computer_take_two_ports(serve: Callable[[FillMask], Served]) -> None:
    first, second = (serve(FillMask(lambda: None)) for _ in range(2))
    assert first.address != second.address and second.told == [second.address]
    assert ask(f"{first.address}/status.json")[0] == ask(f"{second.address}/status.json")[0] == 200


def test_without_a_free_port_the_duty_says_so_and_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as taken:
        for port in range(FIRST_PORT + 100, FIRST_PORT + 101 + OTHER_PORTS):
            taken.enter_context(socket.create_server(("127.0.0.1", port)))
        server = PageServer("127.0.0.1", FIRST_PORT + 100, some_run, FillMask(lambda: None), lambda where: None)
        wait_until(lambda: server.failures > 0, 20, lambda: "no failure was counted")
        assert server.address is None and "--page_port" in server.health.last_error
    wait_until(lambda: server.address is not None, 30, lambda: server.health.last_error)
    server.stop(5)


def test_a_view_that_cannot_be_made_is_an_error_of_that_moment(serve: Callable[[FillMask], Served]) -> None:
    page = serve(FillMask(lambda: None))
    good: RunView = page.view
    page.view = None  # type: ignore[assignment]
    assert ask(f"{page.address}/")[0] == 500
    page.view = good
    assert ask(f"{page.address}/")[0] == 200


def test_it_ends_when_it_is_told_to(serve: Callable[[FillMask], Served]) -> None:
    page = serve(FillMask(lambda: None))
    page.server.stop(5)
    with pytest.raises(OSError):
        ask(f"{page.address}/status.json")
    assert not [thread for thread in threading.enumerate() if thread.name == "Page's connections"]
