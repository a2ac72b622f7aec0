"""L2 in SGD's momentum, taken out when the rate reaches 0."""

import copy
import io
import warnings
from functools import partial

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, RMSprop

from mirrorflow.schedule import Constant, SwitchOff, join
from mirrorflow.weightdecay import CoupledDecayWarning, WeightDecayScheduler, lint, preview
from optimizers import FALL, OFF, STEPS, Plain, assert_equal, pull, weights

OFF_AND_ON = join(
    [(Constant(0.5), 3), (Constant(0.0), 3), (Constant(0.2), 2), (Constant(0.0), None)]
)
SETTINGS = {
    "plain": {"momentum": 0.9},
    "dampened": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "fused nesterov": {"momentum": 0.5, "nesterov": True, "fused": True},
    "maximize": {"momentum": 0.9, "maximize": True},
    "no momentum": {},
}
settings = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


def doubles(n=2):
    return [torch.nn.Parameter(p.detach().double()) for p in weights(n)]


def literal(schedule, options, steps=STEPS, lr=0.1):
    """Two buffers, of gradients and of decay; the second is thrown away where the rate is 0."""
    m, d = options.get("momentum", 0.0), options.get("dampening", 0.0)
    found = []
    for i, p in enumerate(doubles()):
        w = p.detach().clone()
        grads = decays = None
        for t in range(steps):
            g = (w - 1.0 - i) * 0.5 * (-1 if options.get("maximize") else 1)
            extra = schedule.rate(t) * w
            first = grads is None
            grads = g if first else m * grads + (1 - d) * g
            if schedule.rate(t) == 0:
                decays = torch.zeros_like(w)
            else:
                decays = extra if first else m * decays + (1 - d) * extra
            if options.get("nesterov"):
                w = w - lr * (g + extra + m * (grads + decays))
            else:
                w = w - lr * (grads + decays)
        found.append((w, grads))
    return found


def run(params, optimizer, steps=STEPS):
    for _ in range(steps):
        pull(params)
        optimizer.step()


@settings
@pytest.mark.parametrize("schedule", [OFF, FALL, OFF_AND_ON], ids=["off", "fall", "off and on"])
def test_after_the_switch_the_buffer_has_never_seen_decay(options, schedule):
    params = doubles()
    optimizer = SGD(params, lr=0.1, weight_decay=1.0, **options)
    WeightDecayScheduler(optimizer, schedule, exact_off=True)
    run(params, optimizer)
    for p, (w, grads) in zip(params, literal(schedule, options), strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-13)
        if options.get("momentum"):
            buffer = optimizer.state[p]["momentum_buffer"]
            torch.testing.assert_close(buffer, grads, rtol=1e-12, atol=1e-13)


@settings
def test_until_the_switch_nothing_changes(options):
    plain, exact = doubles(), doubles()
    for params, on in ((plain, False), (exact, True)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoupledDecayWarning)
            optimizer = SGD(params, lr=0.1, weight_decay=1.0, **options)
            WeightDecayScheduler(optimizer, SwitchOff(0.5, at=STEPS), exact_off=on)
        run(params, optimizer)
    assert_equal(plain, exact)


@pytest.mark.parametrize("with_closure", [False, True])
def test_off_is_off(with_closure):
    """Without a gradient the weights stand still from the switch on."""
    w = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    optimizer = SGD([w], lr=0.1, momentum=0.9, weight_decay=0.5)
    scheduler = WeightDecayScheduler(optimizer, SwitchOff(0.5, at=3), exact_off=True)

    def still():
        w.grad = torch.zeros_like(w)

    path = []
    for _ in range(6):
        still()
        optimizer.step(still if with_closure else None)
        path.append(w[0, 0].item())
    assert path[0] > path[1] > path[2]
    assert path[2:] == pytest.approx([path[2]] * 4, rel=1e-12)
    assert scheduler.pending == [0.0]
    moved = [row["absorbed"] for row in scheduler.audit() if row["start"] >= 3]
    assert moved == [0.0]


def test_a_tensor_without_a_gradient_at_the_switch_is_cleaned_as_well():
    a, b = doubles()
    optimizer = SGD([a, b], lr=0.1, momentum=0.9, weight_decay=0.5)
    WeightDecayScheduler(optimizer, SwitchOff(0.5, at=2), exact_off=True)
    for t in range(5):
        a.grad = torch.zeros_like(a)
        b.grad = torch.zeros_like(b) if t in (0, 1, 4) else None
        optimizer.step()
        if t == 1:
            before = b.detach().clone()
    torch.testing.assert_close(b.detach(), before, rtol=1e-12, atol=0.0)


def test_the_preview_knows_of_it():
    params = doubles()
    optimizer = SGD(params, lr=0.1, momentum=0.9, weight_decay=0.5)
    scheduler = WeightDecayScheduler(optimizer, OFF_AND_ON, exact_off=True)
    seen = preview(scheduler, STEPS)
    run(params, optimizer)
    assert seen.rows == scheduler.audit()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("options", [SETTINGS["dampened"], SETTINGS["fused nesterov"]])
def test_a_stopped_run_continues_bit_for_bit(options, order):
    def make(params):
        optimizer = SGD(params, lr=0.1, weight_decay=1.0, **options)
        return optimizer, WeightDecayScheduler(optimizer, OFF_AND_ON, exact_off=True)

    expected = weights()
    whole = make(expected)
    run(expected, whole[0])
    for stop in range(STEPS):
        params = weights()
        parts = make(params)
        run(params, parts[0], stop)
        buffer = io.BytesIO()
        torch.save([part.state_dict() for part in parts], buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
        parts = make(fresh)
        for i in order:
            parts[i].load_state_dict(saved[i])
        run(fresh, parts[0], STEPS - stop)
        assert_equal(fresh, expected)
        assert parts[1].audit() == whole[1].audit()


def test_the_optimizers_checkpoint_alone_is_enough():
    params = weights()
    optimizer = SGD(params, lr=0.1, momentum=0.9, weight_decay=1.0)
    WeightDecayScheduler(optimizer, OFF, exact_off=True)
    run(params, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in params]
    run(params, optimizer)
    again = SGD(fresh, lr=0.1, momentum=0.9, weight_decay=1.0)
    WeightDecayScheduler(again, OFF, exact_off=True)
    again.load_state_dict(saved)
    with pytest.warns(UserWarning, match="record of steps 0 to 3"):
        run(fresh, again)
    assert_equal(fresh, params)


def test_decay_from_before_warns_and_stays():
    params = weights()
    optimizer = SGD(params, lr=0.1, momentum=0.9, weight_decay=1.0)
    with pytest.warns(CoupledDecayWarning, match="exact_off=True"):
        WeightDecayScheduler(optimizer, OFF)
    run(params, optimizer, 4)
    again = SGD(params, lr=0.1, momentum=0.9, weight_decay=1.0)
    again.load_state_dict(optimizer.state_dict())
    WeightDecayScheduler(again, OFF, exact_off=True)
    before = again.state[params[0]]["momentum_buffer"].clone()
    pull(params)
    with (
        pytest.warns(UserWarning, match="record of steps"),
        pytest.warns(CoupledDecayWarning, match="2 momentum buffers"),
    ):
        again.step()
    expected = 0.9 * before + params[0].grad
    torch.testing.assert_close(again.state[params[0]]["momentum_buffer"], expected)


def test_decay_that_was_not_followed_for_a_while_is_not_subtracted():
    """exact_off in the first and in the third part of a run, and not in between."""
    on_and_off = [(Constant(0.5), 2), (Constant(0.0), 60), (Constant(0.5), 2)]
    schedule = join([*on_and_off, (Constant(0.0), None)])
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    state = None
    for exact, steps in ((True, 2), (False, 60), (True, 3)):
        optimizer = SGD([w], lr=0.0, momentum=0.5, weight_decay=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if not exact else "error", CoupledDecayWarning)
            scheduler = WeightDecayScheduler(optimizer, schedule, exact_off=exact)
        if state:
            optimizer.load_state_dict(state[0])
            scheduler.load_state_dict(state[1])
            assert "stored_decay" not in optimizer.state[w]
        for _ in range(steps):
            w.grad = torch.zeros_like(w)
            optimizer.step()
        state = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    assert optimizer.state[w]["momentum_buffer"].item() == pytest.approx(0.0, abs=1e-15)
    assert scheduler.steps == 65


def test_decay_that_was_not_followed_warns_when_following_begins():
    """Followed again too late: the buffer keeps what is not known, and that is not silent."""
    w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    sgd = partial(SGD, lr=0.0, momentum=0.5, weight_decay=0.5)
    with pytest.warns(CoupledDecayWarning, match="exact_off=True"):
        optimizer = sgd([w])
        WeightDecayScheduler(optimizer, SwitchOff(0.5, at=3))
    for exact in (False, True):
        if exact:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = sgd([w])
            WeightDecayScheduler(optimizer, SwitchOff(0.5, at=3), exact_off=True)
            optimizer.load_state_dict(state)
        w.grad = torch.zeros_like(w)
        if exact:
            with (
                pytest.warns(UserWarning, match="record of steps"),
                pytest.warns(CoupledDecayWarning, match="1 momentum buffers"),
            ):
                optimizer.step()
        else:
            optimizer.step()
    assert optimizer.state[w]["stored_decay"].item() == 0.5
    assert optimizer.state[w]["momentum_buffer"].item() == 0.75


def test_close_drops_what_was_kept():
    params = weights()
    optimizer = SGD(params, lr=0.1, momentum=0.9, weight_decay=1.0)
    scheduler = WeightDecayScheduler(optimizer, OFF, exact_off=True)
    run(params, optimizer, 2)
    assert "stored_decay" in optimizer.state[params[0]]
    scheduler.close()
    assert set(optimizer.state[params[0]]) == {"momentum_buffer"}


@pytest.mark.parametrize("make", [Adam, partial(RMSprop, lr=0.1), partial(Adam, amsgrad=True)])
def test_moments_that_are_not_linear_are_refused(make):
    with pytest.raises(ValueError, match="decoupled=True keeps the decay out"):
        WeightDecayScheduler(make(weights(), weight_decay=0.1), OFF, exact_off=True)


@pytest.mark.parametrize("make", [AdamW, partial(Plain, lr=0.1), partial(SGD, lr=0.1)])
def test_where_off_is_exact_anyway_nothing_is_kept(make):
    params = weights()
    optimizer = make(params, weight_decay=0.1)
    WeightDecayScheduler(optimizer, OFF, exact_off=True)
    run(params, optimizer, 6)
    assert not any("stored_decay" in state for state in optimizer.state.values())


def test_lint_finds_nothing_wrong_with_it():
    optimizer = SGD(weights(), lr=0.1, momentum=0.9, weight_decay=0.1)
    assert [finding.code for finding in lint(optimizer)] == ["coupled"]
    scheduler = WeightDecayScheduler(optimizer, OFF, exact_off=True)
    assert lint(optimizer, None, scheduler) == []


def test_skipped_steps_store_nothing():
    """A fused step that GradScaler skips is called, and must leave the stored part alone."""
    params = weights(1)
    optimizer = SGD(params, lr=0.1, momentum=0.9, weight_decay=1.0, fused=True)
    WeightDecayScheduler(optimizer, SwitchOff(0.5, at=3), exact_off=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    kept = []
    for t in range(6):
        optimizer.zero_grad()
        scaler.scale((params[0] * (float("inf") if t in (2, 4) else 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        kept.append(optimizer.state[params[0]]["stored_decay"].clone())
    assert torch.equal(kept[1], kept[2]) and not torch.equal(kept[1], kept[0])
    assert kept[3].abs().max() > 0 and kept[5].abs().max() == 0


@pytest.mark.filterwarnings("ignore::mirrorflow.weightdecay.RoundingWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_followed_in_half_precision_is_what_the_buffer_holds(dtype):
    """A momentum of 0.9 rounded to 0.8984 would follow another buffer."""
    w = torch.nn.Parameter(torch.linspace(1, 2, 100).to(dtype))
    optimizer = SGD([w], lr=1e-3, momentum=0.9, weight_decay=0.5)
    WeightDecayScheduler(optimizer, SwitchOff(0.5, at=40), exact_off=True)
    for step in range(41):
        if step == 40:
            held = optimizer.state[w]["momentum_buffer"].float().norm().item()
        w.grad = torch.zeros_like(w)
        optimizer.step()
    left = optimizer.state[w]["momentum_buffer"].float().norm().item()
    assert left < (0.01 if dtype == torch.bfloat16 else 0.001) * held
