"""Real processes for the tests, and what is made once however many workers run the tests."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock
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


def shared_folder(tmp_path_factory, name):
    """Return a folder that the workers share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    (folder / name).mkdir(exist_ok=True)
    return folder / name


@contextmanager
def one_at_a_time(path):
    """Wait for the workers before this one."""
    with FileLock(path):
        yield


def launched(tmp_path_factory, script):
    """Return what each of two processes of a script found, and the folder of its checkpoints."""
    folder = shared_folder(tmp_path_factory, Path(script).stem)
    with one_at_a_time(folder / "lock"):
        if not (folder / "rank0.pt").exists():
            _launch(folder, script)
    return _found(folder), folder


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


def _found(folder):
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]
