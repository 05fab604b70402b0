"""Uploading checkpoints to the Hugging Face Hub beside the run, so that no outage there ever stops it."""

import json
import logging
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_url
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
    set_client_factory,
    validate_repo_id,
)
from huggingface_hub.utils._http import default_client_factory

from collab.archive import Archive, Saved
from collab.background import Background
from collab.checkpoint import CARD, CONFIG, OPTIMIZER_STRUCTURE, OPTIMIZER_TENSORS, TRAINER_STATE, WEIGHTS
from collab.errors import UserError
from collab.keeper import Keeper
from collab.lease import Lease

logger = logging.getLogger(__name__)

PERIOD = 1.0
PATIENCE = 300.0  # seconds after which another peer publishes as well, if the one that should has not
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 300.0  # seconds between attempts, doubled after each one
REFUSED_PAUSES = 30  # times the first one: a minute until it is seen whether a person has logged in again
LONGEST_RATE_LIMIT = 3600.0  # whatever the Hub says
ANSWER_SECONDS = 120.0  # without a byte from the Hub, or to it; a commit is answered within seconds
REFUSED = (401, 403)
TAKEN = 409
COPY = ".publishing-"
WHOLE = (CARD, CONFIG, OPTIMIZER_STRUCTURE, OPTIMIZER_TENSORS, TRAINER_STATE, WEIGHTS)


class Publisher:
    """Puts checkpoint folders into one model repository: one commit and one tag `step-N` for each, never twice.

    What is on `main` decides, and the Hub takes a commit only on top of the `main` that was looked at. So it does not
    matter how often a checkpoint is published, by how many peers, or what an earlier attempt came to before it was
    killed: whoever comes second finds it there. A commit holds all files of a checkpoint, so that no revision has the
    weights of one step with the optimizer of another, and `main` never goes back to an earlier step of the same run.

    The token is the one that `hf auth login` or the variable HF_TOKEN gave to huggingface_hub; it is asked for anew
    each time, and never stored here.

    :param repo_id: `organization/name`; created with the first upload if it does not exist.
    :param private: whether a repository that has to be created is private.
    :param endpoint: another Hub than the one of HF_ENDPOINT.
    :param patience: seconds without a byte after which a request has failed; for all clients of the Hub in this
        process, which would wait for ever otherwise.
    :raises UserError: `repo_id` is no name of a repository.
    """

    def __init__(
        self, repo_id: str, *, private: bool = False, endpoint: str | None = None, patience: float = ANSWER_SECONDS
    ) -> None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise UserError(
                f"{repo_id!r} cannot be the name of a repository on the Hub: {error} "
                f"Checkpoints could not be published. Write it as organization/name."
            ) from error
        self.repo_id, self.private = repo_id, private
        self._api = HfApi(endpoint=endpoint)
        self._tagged = -1  # the step of the newest commit whose tag this peer has seen
        disable_progress_bars()  # they would draw over the console line of the run

        def impatient() -> Any:
            client = default_client_factory()
            client.timeout = patience
            return client

        set_client_factory(impatient)

    def publish(self, checkpoint: Saved) -> bool:
        """Bring a checkpoint to the Hub; returns whether it was this call that did it. Takes as long as the link needs.

        The folder may be replaced or deleted meanwhile: hard links keep its files, without a second copy on disk.

        :raises UserError: the Hub refuses the token.
        :raises Exception: whatever the disk, the network, the Hub and its client come up with. Call it again later.
        """
        with _kept(checkpoint.folder) as folder:
            try:
                return self._publish(folder, checkpoint.step)
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status not in REFUSED:
                    raise
                raise UserError(
                    f"The Hub refuses to let us write to {self.repo_id} (HTTP {status}). Checkpoints stay on this disk "
                    f"until it does. Log in with `hf auth login` and a token that may write to {self.repo_id}: it is "
                    f"found within a minute. If the variable HF_TOKEN is set, it comes first: start again without it."
                ) from error

    def newest_step(self, swarm_id: str | None) -> int:
        """The global step that `main` shows of the swarm's run; -1 if it shows none."""
        try:
            return self._step_at(self._head(), swarm_id)
        except RepositoryNotFoundError:
            return -1

    def _publish(self, folder: Path, step: int) -> bool:
        try:
            head = self._head()
        except RepositoryNotFoundError:
            self._api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            head = self._head()
        there = self._step_at(head, _read_state(folder / TRAINER_STATE).get("swarm_id"))
        if there > step:
            logger.warning(
                "%s shows step %d of this run already: the checkpoint of step %d is not published. If the run was "
                "started anew, give it a repository of its own with --repo_id.", self.repo_id, there, step,
            )  # fmt: skip
            return False
        if there < step:
            if there not in (-1, self._tagged):
                self._tag(there, head)  # who made this commit may have died before it had its tag
            # Not upload_folder: where hf_xet is installed, huggingface_hub 2.4 spreads a large folder over several
            # commits, and checks the parent of the first one only.
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            head = self._api.create_commit(
                self.repo_id,
                operations=[CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
                commit_message=f"Checkpoint of global step {step}",
                parent_commit=head,
            ).oid
        if not self._tag(step, head):
            logger.warning(
                "The tag step-%d of %s belongs to another run, and stays with it. The checkpoint is on main. To tag "
                "this run's as well, give it a repository of its own with --repo_id.", step, self.repo_id,
            )  # fmt: skip
        self._tagged = step
        return there < step

    def _head(self) -> str | None:
        return self._api.model_info(self.repo_id).sha

    def _step_at(self, revision: str | None, swarm_id: str | None) -> int:
        url = hf_hub_url(self.repo_id, TRAINER_STATE, revision=revision, endpoint=self._api.endpoint)
        answer = get_session().get(url, headers=build_hf_headers())
        try:
            hf_raise_for_status(answer)
        except RemoteEntryNotFoundError:
            return -1
        try:
            state = json.loads(answer.content)
            return int(state["global_step"]) if state.get("swarm_id") == swarm_id else -1
        except (ValueError, KeyError, TypeError, AttributeError):
            return -1  # somebody else's file of this name

    def _tag(self, step: int, commit: str | None) -> bool:
        """Whether the tag of this step is at this commit now: a tag that stands elsewhere is not moved."""
        tag = f"step-{step}"
        try:
            self._api.create_tag(self.repo_id, tag=tag, revision=commit)
        except HfHubHTTPError as error:
            if error.response.status_code != TAKEN:
                raise
            return self._api.model_info(self.repo_id, revision=tag).sha == commit
        return True


class Published(NamedTuple):
    """A checkpoint of this run that is on the Hub."""

    step: int
    time: float
    """When this peer put it or found it there, in seconds since 1970."""


class Publishing(Background):
    """Publishes this peer's newest checkpoint while it holds the lease, in the background until `stop`.

    A checkpoint that still waits gives way to a newer one: people want the newest, and no queue can grow. Failed
    attempts are counted in `health` and made again, ever less often; nothing that the Hub does ends this.

    A holder that publishes nothing cannot keep the others from it: whoever has seen nothing new on the Hub since its
    own checkpoint before, and `PATIENCE` seconds after the present one, publishes it too.

    :param archive: this run's checkpoints. The newest one that a killed process left there is published like any other,
        and what that process had in its hands is removed.
    :param first_pause: seconds before the second attempt; doubles up to five minutes.
    """

    def __init__(
        self,
        publisher: Publisher,
        keeper: Keeper,
        lease: Lease,
        archive: Archive,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        super().__init__("Publishing", PERIOD)
        self.published: Published | None = None
        """The newest one that this peer knows of."""
        self._publisher, self._keeper, self._lease = publisher, keeper, lease
        self._swarm_id, self._first_pause = archive.run, first_pause
        self._done = -1  # the step up to which there is nothing left to do for this peer
        self._waits_since = math.inf
        self._attempts = 0
        self._deadline = -math.inf  # set by close(); time.monotonic()
        for leftover in archive.folder.glob(f"{COPY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        self._left = archive.newest()
        self.start()

    def close(self, timeout: float) -> bool:
        """Finish what waits, for at most `timeout` seconds; True if nothing that this peer has to publish is left."""
        self._deadline = time.monotonic() + timeout
        self.stop(timeout)
        newest = self._newest()
        done = newest is None or not self._is_due(newest)
        if not done and newest is not None:
            logger.warning(
                "The checkpoint of step %d is not on the Hub. Publish it with `hf upload %s %s`, or start again.",
                newest.step, self._publisher.repo_id, newest.folder,
            )  # fmt: skip
        return done

    def run(self) -> None:
        super().run()
        while time.monotonic() < self._deadline:  # close() waits
            newest = self._newest()
            if newest is None or not self._is_due(newest):
                return
            try:
                self._take_a_turn()
            except Exception as error:  # noqa: BLE001 - what is left to do is the caller's to say
                self._note_failure(error)
                if time.monotonic() + self._period > self._deadline:
                    return
                time.sleep(self._period)

    def _take_a_turn(self) -> None:
        newest = self._newest()
        if newest is None or newest.step <= self._done:
            return
        self._waits_since = min(self._waits_since, time.monotonic())
        if not self._is_due(newest):
            return
        if self._lease.is_mine or (there := self._publisher.newest_step(self._swarm_id)) <= self._done:
            if self._publisher.publish(newest):
                logger.info("Published the checkpoint of step %d to %s", newest.step, self._publisher.repo_id)
            there = newest.step
        self.published = Published(there, time.time())
        self._done, self._waits_since = newest.step, math.inf
        self._attempts, self._period = 0, PERIOD

    def _note_failure(self, error: Exception) -> None:
        self._period = pause_after(error, self._attempts, self._first_pause)
        self._attempts += 1
        super()._note_failure(error)

    def _newest(self) -> Saved | None:
        return self._keeper.newest or self._left

    def _is_due(self, newest: Saved) -> bool:
        waited = time.monotonic() - self._waits_since > PATIENCE
        return newest.step > self._done and (self._lease.is_mine or waited)


def pause_after(error: Exception, attempts: int, first: float = FIRST_PAUSE) -> float:
    """Seconds until the next attempt: doubled with each one that failed, and not before the Hub wants it.

    :param attempts: that failed before the one that ended with `error`.
    """
    if isinstance(error, UserError):
        return first * REFUSED_PAUSES
    wanted = 0.0
    if isinstance(error, HfHubHTTPError):
        headers = error.response.headers
        limit = parse_ratelimit_headers(headers)
        after = headers.get("Retry-After", "")
        wanted = float(after) if after.isdecimal() else float(limit.reset_in_seconds if limit else 0)
    return max(min(first * 2 ** min(attempts, 30), LONGEST_PAUSE), min(wanted, LONGEST_RATE_LIMIT))


@contextmanager
def _kept(folder: Path) -> Iterator[Path]:
    """The files of a checkpoint as they are now, whatever becomes of its folder, until the block ends.

    :raises OSError: it is not whole, or was replaced or removed while its files were read.
    """
    copy, inode = Path(tempfile.mkdtemp(prefix=COPY, dir=folder.parent)), folder.stat().st_ino
    try:
        shutil.copytree(folder, copy, copy_function=_link_or_copy, dirs_exist_ok=True)
        missing = [name for name in WHOLE if not (copy / name).exists()]
        if missing or folder.stat().st_ino != inode:
            raise OSError(f"{folder} has changed while it was read, or is not whole: {missing} missing")
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    """A hard link where the file system knows them (an exFAT disk or a mounted Drive does not), else a copy."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
