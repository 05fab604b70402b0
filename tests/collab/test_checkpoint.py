"""Checkpoints: what is written comes back exactly, and what does not fit is refused whole."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AlbertConfig, AlbertForPreTraining

from collab.checkpoint import (
    annotate_checkpoint,
    begin_from_checkpoint,
    load_checkpoint,
    load_weights_into,
    save_checkpoint,
)
from collab.errors import UserError


def tiny_albert(**settings) -> AlbertForPreTraining:
    sizes = {"vocab_size": 100, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 32}
    torch.manual_seed(0)
    return AlbertForPreTraining(AlbertConfig(**{**sizes, "num_attention_heads": 2, "num_hidden_layers": 2, **settings}))


def trained(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    output = model(
        torch.randint(0, 100, (2, 8)), labels=torch.randint(0, 100, (2, 8)), sentence_order_label=torch.ones(2).long()
    )
    output.loss.backward()
    optimizer.step()
    return optimizer


def save(folder: Path, model: AlbertForPreTraining | None = None, optimizer_state: dict | None = None) -> Path:
    model = model if model is not None else tiny_albert()
    save_checkpoint(
        folder,
        save_pretrained=model.save_pretrained,
        optimizer_state=optimizer_state or {"state": {}, "param_groups": []},
        trainer_state={"run_id": "assembly", "global_step": 12, "samples": 48_000},
        model_card="# A model\n",
    )
    return folder


def same(left, right) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right or (left != left and right != right)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_continues_the_training_exactly(tmp_path):
    model = tiny_albert()
    optimizer = trained(model)
    save(tmp_path / "c", model, optimizer.state_dict())

    restored = AlbertForPreTraining(model.config)
    load_weights_into(restored, tmp_path / "c")
    checkpoint = load_checkpoint(tmp_path / "c")
    assert same(checkpoint.optimizer_state, optimizer.state_dict())
    assert checkpoint.trainer_state == {"run_id": "assembly", "global_step": 12, "samples": 48_000}
    continued = torch.optim.AdamW(restored.parameters())
    continued.load_state_dict(checkpoint.optimizer_state)
    for one, each in ((model, optimizer), (restored, continued)):
        for parameter in one.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        each.step()
    assert all(map(torch.equal, model.state_dict().values(), restored.state_dict().values()))


def test_it_opens_with_from_pretrained_and_nothing_of_ours(tmp_path):
    model = tiny_albert()
    folder = save(tmp_path / "c", model)
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "model.safetensors", "optimizer.safetensors", "optimizer.json", "trainer_state.json", "README.md"
    }  # fmt: skip
    opened = AlbertForPreTraining.from_pretrained(folder)
    assert torch.equal(opened.predictions.decoder.weight, model.predictions.decoder.weight)


def test_the_tied_decoder_stays_tied_and_is_filled(tmp_path):
    model = tiny_albert()
    torch.nn.init.normal_(model.albert.embeddings.word_embeddings.weight)
    other = tiny_albert()
    load_weights_into(other, save(tmp_path / "c", model))
    assert torch.equal(other.predictions.decoder.weight, model.albert.embeddings.word_embeddings.weight)
    assert other.predictions.decoder.weight is other.albert.embeddings.word_embeddings.weight


def test_every_kind_of_optimizer_state_comes_back(tmp_path):
    shared = torch.arange(6.0)
    state = {
        "state": {
            0: {"step": torch.tensor(3.0), "count": torch.tensor(2**40), "exp_avg": shared, "again": shared},
            10: {"view": shared[2:4], "half": torch.ones(2, dtype=torch.bfloat16), "empty": torch.empty(0)},
            "named": {"mask": torch.tensor([True, False]), "transposed": torch.arange(6).reshape(2, 3).T},
        },
        "param_groups": [
            {"betas": (0.9, 0.1 + 0.2), "lr": 1e-300, "foreach": None, "amsgrad": False, "params": [0, 1]}
        ],
        "odd": [float("inf"), float("nan"), -0.0, 10**30, (), {}, [], "tensor", {"tensor": 1, 2: ()}, "কল"],
    }
    loaded = load_checkpoint(save(tmp_path / "c", optimizer_state=state)).optimizer_state
    assert same(loaded, state)
    assert loaded["state"][0]["exp_avg"] is loaded["state"][0]["again"], "one tensor came back as two"


def test_what_json_cannot_hold_is_our_bug_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match=r"param_groups\.0\.lr is a object"):
        save(tmp_path / "c", optimizer_state={"state": {}, "param_groups": [{"lr": object()}]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"vocab_size": 120}, ["vocab_size 100 instead of 120", "word_embeddings.weight [100, 8] instead of [120, 8]"]),
        ({"num_hidden_layers": 4}, ["num_hidden_layers 2 instead of 4"]),
        ({"num_hidden_groups": 2}, ["missing", "albert_layer_groups.1", "and 13 more"]),
        ({"hidden_act": "relu"}, ["hidden_act 'gelu_new' instead of 'relu'"]),
    ],
)  # fmt: skip
def test_the_checkpoint_of_another_model_is_named_and_nothing_is_loaded(tmp_path, settings, words):
    folder = save(tmp_path / "c", tiny_albert())
    other = tiny_albert(**settings)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError) as refusal:
        load_weights_into(other, folder)
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_another_kind_of_model_and_unexpected_tensors_are_named(tmp_path):
    folder = save(tmp_path / "c", tiny_albert(num_hidden_groups=2))
    with pytest.raises(UserError, match=r"16 unexpected \(albert\.encoder.*and 13 more\)"):
        load_weights_into(tiny_albert(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(UserError, match="model_type 'bert' instead of 'albert'"):
        load_weights_into(tiny_albert(num_hidden_groups=2), folder)


def test_dropout_may_change_between_two_halves_of_a_run(tmp_path):
    load_weights_into(tiny_albert(hidden_dropout_prob=0.0), save(tmp_path / "c", tiny_albert(hidden_dropout_prob=0.1)))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "optimizer.json", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "garbage", "pickle", "empty", "a bit"])
def test_damaged_files_are_told_to_the_person(tmp_path, name, damage):
    model = tiny_albert()
    file = save(tmp_path / "c", model, trained(model).state_dict()) / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "pickle":
        torch.save({"state": Bomb()}, file)
    else:
        half = len(data) // 2
        flipped = data[:half] + bytes([data[half] ^ 0x80]) + data[half + 1 :]
        file.write_bytes({"truncated": data[:half], "garbage": b"\x93" * 1000, "empty": b"", "a bit": flipped}[damage])
    with pytest.raises(UserError) as told:
        load_checkpoint(tmp_path / "c")
        load_weights_into(model, tmp_path / "c")
    assert str(tmp_path / "c") in str(told.value) and "Give" in str(told.value)
    if damage == "missing":
        assert name in str(told.value)
    assert not Bomb.exploded


class Bomb:
    """Unpickling it would be noticed."""

    exploded = False

    def __reduce__(self):
        return setattr, (Bomb, "exploded", True)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"call": "os.system"}', '{"tensor": "nowhere"}', "[]", '{"dict": [[[], 1]]}']
)
def test_a_hostile_structure_is_refused(tmp_path, text):
    (save(tmp_path / "c") / "optimizer.json").write_text(text)
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path / "c")


def test_a_folder_of_something_else_and_a_newer_format(tmp_path):
    with pytest.raises(UserError, match=r"trainer_state\.json is missing"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match="missing"):
        load_weights_into(tiny_albert(), tmp_path / "nowhere")
    (save(tmp_path / "c") / "trainer_state.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="git pull"):
        load_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("limit", [3_000, 20_000])
def test_a_full_disk_leaves_the_good_checkpoint(tmp_path, limit):
    """A limit on the size of a file stands for the full disk: the system refuses the write in the middle either way."""
    model = tiny_albert(vocab_size=2_000)
    folder = save(tmp_path / "c", model, trained(model).state_dict())
    before = files(folder)
    program = f"""
        import resource, signal, torch
        from pathlib import Path
        from collab.checkpoint import save_checkpoint
        from collab.errors import UserError
        from safetensors.torch import save_file
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            save_checkpoint(
                Path({str(folder)!r}),
                save_pretrained=lambda scratch: save_file({{"w": torch.ones(1_000)}}, scratch / "model.safetensors"),
                optimizer_state={{"state": {{0: {{"exp_avg": torch.ones(10_000)}}}}}},
                trainer_state={{}},
                model_card="",
            )
        except UserError as error:
            print(error)
    """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Cannot write" in done.stdout and "File too large" in done.stdout and "Free some space" in done.stdout
    assert files(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_disk_without_space_is_reported_whichever_library_met_it(tmp_path):
    """The two ways in which the Rust libraries beneath save_pretrained word it: safetensors and tokenizers."""
    folder = save(tmp_path / "c")
    before = files(folder)
    for failure in (SafetensorError("I/O error: No space left on device (os error 28)"), Exception("x (os error 28)")):

        def full(scratch, failure=failure):
            raise failure

        with pytest.raises(UserError, match="No space left on device"):
            save_checkpoint(folder, save_pretrained=full, optimizer_state={}, trainer_state={}, model_card="")
    assert files(folder) == before


def test_a_fault_of_ours_in_save_pretrained_keeps_its_own_name(tmp_path):
    def wrong(scratch):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        save_checkpoint(tmp_path / "c", save_pretrained=wrong, optimizer_state={}, trainer_state={}, model_card="")
    assert list(tmp_path.iterdir()) == []


def begin(folder: Path, model: torch.nn.Module, **settings):
    given = {"start_from": str(folder), "from_step_zero": False, "max_global_steps": 100, **settings}
    return begin_from_checkpoint(model, given, folder / "cache")


def test_a_run_goes_on_from_the_checkpoint_of_another_unless_only_its_weights_are_wanted(tmp_path):
    model = tiny_albert()
    folder = save(tmp_path / "c", model, trained(model).state_dict())
    other = tiny_albert(initializer_range=0.1)
    assert begin(folder, other, from_step_zero=True) is None and begin(folder, other, start_from=None) is None
    assert not torch.equal(other.predictions.decoder.weight, model.predictions.decoder.weight)
    resumed = begin(folder, other)
    assert resumed.trainer_state["global_step"] == 12 and resumed.optimizer_state["state"]
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_a_model_without_an_optimizer_is_not_gone_on_from(tmp_path):
    """Also one that transformers' Trainer has written, whose trainer_state.json is another."""
    tiny_albert().save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "trainer_state.json").write_text('{"global_step": 500}')
    assert begin(tmp_path / "plain", tiny_albert()) is None


def test_a_checkpoint_at_the_end_of_the_run_is_refused(tmp_path):
    folder = save(tmp_path / "c")
    with pytest.raises(UserError, match=r"of global step 12, and this run would end after 12\. .*--from_step_zero"):
        begin(folder, tiny_albert(), max_global_steps=12)


def test_what_is_measured_later_is_added_and_the_checkpoint_stays_whole(tmp_path):
    folder = save(tmp_path / "c")
    before = files(folder)
    annotate_checkpoint(folder, {"held_out_loss": 3.5}, "# Better known\n")
    after = files(folder)
    assert load_checkpoint(folder).trainer_state == {
        "run_id": "assembly", "global_step": 12, "samples": 48_000, "held_out_loss": 3.5
    }  # fmt: skip
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"trainer_state.json", "README.md"} and before.keys() == after.keys()
