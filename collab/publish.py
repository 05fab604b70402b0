"""Uploading checkpoints to the Hugging Face Hub beside the run, so that no outage there ever stops it."""

import logging
import math
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from collab.background import Background
from collab.errors import UserError
from collab.keeper import Keeper
from collab.lease import Lease

logger = logging.getLogger(__name__)

PERIOD = 1.0
PATIENCE = 300.0  # seconds after which another peer publishes as well, if the one that should has not
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 300.0  # seconds between attempts, doubled after each one
REFUSED = (401, 403)
WORTH_ANOTHER_TRY = (408, 409, 412, 425, 429)  # beside 5xx: too slow, a concurrent commit, too early, rate limit


@dataclass
class _Upload:
    step: int
    copy: Path
    commit: str | None = None  # known once the files are there and only the tag is missing


class Publisher:
    """Sends checkpoint folders to one model repository, each as one commit with the tag `step-<n>`.

    One background thread does the work. A checkpoint that still waits (for the one before it, or for the Hub to come
    back) is dropped when a newer one arrives: people want the newest, and the queue cannot grow. Nothing here raises
    into the training: `errors` counts what went wrong and the log tells it. A refused token ends publishing.

    The token is the one that `hf auth login` or the variable HF_TOKEN gave to huggingface_hub; it is never stored here.

    :param repo_id: `organization/name`; created with the first upload if it does not exist.
    :param private: whether a repository that has to be created is private.
    :param endpoint: another Hub than the one of HF_ENDPOINT.
    :param first_pause: seconds before the second attempt at an upload; doubles up to five minutes.
    :raises UserError: `repo_id` is no name of a repository.
    """

    def __init__(
        self, repo_id: str, *, private: bool = False, endpoint: str | None = None, first_pause: float = FIRST_PAUSE
    ) -> None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise UserError(
                f"{repo_id!r} cannot be the name of a repository on the Hub: {error} "
                f"Checkpoints could not be published. Write it as organization/name."
            ) from error
        self.repo_id, self.private, self.first_pause = repo_id, private, first_pause
        self.errors = 0
        self.published: int | None = None  # the last global step whose checkpoint is on the Hub, tag included
        self._api = HfApi(endpoint=endpoint)
        self._submitted: int | None = None
        self._created = False
        self._waiting: _Upload | None = None
        self._deadline: float | None = None  # set by close(); time.monotonic()
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="publisher", daemon=True)
        disable_progress_bars()  # they would draw over the console line of the run
        self._thread.start()

    def submit(self, folder: Path, step: int) -> None:
        """Publish the checkpoint in `folder` soon; returns at once.

        The folder may be replaced or deleted right after: hard links keep its files, without a second copy on disk.
        """
        if self._stopped:
            return
        if self._submitted is None:  # whatever lies there was left by a process that was killed
            for leftover in folder.parent.glob(".publishing-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        self._submitted = step
        try:
            copy = Path(tempfile.mkdtemp(prefix=f".publishing-{step}.", dir=folder.parent))
            shutil.copytree(folder, copy, copy_function=_link_or_copy, dirs_exist_ok=True)
        except OSError as error:
            self._report(f"Cannot prepare the checkpoint of step {step} for the Hub: {error}. The run goes on.")
            return
        with self._changed:
            replaced, self._waiting = self._waiting, _Upload(step, copy)
            self._changed.notify()
        if replaced is not None:
            shutil.rmtree(replaced.copy, ignore_errors=True)

    def close(self, timeout: float) -> bool:
        """Finish what waits, for at most `timeout` seconds; True if the last submitted checkpoint is on the Hub."""
        with self._changed:
            self._deadline = time.monotonic() + timeout
            self._changed.notify()
        self._thread.join(timeout)
        done = self.published == self._submitted
        if not done:
            logger.warning(
                "The checkpoint of step %s is not on the Hub. It lies in this run's folder; publish it from there with "
                "`hf upload %s FOLDER`.",
                self._submitted,
                self.repo_id,
            )
        return done

    def _work(self) -> None:
        while not self._stopped:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._deadline is not None)
                upload, self._waiting = self._waiting, None
            if upload is None:
                return
            try:
                self._publish(upload)
            finally:
                shutil.rmtree(upload.copy, ignore_errors=True)

    def _publish(self, upload: _Upload) -> None:
        """Attempt one upload until it is done, cannot be done, or is overtaken by a newer checkpoint or the end."""
        for attempt in count():
            try:
                self._attempt(upload)
            except Exception as error:  # noqa: BLE001 - the run must outlive whatever the network, the Hub and its client do
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                if status in REFUSED:
                    self._stopped = True
                    self._report(
                        f"The Hub refuses to let us write to {self.repo_id} (HTTP {status}). Checkpoints stay on this "
                        f"disk and are no longer published. Log in with `hf auth login`, or set HF_TOKEN to a token "
                        f"with write access to {self.repo_id}, and start again."
                    )
                    return
                if isinstance(error, ValueError) or (status and status < 500 and status not in WORTH_ANOTHER_TRY):
                    self._report(f"The Hub does not accept the checkpoint of step {upload.step} ({reason}).")
                    return
                pause = min(self.first_pause * 2**attempt, LONGEST_PAUSE)
                self._report(
                    f"Publishing the checkpoint of step {upload.step} to {self.repo_id} failed "
                    f"({reason}). Next attempt in {pause:.0f} s; the run goes on."
                )
                if not self._still_wanted_after(pause):
                    return
            else:
                self.published = upload.step
                logger.info("Published the checkpoint of step %d to %s.", upload.step, self.repo_id)
                return

    def _attempt(self, upload: _Upload) -> None:
        if not self._created:
            self._api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            self._created = True
        if upload.commit is None:
            # Not upload_folder: it may spread one folder over several commits, and a reader of the newest commit
            # would meet the weights of one step with the optimizer of another.
            files = sorted(path for path in upload.copy.rglob("*") if path.is_file())
            upload.commit = self._api.create_commit(
                self.repo_id,
                operations=[CommitOperationAdd(path.relative_to(upload.copy).as_posix(), path) for path in files],
                commit_message=f"Checkpoint of global step {upload.step}",
            ).oid
        self._api.create_tag(self.repo_id, tag=f"step-{upload.step}", revision=upload.commit, exist_ok=True)

    def _still_wanted_after(self, pause: float) -> bool:
        """Sleep; False at once when a newer checkpoint waits, or when close() would not wait for another attempt."""
        wake_at = time.monotonic() + pause
        with self._changed:
            while (left := wake_at - time.monotonic()) > 0:
                if self._waiting is not None or (self._deadline is not None and self._deadline < wake_at):
                    return False
                self._changed.wait(left)
        return True

    def _report(self, message: str) -> None:
        self.errors += 1
        logger.warning("%s", message)


class Publishing(Background):
    """Hands the newest checkpoint to the publisher while this peer holds the lease, in the background until `stop`.

    A holder that publishes nothing cannot keep the others from it: after `PATIENCE` seconds each of them does it too.
    """

    def __init__(self, publisher: Publisher, keeper: Keeper, lease: Lease) -> None:
        super().__init__("Publishing", PERIOD)
        self._publisher, self._keeper, self._lease = publisher, keeper, lease
        self._submitted = -1
        self._waits_since = math.inf
        self.start()

    def _take_a_turn(self) -> None:
        newest = self._keeper.newest
        if newest is None or newest.step == self._submitted:
            return
        self._waits_since = min(self._waits_since, time.monotonic())
        if self._lease.is_mine or time.monotonic() - self._waits_since > PATIENCE:
            self._publisher.submit(newest.folder, newest.step)
            self._submitted, self._waits_since = newest.step, math.inf

    def close(self, timeout: float) -> bool:
        """Finish what waits, for at most `timeout` seconds; True if nothing that this peer has to publish is left."""
        self.stop()
        self._take_a_turn()
        return self._publisher.close(timeout)


def _link_or_copy(source: str, target: str) -> None:
    """A hard link where the file system knows them (an exFAT disk or a mounted Drive does not), else a copy."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
