"""A run that begins with an existing model's weights, which lie on the organizer's computer alone."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AlbertConfig, AlbertForMaskedLM, AutoTokenizer

from tests.swarm.conftest import Swarm

pytestmark = pytest.mark.swarm


@pytest.fixture
def published(tmp_path: Path, tokenizer_folder: Path) -> Path:
    torch.manual_seed(77)
    config = AlbertConfig(
        vocab_size=2048, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = AlbertForMaskedLM(config)
    model.save_pretrained(tmp_path / "published")
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(tmp_path / "published")
    return tmp_path / "published"


def test_trainers_begin_with_the_weights_that_only_the_organizer_has(swarm: Swarm, published: Path) -> None:
    config = swarm.configure(max_global_steps=3, learning_rate=1e-9, min_learning_rate=1e-9)  # weights hardly move
    organizers, swarm.cache_dir = swarm.cache_dir, swarm.new_cache("cache of the volunteers")
    others = shutil.ignore_patterns("first_weights")  # of other tests
    shutil.copytree(organizers, swarm.folder / "cache of the organizer", ignore=others, dirs_exist_ok=True)
    auxiliary, address = swarm.start_auxiliary(
        config, "--from", str(published), "--cache_dir", str(swarm.folder / "cache of the organizer")
    )
    assert "has no albert.pooler, sop_classifier.classifier: new weights from" in auxiliary.output()
    shutil.rmtree(published)
    trainers = [swarm.start_trainer(name, address, "--save_dir", str(swarm.folder / name)) for name in ("one", "two")]
    assert [program.wait() for program in (*trainers, auxiliary)] == [0, 0, 0], trainers[0].output()
    for trainer in trainers:
        assert "Starting from global step 0" in trainer.output(), trainer.output()
    [first] = (swarm.folder / "cache of the organizer" / "first_weights").iterdir()
    assert not (swarm.cache_dir / "first_weights").exists()
    begun = load_file(first / "model.safetensors")
    for ended in ("one", "two", "run/checkpoints/step-0000003"):
        weights = load_file(swarm.folder / ended / "model.safetensors")
        for name, tensor in begun.items():
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-6)
    card = (swarm.folder / "run" / "checkpoints" / "step-0000003" / "README.md").read_text()
    assert "- Started from: " in card and "sop_classifier.classifier new" in card


def test_who_gets_the_weights_from_nobody_does_not_train(swarm: Swarm, published: Path) -> None:
    """The organizer has left before anybody took the weights over; an auxiliary peer without them is still there."""
    config = swarm.configure(max_global_steps=50)
    auxiliary, address = swarm.start_auxiliary(config, "--from", str(published))
    shutil.rmtree(swarm.cache_dir / "first_weights")
    own = ("--run_folder", str(swarm.folder / "second"), "--initial_peers", address)
    second = swarm.start("second", "run_aux_peer.py", *own, "--report_to", "none")
    second.wait_for_output("Others join with")
    auxiliary.interrupt()
    assert auxiliary.wait() == 0
    organizer = address.rpartition("/")[2]
    address = (swarm.folder / "second" / "join.txt").read_text().split("--initial_peers ")[1].split()[0]
    trainer = swarm.start_trainer("trainer", address, "--organizer", organizer)
    assert trainer.wait() == 1, trainer.output()
    assert "error: The run test begins with the weights of an existing model" in trainer.output()
    assert "Traceback" not in trainer.output() and "step 1/" not in trainer.output()
