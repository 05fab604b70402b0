"""The run manifest: what arrives is what was sent, and what a stranger sends instead is refused whole."""

import base64
import json
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hivemind.averaging.averager import compute_schema_hash
from hivemind.utils.crypto import RSAPrivateKey
from transformers import AlbertConfig, AlbertForPreTraining

import collab.manifest
from collab.errors import UserError
from collab.manifest import Manifest, read_kept, versions_here
from collab.peer import peer_id_of_public_key

SETTINGS = {"run_id": "ours", "seed": 0, "learning_rate": 0.00176, "tokenizer": None, "sources": [{"embedded": True}]}
FILES = {"config.json": b"{}", "spiece.model": bytes(range(256)), "sub/নাম.txt": "নদী".encode()}


ORGANIZER, STRANGER = RSAPrivateKey(), RSAPrivateKey()
ORGANIZER_ID = peer_id_of_public_key(ORGANIZER.get_public_key().to_bytes())


ED25519 = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def manifest(**changes) -> Manifest:
    versions = {"samiti": "1", "torch": "2"}
    return Manifest.found(**{"settings": SETTINGS, "files": FILES, "key": ORGANIZER, "versions": versions, **changes})


def document(signer: RSAPrivateKey = ORGANIZER, **changes) -> bytes:
    """A document as it travels, made and signed by somebody who does not use our code."""
    files = {name: base64.b64encode(content).decode() for name, content in FILES.items()}
    content = {"format": 1, "organizer": ORGANIZER_ID, "settings": SETTINGS, "files": files}
    content |= {"versions": {"samiti": "1"}, "changes": [], **changes}
    return sealed(json.dumps({key: value for key, value in content.items() if value is not None}), signer)


def sealed(text: str, signer: RSAPrivateKey = ORGANIZER) -> bytes:
    signature = signer.sign(text.encode()).decode()
    return zipped(
        json.dumps({"document": text, "key": signer.get_public_key().to_bytes().decode(), "signature": signature})
    )


def zipped(text: str | bytes) -> bytes:
    return zlib.compress(text.encode() if isinstance(text, str) else text)


def altered(data: bytes, **changes) -> bytes:
    """An envelope in which a stranger has changed something."""
    return zipped(json.dumps(json.loads(zlib.decompress(data)) | changes))


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- our own -----------------------------------------------------------------------------------------------------


def test_what_arrives_is_what_was_sent():
    sent = manifest()
    arrived = Manifest.from_bytes(sent.signed)
    assert arrived == sent and arrived.fingerprint == sent.fingerprint and arrived.signed == sent.signed
    assert arrived.organizer == ORGANIZER_ID


def test_a_document_of_another_program_can_be_read():
    assert Manifest.from_bytes(document()) == manifest(versions={"samiti": "1"})


def test_versions_are_those_of_what_decides_about_numbers():
    versions = versions_here()
    assert {"samiti", "hivemind", "torch", "transformers", "tokenizers"} <= versions.keys()
    assert "+" not in versions["torch"], "a build for another GPU is the same version"


def test_the_fingerprint_depends_on_everything():
    fingerprints = {
        each.fingerprint
        for each in (
            manifest(),
            manifest(settings=SETTINGS | {"seed": 1}),
            manifest(settings=SETTINGS | {"more": 1}),
            manifest(settings=SETTINGS | {"sources": [{"embedded": True, "weight": 2}]}),
            manifest(files=FILES | {"config.json": b"{ }"}),
            manifest(files=FILES | {"more": b""}),
            manifest(files={name.replace("config", "other"): content for name, content in FILES.items()}),
            manifest(versions={"samiti": "1", "torch": "3"}),
        )
    }
    assert len(fingerprints) == 8


def test_the_fingerprint_does_not_depend_on_order():
    settings, files = (dict(reversed(mapping.items())) for mapping in (SETTINGS, FILES))
    assert manifest(settings=settings, files=files).fingerprint == manifest().fingerprint


def test_another_depth_is_another_swarm_although_no_tensor_tells():
    """Upstream compares the shapes of tensors; an ALBERT's layers share theirs, so it would join unnoticed."""
    sizes: dict[str, Any] = dict(
        vocab_size=50, embedding_size=8, hidden_size=16, intermediate_size=32, num_attention_heads=2
    )
    configs = [AlbertConfig(**sizes, num_hidden_layers=layers) for layers in (2, 5)]
    stock = {compute_schema_hash(list(AlbertForPreTraining(config).parameters())) for config in configs}
    ours = {manifest(files={"config.json": config.to_json_string().encode()}).swarm_id for config in configs}
    assert len(stock) == 1 and len(ours) == 2


# ---- a stranger's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET / HTTP/1.1", id="not zlib"),
        pytest.param(manifest().signed[:-40], id="cut"),
        pytest.param(zipped(b"\xff\xfe\x00"), id="not UTF-8"),
        pytest.param(zipped("not JSON"), id="not JSON"),
        pytest.param(zipped("[" * 200_000), id="nested without end"),
        pytest.param(zipped("[]"), id="a list"),
        pytest.param(zipped("null"), id="null"),
        pytest.param(sealed("not JSON"), id="the document is not JSON"),
        pytest.param(sealed("[" * 200_000), id="the document is nested without end"),
        pytest.param(sealed("[]"), id="the document is a list"),
        pytest.param(altered(document(), key="ssh-rsa AAAA"), id="no key"),
        pytest.param(altered(document(), key=ED25519), id="a key of another kind"),
        pytest.param(altered(document(), key=7), id="the key is a number"),
        pytest.param(altered(document(), signature="নদী"), id="the signature is not base64"),
        pytest.param(document(changes=[7]), id="a change is a number"),
        pytest.param(document(changes=[{"from_step": "7", "settings": {}}]), id="a change at no global step"),
        pytest.param(document(changes=[{"from_step": 0, "settings": {}}]), id="a change before the first step"),
        pytest.param(document(changes=[{"from_step": 7, "settings": {"x": 1}}]), id="a change of no setting"),
        pytest.param(
            document(changes=[{"from_step": step, "settings": {"seed": 1}} for step in (9, 7)]), id="not in order"
        ),
        pytest.param(document(format=99), id="of a newer version"),
        pytest.param(document(settings=None), id="without settings"),
        pytest.param(document(files=None), id="without files"),
        pytest.param(document(versions=None), id="without versions"),
        pytest.param(document(settings={}), id="settings without a run id"),
        pytest.param(document(settings=7), id="settings are a number"),
        pytest.param(document(settings=[["run_id", "ours"]]), id="settings are pairs"),
        pytest.param(document(settings=SETTINGS | {"run_id": 7}), id="the run id is a number"),
        pytest.param(document(settings=SETTINGS | {"x": "\ud800"}), id="half a character"),
        pytest.param(document(versions="1"), id="versions are text"),
        pytest.param(document(versions=[["samiti", "1"]]), id="versions are pairs"),
        pytest.param(document(files=["config.json"]), id="files are a list"),
        pytest.param(document(files={"config.json": 7}), id="content is a number"),
        pytest.param(document(files={"config.json": None}), id="content is null"),
        pytest.param(document(files={"config.json": "a"}), id="content is not base64"),
        pytest.param(document(files={"config.json": "নদী"}), id="content is not ASCII"),
    ],
)
def test_what_is_no_manifest_is_a_value_error(data):
    with pytest.raises(ValueError):
        Manifest.from_bytes(data)


@pytest.mark.parametrize(
    "name",
    [
        *("../up", "a/../../up", "..", "/etc/passwd", "//host/share", "", ".", "a\0b"),
        *("..\\up", "a\\..\\..\\up", "C:\\up", "C:up", "C:/up", "\\\\host\\share", "file:stream"),
    ],
)
def test_a_file_name_that_leaves_its_folder_is_refused(name):
    with pytest.raises(ValueError):
        Manifest.from_bytes(document(files={name: ""}))


@pytest.mark.parametrize("run_id", ["../../up", "/up", "a/b", "..", "", "a\\b", "C:up"])
def test_a_run_id_that_leaves_its_folder_is_refused(run_id):
    """It becomes a part of the folder's name."""
    with pytest.raises(ValueError):
        Manifest.from_bytes(document(settings=SETTINGS | {"run_id": run_id}))


def test_a_small_answer_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(collab.manifest, "MAX_DOCUMENT_BYTES", 10**6)
    good = zlib.decompress(document())
    Manifest.from_bytes(zlib.compress(good + b" " * 10**5))
    bomb = zlib.compress(good + b" " * 200 * 10**6)
    assert len(bomb) < 250_000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            Manifest.from_bytes(bomb)
        assert tracemalloc.get_traced_memory()[1] < 10 * 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(
            altered(
                document(),
                document=json.loads(zlib.decompress(document()))["document"].replace('"seed": 0', '"seed": 1'),
            ),
            "altered",
            id="a setting is another",
        ),
        pytest.param(altered(document(), signature=STRANGER.sign(b"").decode()), "altered", id="another signature"),
        pytest.param(document(signer=STRANGER), "another key", id="somebody else has signed it"),
        pytest.param(document(format=99), "newer version", id="a newer version has made it"),
    ],
)
def test_a_forged_manifest_is_refused_with_the_reason(data, reason):
    with pytest.raises(ValueError, match=reason):
        Manifest.from_bytes(data)


# ---- changes of a run that goes on -------------------------------------------------------------------------------


def test_a_change_counts_from_its_global_step_on():
    later = manifest().changed(10, {"learning_rate": 0.1}, ORGANIZER).changed(20, {"seed": 5}, ORGANIZER)
    arrived = Manifest.from_bytes(later.signed)
    assert arrived == later and arrived.version == 3
    assert [arrived.settings_at(step)["learning_rate"] for step in (0, 9, 10, 30)] == [0.00176, 0.00176, 0.1, 0.1]
    assert arrived.settings_at(19)["seed"] == 0 and arrived.settings_at(20) == arrived.latest
    assert arrived.latest == SETTINGS | {"learning_rate": 0.1, "seed": 5}


def test_a_changed_run_is_the_same_swarm():
    first = manifest()
    second = first.changed(10, {"seed": 5}, ORGANIZER)
    assert second.swarm_id == first.swarm_id and second.signed != first.signed
    assert second.continues(first) and first.continues(first) and not first.continues(second)
    assert not manifest().changed(11, {"seed": 5}, ORGANIZER).continues(second), "history does not change"
    assert not second.continues(manifest(settings=SETTINGS | {"seed": 1}))


def test_only_the_organizer_changes_a_run_and_only_forward():
    first = manifest().changed(10, {"seed": 5}, ORGANIZER)
    with pytest.raises(ValueError, match="organizer"):
        first.changed(20, {"seed": 6}, STRANGER)
    with pytest.raises(ValueError, match="order"):
        first.changed(9, {"seed": 6}, ORGANIZER)


# ---- on disk -----------------------------------------------------------------------------------------------------


def test_unpacking_writes_the_files_and_the_document(tmp_path):
    folder = manifest().unpack(tmp_path)
    written = all_files(folder)
    assert Manifest.from_bytes(written.pop("manifest.bin")) == manifest()
    assert written == FILES
    assert folder.name.startswith("ours-") and list(folder.parent.iterdir()) == [folder]


def test_unpacking_again_changes_nothing(tmp_path):
    folder = manifest().unpack(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert manifest().unpack(tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_newer_version_takes_the_place_of_the_kept_one(tmp_path):
    folder = manifest().unpack(tmp_path)
    newer = manifest().changed(10, {"seed": 5}, ORGANIZER)
    assert newer.unpack(tmp_path) == folder and read_kept(folder) == newer
    (folder / "manifest.bin").write_bytes(b"half of it")
    assert read_kept(folder) is None and newer.unpack(tmp_path) == folder and read_kept(folder) == newer


@pytest.mark.parametrize("damaged", [b"half", None])
def test_a_damaged_file_is_unpacked_again(tmp_path, damaged):
    folder = manifest().unpack(tmp_path)
    for name in FILES:
        (folder / name).unlink() if damaged is None else (folder / name).write_bytes(damaged)
    assert manifest().unpack(tmp_path) == folder
    assert {name: content for name, content in all_files(folder).items() if name in FILES} == FILES


def test_another_manifest_of_the_same_name_has_a_folder_of_its_own(tmp_path):
    first = manifest().unpack(tmp_path)
    second = manifest(files={"config.json": b"[]"}).unpack(tmp_path)
    assert first != second and (first / "config.json").read_bytes() == b"{}"


def test_a_disk_that_fills_up_leaves_no_half_folder(tmp_path, monkeypatch):
    write = Path.write_bytes
    written: list[Path] = []

    def write_two(path, content):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_two)
    with pytest.raises(UserError, match="No space left"):
        manifest().unpack(tmp_path)
    assert len(written) == 2 and all_files(tmp_path) == {} and list((tmp_path / "runs").iterdir()) == []


# ---- versions ----------------------------------------------------------------------------------------------------


def test_the_same_versions_are_welcome():
    manifest(versions=None).refuse_other_versions()


def test_other_versions_are_refused_by_name():
    here = versions_here()
    with pytest.raises(UserError) as caught:
        manifest(versions=here | {"torch": "1.0.0", "samiti": "99"}).refuse_other_versions()
    message = str(caught.value)
    assert f"torch: here {here['torch']}, in the run 1.0.0" in message
    assert f"samiti: here {here['samiti']}, in the run 99" in message
    assert "hivemind" not in message
