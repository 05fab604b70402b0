"""The volunteer's notebook, run by a real kernel against a real swarm."""

import asyncio
import json
import time

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.util import ensure_async

from collab.trackers import read_history
from tests.swarm.conftest import Swarm
from tests.swarm.processes import LOOPBACK, ROOT

pytestmark = pytest.mark.swarm

CALL = "join(INITIAL_PEERS, PUBLIC_NAME)"
LAST_STEP = 8


def test_run_all_stop_and_run_all_again(swarm: Swarm) -> None:
    auxiliary, address = swarm.start_auxiliary(swarm.configure(max_global_steps=LAST_STEP, target_batch_size=1024))
    notebook = nbformat.read(swarm.folder / "run" / "volunteer.ipynb", as_version=4)
    *before, last = notebook.cells
    assert len(notebook.cells) <= 3 and address in last.source and CALL in last.source
    here = [*LOOPBACK, "--cache_dir", str(swarm.cache_dir), "--threads", "1"]
    last.source = last.source.replace(CALL, f"status = join(INITIAL_PEERS, 'Asha', *{here}); status")

    async def run_all_stop_and_run_all_again() -> tuple[str, str]:
        client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}})
        async with client.async_setup_kernel():

            async def run_all(stop: bool) -> str:
                for index, cell in enumerate(before):
                    await client.async_execute_cell(cell, index)
                running = asyncio.create_task(client.async_execute_cell(last, len(before)))
                deadline = time.monotonic() + 60
                while stop and not read_history(swarm.folder / "run" / "metrics.jsonl"):
                    assert time.monotonic() < deadline, auxiliary.output()
                    await asyncio.sleep(0.1)
                if stop:
                    assert not running.done()
                    assert client.km is not None
                    await ensure_async(client.km.interrupt_kernel())
                await running
                return json.dumps(last.outputs)

            return await run_all(stop=True), await run_all(stop=False)

    stopped, completed = asyncio.run(run_all_stop_and_run_all_again())
    for output in (stopped, completed):
        assert "samples given to the common model" in output and "Thank you!" in output and "Asha" in output
        assert '"text/plain": "0"' in output, "it left in good order"
    assert "Leaving the swarm" in stopped and f"step {LAST_STEP}/{LAST_STEP}" not in stopped
    assert f"step {LAST_STEP}/{LAST_STEP}" in completed
    assert auxiliary.wait() == 0, auxiliary.output()


def test_the_notebook_holds_no_output_and_no_address() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "volunteer.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert "/p2p/Q" not in json.dumps(notebook) and json.dumps(notebook).count("ADDRESS") == 1
