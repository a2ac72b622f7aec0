"""The account of D of what is tracked: against literal steps, over intervals, and resumed."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch

from mirrorflow.balance import product_step
from mirrorflow.control import ControlledDecay
from mirrorflow.spectrum import SpectralTracker

LR, STEPS = 0.02, 9
PARTS = ("left_by_decay", "optimizer", "second_order", "unsplit", "outside")


class Shared(torch.nn.Module):
    """Attention of 4 query heads and 2 key heads, and a product that is named."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.num_heads, self.head_dim = 4, 3
        make = lambda n, m: torch.nn.Linear(n, m, bias=False, dtype=dtype)  # noqa: E731
        self.q_proj, self.k_proj = make(6, 12), make(6, 6)
        self.up, self.down = make(6, 3), make(3, 5)

    def forward(self, x):
        q = self.q_proj(x).unflatten(-1, (4, 3)).transpose(0, 1)
        k = self.k_proj(x).unflatten(-1, (2, 3)).transpose(0, 1).repeat_interleave(2, 0)
        return (q @ k.mT).square().mean() + (self.down(self.up(x)) - 1).square().mean()


NAMED = {"mlp": ("down.weight", "up.weight")}
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=LR, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=LR, weight_decay=0.1),
}


def rate(step):
    """A decay that changes at every step."""
    return 2.0 / (1 + step)


def batch(step):
    return torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def assemble(every, optimizer="adamw", net=None, **options):
    net = net or Shared()
    made = OPTIMIZERS[optimizer](net.parameters())
    pairs = {"mlp": NAMED["mlp"]}
    with pytest.warns() if optimizer == "adam" and not options.get("decoupled") else nullcontext():
        control = ControlledDecay(net, made, rate, pairs=pairs, balance_every=every, **options)
    return net, made, control


def train(net, optimizer, control, start=0, stop=STEPS, each=None):
    for step in range(start, stop):
        optimizer.zero_grad()
        net(batch(step)).backward()
        optimizer.step()
        control.step()
        if each:
            each()


def factors(net):
    return net.down.weight.detach().clone(), net.up.weight.detach().clone()


def literal(states, shrinks):
    """The sums of `product_step`, each contribution shrunk by what follows it."""
    left = states[0][0].mT @ states[0][0] - states[0][1] @ states[0][1].mT
    parts = [left, torch.zeros_like(left), torch.zeros_like(left)]
    for before, after, s in zip(states[:-1], states[1:], shrinks, strict=True):
        taken = product_step(*before, *after, lr=1.0, decay=1 - s)
        new = (0, taken.optimizer, taken.second_order)
        parts = [s * s * part + more for part, more in zip(parts, new, strict=True)]
    return parts


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_step_is_split_as_by_hand(optimizer, decoupled):
    net, made, control = assemble(1, optimizer, decoupled=decoupled)
    states = [factors(net)]
    train(net, made, control, each=lambda: states.append(factors(net)))
    coupled = optimizer == "adam" and not decoupled  # whose decay is a part of its own direction
    shrinks = [1.0 if coupled else 1 - LR * rate(step) for step in range(STEPS)]
    split = control._balance.report()["mlp"]
    found = (split.left_by_decay, split.optimizer, split.second_order)
    for ours, expected in zip(found, literal(states, shrinks), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    A, B = states[-1]
    torch.testing.assert_close(split.D, A.mT @ A - B @ B.mT, rtol=0, atol=1e-12)
    assert split.n_steps == STEPS and split.n_intervals == 0


@pytest.mark.parametrize("every", [2, 3, 4])
def test_an_interval_shrinks_by_the_product_of_its_steps(every):
    net, made, control = assemble(every)
    states = [factors(net)]
    train(net, made, control, each=lambda: states.append(factors(net)))
    seen = STEPS // every * every
    kept = torch.prod(torch.tensor([1 - LR * rate(s) for s in range(seen)], dtype=torch.float64))
    split = control._balance.report()["mlp"]
    A, B = states[seen]
    D = A.mT @ A - B @ B.mT
    torch.testing.assert_close(split.D, D, rtol=0, atol=1e-12)
    torch.testing.assert_close(split.left_by_decay, kept**2 * split.D_0, rtol=0, atol=1e-12)
    torch.testing.assert_close(split.unsplit, D - kept**2 * split.D_0, rtol=0, atol=1e-12)
    assert split.n_steps == 0 and split.n_intervals == STEPS // every


def test_gradient_descent_has_no_optimizer_part_also_where_heads_share_keys():
    net, made, control = assemble(1, "sgd")
    train(net, made, control)
    splits = control._balance.report()
    assert len(splits) == 2
    for split in splits.values():
        assert split.optimizer.abs().max() < 1e-13 < split.second_order.abs().max()
    (shared,) = (split for name, split in splits.items() if name != "mlp")
    Q, K = net.q_proj.weight.detach(), net.k_proj.weight.detach()
    for head in range(2):  # the sum over the query heads of a key head
        D = sum(Q[i : i + 3] @ Q[i : i + 3].T for i in (6 * head, 6 * head + 3))
        D = D - K[3 * head : 3 * head + 3] @ K[3 * head : 3 * head + 3].T
        torch.testing.assert_close(shared.D[head], D, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("every", [1, 2])
def test_a_resumed_account_is_that_of_a_whole_run(every, weights_first):
    whole = assemble(every)
    train(*whole)
    first = assemble(every)
    train(*first, stop=5)
    saved = json.loads(json.dumps(first[2].state_dict()))
    weights, state = first[0].state_dict(), first[1].state_dict()

    net, made, control = assemble(every)
    order = [lambda: net.load_state_dict(weights), lambda: made.load_state_dict(state)]
    for load in [*order, None] if weights_first else [None, *order]:
        (load or (lambda: control.load_state_dict(saved)))()
    train(net, made, control, start=5)
    for name, split in whole[2]._balance.report().items():
        ours = control._balance.report()[name]
        for part in PARTS:
            torch.testing.assert_close(
                getattr(ours, part), getattr(split, part), rtol=0, atol=1e-12
            )
        assert (ours.n_steps, ours.n_intervals) == (split.n_steps, split.n_intervals)
    assert all(map(torch.equal, net.parameters(), whole[0].parameters()))


def test_weights_that_are_loaded_before_the_first_step_are_the_start():
    net, made, control = assemble(1)
    other = Shared()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3.0)
    net.load_state_dict(other.state_dict())
    A, B = factors(net)
    train(net, made, control, stop=1)
    split = control._balance.report()["mlp"]
    torch.testing.assert_close(split.D_0, A.mT @ A - B @ B.mT, rtol=0, atol=1e-12)
    assert split.outside.abs().max() == 0


def test_a_step_whose_decay_is_not_known_is_counted_apart():
    net, made, control = assemble(1)
    train(net, made, control, stop=3)
    for entry in control.scheduler.account.entries:
        entry.kept = float("nan")  # as after an optimizer that is ahead of the ledger
    train(net, made, control, start=3, stop=4)
    split = control._balance.report()["mlp"]
    A, B = factors(net)
    torch.testing.assert_close(split.D, A.mT @ A - B @ B.mT, rtol=0, atol=1e-12)
    assert split.outside.abs().max() > 0 and split.n_steps == 3


def test_the_account_leaves_training_and_its_logs_as_they_are():
    plain, accounted = assemble(0, track_every=2), assemble(1, track_every=2)
    logs = [[], []]
    for run, said in zip((plain, accounted), logs, strict=True):
        train(*run, each=lambda said=said, run=run: said.append(run[2].logs()))
    assert all(map(torch.equal, plain[0].parameters(), accounted[0].parameters()))
    assert logs[0] == logs[1]


@pytest.mark.parametrize("every", [1, 3])
def test_a_factor_that_misses_steps_shrinks_in_its_own_only(every):
    """As one that is unfrozen later: neither it, nor the others, take the wrong decay."""
    whole = assemble(every)
    shrinks, states = [], [factors(whole[0])]
    net, made, control = whole
    for step in range(9):
        made.zero_grad()
        net(batch(step)).backward()
        if missed := step in (0, 1, 4):
            net.up.weight.grad = None
        made.step()
        control.step()
        s = 1 - LR * rate(step)
        shrinks.append((s, 1.0 if missed else s))
        states.append(factors(net))
        if step == 5:
            control.load_state_dict(json.loads(json.dumps(control.state_dict())))
    split = control._balance.report()["mlp"]
    kept = torch.tensor(shrinks, dtype=torch.float64).prod(0)
    assert split.shrink == pytest.approx(tuple(kept.tolist())) and split.outside.abs().max() == 0
    (A, B), (a, b) = states[0], kept
    left = a**2 * A.mT @ A - b**2 * B @ B.mT
    torch.testing.assert_close(split.left_by_decay, left, rtol=0, atol=1e-12)
    A, B = states[-1]
    torch.testing.assert_close(split.D, A.mT @ A - B @ B.mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("stop", [0, 4])
def test_a_copied_run_goes_on_with_its_account(stop):
    whole = assemble(1)
    train(*whole)
    first = assemble(1)
    train(*first, stop=stop)
    run = copy.deepcopy(first)
    train(*run, start=stop)
    for name, split in whole[2]._balance.report().items():
        for part in PARTS:
            ours = getattr(run[2]._balance.report()[name], part)
            torch.testing.assert_close(ours, getattr(split, part), rtol=0, atol=1e-12)


def test_closing_releases_the_optimizer():
    _, made, control = assemble(1)
    control.close()
    assert not made._optimizer_step_pre_hooks and not made._optimizer_step_post_hooks


def test_a_scheduler_that_fails_leaves_no_hook():
    net = Shared()
    made = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)
    with pytest.raises(ValueError, match="weight_decay"):
        ControlledDecay(net, made, rate, balance_every=1)
    assert not made._optimizer_step_pre_hooks


def test_what_cannot_be_accounted_for_is_refused():
    net, made, control = assemble(1)
    train(net, made, control, stop=1)
    saved = control.state_dict()
    saved["balance"]["account"]["products"] = ["another"]
    with pytest.raises(ValueError, match=r"must be of the products .*another"):
        control.load_state_dict(saved)
    elsewhere = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], weight_decay=0.1)
    with pytest.raises(ValueError, match="steps none of the factors"):
        ControlledDecay(Shared(), elsewhere, rate, balance_every=1)
    with pytest.raises(ValueError, match="balance_every must be an integer >= 0, got -1"):
        ControlledDecay(Shared(), elsewhere, rate, balance_every=-1)


def test_a_tracker_accounts_by_itself_and_takes_factors_by_name():
    net = Shared()
    tracker = SpectralTracker(net, pairs={"mlp": NAMED["mlp"]}, match="mlp")
    account = tracker.account()
    with torch.no_grad():
        net.up.weight.mul_(0.5)
    account.step({"up.weight": 0.5})
    split = account.report()["mlp"]
    assert split.shrink == (1.0, 0.5)
    assert max(split.optimizer.abs().max(), split.second_order.abs().max()) < 1e-14
    again = tracker.account()
    again.load_state_dict(json.loads(json.dumps(account.state_dict())))
    assert torch.equal(again.report()["mlp"].D, split.D)
