"""The volunteer's program: join a run, make samples, compute gradients, average them with everybody, until it ends.

    python run_trainer.py --initial_peers ADDRESS

ADDRESS is the line that the run's auxiliary peer prints. Without it, a new run starts from --config.
"""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
from hivemind.utils import get_dht_time

from arguments import (
    AGREED,
    HostArguments,
    PeerArguments,
    TrainerArguments,
    agreed_settings,
    parse,
    pick,
    refuse_contradictions,
)
from collab.agreement import sketch
from collab.bandwidth import measure_in_background, serve_bandwidth
from collab.changes import ChangeWatch, in_words
from collab.checkpoint import (
    begin_from_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from collab.console import Console, Stages, show_log
from collab.contributions import counted_by_organizer
from collab.device import in_words as devices_in_words
from collab.device import pick_devices
from collab.errors import UserError
from collab.experts.directory import start_calling
from collab.experts.joined import JoinedExperts, refuse_what_experts_cannot
from collab.files import make_folder
from collab.lookout import Lookout
from collab.manifest import CODE_VERSION, Manifest, fetch_manifest, join_command
from collab.memory import memory_in_use, peak_on_device
from collab.metrics import MAX_LOSS, PeerRecord, run_validators, wait_until_saved
from collab.optimizer import make_optimizer, weight_decay_groups
from collab.place import Place
from collab.processes import StopSignal, guard_children, restart_program, run_program
from collab.reachability import start_peer
from collab.reports import Reports
from collab.selftest import self_test
from collab.speed import Speed, count_flops, peak_flops
from collab.step import TrainingStep, checkpoint_layers, possible_ways
from collab.tuning import TRIAL_SAMPLES, MicroBatch, size_of, split, tune_micro_batch, unless_out_of_memory
from collab.vital import VitalProcesses
from collab.watch import ModelWatch, weights_agree
from tasks import Batches, TaskWithExperts, expert_plan, find_task
from tasks.loader import Loader


def main() -> None:
    given = parse(__doc__ or "", (PeerArguments, TrainerArguments, HostArguments, *AGREED))
    network, mine, hosting = pick(PeerArguments, given), pick(TrainerArguments, given), pick(HostArguments, given)
    cache_dir = Path(network.cache_dir)
    devices = pick_devices(mine.device)
    if mine.save_dir:
        make_folder(Path(mine.save_dir))  # better now than after a week of training
    if mine.threads:
        torch.set_num_threads(mine.threads)
    console, stop, stages = Console(), StopSignal(), Stages()
    show_log()
    guard_children()

    lookout: Lookout | None = None

    def start_anew(lost: str) -> None:
        console.line(f"This computer has lost {lost}, without which it cannot train with the others")
        if network.initial_peers:
            console.line("Starting anew ...")
            known = lookout.addresses() if lookout and not network.use_ipfs else []
            others = [address for address in known if not address.startswith("/p2p/")]  # that says not where
            restart_program("--initial_peers", *dict.fromkeys([*network.initial_peers, *others]))
        os.kill(os.getpid(), signal.SIGTERM)  # it began the run, and would begin another one

    # ---- join: find the swarm, learn what it trains
    stages.done("import")
    peer = start_peer(**network.peer_options())
    stages.done("network")
    with contextlib.closing(peer), VitalProcesses(peer, lost=start_anew) as vital:
        if network.initial_peers:
            manifest = fetch_manifest(peer, cache_dir, network.organizer)
            refuse_contradictions(given, manifest.latest)
            manifest.refuse_other_versions()
            find_task(manifest.settings["task"]).refuse_other_files(given, manifest.unpack(cache_dir))
        elif "run_id" not in given:
            raise UserError(
                "There is no run to join: give --initial_peers ADDRESS, as the run's auxiliary peer prints it. "
                "To start a new run, give a --config."
            )
        else:
            settings = agreed_settings(given)
            files = find_task(settings["task"]).prepare(settings, cache_dir)
            manifest = Manifest.found(settings, files, peer.private_key)
        settings, folder = manifest.settings, manifest.unpack(cache_dir)
        manifest.serve(peer, folder)
        run_id = settings["run_id"]
        plan = expert_plan(settings, folder, manifest.swarm_id)
        refuse_what_experts_cannot(plan, hosting.serve_experts, mine.gradient_checkpointing)
        if plan:
            start_calling()
        ways = possible_ways(mine.precision, devices[0], settings["precisions"])
        serve_bandwidth(peer)
        peer.dht.add_validators(run_validators(run_id, manifest.swarm_id, settings["metadata_expiration"]))
        self_test([settings["grad_compression"], settings["state_compression"]], peer)
        name = mine.public_name or peer.peer_id[-6:]
        console.line(f"{name} joins the run {run_id} on {', '.join(map(str, devices))}")
        if not network.initial_peers:
            console.line(
                f"This is a NEW run, and {name} is alone in it so far. If you meant to join one that goes on already: "
                f"Ctrl-C, and start again with its address (--initial_peers).\n"
                f"Others join with:\n  {join_command(peer, manifest)}"
            )

        stages.done("manifest")

        # ---- build: the task with its model and data, and the optimizer that the whole swarm shares
        replicas = [find_task(settings["task"])(settings, folder, cache_dir) for _ in devices]
        task = replicas[0]
        resumed = None if network.initial_peers else begin_from_checkpoint(task.model, settings, cache_dir)
        if mine.gradient_checkpointing:
            for replica in replicas:
                checkpoint_layers(replica.model)
        compute_gradients = TrainingStep(replicas, devices, ways[0])
        optimizer = make_optimizer(
            peer,
            weight_decay_groups(task.model, settings["weight_decay"]),
            settings,
            swarm_id=manifest.swarm_id,
            offload_optimizer=mine.offload_optimizer,
            bandwidth=network.bandwidth,
            has_state=resumed is not None or task.first_weights != "elsewhere",
            snapshot_folder=cache_dir / "snapshots",
        )
        vital.add(optimizer)
        stop.listen()
        optimizer.pause = stop.wait
        lookout = Lookout(peer, manifest.swarm_id, settings["metadata_expiration"])
        reports = Reports(peer, run_id, settings["metadata_expiration"])
        changes = ChangeWatch(peer, manifest, folder, settings["metadata_expiration"])
        if network.bandwidth is None and not peer.on_loopback_only:
            measure_in_background(peer, optimizer.use_measured_bandwidth)
        stages.done("model")

        def stream(state: dict[str, Any] | None) -> Batches:
            return task.batches(micro_batch, place.name, step=lambda: optimizer.local_epoch, state=state)

        # ---- train: one turn is one micro-batch; the swarm decides when a global step is made
        experts: JoinedExperts | None = None
        try:
            if resumed:
                optimizer.load_state_dict(resumed.optimizer_state)
                optimizer.spikes.load_state_dict(resumed.trainer_state.get("losses"))
                set_random_state(resumed.trainer_state.get("random"))
            micro_batch = MicroBatch(mine.micro_batch_size)
            # before the state is taken over, which would be old afterwards
            console.line(compute_gradients.choose_way(ways, task.trial_batch(2)))
            if mine.micro_batch_size == 0:
                tuned = tune_micro_batch(
                    compute_gradients,
                    task.model,
                    task.trial_batch(TRIAL_SAMPLES),
                    target_batch_size=settings["target_batch_size"],
                    matchmaking_time=settings["matchmaking_time"],
                )
                console.line(tuned.as_line())
                micro_batch.size = tuned.size
            sample, peak = task.trial_batch(1), peak_flops(devices, compute_gradients.way.precision)
            flops = count_flops(compute_gradients, task.model, sample) if peak else 0
            if mine.compile == "try" or (mine.compile == "auto" and devices[0].type == "cuda"):
                console.line(compute_gradients.try_compiled(task.trial_batch(micro_batch.size)))
            speed = Speed(flops / task.tokens(sample), peak)
            optimizer.tracker.performance_ema.reset_timer()  # this was no training
            stages.done("tuning")
            place = Place(
                cache_dir / "places" / manifest.swarm_id,
                name=peer.peer_id,
                record=resumed and resumed.trainer_state.get("place"),
            )
            batches = Loader(stream(place.state), stop, pinned=devices[0].type == "cuda")
            stages.done("text")
            if plan:  # only now: trying out the device must not train anybody's experts
                experts = JoinedExperts(peer, plan, settings, name, device=devices[0], **vars(hosting))
                for replica in replicas:
                    if isinstance(replica, TaskWithExperts):
                        replica.use_experts(experts.directory)
                stages.done("experts")
            if network.initial_peers:
                optimizer.load_state_from_peers()
            if not optimizer.has_state:
                raise UserError(
                    f"The run {run_id} begins with the weights of an existing model, which are not on this computer, "
                    f"and no peer has handed out its state (the reasons are above). Without them this computer would "
                    f"train from random weights. Try again when the run's auxiliary peer or another trainer answers."
                )
            if resumed or network.initial_peers:
                console.line(f"Starting from global step {optimizer.local_epoch}")
            stages.done("state")
            step, states_loaded = optimizer.local_epoch, optimizer.states_loaded
            watch = ModelWatch(peer, run_id, settle_steps=2 * settings["average_state_every"])
            loss_sum, weights, samples, samples_total, skipped, memory = 0.0, 0, 0, 0, 0, 0
            random = random_state()
            while not stop and step < settings["max_global_steps"]:
                lookout.refuse_wrong_clock()
                if (wanted := changes.manifest.settings_at(step)) != settings:
                    console.line(f"Settings from global step {step} on: {in_words(settings, wanted)}")
                    settings = task.settings = wanted
                    optimizer.adopt(settings)
                    place.move(f"{peer.peer_id}/{step}")
                    batches.restart(stream(None))
                    continue
                with speed.part("data"):
                    batch = next(batches, None)
                if batch is None:  # told to stop while there was no text
                    break
                with speed.part("compute"):
                    passes = unless_out_of_memory(compute_gradients, batch)
                if passes is None:
                    micro_batch.halve()
                    batches.restart(stream(batches.state_dict()))  # those made ahead are too large as well
                    batches.put_back(split(batch, micro_batch))
                    console.line(f"Memory ran out; from now on micro-batches have {micro_batch.size} samples")
                    continue
                if passes.finite:
                    weight = task.weight(batch)
                    loss_sum, weights = loss_sum + passes.loss * weight, weights + weight
                    samples += size_of(batch)
                    speed.add(task.tokens(batch))
                    optimizer.spikes.add(passes.loss, weight)
                    with speed.part("averaging"):
                        optimizer.step(batch_size=size_of(batch), weight=weight)
                else:
                    skipped += 1  # a NaN must not reach the others; the next batch may be fine
                    optimizer.drop()
                    if skipped & (skipped - 1) == 0:  # at 1, 2, 4, 8, ... of them
                        console.line(f"{skipped} micro-batches with a NaN or infinite gradient were dropped so far")
                stages.done("first batch")

                progress = optimizer.tracker.global_progress
                if optimizer.local_epoch == step and optimizer.states_loaded == states_loaded:
                    share = min(1.0, progress.samples_accumulated / settings["target_batch_size"])
                    console.live(
                        f"step {step + 1}: {share:4.0%}, {progress.num_peers} peers, {samples} samples of mine"
                    )
                    continue

                # ---- report: the swarm made a global step, or this peer was behind and took over a newer state
                step, report = optimizer.local_epoch, optimizer.last_round
                if optimizer.states_loaded > states_loaded:
                    console.line(f"Took over global step {step} from the others")
                    states_loaded, loss_sum, weights, samples = optimizer.states_loaded, 0.0, 0, 0
                    watch.start_over(step)
                    continue
                if report is None or report.left_behind:  # still averaged in the background; or not made by this peer
                    continue
                if samples and not samples_total and report.applied:
                    stages.done("first round")
                    console.line(f"From here on the common model has samples of {name} in it, after {stages}")
                samples_total += samples if report.applied or report.expected == 1 else 0
                memory = max(memory, memory_in_use() + sum(map(peak_on_device, devices)))
                record = PeerRecord(
                    name=name,
                    peer_id=peer.peer_id,
                    version=CODE_VERSION,
                    device=devices_in_words(devices),
                    step=step,
                    loss=min(loss_sum / weights, MAX_LOSS) if weights else 0.0,
                    samples=samples,
                    samples_total=samples_total,
                    samples_per_second=float(optimizer.tracker.performance_ema.samples_per_second),
                    grad_norm=optimizer.guard.grad_norm,
                    sketch=sketch(task.model.parameters()),
                    skipped_batches=skipped,
                    memory=memory,
                    client_mode=peer.client_mode,
                    time=get_dht_time(),
                    reported=get_dht_time(),
                    **speed.take(),
                    **report.as_record(),
                )
                reports.add(record)
                console.line(record.as_line(settings["max_global_steps"]))
                place.save(batches.state_dict())
                random = random_state()
                lookout.after_round(report)
                loss_sum, weights, samples = 0.0, 0, 0
                if weights_agree(settings):
                    strayed = watch.has_strayed(step, record.sketch)
                    optimizer.state_averager.doubtful = watch.doubtful
                    optimizer.note_model(record.sketch)
                    if strayed:
                        optimizer.reload("this peer's model is another one than most have", astray=True)

            # ---- leave: what was begun of the next global step comes again, with the same masks and dropout
            optimizer.finish()
            if step >= settings["max_global_steps"]:
                console.line(f"The run is complete after {step} global steps; handing over the last state ...")
                wait_until_saved(peer, run_id, step, timeout=2 * settings["averaging_timeout"], stop=stop)
            if mine.save_dir:
                state = {"run_id": run_id, "global_step": step, "samples": samples_total}
                state |= {"place": place.record, "random": random, "losses": optimizer.spikes.state_dict()}
                save_checkpoint(
                    Path(mine.save_dir),
                    save_pretrained=task.save_pretrained,
                    optimizer_state=optimizer.state_dict(),
                    trainer_state=state,
                    model_card=f"The state of {name} when it left the run {run_id} at global step {step}.\n",
                )
            counted = counted_by_organizer(peer, manifest.organizer, name)
            altogether = f" The organizer has counted {counted:,} from {name} in this run." if counted else ""
            console.line(f"{name} gave {samples_total:,} samples to the common model.{altogether} Thank you!")
        finally:
            vital.stop()
            if experts:
                experts.stop()
            changes.stop()
            reports.stop()
            lookout.stop()
            optimizer.leave()


if __name__ == "__main__":
    run_program(main)
