"""The account of factors that two processes share is that of one process."""

import pytest
import torch
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from mirrorflow.balance import BalanceAccount, gauge_projection, product_step

pytestmark = pytest.mark.slow

STEPS = 3
SHAPES = [  # of A and B: odd sizes are divided into unequal shards, of which some may be empty
    ((12, 4), (4, 6)),
    ((7, 3), (3, 5)),
    ((5, 1), (1, 9)),
    ((4, 6, 3), (4, 3, 5)),
    ((3, 5, 2), (3, 2, 7)),
]
SHRINK = [(0.9, 0.8), (0.95, 0.95), (1.0, 0.7), (0.9, 0.9), (0.85, 0.9)]
PARTS = ("left_by_decay", "optimizer", "second_order", "unsplit", "outside")


def states():
    """The factors of all pairs before and after each step."""
    random = torch.Generator().manual_seed(0)
    make = lambda shape: torch.randn(shape, generator=random)  # noqa: E731
    found = [[(make(a), make(b)) for a, b in SHAPES] for _ in range(STEPS + 2)]
    # W (r, n), as attention stores Q, read as A = W^T.
    return [
        [*pairs[:1], (pairs[1][0].mT.contiguous().mT, pairs[1][1]), *pairs[2:]] for pairs in found
    ]


def accounted(pairs):
    """Everything that this module computes, as numbers."""
    account = BalanceAccount(pairs[0])
    for now in pairs[1:-1]:
        account.step(now, SHRINK)
    saved = account.state_dict()
    again = BalanceAccount(pairs[0])
    again.load_state_dict(saved, pairs[-2])
    again.step(pairs[-1], SHRINK)
    account.interval(pairs[-1], SHRINK)
    found = [[getattr(s, name) for name in PARTS] for s in (*account.report(), *again.report())]
    for (A, B), (A_next, B_next) in zip(pairs[0], pairs[1], strict=True):
        taken = product_step(A, B, A_next, B_next, (0.1, 0.2), 0.3)
        found.append([taken.D, taken.decay, taken.optimizer, taken.second_order])
        made = gauge_projection(A, B, 0.5 * taken.D)
        found.append([made.transform, *(whole(f) for f in (made.A, made.B))])
    return found


def whole(factor):
    return factor.full_tensor() if hasattr(factor, "full_tensor") else factor


class Traffic(TorchDispatchMode):
    """The names of the collectives."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in str(func) and "wait" not in str(func) and "_wrap" not in str(func):
            self.seen.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def _measured(rank, world, file, queue):
    """Account for every way to divide the factors; count what travels in a step."""
    from torch.distributed import destroy_process_group, init_device_mesh, init_process_group
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    line = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b"))
    # By the dimension from behind, of A and of B: -2 of A and -1 of B are long.
    ways = {
        "long": lambda f, long: (line, [Shard(f.ndim + long)]),
        "inner": lambda f, long: (line, [Shard(f.ndim - 3 - long)]),
        "first": lambda f, long: (line, [Shard(0)]),  # as FSDP2
        "replicated": lambda f, long: (line, [Replicate()]),
        "both": lambda f, long: (grid, [Shard(f.ndim - 2), Shard(f.ndim - 1)]),
        "twice": lambda f, long: (grid, [Shard(0), Shard(0)]),
    }
    found = {}
    for way, where in ways.items():
        pairs = [
            [
                tuple(
                    distribute_tensor(f, *where(f, long))
                    for f, long in zip(pair, (-2, -1), strict=True)
                )
                for pair in now
            ]
            for now in states()
        ]
        account = BalanceAccount(pairs[0])
        with Traffic() as traffic:
            account.step(pairs[1], SHRINK)
        found[way] = traffic.seen, accounted(pairs)
    queue.put(
        (
            rank,
            [
                [way, seen, [[t.tolist() for t in row] for row in rows]]
                for way, (seen, rows) in found.items()
            ],
        )
    )
    destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    queue = mp.get_context("spawn").SimpleQueue()
    file = str(tmp_path_factory.mktemp("shards") / "store")
    processes = mp.start_processes(_measured, (2, file, queue), nprocs=2, join=False)
    found = dict(queue.get() for _ in range(2))
    while not processes.join():
        pass
    return found


def test_shards_of_all_placements_have_the_account_of_one_process(found):
    expected = accounted(states())
    for rank in range(2):
        for way, _, rows in found[rank]:
            for i, (row, wanted) in enumerate(zip(rows, expected, strict=True)):
                for part, one in zip(row, wanted, strict=True):
                    tol = 1e-5 if one.dtype == torch.float32 else 1e-11
                    other = torch.tensor(part, dtype=one.dtype).view(one.shape)
                    assert torch.allclose(other, one, rtol=tol, atol=10 * tol), (way, i)


def test_nothing_travels_in_a_step_unless_rows_are_cut(found):
    for rank in range(2):
        for way, seen, _ in found[rank]:
            if way in ("long", "replicated"):
                assert seen == [], way
            else:
                assert len(seen) <= 2 * len(SHAPES), way
