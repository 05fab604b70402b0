"""Runs that begin with the weights of an existing model: from a folder, from the Hub, and what is refused."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForPreTraining,
    AutoModelForMaskedLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

from arguments import RunArguments, agreed_settings, parse, pick
from collab.errors import UserError
from tasks.mlm.task import MaskedLM
from tests.hub_server import HubServer, Repo

ALBERT = AlbertConfig(
    vocab_size=2048, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    classifier_dropout_prob=0.0,
)  # fmt: skip
ROBERTA = RobertaConfig(
    vocab_size=2048, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=70, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
)  # fmt: skip


@pytest.fixture
def publish(tmp_path: Path, tokenizer_folder: Path) -> Any:
    """Writes a model with the tokenizer of 2,048 entries, as a stranger would publish it."""

    def publish(model: Any, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / "published"
        shutil.rmtree(folder, ignore_errors=True)
        model.to(dtype).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
        return folder

    return publish


def trained(kind: type[PreTrainedModel], config: Any) -> Any:
    """Weights that no seed of ours gives."""
    torch.manual_seed(77)
    model = kind(config)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.05)
    return model.eval()


def settings_for(start_from: object, **changes: Any) -> dict[str, Any]:
    settings = {"run_id": "on", "start_from": str(start_from), "seq_length": 64, "shuffle_buffer": 100, "seed": 5}
    return agreed_settings(settings | changes)


def unpack(settings: dict[str, Any], folder: Path, cache_dir: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in MaskedLM.prepare(settings, cache_dir).items():
        (folder / name).write_bytes(content)
    return folder


def plain_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    output = model(**inputs)
    logits = output.get("prediction_logits", output.get("logits"))
    loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    order = output.get("sop_logits")
    return loss if order is None else loss + cross_entropy(order, batch["sentence_order_label"])


@pytest.mark.parametrize("kind, config", [(AlbertForPreTraining, ALBERT), (RobertaForMaskedLM, ROBERTA)])
def test_the_first_loss_is_that_of_the_model_that_a_run_starts_from(tmp_path, cache_dir, publish, kind, config):
    model = trained(kind, config)
    settings = settings_for(publish(model), model_config="configs/nothing.json")
    folder = unpack(settings, tmp_path / "run", cache_dir)
    task = MaskedLM(settings, folder, cache_dir)
    assert task.first_weights == "here"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 400_000  # newcomers download all of it
    batches = task.batches(lambda: 4, "here", step=lambda: 0)
    for _ in range(3):
        batch = next(batches)
        torch.testing.assert_close(task.loss(batch), plain_loss(model, batch))
    batches.close()
    ours, theirs = task.model.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert str(tmp_path / "published") in task.description()["Started from"]
    assert task.card_metadata()["base_model"] is None, "a folder has no page on the Hub"


def test_who_lacks_the_weights_knows_it_and_who_has_them_begins_with_equal_ones(tmp_path, cache_dir, publish):
    settings = settings_for(publish(trained(AlbertForMaskedLM, ALBERT)))
    shutil.copytree(cache_dir, tmp_path / "c2")
    folder = unpack(settings, tmp_path / "run", cache_dir)
    assert MaskedLM(settings, folder, tmp_path / "another cache").first_weights == "elsewhere"
    one, two = (MaskedLM(settings, folder, cache_dir).model.state_dict() for _ in range(2))
    again = MaskedLM(settings, unpack(settings, tmp_path / "again", tmp_path / "c2"), tmp_path / "c2")
    assert (tmp_path / "again" / "first_weights.json").read_bytes() == (folder / "first_weights.json").read_bytes()
    for state in (two, again.model.state_dict()):
        assert all(torch.equal(state[name], tensor) for name, tensor in one.items())
    assert MaskedLM(agreed_settings({"run_id": "a", "seed": 5}), folder, tmp_path).first_weights == "elsewhere"


def test_a_head_that_the_model_lacks_comes_from_the_seed_and_is_said(tmp_path, cache_dir, publish, caplog):
    caplog.set_level(logging.INFO)
    source = publish(trained(AlbertForMaskedLM, ALBERT))
    heads: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        settings = settings_for(source, seed=seed)
        folder = unpack(settings, tmp_path / "run", cache_dir)
        task: Any = MaskedLM(settings, folder, cache_dir)
        heads.append(task.model.sop_classifier.classifier.weight)
        assert "albert.pooler, sop_classifier.classifier new" in task.description()["Started from"]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert "has no albert.pooler, sop_classifier.classifier: new weights from the run's seed" in caplog.text


def test_half_precision_becomes_float32_and_the_encoder_alone_is_enough(tmp_path, cache_dir, publish):
    model = trained(RobertaModel, ROBERTA)
    settings = settings_for(publish(model, torch.bfloat16))
    task: Any = MaskedLM(settings, unpack(settings, tmp_path / "run", cache_dir), cache_dir)
    assert {param.dtype for param in task.model.parameters()} == {torch.float32}
    assert "lm_head" in task.description()["Started from"]
    expected = model.get_input_embeddings().weight.bfloat16().float()
    assert torch.equal(task.model.get_input_embeddings().weight, expected)
    task.save_pretrained(tmp_path / "saved")
    assert AutoModelForMaskedLM.from_pretrained(tmp_path / "saved").dtype == torch.float32


def refusal(settings: dict[str, Any], cache_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        MaskedLM.prepare(settings, cache_dir)
    assert not list(cache_dir.glob("first_weights/*"))
    return str(caught.value)


def test_what_is_no_model_or_none_that_is_trained_here_is_refused(tmp_path, cache_dir, publish):
    assert "config.json is missing" in refusal(settings_for(tmp_path / "nowhere"), cache_dir)
    source = publish(GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=8, n_head=2)))
    message = refusal(settings_for(source), cache_dir)
    assert "is a model of type gpt2, which is not trained" in message and "albert, bert" in message


def test_a_pickle_is_not_opened(tmp_path, cache_dir, publish):
    source = publish(trained(AlbertForMaskedLM, ALBERT))
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    message = refusal(settings_for(source), cache_dir)
    assert "has no model.safetensors" in message and "can run any program" in message


@pytest.mark.parametrize("damage", ["bytes", "another size", "another depth", "a part"])
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path, cache_dir, publish, damage):
    source = publish(trained(RobertaForMaskedLM, ROBERTA))
    config = json.loads((source / "config.json").read_text())
    if damage == "bytes":
        (source / "model.safetensors").write_bytes(b"no tensors" * 100)
    elif damage == "another size":
        (source / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    elif damage == "another depth":
        (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    else:
        index = {"metadata": {}, "weight_map": {"lm_head.bias": "model-00001-of-00002.safetensors"}}
        (source / "model.safetensors").rename(source / "model-00002-of-00002.safetensors")
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(settings_for(source), cache_dir)
    assert ("lacks 16 of its own weights" if damage == "another depth" else "cannot be read") in message


@pytest.mark.parametrize("whose", ["its own", "another"])
def test_a_tokenizer_of_another_size_than_the_weights_is_refused(tmp_path, cache_dir, publish, tokenizer_folder, whose):
    bigger = tmp_path / "bigger"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens(["wholly", "unseen"])
    source = publish(trained(AlbertForMaskedLM, ALBERT))
    tokenizer.save_pretrained(source if whose == "its own" else bigger)
    settings = settings_for(source, **({"tokenizer": str(bigger)} if whose == "another" else {}))
    message = refusal(settings, cache_dir)
    assert "a vocabulary of 2,048 entries" in message and "2,050" in message
    assert ("Leave `tokenizer` out" in message) == (whose == "another")


def test_a_length_beyond_the_positions_of_the_model_is_refused(tmp_path, cache_dir, publish):
    source = publish(trained(RobertaForMaskedLM, ROBERTA))
    message = refusal(settings_for(source, seq_length=72), cache_dir)
    assert f"the model in {source} has 70 positions" in message


PREPARE = """
import json, sys
from pathlib import Path
from collab.errors import UserError
from tasks.mlm.task import MaskedLM
settings, cache_dir, folder = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
try:
    for name, content in MaskedLM.prepare(settings, cache_dir).items():
        (folder / name).write_bytes(content)
except UserError as error:
    sys.exit(str(error))
"""


def test_a_model_on_the_hub_is_downloaded_at_its_revision_without_what_is_not_needed(tmp_path, cache_dir, publish):
    model, folder = trained(AlbertForPreTraining, ALBERT), tmp_path / "run"
    files = {path.name: path.read_bytes() for path in publish(model).iterdir()}
    not_needed = {"pytorch_model.bin": b"a pickle", "optimizer.safetensors": b"large", "tf_model.h5": b"large"}
    folder.mkdir()
    with HubServer() as hub:
        commits = [("c" * 40, "one", files | not_needed), ("d" * 40, "two", files | {"config.json": b"{}"})]
        hub.repos["org/model"] = Repo(commits, tags={"v1": "c" * 40})
        del files["model.safetensors"]
        hub.repos["org/old"] = Repo([("e" * 40, "one", files | not_needed)])

        def prepare(start_from: str) -> str:
            """In a process of its own: the Hub's client reads the address of the Hub once."""
            command = [sys.executable, "-c", PREPARE, json.dumps(settings_for(start_from)), cache_dir, folder]
            environment = os.environ | {
                "HF_ENDPOINT": hub.url,
                "HF_HUB_DISABLE_XET": "1",
                "PYTHONPATH": str(Path.cwd()),
            }
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
            assert "Traceback" not in done.stderr, done.stderr
            return done.stderr if done.returncode else ""

        assert prepare("hub:org/model@v1") == ""
        asked = {path.rpartition("/")[2] for path in hub.requests}
        assert "model.safetensors" in asked and not asked & not_needed.keys()
        assert "The model org/old has no model.safetensors" in prepare("org/old")
        assert "There is no folder hub:org/none here" in prepare("hub:org/none")
    task = MaskedLM(settings_for("hub:org/model@v1"), folder, cache_dir)
    assert all(torch.equal(task.model.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert task.description()["Started from"] == "hub:org/model@v1 at cccccccc"
    assert task.card_metadata()["base_model"] == "org/model"


def test_the_option_is_called_from_on_the_command_line():
    given = parse("", (RunArguments,), ["--from", "hub:org/name@v2", "--run_id", "ours"])
    assert pick(RunArguments, given).start_from == "hub:org/name@v2"


def test_a_volunteers_model_config_counts_for_nothing_in_such_a_run(tmp_path, cache_dir, publish):
    folder = unpack(settings_for(publish(trained(AlbertForMaskedLM, ALBERT))), tmp_path / "run", cache_dir)
    MaskedLM.refuse_other_files({"model_config": "tasks/mlm/models/demo.json"}, folder)
