"""The model card: what the Hub reads in its head, and strangers' names that stay text."""

import io
import math
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from collab.curve import curve_png
from collab.modelcard import CURVE, model_card
from collab.view import Round

SETTINGS = {"run_id": "bengali-albert", "task": "mlm", "max_global_steps": 125_000, "target_batch_size": 4096}


def card(**changes) -> str:
    given = {
        "about": {"Model": "A masked language model of Bengali."},
        "metadata": {
            "license": "apache-2.0",
            "language": ["bn"],
            "library_name": "transformers",
            "pipeline_tag": "fill-mask",
            "datasets": ["wikimedia/wikipedia"],
            "base_model": None,
        },
        "settings": SETTINGS,
        "step": 1200,
        "samples": 4_915_200,
        "peers": ["kaggle-t4", "Ishani"],
        "usage": "from transformers import pipeline\nfill = pipeline('fill-mask', 'org/name')\nfill('[MASK]')",
        "join_command": "python run_trainer.py --initial_peers /ip4/203.0.113.7/tcp/1/p2p/Qm",
    }
    return model_card(**{**given, **changes})


def test_the_hub_reads_the_metadata():
    data: Any = ModelCard(card()).data
    assert (data.license, data.language, data.pipeline_tag) == ("apache-2.0", ["bn"], "fill-mask")
    assert data.library_name == "transformers" and data.tags == ["hivemind", "collaborative-training", "mlm"]
    assert data.datasets == ["wikimedia/wikipedia"] and data.eval_results is None
    assert not {"base_model", "model-index"} & yaml.safe_load(card().split("---")[1]).keys()
    assert ModelCard(card(metadata={"base_model": "org/parent"})).data.to_dict()["base_model"] == "org/parent"


def test_held_out_figures_are_where_the_hub_and_a_person_look_for_them():
    text = card(held_out={"held_out_loss": 2.34567, "held_out_accuracy": 0.5432, "another": 1.0})
    data: Any = ModelCard(text).data
    assert [(r.task_type, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("fill-mask", "loss", 2.3457),
        ("fill-mask", "accuracy", 0.5432),
    ]
    assert data.model_name == "bengali-albert" and "held-out loss **2.3457**, masked accuracy **0.5432**" in text
    assert "nobody trained on" not in card() and "nobody trained on" not in card(held_out={})


def test_a_person_finds_what_it_is_how_to_use_it_and_how_to_join():
    text = card()
    for expected in (
        "# bengali-albert", "- Model: A masked language model of Bengali.",
        "global step **1,200** of 125,000", "**4,915,200** samples.",
        "fill = pipeline('fill-mask', 'org/name')",
        "```bash\npython run_trainer.py --initial_peers", "Ishani, kaggle-t4.", "| target\\_batch\\_size | 4096 |",
    ):  # fmt: skip
        assert expected in text, expected
    assert "Help to train" not in card(step=125_000)
    assert "Nobody yet." in card(peers=[])
    assert "samples, **61,000,000** tokens." in card(tokens=61_000_000)
    assert "| none |" not in card(settings=SETTINGS | {"none": None}) and "![" not in text


def test_names_of_strangers_stay_text():
    names = ["<img src=x onerror=1>", "[click](http://evil)", "a | b\n# Heading", "`code`", "\u202ecod.exe", "x" * 500]
    text = card(peers=names)
    who = text.split("## Who trained it\n\n")[1].split("\n\n## Settings")[0]
    assert "\n" not in who and "<img" not in who and "\u202e" not in who and "x" * 41 not in who
    assert r"\[click\]\(http\://evil\)" in who and r"a \| b \# Heading" in who and r"\`code\`" in who


def test_many_contributors_are_counted():
    text = card(peers=[f"peer{i:04}" for i in range(250)] + ["peer0001"])
    assert "peer0099 and 150 more." in text and "peer0100" not in text


def rounds(losses: list[float | None]) -> list[Round]:
    return [Round(step, 0.0, loss, 1.0, 1, 1, 1) for step, loss in enumerate(losses, 1)]


def test_the_curve_is_a_picture_beside_the_card_with_words_for_those_who_cannot_see_it():
    text = card(curve_in_words="Loss fell from 9.1 to 2.3.")
    assert f"![Loss fell from 9.1 to 2.3.]({CURVE})" in text and "/" not in CURVE


@pytest.mark.parametrize(
    "losses", [[5.0], [5.0, 5.0], [9.0 - 0.01 * i for i in range(700)], [None, 3.0, math.nan, 1e9]]
)
def test_the_picture_falls_with_the_loss_and_shows_the_background_through(losses):
    png = curve_png(rounds(losses))
    assert png is not None and len(png) < 200_000
    image = np.asarray(Image.open(io.BytesIO(png))).astype(int)
    height, width, channels = image.shape
    assert channels == 4 and image[0, 0, 3] == 0
    rows, columns = np.nonzero((image[..., 3] > 200) & (image[..., 2] > image[..., 0] + 90))
    assert len(rows)
    if len(losses) == 700:
        assert rows[columns.argmin()] < height / 4, "it begins at the upper left"
        assert rows[columns < width - 130].max() > height / 2, "and falls"


def test_without_a_loss_there_is_no_picture():
    assert curve_png([]) is None and curve_png(rounds([None, math.nan])) is None
