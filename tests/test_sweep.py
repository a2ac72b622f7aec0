"""Sweeps: what is shared, that nothing is lost, what is said of what fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import mirrorflow.lab.framework as ex
from commands import call
from mirrorflow.lab import sweep as sw
from mirrorflow.lab.experiments.networks import tab02_fig03b_fig13_vit as tab02
from processes import one_thread

HERE = Path(__file__).parent
SMALL = {"loops": False, "times": [], "decays": [2.0], "steps": 12, "every": 4, "validation": 20}
SHARING = sw.Study(
    experiment=tab02.NAME, preset="smoke", seeds=(0,), set=SMALL, grid={"off": [4, 8]}
)
QUICK = sw.Study(
    experiment="fig02_matrix_sensing", preset="smoke", grid={"start": [0.1, 0.2, 0.3]}, seeds=(0,),
    set={"steps": 40, "switch": 20, "grid_alphas": [], "commuting_time": 10.0},
)  # fmt: skip

ONE = QUICK.model_copy(update={"grid": {"start": [0.1]}})


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Workers compute as this process does, to the bit, and import the observers of the tests."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    with one_thread():
        yield


def records(out, name):
    return {r["hash"]: r["records"] for r in ex.find_results(out) if r["experiment"] == name}


# --- What there is to do --------------------------------------------------------------------------


def test_a_study_is_its_grid_its_list_and_its_seeds():
    study = sw.Study(
        experiment="fig02_matrix_sensing", preset="smoke", set={"start": 0.2},
        grid={"n": [4, 5], "r": [1, 2]}, runs=[{"n": 6}], seeds=(0, 1),
    )  # fmt: skip
    found = study.configurations()
    assert len(found) == (4 + 1) * 2
    assert found[0][0] == {"n": 4, "r": 1, "seed": 0} and found[-1][0] == {"n": 6, "seed": 1}
    assert {c.start for _, c in found} == {0.2} and found[1][1].seeds == (1,)
    alone = sw.Study(experiment="fig02_matrix_sensing", runs=[{"n": 6}, {"n": 6}])
    assert len(alone.configurations()) == 1  # the same configuration once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experiment = ", "is not TOML"),
        ("preset = 'cpu'", "experiment: Field required"),
        (
            "experiment = 'fig02_matrix_sensing'\ngird = {n = [1]}",
            "gird: Extra inputs.*a study has",
        ),
        ("experiment = 'fig99'", "got 'fig99'"),
        ("experiment = 'fig02_matrix_sensing'\n[grid]\nm = [1]\nk = [2]", "unknown key 'k'"),
        ("experiment = 'fig02_matrix_sensing'\n[grid]\nn = []", "no values for n"),
        ("experiment = 'fig02_matrix_sensing'\n[grid]\nn = [3, -1]", "n: Input should be"),
        ("experiment = 'fig02_matrix_sensing'\nruns = [1, 2, 3, 4, 5, 6, 7]", "; and 2 more"),
        (
            f"experiment = 'fig02_matrix_sensing'\nseeds = [0, 1]\n[grid]\nn = {[4] * 6000}",
            "at most 10,000 configurations, got 12,000",
        ),
    ],
)
def test_a_bad_study_is_refused_before_anything_runs(text, message, tmp_path):
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        sw.plan(sw.Study.read(tmp_path / "study.toml"), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["study.toml"]


def test_the_plan_trains_what_is_shared_once(tmp_path):
    todo = sw.plan(SHARING, tmp_path)
    trunks = [job for job in todo.jobs if job.line]
    runs = [job for job in todo.jobs if not job.line]
    # Two configurations, each: constant, off, half, budget, none. Shared: constant, half and none
    # to their ends (12), and constant to step 4, where the first is switched off, and 8.
    assert sorted(job.until for job in trunks) == [4, 8, 12, 12, 12]
    assert todo.steps == (120, 120 - 4 - 8 - 12 - 12 - 12)
    assert str(todo) == (
        "2 configurations, 0 of them finished; 120 training steps one by one, 72 with shared "
        "beginnings: 40% saved"
    )
    order = [job.key for job in todo.jobs]
    for job in todo.jobs:
        assert all(order.index(key) < order.index(job.key) for key in job.needs)
    assert {key for job in runs for key in job.needs} == {job.key for job in trunks}


def test_pretraining_comes_before_all_that_stands_on_it(tmp_path):
    study = sw.Study(
        experiment="tab03_fig03a_lora", preset="smoke", seeds=(0, 1), grid={"off": [8, 12]},
        set={"loops": False, "times": []},
    )  # fmt: skip
    todo = sw.plan(study, tmp_path)
    first = todo.jobs[0]
    assert first.line == "pretraining" and first.until == 10 and first.needs == ()
    assert all(first.key in job.needs for job in todo.jobs[1:])
    assert sum(job.line == "pretraining" for job in todo.jobs) == 1


def test_experiments_that_do_not_train_have_runs_alone(tmp_path):
    todo = sw.plan(QUICK, tmp_path)
    assert len(todo.jobs) == 3 and todo.steps == (0, 0)
    assert str(todo) == "3 configurations, 0 of them finished"


# --- Results --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Run the configurations one by one, without sharing anything."""
    out = tmp_path_factory.mktemp("alone")
    with one_thread():
        for _, config in SHARING.configurations():
            ex.execute(tab02, config, out)
    return records(out, tab02.NAME)


def test_a_sweep_has_the_results_of_runs_one_by_one_bit_for_bit(tmp_path, alone):
    outcome = sw.sweep(SHARING, tmp_path, workers=2)
    assert outcome.complete and records(tmp_path, tab02.NAME) == alone
    assert not (tmp_path / ".trunks" / tab02.NAME).exists()
    assert {run.state for run in sw.status(tmp_path / tab02.NAME)} == {"finished"}


def test_finished_runs_are_never_run_again(tmp_path):
    sw.sweep(QUICK, tmp_path, workers=1)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*/result.json")}
    seen = []
    wider = QUICK.model_copy(update={"grid": {"start": [0.2, 0.3, 0.4]}})
    outcome = sw.sweep(wider, tmp_path, workers=1, watch=seen.append)
    assert outcome.plan.done == 2 and len(outcome.plan.jobs) == 1
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert len(list(tmp_path.glob("*/*/result.json"))) == 4
    assert seen[-1].finished == 3 and seen[-1].failed == 0 and seen[-1].left() == 0


def test_a_run_that_gives_nan_is_listed_and_the_others_go_on(tmp_path):
    study = SHARING.model_copy(update={"grid": {"lr": [1e-3, 1e9]}})
    outcome = sw.sweep(study, tmp_path, workers=2)
    assert list(outcome.failed) == ["lr=1000000000.0, seed=0"]
    assert "ArithmeticError: the training loss is" in outcome.failed["lr=1000000000.0, seed=0"]
    states = {r.changes["lr"]: r for r in sw.status(tmp_path / tab02.NAME)}
    assert states[1e-3].state == "finished" and states[1e9].state == "failed"
    assert "training loss" in states[1e9].detail


@pytest.mark.slow
def test_what_needs_a_beginning_that_failed_fails_with_its_reason(tmp_path):
    study = SHARING.model_copy(update={"set": {**SMALL, "lr": 1e9}})
    outcome = sw.sweep(study, tmp_path, workers=1)
    assert len(outcome.failed) == 2
    for reason in outcome.failed.values():
        assert reason.startswith("its beginning (") and "training loss" in reason


# --- What is killed -------------------------------------------------------------------------------


def test_a_killed_worker_is_tried_again_and_the_results_are_the_same(tmp_path, alone):
    hooks = ("sweep_hooks:kills_itself_once",)
    outcome = sw.sweep(SHARING, tmp_path, workers=1, hooks=hooks)
    assert (tmp_path / tab02.NAME / "killed").exists()
    assert outcome.complete and records(tmp_path, tab02.NAME) == alone


@pytest.mark.slow
def test_a_worker_that_dies_every_time_is_given_up_with_the_reason(tmp_path):
    hooks = ("sweep_hooks:kills_itself_always",)
    outcome = sw.sweep(ONE, tmp_path, workers=1, retries=1, hooks=hooks)
    (reason,) = outcome.failed.values()
    assert reason.startswith("killed with signal 9") and reason.endswith("(2 times)")
    assert sw.sweep(ONE, tmp_path, workers=1).complete  # the same without the cause


def test_a_full_disk_says_what_to_do(tmp_path):
    hooks = ("sweep_hooks:finds_the_disk_full",)
    outcome = sw.sweep(ONE, tmp_path, workers=2, hooks=hooks)
    (reason,) = outcome.failed.values()
    assert "No space left" in reason and "make room and give the same command" in reason
    assert sw.sweep(ONE, tmp_path, workers=2).complete


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts a small disk")
@pytest.mark.slow
def test_a_disk_that_is_really_full_loses_nothing(tmp_path):
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(out)])
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        filler = out / "filler"
        filler.write_bytes(b"0" * 200_000)
        failed = sw.sweep(QUICK, out, workers=1).failed
        assert failed and all("No space left" in reason for reason in failed.values())
        filler.unlink()
        assert sw.sweep(QUICK, out, workers=1).complete
    finally:
        subprocess.run(["umount", str(out)], check=True)


def of_session(sid):
    """Return the processes of a session: the driver and whatever it has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == sid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def until(condition, seconds=600):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.slow
def test_a_killed_driver_leaves_no_orphans_and_the_same_command_ends_as_if_nothing_happened(
    tmp_path, alone
):
    study = tmp_path / "study.toml"
    study.write_text(
        f'experiment = "{tab02.NAME}"\npreset = "smoke"\nseeds = [0]\n[set]\n'
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in SMALL.items())
        + "[grid]\noff = [4, 8]\n"
    )
    command = [sys.executable, "-m", "mirrorflow", "sweep", str(study),
               "--out", str(tmp_path / "runs"), "--workers", "2"]  # fmt: skip
    held = [*command, "--hook", "sweep_hooks:waits_to_be_killed"]
    driver = subprocess.Popen(held, start_new_session=True, stdout=subprocess.DEVNULL)
    trunks = tmp_path / "runs" / ".trunks" / tab02.NAME
    assert until(lambda: any(trunks.glob("*.pt")))
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert until(lambda: not of_session(driver.pid)), of_session(driver.pid)
    assert not records(tmp_path / "runs", tab02.NAME)
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 runs finished" in done.stdout
    assert records(tmp_path / "runs", tab02.NAME) == alone


def test_two_sweeps_do_not_work_in_one_folder(tmp_path):
    folder = tmp_path / QUICK.module.NAME
    folder.mkdir()
    code = (
        "import pathlib, time\nfrom mirrorflow.lab.framework import hold\n"
        f"with hold(pathlib.Path({str(folder / '.sweep')!r}), print):\n"
        "    print('held', flush=True); time.sleep(6000)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        who = rf"another sweep is working in .* \(process {other.pid} on the machine .+\)"
        with pytest.raises(RuntimeError, match=who):
            sw.sweep(ONE, tmp_path, workers=1)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert sw.sweep(ONE, tmp_path, workers=1).complete  # the lock goes with its process


# --- What is told ---------------------------------------------------------------------------------


def test_a_store_elsewhere_has_what_another_machine_needs(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    sw.sweep(ONE, tmp_path / "one", workers=1, store=store)
    there = sorted(p.name for p in (tmp_path / "store" / QUICK.module.NAME).glob("*/*"))
    assert there.count("result.json") == 1
    outcome = sw.sweep(ONE, tmp_path / "two", workers=1, store=store)
    assert outcome.plan.done == 1
    assert records(tmp_path / "two", QUICK.module.NAME) == records(
        tmp_path / "one", QUICK.module.NAME
    )


def test_the_table_has_every_record_of_finished_runs(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    sw.sweep(QUICK, tmp_path, workers=2)
    folder = tmp_path / QUICK.module.NAME
    rows = sum(len(r) for r in records(tmp_path, QUICK.module.NAME).values())
    assert sw.export(folder, tmp_path / "all.parquet") == rows
    table = parquet.read_table(tmp_path / "all.parquet").to_pydict()
    assert sorted(set(table["set.start"])) == [0.1, 0.2, 0.3] and len(table["run_hash"]) == rows
    assert sw.export(folder, tmp_path / "all.csv") == rows
    lines = (tmp_path / "all.csv").read_text().splitlines()
    assert len(lines) == rows + 1 and lines[0].startswith("run_hash,set.start,set.seed")
    with pytest.raises(ValueError, match=r"a \.parquet or a \.csv file"):
        sw.export(folder, tmp_path / "all.xlsx")
    with pytest.raises(FileNotFoundError, match="no sweep has begun"):
        sw.status(tmp_path)


def test_numbers_are_written_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    outcome = sw.sweep(
        ONE, tmp_path, workers=1, hooks=("mirrorflow.lab.sweep.observers:tensorboard",)
    )
    assert outcome.complete
    folder = next((tmp_path / QUICK.module.NAME).glob("*/result.json")).parent
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    part = logged[0]["part"]
    events = EventAccumulator(str(folder / "tensorboard" / part)).Reload()
    name = next(k for k, v in logged[0].items() if isinstance(v, float))
    values = [entry.value for entry in events.Scalars(name)]
    np.testing.assert_allclose(values, [r[name] for r in logged if r["part"] == part], rtol=1e-6)


def test_the_command_says_what_it_would_do_and_how_far_it_is(tmp_path, monkeypatch, capsys):
    study = tmp_path / "study.toml"
    study.write_text(
        'experiment = "fig02_matrix_sensing"\npreset = "smoke"\nseeds = [0]\n'
        "set = {steps = 40, switch = 20, grid_alphas = [], commuting_time = 10.0}\n"
        "[grid]\nstart = [0.1, 0.2]\n"
    )
    out = ["--out", str(tmp_path / "runs")]

    def mirrorflow(*arguments):
        code = call(monkeypatch, *arguments)
        return SimpleNamespace(returncode=code, **capsys.readouterr()._asdict())

    said = mirrorflow("sweep", str(study), *out, "--dry-run")
    assert said.out == "2 configurations, 0 of them finished\n" and said.returncode == 0
    assert not (tmp_path / "runs").exists()
    done = mirrorflow("sweep", str(study), *out, "--workers", "2")
    folder = str(tmp_path / "runs" / "fig02_matrix_sensing")
    *_, last, following = done.out.splitlines()
    assert last == f"2 of 2 runs finished: {folder}"
    assert following == f"next: mirrorflow sweep export {folder} records.csv"
    told = mirrorflow("sweep", "status", folder)
    assert told.out.splitlines()[-1] == "2 finished" and "start=0.1, seed=0" in told.out
    told = json.loads(mirrorflow("sweep", "status", folder, "--json").out)
    assert told["counts"] == {"finished": 2} and len(told["runs"]) == 2
    assert {run["state"] for run in told["runs"]} == {"finished"}
    table = mirrorflow("sweep", "export", folder, str(tmp_path / "t.csv"))
    assert table.returncode == 0 and "rows:" in table.out
    for wrong, message in (
        (["sweep", str(tmp_path / "none.toml")], "No such file"),
        (["sweep", "status", str(tmp_path)], "no sweep has begun"),
        (["sweep", str(study), *out, "--engine", "moon"], "--engine is local, ray or slurm"),
    ):
        refused = mirrorflow(*wrong)
        assert refused.returncode == 2 and message in refused.err
