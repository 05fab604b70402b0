"""The organizer's program: start a run, welcome peers, watch, keep checkpoints and publish them.

    python run_aux_peer.py --config configs/our_run.yaml

It trains nothing itself and needs no GPU, but one port that others can reach. The line it prints is what volunteers
type. With --initial_peers it joins a run that is going on already.
"""

import contextlib
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hivemind.utils import get_dht_time

from arguments import (
    AGREED,
    AuxArguments,
    PeerArguments,
    agreed_settings,
    changes_between,
    parse,
    pick,
    refuse_contradictions,
)
from collab.agreement import sketch
from collab.archive import Archive
from collab.assistant import Assistant
from collab.background import Background, Repeated
from collab.bandwidth import serve_bandwidth
from collab.changes import ChangeWatch, in_words
from collab.checkpoint import (
    Checkpoint,
    annotate_checkpoint,
    begin_from_checkpoint,
    load_checkpoint,
    load_weights_into,
    save_checkpoint,
)
from collab.console import Console, bar, duration, show_log
from collab.contributions import FILE as CONTRIBUTIONS
from collab.contributions import PROTOCOL, Contributions
from collab.curve import curve_png
from collab.errors import UserError
from collab.events import Events, Lookback
from collab.files import write_bytes, write_text
from collab.fill_mask import FillMask
from collab.keeper import Keeper, Saved
from collab.lease import LIFETIME, Lease
from collab.lookout import Lookout
from collab.manifest import CODE_VERSION, KEPT, Manifest, fetch_manifest, join_command, read_kept
from collab.metrics import AuxRecord, announce_saved, metrics_validators, read_records
from collab.modelcard import CURVE, model_card
from collab.monitor import OVERSHOOT, Monitor, StepSummary
from collab.optimizer import SwarmOptimizer, make_optimizer, weight_decay_groups
from collab.page import loss_in_words, render_page
from collab.page_server import PageServer
from collab.peer import Peer
from collab.processes import StopSignal, guard_children, restart_program, run_program
from collab.public_address import public_addresses
from collab.publish import Publisher, Publishing
from collab.reachability import start_peer
from collab.recorder import Presence, Recorder
from collab.selftest import self_test
from collab.trackers import HISTORY, make_trackers, read_history
from collab.view import STATUS, STATUS_PROTOCOL, RunView, as_json, peer_views, time_left
from tasks import Task, find_task

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
PAGE_SECONDS = 2.0
WELCOME_SECONDS = 5.0
LOST_SECONDS = 30.0  # without a word from libp2p's daemon; it answers in milliseconds
NOTEBOOK = Path(__file__).parent / "notebooks" / "volunteer.ipynb"
PEERS = "peers.txt"  # in the run's folder: addresses of the others, for the next start
REMEMBERED_SECONDS = 10.0


def main() -> None:
    given = parse(__doc__ or "", (PeerArguments, AuxArguments, *AGREED))
    network, mine = pick(PeerArguments, given), pick(AuxArguments, given)
    cache_dir = Path(network.cache_dir)
    console, stop = Console(), StopSignal()
    show_log()
    guard_children()

    # ---- the manifest: ours, or that of the run that goes on already
    run_folder = Path(mine.run_folder or f"runs/{given.get('run_id')}")
    if not network.initial_peers:
        settings = agreed_settings(given)
        console.line(f"Preparing the run {settings['run_id']} ...")
        began = time.monotonic()
        files = find_task(settings["task"]).prepare(settings, cache_dir)
        console.line(f"Tokenizer and model config are ready after {duration(time.monotonic() - began)}")
    if network.identity_path is None and (mine.run_folder or "run_id" in given):
        # the same peer id, and with a fixed port the same join line, after a restart
        network.identity_path = str(run_folder / "identity.key")
    if mine.find_public_ip and not network.announce_maddrs:
        network.announce_maddrs = public_addresses(network.host_maddrs)
    peer = start_or_return(network, run_folder / PEERS)
    with contextlib.closing(peer):
        if network.initial_peers:
            manifest = fetch_manifest(peer, cache_dir, network.organizer)
            manifest.refuse_other_versions()
            find_task(manifest.settings["task"]).refuse_other_files(given, manifest.unpack(cache_dir))
        else:
            manifest = Manifest.found(settings, files, peer.private_key)
        run_id = manifest.settings["run_id"]
        run_folder = Path(mine.run_folder or f"runs/{run_id}")
        peer.dht.add_validators(metrics_validators(run_id))
        if not network.initial_peers:
            manifest = reopen(run_folder, manifest, changing=mine.change_at_step is not None)
        if mine.change_at_step is not None:
            manifest = change(manifest, mine.change_at_step, given, peer, run_folder)
        refuse_contradictions(given, manifest.latest)
        settings, folder = manifest.settings, manifest.unpack(cache_dir)
        manifest.serve(peer, folder)
        serve_bandwidth(peer)
        self_test([settings["grad_compression"], settings["state_compression"]], peer)

        # ---- build: the model that checkpoints are made of, the trackers, the uploader
        task = find_task(settings["task"])(settings, folder, cache_dir)
        archive = Archive(run_folder / "checkpoints", manifest.swarm_id)
        resumed = newest_checkpoint(archive, task.model)
        newest = Saved(resumed.trainer_state["global_step"], resumed.folder) if resumed else None
        if resumed is None and not network.initial_peers:
            resumed = begin_from_checkpoint(task.model, settings, cache_dir)
        optimizer = make_optimizer(
            peer,
            weight_decay_groups(task.model, settings["weight_decay"]),
            settings,
            swarm_id=manifest.swarm_id,
            bandwidth=network.bandwidth,
            auxiliary=True,
        )
        stop.listen()
        if resumed:
            optimizer.load_state_dict(resumed.optimizer_state)
            console.line(f"Holds the state of global step {optimizer.local_epoch}, from {resumed.folder}")
        elif task.first_weights == "here":
            optimizer.state_averager.hold_state(0)  # trainers do not have them
        trackers = make_trackers(
            [name for name in mine.report_to if name != "none"],
            run_folder,
            run_id,
            run_id,
            dict(settings),
            mine.trackio_space,
        )
        publisher = Publisher(mine.repo_id) if mine.repo_id else None
        monitor = Monitor(
            [StepSummary.from_metrics(entry) for entry in read_history(run_folder / HISTORY)],
            lifetime=settings["metadata_expiration"],
            target_batch_size=settings["target_batch_size"],
            last_step=settings["max_global_steps"],
            start=None if network.initial_peers else optimizer.local_epoch,
        )
        samples_before = uncounted_samples(resumed, monitor)
        contributions = Contributions(run_folder / CONTRIBUTIONS, most=OVERSHOOT * settings["target_batch_size"])
        peer.serve(PROTOCOL, contributions.file)
        started, events = time.time(), Events()
        lookback = Lookback(events)

        join_line = join_command(peer, manifest)
        console.line(f"\nThe run {run_id} is open. Others join with:\n\n  {join_line}\n")
        write_bytes(run_folder / KEPT, manifest.signed)
        write_text(run_folder / "join.txt", join_line + "\n")
        notebook = NOTEBOOK.read_text(encoding="utf-8").replace("ADDRESS", " ".join(peer.addresses()))
        write_text(run_folder / NOTEBOOK.name, notebook)

        # ---- the duties: each goes on by itself, whatever becomes of the others
        def card(step: int, measured: dict[str, float], has_curve: bool) -> str:
            names = list(contributions.of_names())
            seen = samples_before + monitor.samples, monitor.tokens
            return card_of(task, step, *seen, monitor.history, names, settings, mine, join_line, measured, has_curve)

        def keep(step: int, checks: dict[str, Any]) -> Path:
            state = optimizer.state_dict()
            state["state"]["local_epoch"] = step  # the assistant may be further already
            curve = curve_png(monitor.history)
            save_checkpoint(
                folder := archive.place(step),
                save_pretrained=task.save_pretrained,
                optimizer_state=state,
                trainer_state={
                    "run_id": run_id,
                    "swarm_id": manifest.swarm_id,
                    "global_step": step,
                    "samples": samples_before + monitor.samples,
                    "tokens": monitor.tokens,
                    "sketch": sketch(task.model.parameters()),
                    "checks": checks,
                    "sources": settings["sources"],
                    "settings": settings,
                    "version": CODE_VERSION,
                },
                model_card=card(step, {}, curve is not None),
                more_files={KEPT: changes.manifest.signed} | ({CURVE: curve} if curve else {}),
            )
            announce_saved(peer, run_id, step)
            console.line(f"Saved the state of global step {step} to {folder}")
            events.add("saved", f"Saved the checkpoint of step {step:,}")
            return folder

        def describe() -> AuxRecord:
            return AuxRecord(
                name=peer.peer_id[-6:],
                peer_id=peer.peer_id,
                version=CODE_VERSION,
                rounds=assistant.rounds,
                saved_step=keeper.newest.step if keeper.newest else 0,
                reported=get_dht_time(),
            )

        def measure_and_prune(step: int, folder: Path) -> None:
            def is_over() -> bool:
                return bool(step < settings["max_global_steps"] <= monitor.step)

            try:
                if mine.held_out_batches and (measured := measure(task, mine.held_out_batches, is_over)):
                    annotate_checkpoint(folder, measured, card(step, measured, (folder / CURVE).exists()))
                    figures = "  ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in measured.items())
                    console.line(f"Global step {step}: {figures}")
                    recorder.add_to_next_step(measured | {"held_out_step": step})
            finally:
                archive.prune(mine.keep_last, mine.keep_every, mine.keep_best)

        def tell(made: StepSummary) -> None:
            console.line(step_line(made, settings["max_global_steps"], started))

        welcome = Repeated("Welcoming newcomers", peer.addresses, WELCOME_SECONDS)
        recorder = Recorder(peer, run_id, monitor, contributions, trackers, tell)
        lookout = Lookout(peer, manifest.swarm_id, settings["metadata_expiration"])
        changes = ChangeWatch(peer, manifest, folder, settings["metadata_expiration"])
        assistant = Assistant(optimizer)
        keeper = Keeper(
            optimizer, assistant, monitor, task.model, keep, measure_and_prune,
            newest=newest,
            every=mine.save_every,
            last_step=lambda: settings["max_global_steps"],
            timeout=settings["averaging_timeout"],
            compare=not settings["delay_optimizer_step"],  # else peers publish their weights at different moments
        )  # fmt: skip
        presence = Presence(peer, run_id, monitor, settings["metadata_expiration"], describe)

        def see(finished: bool = False) -> RunView:
            view = look(task, monitor, settings, started, join_line, keeper.newest, trackers.where(), finished)
            return replace(
                view,
                contributors=list(contributions.of_names().items()),
                duties=[duty.health for duty in duties],
                events=events.recent,
                seconds_to_next_step=None if finished else to_next_step(optimizer),
                swarm=monitor.view().as_numbers(),
            )

        def show(finished: bool = False) -> None:
            lookback.at_peers(monitor.live)
            lookback.at_connection(lookout.cut_off)
            lookback.at_duties([duty.health for duty in duties])
            if publishing is not None and publishing.published is not None:
                lookback.at_published(publishing.published.step)
            view = see(finished)
            write_text(run_folder / "page.html", render_page(view))
            write_text(run_folder / STATUS, as_json(view))
            if others := lookout.addresses():
                write_text(run_folder / PEERS, "\n".join(others) + "\n")

        publishing: Publishing | None = None
        duties: list[Background] = [welcome, recorder, presence, keeper, assistant, lookout, changes]
        if mine.page_port:
            fill_mask = FillMask(lambda: keeper.newest)
            at = "The page is at {}".format
            server = PageServer(mine.page_host, mine.page_port, see, fill_mask, lambda where: console.line(at(where)))
            duties.append(server)
        duties.append(Repeated("Writing the page", show, PAGE_SECONDS))
        peer.serve(STATUS_PROTOCOL, run_folder / STATUS)
        if publisher:
            lease = Lease(peer, manifest.swarm_id, "publishing", min(LIFETIME, settings["metadata_expiration"]))
            publishing = Publishing(publisher, keeper, lease, run_folder / "checkpoints", manifest.swarm_id)
            duties += [publishing, lease]

        # ---- watch
        is_lost = False
        try:
            while not (stop or keeper.complete.is_set() or is_lost):
                stop.wait(POLL_SECONDS)
                is_lost = welcome.health.silent_seconds > LOST_SECONDS
                if (wanted := changes.manifest.settings_at(monitor.step)) != settings:
                    with assistant.paused(timeout=settings["averaging_timeout"]) as free:
                        if free:
                            console.line(f"Settings from global step {monitor.step} on: {in_words(settings, wanted)}")
                            settings = task.settings = wanted
                            optimizer.adopt(settings)
                            monitor.target_batch_size = max(monitor.target_batch_size, settings["target_batch_size"])
                            contributions.most = OVERSHOOT * monitor.target_batch_size
                            monitor.last_step = settings["max_global_steps"]
                console.live(live_line(monitor, optimizer, settings["max_global_steps"]))

            # ---- leave: nothing that was reached is lost
            if publishing is not None and not publishing.close(timeout=60):
                console.line("The last checkpoint is not on the Hub yet; it is kept here")
        finally:
            for duty in duties:
                duty.stop()
            with contextlib.suppress(OSError, UserError):  # the disk may be full; the swarm shall hear the goodbye
                show(finished=monitor.step >= settings["max_global_steps"])
                summary = sum_up(
                    monitor, len(contributions.of_peers), assistant.rounds, started, keeper.newest, join_line
                )
                write_text(run_folder / "summary.json", json.dumps(summary, indent=2) + "\n")
            trackers.close()
            optimizer.leave()
        if is_lost:
            console.line("The connection to the swarm is broken on this side; starting anew ...")
            restart_program()
        places = {
            "checkpoint": keeper.newest and keeper.newest.folder,
            "page": run_folder / "page.html",
            **trackers.where(),
            "joined by": join_line,
        }
        for what, where in places.items():
            console.line(f"{what + ':':<15}{where}")


def start_or_return(network: PeerArguments, remembered: Path) -> Peer:
    """Join through `initial_peers`, or else through whom this peer knew when it ran last, if any of them is there."""
    options = network.peer_options()
    if not network.initial_peers and remembered.exists():
        again = {"initial_peers": remembered.read_text().split(), "startup_timeout": REMEMBERED_SECONDS}
        with contextlib.suppress(UserError):
            return start_peer(must_accept=True, **options | again)
    return start_peer(must_accept=True, **options)


def reopen(run_folder: Path, new: Manifest, changing: bool) -> Manifest:
    """The run that is kept in `run_folder` if the `new` one is the same, or is meant to change it; else the new one."""
    kept = read_kept(run_folder)
    same = kept is not None and (kept.organizer, kept.files, kept.versions) == (new.organizer, new.files, new.versions)
    if kept is not None and same and (changing or kept.latest == new.settings):
        return kept
    if changing:
        raise UserError(
            f"There is no run in {run_folder} that this could change: another tokenizer, model, identity or version of "
            f"the code is another run. Leave out --change_at_step."
        )
    if kept is not None:
        logger.warning(
            "The run in %s was another one. This is a NEW run: those who train the old one cannot meet it. To change "
            "a run that goes on, add --change_at_step.", run_folder,
        )  # fmt: skip
    return new


def change(manifest: Manifest, at_step: int, given: dict[str, Any], peer: Peer, run_folder: Path) -> Manifest:
    """The manifest with the settings in which `given` differs, from global step `at_step` on."""
    if manifest.organizer != peer.peer_id:
        raise UserError(
            f"Only the run's organizer can change it, the peer {manifest.organizer}. Start with its --identity_path."
        )
    history = [entry["step"] for entry in read_history(run_folder / HISTORY)]
    records = read_records(peer, manifest.settings["run_id"])
    # the median, because a single peer may say anything
    made = max(*history, 0, statistics.median_high([record.step for record in records] or [0]))
    if at_step <= made:
        raise UserError(
            f"Global step {made} is made already. Give a --change_at_step that all peers can still hear of."
        )
    changed = changes_between(manifest.latest, given)
    try:
        return manifest.changed(at_step, changed, peer.private_key)
    except ValueError as error:
        raise UserError(f"This change is not possible: {error}. Give a later --change_at_step.") from error


def newest_checkpoint(archive: Archive, model: torch.nn.Module) -> Checkpoint | None:
    """Fill the model with the newest checkpoint that this computer has of the run; gives what else is in it.

    So that the state of a run does not go with the last trainer that leaves.
    """
    archive.mend()
    for step in reversed(archive.steps()):
        try:
            found = load_checkpoint(archive.place(step))
            load_weights_into(model, found.folder)
            return found
        except UserError as error:
            logger.warning("%s Taking an older one.", error)
    return None


def uncounted_samples(resumed: Checkpoint | None, monitor: Monitor) -> int:
    """Samples in a checkpoint that the history here does not know of, because another run folder has it."""
    if resumed is None:
        return 0
    step, samples = resumed.trainer_state["global_step"], resumed.trainer_state["samples"]
    return max(0, samples - sum(made.samples for made in monitor.history if made.step <= step))


def measure(task: Task, batches: int, stop: Callable[[], bool]) -> dict[str, float]:
    """`task.evaluate` with half of the threads: the averaging goes on beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        return task.evaluate(batches, stop)
    finally:
        torch.set_num_threads(threads)


def card_of(
    task: Task,
    step: int,
    samples: int,
    tokens: int,
    history: list[StepSummary],
    names: list[str],
    settings: dict[str, Any],
    mine: AuxArguments,
    join_command: str,
    measured: dict[str, float],
    has_curve: bool,
) -> str:
    """The model card of a checkpoint."""
    about = task.description()
    return model_card(
        title=settings["run_id"],
        summary="\n".join(f"- {heading}: {text}" for heading, text in about.items()),
        metadata={
            "license": mine.license,
            "language": mine.language,
            "library_name": "transformers",
            "tags": ["hivemind", "collaborative-training", settings["task"]],
            **task.card_metadata(),
        },
        run_id=settings["run_id"],
        step=step,
        last_step=settings["max_global_steps"],
        samples=samples,
        tokens=tokens,
        held_out=measured,
        curve_in_words=loss_in_words(history) if has_curve else None,
        peers=names,
        usage=task.usage(mine.repo_id or "."),
        settings=settings,
        join_command=None if step >= settings["max_global_steps"] else join_command,
    )


def step_line(summary: StepSummary, last_step: int, started: float) -> str:
    """A global step, for the console."""
    alone = f"  {summary.peers_alone} ALONE" if summary.peers_alone else ""
    return (
        f"{duration(summary.time - started):>9}  step {summary.step:>4}/{last_step}  loss {summary.loss:.3f}  "
        f"{summary.samples_per_second:5.0f} samples/s  peers {summary.peers_met}/{summary.peers_expected}{alone}"
    )


def live_line(monitor: Monitor, optimizer: SwarmOptimizer, last_step: int) -> str:
    """What is going on between two steps, with the time left for the whole run."""
    progress = optimizer.tracker.global_progress
    if progress.num_peers == 0:
        return f"Waiting for {'trainers' if monitor.history else 'the first trainer'} ..."
    share = progress.samples_accumulated / progress.target_batch_size
    line = f"step {monitor.step + 1}/{last_step} {bar(share)} {min(share, 1):4.0%}"
    recent = monitor.history[-20:]
    if recent:
        last = recent[-1]
        line += f"  loss {last.loss:.3f}  {last.samples_per_second:.0f} samples/s"
        line += f"  peers {last.peers_met}/{last.peers_expected}"
    if len(recent) >= 2:
        pace = (recent[-1].time - recent[0].time) / (recent[-1].step - recent[0].step)
        line += f"  {duration(pace * (last_step - monitor.step))} left"
    return line


def look(
    task: Task,
    monitor: Monitor,
    settings: dict[str, Any],
    started: float,
    join_command: str,
    checkpoint: Saved | None,
    trackers: dict[str, str],
    finished: bool = False,
) -> RunView:
    """What the page shows now of the training itself."""
    history = list(monitor.history)
    return RunView(
        run_id=settings["run_id"],
        task="; ".join(task.description().values()),
        started=monitor.history[0].time if monitor.history else started,
        updated=time.time(),
        global_step=monitor.step,
        max_steps=settings["max_global_steps"],
        finished=finished,
        history=history,
        peers=peer_views(monitor.live),
        join_command=join_command,
        checkpoint=str(checkpoint.folder) if checkpoint else None,
        tracker="; ".join(trackers.values()),
        can_fill_mask=settings["task"] == "mlm",
        samples=monitor.samples,
        seconds_to_end=time_left(history, settings["max_global_steps"]),
    )


def to_next_step(optimizer: SwarmOptimizer) -> float | None:
    """Seconds until the swarm has enough samples for the next global step; None while nobody trains."""
    progress = optimizer.tracker.global_progress
    return max(progress.eta_next_epoch - get_dht_time(), 0.0) if progress.num_peers else None


def sum_up(
    monitor: Monitor, peers: int, assisted: int, started: float, checkpoint: Saved | None, join_command: str
) -> dict[str, Any]:
    """What `summary.json` says of the run."""
    history = monitor.history
    return {
        "peers": peers,
        "global_steps": monitor.step,
        "first_loss": round(history[0].loss, 4) if history else None,
        "last_loss": round(history[-1].loss, 4) if history else None,
        "samples": monitor.samples,
        "rounds_averaged": sum(s.peers_averaged == s.peers and s.peers_met > 1 for s in history),
        "rounds_alone": sum(s.peers_alone for s in history),
        "rounds_assisted": assisted,
        "wall_seconds": round(time.time() - started, 1),
        "checkpoint": str(checkpoint.folder) if checkpoint else None,
        "join_command": join_command,
    }


if __name__ == "__main__":
    run_program(main)
