"""Changes of a run while it goes on: the organizer signs a new version of the manifest, and all peers hear of it."""

import logging
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hivemind.utils import ValueWithExpiration

from collab.background import Background
from collab.errors import UserError
from collab.files import write_bytes
from collab.manifest import KEPT, PROTOCOL, Manifest, read_kept
from collab.metrics import read_records
from collab.peer import Peer, signed_entries
from collab.trackers import HISTORY, read_history

logger = logging.getLogger(__name__)

LOOKS_PER_LIFETIME = 4
LOOK_SECONDS = 15.0
FETCH_SECONDS = 15.0
MAX_ASKED = 3  # in one turn


class ChangeWatch(Background):
    """Keeps this peer's copy of the manifest the newest one, in the background until `stop`.

    Peers say in the DHT which version they have, unless it is the first one; who has an older one fetches the newer.
    Nobody can lie to any effect: only what the organizer has signed, and what continues the version that is here, is
    taken over. So a change reaches everybody even if the organizer leaves as soon as one peer has it.

    :param manifest: what this peer has joined with.
    :param folder: where its copy is kept, from which the peer serves it.
    :param lifetime: seconds for which a record counts; a change is known everywhere after about a quarter of it.
    """

    def __init__(self, peer: Peer, manifest: Manifest, folder: Path, lifetime: float) -> None:
        super().__init__("Looking for changes of the run", lifetime / LOOKS_PER_LIFETIME)
        self.manifest = manifest
        self._peer, self._folder, self._lifetime = peer, folder, lifetime
        self._key = f"{manifest.swarm_id}_manifest"
        self._liars: set[str] = set()
        self.start()

    def _take_a_turn(self) -> None:
        answer = self._peer.dht.get(self._key, latest=True, return_future=True).result(LOOK_SECONDS)
        newer = {peer: version for peer, version in versions_in(answer).items() if version > self.manifest.version}
        for peer in sorted(newer.keys() - self._liars, key=lambda peer: -newer[peer])[:MAX_ASKED]:
            self._fetch(peer)
        if self.manifest.changes and not self._peer.client_mode:
            self._peer.publish(self._key, self.manifest.version, self._lifetime)

    def _fetch(self, peer: str) -> None:
        try:
            manifest = Manifest.from_bytes(self._peer.fetch(peer, PROTOCOL, FETCH_SECONDS))
        except OSError as error:
            logger.debug("No manifest from peer %s: %s", peer, error)
            return
        except ValueError as error:
            logger.warning("Peer %s hands out a manifest that does not count: %s", peer[-6:], error)
            self._liars.add(peer)
            return
        if manifest.version <= self.manifest.version:
            return
        if not manifest.continues(self.manifest):
            logger.warning("Peer %s hands out a manifest that contradicts this run's; it does not count", peer[-6:])
            self._liars.add(peer)
            return
        self.manifest = manifest  # it counts, also where the disk is full
        write_bytes(self._folder / KEPT, manifest.signed)


def versions_in(answer: ValueWithExpiration | None) -> dict[str, int]:
    """Which version each peer says it has, by peer id."""
    return {peer: said for peer, said in signed_entries(answer).items() if type(said) is int}


def reopened(new: Manifest, run_folder: Path, changing: bool) -> Manifest:
    """The run that is kept in `run_folder` if the `new` one is the same, or is meant to change it; else the new one.

    :raises UserError: there is none that the new one could change.
    """
    kept = read_kept(run_folder)
    if kept is None and (run_folder / KEPT).exists():  # damaged; checkpoints have it, too
        kept = next(filter(None, map(read_kept, sorted(run_folder.glob("checkpoints/step-*"), reverse=True))), None)
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


def changed(manifest: Manifest, at_step: int, settings: dict[str, Any], peer: Peer, run_folder: Path) -> Manifest:
    """The manifest with other settings from global step `at_step` on.

    :raises UserError: this peer is not the organizer, or the step is made already.
    """
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
    try:
        return manifest.changed(at_step, settings, peer.private_key)
    except ValueError as error:
        raise UserError(f"This change is not possible: {error}. Give a later --change_at_step.") from error


def in_words(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What has changed, for the console."""
    return ", ".join(f"{key} {now[key]} (was {before[key]})" for key in sorted(now) if now[key] != before.get(key))
