"""The model card: what the Hub reads in its head, and strangers' names that stay text."""

from typing import Any

import yaml
from huggingface_hub import ModelCard

from collab.modelcard import model_card


def card(**changes) -> str:
    given = {
        "title": "Bengali ALBERT",
        "summary": "A masked language model of Bengali.",
        "metadata": {
            "license": "apache-2.0",
            "language": ["bn"],
            "library_name": "transformers",
            "pipeline_tag": "fill-mask",
            "tags": ["hivemind", "albert"],
            "datasets": None,
        },
        "run_id": "bengali-albert",
        "step": 1200,
        "samples": 4_915_200,
        "peers": ["kaggle-t4", "Ishani"],
        "usage": "from transformers import pipeline\nfill = pipeline('fill-mask', 'org/name')\nfill('[MASK]')",
        "settings": {"target batch": 4096, "optimizer": "LAMB"},
        "join_command": "python run_trainer.py --initial_peers /ip4/203.0.113.7/tcp/1/p2p/Qm",
    }
    return model_card(**{**given, **changes})


def test_the_hub_reads_the_metadata():
    data: Any = ModelCard(card()).data
    assert (data.license, data.language, data.pipeline_tag) == ("apache-2.0", ["bn"], "fill-mask")
    assert data.library_name == "transformers" and data.tags == ["hivemind", "albert"]
    assert "datasets" not in yaml.safe_load(card().split("---")[1])


def test_a_person_finds_what_it_is_how_to_use_it_and_how_to_join():
    text = card()
    for expected in (
        "# Bengali ALBERT", "global step **1,200**", "**4,915,200** samples",
        "fill = pipeline('fill-mask', 'org/name')",
        "```bash\npython run_trainer.py --initial_peers", "Ishani, kaggle-t4.", "| target batch | 4096 |",
    ):  # fmt: skip
        assert expected in text, expected
    assert "Help to train" not in card(join_command=None)
    assert "Nobody yet." in card(peers=[])


def test_names_of_strangers_stay_text():
    names = ["<img src=x onerror=1>", "[click](http://evil)", "a | b\n# Heading", "`code`", "\u202ecod.exe", "x" * 500]
    text = card(peers=names)
    who = text.split("## Who trained it\n\n")[1].split("\n\n## Settings")[0]
    assert "\n" not in who and "<img" not in who and "\u202e" not in who and "x" * 41 not in who
    assert r"\[click\]\(http\://evil\)" in who and r"a \| b \# Heading" in who and r"\`code\`" in who


def test_many_contributors_are_counted():
    text = card(peers=[f"peer{i:04}" for i in range(250)] + ["peer0001"])
    assert "peer0099 and 150 more." in text and "peer0100" not in text
