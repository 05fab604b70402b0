"""Every model that can be trained: its attention, its positions, a run, and a checkpoint that plain pipelines open."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedModel, pipeline

from arguments import agreed_settings
from collab.errors import UserError
from tasks.mlm.architecture import (
    AFTER_PADDING,
    WITH_ORDER,
    WITHOUT_ORDER,
    make_config,
    make_model,
    read_config,
    refuse_too_long,
)
from tasks.mlm.task import MaskedLM

SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 42, "pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16, "classifier_dropout_prob": 0.0},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "deberta-v2": {
        "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    },
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0},
    "modernbert": {
        "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 6,
        "attention_dropout": 0.0,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
}  # fmt: skip
PLAIN_ATTENTION = {"deberta", "deberta-v2", "megatron-bert", "rembert", "roformer"}  # transformers has no SDPA for them
ALL = sorted(WITH_ORDER | WITHOUT_ORDER)


def config_of(model_type: str) -> dict[str, Any]:
    return {"model_type": model_type, **SMALL, **MORE.get(model_type, {})}


def loss_and_gradients(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """On rows of 30, 9 and 17 tokens: with a window of 6, the last positions of the second see padding alone."""
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 99, (3, 30), generator=drawn)
    attention = (torch.arange(30) < torch.tensor([[30], [9], [17]])).long()
    chosen = (torch.rand(ids.shape, generator=drawn) < 0.3) & (attention == 1)
    output = model(input_ids=torch.where(attention == 1, ids, 0), attention_mask=attention)
    logits = output.get("prediction_logits", output.get("logits"))
    loss = cross_entropy(logits[chosen], ids.flip(1)[chosen])
    order = output.get("sop_logits", output.get("seq_relationship_logits"))
    if order is not None:
        loss = loss + cross_entropy(order, torch.tensor([0, 1, 1]))
    loss.backward()
    return loss, {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("model_type", ALL)
def test_attention_is_sdpa_where_transformers_has_it_and_equals_the_plain_one(model_type):
    config = config_of(model_type)
    torch.manual_seed(0)
    ours = make_model(make_config(config))
    if model_type in PLAIN_ATTENTION:
        assert ours.config._attn_implementation == "eager"
        return
    assert ours.config._attn_implementation == "sdpa"
    plain = make_model(make_config(config))
    plain.load_state_dict(ours.state_dict())
    plain.set_attn_implementation("eager")
    assert plain.config._attn_implementation == "eager"
    (loss, gradients), (expected, expected_gradients) = loss_and_gradients(ours), loss_and_gradients(plain)
    torch.testing.assert_close(loss, expected)
    assert gradients.keys() == expected_gradients.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ALL)
def test_the_first_position_that_a_model_uses_is_known(model_type):
    model = make_model(make_config(config_of(model_type)))
    positions = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    numbered_after_padding = any(getattr(module, "padding_idx", None) is not None for module in positions)
    roformer = model_type == "roformer"  # its table of sines counts from 0 whatever its padding_idx says
    assert (model_type in AFTER_PADDING) == (numbered_after_padding and not roformer)


@pytest.mark.parametrize("model_type, positions", [("roberta", 33), ("bert", 32)])
def test_a_length_that_just_fits_is_trained_and_one_more_refused(model_type, positions):
    config = config_of(model_type) | {"max_position_embeddings": positions}
    refuse_too_long(32, config, "a.json")
    model = make_model(make_config(config))
    assert model(input_ids=torch.full((1, 32), 7)).logits.shape[1] == 32 if model_type == "roberta" else True
    with pytest.raises(UserError, match="Lower seq_length to 24 or raise max_position_embeddings to") as refusal:
        refuse_too_long(32, config | {"max_position_embeddings": positions - 1}, "a.json")
    assert f"a.json has {positions - 1} positions" in str(refusal.value)
    if model_type == "roberta":
        with pytest.raises(UserError, match="34 positions, 3 of which it cannot use with this tokenizer"):
            refuse_too_long(32, config | {"max_position_embeddings": 34}, "a.json", pad_id=2)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 33), 7))


@pytest.mark.parametrize("model_type", ["electra", "gpt2", "bart", "t5", "layoutlm"])
def test_models_that_are_no_masked_lms_are_refused_with_those_that_are(tmp_path, model_type):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=f"is a model of type {model_type}, which is not trained") as refusal:
        read_config(path)
    assert all(known in str(refusal.value) for known in ALL)


def test_a_decoder_of_a_known_type_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of("bert") | {"is_decoder": True}))
    with pytest.raises(UserError, match="is a bert decoder"):
        read_config(path)


@pytest.mark.parametrize("key, wrong", [("hidden_size", "wide"), ("layer_types", 3)])
def test_a_config_with_a_wrong_type_is_named(tmp_path, key, wrong):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_of("modernbert") | {key: wrong}))
    with pytest.raises(UserError, match=f"config.json is no config of a model of type modernbert: .*{key}"):
        read_config(path)


def settings_of(tmp_path: Path, model_type: str, **changes: Any) -> dict[str, Any]:
    config = config_of(model_type)
    for name in [name for name in config if name.endswith("_token_id")] + ["vocab_size"]:
        del config[name]  # as a person would write it; transformers' defaults are those of other tokenizers
    (tmp_path / "model.json").write_text(json.dumps(config))
    return agreed_settings(
        {"run_id": "try", "model_config": str(tmp_path / "model.json"), "seq_length": 32, "shuffle_buffer": 100}
        | changes
    )


@pytest.fixture(scope="module")
def roberta_tokenizer(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """One whose special ids are not those of our own: padding last, and another word for the mask."""
    folder = tmp_path_factory.mktemp("tokenizer") / "other"
    shutil.copytree(tokenizer_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<nothing>", "mask_token": "<mask>"})
    tokenizer.save_pretrained(folder)
    return folder


def build(settings: dict[str, Any], folder: Path, cache_dir: Path) -> Any:
    folder.mkdir()
    for name, content in MaskedLM.prepare(settings, cache_dir).items():
        (folder / name).write_bytes(content)
    return MaskedLM(settings, folder, cache_dir)


@pytest.mark.parametrize("model_type", ALL)
def test_a_run_trains_it_and_a_plain_pipeline_opens_its_checkpoint(tmp_path, cache_dir, tokenizer_folder, model_type):
    task = build(settings_of(tmp_path, model_type, tokenizer=str(tokenizer_folder)), tmp_path / "run", cache_dir)
    assert task.model.config.pad_token_id == task.tokenizer.pad_token_id == 0
    batches = task.batches(lambda: 4, "here", step=lambda: 0)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=0.01)
    losses = []
    for _ in range(12):
        batch = next(batches)
        assert bool((batch["sentence_order_label"] >= 0).any()) == (model_type in WITH_ORDER)
        loss = task.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    batches.close()
    assert sum(losses[-3:]) < sum(losses[:3])
    assert task.loss(task.trial_batch(2)).isfinite()
    assert ("order" in task.description()["Objective"]) == (model_type in WITH_ORDER)

    task.save_pretrained(tmp_path / "saved")
    fill: Any = pipeline("fill-mask", str(tmp_path / "saved"))
    assert len(fill(f"The value of {fill.tokenizer.mask_token} is a number.")) == 5
    assert ("token_type_ids" in fill.tokenizer("one")) <= (getattr(task.model.config, "type_vocab_size", 0) > 1)
    assert set(fill.tokenizer(["one", "one and two and three"], padding=True)["attention_mask"][0]) == {0, 1}


@pytest.mark.parametrize("model_type", ["roberta", "modernbert"])
def test_special_ids_are_those_of_the_tokenizer_whatever_the_config_says(
    tmp_path, cache_dir, roberta_tokenizer, model_type
):
    settings = settings_of(tmp_path, model_type, tokenizer=str(roberta_tokenizer))
    if model_type == "roberta":
        with pytest.raises(UserError, match="positions, 2049 of which it cannot use with this tokenizer"):
            MaskedLM.prepare(settings, cache_dir)
        config = json.loads((tmp_path / "model.json").read_text())
        (tmp_path / "model.json").write_text(json.dumps(config | {"max_position_embeddings": 32 + 2049}))
    task = build(settings, tmp_path / "run", cache_dir)
    config = task.model.config
    assert config.pad_token_id == task.tokenizer.pad_token_id == 2048
    assert (config.bos_token_id, config.eos_token_id) == (task.tokenizer.bos_token_id, task.tokenizer.eos_token_id)
    assert task.model.get_input_embeddings().padding_idx == 2048
    assert "<mask>" in task.usage(".")
    task.model.eval()
    task.save_pretrained(tmp_path / "saved")
    fill: Any = pipeline("fill-mask", str(tmp_path / "saved"))
    texts = ["The <mask> is here.", "A much longer sentence, in which this <mask> stands between many other words."]
    alone, together = [fill(text) for text in texts], fill(texts, batch_size=2)
    for one, other in zip(alone, together, strict=True):  # padding changes no prediction
        assert [guess["score"] for guess in one] == pytest.approx([guess["score"] for guess in other], rel=1e-4)
