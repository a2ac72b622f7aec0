"""What each of several processes does in tests/test_distributed_decay.py; run as a script."""

import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import mirrorflow as mf
from mirrorflow.control import ControlledDecay
from mirrorflow.spectrum import product_spectrum
from mirrorflow.weightdecay import PerLayer

STEPS, STOP, EVERY, LR = 8, 5, 2, 0.02


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        # No biases: those of keys have a gradient of 0, whose rounding errors Adam takes for one.
        make = torch.nn.MultiheadAttention
        self.blocks = torch.nn.ModuleList(make(8, 2, bias=False) for _ in range(2))
        self.head = torch.nn.Linear(8, 1)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x, x, x, need_weights=False)[0]
        return self.head(x)


SCHEDULES = {
    "switch": lambda: mf.SwitchOff(0.5, at=6),
    "overall": lambda: mf.HoldRatio(1.8, 0.3, gain=0.8, deadband=0.0),
    "per layer": lambda: PerLayer(lambda layer: mf.HoldRatio(1.8, 0.3, gain=0.8, deadband=0.0)),
}


def assemble(wrap, schedule, optimizer="adamw"):
    """Make what trains: wrapped, with groups with and without decay."""
    net = wrap(Net())
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    if optimizer == "sgd":
        made = torch.optim.SGD(groups, lr=LR, momentum=0.9, weight_decay=0.1)
        return net, made, ControlledDecay(net, made, schedule, track_every=EVERY, exact_off=True)
    made = torch.optim.AdamW(groups, lr=LR, weight_decay=0.1)
    return net, made, ControlledDecay(net, made, schedule, track_every=EVERY)


def train(net, optimizer, control, start, stop, rank=0, world=1):
    """Train on this process's part of each batch; give the decay of every step."""
    decays = []
    for step in range(start, stop):
        x = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(step))
        mine = x[:, rank::world]
        optimizer.zero_grad()
        (net(mine) - mine.sum(-1, keepdim=True)).square().mean().backward()
        decays.append(control.scheduler.get_last_weight_decay())
        optimizer.step()
        control.step()
    return decays


def full(net):
    """Return the whole weights."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return [p.detach().clone() for p in whole]


def account(net, control, decays):
    """Return what has to be alike everywhere."""
    ratios = [measured.mean_ratio for _, measured in control.measurements]
    return {
        "weights": full(net), "decays": decays, "a": control.scheduler.accumulated,
        "audit": control.scheduler.audit(), "ratios": ratios,
        "log": getattr(control.schedule, "log", []),
    }  # fmt: skip


def shard(net):
    """FSDP2, block by block."""
    for block in net.blocks:
        fully_shard(block)
    fully_shard(net)
    return net


def ddp(rank, world, folder, schedule, optimizer):
    """Train without and with a stop; rank 0 saves, everyone loads."""
    make = lambda: assemble(DistributedDataParallel, SCHEDULES[schedule](), optimizer)  # noqa: E731
    whole = make()
    expected = account(whole[0], whole[2], train(*whole, 0, STEPS, rank, world))
    first = make()
    train(*first, 0, STOP, rank, world)
    if rank == 0:
        torch.save([part.state_dict() for part in first], folder / "saved.pt")
    dist.barrier()
    saved = torch.load(folder / "saved.pt", weights_only=True)
    second = make()
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    train(*second, STOP, STEPS, rank, world)
    return expected, account(second[0], second[2], [])


def fsdp(rank, world, folder, schedule, optimizer):
    """The same with a sharded checkpoint, and a whole one for another world size."""
    make = lambda: assemble(shard, SCHEDULES[schedule](), optimizer)  # noqa: E731
    whole = make()
    expected = account(whole[0], whole[2], train(*whole, 0, STEPS, rank, world))
    first = make()
    train(*first, 0, STOP, rank, world)
    model, state = get_state_dict(first[0], first[1])
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder / "sharded")
    control = first[2].state_dict()
    gathered = get_state_dict(*first[:2], options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save([*gathered, control], folder / "saved.pt")

    second = make()
    model, state = get_state_dict(second[0], second[1])
    states = {"model": model, "optimizer": state}
    dcp.load(states, checkpoint_id=folder / "sharded")
    set_state_dict(
        *second[:2], model_state_dict=states["model"], optim_state_dict=states["optimizer"]
    )
    second[2].load_state_dict(control)
    train(*second, STOP, STEPS, rank, world)
    return expected, account(second[0], second[2], [])


def low_rank():
    """Return A and B of a product of three heads; 31 rows, so that the shards are unequal."""
    generator = torch.Generator().manual_seed(10)
    return [torch.randn(shape, generator=generator) for shape in ((3, 31, 4), (3, 4, 20))]


def spectra(rank, world):
    """Measure a product from shards: with a process group, and as DTensors of all placements."""
    A, B = low_rank()
    parts = A.chunk(world, 1)[rank], B.chunk(world, 2)[rank]
    found = [product_spectrum(*parts, dist.group.WORLD)]
    mesh = dist.init_device_mesh("cpu", (world,))
    for a, b in [
        (Shard(1), Shard(2)),  # the long dimensions: only Gram matrices travel
        (Shard(2), Shard(1)),  # the inner dimension, as FSDP2 shards lora_A
        (Shard(0), Shard(0)),  # the heads
        (Replicate(), Shard(2)),
    ]:
        pair = distribute_tensor(A, mesh, [a]), distribute_tensor(B, mesh, [b])
        found.append(product_spectrum(*pair))
    return [(spectrum.singular_values, spectrum.imbalance.norm()) for spectrum in found]


CASES = [("switch", "adamw"), ("switch", "sgd"), ("overall", "adamw"), ("per layer", "adamw")]


def main():
    """Be one of the processes, for all cases."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    warnings.simplefilter("ignore")  # torch's own
    warnings.filterwarnings("error", module="mirrorflow")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world,
        timeout=timedelta(minutes=10),
    )  # fmt: skip
    found = {("spectra",): spectra(rank, world)}
    for name, run in (("ddp", ddp), ("fsdp", fsdp)):
        for schedule, optimizer in CASES:
            place = folder / name / f"{schedule} {optimizer}"
            place.mkdir(parents=True, exist_ok=True)
            found[name, schedule, optimizer] = run(rank, world, place, schedule, optimizer)
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
