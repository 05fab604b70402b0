"""A damaged file, wherever it comes from, ends in one clear message or is done without; nothing in it is executed."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st
from transformers import AlbertConfig, AlbertForPreTraining

from arguments import EVERYTHING, agreed_settings, pick
from arguments import read_config as read_run
from collab.checkpoint import load_checkpoint, load_weights_into, save_checkpoint
from collab.contributions import Contributions
from collab.errors import UserError
from collab.manifest import read_kept
from collab.monitor import StepSummary
from collab.place import Place
from collab.trackers import read_history
from tasks.mlm.architecture import read_config
from tasks.mlm.encoder import open_encoder
from tests.fuzz.hostile import JSON_VALUES, damaged, guarded
from tests.fuzz.test_strangers import SIGNED, fuzz

MODEL = AlbertConfig(
    vocab_size=100, embedding_size=8, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2
)
RUN = yaml.safe_dump({"run_id": "run", "sources": [{"embedded": True}], "learning_rate": 0.01, "max_global_steps": 9})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = AlbertForPreTraining(MODEL)
    folder = tmp_path_factory.mktemp("checkpoint") / "step-0000012"
    state = {"state": {0: {"step": model.albert.embeddings.position_ids, "none": None}}, "param_groups": [{"lr": 0.1}]}
    save_checkpoint(
        folder,
        save_pretrained=model.save_pretrained,
        optimizer_state=state,
        trainer_state={"run_id": "run", "global_step": 12, "samples": 48_000},
        model_card="# A model\n",
    )
    return folder


NAMES = ["config.json", "model.safetensors", "optimizer.json", "optimizer.safetensors", "trainer_state.json"]


@pytest.mark.parametrize("name", NAMES)
@fuzz(st.data(), most=60)
def test_checkpoints(checkpoint: Path, name: str, data: st.DataObject) -> None:
    file = checkpoint / name
    whole = file.read_bytes()
    model = AlbertForPreTraining(MODEL)
    try:
        file.write_bytes(data.draw(damaged(whole)))
        for read in (load_checkpoint, lambda folder: load_weights_into(model, folder)):
            with guarded(), contextlib.suppress(UserError):
                read(checkpoint)
    finally:
        file.write_bytes(whole)
    assert all(param.isfinite().all() for param in model.parameters()) or name == "model.safetensors"


@fuzz(damaged(RUN.encode()) | JSON_VALUES.map(lambda value: yaml.safe_dump(value).encode()), most=300)
def test_configs_of_runs(content: bytes) -> None:
    file = Path("run.yaml")
    file.write_bytes(content)
    with guarded(), contextlib.suppress(UserError):
        given = read_run(file)
        for cls in EVERYTHING:
            pick(cls, given)
        agreed_settings(given)


@fuzz(damaged(MODEL.to_json_string(use_diff=False).encode()), most=100)
def test_configs_of_models(content: bytes) -> None:
    file = Path("model.json")
    file.write_bytes(content)
    with guarded(), contextlib.suppress(UserError):
        read_config(file)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@fuzz(st.data(), most=40)
def test_tokenizers(tokenizer_folder: Path, name: str, data: st.DataObject) -> None:
    folder = Path("tokenizer")
    if not folder.exists():
        shutil.copytree(tokenizer_folder, folder)
    whole = (tokenizer_folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(damaged(whole)))
    try:
        with guarded(), contextlib.suppress(UserError):
            open_encoder(folder).encode(["What a day."])
    finally:
        (folder / name).write_bytes(whole)


def history(folder: Path) -> None:
    for entry in read_history(folder / "metrics.jsonl"):
        StepSummary.from_metrics(entry)


KEPT: dict[str, tuple[bytes, Callable[[Path], object]]] = {
    "manifest.bin": (SIGNED, lambda folder: read_kept(folder)),
    "contributions.json": (
        b'{"peers": {"Qm": {"name": "a", "samples": 3, "session": 3, "step": 2}}, "step": 2, "unclaimed": 0.5}',
        lambda folder: Contributions(folder / "contributions.json").of_names(),
    ),
    "place.json": (
        b'{"name": "Qm", "state": {"epoch": 1, "source": [3, 4]}}',
        lambda folder: Place(folder, "here").close(),
    ),
    "metrics.jsonl": (
        b'{"step": 1, "time": 1.0, "loss": 9.0, "samples": 5}\n{"step": 2, "time": 2.0, "loss": 8.0, "samples": 5}\n',
        history,
    ),
}


@pytest.mark.parametrize("name", KEPT)
@fuzz(st.data())
def test_what_a_program_has_kept(name: str, data: st.DataObject) -> None:
    """Else it could not be started again until somebody finds out which file to delete."""
    whole, read = KEPT[name]
    folder = Path("kept")
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data.draw(damaged(whole)))
    with guarded(), contextlib.suppress(UserError):
        read(folder)


@pytest.fixture(autouse=True, scope="module")
def _own_folder(tmp_path_factory: pytest.TempPathFactory) -> object:
    with contextlib.chdir(tmp_path_factory.mktemp("fuzz")):
        yield
