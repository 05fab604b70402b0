"""Experts that this peer claims, serves, trains and keeps."""

import contextlib
import fcntl
import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from random import Random

import torch
from hivemind.moe import ModuleBackend, Server
from hivemind.moe.server.task_pool import TaskPool
from hivemind.utils import MPFuture, get_dht_time
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from collab.background import Background, Repeated
from collab.errors import UserError
from collab.experts.mixture import MOST_ROWS
from collab.experts.plan import ExpertPlan, holders
from collab.files import make_folder, write_bytes
from collab.manifest import CODE_VERSION
from collab.metrics import MAX_HOSTED, HostedExpert, ServerRecord, ask_for_servers, publish_server, servers_in
from collab.peer import Peer

logger = logging.getLogger(__name__)

PROTOCOL = "samiti/expert/1"  # and the expert's name: under it servers hand out what they keep of it
HANDLERS = 2  # processes that accept requests
SAID_PER_LIFETIME = 3
LOOK_SECONDS = 15.0
SETTLE_SECONDS = 2.0  # in which the claims of two servers that start at once reach each other
ATTEMPTS = 5
ASK_SECONDS, SLOWEST_SECONDS = 5.0, 120.0
LOCK_SECONDS = 3.0  # in which the processes of a server that was killed are gone
CPU = torch.device("cpu")


class CheckedPool(TaskPool):
    """hivemind's queue of one expert's requests, which looks at them first.

    Upstream puts requests of several clients together unseen (moe/server/task_pool.py): one of another width ends the
    queue's process, and with it the expert; a NaN reaches the answers of all.
    """

    def __init__(self, *args: object, tensors: int, width: int, **options: object) -> None:
        super().__init__(*args, **options)
        self._expected = tensors, width

    def submit_task(self, *args: torch.Tensor) -> "Future[tuple[torch.Tensor, ...]]":
        """:returns: the answer; a future with a ValueError if the request is not as it should be."""
        count, width = self._expected
        shapes = [list(tensor.shape) for tensor in args]
        rows = shapes[0][0] if shapes and shapes[0] else 0
        if len(args) != count or rows == 0 or any(shape != [rows, width] for shape in shapes):
            return _refused(f"expected {count} tensors of [rows, {width}], got {shapes}")
        if any(tensor.dtype != torch.float32 for tensor in args):
            return _refused("expected float32")
        if not all(bool(tensor.isfinite().all()) for tensor in args):
            return _refused("the request has NaN or infinite values")
        answer: Future[tuple[torch.Tensor, ...]] = super().submit_task(*args)
        return answer


def _refused(reason: str) -> "Future[tuple[torch.Tensor, ...]]":
    future: Future[tuple[torch.Tensor, ...]] = MPFuture()
    future.set_exception(ValueError(reason))
    return future


class TrainedExpert(ModuleBackend):
    """hivemind's backend of one expert, with clipped gradients and a lock, so that this process can call it, too.

    A batch of gradients, of one client or of several, is one step of Adam: asynchronous SGD. What a forward pass has
    answered may be some steps old when its gradient comes.
    """

    is_near = True

    def __init__(self, plan: ExpertPlan, index: int, device: torch.device = CPU) -> None:
        module = plan.make(index).to(device)
        optimizer = torch.optim.Adam(
            module.parameters(), lr=plan.learning_rate, betas=plan.betas, eps=plan.epsilon, fused=True
        )
        most, schema = 4 * MOST_ROWS, plan.schema
        super().__init__(
            plan.uid(index),
            module,
            optimizer=optimizer,
            args_schema=(schema,),
            outputs_schema=schema,  # upstream would forget the codec
            max_batch_size=most,
        )
        options = {"width": plan.hidden_size, "max_batch_size": most}
        self.forward_pool = CheckedPool(self.forward, tensors=1, name=f"{self.name}_forward", **options)
        self.backward_pool = CheckedPool(self.backward, tensors=2, name=f"{self.name}_backward", **options)
        self.index, self.steps, self.rows = index, 0, 0
        """The rows are those of this session, in both passes."""
        self._device = device
        self._max_grad_norm = plan.max_grad_norm
        self._lock = threading.Lock()

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with self._lock:
            self.rows += len(inputs[0])
            answer: tuple[torch.Tensor, ...] = super().forward(*inputs)
            return answer

    def backward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with self._lock:
            self.rows += len(inputs[0])
            answer: tuple[torch.Tensor, ...] = super().backward(*inputs)
            return answer

    def on_backward(self, batch_size: int) -> None:
        """One step, unless the gradient is not finite: such a step would be the expert's last."""
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._max_grad_norm or float("inf"))
        if not norm.isfinite():
            self.optimizer.zero_grad()
            raise ValueError("the gradient of this expert is not finite")
        super().on_backward(batch_size)
        self.steps += 1

    def submit(self, *tensors: torch.Tensor) -> "Future[torch.Tensor]":
        """Do it now, without the network (see `mixture.Expert`)."""
        future: Future[torch.Tensor] = Future()
        try:
            inputs = [tensor.to(self._device) for tensor in tensors]
            [answer] = self.forward(*inputs) if len(inputs) == 1 else self.backward(*inputs)
            future.set_result(answer.cpu())
        except (RuntimeError, ValueError) as error:
            future.set_exception(error)
        return future

    def as_bytes(self) -> bytes:
        """Weights and the optimizer's state, in safetensors' format."""
        with self._lock:
            tensors = {f"module.{name}": param.detach().cpu().clone() for name, param in self.module.named_parameters()}
            for name, param in self.module.named_parameters():
                state = self.optimizer.state[param].items()
                tensors |= {
                    f"{key}.{name}": value.cpu().clone() for key, value in state if isinstance(value, torch.Tensor)
                }
            return save_tensors(tensors, {"expert": self.name, "steps": str(self.steps)})

    def load_bytes(self, data: bytes) -> None:
        """Go on from what `as_bytes` gave, here or elsewhere.

        :raises ValueError: it is damaged, or of another expert. This one stays as it was.
        """
        steps = steps_in(data, self.name)
        try:
            tensors = load_tensors(data)
        except SafetensorError as error:
            raise ValueError(f"it is damaged: {error}") from error
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise ValueError("it has NaN or infinite values")
        keys = ("exp_avg", "exp_avg_sq", "step") if steps else ()
        params = dict(self.module.named_parameters())
        expected = {f"module.{name}": param.shape for name, param in params.items()}
        for key in keys:
            expected |= {f"{key}.{n}": torch.Size() if key == "step" else p.shape for n, p in params.items()}
        found = {name: tensor.shape for name, tensor in tensors.items()}
        if found != expected:
            raise ValueError(f"it holds {found} instead of {expected}")
        with self._lock, torch.no_grad():
            for name, param in params.items():
                param.copy_(tensors[f"module.{name}"])
                if keys:
                    self.optimizer.state[param] = {key: tensors[f"{key}.{name}"].to(param) for key in keys}
            self.steps = steps


def steps_in(data: bytes, uid: str) -> int:
    """How far an expert in `TrainedExpert.as_bytes`' format was trained.

    :raises ValueError: it is no expert called `uid`.
    """
    try:
        length = int.from_bytes(data[:8], "little")
        about = json.loads(data[8 : 8 + length])["__metadata__"]
        steps = int(about["steps"])
        if about["expert"] != uid or steps < 0:
            raise ValueError(f"it is the expert {about['expert']!r}, after {steps} steps")
    except (KeyError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it is no expert: {error!r}") from error
    return steps


class _Server(Server):
    """hivemind's server on a peer that lives longer than it.

    Upstream tells the DHT of its experts before anybody can answer for them, unsigned, and one server for each expert
    (server.py:244, dht_handler.py:70); `ExpertHost` does that here. It is shut down twice (server.py:255, 278), and its
    DHT with it.
    """

    def __init__(self, peer: Peer, experts: Mapping[str, TrainedExpert], device: torch.device) -> None:
        super().__init__(peer.dht, dict(experts), num_connection_handlers=HANDLERS, device=device)
        self.dht_handler_thread = threading.Thread(target=lambda: None)
        self._is_down = False

    def shutdown(self) -> None:
        if not self._is_down:
            self._is_down = True
            self.ready.clear()
            for handler in self.conn_handlers:
                handler.shutdown()
            self.runtime.shutdown()


class ExpertHost(Background):
    """Claims experts that nobody serves, goes on with what was saved of them, serves and trains them until `stop`.

    Of what nobody serves, experts that this computer has served before come first. Each begins with what has been
    trained the most, of what lies on this disk and of what other servers hand out: each server keeps copies of some
    experts of others, so that those of a dead one go on elsewhere.

    :param lifetime: seconds for which a server's word counts: the run's `metadata_expiration`.
    :param wanted: how many experts; fewer if fewer are free.
    :param folder: where they are saved, each as one file, every `save_seconds` and at the end.
    :param name: for people.
    :raises UserError: none is free, the folder cannot be written to, or another server uses it.
    """

    def __init__(
        self,
        peer: Peer,
        plan: ExpertPlan,
        run_id: str,
        lifetime: float,
        *,
        wanted: int,
        folder: Path,
        name: str,
        save_seconds: float,
        device: torch.device = CPU,
    ) -> None:
        super().__init__("Telling of experts", lifetime / SAID_PER_LIFETIME)
        if peer.client_mode:
            raise UserError(
                "Nobody can connect to this computer, so it cannot serve experts. Open a port (see docs/network.md), "
                "or leave out --serve_experts and take part as a trainer."
            )
        self._peer, self._plan, self._run_id, self._lifetime, self._name = peer, plan, run_id, lifetime, name
        self._folder = folder / plan.swarm_id
        make_folder(self._folder)
        self._lock = _lock(self._folder)
        self._since: dict[int, float] = {}
        self._handed_out: set[Path] = set()
        self._saved_steps: dict[int, int] = {}
        self._speeds: dict[int, tuple[float, int, float]] = {}
        self.experts: dict[int, TrainedExpert] = {}
        """By their number in the run. One that turns out to be another server's is taken out."""
        self._claim(min(wanted, MAX_HOSTED))
        for index in sorted(self._since):
            expert = TrainedExpert(plan, index, device)
            self._go_on(expert)
            self.experts[index] = expert
        self._server = _Server(peer, {expert.name: expert for expert in self.experts.values()}, device)
        self._server.run_in_background(await_ready=True, timeout=60)
        self._keep()
        self._keeping = Repeated("Saving experts", self._keep, save_seconds)
        self.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Say goodbye, end the server and save. Takes some seconds."""
        super().stop(timeout)
        with contextlib.suppress(TimeoutError):
            self._announce(left=True).result(timeout)
        self._server.shutdown()
        self._server.join(timeout)
        self._keeping.stop(timeout)
        for index in list(self.experts):
            self._save(index)
        self._lock.close()

    def _claim(self, wanted: int) -> None:
        rng, others = Random(self._peer.peer_id), self._others()
        for _ in range(ATTEMPTS):
            taken = holders(others, self._lifetime)
            free = [index for index in range(self._plan.total) if index not in taken and index not in self._since]
            rng.shuffle(free)  # two servers that start at once mostly want different ones
            free.sort(key=lambda index: not self._own(index).exists())
            if not (new := free[: wanted - len(self._since)]):
                break
            self._since |= dict.fromkeys(new, get_dht_time())
            self._announce().result(LOOK_SECONDS)
            time.sleep(SETTLE_SECONDS)
            others = self._others()
            self._give_up_lost(others)
        if not self._since:
            servers = {record.peer_id for record in holders(others, self._lifetime).values()}
            raise UserError(
                f"All {self._plan.total} experts of the run {self._run_id} are served already, by {len(servers)} "
                f"servers. This computer can train (run_trainer.py), or try again when a server has left."
            )

    def _others(self) -> list[ServerRecord]:
        records = servers_in(ask_for_servers(self._peer, self._run_id).result(LOOK_SECONDS))
        return [record for record in records if record.peer_id != self._peer.peer_id]

    def _give_up_lost(self, others: list[ServerRecord]) -> None:
        """Leave experts to a server that has claimed them earlier."""
        claims = holders([*others, self._record()], self._lifetime)
        for index in [i for i in self._since if claims[i].peer_id != self._peer.peer_id]:
            logger.info("Expert %d is served by %s already", index, claims[index].peer_id[-6:])
            del self._since[index]

    def _record(self, left: bool = False) -> ServerRecord:
        return ServerRecord(
            name=self._name,
            peer_id=self._peer.peer_id,
            version=CODE_VERSION,
            experts=[
                HostedExpert(
                    index=index,
                    since=since,
                    steps=self.experts[index].steps if index in self.experts else 0,
                    rows_per_second=self._speeds[index][2] if index in self._speeds else 0.0,
                )
                for index, since in sorted(self._since.items())
            ],
            reported=get_dht_time(),
            left=left,
        )

    def _announce(self, left: bool = False) -> MPFuture:
        return publish_server(self._peer, self._run_id, self._record(left), self._lifetime)

    def _take_a_turn(self) -> None:
        now = time.monotonic()
        for index, expert in list(self.experts.items()):
            since, before, _ = self._speeds.get(index, (now, expert.rows, 0.0))
            speed = (expert.rows - before) / (now - since) if now > since else 0.0
            self._speeds[index] = now, expert.rows, speed
        self._give_up_lost(self._others())
        for index in self.experts.keys() - self._since.keys():
            del self.experts[index]
        self._announce().result(LOOK_SECONDS)

    # ---- keeping them

    def _own(self, index: int) -> Path:
        return self._folder / f"expert-{index}.safetensors"

    def _copy(self, index: int) -> Path:
        return self._folder / f"copy-{index}.safetensors"

    def _keep(self) -> None:
        for index in list(self.experts):
            self._save(index)
        others = self._others()
        for index, holder in holders(others, self._lifetime).items():
            servers = {record.peer_id for record in others} - {holder.peer_id} | {self._peer.peer_id}
            if min(servers, key=lambda peer_id: _rank(peer_id, index)) == self._peer.peer_id:
                self._copy_from(holder.peer_id, index)

    def _save(self, index: int) -> None:
        expert = self.experts[index]
        if expert.steps != self._saved_steps.get(index):
            steps = expert.steps
            write_bytes(self._own(index), expert.as_bytes())
            self._saved_steps[index] = steps
        self._hand_out(self._own(index))

    def _copy_from(self, holder: str, index: int) -> None:
        with contextlib.suppress(OSError, ValueError):  # it has none yet, or is gone; next time perhaps
            data = self._fetch(holder, self._own(index))
            TrainedExpert(self._plan, index).load_bytes(data)  # what cannot be gone on with is not kept
            write_bytes(self._copy(index), data)
            self._hand_out(self._copy(index))

    def _hand_out(self, file: Path) -> None:
        if file not in self._handed_out:
            self._handed_out.add(file)
            self._peer.serve(f"{PROTOCOL}/{self._plan.swarm_id}/{file.name}", file)

    def _fetch(self, peer_id: str, file: Path) -> bytes:
        name = f"{PROTOCOL}/{self._plan.swarm_id}/{file.name}"
        return self._peer.fetch(peer_id, name, SLOWEST_SECONDS, patience=ASK_SECONDS)

    def _go_on(self, expert: TrainedExpert) -> None:
        """Fill a new expert with what has been trained the most."""
        found: list[tuple[int, bytes, str]] = []
        for file in (self._own(expert.index), self._copy(expert.index)):
            if file.exists():
                self._note(found, expert, file.read_bytes(), "this computer's disk")
            for record in self._others():
                with contextlib.suppress(OSError):
                    self._note(found, expert, self._fetch(record.peer_id, file), f"the server {record.peer_id[-6:]}")
        for steps, data, place in sorted(found, key=lambda each: -each[0]):
            try:
                expert.load_bytes(data)
            except ValueError as error:
                logger.warning("Expert %d of %s cannot be used: %s", expert.index, place, error)
                continue
            logger.info("Expert %d goes on after %d steps, from %s", expert.index, steps, place)
            return
        logger.info("Expert %d begins anew", expert.index)

    def _note(self, found: list[tuple[int, bytes, str]], expert: TrainedExpert, data: bytes, place: str) -> None:
        try:
            found.append((steps_in(data, expert.name), data, place))
        except ValueError as error:
            logger.warning("Expert %d of %s cannot be used: %s", expert.index, place, error)


def _rank(peer_id: str, index: int) -> bytes:
    """Orders servers, for each expert in another way: the first one that does not serve it keeps a copy."""
    return hashlib.sha256(f"{peer_id} {index}".encode()).digest()


def _lock(folder: Path):  # type: ignore[no-untyped-def]
    """Keep other servers of this computer out of the folder for as long as the file that this gives is open."""
    file, give_up = (folder / "lock").open("w"), time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except OSError:
            if time.monotonic() > give_up:
                file.close()
                raise UserError(
                    f"Another expert server of this run uses {folder}. Give this one a folder of its own: "
                    f"--expert_folder FOLDER"
                ) from None
            time.sleep(0.1)
