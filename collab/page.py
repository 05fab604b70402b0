"""The run on one page: a single HTML file without network, rendered from plain data."""

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import Literal

from collab.names import public_name

REFRESH_SECONDS = 5
SHOWN_ROUNDS = 40
CURVE_POINTS = 240  # more than this many steps are averaged in groups: a screen shows no more, and the page stays small

Verdict = Literal["full", "partial", "alone"]


@dataclass(frozen=True)
class Round:
    """One global step as the swarm lived it.

    :param time: when it ended, in seconds since 1970.
    :param loss: mean over the peers that reported one; None if nobody did.
    :param samples_per_second: of all peers together.
    :param peers_met: how many peers averaged together in this round, this one included.
    :param peers_expected: how many should have.
    :param peers: how many were known to be alive.
    """

    step: int
    time: float
    loss: float | None
    samples_per_second: float
    peers_met: int
    peers_expected: int
    peers: int


@dataclass(frozen=True)
class PeerView:
    """One live peer. `name` comes from a stranger; `loss` is None for a peer that does not train."""

    name: str
    role: str
    samples_per_second: float
    samples: int
    last_step: int
    peers_met: int
    peers_expected: int
    loss: float | None = None


@dataclass(frozen=True)
class RunView:
    """Everything the page shows.

    :param task: for people, as in "masked language modelling".
    :param started: when the run began, in seconds since 1970.
    :param updated: when this view was made, in seconds since 1970.
    :param max_steps: where the run ends; None if nobody decided that.
    :param finished: nothing will change any more: the page stops refreshing and invites nobody.
    :param join_command: what a volunteer types.
    :param checkpoint: the folder or the address of the newest checkpoint.
    :param tracker: what to open or to type for all curves.
    """

    run_id: str
    task: str
    started: float
    updated: float
    global_step: int
    max_steps: int | None
    finished: bool
    history: Sequence[Round]
    peers: Sequence[PeerView]
    join_command: str | None = None
    checkpoint: str | None = None
    tracker: str | None = None


def render_page(run: RunView) -> str:
    """The whole page. The same view gives the same text; nothing is read, written or fetched."""
    refresh = "" if run.finished else f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
    sections = [_header(run), _figures(run), _curve(run), _rounds(run), _peers(run), _join(run), _footer(run)]
    # Only the script below may run, and nothing may be fetched: a name that slipped through as HTML stays harmless.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
{refresh}
<meta name="color-scheme" content="light dark">
<title>{escape(run.run_id)}: step {run.global_step:,}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
{"".join(sections)}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def curve_svg(history: Sequence[Round], width: int = 720, height: int = 270) -> str:
    """The loss over the global steps as an SVG that stands alone: it brings its colours for light and dark.

    :param history: rounds in the order of their steps; those without a finite loss are left out.
    :param width: in pixels of the place where it is shown, so that its text comes out at 13 px.
    """
    points = _thinned([(r.step, r.loss) for r in history if r.loss is not None and math.isfinite(r.loss)])
    name = f"curve-{width}"
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="curve" viewBox="0 0 {width} {height}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">Loss over global steps</title>'
        f'<desc id="{name}-desc">{escape(loss_in_words(history))}</desc><style>{CURVE_STYLE}</style>'
    )
    if not points:
        return f'{opening}<text x="{width / 2}" y="{height / 2}" text-anchor="middle">No loss yet</text></svg>'

    left, right, top, bottom = 46, width - 58, 14, height - 40
    first, last = points[0][0], points[-1][0]
    losses = [loss for _, loss in points]
    rows = _ticks(min(losses), max(losses), 5)
    low, high = min(rows[0], min(losses)), max(rows[-1], max(losses))

    def x(step: float) -> float:
        return left + (right - left) * (step - first) / max(last - first, 1)

    def y(loss: float) -> float:
        return bottom - (bottom - top) * (loss - low) / ((high - low) or 1)

    grid = "".join(
        f'<path class="grid" d="M{left} {y(v):.1f}H{right}"/>'
        f'<text x="{left - 9}" y="{y(v) + 4.5:.1f}" text-anchor="end">{v:g}</text>'
        for v in rows
    )
    grid += "".join(
        f'<path class="grid" d="M{x(v):.1f} {bottom}v5"/>'
        f'<text x="{x(v):.1f}" y="{bottom + 20}" text-anchor="middle">{v:,.0f}</text>'
        for v in _ticks(first, last, width // 90)
        if first <= v <= last and v == int(v)
    )
    line = "L".join(f"{x(step):.1f} {y(loss):.1f}" for step, loss in points)
    end_x, end_y = x(last), y(losses[-1])
    return (
        f'{opening}{grid}<path class="grid axis" d="M{left} {bottom}H{right}"/>'
        f'<text class="name" x="{right}" y="{height - 4}" text-anchor="end">global step</text>'
        f'<path class="line" d="M{line}"/><circle class="end" cx="{end_x:.1f}" cy="{end_y:.1f}" r="4"/>'
        f'<text class="value" x="{end_x + 9:.1f}" y="{end_y + 5:.1f}">{_number(losses[-1])}</text></svg>'
    )


def loss_in_words(history: Sequence[Round]) -> str:
    """The curve for those who hear the page or want one sentence."""
    losses = [(r.step, r.loss) for r in history if r.loss is not None and math.isfinite(r.loss)]
    if not losses:
        return "No peer has reported a loss yet."
    (first, before), (last, now) = losses[0], losses[-1]
    if first == last:
        return f"Loss {_number(now)} at step {last:,}."
    verb = "fell" if now < before else "rose"
    return f"Loss {verb} from {_number(before)} at step {first:,} to {_number(now)} at step {last:,}."


def verdict(met: int, expected: int) -> Verdict:
    """How a round went: everybody who was expected met, some did, or the peer was alone although others were there."""
    if met >= expected:
        return "full"
    return "partial" if met > 1 else "alone"


def _header(run: RunView) -> str:
    state = "Finished" if run.finished else "Training" if run.peers else "Waiting for peers"
    began, so_far = datetime.fromtimestamp(run.started, UTC), _duration(run.updated - run.started)
    if run.max_steps:
        share = min(run.global_step / run.max_steps, 1.0)
        of, left = f" of {run.max_steps:,}", _time_left(run)
        bar = (
            f'<div class="bar" role="progressbar" aria-label="Progress of the run" aria-valuemin="0" '
            f'aria-valuemax="{run.max_steps}" aria-valuenow="{run.global_step}"><i style="width:{share:.2%}"></i></div>'
        )
        note = f"{share:.0%}" + (f", about {_duration(left)} left" if left is not None and not run.finished else "")
    else:
        of, bar, note = "", "", "no end is set"
    return f"""<header>
<p class="over">{escape(run.task)}</p>
<h1>{escape(run.run_id)}</h1>
<p class="state"><span class="dot {"still" if run.finished or not run.peers else ""}" aria-hidden="true"></span>{state}
<span class="soft">began <time datetime="{began.isoformat()}">{began.day} {began:%B %Y, %H:%M} UTC</time>,
{f"took {so_far}" if run.finished else f"{so_far} ago"}</span></p>
<div class="progress"><p><b>Step {run.global_step:,}</b>{of}</p><p class="soft">{note}</p></div>
{bar}
</header>
"""


def _figures(run: RunView) -> str:
    last = run.history[-1] if run.history else None
    loss = next((r.loss for r in reversed(run.history) if r.loss is not None), None)
    rows = [
        ("Loss", _number(loss)),
        ("Samples per second", f"{last.samples_per_second:,.0f}" if last else "–"),
        ("Peers now", f"{len(run.peers)}"),
        ("Met in the last round", f"{last.peers_met} of {last.peers_expected}" if last else "–"),
    ]
    cells = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in rows)
    return f'<dl class="figures" aria-label="The run in four numbers">{cells}</dl>\n'


def _curve(run: RunView) -> str:
    # One drawing for each width, because the text inside an SVG would shrink with it.
    drawings = (
        f'<div class="wide">{curve_svg(run.history, 752)}</div>'
        f'<div class="narrow">{curve_svg(run.history, 350, 230)}</div>'
        if any(r.loss is not None for r in run.history)
        else ""
    )
    return f"""<section aria-labelledby="h-loss"><h2 id="h-loss">Loss</h2>
<figure>{drawings}<figcaption>{loss_in_words(run.history)}</figcaption></figure></section>
"""


def _rounds(run: RunView) -> str:
    shown = run.history[-SHOWN_ROUNDS:]
    if not shown:
        return ""
    counts = Counter(verdict(r.peers_met, r.peers_expected) for r in shown)
    words = f"{counts['full']} full, {counts['partial']} partial, {counts['alone']} alone"
    cells = ""
    for r in shown:
        how = verdict(r.peers_met, r.peers_expected)
        height = 100 * min(r.peers_met / max(r.peers_expected, 1), 1.0)
        cells += (
            f'<i class="{how}" style="height:{height:.0f}%" '
            f'title="Step {r.step:,}: met {r.peers_met} of {r.peers_expected}, {how}"></i>'
        )
    label = (
        f"The last {len(shown)} rounds: {words}. The newest met {shown[-1].peers_met} of {shown[-1].peers_expected}."
    )
    span = f"steps {shown[0].step:,} to {shown[-1].step:,}" if len(shown) > 1 else f"step {shown[0].step:,}"
    return f"""<section aria-labelledby="h-rounds"><h2 id="h-rounds">Rounds <small class="soft">{span}</small></h2>
<div class="rounds" role="img" aria-label="{label}">{cells}</div>
<ul class="legend">
<li><i class="full" aria-hidden="true"></i>{counts["full"]} full <span class="soft">everybody met</span></li>
<li><i class="partial" aria-hidden="true"></i>{counts["partial"]} partial <span class="soft">some missing</span></li>
<li><i class="alone" aria-hidden="true"></i>{counts["alone"]} alone <span class="soft">nobody was met</span></li>
</ul></section>
"""


def _peers(run: RunView) -> str:
    if not run.peers and run.finished:
        return ""
    if not run.peers:
        return (
            '<section aria-labelledby="h-peers"><h2 id="h-peers">Peers</h2><p>Nobody is here right now.</p></section>'
        )
    signs = {"full": "", "partial": " ◐ partial", "alone": " ○ alone"}
    rows = ""
    for peer in sorted(run.peers, key=lambda peer: (-peer.samples, peer.name)):
        how = verdict(peer.peers_met, peer.peers_expected)
        rows += (
            f'<tr><th scope="row"><bdi>{escape(public_name(peer.name))}</bdi>'
            f'<span class="soft">{escape(peer.role)}</span></th>'
            f'<td>{peer.peers_met} of {peer.peers_expected}<span class="{how} word">{signs[how]}</span></td>'
            f"<td>{f'{peer.samples_per_second:,.1f}' if peer.samples else '–'}</td>"
            f"<td>{f'{peer.samples:,}' if peer.samples else '–'}</td><td>{peer.last_step:,}</td>"
            f"<td>{_number(peer.loss)}</td></tr>\n"
        )
    return f"""<section aria-labelledby="h-peers"><h2 id="h-peers">Peers</h2>
<div class="scroll" role="region" aria-labelledby="h-peers" tabindex="0"><table>
<thead><tr><th scope="col">Name</th><th scope="col">Met</th><th scope="col">Samples/s</th>
<th scope="col">Samples</th><th scope="col">Step</th><th scope="col">Loss</th></tr></thead>
<tbody>
{rows}</tbody></table></div></section>
"""


def _join(run: RunView) -> str:
    if run.finished or run.join_command is None:
        return ""
    return f"""<section aria-labelledby="h-join" class="join"><h2 id="h-join">Join</h2>
<p>Any computer helps, for as long as you like. Leave at any time; nothing is lost.</p>
<div class="command"><pre id="command" tabindex="0"><code>{escape(run.join_command)}</code></pre>
<button type="button" id="copy" aria-live="polite">Copy</button></div></section>
"""


def _footer(run: RunView) -> str:
    rows = [("Newest checkpoint", run.checkpoint), ("All curves", run.tracker)]
    lines = "".join(f"<div><dt>{label}</dt><dd><code>{escape(text)}</code></dd></div>" for label, text in rows if text)
    updated = datetime.fromtimestamp(run.updated, UTC)
    often = "The run has ended." if run.finished else f"Refreshes every {REFRESH_SECONDS} seconds."
    return f"""<footer><dl>{lines}</dl>
<p class="soft">As of <time datetime="{updated.isoformat()}">{updated:%H:%M:%S} UTC</time>.
{often} Trained with Samiti.</p>
</footer>"""


def _time_left(run: RunView) -> float | None:
    """Seconds to the end at the pace of the rounds that are shown; None as long as there is no pace."""
    recent = run.history[-SHOWN_ROUNDS:]
    if run.max_steps is None or len(recent) < 2 or recent[-1].step <= recent[0].step:
        return None
    pace = (recent[-1].time - recent[0].time) / (recent[-1].step - recent[0].step)
    return max(pace * (run.max_steps - run.global_step), 0.0)


def _duration(seconds: float) -> str:
    """In the one unit that people would use."""
    for limit, size, unit in ((120, 1, "seconds"), (120 * 60, 60, "minutes"), (48 * 3600, 3600, "hours")):
        if seconds < limit:
            return f"{max(seconds, 0) / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:,.2f}"


def _thinned(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means of equal groups of neighbours, with the last point as it is, since its value is written next to it."""
    size = math.ceil(len(points) / CURVE_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points) - 1, size)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups] + points[-1:]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from below `low` to above `high`, `about` of them."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    distance = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= about)
    first, last = math.floor(low / distance), math.ceil(high / distance)
    return [round(i * distance, 10) for i in range(first, last + 1)]


CURVE_STYLE = """
.curve{font:13px system-ui,sans-serif;font-variant-numeric:tabular-nums;color-scheme:light dark}
.curve text{fill:#5c5850}.curve .value{fill:#1a1917;font-weight:600}
.curve .grid{stroke:#e4e0d7;fill:none}.curve .axis{stroke:#a8a297}
.curve .line{fill:none;stroke:#1f6a9e;stroke-width:2;stroke-linejoin:round}.curve .end{fill:#1f6a9e}
@media (prefers-color-scheme:dark){.curve text{fill:#aaa59b}.curve .value{fill:#efece6}
.curve .grid{stroke:#33322f}.curve .axis{stroke:#67635c}.curve .line{stroke:#7dbbe8}.curve .end{fill:#7dbbe8}}
"""

STYLE = """
:root{color-scheme:light dark;--paper:#fbfaf6;--ink:#1a1917;--soft:#5c5850;--rule:#e4e0d7;--raised:#f3f0e8;
--full:#1f6a9e;--partial:#b06a00;--alone:#b3321f}
@media (prefers-color-scheme:dark){:root{--paper:#171614;--ink:#efece6;--soft:#aaa59b;--rule:#33322f;--raised:#22211e;
--full:#7dbbe8;--partial:#eba63f;--alone:#ff8a73}}
*{box-sizing:border-box;margin:0}
body{background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:800px;margin:0 auto;padding:56px 24px 40px}
h1{font:400 44px/1.1 "Iowan Old Style","Palatino Linotype",Palatino,Georgia,"Liberation Serif",serif;
letter-spacing:-.01em;overflow-wrap:anywhere;margin:2px 0 12px}
h2{font:400 23px/1.2 "Iowan Old Style","Palatino Linotype",Palatino,Georgia,"Liberation Serif",serif;margin-bottom:14px}
h2 small{font:14px system-ui,-apple-system,"Segoe UI",sans-serif;margin-left:6px}
section{margin-top:52px}
.over{color:var(--soft)}.soft{color:var(--soft)}
.state .dot{display:inline-block;width:9px;height:9px;border-radius:50%;background:var(--full);margin-right:9px}
.state .dot.still{background:none;box-shadow:inset 0 0 0 2px var(--soft)}
.state .soft{margin-left:4px}
.progress{display:flex;justify-content:space-between;gap:16px;margin-top:30px}
.bar{height:6px;border-radius:3px;background:var(--rule);margin-top:8px;overflow:hidden}
.bar i{display:block;height:100%;border-radius:3px;background:var(--full)}
.figures{display:grid;grid-template-columns:repeat(4,1fr);gap:24px;margin-top:36px;padding:22px 0;
border-top:1px solid var(--rule);border-bottom:1px solid var(--rule)}
.figures dt{color:var(--soft);font-size:14px}
.figures div{display:flex;flex-direction:column;justify-content:space-between}
.figures dd{font-size:28px;line-height:1.2;margin-top:4px;white-space:nowrap}
figure svg{display:block;width:100%;height:auto}
.narrow{display:none}
figcaption{color:var(--soft);margin-top:10px}
.rounds{display:grid;grid-template-columns:repeat(40,1fr);gap:3px;align-items:end;height:56px}
.rounds i{display:block;border-radius:2px;min-height:12px}
i.full{background:var(--full)}
i.partial{background:repeating-linear-gradient(135deg,var(--partial) 0 4px,transparent 4px 6px);
box-shadow:inset 0 0 0 1.5px var(--partial)}
i.alone{box-shadow:inset 0 0 0 2px var(--alone)}
.legend{list-style:none;padding:0;display:flex;flex-wrap:wrap;gap:6px 28px;margin-top:14px}
.legend i{display:inline-block;width:12px;border-radius:2px;margin-right:8px}
.legend i.full{height:14px}.legend i.partial{height:11px}.legend i.alone{height:8px}
.scroll{overflow-x:auto;margin:0 -24px;padding:0 24px}
table{border-collapse:collapse;width:100%}
th,td{text-align:right;padding:9px 0 9px 22px;border-bottom:1px solid var(--rule);white-space:nowrap;
vertical-align:top}
th:first-child{text-align:left;padding-left:0;white-space:normal;overflow-wrap:anywhere;min-width:9em}
thead th{color:var(--soft);font-weight:400;font-size:14px}
tbody th{font-weight:600}
tbody th span{display:block;font-weight:400;font-size:14px}
.word{display:block;font-size:14px}.word.partial{color:var(--partial)}.word.alone{color:var(--alone);font-weight:600}
code,pre{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"Liberation Mono",monospace;font-size:14px}
.command{display:flex;gap:12px;align-items:stretch;margin-top:14px}
pre{flex:1;min-width:0;background:var(--raised);border-radius:6px;padding:13px 16px;white-space:pre-wrap;
overflow-wrap:anywhere;line-height:1.55}
button{font:inherit;color:inherit;background:none;border:1px solid var(--soft);border-radius:6px;min-width:92px;
min-height:46px;cursor:pointer}
button:hover{background:var(--raised)}
:focus-visible{outline:3px solid var(--full);outline-offset:3px}
footer{margin-top:56px;padding-top:22px;border-top:1px solid var(--rule)}
footer dt{color:var(--soft);font-size:14px}
footer dd{overflow-wrap:anywhere;margin-bottom:12px}
footer p{font-size:14px;margin-top:6px}
@media (max-width:620px){main{padding:32px 20px 32px}h1{font-size:34px}section{margin-top:42px}
.figures{grid-template-columns:1fr 1fr;gap:20px 16px}.wide{display:none}.narrow{display:block}
.rounds{gap:2px}.scroll{margin:0 -20px;padding:0 20px}.command{flex-direction:column}
.progress{flex-wrap:wrap;gap:0 16px}
th,td{padding-left:13px;font-size:14px}th:first-child{min-width:7.5em}}
"""

# The clipboard interface exists on https and localhost only; a page of an organizer's server is often plain http.
SCRIPT = """
const button = document.getElementById("copy");
if (button) button.addEventListener("click", async () => {
  const command = document.getElementById("command");
  try {
    await navigator.clipboard.writeText(command.textContent);
  } catch {
    getSelection().selectAllChildren(command);
    document.execCommand("copy");
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
});
"""
