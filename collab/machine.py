"""Whether this computer is fit to take part: its packages, device, memory, disk and limits, each as a finding."""

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from collab.codecs import CODECS
from collab.device import pick_devices, pick_precision
from collab.diagnosis import Finding, Verdict
from collab.files import make_folder
from collab.selftest import OPEN_FILES, check_codecs, possible_files, too_few_files

GB = 10**9
PROCESSES = GB  # of RAM for Python, torch and hivemind's processes; 0.8 were measured
MEMORY_WANTED = 2 * PROCESSES  # without knowing the model
SHARED_MEMORY = Path("/dev/shm")
SHARED_WANTED = GB  # Docker gives 64 MB
DISK_WANTED, DISK_NEEDED = 5 * GB, GB // 2

# Float32 values for each parameter of the model, over all processes of a trainer. On the device: weights, gradients,
# their sum over micro-batches, and the optimizer's two moments. In RAM of a CPU trainer that is 5, and two buffers of
# the averaging; measured with LAMB and float32 on the wire: 8 at most alone, 10 in a round, 9 while it takes over a
# state, 10.5 while it hands one out, which puts 3 more in shared memory. tests/swarm/test_memory.py holds them to it.
VALUES_ON_DEVICE = 5
VALUES_IN_MEMORY = 11
VALUES_IN_SHARED_MEMORY = 8


def check_packages(requirements: Path) -> Finding:
    """Whether what is installed is what `requirements` pins."""
    pinned = [
        line.partition("#")[0].strip().split("==") for line in requirements.read_text().splitlines() if "==" in line
    ]
    differing = []
    for name, wanted in pinned:
        try:
            here = version(name).partition("+")[0]  # "2.13.0+cpu" and "2.13.0" are the same code
        except PackageNotFoundError:
            here = "not installed"
        if here != wanted:
            differing.append(f"{name}: {here}, but {wanted} is pinned")
    python = ".".join(map(str, sys.version_info[:3]))
    if differing:
        advice = "Type `make setup`, then `source .venv/bin/activate`, and start again."
        return Finding("packages", "failed", f"Python {python}; {'; '.join(differing)}.", advice)
    return Finding("packages", "ok", f"Python {python}, and the {len(pinned)} pinned packages.")


def check_codecs_here() -> Finding:
    """Whether every codec that a run may use gives back what was put in. :raises UserError: which one does not."""
    check_codecs(list(CODECS))
    return Finding("codecs", "ok", f"{', '.join(CODECS)} give back what was put in.")


def check_device(name: str, precision: str, parameters: int = 0) -> Finding:
    """What the trainer would compute on.

    :param parameters: of the model; 0 if it is not known.
    :raises UserError: there is no such device.
    """
    devices = pick_devices(name)
    device, more = devices[0], f", and {len(devices) - 1} more like it" if len(devices) > 1 else ""
    dtype = str(pick_precision(precision, device)).removeprefix("torch.")
    if device.type != "cuda":
        what = f"{device}, {os.cpu_count()} cores" if device.type == "cpu" else str(device)
        how = "the faster of float32 and bfloat16" if device.type == "cpu" and precision == "auto" else dtype
        return Finding("device", "ok", f"{what}, computing in {how}.")
    free, total = torch.cuda.mem_get_info(device)
    what = f"{torch.cuda.get_device_name(device)} with {_gb(total)}, {_gb(free)} free{more}, computing in {dtype}"
    needed = 4 * VALUES_ON_DEVICE * parameters
    if needed > free:
        advice = "End other programs on the GPU, give another --device, or keep a part in RAM with --offload_optimizer."
        return Finding("device", "failed", f"{what}; this model takes {_gb(needed)} without activations.", advice)
    return Finding("device", "ok", f"{what}.")


def check_memory(parameters: int = 0) -> Finding:
    """RAM, of the whole computer.

    :param parameters: of the model; 0 if it is not known.
    """
    memory = psutil.virtual_memory()
    needed = 4 * VALUES_IN_MEMORY * parameters + PROCESSES
    what = f"{_gb(memory.available)} of {_gb(memory.total)} RAM are free"
    if parameters and needed > memory.available:
        return Finding(
            "memory",
            "failed",
            f"{what}, but this model and what is averaged of it take about {_gb(needed)}, without activations.",
            "End other programs, or join with a computer that has more memory.",
        )
    if memory.available < MEMORY_WANTED:
        advice = "End other programs, and give a smaller --micro_batch_size if memory runs out."
        return Finding("memory", "warning", f"{what}, which is little for training.", advice)
    return Finding("memory", "ok", f"{what}.")


def check_shared_memory(parameters: int = 0, folder: Path = SHARED_MEMORY) -> Finding:
    """Processes hand tensors to each other through this folder's memory; a container may have very little of it.

    :param parameters: of the model; 0 if it is not known.
    """
    if not folder.exists():  # macOS does without
        return Finding("shared memory", "ok", "This system has no limit of its own for it.")
    space = shutil.disk_usage(folder)
    needed = 4 * VALUES_IN_SHARED_MEMORY * parameters
    what = f"{_gb(space.free)} of {_gb(space.total)} are free in {folder}"
    advice = (
        f"In Docker give `--shm-size {max(2, round(1.5 * needed / GB))}g` (or `--ipc=host`); elsewhere, as root: "
        f"mount -o remount,size={max(2, round(1.5 * needed / GB))}G {folder}"
    )
    if needed > space.free:
        return Finding("shared memory", "failed", f"{what}, but averaging this model takes {_gb(needed)}.", advice)
    if space.free < SHARED_WANTED:
        return Finding("shared memory", "warning", f"{what}; peers keep their tensors there.", advice)
    return Finding("shared memory", "ok", f"{what}.")


def check_disk(folder: Path) -> Finding:
    """Room for prepared text, tokenizers and checkpoints. :raises UserError: `folder` cannot be written."""
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    advice = "Free some space, or give another --cache_dir."
    if free < DISK_WANTED:
        verdict: Verdict = "failed" if free < DISK_NEEDED else "warning"
        return Finding("disk", verdict, f"Only {_gb(free)} are free at {folder}.", advice)
    return Finding("disk", "ok", f"{_gb(free)} are free at {folder}.")


def check_open_files() -> Finding:
    possible = possible_files()
    if possible < OPEN_FILES:
        return Finding.of_error("open files", ValueError(too_few_files(possible)), "warning")
    return Finding("open files", "ok", f"This peer can open {possible:,} files.")


def _gb(size: float) -> str:
    return f"{size / GB:.1f} GB"
