"""A volunteer that does not fit into the run ends at once, and is told what differs: all with real programs."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from arguments import agreed_settings
from collab.manifest import Manifest, versions_here
from collab.peer import Peer
from tests.swarm.conftest import TINY_MODEL, Swarm
from tests.swarm.processes import Program

pytestmark = pytest.mark.swarm


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> Iterator[tuple[Swarm, str]]:
    """One run for all tests here, and its address."""
    swarm = Swarm(tmp_path_factory.mktemp("run"), shared_cache)
    try:
        _, address = swarm.start_auxiliary(swarm.configure())
        yield swarm, address
    finally:
        swarm.end()


@pytest.fixture
def volunteer(run: tuple[Swarm, str], tmp_path: Path) -> Iterator[Swarm]:
    """What a volunteer starts; its files lie in a folder of its own."""
    swarm = Swarm(tmp_path, run[0].cache_dir)
    yield swarm
    swarm.end()


def refusal(program: Program) -> str:
    """The one message of a program that has to end by itself, before it trained anything."""
    assert program.wait() == 1, program.output()
    output = program.output()
    assert output.count("error: ") == 1 and "Traceback" not in output, output
    assert "joins the run" not in output and "Starting from global step" not in output
    return output.rpartition("error: ")[2]


def own_config(folder: Path, run: Swarm, **changes: Any) -> str:
    """The run's YAML file as a volunteer has it, with changes."""
    path = folder / "other.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load((run.folder / "run.yaml").read_text()) | changes))
    return str(path)


def test_a_config_of_another_run_is_refused_with_all_that_differs(run: tuple[Swarm, str], volunteer: Swarm) -> None:
    deeper = volunteer.folder / "deeper.json"
    deeper.write_text(json.dumps(json.loads(TINY_MODEL) | {"num_hidden_layers": 5}))
    config = own_config(volunteer.folder, run[0], model_config=str(deeper), vocab_size=700, tokenizer="bert-base-cased")
    message = refusal(volunteer.start_trainer("other", run[1], "--config", config))
    assert f"model_config = '{deeper}', but this run uses '{run[0].folder / 'model.json'}'" in message
    assert "vocab_size = 700, but this run uses 600" in message
    assert "tokenizer = 'bert-base-cased', but this run uses None" in message
    assert "learning_rate" not in message and "leave out --model_config" in message.replace("\n", " ")


def test_a_model_of_another_depth_under_the_same_path_is_refused(run: tuple[Swarm, str], volunteer: Swarm) -> None:
    """The tensors of an ALBERT have the same shapes whatever its depth: on stock hivemind it would join unnoticed."""
    model = run[0].folder / "model.json"
    original = model.read_text()
    try:
        model.write_text(json.dumps(json.loads(original) | {"num_hidden_layers": 5, "vocab_size": 4}))
        message = refusal(volunteer.start_trainer("deep", run[1], "--config", own_config(volunteer.folder, run[0])))
    finally:
        model.write_text(original)
    assert str(model) in message and "num_hidden_layers = 5, but this run uses 2" in message
    assert "vocab_size" not in message, "that of the tokenizer is taken in any case"
    assert "without --initial_peers" in message


def test_the_runs_own_config_is_welcome(run: tuple[Swarm, str], volunteer: Swarm) -> None:
    trainer = volunteer.start_trainer("same", run[1], "--config", own_config(volunteer.folder, run[0]))
    trainer.wait_for_output("Starting from global step")


@pytest.mark.parametrize("what", ["samiti", "torch"])
def test_another_version_is_refused(volunteer: Swarm, guarded: None, what: str) -> None:
    """The organizer has an older one."""
    here = versions_here()
    with contextlib.closing(Peer(host_maddrs=["/ip4/127.0.0.1/tcp/0"])) as organizer:
        settings = agreed_settings({"run_id": "old"})
        old = Manifest.found(settings, {}, organizer.private_key, versions=here | {what: "0.0.9"})
        old.serve(organizer, old.unpack(volunteer.folder))
        message = refusal(volunteer.start_trainer("modern", organizer.addresses()[0]))
    assert f"{what}: here {here[what]}, in the run 0.0.9" in message and "make setup" in message
    assert message.count(": here ") == 1
