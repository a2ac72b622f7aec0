"""The account of D in a run that two processes share (FSDP2) is that of one process."""

import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import mirrorflow as mf
from mirrorflow.control import ControlledDecay

pytestmark = pytest.mark.slow

STEPS, STOP = 7, 4


class Net(torch.nn.Module):
    """Heads that shards keep whole, heads that they cut, a fused weight, and a plain product."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        make = lambda n, m: torch.nn.Linear(n, m, bias=False)  # noqa: E731
        self.whole, self.cut = torch.nn.Module(), torch.nn.Module()
        for module, heads in ((self.whole, 2), (self.cut, 3)):
            module.q_proj, module.k_proj = make(6, 3 * heads), make(6, 3 * heads)
            module.num_heads = heads
        self.fused = torch.nn.MultiheadAttention(6, 3, bias=False)
        self.down, self.up = make(6, 3), make(3, 6)

    def forward(self, x):
        x = x + self.up(self.down(x))
        for module in (self.whole, self.cut):
            q, k = module.q_proj(x), module.k_proj(x)
            q, k = (y.unflatten(-1, (module.num_heads, 3)).transpose(0, 1) for y in (q, k))
            x = x + (q @ k.mT).tanh().mean()
        return self.fused(x, x, x, need_weights=False)[0].square().mean() + x.square().mean()


def train(net):
    """The account at the end, which has been saved and loaded on the way."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1)
    pairs = {"plain": ("up.weight", "down.weight")}
    control = ControlledDecay(
        net, optimizer, mf.Constant(0.5), pairs=pairs, track_every=2, balance_every=1
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        net(torch.randn(5, 6, generator=torch.Generator().manual_seed(step))).backward()
        optimizer.step()
        control.step()
        if step == STOP:
            control.load_state_dict(json.loads(json.dumps(control.state_dict())))
    return control.report().to_dict()["D"]


def work(rank, path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{path}.store", rank=rank, world_size=2)
    net = Net()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    found = train(net)
    if rank == 0:
        path.write_text(json.dumps(found))
    dist.destroy_process_group()


def test_the_account_of_a_sharded_run_is_that_of_one_process(tmp_path):
    mp.spawn(work, args=(tmp_path / "found.json",), nprocs=2)
    found, expected = json.loads((tmp_path / "found.json").read_text()), train(Net())
    assert [row["name"] for row in found] == [row["name"] for row in expected]
    assert len(found) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["n_steps"] == STEPS and ours["unsplit"] == 0
        for name, value in theirs.items():
            assert ours[name] == (value if name == "name" else pytest.approx(value, abs=1e-5))
