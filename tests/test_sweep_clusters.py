"""Sweeps on clusters: Ray with nodes that are killed, SLURM's jobs by submitit."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

import mirrorflow.lab.framework as ex
from mirrorflow.lab import sweep as sw
from mirrorflow.lab.experiments.networks import tab02_fig03b_fig13_vit as tab02
from processes import one_thread

HERE = Path(__file__).parent
QUICK = sw.Study(
    experiment="fig02_matrix_sensing", preset="smoke", grid={"start": [0.1, 0.2]}, seeds=(0,)
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: slow on a busy machine
    with one_thread():
        yield


def records(out):
    return {r["hash"]: r["records"] for r in ex.find_results(out)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    with one_thread():
        for _, config in QUICK.configurations():
            ex.execute(QUICK.module, config, out)
    return records(out)


@pytest.mark.slow
def test_jobs_of_submitit_have_the_same_results(tmp_path, alone):
    pytest.importorskip("submitit")
    from mirrorflow.lab.sweep.engines.slurm import OnSlurm

    engine = OnSlurm(tmp_path, 2, (1.0, 0.0), "", (), cluster="local")
    assert sw.sweep(QUICK, tmp_path, engine=engine).complete
    assert records(tmp_path) == alone


@pytest.mark.slow
def test_a_job_that_dies_under_submitit_is_given_up_with_its_reason(tmp_path):
    pytest.importorskip("submitit")
    from mirrorflow.lab.sweep.engines.slurm import OnSlurm

    hooks = ("sweep_hooks:kills_itself_always",)
    engine = OnSlurm(tmp_path, 2, (1.0, 0.0), "", hooks, cluster="local")
    failed = sw.sweep(QUICK, tmp_path, engine=engine, retries=0).failed
    assert len(failed) == 2 and all("(1 times)" in reason for reason in failed.values())


def test_a_fraction_of_a_gpu_is_refused_under_slurm(tmp_path):
    pytest.importorskip("submitit")
    from mirrorflow.lab.sweep.engines.slurm import OnSlurm

    with pytest.raises(ValueError, match=r"whole GPUs, not 0\.25"):
        OnSlurm(tmp_path, 0, (1.0, 0.25), "", (), cluster="local")


@pytest.fixture
def cluster():
    """A Ray head without room for tasks, and two nodes with one slot each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    quiet = {"include_dashboard": False, "num_cpus": 0}
    found = Cluster(initialize_head=True, head_node_args=quiet)
    try:
        yield found
    finally:
        import ray

        ray.shutdown()
        found.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray's own, about its processes and sockets
def test_a_node_that_is_killed_from_outside_costs_no_run(tmp_path, cluster):
    from mirrorflow.lab.sweep.engines.ray_cluster import OnRay

    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    study = sw.Study(
        experiment=tab02.NAME, preset="smoke", seeds=(0, 1, 2, 3),
        set={"loops": False, "times": [], "decays": [2.0], "steps": 200, "off": 100, "every": 20},
    )  # fmt: skip
    killed = []

    def kill():
        """Kill the second node's raylet, as a machine dies, once a run is under way there."""
        folder = tmp_path / tab02.NAME
        while not list(folder.glob("*/metrics.partial.jsonl")):
            time.sleep(0.05)
        for process in nodes[1].all_processes["raylet"]:
            os.kill(process.process.pid, signal.SIGKILL)
            killed.append(process.process.pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    engine = OnRay(tmp_path, cluster.address, 0, (1.0, 0.0), "", ())
    outcome = sw.sweep(study, tmp_path, engine=engine)
    thread.join()
    assert killed and outcome.complete
    for _, config in study.configurations():
        ex.execute(tab02, config, tmp_path / "alone")
    assert records(tmp_path) == records(tmp_path / "alone")
