"""One store and several processes: who holds it, what is left in it, what a broken file hides."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch

import mirrorflow.lab.framework as ex
from mirrorflow.lab import report
from mirrorflow.lab import sweep as sw
from mirrorflow.lab.framework import contract, held, hold, recorder, run_lock, storage
from test_cli import call
from test_experiments import Toy, ToyConfig

QUICK = "fig09_fig11_fig14_legendre"
LOCKED = """
    import sys, pathlib, time
    from mirrorflow.lab.framework import hold
    with hold(pathlib.Path(sys.argv[1]), print):
        print("held", flush=True)
        time.sleep(6000)
"""


@pytest.fixture
def other():
    """Hold locks in other processes until they are killed."""
    processes = []

    def start(lock):
        command = [sys.executable, "-c", textwrap.dedent(LOCKED), str(lock)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


# --- Locks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "package", ["mirrorflow.lab", pytest.param("mirrorflow", marks=pytest.mark.slow)]
)
def test_every_module_works_where_there_is_no_fcntl(package, tmp_path):
    code = """
        import importlib, pkgutil, sys, warnings
        warnings.simplefilter("ignore")  # filelock warns that it locks by the file alone
        sys.modules["fcntl"] = None
        package = importlib.import_module(sys.argv[1])
        for module in pkgutil.walk_packages(package.__path__, f"{sys.argv[1]}.", onerror=print):
            if not module.name.endswith("__main__"):
                try:
                    importlib.import_module(module.name)
                except ModuleNotFoundError as error:
                    if "fcntl" in str(error) or error.name.startswith("mirrorflow"):
                        raise
        from pathlib import Path
        from mirrorflow.lab.framework import held, hold
        lock = Path(sys.argv[2], "lock")
        with hold(lock, print):
            assert held(lock)
        assert not held(lock)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), package, str(tmp_path)],
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_a_lock_goes_with_its_process_and_says_meanwhile_whose_it_is(tmp_path, other):
    lock, told = tmp_path / "locks" / "a", []
    assert not held(lock)
    process = other(lock)
    assert held(lock)

    def busy(holder):
        told.append(holder)
        process.kill()

    with hold(lock, busy):
        assert held(lock)
    assert told == [f"process {process.pid} on the machine {storage.platform.node()}"]
    assert not held(lock) and [p.name for p in lock.parent.iterdir()] == ["a"]


def test_who_may_not_try_a_lock_believes_its_note(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(errno.EROFS, "Read-only file system")

    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setattr(storage.FileLock, "acquire", refused)
    assert not held(lock)
    (tmp_path / "lock.holder").touch()
    assert held(lock)


@pytest.mark.parametrize("fails", [False, True])
def test_a_second_run_of_a_configuration_waits_for_the_first_and_says_for_whom(tmp_path, fails):
    first, second, told = Toy(), Toy(), []
    waits, go = threading.Event(), threading.Event()

    def compute(i, recorder):
        waits.set()
        assert go.wait(600)
        if fails:
            raise OSError("gone")
        return Toy.compute(first, i, recorder)

    def tell(done, total, label):
        told.append(label)
        go.set()

    def run_first():
        try:
            ex.execute(first, ToyConfig(), tmp_path)
        except OSError as error:
            assert fails and str(error) == "gone"

    first.compute = compute
    thread = threading.Thread(target=run_first)
    thread.start()
    assert waits.wait(600)
    folder = ex.execute(second, ToyConfig(), tmp_path, progress=tell)
    thread.join()
    assert told[0].startswith(f"waits for process {os.getpid()} on the machine ")
    assert (first.computed, second.computed) == (([], [0, 1, 2]) if fails else ([0, 1, 2], []))
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "result.json", "trajectory.npz",
    }  # fmt: skip


def run_twice(out):
    command = [sys.executable, "-m", "mirrorflow", "run", QUICK, "--preset", "smoke"]
    both = [
        subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=1200)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    (folder,) = {p.parent for p in out.glob("*/*/config.json")}
    assert not (folder / "failure.json").exists()
    assert not [p for p in out.rglob(".*") if p.name != ".locks"]
    return ex.find_results(out)


@pytest.mark.slow
def test_two_commands_with_one_configuration_end_well(tmp_path):
    assert [len(run_twice(tmp_path / str(i))) for i in range(5)] == [1] * 5


def test_a_sweep_waits_for_a_run_of_one_of_its_configurations(tmp_path, other):
    study = sw.Study(experiment=QUICK, preset="smoke", grid={"points": [21]})
    (_, config) = study.configurations()[0]
    folder, told = ex.result_folder(study.module, config, tmp_path), []
    process = other(run_lock(folder))

    def watch(progress):
        told.extend(label for _, _, label in progress.running.values())
        if told and f"waits for process {process.pid}" in told[-1]:
            assert [run.state for run in sw.status(folder.parent)] == ["running"]
            process.kill()

    assert sw.sweep(study, tmp_path, workers=1, watch=watch).complete
    assert any("waits for process" in label for label in told)
    assert [run.state for run in sw.status(folder.parent)] == ["finished"]


# --- What is left behind --------------------------------------------------------------------------


def test_drafts_of_killed_runs_are_removed_by_the_next(tmp_path):
    toy = Toy()
    toy.fails = {2: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        ex.execute(toy, ToyConfig(), tmp_path)
    folder = ex.result_folder(toy, ToyConfig(), tmp_path)
    left = [folder / ".failure.json.4711", folder / "parts" / ".part2.npz.1", folder / ".own.txt"]
    for path in left:
        path.write_text("half")
    write, seen = recorder.write_arrays, []

    def watched(path, arrays):
        seen.append([p.exists() for p in left])
        write(path, arrays)

    toy.fails, toy.compute = {}, lambda i, recorder: watched(folder / "x.npz", {}) or ex.Part()
    ex.execute(toy, ToyConfig(), tmp_path)
    assert seen == [[False, False, True]]  # what is not named like a draft stays


@pytest.mark.parametrize("name", ["write_json", "write_arrays", "save"])
def test_a_full_disk_leaves_no_drafts_and_raises_its_own_error(tmp_path, monkeypatch, name):
    class Full:
        def __init__(self, stream):
            self.stream = stream

        def __getattr__(self, name):
            return getattr(self.stream, name)

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = Path.open

    class OnFullDisk:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return Full(self.stream)

        def __exit__(self, *_):
            self.stream.close()

    monkeypatch.setattr(Path, "open", lambda path, *mode: OnFullDisk(opened(path, *mode)))
    line = ex.Timeline({}, np.zeros(3))
    writes = {
        "write_json": lambda: ex.write_json(tmp_path / "a.json", {}),
        "write_arrays": lambda: recorder.write_arrays(tmp_path / "a.npz", {"a": np.zeros(3)}),
        "save": lambda: ex.Checkpoints(tmp_path).save(line, 1, {"a": torch.zeros(3)}),
    }
    with pytest.raises(OSError, match="No space left on device") as raised:
        writes[name]()
    assert raised.value.errno == errno.ENOSPC and list(tmp_path.iterdir()) == []


def test_the_first_error_is_raised_where_even_the_failure_cannot_be_written(tmp_path, monkeypatch):
    toy, write = Toy(), contract.write_json

    def full(path, content):
        if path.name == "failure.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(contract, "write_json", full)
    toy.fails = {1: RuntimeError("the cause")}
    with pytest.raises(RuntimeError, match="the cause"):
        ex.execute(toy, ToyConfig(), tmp_path)


# --- Broken files ---------------------------------------------------------------------------------

GOOD = {
    "format": 1, "experiment": "toy", "hash": "0" * 12, "config": {}, "seconds": 1.0,
    "started": "2026-01-01T00:00:00+00:00", "records": [{"x": 1.0}], "meta": {},
}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x00" * 100, b"\xff\xfe", b"[]", b"1", b"{", b"[" * 100_000, b"{}",
        *(json.dumps({**GOOD, key: None}).encode() for key in GOOD),
        json.dumps({**GOOD, "records": [1]}).encode(),
    ],
)  # fmt: skip
def test_a_broken_result_is_named_hides_no_other_and_is_computed_again(tmp_path, content):
    toy, told = Toy(), []
    good = ex.execute(Toy(), ToyConfig(n=1), tmp_path)
    bad = ex.execute(Toy(), ToyConfig(n=2), tmp_path)
    (bad / "result.json").write_bytes(content)
    assert [r["folder"] for r in ex.find_results(tmp_path, told.append)] == [good]
    assert len(told) == 1 and told[0].startswith(f"{bad / 'result.json'} must be the result of")
    ex.execute(toy, ToyConfig(n=2), tmp_path)
    assert toy.computed == [0, 1, 2] and len(ex.find_results(tmp_path)) == 2


def test_list_and_report_name_what_is_broken_and_show_the_rest(
    monkeypatch, capsys, tmp_path, smoke
):
    folder = smoke(QUICK)[1]
    home = tmp_path / QUICK
    shutil.copytree(folder, home / folder.name)
    (home / "empty").mkdir()
    (home / "empty" / "result.json").touch()
    shutil.copytree(folder, home / "curveless")
    result = json.loads((folder / "result.json").read_text())
    for key, change in (("curveless", {}), ("stranger", {"experiment": "fig99"})):
        (home / key).mkdir(exist_ok=True)
        (home / key / "result.json").write_text(json.dumps({**result, "hash": key, **change}))
    (home / "curveless" / "trajectory.npz").write_bytes(b"")
    shown = []
    monkeypatch.setattr(report, "build", lambda sections, *_: shown.extend(sections))
    assert call(monkeypatch, "list", "--out", tmp_path) == 0
    said = capsys.readouterr()
    assert f"results in {tmp_path}: 2" in " ".join(said.out.split())
    assert said.err.count("\n") == 1 and str(home / "empty" / "result.json") in said.err
    assert call(monkeypatch, "report", tmp_path) == 0
    said = capsys.readouterr()
    assert [section.result["hash"] for section in shown] == [folder.name]
    for name in ("empty", "curveless", "stranger"):
        assert str(home / name) in said.err


@pytest.mark.slow
def test_a_sweep_says_which_result_is_broken_and_runs_it_again(tmp_path):
    study = sw.Study(experiment=QUICK, preset="smoke", grid={"points": [21, 31]})
    assert sw.sweep(study, tmp_path, workers=1).complete
    broken = next(tmp_path.glob("*/*/result.json"))
    broken.write_text("")
    states = {run.key: run for run in sw.status(tmp_path / QUICK)}
    assert states[broken.parent.name].state == "broken"
    assert str(broken) in states[broken.parent.name].detail
    assert sw.plan(study, tmp_path).done == 1
    (tmp_path / QUICK / "sweep.json").write_text("")
    with pytest.raises(ValueError, match=r"sweep.json must be the plan of a sweep, got none"):
        sw.status(tmp_path / QUICK)


# --- Folders that cannot be written ---------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "sweep", "list"])
def test_an_out_that_is_a_file_is_a_sentence(monkeypatch, capsys, tmp_path, command):
    out = tmp_path / "file"
    out.touch()
    study = tmp_path / "study.toml"
    study.write_text(f'experiment = "{QUICK}"\npreset = "smoke"\n')
    what = {"run": [QUICK, "--preset", "smoke"], "sweep": [study], "list": []}[command]
    assert call(monkeypatch, command, *what, "--out", out) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(out) in said and "must be" in said


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "No space left on device. Make room and give the same command again."),
        (errno.EROFS, "Read-only file system. Give another place by --out"),
        (errno.EACCES, "Permission denied. Give another place by --out"),
    ],
)
def test_a_folder_that_takes_nothing_is_a_sentence(monkeypatch, capsys, tmp_path, number, said):
    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.os, "fsync", refused)
    assert call(monkeypatch, "run", QUICK, "--preset", "smoke", "--out", tmp_path) == 2
    err = capsys.readouterr().err
    assert err.startswith("mirrorflow: ") and err.count("\n") == 1
    assert str(tmp_path) in err and said in err
    monkeypatch.undo()
    assert not [p for p in tmp_path.rglob(".*") if p.name != ".locks"]


def test_a_finished_run_is_found_in_a_folder_that_takes_nothing(tmp_path, monkeypatch):
    folder = ex.execute(Toy(), ToyConfig(), tmp_path)

    def refused(*args, **kwargs):
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(contract, "hold", refused)
    assert ex.execute(Toy(), ToyConfig(), tmp_path) == folder


# --- Long logs and clocks -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_long_log_is_resumed_in_little_memory(tmp_path):
    toy, lines = Toy(), 100_000
    toy.fails = {1: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        ex.execute(toy, ToyConfig(), tmp_path)
    log = ex.result_folder(toy, ToyConfig(), tmp_path) / "metrics.partial.jsonl"
    kept = b'{"part": "part0", "loss": 0.123}\n' * lines
    cut = b'{"part": "pa\n[1]\n' + b'{"part": "part1"}\n' * 10 + b'{"part": "part0"'
    log.write_bytes(kept + cut)
    toy.fails = {}
    tracemalloc.start()
    try:
        folder = ex.execute(toy, ToyConfig(), tmp_path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (folder / "metrics.jsonl").read_bytes().startswith(kept)
    rest = (folder / "metrics.jsonl").read_bytes()[len(kept) :]
    assert [json.loads(line)["part"] for line in rest.splitlines()] == ["part1", "part2"]
    assert most < 0.2 * len(kept)


def test_a_clock_that_jumps_back_changes_no_duration(tmp_path, monkeypatch):
    class Clock(datetime):
        years = iter([2026, 1999, 1970])

        @classmethod
        def now(cls, tz=None):
            return datetime(next(cls.years), 1, 1, tzinfo=UTC)

    monkeypatch.setattr(contract, "datetime", Clock)
    for n in (1, 2):
        ex.execute(Toy(), ToyConfig(n=n), tmp_path)
    results = ex.find_results(tmp_path)
    assert [r["started"][:4] for r in results] == ["1999", "2026"]
    assert all(0 <= r["seconds"] < 600 for r in results)
