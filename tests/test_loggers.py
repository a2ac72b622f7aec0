"""TensorBoard, W&B without a network, MLflow in a folder: what they wrote is read back."""

import json
import math
import os
import struct
import sys
import warnings

import pytest
import torch

import mirrorflow as mf
from mirrorflow.control import ControlledDecay

pytestmark = [
    pytest.mark.slow,  # the loggers are not installed by `make test`
    pytest.mark.filterwarnings("ignore"),  # of the loggers themselves there are many
]

STEPS, OFF, EVERY = 12, 5, 3
WANTED = ("weight_decay", "decay_per_step", "absorbed_decay", "spectrum/ratio")
Rows = dict[str, dict[int, float]]  # by name and step


def events(folder) -> Rows:
    """Read TensorBoard's event files below a folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows: Rows = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        found = accumulator.EventAccumulator(str(file)).Reload()
        for name in found.Tags()["scalars"]:
            rows.setdefault(name, {}).update({e.step: e.value for e in found.Scalars(name)})
    return rows


def stored(uri) -> Rows:
    """Read the only run in a store of MLflow."""
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(uri)
    places = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(places)
    names = run.data.metrics
    history = {name: client.get_metric_history(run.info.run_id, name) for name in names}
    return {name: {m.step: m.value for m in values} for name, values in history.items()}


def records(data):
    """Return the records of a file of W&B: a log of LevelDB behind seven bytes."""
    block, place, whole = 32768, 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:  # no record begins so near to the end of a block
            place += block - place % block
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def offline(folder) -> Rows:
    """Read the history in the files of W&B's offline runs below a folder."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    sys.modules["wandb"].teardown()  # its process writes until then, and keeps the folder
    rows: Rows = {}
    for file in sorted(folder.rglob("*.wandb")):
        for data in records(file.read_bytes()):
            record = proto.Record()
            record.ParseFromString(data)
            items = {
                (i.key or "/".join(i.nested_key)): json.loads(i.value_json)
                for i in record.history.item
            }
            own = [items[k] for k in ("train/global_step", "trainer/global_step") if k in items]
            step = own[0] if own else items.get("_step", record.history.step.num)
            for name, value in items.items():
                if isinstance(value, (int, float)):
                    rows.setdefault(name, {})[int(step)] = value
    return rows


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Work in a folder, with loggers that ask nobody and no network."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true",
        "DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    if "mlflow" in sys.modules:  # which keeps the address of an earlier test
        sys.modules["mlflow"].set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    return tmp_path


def assert_right(rows: Rows, control, prefix=""):
    """The decay of each step, the absorbed decay and the ratio are what acted and was measured."""
    assert {f"{prefix}{name}" for name in WANTED} <= set(rows)
    decay = rows[f"{prefix}weight_decay"]
    assert len(decay) >= STEPS // EVERY
    assert all(v == pytest.approx(0.5 if step < OFF else 0.0) for step, v in decay.items())
    last = max(rows[f"{prefix}absorbed_decay"])
    acted = rows[f"{prefix}absorbed_decay"][last]
    assert acted == pytest.approx(-min(control.scheduler.accumulated), rel=1e-5)
    ratios = rows[f"{prefix}spectrum/ratio"]
    for step, found in control.measurements:
        assert ratios[step] == pytest.approx(found.mean_ratio, rel=1e-5)
    assert all(math.isfinite(v) for values in rows.values() for v in values.values())


def plain_loop(write):
    """Train by a loop of one's own; ``write`` is handed the numbers of each step."""
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    optimizer = torch.optim.AdamW(attention.parameters(), lr=0.01, weight_decay=0.5)
    control = ControlledDecay(attention, optimizer, mf.SwitchOff(0.5, at=OFF), track_every=EVERY)
    control.measure(0)
    write(control.logs(), 0)
    for step in range(1, STEPS + 1):
        batch = torch.randn(4, 3, 8)
        attention(batch, batch, batch)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if numbers := control.step():
            write(numbers, step)
    return control


# --- A loop of one's own --------------------------------------------------------------------------


def test_a_plain_loop_writes_events_of_tensorboard(place):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(place / "events")) as writer:

        def write(numbers, step):
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        control = plain_loop(write)
    assert_right(events(place / "events"), control)


def test_a_plain_loop_writes_into_a_store_of_mlflow(place):
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    with mlflow.start_run():
        control = plain_loop(lambda numbers, step: mlflow.log_metrics(numbers, step=step))
    assert_right(stored(os.environ["MLFLOW_TRACKING_URI"]), control)


def test_a_plain_loop_writes_an_offline_run_of_wandb(place):
    wandb = pytest.importorskip("wandb")
    run = wandb.init(project="decay", dir=str(place))
    control = plain_loop(lambda numbers, step: run.log(numbers, step=step))
    run.finish()
    assert_right(offline(place), control)


# --- The Trainer ----------------------------------------------------------------------------------


def trained(place, report_to):
    pytest.importorskip("transformers")
    from mirrorflow.integrations.huggingface import control_decay
    from test_huggingface import trainer

    made = trainer(place / "out", steps=STEPS, report_to=[report_to], save_strategy="no",
                   logging_steps=1, run_name="run", eval_strategy="no")  # fmt: skip
    control = control_decay(made, mf.SwitchOff(0.5, at=OFF), track_every=EVERY)
    made.train()
    return control


def test_the_trainer_writes_events_of_tensorboard(place, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(place / "events"))
    control = trained(place, "tensorboard")
    assert_right(events(place), control, "train/")


def test_the_trainer_writes_into_a_store_of_mlflow(place):
    pytest.importorskip("mlflow")
    control = trained(place, "mlflow")
    assert_right(stored(os.environ["MLFLOW_TRACKING_URI"]), control)


def test_the_trainer_writes_an_offline_run_of_wandb(place):
    wandb = pytest.importorskip("wandb")
    control = trained(place, "wandb")
    wandb.finish()
    assert_right(offline(place), control, "train/")


# --- Lightning ------------------------------------------------------------------------------------


def fitted(logger):
    pytest.importorskip("lightning.pytorch")
    from mirrorflow.integrations.lightning import DecayCallback
    from test_lightning import Net, fit

    control = DecayCallback(mf.SwitchOff(0.5, at=OFF), track_every=EVERY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Net(), [control], steps=STEPS, logger=logger)
    return control


def test_lightning_writes_events_of_tensorboard(place):
    pytest.importorskip("tensorboard")
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    logger = loggers.TensorBoardLogger(str(place))
    control = fitted(logger)
    logger.finalize("success")
    assert_right(events(place), control)


def test_lightning_writes_into_a_store_of_mlflow(place):
    pytest.importorskip("mlflow")
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    uri = os.environ["MLFLOW_TRACKING_URI"]
    control = fitted(loggers.MLFlowLogger(tracking_uri=uri))
    assert_right(stored(uri), control)


def test_lightning_writes_an_offline_run_of_wandb(place):
    wandb = pytest.importorskip("wandb")
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    control = fitted(loggers.WandbLogger(save_dir=str(place), offline=True))
    wandb.finish()
    assert_right(offline(place), control)
