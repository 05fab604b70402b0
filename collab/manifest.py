"""The run manifest: all that the peers of one run have to agree on, in one document that its organizer has signed."""

import base64
import hashlib
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from hivemind.utils.crypto import RSAPrivateKey, RSAPublicKey

from collab.errors import UserError
from collab.files import replacing_folder, write_bytes
from collab.peer import Peer, peer_id_in, peer_id_of_public_key

logger = logging.getLogger(__name__)

PROTOCOL = "samiti/manifest/1"  # under this name peers serve it
FORMAT = 1  # raise it when an older Samiti could misread what a newer one writes
CODE_VERSION = "0.1.0"  # peers of another version may count, mask or average differently
NUMERIC_LIBRARIES = ("hivemind", "torch", "transformers", "tokenizers")
BROKEN = (zlib.error, UnsupportedAlgorithm, ValueError, LookupError, TypeError, AttributeError, RecursionError)
SECOND_OPINION_SECONDS = 5.0
KEPT = "manifest.bin"  # this document on disk, beside the files that it brings
MAX_DOCUMENT_BYTES = 512 * 2**20  # unpacked; a stranger's small answer must not grow without bound


def versions_here() -> dict[str, str]:
    """Versions of this code and of the libraries that decide about numerics; "2.13.0+cpu" and "2.13.0" are the same."""
    return {"samiti": CODE_VERSION} | {name: version(name).partition("+")[0] for name in NUMERIC_LIBRARIES}


@dataclass(frozen=True)
class Change:
    """Settings that hold from a global step on."""

    from_step: int
    """They count once this many global steps are made."""
    settings: dict[str, Any]
    """Only those that change."""


@dataclass(frozen=True)
class Manifest:
    """What a run has agreed on. Made by `found`, `changed` and `from_bytes`; who has one knows that its organizer has
    signed it.

    :param settings: the agreed arguments as the run began, flat: {argument name: JSON value}. See `settings_at`.
    :param files: small files that all peers share, {relative name: content}: tokenizer and model config.
    :param versions: versions of the code and of the libraries that decide about numerics.
    :param organizer: peer id of who started the run; nobody else can change it.
    :param changes: what the organizer has changed since, in the order of the global steps.
    :param signed: the document as it travels, with the organizer's key and signature.
    """

    settings: dict[str, Any]
    files: dict[str, bytes]
    versions: dict[str, str]
    organizer: str
    changes: tuple[Change, ...] = ()
    signed: bytes = field(default=b"", compare=False, repr=False)

    @classmethod
    def found(
        cls,
        settings: dict[str, Any],
        files: dict[str, bytes],
        key: RSAPrivateKey,
        versions: dict[str, str] | None = None,
    ) -> "Manifest":
        """Start a run, signed with the organizer's `key`."""
        organizer = peer_id_of_public_key(key.get_public_key().to_bytes())
        return cls(settings, files, versions or versions_here(), organizer)._sign(key)

    def changed(self, from_step: int, settings: dict[str, Any], key: RSAPrivateKey) -> "Manifest":
        """The next version, in which `settings` count once `from_step` global steps are made.

        :raises ValueError: an earlier change begins later, or this is not the organizer's key.
        """
        changes = (*self.changes, Change(from_step, settings))
        _check_changes(changes, self.settings)
        if peer_id_of_public_key(key.get_public_key().to_bytes()) != self.organizer:
            raise ValueError("only the run's organizer can change it")
        return Manifest(self.settings, self.files, self.versions, self.organizer, changes)._sign(key)

    @property
    def version(self) -> int:
        """1 when the run begins, and one more with every change."""
        return 1 + len(self.changes)

    @property
    def fingerprint(self) -> str:
        """The first half of a SHA-256 over what the run began with: equal on all its peers, also after changes."""
        return hashlib.sha256(self._document(())).hexdigest()[:32]

    @property
    def swarm_id(self) -> str:
        """Under this name peers look for each other: those with another model, tokenizer or setting have another one.

        Tensor shapes alone do not tell: a peer with another vocabulary would train alone in silence, and one with
        another number of ALBERT layers would join unnoticed, because the layers share their weights.
        """
        return f"{self.settings['run_id']}_{self.fingerprint[:12]}"

    @property
    def latest(self) -> dict[str, Any]:
        """The settings with all changes, those to come included."""
        return self.settings_at(max((change.from_step for change in self.changes), default=0))

    def settings_at(self, step: int) -> dict[str, Any]:
        """The settings that count when `step` global steps are made."""
        settings = dict(self.settings)
        for change in self.changes:
            if change.from_step <= step:
                settings |= change.settings
        return settings

    def continues(self, older: "Manifest") -> bool:
        """Whether this is the same run, with the same changes or more."""
        same = self.fingerprint == older.fingerprint
        return same and self.changes[: len(older.changes)] == older.changes

    def _document(self, changes: Sequence[Change]) -> bytes:
        content = {
            "format": FORMAT,
            "organizer": self.organizer,
            "settings": self.settings,
            "files": {name: base64.b64encode(content).decode() for name, content in self.files.items()},
            "versions": self.versions,
            "changes": [vars(change) for change in changes],
        }
        return json.dumps(content, sort_keys=True, ensure_ascii=False).encode()

    def _sign(self, key: RSAPrivateKey) -> "Manifest":
        document = self._document(self.changes)
        envelope = {
            "document": document.decode(),
            "key": key.get_public_key().to_bytes().decode(),
            "signature": key.sign(document).decode(),
        }
        signed = zlib.compress(json.dumps(envelope, ensure_ascii=False).encode())
        return Manifest(self.settings, self.files, self.versions, self.organizer, self.changes, signed)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Read what another peer sent, and check the signature.

        :raises ValueError: it is not a manifest, or somebody has altered it.
        """
        try:
            unpacker = zlib.decompressobj()
            text = unpacker.decompress(data, MAX_DOCUMENT_BYTES)
            if not unpacker.eof:
                raise ValueError(f"it is cut, or larger than {MAX_DOCUMENT_BYTES} bytes")
            envelope = json.loads(text)
            document_text, key = envelope["document"].encode(), envelope["key"].encode()
            if not RSAPublicKey.from_bytes(key).verify(document_text, envelope["signature"].encode()):
                raise ValueError("its signature does not fit its content: somebody has altered it")
            document = json.loads(document_text)
            if document["format"] > FORMAT:
                raise ValueError("a newer version of this code has made it; update yours")
            if document["organizer"] != peer_id_of_public_key(key):
                raise ValueError("it is signed with another key than its organizer's")
            files = {_safe_name(name): base64.b64decode(text) for name, text in document["files"].items()}
            # A list of pairs would pass for a mapping, were it not for the `**`.
            settings, versions = {**document["settings"]}, {**document["versions"]}
            changes = tuple(Change(change["from_step"], {**change["settings"]}) for change in document["changes"])
            _check_changes(changes, settings)
            if "/" in _safe_name(settings["run_id"]):  # it names a folder, too
                raise ValueError(f"unsafe run id {settings['run_id']!r}")
            manifest = cls(settings, files, versions, document["organizer"], changes, data)
            manifest._document(changes)  # JSON can hold half a character, which UTF-8 and file names cannot
            return manifest
        except BROKEN as error:
            reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise ValueError(f"it is not a valid run manifest ({reason})") from error

    def folder(self, cache_dir: Path) -> Path:
        """Where this run's shared files are, or would be, on this computer."""
        return cache_dir / "runs" / f"{self.settings['run_id']}-{self.fingerprint}"

    def unpack(self, cache_dir: Path) -> Path:
        """Write the shared files and this document below `cache_dir`, and return their folder."""
        folder = self.folder(cache_dir)
        if not folder.exists():
            with replacing_folder(folder, keep_existing=True) as scratch:
                for name, content in self.files.items():
                    (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                    (scratch / name).write_bytes(content)
                (scratch / KEPT).write_bytes(self.signed)
        for name, content in self.files.items():  # damaged, a tokenizer may still be one
            if not (folder / name).is_file() or (folder / name).read_bytes() != content:
                write_bytes(folder / name, content)
        if read_kept(folder) != self:
            write_bytes(folder / KEPT, self.signed)
        return folder

    def serve(self, peer: Peer, folder: Path) -> None:
        """Hand the document in `folder`, as `unpack` has left it, to every peer that asks."""
        peer.serve(PROTOCOL, folder / KEPT)

    def refuse_other_versions(self) -> None:
        """Refuse to join with libraries whose numbers may differ from the swarm's."""
        here = versions_here()
        differing = {
            name: (here.get(name), wanted) for name, wanted in self.versions.items() if here.get(name) != wanted
        }
        if differing:
            lines = "\n  ".join(
                f"{name}: here {mine}, in the run {wanted}" for name, (mine, wanted) in differing.items()
            )
            raise UserError(
                f"This installation differs from the run's:\n  {lines}\nDifferent versions would spoil the common "
                f"model without anybody noticing. Check out the run's version of the code and type `make setup`."
            )


def read_kept(folder: Path) -> Manifest | None:
    """The manifest that `Manifest.unpack` has left in `folder`; None if there is none that can be read."""
    try:
        return Manifest.from_bytes((folder / KEPT).read_bytes())
    except (OSError, ValueError):
        return None


def fetch_manifest(peer: Peer, cache_dir: Path, organizer: str | None = None, timeout: float = 30.0) -> Manifest:
    """Ask the peers that were named on the command line for the run's manifest, one after the other.

    Any peer of the run hands it out. It counts if the person who gave the address vouches for its organizer: the
    organizer's peer id is in one of the addresses (a peer id is the hash of a public key), it is `organizer`, or this
    computer has taken part in the run before.

    :param cache_dir: where earlier runs are kept (`Manifest.unpack`). Of several versions the newest counts.
    :param timeout: seconds for each of them until one has answered; after that, for a moment only.
    :raises UserError: nobody has one, they have different ones, or nobody vouches for its organizer.
    """
    found: dict[str, tuple[str, Manifest]] = {}
    failures: list[str] = []
    for peer_id, address in _one_address_each(peer.initial_peers).items():
        try:
            content = peer.fetch(peer_id, PROTOCOL, min(timeout, SECOND_OPINION_SECONDS) if found else timeout)
            manifest = Manifest.from_bytes(content)
            known = found.get(manifest.fingerprint)
            if known is None or manifest.version > known[1].version:
                found[manifest.fingerprint] = address, manifest
        except (OSError, ValueError) as error:
            failures.append(f"{address}: {error}")
    if len(found) > 1:
        raise UserError(_different_runs(list(found.values())))
    for address, manifest in found.values():
        for failure in failures:
            logger.warning("No manifest from %s; going by that of %s", failure, address)
        kept = read_kept(manifest.folder(cache_dir))
        trusted = {organizer, peer.peer_id, *map(peer_id_in, peer.initial_peers)}
        if kept is None and manifest.organizer not in trusted:
            raise UserError(_unknown_organizer(address, manifest))
        return kept if kept is not None and kept.version > manifest.version else manifest
    listing = "\n  ".join(failures)
    raise UserError(
        f"The swarm answered, but no peer handed out the run's manifest:\n  {listing}\n"
        f"Use the address that the run's auxiliary peer prints; that peer has to run the same version of the code."
    )


def join_command(peer: Peer, manifest: Manifest) -> str:
    """What a volunteer types to join through `peer`: its address, and who the organizer is if it is another one."""
    command = "python run_trainer.py --initial_peers " + " ".join(peer.addresses())
    return command if peer.peer_id == manifest.organizer else f"{command} --organizer {manifest.organizer}"


def _one_address_each(addresses: Sequence[str]) -> dict[str, str]:
    """The first address of each peer, by peer id: a peer may be given with several."""
    first: dict[str, str] = {}
    for address in addresses:
        first.setdefault(peer_id_in(address), address)
    return first


def _different_runs(found: list[tuple[str, Manifest]]) -> str:
    listing = "\n  ".join(
        f"{address}: the run {manifest.settings['run_id']}, fingerprint {manifest.fingerprint[:12]}"
        for address, manifest in found
    )
    (_, one), (_, other) = found[:2]
    sides = [{"organizer": each.organizer, **each.settings, **each.files, **each.versions} for each in (one, other)]
    absent = object()
    differing = sorted(
        name for name in sides[0].keys() | sides[1].keys() if sides[0].get(name, absent) != sides[1].get(name, absent)
    )
    return (
        f"The addresses in --initial_peers lead to different runs, which cannot become one:\n  {listing}\n"
        f"They differ in {', '.join(differing)}. Give only addresses of the run that you want to join."
    )


def _unknown_organizer(address: str, manifest: Manifest) -> str:
    return (
        f"{address} hands out a manifest of the run {manifest.settings['run_id']} that the peer {manifest.organizer} "
        f"has signed, and nothing that you typed says that this is its organizer. Use the line that the organizer "
        f"published. If you know by other means that it is, add: --organizer {manifest.organizer}"
    )


def _check_changes(changes: Sequence[Change], settings: Mapping[str, Any]) -> None:
    steps = [change.from_step for change in changes]
    if any(type(step) is not int or step < 1 for step in steps) or steps != sorted(steps):
        raise ValueError(f"its changes take effect at the global steps {steps}, which is not in order")
    unknown = {name for change in changes for name in change.settings} - settings.keys()
    if unknown:
        raise ValueError(f"it changes {', '.join(sorted(unknown))}, which the run does not have")


def _safe_name(name: str) -> str:
    """A stranger's file name must stay inside the folder that it is unpacked to."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or set(name) & set("\\:\0"):
        raise KeyError(f"unsafe file name {name!r}")
    return str(path)
