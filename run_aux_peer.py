"""The organizer's program: start a run, welcome peers, watch, keep checkpoints and publish them.

    python run_aux_peer.py --config configs/our_run.yaml

It trains nothing itself and needs no GPU, but one port that others can reach. The line it prints is what volunteers
type. With --initial_peers it joins a run that is going on already.
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

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
from collab.changes import ChangeWatch, changed, in_words, reopened
from collab.checkpoint import annotate_checkpoint, begin_from_checkpoint, save_checkpoint
from collab.console import Console, duration, show_log
from collab.contributions import FILE as CONTRIBUTIONS
from collab.contributions import PROTOCOL, Contributions
from collab.curve import curve_png
from collab.device import half_of_the_threads
from collab.errors import UserError
from collab.events import Events, Lookback
from collab.experts.directory import ExpertDirectory
from collab.files import remove_partial_files, write_bytes, write_text
from collab.fill_mask import FillMask
from collab.keeper import Keeper, Saved
from collab.lease import LIFETIME, Lease
from collab.lookout import Lookout
from collab.manifest import CODE_VERSION, KEPT, Manifest, fetch_manifest, join_command
from collab.metrics import AuxRecord, announce_saved, run_validators
from collab.modelcard import CURVE, model_card
from collab.monitor import OVERSHOOT, Monitor, StepSummary
from collab.optimizer import make_optimizer, weight_decay_groups
from collab.page import loss_in_words, render_page
from collab.page_server import PageServer
from collab.peer import Peer
from collab.processes import StopSignal, guard_children, restart_program, run_program
from collab.public_address import public_addresses
from collab.publish import Publisher, Publishing
from collab.reachability import start_or_return
from collab.recorder import Presence, Recorder
from collab.selftest import self_test
from collab.trackers import HISTORY, make_trackers, read_history
from collab.view import STATUS, STATUS_PROTOCOL, RunView, as_json, live_line, look, step_line, sum_up
from collab.vital import VitalProcesses
from collab.watch import weights_agree
from tasks import TaskWithExperts, expert_plan, find_task

POLL_SECONDS = 0.5
PAGE_SECONDS = 2.0
WELCOME_SECONDS = 5.0
LOST_SECONDS = 30.0  # without a word from libp2p's daemon; it answers in milliseconds
NOTEBOOK = Path(__file__).parent / "notebooks" / "volunteer.ipynb"
PEERS = "peers.txt"  # in the run's folder: addresses of the others, for the next start


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
        console.line(f"The files of the run are ready after {duration(time.monotonic() - began)}")
    if network.identity_path is None and (mine.run_folder or "run_id" in given):
        # the same peer id, and with a fixed port the same join line, after a restart
        network.identity_path = str(run_folder / "identity.key")
    if mine.find_public_ip and not network.announce_maddrs:
        network.announce_maddrs = public_addresses(network.host_maddrs)
    peer = start_or_return(run_folder / PEERS, must_accept=True, **network.peer_options())
    with contextlib.closing(peer):
        if network.initial_peers:
            manifest = fetch_manifest(peer, cache_dir, network.organizer)
            manifest.refuse_other_versions()
            find_task(manifest.settings["task"]).refuse_other_files(given, manifest.unpack(cache_dir))
        else:
            manifest = Manifest.found(settings, files, peer.private_key)
        run_id, lifetime = manifest.settings["run_id"], manifest.settings["metadata_expiration"]
        run_folder = Path(mine.run_folder or f"runs/{run_id}")
        peer.dht.add_validators(run_validators(run_id, manifest.swarm_id, lifetime))
        if not network.initial_peers:
            manifest = reopened(manifest, run_folder, changing=mine.change_at_step is not None)
        if mine.change_at_step is not None:
            wanted = changes_between(manifest.latest, given)
            manifest = changed(manifest, mine.change_at_step, wanted, peer, run_folder)
        refuse_contradictions(given, manifest.latest)
        self_test([manifest.settings["grad_compression"], manifest.settings["state_compression"]], peer)
        accompany(peer, manifest, network, mine, run_folder, console, stop)


def accompany(
    peer: Peer,
    manifest: Manifest,
    network: PeerArguments,
    mine: AuxArguments,
    run_folder: Path,
    console: Console,
    stop: StopSignal,
) -> None:
    """Be there for a run until it ends, or until somebody stops this program."""
    cache_dir, settings = Path(network.cache_dir), manifest.settings
    folder, run_id = manifest.unpack(cache_dir), settings["run_id"]
    manifest.serve(peer, folder)
    serve_bandwidth(peer)

    # ---- build: the model that checkpoints are made of, the trackers, the uploader
    task = find_task(settings["task"])(settings, folder, cache_dir)
    experts: ExpertDirectory | None = None
    if (plan := expert_plan(settings, folder, manifest.swarm_id)) and isinstance(task, TaskWithExperts):
        experts = ExpertDirectory(peer, plan, run_id, settings["metadata_expiration"])
        task.use_experts(experts)
    archive = Archive(run_folder / "checkpoints", manifest.swarm_id)
    archive.mend()
    remove_partial_files(run_folder)
    resumed = archive.open_newest(task.model)
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
    resumed_state = resumed.trainer_state if resumed else {"samples": 0, "global_step": 0}
    samples_before = monitor.uncounted(resumed_state["samples"], resumed_state["global_step"])
    contributions = Contributions(run_folder / CONTRIBUTIONS, most=OVERSHOOT * settings["target_batch_size"])
    peer.serve(PROTOCOL, contributions.file)
    started, events = time.time(), Events()
    lookback = Lookback(events)

    join_line = join_command(peer, manifest)
    console.line(f"\nThe run {run_id} is open. Others join with:\n\n  {join_line}\n")
    write_bytes(run_folder / KEPT, manifest.signed)
    notebook = NOTEBOOK.read_text(encoding="utf-8").replace("ADDRESS", " ".join(peer.addresses()))
    write_text(run_folder / NOTEBOOK.name, notebook)
    write_text(run_folder / "join.txt", join_line + "\n")

    # ---- the duties: each goes on by itself, whatever becomes of the others
    def card(step: int, measured: dict[str, float], has_curve: bool) -> str:
        return model_card(
            about=task.description(),
            metadata={"license": mine.license, "language": mine.language, **task.card_metadata()},
            settings=settings,
            step=step,
            samples=samples_before + monitor.samples,
            tokens=monitor.tokens,
            held_out=measured,
            curve_in_words=loss_in_words(monitor.history) if has_curve else None,
            peers=contributions.of_names(),
            usage=task.usage(mine.repo_id or "."),
            join_command=join_line,
        )

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
                "data": task.description()["Data"],
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
            with half_of_the_threads():  # the averaging goes on beside it
                measured = task.evaluate(mine.held_out_batches, is_over) if mine.held_out_batches else {}
            if measured:
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
        compare=weights_agree(settings),
    )  # fmt: skip
    presence = Presence(peer, run_id, monitor, settings["metadata_expiration"], describe)
    broken: list[str] = []
    vital = VitalProcesses(peer, lost=broken.append)
    vital.add(optimizer)

    def see(finished: bool = False) -> RunView:
        return look(
            monitor,
            optimizer.tracker.global_progress,
            started=started,
            finished=finished,
            run_id=run_id,
            task="; ".join(task.description().values()),
            join_command=join_line,
            checkpoint=str(keeper.newest.folder) if keeper.newest else None,
            tracker="; ".join(trackers.where().values()),
            can_fill_mask=settings["task"] == "mlm",
            contributors=list(contributions.of_names().items()),
            duties=[duty.health for duty in duties],
            events=events.recent,
            experts=experts.views() if experts else (),
            experts_total=experts.plan.total if experts else 0,
        )

    def show(finished: bool = False) -> RunView:
        lookback.at_peers(monitor.live)
        lookback.at_connection(lookout.cut_off)
        lookback.at_duties([duty.health for duty in duties])
        if publishing is not None and publishing.published is not None:
            lookback.at_published(publishing.published.step)
        view = see(finished)
        if not finished:
            console.live(live_line(view))
        write_text(run_folder / "page.html", render_page(view))
        write_text(run_folder / STATUS, as_json(view))
        if others := lookout.addresses():
            write_text(run_folder / PEERS, "\n".join(others) + "\n")
        return view

    publishing: Publishing | None = None
    duties: list[Background] = [welcome, recorder, presence, keeper, assistant, lookout, changes]
    if experts:
        duties.append(experts)
    if mine.page_port:
        fill_mask = FillMask(lambda: keeper.newest)
        at = "The page is at {}".format
        server = PageServer(mine.page_host, mine.page_port, see, fill_mask, lambda where: console.line(at(where)))
        duties.append(server)
    duties.append(Repeated("Writing the page", show, PAGE_SECONDS))
    peer.serve(STATUS_PROTOCOL, run_folder / STATUS)
    if publisher:
        lease = Lease(peer, manifest.swarm_id, "publishing", min(LIFETIME, settings["metadata_expiration"]))
        publishing = Publishing(publisher, keeper, lease, archive)
        duties += [publishing, lease]

    # ---- watch
    is_lost = False
    try:
        while not (stop or keeper.complete.is_set() or is_lost):
            stop.wait(POLL_SECONDS)
            is_lost = bool(broken) or welcome.health.silent_seconds > LOST_SECONDS
            if (wanted := changes.manifest.settings_at(monitor.step)) != settings:
                with assistant.paused(timeout=settings["averaging_timeout"]) as free:
                    if free:
                        console.line(f"Settings from global step {monitor.step} on: {in_words(settings, wanted)}")
                        settings = task.settings = wanted
                        optimizer.adopt(settings)
                        monitor.target_batch_size = max(monitor.target_batch_size, settings["target_batch_size"])
                        contributions.most = OVERSHOOT * monitor.target_batch_size
                        monitor.last_step = settings["max_global_steps"]

        # ---- leave: nothing that was reached is lost
        if publishing is not None and not publishing.close(timeout=60):
            console.line("The last checkpoint is not on the Hub yet; it is kept here")
    finally:
        vital.stop()
        for duty in duties:
            duty.stop()
        with contextlib.suppress(OSError, UserError):  # the disk may be full; the swarm shall hear the goodbye
            left = show(finished=monitor.step >= settings["max_global_steps"])
            summary = sum_up(monitor.history, left, len(contributions.of_peers), assistant.rounds, started)
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


if __name__ == "__main__":
    run_program(main)
