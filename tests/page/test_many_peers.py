"""The page with 500 peers whose signed records lie in a real DHT. How fast it is, `python -m benchmarks.page` says."""

import re
import statistics

import pytest

from benchmarks.page import PEERS, crowd, load_seconds
from collab.fill_mask import FillMask
from scripts.browser import Browser
from tests.page.conftest import Served
from tests.swarm.conftest import guarded  # noqa: F401 - a fixture


@pytest.mark.swarm
def test_five_hundred_peers_are_shown_without_an_address(guarded, browser: Browser, capsys) -> None:  # noqa: F811
    with crowd() as swarm:
        swarm.read()
        served = Served(FillMask(lambda: None))
        try:
            served.view = swarm.look()
            loads = load_seconds(browser, f"{served.address}/", times=3)
        finally:
            served.server.stop(5)
    with capsys.disabled():
        print(f"\nThe page with {PEERS} peers loads in {statistics.median(loads):.2f} s (median of {len(loads)})")
    assert browser.run("document.querySelectorAll('#live-peers tr').length") == PEERS
    assert browser.run("document.documentElement.scrollHeight") < 6000, "the table scrolls, not the page"
    assert not re.search(r"\d+\.\d+\.\d+\.\d+", browser.run("document.documentElement.outerHTML"))
    assert browser.complaints == []
    assert [url for url in browser.requests if not url.startswith((served.address, "data:", "about:"))] == []
