"""Schedulers and other processes: workers of data loaders, and processes that get a scheduler."""

import copy
import multiprocessing as mp
import pickle

import pytest
import torch
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from mirrorflow.schedule import Linear
from mirrorflow.weightdecay import WeightDecayScheduler
from optimizers import FALL, STEPS, assert_equal, pull, two_groups, weights

METHODS = [
    pytest.param(m, marks=() if m == "fork" else pytest.mark.slow)
    for m in mp.get_all_start_methods()
]
OPTIONS = [{}, {"decoupled": True}, {"exact_off": True}]


class Batches(Dataset):
    """Data that hold on to the run that they are for, as a trainer's do."""

    def __init__(self, scheduler):
        self.scheduler = scheduler

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        return torch.tensor(
            [index, self.scheduler.steps, self.scheduler.get_last_weight_decay()[0]]
        )


def alone(options):
    params = weights()
    optimizer = two_groups(AdamW, params)
    scheduler = WeightDecayScheduler(optimizer, FALL, **options)
    for _ in range(STEPS):
        pull(params)
        optimizer.step()
    return params, scheduler


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_workers_of_a_data_loader_leave_the_decay_alone(method, options):
    params = weights()
    optimizer = two_groups(AdamW, params)
    scheduler = WeightDecayScheduler(optimizer, FALL, **options)
    data = DataLoader(Batches(scheduler), num_workers=1, multiprocessing_context=method)
    for step, batch in enumerate(data):
        assert batch[0].tolist() == [step, 0, FALL.rate(0)]  # a worker has the state of its start
        pull(params)
        optimizer.step()
    expected, same = alone(options)
    assert_equal(params, expected)
    assert scheduler.accumulated == same.accumulated


def go_on(scheduler, answers):
    """Train to the end in a process that has been given a scheduler."""
    params = [p for group in scheduler.optimizer.param_groups for p in group["params"]]
    while scheduler.steps < STEPS:
        pull(params)
        scheduler.optimizer.step()
    answers.put(([p.tolist() for p in params], scheduler.accumulated))


@pytest.mark.parametrize("method", METHODS)
def test_another_process_goes_on_with_a_scheduler_that_it_is_given(method):
    params = weights()
    optimizer = two_groups(AdamW, params)
    scheduler = WeightDecayScheduler(optimizer, FALL)
    for _ in range(3):
        pull(params)
        optimizer.step()
    context = mp.get_context(method)
    answers = context.Queue()
    process = context.Process(target=go_on, args=(scheduler, answers))
    process.start()
    found, accumulated = answers.get(timeout=600)
    process.join()
    expected, same = alone({})
    assert found == [p.tolist() for p in expected] and accumulated == same.accumulated
    assert scheduler.steps == 3


class Own(Linear):
    """A schedule of the user's, which has a function of its own."""

    def __init__(self, function):
        super().__init__(0.5, 0.0, duration=6)
        object.__setattr__(self, "function", function)


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("schedule", {"schedule": lambda step: 0.1}),
        ("schedule", {"schedule": Own(lambda: None)}),
        ("groups", {"schedule": FALL, "groups": [(0, Own(lambda: None))]}),
    ],
)
def test_what_cannot_be_given_to_another_process_is_named(what, options):
    model = torch.nn.Linear(3, 2)
    optimizer = AdamW(model.parameters(), lr=0.1)
    scheduler = WeightDecayScheduler(optimizer, model=model, **options)
    with pytest.raises(TypeError, match=rf"^{what} must consist of what pickle can write.*top of"):
        pickle.dumps(scheduler)
    twin = copy.deepcopy(scheduler)  # within the process nothing is in the way
    pull(list(model.parameters()))
    optimizer.step()
    assert (scheduler.steps, twin.steps) == (1, 0)
