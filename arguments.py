"""Every option of every program: one dataclass for each concern, each field with its help.

Options come in two kinds. What the whole swarm has to agree on (`AGREED`) is decided once by the organizer and reaches
the volunteers with the run manifest. What concerns one machine only (`PeerArguments`, `TrainerArguments`,
`AuxArguments`) is each peer's own. A key in a YAML file is an argument's own name; the command line overrides the file.
"""

import difflib
import ipaddress
import json
import math
import types
from argparse import ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from collab.device import PRECISIONS
from collab.errors import UserError
from collab.metrics import MAX_HOSTED
from collab.presets import PRESETS, fill_in, follows_rule
from tasks import find_task
from tasks.mlm.cleaning import DEFAULT_RULES, make_cleaner
from tokenizer.normalizers import NORMALIZERS

T = TypeVar("T")


class YamlMapping(dict):
    """A mapping as an item of a list such as `sources`; on a command line `'{hub: org/name, weight: 2}'`."""

    def __init__(self, given: str | Mapping[str, Any]) -> None:
        try:
            value = yaml.safe_load(given) if isinstance(given, str) else given
            json.dumps(value)  # YAML knows dates, which the manifest cannot hold
        except (yaml.YAMLError, TypeError) as error:
            raise ValueError(str(error)) from error
        if not isinstance(value, Mapping):
            raise ValueError(f"{given!r} is not a mapping such as '{{hub: org/name, column: text}}'")
        super().__init__(value)


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text; a list as default is copied for each instance."""
    metadata["help"] = help
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def is_ip(text: str) -> bool:
    """Whether `text` is an IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def require(condition: bool, key: str, value: Any, rule: str) -> None:
    """Refuse an impossible value: `rule` is what `key` must be."""
    if not condition:
        raise UserError(f"{key} is {value!r}, but it must be {rule}. Change `{key}` in the YAML file or --{key}.")


# ---- agreed by the whole swarm -----------------------------------------------------------------------------------


@dataclass
class RunArguments:
    """What this run is."""

    _argument_group_name = "the run (agreed by all its peers, for starting a new one)"

    run_id: str = option("", "Name of the run: its key in the DHT, the folder under runs/, the project in the tracker.")
    task: str = option("mlm", "What is trained: the name of a folder under tasks/.")
    seed: int = option(0, "Seed of the first weights, the order of the data and the masks.")
    max_global_steps: int = option(125_000, "The run ends after this many global steps; the schedule ends there too.")
    start_from: str | None = option(
        None,
        "Start from an existing model: a folder, or ORG/NAME or ORG/NAME@REVISION on the Hugging Face Hub "
        "(hub:ORG/NAME if a folder has that name). Its config takes the place of model_config, and its tokenizer that "
        "of a trained one. If it is a run's checkpoint, this run goes on at its global step, with its optimizer's "
        "state; from any other model it takes the weights. See docs/checkpoints.md and docs/models.md.",
        aliases=["--from"],
    )
    from_step_zero: bool = option(
        False,
        "Take only the weights, and begin at global step 0, even if what --from names is a run's checkpoint: for "
        "another corpus or schedule.",
    )
    precisions: list[str] = option(
        list(PRECISIONS), "Precisions that volunteers may compute in; gradients travel in float32."
    )

    def __post_init__(self) -> None:
        allowed = self.run_id.replace("-", "").replace("_", "")
        require(
            allowed.isascii() and allowed.isalnum(), "run_id", self.run_id, "a name of letters, digits, '-' and '_'"
        )
        alone = self.from_step_zero and self.start_from is None
        require(not alone, "from_step_zero", self.from_step_zero, "false unless start_from (--from) names a model")
        require(self.max_global_steps > 0, "max_global_steps", self.max_global_steps, "at least 1")
        some = bool(self.precisions) and set(self.precisions) <= PRECISIONS.keys()
        require(some, "precisions", self.precisions, "a list of float32, bfloat16 and float16")


@dataclass
class MLMArguments:
    """The masked LM task: its model, tokenizer and text."""

    _argument_group_name = "its model, tokenizer and text (agreed)"

    model_config: str = option(
        "tasks/mlm/models/albert_large.json", "JSON file with the model's architecture (transformers' config.json)."
    )
    sources: list[YamlMapping] = option(
        [YamlMapping({"embedded": True})],
        "Where text comes from, a list of mappings: {embedded: true}, {files: 'corpus/*.jsonl.gz', column: text} or "
        "{hub: org/name, config: ..., split: train, column: text}, each with an optional weight.",
    )
    cleaning: list[str] = option(
        list(DEFAULT_RULES),
        "Rules that documents go through before they are cut: markup (HTML), urls (addresses on the web and of mail), "
        "controls (characters that show nothing), bengali (| for danda), arabic (Latin ? , ;), repeats (at most three "
        "of a character). [] for none.",
    )
    tokenizer: str | None = option(
        None, "Folder or Hub name of a tokenizer. Left out: the organizer's peer trains one from `sources`."
    )
    vocab_size: int = option(30_000, "Entries of the tokenizer that is trained when `tokenizer` is left out.")
    tokenizer_megabytes: float = option(
        200.0, "MB of text that the tokenizer is trained on. More helps rare scripts; 200 take about two minutes."
    )
    normalizer: str = option(
        "nfkc",
        "Normaliser of the tokenizer that is trained: nfkc suits most languages, bengali unifies spellings that look "
        "the same, arabic drops vowel marks and tatweel. It becomes part of the tokenizer.",
    )
    lowercase: bool = option(True, "Lower-case the text, as ALBERT does. No effect in scripts without case.")
    seq_length: int = option(512, "Tokens in an instance at most, special tokens included.")
    seq_length_start: int = option(
        128, "Tokens in an instance at most when the run begins, with seq_length_warmup_steps."
    )
    seq_length_warmup_steps: int = option(
        0,
        "Global steps in which the length grows from seq_length_start to seq_length: short instances are cheaper, and "
        "do for the first part of a run. 0: seq_length from the beginning.",
    )
    mask_probability: float = option(0.15, "Share of the real tokens that the model has to restore.")
    shuffle_buffer: int = option(
        10_000, "Documents of each source held in memory for shuffling. Smaller saves memory, mixes less."
    )

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "sources", self.sources, "a list with at least one source")
        make_cleaner(self.cleaning)  # refuses what it does not know
        require(self.normalizer in NORMALIZERS, "normalizer", self.normalizer, f"one of {', '.join(NORMALIZERS)}")
        require(self.vocab_size >= 64, "vocab_size", self.vocab_size, "at least 64")
        require(self.tokenizer_megabytes > 0, "tokenizer_megabytes", self.tokenizer_megabytes, "above 0")
        long_enough = self.seq_length >= 16 and self.seq_length % 8 == 0  # batches are padded to a multiple of 8
        require(long_enough, "seq_length", self.seq_length, "at least 16, and a multiple of 8")
        start = self.seq_length_start
        require(start >= 16 and start % 8 == 0, "seq_length_start", start, "at least 16, and a multiple of 8")
        steps = self.seq_length_warmup_steps
        require(steps >= 0, "seq_length_warmup_steps", steps, "0 or more")
        require(0 < self.mask_probability < 1, "mask_probability", self.mask_probability, "between 0 and 1")
        require(self.shuffle_buffer >= 1, "shuffle_buffer", self.shuffle_buffer, "at least 1")


@dataclass
class ImageArguments:
    """The image classification task: its model and pictures."""

    _argument_group_name = "its model and pictures, with task: image_classification (agreed)"

    image_model: str = option(
        "tasks/image_classification/models/small_cnn.json",
        "JSON file with the architecture (transformers' config.json of any model for image classification that has no "
        "batch normalisation).",
    )
    dataset: str = option(
        "digits",
        "digits (scikit-learn's 1,797 hand-written digits, no download), ORG/NAME on the Hugging Face Hub "
        "(uoft-cs/cifar10), or a folder that `datasets` opens: with a column of pictures of one size, one of classes, "
        "and the splits train and test.",
    )


@dataclass
class ExpertArguments:
    """The mixtures of experts of a masked LM."""

    _argument_group_name = "its experts, with task: moe_mlm (agreed)"

    experts: int = option(8, "Experts in each mixture. They may have far more parameters than any peer can hold.")
    experts_per_token: int = option(2, "Experts that each token is sent to, those that the gate likes best.")
    experts_least: int = option(
        1,
        "Answers that each token should have before slow experts are left behind; fewer than experts_per_token, or "
        "the slowest expert sets the pace.",
    )
    expert_size: int = option(
        0, "Values between the two matrices of an expert. 0: as in the model's own feed-forward layer."
    )
    expert_timeout: float = option(
        5.0, "Seconds after which a call of an expert is given up. A server that has gone silent costs so much, once."
    )
    expert_learning_rate: float = option(
        0.001, "Learning rate of experts: each makes a step of Adam for every batch of gradients that reaches it."
    )
    expert_balance: float = option(
        0.01,
        "Weight of the loss that makes the gate use all experts alike (Fedus et al. 2021). Raise it if few experts do "
        "all the work; 0 leaves the gate alone.",
    )
    expert_compression: Literal["none", "scaled_float16"] = option(
        "scaled_float16", "Codec of tokens and their gradients on the way to experts and back: 4 or 2 bytes a value."
    )

    def __post_init__(self) -> None:
        require(2 <= self.experts <= 512, "experts", self.experts, "from 2 to 512")
        each, least = self.experts_per_token, self.experts_least
        require(2 <= each <= self.experts, "experts_per_token", each, f"from 2 to experts ({self.experts})")
        require(1 <= least <= each, "experts_least", least, f"from 1 to experts_per_token ({each})")
        require(self.expert_size >= 0, "expert_size", self.expert_size, "0 or more")
        require(self.expert_timeout >= 0.5, "expert_timeout", self.expert_timeout, "at least half a second")
        require(self.expert_learning_rate > 0, "expert_learning_rate", self.expert_learning_rate, "above 0")
        require(self.expert_balance >= 0, "expert_balance", self.expert_balance, "0 or more")


@dataclass
class OptimizerArguments:
    """How averaged gradients become new weights. The defaults are those of the preset albert."""

    _argument_group_name = "its optimizer (agreed)"

    preset: Literal["albert", "sahajbert", "bert", "roberta"] = option(
        "albert",
        "Recipe for what is left out of the optimizer's settings and target_batch_size: albert and sahajbert (lamb, "
        "0.00176 at 4096), bert (adamw, 0.0001 at 256), roberta (adamw, 0.0006 at 8192). See docs/optimizers.md.",
    )
    optimizer: Literal["lamb", "adamw", "lamb_8bit", "adamw_8bit"] = option(
        "lamb",
        "lamb for target batches of thousands, adamw for smaller ones. With _8bit the state takes 2 bytes a parameter "
        "instead of 8.",
    )
    learning_rate: float = option(
        0.00176,
        "Peak learning rate. Left out: the preset's, times the square root of target_batch_size to the preset's.",
    )
    min_learning_rate: float = option(0.0, "The learning rate at which the linear decay ends.")
    warmup_steps: int = option(
        3125, "Global steps of linear warm-up. Left out: the preset's share of max_global_steps (albert: a fortieth)."
    )
    weight_decay: float = option(0.01, "Decoupled weight decay; biases and normalisation layers have none.")
    adam_beta1: float = option(0.9, "Decay of the mean of gradients.")
    adam_beta2: float = option(0.999, "Decay of the mean of squared gradients.")
    adam_epsilon: float = option(1e-6, "Added to the root of the second moment.")
    max_grad_norm: float = option(1.0, "The averaged gradient is clipped to this norm; 0 leaves it alone.")

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        floor = self.min_learning_rate
        require(0 <= floor <= self.learning_rate, "min_learning_rate", floor, "from 0 to learning_rate")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        for key in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, key) < 1, key, getattr(self, key), "from 0 to below 1")
        require(self.adam_epsilon > 0, "adam_epsilon", self.adam_epsilon, "above 0")
        require(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "0 or more")


@dataclass
class SwarmArguments:
    """How peers meet and average."""

    _argument_group_name = "its averaging (agreed)"

    target_batch_size: int = option(
        4096,
        "Samples from all peers together that make one global step. A global step should last several times "
        "longer than matchmaking_time, or the swarm ticks by time instead of by samples.",
    )
    matchmaking_time: float = option(
        15.0,
        "Seconds that a round waits at most for peers that are still busy; less where all have short micro-batches. It "
        "begins at once when all are there. Has to be longer than the slowest peer's micro-batch takes; raise it if "
        "rounds meet fewer peers than there are.",
    )
    averaging_timeout: float = option(
        60.0,
        "Seconds after which an averaging round is given up; sooner where all links are known to be fast enough. Raise "
        "it for slow links or larger models.",
    )
    metadata_expiration: float = option(
        30.0, "Seconds after which a peer that reports nothing counts as gone; rounds wait for it until then."
    )
    grad_compression: Literal["none", "float16", "scaled_float16", "int8"] = option(
        "int8",
        "Codec of gradients on the wire: int8 (1 byte a value, an error of 0.009), scaled_float16 (2 bytes), float16 "
        "(2 bytes; flushes values under 6e-8), none (4 bytes).",
    )
    state_compression: Literal["none", "float16", "scaled_float16"] = option(
        "float16", "Codec of parameters when they are averaged (int8 is too coarse). Newcomers get the exact state."
    )
    average_state_every: int = option(
        5,
        "Average the parameters every this many global steps; it removes the drift that lost rounds and codecs leave.",
    )
    min_vector_size: int = option(
        0, "Values that a peer averages at least, if any. Raise it (to 100000) if very slow links hold up the rounds."
    )
    quorum: float = option(0.5, "A round counts only if it met more than this share of the live peers, or all of them.")
    failed_round: Literal["retry", "local", "skip"] = option(
        "retry",
        "What a peer does after a failed round: try again until averaging_timeout, then step with its own gradient; do "
        "that at once (local); or let the step pass (skip).",
    )
    rollback_after: int = option(
        10,
        "When the loss of most peers has been far above what it was, for this many global steps in a row, all go back "
        "to the weights before the jump, and on with new batches. 0: never.",
    )
    snapshot_every: int = option(
        50,
        "Global steps from one copy of weights and optimizer to the next; each trainer keeps two of them on its disk "
        "(in --cache_dir, 12 bytes per parameter), to go back to.",
    )
    delay_optimizer_step: bool = option(False, "Run the optimizer in the background: see docs/delayed_updates.md.")
    delay_grad_averaging: bool = option(
        False, "Average gradients in the background as well, which makes them one step old; needs delay_optimizer_step."
    )
    delay_state_averaging: bool = option(False, "Average parameters in the background, while training goes on.")
    local_updates: bool = option(
        False,
        "Each trainer steps with its own gradient after every micro-batch. Once in target_batch_size samples of all, "
        "parameters are averaged in the background instead of gradients (local SGD). For first experiments; models "
        "differ between two averagings, and the swarm does not go back after a jump of the loss.",
    )

    def __post_init__(self) -> None:
        require(self.target_batch_size > 0, "target_batch_size", self.target_batch_size, "at least 1")
        require(self.matchmaking_time >= 1, "matchmaking_time", self.matchmaking_time, "at least 1 second")
        require(
            self.averaging_timeout > self.matchmaking_time,
            "averaging_timeout", self.averaging_timeout, f"longer than matchmaking_time ({self.matchmaking_time} s)",
        )  # fmt: skip
        require(self.metadata_expiration >= 10, "metadata_expiration", self.metadata_expiration, "at least 10 seconds")
        require(self.min_vector_size >= 0, "min_vector_size", self.min_vector_size, "0 or more")
        require(0 <= self.quorum <= 1, "quorum", self.quorum, "a share from 0 to 1")
        require(self.average_state_every >= 1, "average_state_every", self.average_state_every, "at least 1")
        require(
            self.rollback_after == 0 or self.rollback_after >= 2,
            "rollback_after", self.rollback_after, "0 or at least 2",
        )  # fmt: skip
        require(
            self.snapshot_every >= max(1, self.rollback_after),
            "snapshot_every", self.snapshot_every, f"at least rollback_after ({self.rollback_after})",
        )  # fmt: skip
        require(
            self.delay_optimizer_step or not self.delay_grad_averaging,
            "delay_grad_averaging", self.delay_grad_averaging, "false unless delay_optimizer_step is true",
        )  # fmt: skip
        local = self.local_updates
        require(not (local and self.delay_optimizer_step), "local_updates", local, "false with delay_optimizer_step")


# ---- each peer's own ---------------------------------------------------------------------------------------------


@dataclass
class PeerArguments:
    """This computer's place in the network."""

    _argument_group_name = "this computer's place in the network"

    initial_peers: list[str] = option(
        [], "Addresses of one or more peers of the swarm, as the auxiliary peer prints them. None: start a new swarm."
    )
    organizer: str | None = option(
        None,
        "Peer id of the run's organizer, whose signature the run's settings need. It is part of the organizer's "
        "address; give it if you join through somebody else.",
    )
    host_maddrs: list[str] = option(["/ip4/0.0.0.0/tcp/0"], "Addresses to listen on; port 0 takes any free port.")
    announce_maddrs: list[str] = option([], "Addresses that others should dial, if they differ (a forwarded port).")
    client_mode: Literal["auto", "true", "false"] = option(
        "auto",
        "true: accept no connections, as behind a router or firewall; false: accept them. auto: another peer tries to "
        "connect to this one, which is a client if that fails.",
        nargs="?",
        const="true",
    )
    nat_port_map: bool = option(True, "Ask the router to forward the port (UPnP).")
    use_relay: bool = option(True, "Reach peers that only relays can reach, and be a relay on a public address.")
    use_auto_relay: bool = option(
        False, "Be reachable through a relay, some minutes after the start; a client needs none. See docs/network.md."
    )
    trusted_relays: list[str] = option([], "Addresses of relays to try first, with use_auto_relay.")
    use_ipfs: bool = option(
        False, "Find the initial peers in the public network of IPFS by their ids: --initial_peers /p2p/PEER_ID."
    )
    identity_path: str | None = option(
        None, "File with the key that makes the peer id; it is made if it does not exist. Two peers cannot share one."
    )
    bandwidth: float | None = option(
        None,
        "Mbit/s of this computer's link in its slower direction: its share of the averaging work follows it. 0: others "
        "do all of it. Left out: what is measured, or else what is usual in the group.",
    )
    startup_timeout: float = option(60.0, "Seconds that the network may take to start and to reach the first peer.")
    cache_dir: str = option("~/.cache/samiti", "Folder for the run's files and for prepared text.")

    def __post_init__(self) -> None:
        self.cache_dir = str(Path(self.cache_dir).expanduser())
        require(self.startup_timeout > 0, "startup_timeout", self.startup_timeout, "above 0")
        require(self.bandwidth is None or self.bandwidth >= 0, "bandwidth", self.bandwidth, "0 or more")
        auto_relay = self.use_auto_relay
        require(self.use_relay or not auto_relay, "use_auto_relay", auto_relay, "false unless use_relay is true")
        require(
            auto_relay or not self.trusted_relays,
            "trusted_relays", self.trusted_relays, "left out unless use_auto_relay is true",
        )  # fmt: skip

    def peer_options(self) -> dict[str, Any]:
        """The arguments of `collab.reachability.start_peer`."""
        others = ("bandwidth", "cache_dir", "organizer")
        options = {key: value for key, value in asdict(self).items() if key not in others}
        return options | {"client_mode": {"auto": None, "true": True, "false": False}[self.client_mode]}


@dataclass
class TrainerArguments:
    """A volunteer's machine."""

    _argument_group_name = "this computer's training"

    public_name: str = option("", "The name under which your contribution is listed. Empty: the end of the peer id.")
    device: str = option(
        "auto", "auto, cpu, cuda, mps, or several: cuda:0,cuda:1. auto takes all GPUs that are like the first one."
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Precision of the forward and backward pass. auto: bfloat16 on GPUs that have it, float16 on older "
        "ones, on CPUs float32 or bfloat16, whichever turns out faster.",
    )
    compile: Literal["auto", "try", "never"] = option(
        "auto",
        "Let torch.compile fuse the passes. auto: it is tried on GPUs, and kept if it gains a tenth; try: on CPUs as "
        "well, where it takes minutes and rarely gains.",
    )
    gradient_checkpointing: bool = option(
        False,
        "Compute each layer again in the backward pass instead of keeping it in memory: a small part of the memory, a "
        "third more computing. For GPUs on which a single sample does not fit.",
    )
    micro_batch_size: int = option(
        0,
        "Samples of seq_length tokens in one forward and backward pass, more if they are shorter; halved when memory "
        "runs out. 0: measured in the first seconds.",
    )
    threads: int = option(0, "CPU threads of the training step; 0 leaves it to PyTorch.")
    offload_optimizer: bool = option(False, "Keep the optimizer's state in RAM instead of in the GPU's memory.")
    save_dir: str | None = option(None, "Folder that gets this peer's last weights when it leaves.")

    def __post_init__(self) -> None:
        require(len(self.public_name) <= 40, "public_name", self.public_name, "at most 40 characters")
        require(self.micro_batch_size >= 0, "micro_batch_size", self.micro_batch_size, "0 (measured) or more")
        require(self.threads >= 0, "threads", self.threads, "0 or more")


@dataclass
class HostArguments:
    """The experts that a volunteer's machine serves."""

    _argument_group_name = "the experts that this computer serves, in a run with task: moe_mlm"

    serve_experts: int = option(
        0, "So many, of those that nobody serves yet. 0: a trainer serves none, run_expert_server.py 4."
    )
    expert_folder: str = option(
        "experts", "Folder in which they are saved; a server that is started again goes on with what is there."
    )
    expert_save_seconds: float = option(60.0, "Seconds from one saving of them to the next.")

    def __post_init__(self) -> None:
        require(0 <= self.serve_experts <= MAX_HOSTED, "serve_experts", self.serve_experts, f"from 0 to {MAX_HOSTED}")
        require(self.expert_save_seconds >= 1, "expert_save_seconds", self.expert_save_seconds, "at least 1")


@dataclass
class AuxArguments:
    """What the organizer's auxiliary peer reports and keeps."""

    _argument_group_name = "what the auxiliary peer reports and keeps"

    run_folder: str | None = option(None, "Folder for metrics, page and checkpoints. Left out: runs/RUN_ID.")
    report_to: list[str] = option(["trackio"], "Trackers: trackio, wandb, or none. metrics.jsonl is always written.")
    trackio_space: str | None = option(
        None,
        "Show Trackio's curves to everybody as well: ORG/NAME of a Space on the Hugging Face Hub, made if it does not "
        "exist, or the address of a Trackio server with its write_token. Needs trackio in report_to.",
    )
    page_port: int = option(
        8484, "TCP port at which the page is served; if it is taken, one of the next twenty. 0: page.html only."
    )
    page_host: str = option(
        "127.0.0.1", "Address that the page is served on: 127.0.0.1 for this computer only, 0.0.0.0 for everybody."
    )
    save_every: int = option(100, "Pull the state from the swarm and write a checkpoint every this many global steps.")
    keep_last: int = option(3, "So many of the newest checkpoints stay on the disk, each with 12 bytes per parameter.")
    keep_every: int = option(
        0, "Checkpoints whose global step is a multiple of this stay for good: the history of a run. 0: none do."
    )
    keep_best: int = option(1, "So many checkpoints with the smallest held-out loss stay, beside the others.")
    held_out_batches: int = option(
        8,
        "Batches of about 4096 tokens, of text that nobody trains on, on which each checkpoint is measured. More make "
        "the figures finer and take longer, on this computer alone (ALBERT-large on two cores: half a minute each). "
        "0: none.",
    )
    find_public_ip: bool = option(
        True,
        "Ask a public service for the address of this network, for the line that volunteers type. Only if the port is "
        "fixed, no interface has a public address, and announce_maddrs is left out.",
    )
    repo_id: str | None = option(None, "ORG/NAME on the Hugging Face Hub that checkpoints are uploaded to.")
    change_at_step: int | None = option(
        None, "Change the run that goes on: settings in which --config differs from it count from this global step on."
    )
    license: str = option("apache-2.0", "Licence of the trained model, for its card.")
    language: list[str] = option(["en"], "Language codes of the trained model, for its card.")

    def __post_init__(self) -> None:
        for name in self.report_to:
            require(name in ("trackio", "wandb", "none"), "report_to", self.report_to, "trackio, wandb or none")
        space = self.trackio_space
        require(
            space is None or "://" in space or space.count("/") == 1,
            "trackio_space", space, "ORG/NAME, or an address that begins with http:// or https://",
        )  # fmt: skip
        require(
            space is None or "trackio" in self.report_to,
            "trackio_space", space and space.partition("?")[0], "left out, or trackio added to report_to",
        )  # fmt: skip
        require(0 <= self.page_port <= 65535, "page_port", self.page_port, "a port from 1 to 65535, or 0 for none")
        require(is_ip(self.page_host), "page_host", self.page_host, "an IP address of this computer, or 0.0.0.0")
        for key in ("save_every", "keep_last"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        for key in ("keep_every", "keep_best", "held_out_batches"):
            require(getattr(self, key) >= 0, key, getattr(self, key), "0 or more")
        at = self.change_at_step
        require(at is None or at >= 1, "change_at_step", at, "at least 1")
        require(self.repo_id is None or self.repo_id.count("/") == 1, "repo_id", self.repo_id, "ORG/NAME")


TASK_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "mlm": (MLMArguments,),
    "image_classification": (ImageArguments,),
    "moe_mlm": (MLMArguments, ExpertArguments),
}
"""The arguments that each task has for itself."""
_OF_TASKS = dict.fromkeys(cls for classes in TASK_ARGUMENTS.values() for cls in classes)
AGREED: tuple[type, ...] = (RunArguments, *_OF_TASKS, OptimizerArguments, SwarmArguments)
CHANGEABLE = frozenset({
    "max_global_steps", "sources", "cleaning", "mask_probability", "seq_length_start", "seq_length_warmup_steps",
    "learning_rate", "min_learning_rate", "warmup_steps", "max_grad_norm", "target_batch_size", "average_state_every",
    "quorum", "failed_round", "rollback_after", "snapshot_every",
})  # fmt: skip
"""What the organizer can change while a run goes on: nothing has to be built anew for it."""
EVERYTHING: tuple[type, ...] = (*AGREED, PeerArguments, TrainerArguments, HostArguments, AuxArguments)


# ---- reading them ------------------------------------------------------------------------------------------------


def parse(description: str, classes: Iterable[Any], argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the command line and the YAML file named by --config.

    :param description: the first lines of --help.
    :param classes: the dataclasses whose fields this program has. A YAML file may hold keys of other programs too, so
      that one file describes a run for all of them.
    :returns: only what was given, checked for name and type: {argument: value}. `pick` turns it into dataclasses.
    :raises UserError: unknown key or flag (with near matches), wrong type, unreadable file.
    """
    parser = _Parser(
        tuple(classes),
        usage="%(prog)s [--config FILE.yaml] [options]",
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file whose keys are the arguments below; flags override it.")
    # Whatever is still `absent` after parsing was not on the command line: argparse fills in defaults only for
    # attributes that the namespace lacks.
    absent = object()
    namespace = Namespace(**{action.dest: absent for action in parser._actions if action.dest != "help"})
    parsed, unknown = parser.parse_known_args(argv, namespace)
    known = sorted(name for name in vars(parsed))
    for word in unknown:
        if word.startswith("-"):
            raise UserError(f"There is no option {word}.{_near(word.lstrip('-').split('=')[0], known, '--')}")
        raise UserError(f"{word!r} belongs to no option. Put the option's name in front of it; --help lists them.")
    given = {key: value for key, value in vars(parsed).items() if value is not absent}
    config = given.pop("config", None)
    from_file = read_config(Path(config)) if config is not None else {}
    return from_file | given


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's YAML file: every key is the name of an argument of some program, every value of its type."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        others = ", ".join(sorted(str(other) for other in path.parent.glob("*.yaml"))) or "none"
        raise UserError(f"There is no file {path}. YAML files in that folder: {others}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}. Mend the file and start again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings: it should be lines such as `run_id: my_run`.")
    return checked(content, EVERYTHING, str(path))


def checked(given: Mapping[str, Any], classes: Iterable[type], place: str) -> dict[str, Any]:
    """`given`, in which every key is the name of an argument and every value of its type.

    :param place: where they were given, for the person who reads what is wrong.
    :raises UserError: which one is not.
    """
    types_by_key = {key: hint for cls in classes for key, hint in get_type_hints(cls).items()}
    content = {}
    for key, value in given.items():
        if key not in types_by_key:
            raise UserError(f"{place}: there is no setting {key!r}.{_near(str(key), types_by_key)}")
        try:
            content[key] = _convert(value, types_by_key[key])
        except (TypeError, ValueError) as error:
            raise UserError(f"{place}: {key} is {value!r}, but it must be {_type_name(types_by_key[key])}.") from error
    return content


def pick(cls: type[T], given: Mapping[str, Any]) -> T:
    """Build dataclass `cls` from the keys of `given` that are its own; the others keep their defaults."""
    names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    own = {key: value for key, value in given.items() if key in names}
    for key, value in own.items():  # float("inf") is a number to argparse and YAML, but not to JSON
        require(not isinstance(value, float) or math.isfinite(value), key, value, "a finite number")
    return cls(**own)


def agreed_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings that peers have to agree on, defaults filled in: the settings of the run manifest."""
    known = {"preset": OptimizerArguments.preset, "task": RunArguments.task, **given}
    task = known["task"]
    find_task(task)  # refuses one that there is not
    its_own = TASK_ARGUMENTS.get(task, ())
    for other, classes in TASK_ARGUMENTS.items():
        keys = {f.name for cls in classes if cls not in its_own for f in fields(cls)}
        if foreign := sorted(keys & given.keys()):
            raise UserError(
                f"{', '.join(foreign)} belongs to the task {other}; this run's task is {task}. Leave it out."
            )
    require(known["preset"] in PRESETS, "preset", known["preset"], f"one of {', '.join(PRESETS)}")
    for cls in (RunArguments, SwarmArguments):
        pick(cls, known)  # refuses a batch or a length that nothing can be made of
    filled = fill_in(known, known.get("max_global_steps", RunArguments.max_global_steps))
    classes = RunArguments, *its_own, OptimizerArguments, SwarmArguments
    settings = {key: value for cls in classes for key, value in vars(pick(cls, filled)).items()}
    return dict(json.loads(json.dumps(settings)))  # as it will look to peers that receive it


def refuse_contradictions(given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """A peer that joins a run takes its settings from the swarm; refuse its own different ideas by name."""
    differing = [key for key in settings if key in given and given[key] != settings[key]]
    if differing:
        what = "; ".join(f"{key} = {given[key]!r}, but this run uses {settings[key]!r}" for key in differing)
        flags = ", ".join(f"--{key}" for key in differing)
        raise UserError(
            f"You gave {what}. Everybody in a run has to agree: leave out {flags} (or the line in the --config), or "
            f"start a run of your own without --initial_peers."
        )


def changes_between(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What `given` would change in a run that goes on.

    A learning rate that follows from the target batch goes on doing so.

    :raises UserError: nothing, something impossible, or something that cannot change.
    """
    before = dict(settings)
    if follows_rule(settings):
        del before["learning_rate"]
    wanted = agreed_settings({**before, **given})
    changed = {key: value for key, value in wanted.items() if value != settings[key]}
    if not changed:
        raise UserError("There is nothing to change: all settings are those of the run. Leave out --change_at_step.")
    fixed = sorted(changed.keys() - CHANGEABLE)
    if fixed:
        raise UserError(
            f"{', '.join(fixed)} cannot change while a run goes on; these can: {', '.join(sorted(CHANGEABLE))}. For "
            f"the others start a new run from the last checkpoint: another run_id, and --from."
        )
    return changed


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it was written."""


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message[0].upper()}{message[1:]}. --help lists every option.")


def _near(word: str, known: Iterable[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(word.replace("-", "_"), list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(prefix + match for match in matches)}?" if matches else " --help lists all."


def _convert(value: Any, hint: Any) -> Any:
    """Check a YAML value against a field's type. YAML 1.1 reads 1e-3 as text: it counts as a number here."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        return _convert(value, next(option for option in options if option is not type(None)))
    if origin is list:
        if not isinstance(value, list):
            raise TypeError("not a list")
        return [_convert(item, options[0]) for item in value]
    if origin is Literal:
        if isinstance(value, bool):  # `client_mode: true` in YAML, where a third choice is `auto`
            value = str(value).lower()
        if value not in options:
            raise ValueError("not one of the options")
        return value
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise TypeError("not a number")
        return float(value)
    if hint is YamlMapping:
        return YamlMapping(value)
    if type(value) is not hint:
        raise TypeError(f"not of type {hint}")
    return value


def _type_name(hint: Any) -> str:
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join("empty" if option is type(None) else _type_name(option) for option in options)
    if origin is list:
        return f"a list, each item {_type_name(options[0])}"
    if origin is Literal:
        return "one of " + ", ".join(map(str, options))
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(hint, "a mapping such as {embedded: true}, with dates in quotes")
