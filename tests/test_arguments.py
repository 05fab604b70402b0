"""Options: one file for every program, the command line above it, and every mistake refused by its name."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from arguments import (
    AGREED,
    EVERYTHING,
    AuxArguments,
    ExpertArguments,
    ImageArguments,
    MLMArguments,
    OptimizerArguments,
    PeerArguments,
    RunArguments,
    SwarmArguments,
    TrainerArguments,
    agreed_settings,
    changes_between,
    parse,
    pick,
    read_config,
    refuse_contradictions,
)
from collab.errors import UserError
from tasks import TASKS
from tasks.mlm.sources import Source

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TRAINER = (*AGREED, PeerArguments, TrainerArguments)
AUXILIARY = (*AGREED, PeerArguments, AuxArguments)


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file and gives its path."""

    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def refusal(action, *args) -> str:
    with pytest.raises(UserError) as caught:
        action(*args)
    return str(caught.value)


def read(*argv: str, classes=TRAINER) -> dict:
    return parse("", classes, list(argv))


# ---- the file and the command line -------------------------------------------------------------------------------


def test_only_what_was_given_is_returned(config):
    assert read() == {}
    assert read("--config", str(config("seed: 3\n"))) == {"seed": 3}
    assert read("--seed", "0") == {"seed": 0}, "a value that equals the default was given all the same"


def test_keys_of_the_file_are_names_of_arguments(config):
    text = "run_id: ours\nlearning_rate: 0.5\nlowercase: false\noptimizer: adamw\ninitial_peers: [/ip4/1.2.3.4/tcp/1]\n"
    given = read("--config", str(config(text)))
    assert pick(RunArguments, given) == RunArguments(run_id="ours")
    assert pick(OptimizerArguments, given) == OptimizerArguments(learning_rate=0.5, optimizer="adamw")
    assert pick(MLMArguments, given).lowercase is False
    assert pick(PeerArguments, given).initial_peers == ["/ip4/1.2.3.4/tcp/1"]


def test_the_command_line_overrides_the_file(config):
    path = str(config("seed: 3\nmax_global_steps: 7\nnat_port_map: true\nhost_maddrs: [/ip4/0.0.0.0/tcp/1]\n"))
    own = ["--seed", "4", "--nat_port_map", "false", "--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
    for argv in (["--config", path, *own], [*own, "--config", path]):
        assert read(*argv) == {
            "seed": 4,
            "max_global_steps": 7,
            "nat_port_map": False,
            "host_maddrs": ["/ip4/127.0.0.1/tcp/0"],
        }


def test_one_file_serves_both_programs(config):
    path = str(config("run_id: ours\nmicro_batch_size: 2\nsave_every: 5\n"))
    for classes in (TRAINER, AUXILIARY):
        given = read("--config", path, classes=classes)
        assert pick(RunArguments, given).run_id == "ours"
        assert pick(TrainerArguments, given).micro_batch_size == 2
        assert pick(AuxArguments, given).save_every == 5


def test_a_flag_of_the_other_program_is_refused_on_the_command_line():
    assert "--save_every" in refusal(lambda: read("--save_every", "5"))


def test_a_list_of_mappings_in_the_file(config):
    text = "sources:\n  - embedded: true\n    weight: 2\n  - files: 'a/*.txt'\n"
    expected = [{"embedded": True, "weight": 2}, {"files": "a/*.txt"}]
    given = read("--config", str(config(text)))
    assert given["sources"] == expected
    assert agreed_settings({"run_id": "ours", **given})["sources"] == expected


def test_a_list_of_mappings_on_the_command_line():
    given = read("--sources", "{embedded: true, weight: 2}", "{files: 'a/*.txt'}")
    assert given["sources"] == [{"embedded": True, "weight": 2}, {"files": "a/*.txt"}]


def test_numbers_as_people_write_them(config):
    """YAML 1.1 reads 1e-3 as text."""
    given = read_config(config("learning_rate: 1e-3\nmatchmaking_time: 2\nmax_global_steps: 125_000\n"))
    assert given == {"learning_rate": 0.001, "matchmaking_time": 2.0, "max_global_steps": 125_000}
    assert isinstance(given["matchmaking_time"], float)


def test_an_empty_value_is_allowed_only_where_it_means_something(config):
    assert read_config(config("tokenizer:\nbandwidth:\n")) == {"tokenizer": None, "bandwidth": None}
    assert "run_id is None" in refusal(read_config, config("run_id:\n"))


def test_defaults_are_not_shared_between_instances():
    first = PeerArguments()
    first.host_maddrs.append("/ip4/127.0.0.1/tcp/1")
    first_task = MLMArguments()
    first_task.sources.clear()
    assert PeerArguments().host_maddrs == ["/ip4/0.0.0.0/tcp/0"]
    assert MLMArguments().sources == [{"embedded": True}]


def test_the_cache_folder_may_start_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PeerArguments(cache_dir="~/cache").cache_dir == str(tmp_path / "cache")


@pytest.mark.parametrize(
    ("argv", "text", "client_mode"),
    [
        ([], "", None),
        (["--client_mode", "auto"], "client_mode: auto", None),
        (["--client_mode"], "client_mode: true", True),
        (["--client_mode", "true"], "client_mode: yes", True),
        (["--client_mode", "false"], "client_mode: false", False),
    ],
)
def test_client_mode_is_found_out_unless_it_is_said(config, argv, text, client_mode):
    for given in (read(*argv), read(*argv, "--seed", "1"), read_config(config(text)) if text else {}):
        assert pick(PeerArguments, given).peer_options()["client_mode"] is client_mode


def test_relays_need_each_other():
    relay = "/ip4/203.0.113.7/tcp/1/p2p/QmRelay"
    given = read("--use_auto_relay", "--trusted_relays", relay, "--use_ipfs", "true")
    options = pick(PeerArguments, given).peer_options()
    assert options["use_relay"] and options["use_auto_relay"] and options["use_ipfs"]
    assert options["trusted_relays"] == [relay]
    assert "use_relay" in refusal(pick, PeerArguments, {"use_relay": False, "use_auto_relay": True})


# ---- mistakes ----------------------------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_with_near_matches(config):
    path = config("learning_rte: 0.1\n")
    message = refusal(read_config, path)
    assert "'learning_rte'" in message and "Did you mean learning_rate" in message and str(path) in message
    assert "'zzz'" in refusal(read_config, config("zzz: 1\n"))
    assert "17" in refusal(read_config, config("17: 1\n")), "YAML keys need not be text"


def test_an_unknown_flag_is_refused_with_near_matches():
    message = refusal(lambda: read("--inital_peers", "x"))
    assert "--inital_peers" in message and "--initial_peers" in message
    assert "--learning_rate" in refusal(lambda: read("--learning-rat=1"))
    assert "'stray'" in refusal(lambda: read("--seed", "1", "stray"))


def test_a_flag_may_not_be_shortened():
    """A shortened flag would change its meaning on the day when a longer one is added."""
    assert "--learning" in refusal(lambda: read("--learning", "0.1"))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("seed: 1.5", "a whole number"),
        ("seed: true", "a whole number"),
        ("max_global_steps: 1e2", "a whole number"),
        ("learning_rate: fast", "a number"),
        ("learning_rate: true", "a number"),
        ("learning_rate: [0.1]", "a number"),
        ("lowercase: 1", "true or false"),
        ("lowercase: 'false'", "true or false"),
        ("run_id: 7", "text"),
        ("optimizer: sgd", "one of lamb, adamw"),
        ("host_maddrs: /ip4/0.0.0.0/tcp/0", "a list, each item text"),
        ("host_maddrs: [4]", "a list, each item text"),
        ("sources: embedded", "a list, each item a mapping"),
        ("sources: [embedded]", "a list, each item a mapping"),
        ("sources: ['{embedded: true']", "a list, each item a mapping"),
        ("sources: [{hub: a/b, revision: 2024-01-01}]", "a list, each item a mapping"),
        ("bandwidth: much", "a number or empty"),
        ("client_mode: perhaps", "one of auto, true, false"),
    ],
)
def test_a_wrong_type_in_the_file_is_refused_by_its_key(config, text, rule):
    path = config(text + "\n")
    message = refusal(read_config, path)
    assert f"{path}: {text.partition(':')[0]} is " in message and rule in message


@pytest.mark.parametrize(
    "argv",
    [
        ["--seed", "one"],
        ["--learning_rate", "fast"],
        ["--optimizer", "sgd"],
        ["--client_mode", "perhaps"],
        ["--sources", "embedded"],
        ["--sources", "{embedded: true"],
        ["--sources", "{hub: a/b, revision: 2024-01-01}"],
        ["--run_id"],
        ["--config"],
    ],
)
def test_a_wrong_type_on_the_command_line_is_refused_by_its_flag(argv):
    message = refusal(lambda: read(*argv))
    assert argv[0] in message and "--help" in message


IMPOSSIBLE = [
    (RunArguments, "run_id", "with spaces"),
    (RunArguments, "run_id", "../escape"),
    (RunArguments, "run_id", "পরীক্ষা"),
    (RunArguments, "run_id", ""),
    (RunArguments, "max_global_steps", 0),
    (MLMArguments, "sources", []),
    (MLMArguments, "vocab_size", 63),
    (MLMArguments, "normalizer", "bangla"),
    (MLMArguments, "tokenizer_megabytes", 0.0),
    (MLMArguments, "seq_length", 15),
    (MLMArguments, "seq_length_start", 20),
    (MLMArguments, "seq_length_warmup_steps", -1),
    (MLMArguments, "mask_probability", 0.0),
    (MLMArguments, "mask_probability", 1.0),
    (MLMArguments, "shuffle_buffer", 0),
    (OptimizerArguments, "learning_rate", 0.0),
    (OptimizerArguments, "learning_rate", float("nan")),
    (OptimizerArguments, "min_learning_rate", -0.1),
    (OptimizerArguments, "min_learning_rate", 1.0),
    (OptimizerArguments, "warmup_steps", -1),
    (OptimizerArguments, "weight_decay", -0.1),
    (OptimizerArguments, "adam_beta1", 1.0),
    (OptimizerArguments, "adam_beta2", -0.1),
    (OptimizerArguments, "adam_epsilon", 0.0),
    (OptimizerArguments, "max_grad_norm", -1.0),
    (SwarmArguments, "target_batch_size", 0),
    (SwarmArguments, "matchmaking_time", 0.5),
    (SwarmArguments, "averaging_timeout", 15.0),
    (SwarmArguments, "metadata_expiration", 5.0),
    (SwarmArguments, "average_state_every", 0),
    (SwarmArguments, "delay_grad_averaging", True),
    (PeerArguments, "startup_timeout", 0.0),
    (PeerArguments, "bandwidth", -1.0),
    (PeerArguments, "trusted_relays", ["/ip4/203.0.113.7/tcp/1/p2p/QmRelay"]),
    (TrainerArguments, "public_name", "x" * 41),
    (TrainerArguments, "micro_batch_size", -1),
    (TrainerArguments, "threads", -1),
    (AuxArguments, "report_to", ["tensorbored"]),
    (AuxArguments, "save_every", 0),
    (AuxArguments, "repo_id", "only-a-name"),
    (AuxArguments, "trackio_space", "only-a-name"),
]


@pytest.mark.parametrize(("cls", "key", "value"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_its_key(cls, key, value):
    given = {"run_id": "ours", key: value}
    message = refusal(pick, cls, given)
    assert message.startswith(f"{key} is {value!r}, but it must be ") and f"--{key}" in message


def test_local_updates_are_refused_together_with_delayed_ones():
    given = {"run_id": "ours", "local_updates": True, "delay_optimizer_step": True}
    assert refusal(agreed_settings, given).startswith("local_updates is True, but it must be false with delay_")


def test_a_task_has_its_own_settings_and_refuses_those_of_others():
    pictures = agreed_settings({"run_id": "ours", "task": "image_classification"})
    assert pictures["dataset"] == "digits" and "sources" not in pictures
    assert "dataset" not in agreed_settings({"run_id": "ours"})
    said = refusal(agreed_settings, {"run_id": "ours", "task": "image_classification", "seq_length": 128})
    assert "seq_length belongs to the task mlm" in said
    assert "Did you mean image_classification?" in refusal(
        agreed_settings, {"run_id": "ours", "task": "image_clasification"}
    )


def test_an_unknown_rule_for_cleaning_is_refused():
    assert "Did you mean controls?" in refusal(pick, MLMArguments, {"cleaning": ["control"]})
    assert pick(MLMArguments, {"cleaning": []}).cleaning == []


def test_a_number_that_is_not_finite_is_refused(config):
    """JSON has no infinity: the manifest could not say it."""
    for value in ("inf", "nan"):
        for given in (read("--learning_rate", value), read_config(config(f"learning_rate: .{value}\n"))):
            assert "learning_rate is " in refusal(agreed_settings, {"run_id": "ours", **given})


def test_a_file_that_is_not_there_names_those_that_are(config):
    path = config("seed: 1\n")
    message = refusal(read_config, path.with_name("other.yaml"))
    assert "other.yaml" in message and "run.yaml" in message


@pytest.mark.parametrize("text", ["", "- seed\n", "seed\n", "# only a comment\n"])
def test_a_file_without_settings_is_refused(config, text):
    path = config(text)
    assert str(path) in refusal(read_config, path)


@pytest.mark.parametrize(
    "content", [b"seed: [1\n", b"seed: 1\n\tseed: 2\n", b"run_id: \xff\xfe\n", b"seed: !!python/x 1"]
)
def test_a_file_that_is_no_yaml_is_refused(tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    message = refusal(read_config, path)
    assert str(path) in message and "YAML" in message


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    assert str(tmp_path) in refusal(read_config, tmp_path)


# ---- what the swarm agrees on ------------------------------------------------------------------------------------


def test_agreed_settings_are_complete_and_pure_json():
    given = read("--run_id", "ours", "--sources", "{embedded: true}", "--micro_batch_size", "4", "--seed", "9")
    settings = agreed_settings(given)
    classes = set(AGREED) - {ImageArguments, ExpertArguments}
    assert set(settings) == {field.name for cls in classes for field in dataclasses.fields(cls)}
    assert settings["seed"] == 9 and settings["target_batch_size"] == SwarmArguments().target_batch_size
    assert json.loads(json.dumps(settings, allow_nan=False)) == settings
    assert type(settings["sources"][0]) is dict


def test_agreed_settings_need_a_run_id():
    assert refusal(agreed_settings, {}).startswith("run_id is ''")


def test_what_can_change_while_a_run_goes_on_is_told_from_what_cannot():
    settings = agreed_settings({"run_id": "ours"})
    given = {"run_id": "ours", "learning_rate": 0.25, "sources": [{"embedded": True, "weight": 2}], "device": "cpu"}
    assert changes_between(settings, given) == {key: given[key] for key in ("learning_rate", "sources")}
    assert "vocab_size cannot change" in refusal(changes_between, settings, given | {"vocab_size": 100})
    assert "nothing to change" in refusal(changes_between, settings, {"run_id": "ours"})
    assert "learning_rate is -1" in refusal(changes_between, settings, {"run_id": "ours", "learning_rate": -1})


def test_a_contradiction_to_the_run_is_refused_by_its_name():
    settings = agreed_settings({"run_id": "ours", "learning_rate": 0.5})
    message = refusal(refuse_contradictions, {"learning_rate": 0.25}, settings)
    assert "learning_rate = 0.25" in message and "0.5" in message and "--learning_rate" in message


def test_agreeing_with_the_run_is_allowed():
    settings = agreed_settings({"run_id": "ours", "learning_rate": 0.5})
    same = read("--learning_rate", "0.5", "--sources", "{embedded: true}", "--micro_batch_size", "3")
    refuse_contradictions(same, settings)


# ---- what is in the repository -----------------------------------------------------------------------------------


def test_every_option_has_a_help_text_and_one_home():
    names = [field.name for cls in EVERYTHING for field in dataclasses.fields(cls)]
    assert len(names) == len(set(names)), "a key of the YAML file would mean two things"
    for cls in EVERYTHING:
        for field in dataclasses.fields(cls):
            assert len(field.metadata.get("help", "")) > 15, f"{cls.__name__}.{field.name}"


def test_there_are_configs():
    assert "demo.yaml" in [path.name for path in CONFIGS]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_of_the_repository_describes_a_run_that_can_start(path):
    given = read_config(path)
    settings = agreed_settings(given)
    for cls in EVERYTHING:
        pick(cls, given)
    assert settings["task"] in TASKS
    if settings["task"] == "mlm":
        for mapping in settings["sources"]:
            Source.from_mapping(mapping)
        model = json.loads((ROOT / settings["model_config"]).read_text(encoding="utf-8"))
        assert settings["seq_length"] <= model["max_position_embeddings"]
    assert settings["warmup_steps"] < settings["max_global_steps"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_says_how_to_launch_it(path):
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"configs/{path.name}" in header


@pytest.mark.parametrize(
    ("program", "own"), [("run_trainer.py", "--micro_batch_size"), ("run_aux_peer.py", "--save_every")]
)
def test_help_lists_options_with_their_defaults(program, own):
    command = [sys.executable, program, "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert own in text and "--initial_peers" in text and "--config" in text
    assert f"(default: {SwarmArguments().target_batch_size})" in text


def test_a_task_may_share_arguments_with_another_one() -> None:
    settings = agreed_settings(read("--run_id", "ours", "--task", "moe_mlm", "--vocab_size", "700", "--experts", "4"))
    assert (settings["vocab_size"], settings["experts"], settings["experts_per_token"]) == (700, 4, 2)
    with pytest.raises(UserError, match="experts belongs to the task moe_mlm; this run's task is mlm"):
        agreed_settings(read("--run_id", "ours", "--experts", "4"))
    with pytest.raises(UserError, match="experts_per_token is 9, but it must be from 2 to experts"):
        agreed_settings(read("--run_id", "ours", "--task", "moe_mlm", "--experts_per_token", "9"))
