"""The task as a whole: a volunteer's own files against the run's, and what the model card says of the text."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from collab.errors import UserError
from tasks.mlm.task import MaskedLM

MODEL: dict[str, Any] = {"model_type": "albert", "hidden_size": 32, "num_hidden_layers": 2}


@pytest.fixture
def run(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """The run's files, as they are unpacked on a volunteer's computer."""
    folder = tmp_path / "run"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "config.json").write_text(json.dumps(MODEL | {"vocab_size": 2048}, sort_keys=True))
    return folder


def refusal(given: dict[str, Any], run: Path) -> str:
    with pytest.raises(UserError) as caught:
        MaskedLM.refuse_other_files(given, run)
    assert "without --initial_peers" in str(caught.value)
    return str(caught.value)


def test_what_the_volunteer_did_not_give_is_not_compared(run: Path) -> None:
    MaskedLM.refuse_other_files({}, run)
    MaskedLM.refuse_other_files({"model_config": "nowhere.json", "tokenizer": "org/name-on-the-hub"}, run)


def test_the_same_content_is_welcome(run: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(MODEL | {"vocab_size": 99}, indent=4))  # the tokenizer decides about the vocabulary
    MaskedLM.refuse_other_files({"model_config": str(mine), "tokenizer": str(tokenizer_folder)}, run)


def test_all_that_differs_in_the_model_is_named(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"model_type": "albert", "hidden_size": 64, "num_hidden_layers": 2, "dropout": 0.5}))
    message = refusal({"model_config": str(mine)}, run)
    assert str(mine) in message and "hidden_size = 64, but this run uses 32" in message
    assert "dropout = 0.5, but this run uses None" in message
    assert "num_hidden_layers" not in message and "vocab_size" not in message


@pytest.mark.parametrize("change", ["an entry", "a rule"])
def test_a_tokenizer_that_differs_in_a_detail_is_refused(run: Path, tmp_path: Path, change: str) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(run, mine)
    rules = json.loads((mine / "tokenizer.json").read_text())
    if change == "an entry":
        rules["model"]["vocab"][-1][0] = "another"
    else:
        rules["normalizer"] = None
    (mine / "tokenizer.json").write_text(json.dumps(rules))
    message = refusal({"tokenizer": str(mine)}, run)
    assert str(mine) in message and message.count("2,048 entries and fingerprint") == 2


def test_the_card_names_the_sources_with_their_shares_and_links_those_on_the_hub(run: Path, tmp_path: Path) -> None:
    small = MODEL | {"vocab_size": 2048, "num_attention_heads": 2, "intermediate_size": 64, "embedding_size": 16}
    (run / "config.json").write_text(json.dumps(small))
    wikipedia = {"hub": "wikimedia/wikipedia", "config": "20231101.bn", "weight": 0.5}
    sources = [wikipedia, {"files": "news/*.txt", "weight": 1.5}, wikipedia | {"config": "20231101.as", "weight": 0.5}]
    task = MaskedLM({"seed": 0, "sources": sources}, run, tmp_path)
    assert task.card_metadata()["datasets"] == ["wikimedia/wikipedia"]
    data = task.description()["Data"]
    assert data.startswith("20 % wikimedia/wikipedia on the Hub") and "60 % the files news/*.txt" in data
    task.settings = {"sources": [{"embedded": True, "weight": 3}]}
    assert task.description()["Data"] == "the embedded corpus" and not task.card_metadata()["datasets"]
