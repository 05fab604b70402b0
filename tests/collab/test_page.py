"""The page: a stranger understands it, a stranger's name cannot spoil it, and it needs nothing from the network."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from collab.page import curve_svg, loss_in_words, render_page
from collab.public_text import public_name
from collab.view import ExpertView, PeerView, Round, RunView, as_json, as_prometheus, from_json, verdict
from tests.runs import rounds, some_run


class Page(HTMLParser):
    """Tags with their attributes, whether they are closed in order, and the text outside of scripts and styles."""

    void = ("meta", "link", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += f" {data}"

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def words(run: RunView) -> str:
    return " ".join(Page(render_page(run)).text.split())


def test_the_state_of_the_run_is_in_words():
    text = words(some_run())
    for expected in (
        "bengali-albert", "masked language modelling", "Training", "2 hours ago", "Step 100 of 1,000",
        "about 2 hours left", "10%", "Loss 2.080", "Samples per second 90", "Samples in all 12.3 M", "Peers now 3",
        "Next step in 12 seconds",
        "peer 2 client, NVIDIA T4 3 of 3",
        "Loss fell from 10.00 at step 1 to 2.080 at step 100.", "run_trainer.py --initial_peers", "step-0000100",
    ):  # fmt: skip
        assert expected in text, expected


def test_nothing_comes_from_the_network():
    html = render_page(some_run())
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "an SVG name space is not fetched; everything else would be"
    page = Page(html)
    assert not [tag for tag, attributes in page.tags if "src" in attributes or tag in ("iframe", "object")]
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "'unsafe-inline'" not in policy.split("script-src")[1]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '" onmouseover="x', "</bdi></table>", "&lt;b&gt;", "'"])
def test_a_name_with_html_in_it_is_shown_as_it_was_typed(name):
    quiet, loud = (
        Page(
            render_page(
                some_run(
                    run_id=n,
                    task=n,
                    peers=[PeerView(n, n, 1.0, 1, 1, 1, 1, 1.0)],
                    join_command=n,
                    checkpoint=n,
                    tracker=n,
                )
            )
        )
        for n in ("x", name)
    )
    assert [tag for tag, _ in loud.tags] == [tag for tag, _ in quiet.tags]
    assert [set(a) for _, a in loud.tags] == [set(a) for _, a in quiet.tags]
    places = ("title", "heading", "task", "peer", "role", "command", "checkpoint", "tracker")
    assert loud.text.count(name) == len(places)


def test_names_lose_what_would_reorder_or_flood_the_line():
    assert public_name("a\u202eb\x00\n c") == "a b c"
    assert public_name("\u200b \t") == "anonymous"
    assert len(public_name("x" * 1000)) == 40
    assert public_name("পরিমল") == "পরিমল"


def test_it_refreshes_while_it_runs_and_rests_when_it_is_over():
    def refreshes(run):
        return any(m.get("http-equiv") == "refresh" for m in Page(render_page(run)).all("meta"))

    assert refreshes(some_run())
    over = some_run(finished=True, peers=[])
    assert not refreshes(over)
    text = words(over)
    assert "Finished" in text and "took 2 hours" in text and "Join" not in text and "left" not in text


def test_rounds_are_told_by_height_texture_and_words_not_by_colour_alone():
    run = some_run(history=rounds(60, met=lambda step: {58: 2, 59: 1}.get(step, 3)))
    page = Page(render_page(run))
    strip = next(a for a in page.all("div") if a.get("class") == "rounds")
    assert strip["role"] == "img"
    assert strip["aria-label"] == "The last 40 rounds: 38 full, 1 partial, 1 alone. The newest met 3 of 3."
    cells = [a for a in page.all("i") if "title" in a]
    assert len(cells) == 40
    assert [(c["class"], c["style"]) for c in cells[-3:]] == [
        ("partial", "height:67%"), ("alone", "height:33%"), ("full", "height:100%")
    ]  # fmt: skip
    assert "38 full" in words(run) and "1 alone" in words(run)


def test_a_peer_that_trains_alone_is_named():
    text = words(some_run(peers=[PeerView("laptop", "trainer", 9.0, 10, 99, 1, 7, 4.0)]))
    assert "1 of 7 ○ alone" in text
    assert (verdict(7, 7), verdict(2, 7), verdict(1, 7), verdict(1, 1)) == ("full", "partial", "alone", "full")


def test_a_screen_reader_finds_headings_table_and_descriptions():
    page = Page(render_page(some_run()))
    identities = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identities) == len(set(identities))
    pointed_at = " ".join(a.get("aria-labelledby", "") for _, a in page.tags).split()
    assert set(pointed_at) <= set(identities)
    assert [a["scope"] for a in page.all("th")].count("col") == 8 + 3 and {"scope": "row"} in page.all("th")
    assert len(page.all("caption")) == len(page.all("table"))
    bar = next(a for a in page.all("div") if a.get("role") == "progressbar")
    assert (bar["aria-valuenow"], bar["aria-valuemax"]) == ("100", "1000") and bar["aria-label"]


def test_a_run_that_has_just_begun():
    text = words(some_run(global_step=0, history=[], peers=[], max_steps=None))
    assert "Waiting for peers" in text and "No peer has reported a loss yet." in text and "Nobody is here" in text
    assert "no end is set" in text
    one = words(some_run(global_step=1, history=rounds(1), seconds_to_end=None))
    assert "Loss 10.00 at step 1." in one and "left" not in one


def test_the_curve_stands_alone_and_says_itself_in_words():
    root = ET.fromstring(curve_svg(rounds(100)))
    space = {"s": "http://www.w3.org/2000/svg"}
    assert root.attrib["role"] == "img" and "prefers-color-scheme" in root.findtext("s:style", "", space)
    assert root.findtext("s:desc", "", space) == loss_in_words(rounds(100))
    texts = [element.text for element in root.findall("s:text", space)]
    assert "global step" in texts and "2.080" in texts and {"2", "4", "6", "8", "10"} <= set(texts)
    numbers = re.findall(r"[ML]([\d.]+) ([\d.]+)", root.findall("s:path[@class='line']", space)[0].attrib["d"])
    heights = [float(y) for _, y in numbers]
    assert heights == sorted(heights), "the loss falls, so the line goes down the page"
    assert all(0 <= float(x) <= 720 and 0 <= float(y) <= 270 for x, y in numbers)


@pytest.mark.parametrize("losses", [[], [None], [3.0], [3.0, 3.0], [float("nan"), 2.0, None, float("inf"), 1.0], [0.0],
                                    [-1.0, 1e-9], [1e9, 1e-9], [5.0] * 5000])  # fmt: skip
def test_any_history_gives_a_curve(losses):
    history = [Round(i + 1, float(i), loss, 1.0, 1, 1, 1) for i, loss in enumerate(losses)]
    svg = curve_svg(history)
    ET.fromstring(svg)
    assert "nan" not in svg and "inf" not in svg.replace("infinity", "")
    assert len(svg) < 20_000, "a long run makes a heavy page"
    Page(render_page(some_run(history=history)))


def test_the_ends_of_a_long_curve_are_exact() -> None:
    history = [
        Round(s, float(s), 10.0 if s == 1 else 1.0 if s == 9999 else 5.0, 1.0, 1, 1, 1) for s in range(1, 10_000)
    ]
    said = "Loss fell from 10.00 at step 1 to 1.000 at step 9,999."
    assert loss_in_words(history) == said
    assert words(some_run(history=history)).count(said) == 5, "in the caption, and in each of four drawings"


@pytest.mark.parametrize("losses", [[], [3.0, -1.0, 0.0], [1e-9, 1e9], [3.0], [9.0, 2.1], [2.0001, 2.0], [0.5, 120.0]])
def test_any_history_gives_a_logarithmic_curve(losses) -> None:
    history = [Round(i + 1, float(i), loss, 1.0, 1, 1, 1) for i, loss in enumerate(losses)]
    svg = curve_svg(history, log=True)
    heights = [float(y) for y in re.findall(r'class="grid" d="M46 ([\d.]+)H', svg)]
    assert all(0 <= height <= 270 for height in heights) and heights == sorted(heights, reverse=True)
    if len([loss for loss in losses if loss > 0]) > 1:
        assert 2 <= len(heights) <= 12


def test_experts_are_listed_with_who_serves_them_and_what_is_missing_is_said() -> None:
    assert "Experts" not in words(some_run())
    served = [ExpertView(0, "<u>lab</u>", 12.3, 1520.4, 2345), ExpertView(2, "attic", None, 0.0, 9)]
    run = some_run(experts=served, experts_total=4)
    text = words(run)
    for expected in (
        "Experts 1 of 4 answer", "0 <u>lab</u> 12 ms 1,520 2,345", "1 ○ nobody serves it", "2 attic ○ silent 0 9",
    ):  # fmt: skip
        assert expected in text, expected
    assert not Page(render_page(run)).all("u")
    assert from_json(as_json(run)).experts == [replace(served[0], server="<u>lab</u>"), served[1]]
    assert 'samiti_experts_alive{run_id="bengali-albert"} 1' in as_prometheus(run)
    assert "samiti_experts{" not in as_prometheus(some_run())
