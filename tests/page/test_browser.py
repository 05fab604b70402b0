"""The page in a headless Chromium: it updates itself, copies, answers, fits a phone, and asks nobody else."""

import json
from dataclasses import replace

import pytest

from collab.events import Event
from collab.view import PeerView
from scripts.browser import Browser
from tests.page.conftest import Served
from tests.runs import some_run

CONTRAST = """(() => {
  const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = (text) => { const c = text.match(/[\\d.]+/g).map(Number); return c.length < 4 ? [...c, 1] : c; };
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement;
    if (!node.textContent.trim() || !element.checkVisibility() || element.closest("script, style, title")) continue;
    const style = getComputedStyle(element);
    const inside = element.closest("svg");
    const front = parse(inside ? style.fill : style.color);
    let at = element;
    while (at && parse(getComputedStyle(at).backgroundColor)[3] === 0) at = at.parentElement;
    const back = parse(getComputedStyle(at ?? document.body).backgroundColor);
    const [low, high] = [light(front), light(back)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.5) poor.push(`${node.textContent.trim()}: ${ratio.toFixed(2)}`);
  }
  return poor;
})()"""


def assert_at_home(browser: Browser, page: Served) -> None:
    assert browser.complaints == []
    elsewhere = [url for url in browser.requests if not url.startswith((page.address, "data:", "about:"))]
    assert elsewhere == []


def test_it_updates_without_being_loaded_again(browser: Browser, page: Served) -> None:
    browser.open(f"{page.address}/")
    browser.run("window.marker = 1; document.querySelector('.scroll').scrollTop = 1")
    newcomer = PeerView("a newcomer", "trainer", 5.0, 1, 101, 3, 3, 2.0)
    page.view = replace(page.view, global_step=101, peers=[*page.view.peers, newcomer])
    browser.wait_for("document.body.innerText.includes('a newcomer')")
    assert browser.run("window.marker") == 1 and "step 101" in browser.run("document.title")
    page.view = replace(page.view, peers=[])
    browser.wait_for("document.body.innerText.includes('Nobody is here right now.')")
    assert_at_home(browser, page)


def test_it_says_when_the_server_is_gone(browser: Browser, page: Served) -> None:
    browser.open(f"{page.address}/")
    page.server.stop(5)
    browser.wait_for("document.getElementById('lost').textContent.includes('does not answer')")
    assert "bengali-albert" in browser.run("document.body.innerText")


@pytest.mark.parametrize("secure", [True, False])
def test_the_button_copies_the_line(browser: Browser, page: Served, secure: bool) -> None:
    browser.open(f"{page.address}/")
    browser.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.run("window.board = navigator.clipboard")
    if not secure:  # on plain http there is no such interface
        browser.run("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    browser.run("document.getElementById('copy').click()")
    browser.wait_for("document.getElementById('copied').textContent === 'Copied.'")
    assert browser.run("board.readText()").strip() == page.view.join_command
    assert_at_home(browser, page)


def test_the_box_fills_a_gap(browser: Browser, page: Served) -> None:
    browser.open(f"{page.address}/")
    browser.run("document.getElementById('sentence').value = 'The river flows into the '")
    browser.run("const box = document.getElementById('sentence'); box.selectionStart = box.value.length")
    browser.run("document.getElementById('gap').click()")
    browser.run("document.querySelector('#try [type=submit]').click()")
    browser.wait_for("document.querySelectorAll('#answer li').length === 5")
    assert "step 100" in browser.run("document.getElementById('answer').innerText")
    browser.run("document.getElementById('sentence').value = 'no gap'")
    browser.run("document.querySelector('#try [type=submit]').click()")
    browser.wait_for("document.getElementById('answer').innerText.includes('Put [MASK]')", 10)


def test_a_stranger_writes_nothing_but_text(browser: Browser, page: Served) -> None:
    where = "198.51.100.23"
    evil = [f"<img src=//{where} onerror=alert(1)>", "<script>document.body.remove()</script>", "x\u202eevil" * 10**6]
    page.view = replace(
        page.view,
        peers=[PeerView(name, name, 1.0, 1, 1, 1, 1, 1.0, device=name) for name in evil],
        contributors=[(name, 1) for name in evil],
        events=[Event(1.0, "note", name) for name in evil],
        duties=[replace(page.view.duties[0], last_error=f"cannot dial /ip4/{where}/tcp/1")],
    )
    browser.open(f"{page.address}/")
    html = browser.run("document.documentElement.outerHTML")
    assert where not in html and "\u202e" not in html and len(html) < 200_000
    assert browser.run("document.images.length") == 0 and browser.run("document.scripts.length") == 1
    assert_at_home(browser, page)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1000])
def test_it_can_be_read_on_any_screen(browser: Browser, page: Served, dark: bool, width: int) -> None:
    page.view = some_run(40, run_id="a_very_long_name_of_a_run_" * 3)
    browser.screen(width, dark=dark)
    browser.open(f"{page.address}/")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(CONTRAST) == []


def test_the_scale_can_be_logarithmic(browser: Browser, page: Served) -> None:
    browser.open(f"{page.address}/")
    drawings = "[...document.querySelectorAll('#curve svg')]"
    shown = f"{drawings}.filter((svg) => svg.checkVisibility()).map((svg) => svg.querySelector('title').id)"
    assert browser.run(shown) == ["curve-832-title"]
    browser.run("document.getElementById('scale').click()")
    assert browser.run(shown) == ["curve-832-log-title"]
    browser.run("refresh()")
    assert browser.run(shown) == ["curve-832-log-title"], "an update must not take the choice away"


def test_a_screen_reader_and_a_keyboard_find_everything(browser: Browser, page: Served) -> None:
    browser.open(f"{page.address}/")
    browser.call("Accessibility.enable")
    found: dict[str, list[str]] = {}
    for node in browser.call("Accessibility.getFullAXTree")["nodes"]:
        if not node["ignored"]:
            found.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert len(found["main"]) == 1 and len(found["table"]) == 2 and all(found["table"])
    assert {"Loss", "Join", "Try the newest checkpoint"} <= set(found["region"]) and all(found["region"])
    assert all(found["button"]) and all(found["textbox"])
    pictures = [name for role, names in found.items() if role in ("img", "image") for name in names]
    assert any(name.startswith("The last 40 rounds: 39 full, 1 partial") for name in pictures), pictures
    reached = []
    for _ in range(9):
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.append(browser.run("document.activeElement.id || document.activeElement.className"))
    assert {"scale", "command", "copy", "scroll", "sentence", "gap"} <= set(reached), json.dumps(reached)
