"""The Trainer: a small real model is trained, stopped, resumed, and compared with no stop."""

import json
import shlex
import shutil
import warnings
from dataclasses import dataclass

import pytest
import torch

import mirrorflow as mf

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from mirrorflow.integrations.huggingface import control_decay  # noqa: E402
from mirrorflow.weightdecay import PerLayer  # noqa: E402

STEPS, STOP, OFF = 12, 7, 5


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        row = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": row, "labels": row}


def model(lora=False):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    base = transformers.GPT2LMHeadModel(config)
    if not lora:
        return base
    settings = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["c_attn"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        return peft.get_peft_model(base, settings)


def trainer(folder, steps=STEPS, lora=False, **changes):
    options = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "weight_decay": 0.3, "lr_scheduler_type": "constant",
        "logging_steps": 2, "save_steps": STOP, "report_to": [], "use_cpu": True, "seed": 3,
        "disable_tqdm": True,
    }  # fmt: skip
    args = transformers.TrainingArguments(**{**options, **changes})
    return transformers.Trainer(model(lora), args, train_dataset=Tokens())


def train(made, resume=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers and torch themselves
        warnings.filterwarnings("error", module="mirrorflow")
        made.train(resume_from_checkpoint=resume)
    return {k: v.detach().clone() for k, v in made.model.state_dict().items()}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.sample(2)
def test_a_stopped_run_continues_bit_for_bit(tmp_path, lora, moved):
    schedule = mf.SwitchOff(0.5, at=OFF)
    whole = trainer(tmp_path / "whole", lora=lora)
    control = control_decay(whole, schedule, track_every=3)
    expected = train(whole)

    first = trainer(tmp_path / "parts", lora=lora)
    control_decay(first, schedule, track_every=3)
    first.args.max_steps = STEPS
    first.add_callback(_StopAt(STOP))
    train(first)
    checkpoint = tmp_path / "parts" / f"checkpoint-{STOP}"
    assert json.loads((checkpoint / "mirrorflow.json").read_text())
    if moved:  # without our own file, the optimizer's checkpoint still knows
        (checkpoint / "mirrorflow.json").unlink()
        checkpoint = shutil.move(checkpoint, tmp_path / "elsewhere")
    second = trainer(tmp_path / "parts", lora=lora)
    resumed = control_decay(second, schedule, track_every=3)
    found = train(second, resume=str(checkpoint))

    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert resumed.scheduler.accumulated == control.scheduler.accumulated
    if not moved:
        assert resumed.scheduler.audit() == control.scheduler.audit()
    last = [m.mean_ratio for step, m in control.measurements if step > STOP]
    assert last == [m.mean_ratio for _, m in resumed.measurements]


class _StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_the_decay_is_that_of_the_schedule_and_is_logged(tmp_path):
    made = trainer(tmp_path)
    control = control_decay(made, mf.SwitchOff(0.5, at=OFF), track_every=4)
    train(made)
    rows = [(r["start"], r["stop"], r["decay"]) for r in control.scheduler.audit()
            if r["group"] == "0"]  # fmt: skip
    assert rows == [(0, OFF, 0.5), (OFF, STEPS, 0.0)]
    assert control.scheduler.accumulated == [pytest.approx(-1e-2 * 0.5 * OFF), 0.0]
    logged = {r["step"]: r for r in made.state.log_history if "weight_decay" in r}
    assert logged[4]["weight_decay"] == 0.5 and logged[8]["weight_decay"] == 0.0
    assert logged[8]["absorbed_decay"] == pytest.approx(1e-2 * 0.5 * OFF)
    assert logged[8]["spectrum/ratio"] == pytest.approx(dict(control.measurements)[8].mean_ratio)
    assert [step for step, _ in control.measurements] == [0, 4, 8, 12]


@dataclass
class Script:
    """What a script asks for beside TrainingArguments."""

    decay: str = '{"kind": "Constant", "rate": 0.1}'


def test_the_schedule_is_an_argument_of_the_script(tmp_path):
    parser = transformers.HfArgumentParser((transformers.TrainingArguments, Script))
    line = (
        f"--output_dir {tmp_path} --max_steps {STEPS} --weight_decay 0.3 --report_to none"
        f""" --use_cpu True --decay '{{"kind": "SwitchOff", "rate": 0.1, "at": {OFF}}}'"""
    )
    args, script = parser.parse_args_into_dataclasses(shlex.split(line))
    made = transformers.Trainer(model(), args, train_dataset=Tokens())
    control = control_decay(made, mf.schedule_from_dict(json.loads(script.decay)))
    train(made)
    rows = [(r["start"], r["stop"], r["decay"]) for r in control.scheduler.audit()
            if r["group"] == "0"]  # fmt: skip
    assert rows[-1] == (OFF, STEPS, 0.0)
    assert {decay for start, _, decay in rows if start < OFF} == {0.1}


def test_the_trainers_own_logs_are_all_there(tmp_path):
    def losses(controlled):
        made = trainer(tmp_path / str(controlled))
        if controlled:
            control_decay(made, mf.Constant(0.3), track_every=3)
        train(made)
        return [(r["step"], r["loss"]) for r in made.state.log_history if "loss" in r]

    assert losses(True) == losses(False) != []


def test_groups_without_decay_keep_none(tmp_path):
    made = trainer(tmp_path)
    control_decay(made, mf.Constant(0.5))
    train(made)
    assert [g["weight_decay"] for g in made.optimizer.param_groups] == [0.5, 0.0]


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    made = trainer(tmp_path, steps=4, gradient_accumulation_steps=3)
    control = control_decay(made, mf.Constant(0.5))
    train(made)
    assert control.scheduler.steps == 4


def test_lora_starts_without_a_ratio(tmp_path):
    made = trainer(tmp_path, lora=True)
    control = control_decay(made, mf.Constant(0.5), track_every=6)
    train(made)
    first, last = control.measurements[0][1], control.measurements[-1][1]
    assert first.undefined == len(first.records) == 2
    assert last.undefined == 0 and last.mean_ratio >= 1


def test_the_trainers_default_of_no_decay_is_an_error_that_says_what_to_do(tmp_path):
    made = trainer(tmp_path, weight_decay=0.0)
    control_decay(made, mf.Constant(0.5))
    with pytest.raises(ValueError, match="weight_decay"):
        train(made)


def test_bad_intervals_are_named(tmp_path):
    with pytest.raises(ValueError, match="track_every"):
        control_decay(trainer(tmp_path), mf.Constant(0.5), track_every=-1)


def overall():
    return mf.HoldRatio(2.0, 0.3, gain=0.5, deadband=0.0)


def per_layer():
    targets = iter((1.5, 2.5))
    return PerLayer(lambda layer: mf.HoldRatio(next(targets), 0.3, gain=0.5, deadband=0.0))


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(
    ("make", "lora"), [(overall, False), (per_layer, False), (per_layer, True)]
)
@pytest.mark.sample(1)
def test_a_closed_loop_is_fed_and_resumes(tmp_path, make, lora, moved):
    whole = trainer(tmp_path / "whole", lora=lora)
    control = control_decay(whole, make(), track_every=2)
    expected = train(whole)
    assert len({row["rate"] for row in control.schedule.log}) > 3

    first = trainer(tmp_path / "parts", lora=lora)
    control_decay(first, make(), track_every=2)
    first.add_callback(_StopAt(STOP))
    train(first)
    checkpoint = tmp_path / "parts" / f"checkpoint-{STOP}"
    if moved:  # what the loops know is in the optimizer's checkpoint, too
        checkpoint = shutil.move(checkpoint, tmp_path / "elsewhere")
    second = trainer(tmp_path / "parts", lora=lora)
    resumed = control_decay(second, make(), track_every=2)
    found = train(second, resume=str(checkpoint))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    rows = [row for row in control.schedule.log if not moved or row["step"] > STOP]
    assert str(resumed.schedule.log) == str(rows)  # with NaN where B is 0 yet


def test_each_layer_is_logged(tmp_path):
    made = trainer(tmp_path)
    control = control_decay(made, per_layer(), track_every=4)
    train(made)
    names = list(control.schedule.loops)
    assert len(names) == 2
    logged = {r["step"]: r for r in made.state.log_history if "spectrum/ratio" in r}
    assert list(logged) == [0, 4, 8, 12]
    for name in names:
        rates = [logged[step][f"weight_decay/{name}"] for step in logged]
        assert rates == [row["rate"] for row in control.schedule.loops[name].log]
        assert logged[4][f"ratio/{name}"] == control.schedule.loops[name].log[1]["value"]


def test_a_closed_loop_needs_measurements(tmp_path):
    with pytest.raises(ValueError, match="track_every"):
        control_decay(trainer(tmp_path), mf.OffWhenLevel(0.1))


def test_an_interval_longer_than_the_run_is_said_at_its_start(tmp_path):
    made = trainer(tmp_path)
    control_decay(made, mf.OffWhenLevel(0.1), track_every=STEPS + 1)
    with pytest.warns(UserWarning, match="track_every=13 exceeds the run's 12 steps"):
        made.train()
    control_decay(quiet := trainer(tmp_path), mf.SwitchOff(0.1, at=6), track_every=STEPS + 1)
    train(quiet)
