"""The image classification task: its data, its stream, and what it writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from transformers import AutoModelForImageClassification

from arguments import agreed_settings, read_config
from collab.errors import UserError
from tasks import find_task
from tasks.image_classification.images import as_input, open_images
from tasks.image_classification.task import ImageClassification

SETTINGS = agreed_settings(read_config(Path("configs/quickstart.yaml")))


def made(folder: Path, settings: dict[str, Any] = SETTINGS) -> ImageClassification:
    for name, content in ImageClassification.prepare(settings, folder).items():
        (folder / name).write_bytes(content)
    return ImageClassification(settings, folder, folder)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ImageClassification:
    return made(tmp_path_factory.mktemp("run"))


def test_every_peer_starts_from_the_same_weights(task, tmp_path) -> None:
    other = made(tmp_path).model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in task.model.state_dict().items())
    assert find_task("image_classification") is ImageClassification


def test_training_on_it_learns_to_read(tmp_path) -> None:
    learner = made(tmp_path)
    batches = learner.batches(lambda: 64, "here", step=lambda: 0)
    optimizer = torch.optim.AdamW(learner.model.parameters(), lr=0.003)
    before = learner.evaluate(8)
    for _ in range(100):
        optimizer.zero_grad()
        learner.loss(next(batches)).backward()
        optimizer.step()
    after = learner.evaluate(8)
    assert before["held_out_accuracy"] < 0.3 < 0.75 < after["held_out_accuracy"]
    assert after["held_out_loss"] < before["held_out_loss"] and learner.model.training
    assert learner.evaluate(8, stop=lambda: True) == {}


def test_places_see_all_pictures_in_orders_of_their_own_and_go_on_where_they_were(task) -> None:
    def labels(stream: Any, number: int) -> list[int]:
        return [label for _ in range(number) for label in next(stream)["labels"].tolist()]

    one, two = (task.batches(lambda: 100, place, step=lambda: 0) for place in ("one", "two"))
    first, other = labels(one, 15), labels(two, 15)
    assert first != other and sorted(first) == sorted(other), "each has seen all 1,500"
    state = json.loads(json.dumps(one.state_dict()))
    again = task.batches(lambda: 100, "one", step=lambda: 0, state=state)
    following = labels(one, 20)
    assert following[:1500] != first and labels(again, 20) == following


def test_held_out_pictures_are_none_that_are_trained_on(tmp_path) -> None:
    parts = [open_images("digits", part, tmp_path) for part in ("train", "heldout")]
    assert [len(part) for part in parts] == [1500, 297]
    trained, held = ({picture.numpy().tobytes() for picture in part.take(range(len(part)))[0]} for part in parts)
    assert not trained & held


def test_pictures_are_stretched_and_scaled(task) -> None:
    grey = torch.tensor([[[[0, 255]]]], dtype=torch.uint8).expand(1, 1, 2, 2)
    seen = as_input(grey, channels=3, size=32)
    assert seen.shape == (1, 3, 32, 32) and seen.min() == -1 and seen.max() == 1
    batch, trial = next(task.batches(lambda: 2, "here", step=lambda: 0)), task.trial_batch(2)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        key: (value.shape, value.dtype) for key, value in trial.items()
    }


def save_pictures(folder: Path, **splits: int) -> Path:
    """A data set of `datasets` as on the Hub: red is one class, blue the other one."""
    features = Features({"img": Image(), "label": ClassLabel(names=["red", "blue"]), "source": Value("string")})

    def rows(number: int) -> dict[str, list[Any]]:
        pictures = [np.zeros((32, 32, 3), dtype=np.uint8) for _ in range(number)]
        for index, picture in enumerate(pictures):
            picture[:, :, 2 * (index % 2)] = 255
        return {"img": pictures, "label": [index % 2 for index in range(number)], "source": [""] * number}

    made = DatasetDict({split: Dataset.from_dict(rows(number), features) for split, number in splits.items()})
    for split, dataset in made.items():
        dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_a_data_set_of_pictures_is_found_by_the_types_of_its_columns(tmp_path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    save_pictures(folder, train=8, test=4)
    (run := tmp_path / "run").mkdir()
    task = made(run, SETTINGS | {"dataset": str(folder)})
    assert task.model.config.id2label == {0: "red", 1: "blue"}  # type: ignore[union-attr]
    batch = next(task.batches(lambda: 4, "here", step=lambda: 0))
    is_red = batch["pixel_values"][:, 0, 0, 0] == 1
    assert torch.equal(batch["labels"] == 0, is_red)
    assert task.evaluate(1).keys() == {"held_out_loss", "held_out_accuracy"}
    assert task.card_metadata()["datasets"] == []


def test_what_cannot_be_trained_on_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"cannot be had.*Set `dataset` to digits"):
        ImageClassification.prepare(SETTINGS | {"dataset": str(tmp_path / "nowhere")}, tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    with pytest.raises(UserError, match="none that is test or validation"):
        open_images(str(save_pictures(folder, train=2)), "heldout", tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"model_type": "resnet", "image_size": 32, "num_channels": 3}', "batch normalisation"),
        ('{"model_type": "albert"}', "no config of a model that classifies pictures"),
        ("{", "no config"),
    ],
)
def test_a_model_that_cannot_be_averaged_is_refused(tmp_path, config, said) -> None:
    """Each peer would keep running statistics of its own, and a newcomer would get none."""
    (tmp_path / "model.json").write_text(config)
    with pytest.raises(UserError, match=said):
        ImageClassification.prepare(SETTINGS | {"image_model": str(tmp_path / "model.json")}, tmp_path)


def test_a_volunteers_other_model_is_refused(tmp_path) -> None:
    made(tmp_path)
    path = tmp_path / "mine.json"
    config = json.loads(Path(SETTINGS["image_model"]).read_text()) | {"depths": [2, 1]}
    path.write_text(json.dumps(config))
    ImageClassification.refuse_other_files({"image_model": SETTINGS["image_model"]}, tmp_path)
    with pytest.raises(UserError, match=r"depths = \[2, 1\], but this run uses \[1, 1\]"):
        ImageClassification.refuse_other_files({"image_model": str(path)}, tmp_path)


def test_a_run_from_a_checkpoint_gets_its_weights_from_the_organizer(tmp_path) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    settings = SETTINGS | {"start_from": str(tmp_path)}
    assert made(tmp_path, settings).first_weights == "elsewhere"
    for given in ({"from_step_zero": True}, {"start_from": str(tmp_path / "none")}):
        with pytest.raises(UserError, match="can only go on from another run's checkpoint"):
            ImageClassification.prepare(settings | given, tmp_path)


def test_what_it_saves_opens_with_plain_transformers_as_the_card_says(task, tmp_path, capsys) -> None:
    task.save_pretrained(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.id2label[7] == "7"
    exec(task.usage(str(tmp_path)), {})
    assert capsys.readouterr().out.strip() in map(str, range(10))
