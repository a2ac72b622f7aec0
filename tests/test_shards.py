"""What travels between two processes when sharded factors are measured, and that it is right."""

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mirrorflow.spectrum import SpectralTracker

pytestmark = pytest.mark.slow

WIDE = 96  # the width of the model: factors are (rows, WIDE)


class Attention(nn.Module):
    """Q and K side by side; K has fewer heads."""

    def __init__(self, heads=4, key_heads=2, width=4):
        super().__init__()
        self.num_heads, self.head_dim = heads, width
        self.q_proj = nn.Linear(WIDE, heads * width, bias=False)
        self.k_proj = nn.Linear(WIDE, key_heads * width, bias=False)


class Fused(nn.Module):
    """[Q, K, V] in one weight."""

    def __init__(self, heads=6):
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(WIDE, 3 * WIDE, bias=False)


# build, level, dtype
CASES = {
    "layer": (Attention, "layer", torch.float32),
    "bfloat16": (Attention, "layer", torch.bfloat16),
    "head": (Attention, "head", torch.float32),
    "odd heads": (lambda: Attention(3, 3, 5), "head", torch.float32),  # 15 rows: 8 and 7
    "odd layer": (lambda: Attention(3, 3, 5), "layer", torch.float32),
    "fused heads": (lambda: Fused(6), "head", torch.float32),  # heads of 16
    "fused layer": (lambda: Fused(6), "layer", torch.float32),
    "fused halves": (lambda: Fused(4), "head", torch.float32),  # heads of 24; K has two each
}


def build(name):
    torch.manual_seed(0)
    make, level, dtype = CASES[name]
    return make().to(dtype), level


def numbers(model, level):
    records = SpectralTracker(model, level=level).measure().records
    return [[r.nuclear, r.ratio, r.gap, r.imbalance] for r in records]


class Traffic(TorchDispatchMode):
    """The collectives and the elements that each is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if "c10d" in name and "wait" not in name and "_wrap" not in name:
            data = args[1] if "alltoall" in name else args[0]  # it has its output first
            data = data[0] if isinstance(data, list) else data
            self.seen.append((name.split(".")[1], data.numel()))
        return func(*args, **(kwargs or {}))


def _measured(rank, world, file, queue):
    """Measure every case: as FSDP2 shards, along the long dimension, and on a mesh of two axes."""
    from torch.distributed import destroy_process_group, init_device_mesh, init_process_group
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    grid = init_device_mesh("cpu", (1, world), mesh_dim_names=("a", "b"))
    other = init_device_mesh("cpu", (world, 1), mesh_dim_names=("a", "b"))

    def spread(model, mesh, *placements):
        for module in model.modules():
            for key, weight in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(distribute_tensor(weight, mesh, placements)))
        return model

    ways = {
        "fsdp": lambda m: fully_shard(m, mesh=mesh),
        "long": lambda m: spread(m, mesh, Shard(1)),
        "replicated": lambda m: spread(m, grid, Replicate(), Shard(0)),
        "both": lambda m: spread(m, other, Shard(0), Shard(1)),
        "twice": lambda m: spread(m, grid, Shard(0), Shard(0)),
    }
    found = {}
    for name in CASES:
        for way, shard in ways.items():
            model, level = build(name)
            shard(model)
            with Traffic() as traffic:
                values = numbers(model, level)
            with CommDebugMode() as counted:
                numbers(model, level)
            assert counted.get_total_counts() == len(traffic.seen)
            found[name, way] = values, traffic.seen
    queue.put((rank, found))
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


@pytest.mark.parametrize("name", CASES)
def test_shards_of_all_placements_measure_what_one_process_measures(found, name):
    expected = torch.tensor(numbers(*build(name)))
    for rank in range(2):
        for (case, way), (values, _) in found[rank].items():
            if case == name:
                assert torch.allclose(torch.tensor(values), expected, rtol=1e-6, atol=1e-9), way


def test_only_grams_travel_where_the_long_dimension_is_sharded(found):
    for (name, way), (_, seen) in found[0].items():
        if way == "long":
            model, level = build(name)
            (pair,) = SpectralTracker(model, level=level).pairs
            heads = (pair.heads, pair.key_heads) if level == "head" else (1, 1)
            rows = (pair.shape[1], pair.shape[1] * pair.key_heads // pair.heads)
            grams = [h * (r // h) ** 2 for h, r in zip(heads, rows, strict=True)]
            assert seen == [("all_reduce", size) for size in grams], name


def test_only_grams_travel_where_every_process_holds_whole_heads(found):
    assert found[0]["head", "fsdp"][1] == [("all_reduce", 4 * 16), ("all_reduce", 2 * 16)]
    for rank in range(2):  # Q is on rank 0, and half of K is on each
        seen = found[rank]["fused halves", "fsdp"][1]
        assert seen == [("all_reduce", 4 * 24**2)] * 2


def exchanged(rows, gram):
    return [("alltoall_base_", rows * WIDE), ("all_reduce", gram)]


def test_rows_that_are_cut_are_exchanged_and_never_gathered(found):
    # Each process gives the rows that it holds, of which it keeps its share of the columns.
    for case in ("layer", "bfloat16"):
        assert found[0][case, "fsdp"][1] == exchanged(8, 16**2) + exchanged(4, 8**2)
    for rank, rows in enumerate((8, 7)):
        assert found[rank]["odd layer", "fsdp"][1] == exchanged(rows, 15**2) * 2
        assert found[rank]["odd heads", "fsdp"][1] == exchanged(rows, 3 * 5**2) * 2
    for (name, way), (_, seen) in found[0].items():  # rows that are cut twice are gathered once
        assert way == "twice" or not any("gather" in kind for kind, _ in seen), (name, way)


def test_of_a_fused_weight_only_the_rows_of_a_factor_travel(found):
    # 3 x 96 rows on two processes: Q's 96 are all on the first, K's 96 are divided at 48.
    layer = WIDE**2
    assert found[0]["fused layer", "fsdp"][1] == exchanged(96, layer) + exchanged(48, layer)
    assert found[1]["fused layer", "fsdp"][1] == exchanged(0, layer) + exchanged(48, layer)
    # By head nothing but Grams: 48 is a multiple of the heads' width.
    assert found[0]["fused heads", "fsdp"][1] == [("all_reduce", 6 * 16**2)] * 2
