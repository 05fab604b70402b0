"""What a peer says about its speed."""

import pytest
import torch

from collab import speed as speed_module
from collab.speed import Speed, count_flops, peak_flops

GPU = torch.device("cuda", 0)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    at = [100.0]
    monkeypatch.setattr(speed_module.time, "monotonic", lambda: at[0])
    return at


def test_shares_and_rates_are_of_the_time_since_the_last_look(now):
    speed = Speed(flops_per_token=1e6, peak=1e9)
    for _ in range(2):  # the second time, nothing of the first is left
        for part, seconds in {"data": 1.0, "compute": 6.0, "averaging": 2.0}.items():
            with speed.part(part):
                now[0] += seconds
        now[0] += 1.0
        speed.add(3000)
        speed.add(2000)
        assert speed.take() == {
            "tokens": 5000,
            "tokens_per_second": pytest.approx(500.0),
            "mfu": pytest.approx(0.5),
            "data_wait": pytest.approx(0.1),
            "compute_share": pytest.approx(0.6),
            "averaging_wait": pytest.approx(0.2),
        }


def test_time_counts_even_if_memory_runs_out_in_it(now):
    speed = Speed()
    with pytest.raises(RuntimeError), speed.part("compute"):
        now[0] += 3.0
        raise RuntimeError
    now[0] += 1.0
    assert speed.take()["compute_share"] == pytest.approx(0.75)


def test_operations_are_those_of_the_products():
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))

    def call(batch: dict[str, torch.Tensor]) -> bool:
        model(batch["x"]).sum().backward()
        return True

    flops = count_flops(call, model, {"x": torch.ones(10, 8)})
    forward = 2 * 10 * (8 * 16 + 16 * 4)
    assert flops == 3 * forward - 2 * 10 * 8 * 16  # nobody asks for the gradient of the input


def test_attention_is_counted_as_well():
    def attend(batch: dict[str, torch.Tensor]) -> bool:
        x = layer(batch["x"]).view(1, 2, 32, 8)
        torch.nn.functional.scaled_dot_product_attention(x, x, x).sum().backward()
        return True

    layer = torch.nn.Linear(8, 8)
    flops = count_flops(attend, layer, {"x": torch.ones(64, 8)})
    assert flops == 2 * 2 * 64 * 8 * 8 + 3 * 2 * 2 * (2 * 32 * 32 * 8)


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("Tesla T4", 65), ("Tesla P100-PCIE-16GB", 18.7), ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112),
        ("NVIDIA A100-SXM4-40GB", 312), ("NVIDIA A10", 125), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA L4", 121), ("NVIDIA L40S", 0), ("NVIDIA A10G", 0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 0), ("Quadro P400", 0),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_data_sheet_or_unknown(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops([GPU], torch.bfloat16) == pytest.approx(teraflops * 1e12)
    assert peak_flops([GPU, GPU], torch.float16) == pytest.approx(2 * teraflops * 1e12)
    assert peak_flops([GPU], torch.float32) == 0


def test_the_peak_of_a_cpu_is_unknown():
    assert peak_flops([torch.device("cpu")], torch.bfloat16) == 0
