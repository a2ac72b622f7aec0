"""Two real processes for the tests, started once however many workers run the tests."""

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

WORLD, LIMIT = 2, 1200  # seconds: only what hangs is stopped


@contextmanager
def one_thread():
    """Compute as a worker with one thread does, to the bit; give the threads back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def launched(tmp_path_factory, script):
    """Return what each process of a script found, and the folder of its checkpoints."""
    name = Path(script).stem
    if "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tmp_path_factory.mktemp(name)
        return _launch(folder, script), folder
    folder = tmp_path_factory.getbasetemp().parent / name  # shared by the workers
    try:
        folder.mkdir()
    except FileExistsError:  # another worker is at it
        return _waited(folder), folder
    return _launch(folder, script), folder


def _launch(folder, script):
    """Run all cases in two processes; whatever happens, none is left behind."""
    path = str(Path(__file__).with_name(script))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, path, str(rank), str(WORLD), str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(said)
    return _found(folder)


def _waited(folder):
    """Return what another worker's processes find."""
    limit = time.monotonic() + LIMIT
    while not all((folder / f"rank{rank}.pt").exists() for rank in range(WORLD)):
        assert time.monotonic() < limit, "the processes of another worker have found nothing"
        time.sleep(0.1)
    return _found(folder)


def _found(folder):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]
