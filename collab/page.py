"""The run on one page: a single HTML file that needs nothing from the network, rendered from plain data."""

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import NamedTuple

from collab.public_text import public_line, public_name
from collab.view import SHOWN_ROUNDS, ExpertView, LossAt, PeerView, RunView, verdict

REFRESH_SECONDS = 5
CURVE_POINTS = 240  # more than this many steps are averaged in groups: a screen shows no more, and the page stays small
SHOWN_NAMES = 20
SHOWN_EVENTS = 30
SHOWN_EXPERTS = 64


def render_page(run: RunView, served: bool = False) -> str:
    """The whole page. The same view gives the same text; nothing is read, written or fetched.

    :param served: by `collab.page_server`, which the page's script then asks for what is new, and for fill-mask; else
      it is a file, which is loaded again every few seconds until the run has ended.
    """
    again = f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
    refresh = "" if run.finished else f"<noscript>{again}</noscript>" if served else again
    sections = [
        _header(run), _figures(run), _curve(run), _rounds(run), _join(run), _peers(run), _experts(run), _board(run),
        _try(run) if served else "", _events(run), _duties(run), _footer(run, served),
    ]  # fmt: skip
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
{refresh}
<meta name="color-scheme" content="light dark">
<title>{escape(public_line(run.run_id))}: step {run.global_step:,}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body{" data-served" if served else ""}>
<main>
{"".join(sections)}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def curve_svg(history: Sequence[LossAt], width: int = 720, height: int = 270, log: bool = False) -> str:
    """The loss over the global steps as an SVG that stands alone: it brings its colours for light and dark.

    :param history: rounds in the order of their steps; those without a finite loss are left out.
    :param width: in pixels of the place where it is shown, so that its text comes out at 13 px.
    :param log: draw the loss on a logarithmic scale; losses that are not above 0 are left out, too.
    """
    points = [point for point in _thinned(history) if point.loss > 0 or not log]
    name = f"curve-{width}{'-log' if log else ''}"
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
    rows = _log_ticks(min(losses), max(losses)) if log else _ticks(min(losses), max(losses), 5)
    low, high = min(rows[0], min(losses)), max(rows[-1], max(losses))
    scale = math.log if log else float

    def x(step: float) -> float:
        return left + (right - left) * (step - first) / max(last - first, 1)

    def y(loss: float) -> float:
        return bottom - (bottom - top) * (scale(loss) - scale(low)) / ((scale(high) - scale(low)) or 1)

    grid = "".join(
        f'<path class="grid" d="M{left} {y(v):.1f}H{right}"/>'
        f'<text x="{left - 9}" y="{y(v) + 4.5:.1f}" text-anchor="end">{v:g}</text>'
        for v in rows
    )
    grid += "".join(
        f'<path class="grid" d="M{x(v):.1f} {bottom}v5"/>'
        f'<text x="{x(v):.1f}" y="{bottom + 20}" text-anchor="middle">{v:,.0f}</text>'
        for v in _ticks(first, last, width // 75)
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


def loss_in_words(history: Sequence[LossAt]) -> str:
    """The curve for those who hear the page or want one sentence."""
    losses = [(r.step, r.loss) for r in history if r.loss is not None and math.isfinite(r.loss)]
    if not losses:
        return "No peer has reported a loss yet."
    (first, before), (last, now) = losses[0], losses[-1]
    if first == last:
        return f"Loss {_number(now)} at step {last:,}."
    verb = "fell" if now < before else "rose"
    return f"Loss {verb} from {_number(before)} at step {first:,} to {_number(now)} at step {last:,}."


def _header(run: RunView) -> str:
    state = "Finished" if run.finished else "Training" if run.peers else "Waiting for peers"
    began, so_far = datetime.fromtimestamp(run.started, UTC), _duration(run.updated - run.started)
    if run.max_steps:
        share = min(run.global_step / run.max_steps, 1.0)
        of, left = f" of {run.max_steps:,}", run.seconds_to_end
        bar = (
            f'<div class="bar" role="progressbar" aria-label="Progress of the run" aria-valuemin="0" '
            f'aria-valuemax="{run.max_steps}" aria-valuenow="{run.global_step}"><i style="width:{share:.2%}"></i></div>'
        )
        note = f"{share:.0%}" + (f", about {_duration(left)} left" if left is not None and not run.finished else "")
    else:
        of, bar, note = "", "", "no end is set"
    return f"""<header id="live-header" data-live>
<p class="over">{escape(public_line(run.task, 400))}</p>
<h1>{escape(public_line(run.run_id))}</h1>
<p class="state"><span class="dot {"still" if run.finished or not run.peers else ""}" aria-hidden="true"></span>{state}
<span class="soft">began <time datetime="{began.isoformat()}">{began.day} {began:%B %Y, %H:%M} UTC</time>,
{f"took {so_far}" if run.finished else f"{so_far} ago"}</span></p>
<div class="progress"><p><b>Step {run.global_step:,}</b>{of}</p><p class="soft">{note}</p></div>
{bar}
</header>
"""


def _figures(run: RunView) -> str:
    wait, speed, tokens = run.seconds_to_next_step, run.samples_per_second, run.swarm.get("tokens")
    rows = [
        ("Loss", _number(run.loss)),
        ("Samples per second", "–" if speed is None else f"{speed:,.0f}"),
        ("Next step in", "–" if wait is None or run.finished else _duration(wait)),
        ("Samples in all", _short(run.samples)),
        *([] if tokens == run.samples else [("Tokens in all", _short(tokens))]),  # pictures have none
        ("Steps an hour", _short(run.swarm.get("steps_per_hour"))),
        ("Peers now", f"{len(run.peers):,}"),
        ("Rounds that were full", _percent(run.swarm.get("full_rounds"))),
        ("Time spent computing", _percent(run.swarm.get("utilisation"))),
    ]
    cells = "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in rows)
    return f'<dl class="figures" id="live-figures" data-live aria-label="The run in numbers">{cells}</dl>\n'


def _curve(run: RunView) -> str:
    # One drawing for each width, because the text inside an SVG would shrink with it.
    points = _thinned(run.history)  # once: a run of 100,000 steps is drawn four times
    drawings = "".join(
        f'<div class="{scale}"><div class="wide">{curve_svg(points, 832, log=scale == "log")}</div>'
        f'<div class="narrow">{curve_svg(points, 320, 230, log=scale == "log")}</div></div>'
        for scale in ("linear", "log")
        if run.loss is not None
    )
    return f"""<section aria-labelledby="h-loss"><div class="title"><h2 id="h-loss">Loss</h2>
<button type="button" id="scale" class="small" aria-pressed="false">Log scale</button></div>
<figure id="curve"><div id="live-curve" data-live>{drawings}</div>
<figcaption id="live-words" data-live>{loss_in_words(points)}</figcaption></figure></section>
"""


def _rounds(run: RunView) -> str:
    shown = run.history[-SHOWN_ROUNDS:]
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
    label, span = "No round yet.", ""
    if shown:
        last = shown[-1]
        label = f"The last {len(shown)} rounds: {words}. The newest met {last.peers_met} of {last.peers_expected}."
        span = f"steps {shown[0].step:,} to {last.step:,}" if len(shown) > 1 else f"step {last.step:,}"
    return f"""<section aria-labelledby="h-rounds"><div id="live-rounds" data-live>
<h2 id="h-rounds">Rounds <small class="soft">{span}</small></h2>
<div class="rounds" role="img" aria-label="{label}">{cells}</div>
<ul class="legend">
<li><i class="full" aria-hidden="true"></i>{counts["full"]} full <span class="soft">everybody met</span></li>
<li><i class="partial" aria-hidden="true"></i>{counts["partial"]} partial <span class="soft">some missing</span></li>
<li><i class="alone" aria-hidden="true"></i>{counts["alone"]} alone <span class="soft">nobody was met</span></li>
</ul></div></section>
"""


def _peers(run: RunView) -> str:
    if not run.peers and run.finished:
        return ""
    rows = "".join(_peer(peer, run.global_step) for peer in run.peers)
    nobody = "" if run.peers else "Nobody is here right now."
    return f"""<section aria-labelledby="h-peers"><h2 id="h-peers">Peers
<small class="soft" id="live-count" data-live>{f"{len(run.peers):,} now" if run.peers else ""}</small></h2>
<p id="live-nobody" data-live>{nobody}</p>
<div class="scroll" role="region" aria-labelledby="h-peers" tabindex="0"><table>
<caption class="unseen">Live peers, the one that gave most in this session first</caption>
<thead><tr><th scope="col">Name</th><th scope="col">Met</th><th scope="col">Samples/s</th>
<th scope="col" class="more">Waits for data</th><th scope="col" class="more">Memory</th>
<th scope="col">Given</th><th scope="col" class="more">Step</th><th scope="col" class="more">Loss</th></tr></thead>
<tbody id="live-peers" data-live>
{rows}</tbody></table></div></section>
"""


def _peer(peer: PeerView, step: int) -> str:
    signs = {"full": "", "partial": " ◐ partial", "alone": " ○ alone"}
    how = verdict(peer.peers_met, peer.peers_expected)
    kind = escape(public_line(f"{peer.role}, {peer.device}" if peer.device else peer.role, 60))
    slow = '<span class="partial word">▾ slow</span>' if peer.slow else ""
    behind = f'<span class="partial word">{step - peer.last_step:,} behind</span>' if peer.last_step < step - 1 else ""
    wait = "–" if peer.data_wait is None else f"{peer.data_wait:.0%}"
    memory = "–" if peer.memory is None else f"{peer.memory / 2**30:.1f} GiB"
    return (
        f'<tr><th scope="row"><bdi>{escape(public_name(peer.name))}</bdi><span class="soft">{kind}</span></th>'
        f'<td>{peer.peers_met} of {peer.peers_expected}<span class="{how} word">{signs[how]}</span></td>'
        f"<td>{f'{peer.samples_per_second:,.1f}' if peer.samples_per_second else '–'}{slow}</td>"
        f'<td class="more">{wait}</td><td class="more">{memory}</td>'
        f"<td>{f'{peer.samples:,}' if peer.samples else '–'}</td>"
        f'<td class="more">{peer.last_step:,}{behind}</td><td class="more">{_number(peer.loss)}</td></tr>\n'
    )


def _experts(run: RunView) -> str:
    if not run.experts_total:
        return ""
    served = {expert.index: expert for expert in run.experts}
    alive = sum(expert.milliseconds is not None for expert in run.experts)
    rows = "".join(_expert(index, served.get(index)) for index in range(min(run.experts_total, SHOWN_EXPERTS)))
    others = run.experts_total - SHOWN_EXPERTS
    more = f'<p class="soft">and {others:,} others</p>' if others > 0 else ""
    return f"""<section aria-labelledby="h-experts"><h2 id="h-experts">Experts
<small class="soft" id="live-alive" data-live>{alive:,} of {run.experts_total:,} answer</small></h2>
<div class="scroll" role="region" aria-labelledby="h-experts" tabindex="0"><table>
<caption class="unseen">The experts of this run, and who serves them</caption>
<thead><tr><th scope="col">Expert</th><th scope="col">Answers in</th><th scope="col">Tokens/s</th>
<th scope="col">Steps</th></tr></thead>
<tbody id="live-experts" data-live>
{rows}</tbody></table></div>{more}</section>
"""


def _expert(index: int, expert: ExpertView | None) -> str:
    if expert is None:
        nobody = '<span class="alone word">○ nobody serves it</span>'
        return f'<tr><th scope="row">{index}{nobody}</th><td>–</td><td>–</td><td>–</td></tr>\n'
    silent = '<span class="alone word">○ silent</span>'
    answers = silent if expert.milliseconds is None else f"{expert.milliseconds:,.0f} ms"
    who = f'<span class="soft"><bdi>{escape(public_name(expert.server))}</bdi></span>'
    return (
        f'<tr><th scope="row">{index}{who}</th><td>{answers}</td>'
        f"<td>{expert.rows_per_second:,.0f}</td><td>{expert.steps:,}</td></tr>\n"
    )


def _board(run: RunView) -> str:
    most = max((samples for _, samples in run.contributors), default=0) or 1
    rows = "".join(
        f'<li><span class="who"><bdi>{escape(public_name(name))}</bdi><span>{samples:,}</span></span>'
        f'<span class="bar" aria-hidden="true"><i style="width:{samples / most:.1%}"></i></span></li>\n'
        for name, samples in run.contributors[:SHOWN_NAMES]
    )
    others = len(run.contributors) - SHOWN_NAMES
    more = f'<p class="soft">and {others:,} others</p>' if others > 0 else ""
    board = f'<ol class="board">{rows}</ol>{more}' if rows else "<p>Nobody yet.</p>"
    return f"""<section aria-labelledby="h-board"><h2 id="h-board">Contributors
<small class="soft">samples averaged into the model</small></h2>
<div id="live-board" data-live>{board}</div></section>
"""


def _try(run: RunView) -> str:
    if not run.can_fill_mask:
        return ""
    return """<section aria-labelledby="h-try"><h2 id="h-try">Try the newest checkpoint</h2>
<form id="try"><label for="sentence">A sentence with [MASK] in the place of one word</label>
<textarea id="sentence" rows="2" maxlength="500" required spellcheck="false" autocomplete="off"></textarea>
<p class="buttons"><button type="submit">Fill the gap</button>
<button type="button" id="gap">Insert [MASK]</button></p></form>
<div id="answer" aria-live="polite"></div></section>
"""


def _events(run: RunView) -> str:
    items = ""
    for event in run.events[:SHOWN_EVENTS]:
        at = datetime.fromtimestamp(event.time, UTC)
        how = ' class="bad"' if event.kind in ("alone", "not averaged", "failed") else ""
        items += (
            f'<li><time class="soft" datetime="{at:%Y-%m-%dT%H:%M:%SZ}">{at:%H:%M:%S}</time> '
            f"<span{how}><bdi>{escape(public_line(event.text))}</bdi></span></li>\n"
        )
    return f"""<section aria-labelledby="h-events"><h2 id="h-events">Events <small class="soft">UTC</small></h2>
<div id="live-events" data-live>{f'<ul class="events">{items}</ul>' if items else "<p>Nothing yet.</p>"}</div></section>
"""


def _duties(run: RunView) -> str:
    if not run.duties:
        return ""
    rows = ""
    for duty in run.duties:
        failed = f"failed {duty.failures:,} times" if duty.failures > 1 else "failed once"
        state = f'<span class="partial">{failed}</span>' if duty.failures else "well"
        error = f'<span class="soft word">{escape(public_line(duty.last_error))}</span>' if duty.last_error else ""
        rows += (
            f'<tr><th scope="row">{escape(public_line(duty.name))}</th><td class="text">{state}{error}</td>'
            f'<td class="more">{_duration(duty.silent_seconds)} ago</td></tr>\n'
        )
    return f"""<section aria-labelledby="h-duties"><h2 id="h-duties">Duties of the auxiliary peer</h2>
<table class="duties"><caption class="unseen">Each duty, how it goes, and when it last went well</caption>
<thead><tr><th scope="col">Duty</th><th scope="col" class="text">So far</th>
<th scope="col" class="more">Last went well</th></tr></thead>
<tbody id="live-duties" data-live>
{rows}</tbody></table></section>
"""


def _join(run: RunView) -> str:
    if run.finished or run.join_command is None:
        return ""
    return f"""<section aria-labelledby="h-join" class="join"><h2 id="h-join">Join</h2>
<p>Any computer helps, for as long as you like. Leave at any time; nothing is lost.</p>
<div class="command"><pre id="command" tabindex="0"><code>{escape(run.join_command)}</code></pre>
<button type="button" id="copy">Copy</button></div><p id="copied" class="soft" role="status"></p></section>
"""


def _footer(run: RunView, served: bool) -> str:
    rows = [("Newest checkpoint", run.checkpoint), ("All curves", run.tracker)]
    lines = "".join(f"<div><dt>{label}</dt><dd><code>{escape(text)}</code></dd></div>" for label, text in rows if text)
    updated = datetime.fromtimestamp(run.updated, UTC)
    often = "The run has ended." if run.finished else "Updates itself."
    other = (
        '<p class="soft">The same for programs: <a href="status.json">JSON</a>, <a href="metrics">Prometheus</a>.</p>'
        if served
        else ""
    )
    return f"""<footer><div id="live-footer" data-live><dl>{lines}</dl>
<p class="soft">As of <time datetime="{updated.isoformat()}">{updated:%H:%M:%S} UTC</time>.
{often} Trained with Samiti.</p></div>
{other}<p id="news" class="unseen" role="status"></p><p id="lost" role="status"></p>
</footer>"""


def _duration(seconds: float) -> str:
    """In the one unit that people would use."""
    for limit, size, unit in ((120, 1, "seconds"), (120 * 60, 60, "minutes"), (48 * 3600, 3600, "hours")):
        if seconds < limit:
            return f"{max(seconds, 0) / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"


def _percent(share: float | None) -> str:
    return "–" if share is None or not math.isfinite(share) else f"{share:.0%}"


def _short(number: float | None) -> str:
    """With three digits that count: 950, 12.3 k, 1.20 M."""
    if number is None or not math.isfinite(number):
        return "–"
    count = round(number)
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**4, "k")):
        if count >= size:
            value = count / min(size, 1000 if unit == "k" else size)
            return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}"
    return f"{count:,}"


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:,.2f}"


class _Point(NamedTuple):
    step: float
    loss: float


def _thinned(history: Sequence[LossAt]) -> list[_Point]:
    """Means of equal groups of neighbours, with the first and the last point as they are: their values are in words."""
    known = [r for r in history if r.loss is not None and math.isfinite(r.loss)]
    steps: list[float] = [r.step for r in known]
    losses: list[float] = [r.loss for r in known if r.loss is not None]
    last = len(known) - 1
    size = math.ceil((last - 1) / CURVE_POINTS) or 1
    ends = [(start, min(start + size, last)) for start in range(1, last, size)]
    means = [_Point(sum(steps[a:b]) / (b - a), sum(losses[a:b]) / (b - a)) for a, b in ends]
    first_and_last = [_Point(steps[i], losses[i]) for i in sorted({0, last}) if known]
    return [*first_and_last[:1], *means, *first_and_last[1:]]


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from below `low` to above `high`, `about` of them."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    distance = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= about)
    first, last = math.floor(low / distance), math.ceil(high / distance)
    return [round(i * distance, 10) for i in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic scale: powers of ten with 2 and 5 of them, or evenly apart within less of one."""
    if high < 10 * low:
        ticks = [tick for tick in _ticks(low, high, 5) if tick > 0]
        return ticks or [low, high]
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    apart = (last - first) // 6 + 1
    steps = (1, 2, 5) if last - first < 3 else (1,)
    ticks = [10.0**power * m for power in range(first, last + 1, apart) for m in steps]
    below = max([tick for tick in ticks if tick <= low], default=ticks[0])
    above = min([tick for tick in ticks if tick >= high], default=ticks[-1])
    return [tick for tick in ticks if below <= tick <= above]


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
--full:#1f6a9e;--partial:#985a00;--alone:#b3321f}
@media (prefers-color-scheme:dark){:root{--paper:#171614;--ink:#efece6;--soft:#aaa59b;--rule:#33322f;--raised:#22211e;
--full:#7dbbe8;--partial:#eba63f;--alone:#ff8a73}}
*{box-sizing:border-box;margin:0}
body{background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:880px;margin:0 auto;padding:56px 24px 40px}
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
.figures{display:grid;grid-template-columns:repeat(3,1fr);gap:24px;margin-top:36px;padding:22px 0;
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
.scroll{overflow:auto;max-height:min(46em,90vh);border-bottom:1px solid var(--rule);margin:0 -24px;padding:0 24px}
.scroll thead th{position:sticky;top:0;background:var(--paper)}
table{border-collapse:collapse;width:100%}
th,td{text-align:right;padding:9px 0 9px 22px;border-bottom:1px solid var(--rule);white-space:nowrap;
vertical-align:top}
th:first-child{text-align:left;padding-left:0;white-space:normal;overflow-wrap:anywhere;min-width:9em}
thead th{color:var(--soft);font-weight:400;font-size:14px}
tbody th{font-weight:600}
tbody th .soft{display:block;font-weight:400;font-size:14px}
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
.title{display:flex;justify-content:space-between;align-items:start}
button.small{min-height:34px;min-width:0;padding:0 14px;font-size:14px}
button[aria-pressed=true]{background:var(--ink);color:var(--paper)}
#curve .log,#curve[data-log] .linear{display:none}#curve[data-log] .log{display:block}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
.board{padding:0;list-style:none;columns:2;column-gap:40px}
.board li{break-inside:avoid;padding:5px 0}
.who{display:flex;justify-content:space-between;gap:16px}.who bdi{overflow-wrap:anywhere;font-weight:600}
.board .bar{display:block;height:4px;margin-top:3px}
label{display:block;margin-bottom:8px}
textarea{display:block;width:100%;font:inherit;color:inherit;background:var(--raised);border:1px solid var(--soft);
border-radius:6px;padding:11px 14px;resize:vertical}
.buttons{display:flex;flex-wrap:wrap;gap:12px;margin-top:12px}button{padding:0 16px}
#answer{margin-top:18px;max-width:26em}#answer ol{list-style:none;padding:0}#answer li{padding:5px 0}
#answer p{color:var(--soft);font-size:14px}
.events{list-style:none;padding:0;max-height:17em;overflow-y:auto}
.events li{display:flex;gap:16px;padding:4px 0}.events li span{overflow-wrap:anywhere;min-width:0}
.bad,.partial.word,td .partial{color:var(--partial)}
td.text,th.text{text-align:left;white-space:normal;overflow-wrap:anywhere}
.duties th:first-child{min-width:0;overflow-wrap:break-word}.duties td:last-child{color:var(--soft)}
a{color:inherit}#lost{color:var(--alone);font-weight:600}#lost:empty,#copied:empty,#live-nobody:empty{display:none}
@media (max-width:620px){.more{display:none}.board{columns:1}main{padding:32px 20px 32px}
h1{font-size:34px}section{margin-top:42px}
.figures{grid-template-columns:1fr 1fr;gap:20px 16px}.wide{display:none}.narrow{display:block}
.rounds{gap:2px}.scroll{margin:0 -20px;padding:0 20px}.command{flex-direction:column}
.progress{flex-wrap:wrap;gap:0 16px}
th,td{padding-left:9px;font-size:14px}th:first-child{min-width:6.5em}}
"""

# The clipboard interface exists on https and localhost only; a page of an organizer's server is often plain http.
SCRIPT = """
"use strict";
const $ = (id) => document.getElementById(id);

if ($("copy")) $("copy").addEventListener("click", async () => {
  const command = $("command");
  let done = false;
  try {
    await navigator.clipboard.writeText(command.textContent);
    done = true;
  } catch {
    getSelection().selectAllChildren(command);
    done = document.execCommand("copy");
  }
  $("copied").textContent = done ? "Copied." : "The line is selected: copy it with Ctrl+C.";
  setTimeout(() => { $("copied").textContent = ""; }, 5000);
});

$("scale").addEventListener("click", () => {
  const log = $("curve").toggleAttribute("data-log");
  $("scale").setAttribute("aria-pressed", log);
});

if ($("try")) {
  $("gap").addEventListener("click", () => {
    const box = $("sentence");
    box.setRangeText("[MASK]", box.selectionStart, box.selectionEnd, "end");
    box.focus();
  });
  $("try").addEventListener("submit", async (event) => {
    event.preventDefault();
    const say = (text) => {
      const line = document.createElement("p");
      line.textContent = text;
      $("answer").replaceChildren(line);
    };
    say("The model is thinking ...");
    try {
      const reply = await fetch("fill-mask", {
        method: "POST",
        headers: {"Content-Type": "application/json"},
        body: JSON.stringify({text: $("sentence").value}),
      });
      const found = await reply.json();
      if (!reply.ok) return say(found.error);
      say(`The model of global step ${found.global_step} says:`);
      const list = document.createElement("ol");
      for (const guess of found.guesses) {
        const item = list.appendChild(document.createElement("li"));
        const who = item.appendChild(document.createElement("span"));
        who.className = "who";
        who.appendChild(document.createElement("bdi")).textContent = guess.word;
        who.appendChild(document.createElement("span")).textContent = `${(100 * guess.probability).toFixed(1)} %`;
      }
      $("answer").append(list);
    } catch {
      say("The page's server does not answer.");
    }
  });
}

let told = performance.now();
async function refresh() {
  try {
    const reply = await fetch("./", {cache: "no-cache"});
    if (!reply.ok) throw new Error(reply.statusText);
    const now = new DOMParser().parseFromString(await reply.text(), "text/html");
    for (const old of document.querySelectorAll("[data-live]")) {
      const fresh = now.getElementById(old.id), selection = getSelection();
      const inUse = !selection.isCollapsed && selection.containsNode(old, true);
      if (fresh && !inUse && fresh.innerHTML !== old.innerHTML) old.replaceChildren(...fresh.childNodes);
    }
    $("lost").textContent = "";
    if (document.title !== now.title && performance.now() - told > 30000) {
      $("news").textContent = `${now.title}. ${$("live-words").textContent}`;
      told = performance.now();
    }
    document.title = now.title;
  } catch {
    $("lost").textContent = "The auxiliary peer does not answer; this is what it said last.";
  }
}
async function watch() {
  if (document.visibilityState === "visible") await refresh();
  setTimeout(watch, 2000);
}
if (document.body.hasAttribute("data-served")) setTimeout(watch, 2000);
"""

# Only the script above may run, and only the page's own server may be asked: a name that slipped through as HTML stays
# harmless.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; "
    f"form-action 'none'; script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)
