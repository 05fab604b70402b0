"""What checkpoints are measured on: text that nobody trains on, the same masks each time, the field's own numbers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from arguments import agreed_settings
from collab.errors import UserError
from tasks.mlm.corpus import is_heldout
from tasks.mlm.heldout import held_out_batches
from tasks.mlm.task import MaskedLM

MODELS: dict[str, dict[str, Any]] = {
    "albert": {"model_type": "albert", "architectures": ["AlbertForPreTraining"], "embedding_size": 16},
    "roberta": {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "pad_token_id": 0},
}
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 40, "hidden_dropout_prob": 0.3, "vocab_size": 2048,
}  # fmt: skip
DOCUMENTS = [
    f"Document {number} tells of {number % 7} elephants. They walk to the river slowly." for number in range(900)
]


def task_of(kind: str, tmp_path: Path, tokenizer_folder: Path, documents: list[str] = DOCUMENTS) -> MaskedLM:
    folder = tmp_path / "run"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "config.json").write_text(json.dumps(MODELS[kind] | SIZES))
    text = tmp_path / "corpus.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    given = {"run_id": "held", "sources": [{"files": str(text)}], "seq_length": 32, "shuffle_buffer": 10}
    return MaskedLM(agreed_settings(given), folder, tmp_path / "cache")


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_accuracy_are_those_of_transformers_without_dropout(
    kind: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    task = task_of(kind, tmp_path, tokenizer_folder)
    task.model.train()
    measured = task.evaluate(4)
    assert task.model.training
    assert task.evaluate(4) == measured, "other masks, or dropout"

    batches = held_out_batches(task.settings, task.encoder, task.cache_dir, most=4, parted=kind == "albert")
    task.model.eval()
    logits, labels = [], []
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
        with torch.no_grad():
            output = task.model(**inputs)
        chosen = batch["labels"] >= 0
        logits.append(output.get("prediction_logits", output.get("logits"))[chosen])
        labels.append(batch["labels"][chosen])
    expected = cross_entropy(torch.cat(logits), torch.cat(labels))
    assert measured["held_out_loss"] == pytest.approx(float(expected), rel=1e-5)
    right = (torch.cat(logits).argmax(1) == torch.cat(labels)).float().mean()
    assert measured["held_out_accuracy"] == pytest.approx(float(right))


def test_it_follows_the_weights_and_holds_only_what_nobody_trains_on(tmp_path: Path, tokenizer_folder: Path) -> None:
    task = task_of("albert", tmp_path, tokenizer_folder)
    before = task.evaluate(1)["held_out_loss"]
    with torch.no_grad():
        for param in task.model.parameters():
            param.mul_(3)
    assert task.evaluate(1)["held_out_loss"] != pytest.approx(before, rel=1e-3)
    [batch] = held_out_batches(task.settings, task.encoder, task.cache_dir, most=100, parted=True)
    ids = torch.where(batch["labels"] >= 0, batch["labels"], batch["input_ids"])
    read = "".join(task.tokenizer.batch_decode(ids)).replace(" ", "").lower()
    numbers = {number for number in range(900) if f"document{number}tells" in read}
    assert numbers and all(is_heldout(DOCUMENTS[number]) for number in numbers)


def test_the_cost_is_bounded_and_no_held_out_text_is_no_figure(tmp_path: Path, tokenizer_folder: Path) -> None:
    task = task_of("albert", tmp_path, tokenizer_folder, DOCUMENTS * 40)
    for most in (1, 3):
        assert len(held_out_batches(task.settings, task.encoder, task.cache_dir, most=most, parted=True)) == most
    shutil.rmtree(tmp_path / "run")
    kept = [document for document in DOCUMENTS if not is_heldout(document)]
    assert task_of("albert", tmp_path, tokenizer_folder, kept).evaluate(2) == {}


def test_text_that_is_gone_is_told(tmp_path: Path, tokenizer_folder: Path) -> None:
    task = task_of("albert", tmp_path, tokenizer_folder)
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(UserError):
        task.evaluate(1)
