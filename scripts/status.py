"""How a run is doing, in a terminal: what its page shows, asked of the swarm itself.

    python scripts/status.py --initial_peers ADDRESS

--watch goes on until Ctrl-C; --json prints what docs/page.md describes. It trains nothing and joins as a client.
"""

import contextlib
import logging
import math
import os
import shutil
import statistics
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arguments import PeerArguments, option, parse, pick  # noqa: E402
from collab.console import bar, duration  # noqa: E402
from collab.errors import UserError  # noqa: E402
from collab.manifest import Manifest, fetch_manifest, join_command  # noqa: E402
from collab.metrics import read_records, run_validators  # noqa: E402
from collab.monitor import Monitor  # noqa: E402
from collab.peer import Peer, peer_id_in  # noqa: E402
from collab.processes import StopSignal, guard_children, run_program  # noqa: E402
from collab.public_text import public_line, public_name  # noqa: E402
from collab.reachability import start_peer  # noqa: E402
from collab.view import (  # noqa: E402
    SHOWN_ROUNDS,
    STATUS_PROTOCOL,
    PeerView,
    RunView,
    as_json,
    from_json,
    look,
    peer_views,
    verdict,
)

ASK_SECONDS = 5.0
REFRESH_SECONDS = 2.0
COLOURS = {"full": "32", "partial": "33", "alone": "31", "bold": "1", "soft": "2"}  # of ANSI terminals
CELLS = {"full": "█", "partial": "▄", "alone": "!"}
LEVELS = "▁▂▃▄▅▆▇█"
LISTED = 10  # contributors and events


@dataclass
class StatusArguments:
    """How it is shown."""

    _argument_group_name = "how it is shown"

    watch: bool = option(False, "Show it again every two seconds, until Ctrl-C.")
    json: bool = option(False, "Print it as JSON, one line each time, for programs.")


def main() -> None:
    given = parse(__doc__ or "", (PeerArguments, StatusArguments))
    network, mine = pick(PeerArguments, given), pick(StatusArguments, given)
    if not network.initial_peers:
        raise UserError("Which run? Add --initial_peers ADDRESS, the address in the line that volunteers type.")
    logging.getLogger("hivemind").setLevel(logging.CRITICAL)
    guard_children()
    stop = StopSignal()
    with contextlib.closing(start_peer(**network.peer_options() | {"client_mode": True})) as peer:
        manifest = fetch_manifest(peer, Path(network.cache_dir), network.organizer)
        settings = manifest.settings
        lifetime = settings["metadata_expiration"]
        peer.dht.add_validators(run_validators(settings["run_id"], manifest.swarm_id, lifetime))
        swarm = Swarm(peer, manifest)
        stop.listen()
        terminal = sys.stdout.isatty()
        while not stop:
            view = swarm.look()
            size = shutil.get_terminal_size()
            rows = max(size.lines - 30, 5) if mine.watch and terminal else None
            text = as_json(view) if mine.json else as_text(view, size.columns, coloured(terminal), rows)
            above = "\x1b[H\x1b[2J" if mine.watch and terminal and not mine.json else ""
            print(above + text, flush=True)
            if not mine.watch:
                break
            stop.wait(REFRESH_SECONDS)


class Swarm:
    """A run as a client of its DHT sees it; an auxiliary peer that answers adds what only it knows."""

    def __init__(self, peer: Peer, manifest: Manifest) -> None:
        settings = manifest.latest
        self._peer, self._manifest = peer, manifest
        self._monitor = Monitor(
            lifetime=settings["metadata_expiration"],
            target_batch_size=settings["target_batch_size"],
            last_step=settings["max_global_steps"],
            start=None,
        )
        self._began = time.time()
        self._auxiliaries = list(dict.fromkeys([manifest.organizer, *map(peer_id_in, peer.initial_peers)]))

    def look(self) -> RunView:
        """The run now. The peers come from their own signed records, the rest from an auxiliary peer if one answers."""
        records = read_records(self._peer, self._manifest.settings["run_id"])
        self._monitor.update(records)
        known = self._ask_auxiliary()
        return replace(known, peers=peer_views(self._monitor.live)) if known else self._seen()

    def _ask_auxiliary(self) -> RunView | None:
        for peer_id in self._auxiliaries:
            with contextlib.suppress(OSError, ValueError):
                view = from_json(self._peer.fetch(peer_id, STATUS_PROTOCOL, ASK_SECONDS))
                if view.run_id == self._manifest.settings["run_id"]:
                    return view
        return None

    def _seen(self) -> RunView:
        settings = self._manifest.latest
        seen = look(
            self._monitor,
            run_id=settings["run_id"],
            task=settings["task"],
            started=self._began,
            join_command=join_command(self._peer, self._manifest) if not self._peer.client_mode else None,
        )
        said = [record.step for record in self._monitor.live] or [0]  # a step is complete seconds after it is heard of
        return replace(seen, global_step=max(seen.global_step, statistics.median_low(said)))


def coloured(terminal: bool) -> bool:
    """Whether to use colours: on a terminal whose user has not switched them off (no-color.org)."""
    return terminal and not os.environ.get("NO_COLOR")


def as_text(run: RunView, width: int = 80, colours: bool = False, rows: int | None = None) -> str:
    """The run as lines of at most `width` columns, apart from the line that people copy.

    :param rows: peers that are listed at most; None for all.
    """

    def paint(text: str, how: str) -> str:
        return f"\x1b[{COLOURS[how]}m{text}\x1b[0m" if colours else text

    def head(text: str) -> list[str]:
        return ["", paint(fit(text, width), "bold")]

    lines = [paint(fit(public_line(run.run_id), width), "bold"), paint(fit(public_line(run.task), width), "soft")]
    lines += [fit(line, width) for line in _progress(run)]
    shown = run.history[-min(SHOWN_ROUNDS, max(width - 8, 1)) :]
    if shown:
        hows = [verdict(r.peers_met, r.peers_expected) for r in shown]
        counts, last = Counter(hows), shown[-1]
        losses = [r.loss for r in shown]
        lines += [
            "",
            "loss    " + sparkline(losses),
            "rounds  " + "".join(paint(CELLS[how], how) for how in hows),
            fit(
                f"{'':8}{counts['full']} full, {counts['partial']} partial, {counts['alone']} alone; the last one met "
                f"{last.peers_met} of {last.peers_expected}",
                width,
            ),
        ]
    lines += head(f"Peers ({len(run.peers):,})")
    listed = run.peers if rows is None else run.peers[:rows]
    for number, line in enumerate(_table(listed, run.global_step, width)):
        how = "soft" if number == 0 else _mood(listed[number - 1], run.global_step)
        lines.append(paint(line, how) if how else line)
    if len(listed) < len(run.peers):
        lines.append(f"  and {len(run.peers) - len(listed):,} more")
    if run.contributors:
        lines += head("Contributors, in samples")
        lines += [fit(f"  {samples:>15,}  {public_name(name)}", width) for name, samples in run.contributors[:LISTED]]
    if run.events:
        lines += head("Events")
        for event in run.events[:LISTED]:
            at = time.strftime("%H:%M:%S", time.localtime(event.time))
            lines.append(fit(f"  {at}  {public_line(event.text)}", width))
    if failed := [duty for duty in run.duties if duty.failures]:
        lines += head("Duties of the auxiliary peer that have failed, and go on")
        for duty in failed:
            times = "once" if duty.failures == 1 else f"{duty.failures:,} times"
            told = f"  {public_line(duty.name)}: {times}, last {public_line(duty.last_error)}"
            lines.append(paint(fit(told, width), "partial"))
    if run.join_command and not run.finished:
        lines += [*head("Join"), f"  {public_command(run.join_command)}"]
    return "\n".join(lines)


def public_command(command: str) -> str:
    """The line to type as it is, without anything that would steer the terminal."""
    return "".join(c for c in command if c.isprintable())


def sparkline(values: Sequence[float | None]) -> str:
    """One character for each value, the lowest as the lowest block; a gap where there is none."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return ""
    low, high = min(known), max(known)
    return "".join(
        LEVELS[round((value - low) / ((high - low) or 1) * (len(LEVELS) - 1))]
        if value is not None and math.isfinite(value)
        else " "
        for value in values
    )


def columns(text: str) -> int:
    """The columns that `text` takes in a terminal: none for marks on other letters, two for East Asian wide ones."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def fit(text: str, width: int, pad: bool = False) -> str:
    """`text` in at most `width` columns, with an ellipsis if it is cut; exactly so many with `pad`."""
    if columns(text) > width:
        while text and columns(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - columns(text)) if pad else text


def _progress(run: RunView) -> list[str]:
    line = f"step {run.global_step:,}"
    if run.max_steps:
        share = run.global_step / run.max_steps
        line += f" of {run.max_steps:,}  {bar(share)} {share:.0%}"
    if run.finished:
        line += "  finished"
    elif run.seconds_to_end is not None:
        line += f"  {duration(run.seconds_to_end)} left"
    figures = []
    if run.loss is not None:
        figures.append(f"loss {run.loss:.3f}")
    if run.samples_per_second is not None:
        figures.append(f"{run.samples_per_second:,.0f} samples/s")
    if run.samples:
        figures.append(f"{run.samples:,} samples in all")
    if run.seconds_to_next_step is not None:
        figures.append(f"next step in {duration(run.seconds_to_next_step)}")
    return [line, "  ".join(figures)]


def _mood(peer: PeerView, step: int) -> str:
    how = verdict(peer.peers_met, peer.peers_expected)
    if how == "full":
        return "partial" if peer.slow or peer.last_step < step - 1 else ""
    return how


def _table(peers: Sequence[PeerView], step: int, width: int) -> list[str]:
    """The peers with as many columns as there is room for: the least telling ones go first."""
    if not peers:
        return ["  Nobody is here right now."]
    titles = ["name", "met", "samples/s", "given", "step", "loss", "role", "data wait", "memory", "device"]
    cells = [[public_name(p.name), *_cells(p, step)] for p in peers]
    name = min(max(columns(row[0]) for row in cells), 24)
    widths = [max(len(titles[i]), max(columns(row[i]) for row in cells)) for i in range(len(titles))]
    widths[0] = max(name, len(titles[0]))
    shown = len(titles)
    while shown > 2 and 2 + sum(widths[:shown]) + 2 * (shown - 1) > width:
        shown -= 1
    widths[0] = max(min(widths[0], width - 2 - sum(widths[1:shown]) - 2 * (shown - 1)), 4)
    lines = []
    for row in [titles, *cells]:
        text = "  ".join(
            fit(cell, widths[i], pad=True) if i in (0, 6, 9) else " " * (widths[i] - columns(cell)) + cell
            for i, cell in enumerate(row[:shown])
        )
        lines.append(fit(f"  {text}".rstrip(), width))
    return lines


def _cells(peer: PeerView, step: int) -> list[str]:
    how = verdict(peer.peers_met, peer.peers_expected)
    met = f"{peer.peers_met}/{peer.peers_expected}" + ("" if how == "full" else f" {how}")
    behind = f" ({step - peer.last_step:,} behind)" if peer.last_step < step - 1 else ""
    return [
        met,
        f"{peer.samples_per_second:,.1f}" + (" slow" if peer.slow else ""),
        f"{peer.samples:,}",
        f"{peer.last_step:,}{behind}",
        "–" if peer.loss is None else f"{peer.loss:.3f}",
        public_name(peer.role),
        "–" if peer.data_wait is None else f"{peer.data_wait:.0%}",
        "–" if peer.memory is None else f"{peer.memory / 2**30:.1f} GiB",
        public_line(peer.device, 30),
    ]


if __name__ == "__main__":
    run_program(main)
