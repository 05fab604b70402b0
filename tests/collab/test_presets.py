"""Presets: published pairs of rate and batch, the rule between them, and who wins."""

import logging
import math

import pytest

from arguments import OptimizerArguments, SwarmArguments, agreed_settings, changes_between, pick
from collab.errors import UserError
from collab.presets import PRESETS


def settings_of(**given) -> dict:
    return agreed_settings({"run_id": "ours", **given})


def test_the_defaults_are_those_of_the_default_preset():
    """`--help` shows them."""
    settings = settings_of()
    for cls in (OptimizerArguments, SwarmArguments):
        for key, value in vars(pick(cls, {})).items():
            assert settings[key] == value, key


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_in_rate_and_batch_together(name):
    preset, settings = PRESETS[name], settings_of(preset=name, max_global_steps=1000)
    assert settings["learning_rate"] == preset.learning_rate
    assert {key: settings[key] for key in preset.settings} == preset.settings
    assert settings["warmup_steps"] == round(1000 * preset.warmup)
    assert settings["preset"] == name


def test_another_batch_changes_the_rate_with_the_square_root_and_says_so(caplog):
    with caplog.at_level(logging.INFO, "collab.presets"):
        assert settings_of(target_batch_size=1024)["learning_rate"] == pytest.approx(0.00176 / 2)
    assert "0.00088 for 1024" in caplog.text and "0.00176 for 4096" in caplog.text and "albert" in caplog.text
    roberta = settings_of(preset="roberta", target_batch_size=2048)
    assert roberta["learning_rate"] == pytest.approx(0.0003) and roberta["optimizer"] == "adamw"


def test_the_rule_gives_the_published_table_of_lamb():
    """You et al. 2020: 5 / (2 ** 1.5 * 1000) at 4,096 up to 5 / 1000 at 32,768."""
    for doublings, batch in enumerate((512, 1024, 2048, 4096, 8192, 16384, 32768)):
        published = 5e-3 / math.sqrt(2) ** (6 - doublings)
        assert settings_of(target_batch_size=batch)["learning_rate"] == pytest.approx(published, rel=0.005)


def test_what_is_given_wins():
    given = dict(preset="bert", learning_rate=0.5, target_batch_size=64, warmup_steps=7, adam_beta2=0.5)
    settings = settings_of(**given, optimizer="adamw_8bit")
    assert {key: settings[key] for key in given} == given and settings["optimizer"] == "adamw_8bit"
    assert settings["max_grad_norm"] == 1.0


def test_impossible_values_are_refused_before_the_rule():
    with pytest.raises(UserError, match="target_batch_size is 0"):
        settings_of(target_batch_size=0)
    with pytest.raises(UserError, match="preset is 'albret'"):
        settings_of(preset="albret")


def test_a_rate_that_followed_from_the_batch_follows_its_change():
    changed = changes_between(settings_of(), {"target_batch_size": 1024})
    assert changed == {"target_batch_size": 1024, "learning_rate": pytest.approx(0.00088)}


@pytest.mark.parametrize("at_first, later", [({"learning_rate": 0.001}, {}), ({}, {"learning_rate": 0.00176})])
def test_a_rate_that_was_given_stays_when_the_batch_changes(at_first, later):
    assert changes_between(settings_of(**at_first), {"target_batch_size": 1024, **later}) == {"target_batch_size": 1024}
