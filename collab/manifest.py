"""The run manifest: everything that the peers of one run have to agree on, in one document."""

import base64
import hashlib
import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from collab.errors import UserError
from collab.files import replacing_folder, write_bytes
from collab.peer import Peer, peer_id_in

logger = logging.getLogger(__name__)

PROTOCOL = "samiti/manifest/1"  # under this name peers serve it
CODE_VERSION = "0.1.0"  # peers of another version may count, mask or average differently
NUMERIC_LIBRARIES = ("hivemind", "torch", "transformers", "tokenizers")
SECOND_OPINION_SECONDS = 5.0
MAX_DOCUMENT_BYTES = 512 * 2**20  # unpacked; a stranger's small answer must not grow without bound


@dataclass(frozen=True)
class Manifest:
    """What a run has agreed on.

    :param settings: the agreed arguments, flat: {argument name: JSON value}.
    :param files: small files that all peers share, {relative name: content}: tokenizer and model config.
    :param versions: versions of this code and of the libraries that decide about numerics.
    """

    settings: dict[str, Any]
    files: dict[str, bytes]
    versions: dict[str, str] = field(  # "2.13.0+cpu" and "2.13.0" are the same code
        default_factory=lambda: (
            {"samiti": CODE_VERSION} | {name: version(name).partition("+")[0] for name in NUMERIC_LIBRARIES}
        )
    )

    @property
    def fingerprint(self) -> str:
        """The first half of a SHA-256 over the whole content: equal on all peers of one run."""
        return hashlib.sha256(self._document()).hexdigest()[:32]

    @property
    def swarm_id(self) -> str:
        """Under this name peers look for each other: those with another model, tokenizer or setting have another one.

        Tensor shapes alone do not tell: a peer with another vocabulary would train alone in silence, and one with
        another number of ALBERT layers would join unnoticed, because the layers share their weights.
        """
        return f"{self.settings['run_id']}_{self.fingerprint[:12]}"

    def to_bytes(self) -> bytes:
        """The document as it travels: compressed JSON, files in base64."""
        return zlib.compress(self._document())

    def _document(self) -> bytes:
        files = {name: base64.b64encode(content).decode() for name, content in self.files.items()}
        content = {"settings": self.settings, "files": files, "versions": self.versions}
        return json.dumps(content, sort_keys=True, ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Read what another peer sent. :raises ValueError: it is not a manifest."""
        try:
            unpacker = zlib.decompressobj()
            text = unpacker.decompress(data, MAX_DOCUMENT_BYTES)
            if not unpacker.eof:
                raise ValueError(f"it is cut, or larger than {MAX_DOCUMENT_BYTES} bytes")
            document = json.loads(text)
            files = {_safe_name(name): base64.b64decode(text) for name, text in document["files"].items()}
            # A list of pairs would pass for a mapping, were it not for the `**`.
            manifest = cls(settings={**document["settings"]}, files=files, versions={**document["versions"]})
            if "/" in _safe_name(manifest.settings["run_id"]):  # it names a folder, too
                raise ValueError(f"unsafe run id {manifest.settings['run_id']!r}")
            manifest._document()  # JSON can hold half a character, which UTF-8 and file names cannot
        except (zlib.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it is not a run manifest ({type(error).__name__}: {error})") from error
        return manifest

    def unpack(self, cache_dir: Path) -> Path:
        """Write the shared files below `cache_dir` and return their folder. Does nothing if they are there already."""
        folder = cache_dir / "runs" / f"{self.settings['run_id']}-{self.fingerprint}"
        if not folder.exists():
            with replacing_folder(folder, keep_existing=True) as scratch:
                for name, content in self.files.items():
                    (scratch / name).parent.mkdir(parents=True, exist_ok=True)
                    (scratch / name).write_bytes(content)
                (scratch / "manifest.bin").write_bytes(self.to_bytes())
        return folder

    def serve(self, peer: Peer, folder: Path) -> None:
        """Hand this manifest to every peer that asks; `folder` keeps the copy that is served."""
        path = folder / "manifest.bin"
        if not path.exists():
            write_bytes(path, self.to_bytes())
        peer.serve(PROTOCOL, path)

    def refuse_other_versions(self) -> None:
        """Refuse to join with libraries whose numbers may differ from the swarm's."""
        here = Manifest({}, {}).versions
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


def fetch_manifest(peer: Peer, timeout: float = 30.0) -> Manifest:
    """Ask the peers that were named on the command line for the run's manifest, one after the other.

    :param timeout: seconds for each of them until one has answered; after that, for a moment only.
    :raises UserError: nobody has one, or they have different ones.
    """
    found: dict[str, tuple[str, Manifest]] = {}
    failures: list[str] = []
    for peer_id, address in _one_address_each(peer.initial_peers).items():
        try:
            content = peer.fetch(peer_id, PROTOCOL, min(timeout, SECOND_OPINION_SECONDS) if found else timeout)
            manifest = Manifest.from_bytes(content)
            found.setdefault(manifest.fingerprint, (address, manifest))
        except (OSError, ValueError) as error:
            failures.append(f"{address}: {error}")
    if len(found) > 1:
        raise UserError(_different_runs(list(found.values())))
    for address, manifest in found.values():
        for failure in failures:
            logger.warning("No manifest from %s; going by that of %s", failure, address)
        return manifest
    listing = "\n  ".join(failures)
    raise UserError(
        f"The swarm answered, but no peer handed out the run's manifest:\n  {listing}\n"
        f"Use the address that the run's auxiliary peer prints; that peer has to run the same version of the code."
    )


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
    sides = [{**each.settings, **each.files, **each.versions} for each in (one, other)]
    absent = object()
    differing = sorted(
        name for name in sides[0].keys() | sides[1].keys() if sides[0].get(name, absent) != sides[1].get(name, absent)
    )
    return (
        f"The addresses in --initial_peers lead to different runs, which cannot become one:\n  {listing}\n"
        f"They differ in {', '.join(differing)}. Give only addresses of the run that you want to join."
    )


def _safe_name(name: str) -> str:
    """A stranger's file name must stay inside the folder that it is unpacked to."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or set(name) & set("\\:\0"):
        raise KeyError(f"unsafe file name {name!r}")
    return str(path)
