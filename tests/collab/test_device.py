"""Which device and which precision a peer computes in."""

import pytest
import torch

from collab.device import in_words, pick_devices, pick_precision
from collab.errors import UserError
from collab.metrics import MAX_DEVICE

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_a_device_is_named_in_public_in_a_few_words(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 3060")
    assert in_words([torch.device("cpu")]) == "cpu, 2 threads"
    gpus = [torch.device("cuda", index) for index in range(2)]
    assert in_words(gpus[:1]) == "cuda NVIDIA GeForce RTX 3060"
    assert in_words(gpus) == "cuda 2 x NVIDIA GeForce RTX 3060" and in_words([torch.device("mps")]) == "mps"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "x" * 500)
    assert len(in_words(gpus)) == MAX_DEVICE


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "mps:x", "cuda:-1"])
def test_a_device_that_is_not_there_is_refused_by_its_name(name):
    for names in (name, f"cpu,{name}"):
        with pytest.raises(UserError) as caught:
            pick_devices(names)
        message = str(caught.value)
        assert repr(name) in message and "--device" in message and "\n" not in message


def test_auto_is_the_cpu_where_there_is_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_devices("auto") == [CPU]


def test_auto_takes_the_gpus_that_are_like_the_first(monkeypatch):
    names = ["Tesla T4", "Tesla T4", "Quadro P400"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    assert pick_devices("auto") == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_named_devices_are_taken():
    assert pick_devices("cpu") == [CPU]
    assert pick_devices("cpu, cpu") == [CPU, CPU]


@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        pytest.param((6, 0), torch.float16, id="P100"),
        pytest.param((7, 5), torch.float16, id="T4"),
        pytest.param((8, 0), torch.bfloat16, id="A100"),
        pytest.param((8, 6), torch.bfloat16, id="RTX 3090"),
        pytest.param((9, 0), torch.bfloat16, id="H100"),
        pytest.param((12, 0), torch.bfloat16, id="RTX 5090"),
    ],
)
def test_the_precision_follows_what_the_gpu_computes_in(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision("auto", CUDA) is precision


def test_other_devices_compute_in_float32():
    assert pick_precision("auto", CPU) is torch.float32
    assert pick_precision("auto", torch.device("mps")) is torch.float32


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_wish_is_granted(name):
    for device in (CPU, CUDA):
        assert pick_precision(name, device) is getattr(torch, name)


def test_a_run_can_rule_precisions_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert pick_precision("auto", CUDA, ["float32", "bfloat16"]) is torch.float32
    with pytest.raises(UserError, match=r"not computed in float16.*float32 or bfloat16"):
        pick_precision("float16", CUDA, ["float32", "bfloat16"])
