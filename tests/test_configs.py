"""Every run of configs/ can start: its model is as large as its header says, and its settings pass all checks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from arguments import agreed_settings, read_config
from tasks.mlm.architecture import make_config, make_model, refuse_too_long
from tasks.mlm.architecture import read_config as read_model_config
from tasks.mlm.task import MaskedLM

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if read_config(path)["task"] == "mlm"]
MODELS = sorted((ROOT / "tasks" / "mlm" / "models").glob("*.json"))
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
PUBLISHED = {"base": 12, "large": 18, "xlarge": 60, "xxlarge": 235}  # millions; Lan et al. 2019, table 1


def parameters(model: dict[str, Any], vocab_size: int) -> int:
    """Counted on the meta device, where tensors take no memory."""
    with torch.device("meta"):
        made = make_model(make_config(model | SPECIAL | {"vocab_size": vocab_size}))
    return sum(param.numel() for param in made.parameters())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_model_has_as_many_parameters_as_the_header_says(path):
    settings = agreed_settings(read_config(path))
    model = read_model_config(ROOT / settings["model_config"])
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    documented = re.search(r"\((?:[\w-]+ )?([\d.]+) M parameters", header.replace("\n# ", " "))
    assert documented, "the header does not say how many parameters the model has"
    count = parameters(model, settings["vocab_size"]) / 1e6
    assert float(documented[1]) == pytest.approx(count, abs=0.06)
    for megabytes in re.findall(r"about (\d+) MB each way", header.replace("\n# ", " ")):  # 2P bytes as int8
        assert int(megabytes) == pytest.approx(2 * count, abs=1.5)
    refuse_too_long(settings["seq_length"], model, str(path))


@pytest.mark.parametrize("size, millions", PUBLISHED.items())
def test_the_sizes_of_albert_are_the_published_ones(size, millions):
    """Table 1 counts the encoder and its embeddings, without pooler and heads, and rounds generously."""
    model = json.loads((ROOT / "tasks" / "mlm" / "models" / f"albert_{size}.json").read_text())
    assert parameters(model, 30_000) / 1e6 == pytest.approx(millions, rel=0.06)
    assert model["hidden_dropout_prob"] == model["attention_probs_dropout_prob"] == 0  # version 2


def test_every_model_is_made_by_a_config_or_is_a_size_of_one():
    used = {read_config(path)["model_config"] for path in CONFIGS}
    sizes = {f"tasks/mlm/models/albert_{size}.json" for size in PUBLISHED}
    assert {str(path.relative_to(ROOT)) for path in MODELS} == used | sizes


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_run_of_it_can_be_prepared(path, tmp_path, shared_cache, tokenizer_folder):
    """With a single layer, a small tokenizer and text that needs no network."""
    given = read_config(path)
    model = read_model_config(ROOT / given["model_config"]) | {"num_hidden_layers": 1}
    (tmp_path / "model.json").write_text(json.dumps(model))
    small = {"model_config": str(tmp_path / "model.json"), "tokenizer": str(tokenizer_folder)}
    settings = agreed_settings(given | small | {"sources": [{"embedded": True}], "shuffle_buffer": 10})
    files = MaskedLM.prepare(settings, shared_cache)
    assert json.loads(files["config.json"])["pad_token_id"] == 0
