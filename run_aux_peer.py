"""The organizer's program: start a run, welcome peers, watch, keep checkpoints and publish them.

    python run_aux_peer.py --config configs/our_run.yaml

It trains nothing itself and needs no GPU, but one port that others can reach. The line it prints is what volunteers
type. With --initial_peers it joins a run that is going on already.
"""

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

from arguments import AGREED, AuxArguments, PeerArguments, agreed_settings, parse, pick, refuse_contradictions
from collab.assistant import Assistant
from collab.checkpoint import find_checkpoint, load_checkpoint, load_weights_into, save_checkpoint
from collab.console import Console, bar, duration, show_log
from collab.files import write_text
from collab.lookout import Lookout
from collab.manifest import CODE_VERSION, Manifest, fetch_manifest
from collab.metrics import announce_saved, metrics_validators, read_records
from collab.modelcard import model_card
from collab.monitor import Monitor, StepSummary
from collab.optimizer import SwarmOptimizer, make_optimizer, weight_decay_groups
from collab.page import PeerView, Round, RunView, render_page
from collab.peer import Peer
from collab.processes import StopSignal, guard_children, run_program
from collab.publish import Publisher
from collab.selftest import self_test
from collab.trackers import HISTORY, make_trackers, read_history
from tasks import Task, find_task

POLL_SECONDS = 0.5
PAGE_SECONDS = 2.0
KEPT_CHECKPOINTS = 3


def main() -> None:
    given = parse(__doc__ or "", (PeerArguments, AuxArguments, *AGREED))
    network, mine = pick(PeerArguments, given), pick(AuxArguments, given)
    cache_dir = Path(network.cache_dir)
    console, stop = Console(), StopSignal()
    show_log()
    guard_children()

    # ---- the manifest: ours, or that of the run that goes on already
    if not network.initial_peers:
        settings = agreed_settings(given)
        run_folder = Path(mine.run_folder or f"runs/{settings['run_id']}")
        console.line(f"Preparing the run {settings['run_id']} ...")
        began = time.monotonic()
        manifest = Manifest(settings, find_task(settings["task"]).prepare(settings, cache_dir))
        console.line(f"Tokenizer and model config are ready after {duration(time.monotonic() - began)}")
    if network.identity_path is None and (mine.run_folder or "run_id" in given):
        # the same peer id, and with a fixed port the same join line, after a restart
        network.identity_path = str(Path(mine.run_folder or f"runs/{given['run_id']}", "identity.key"))
    peer = Peer(**network.peer_options())
    with contextlib.closing(peer):
        if network.initial_peers:
            manifest = fetch_manifest(peer)
            refuse_contradictions(given, manifest.settings)
            manifest.refuse_other_versions()
            find_task(manifest.settings["task"]).refuse_other_files(given, manifest.unpack(cache_dir))
            settings = manifest.settings
            run_folder = Path(mine.run_folder or f"runs/{settings['run_id']}")
        folder = manifest.unpack(cache_dir)
        manifest.serve(peer, folder)
        run_id, last_step = settings["run_id"], settings["max_global_steps"]
        peer.dht.add_validators(metrics_validators(run_id))
        self_test([settings["grad_compression"], settings["state_compression"]], peer)

        # ---- build: the model that checkpoints are made of, the trackers, the uploader
        task = find_task(settings["task"])(settings, folder, cache_dir)
        resumed = load_checkpoint(find_checkpoint(network.resume_from, cache_dir)) if network.resume_from else None
        if resumed:
            load_weights_into(task.model, resumed.folder)
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
        trackers = make_trackers(
            [name for name in mine.report_to if name != "none"], run_folder, run_id, run_id, dict(settings)
        )
        assistant = Assistant(optimizer)
        publisher = Publisher(mine.repo_id) if mine.repo_id else None
        monitor = Monitor([StepSummary.from_metrics(entry) for entry in read_history(run_folder / HISTORY)])
        started, page_written, saved_step, checkpoint = time.time(), 0.0, optimizer.local_epoch, None

        join_command = peer.join_command()
        console.line(f"\nThe run {run_id} is open. Others join with:\n\n  {join_command}\n")
        write_text(run_folder / "join.txt", join_command + "\n")
        lookout = Lookout(peer, manifest.swarm_id, settings["metadata_expiration"])

        # ---- watch: one turn is one look at the swarm
        try:
            complete_since: float | None = None
            while not stop and saved_step < last_step:
                stop.wait(POLL_SECONDS)
                for summary in monitor.update(read_records(peer, run_id)):
                    trackers.log(summary.as_metrics(), summary.step)
                    console.line(step_line(summary, last_step, started))
                console.live(live_line(monitor, optimizer, last_step))
                if monitor.step >= last_step and complete_since is None:
                    complete_since = time.monotonic()
                    assistant.stop()
                if complete_since and time.monotonic() - complete_since > 2 * settings["averaging_timeout"]:
                    console.line("No trainer is left that could hand over the last state")
                    break
                if monitor.step - saved_step >= mine.save_every or complete_since:
                    with assistant.paused(timeout=settings["averaging_timeout"]) as free:
                        loaded = free and optimizer.load_state_from_peers()
                        if loaded and optimizer.local_epoch > saved_step:
                            saved_step = optimizer.local_epoch
                            checkpoint = save(task, optimizer, monitor, run_folder, settings, mine, join_command)
                            announce_saved(peer, run_id, saved_step)
                            console.line(f"Saved the state of global step {saved_step} to {checkpoint}")
                    if loaded and checkpoint and publisher:
                        publisher.submit(checkpoint, saved_step)
                if time.monotonic() - page_written >= PAGE_SECONDS:
                    page_written = time.monotonic()
                    view = look(task, monitor, settings, started, join_command, checkpoint, trackers.where())
                    write_text(run_folder / "page.html", render_page(view))

            # ---- leave: nothing that was reached is lost
            if publisher and not publisher.close(timeout=60):
                console.line("The last checkpoint is not on the Hub yet; it is kept here")
        finally:
            finished = monitor.step >= last_step
            view = look(task, monitor, settings, started, join_command, checkpoint, trackers.where(), finished)
            write_text(run_folder / "page.html", render_page(view))
            summary_file = run_folder / "summary.json"
            write_text(summary_file, json.dumps(sum_up(monitor, started, checkpoint, join_command), indent=2) + "\n")
            trackers.close()
            assistant.stop()
            lookout.stop()
            optimizer.leave()
        places = {
            "checkpoint": checkpoint,
            "page": run_folder / "page.html",
            **trackers.where(),
            "joined by": join_command,
        }
        for what, where in places.items():
            console.line(f"{what + ':':<15}{where}")


def save(
    task: Task,
    optimizer: SwarmOptimizer,
    monitor: Monitor,
    run_folder: Path,
    settings: dict[str, Any],
    mine: AuxArguments,
    join_command: str,
) -> Path:
    """Write the state that the optimizer holds to a folder of its own, and remove the oldest ones."""
    step = optimizer.local_epoch
    folder = run_folder / "checkpoints" / f"step-{step:07d}"
    about = task.description()
    card = model_card(
        title=settings["run_id"],
        summary="\n".join(f"- {heading}: {text}" for heading, text in about.items()),
        metadata={
            "license": mine.license,
            "language": mine.language,
            "library_name": "transformers",
            "tags": ["hivemind", "collaborative-training", settings["task"]],
        },
        run_id=settings["run_id"],
        step=step,
        samples=monitor.samples,
        peers=[name for name, _ in monitor.contributions.values()],
        usage=task.usage(mine.repo_id or "."),
        settings=settings,
        join_command=None if step >= settings["max_global_steps"] else join_command,
    )
    save_checkpoint(
        folder,
        save_pretrained=task.save_pretrained,
        optimizer_state=optimizer.state_dict(),
        trainer_state={
            "run_id": settings["run_id"],
            "global_step": step,
            "samples": monitor.samples,
            "settings": settings,
            "version": CODE_VERSION,
        },
        model_card=card,
    )
    for old in sorted(folder.parent.glob("step-*"))[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)
    return folder


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
        return "Waiting for the first trainer ..."
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
    checkpoint: Path | None,
    trackers: dict[str, str],
    finished: bool = False,
) -> RunView:
    """What the page shows now."""
    return RunView(
        run_id=settings["run_id"],
        task="; ".join(task.description().values()),
        started=monitor.history[0].time if monitor.history else started,
        updated=time.time(),
        global_step=monitor.step,
        max_steps=settings["max_global_steps"],
        finished=finished,
        history=[
            Round(s.step, s.time, s.loss, s.samples_per_second, s.peers_met, s.peers_expected, s.peers)
            for s in monitor.history
        ],
        peers=[
            PeerView(
                name=record.name,
                role="client" if record.client_mode else "trainer",
                samples_per_second=record.samples_per_second,
                samples=record.samples_total,
                last_step=record.step,
                peers_met=record.peers_met,
                peers_expected=record.peers_expected,
                loss=record.loss,
            )
            for record in monitor.live
        ],
        join_command=join_command,
        checkpoint=str(checkpoint) if checkpoint else None,
        tracker="; ".join(trackers.values()),
    )


def sum_up(monitor: Monitor, started: float, checkpoint: Path | None, join_command: str) -> dict[str, Any]:
    """What `summary.json` says of the run."""
    history = monitor.history
    return {
        "peers": len(monitor.contributions),
        "global_steps": monitor.step,
        "first_loss": round(history[0].loss, 4) if history else None,
        "last_loss": round(history[-1].loss, 4) if history else None,
        "samples": monitor.samples,
        "rounds_averaged": sum(s.peers_averaged == s.peers and s.peers_met > 1 for s in history),
        "rounds_alone": sum(s.peers_alone for s in history),
        "wall_seconds": round(time.time() - started, 1),
        "checkpoint": str(checkpoint) if checkpoint else None,
        "join_command": join_command,
    }


if __name__ == "__main__":
    run_program(main)
