"""A no-decay policy exempts what it names, in new groups and within the groups of an optimizer."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import mirrorflow as mf
from mirrorflow.weightdecay import NoDecayPolicy, WeightDecayScheduler, lint, no_decay_policy
from mirrorflow.weightdecay.policy import PRESETS


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2)
        self.q_norm = nn.RMSNorm(4)
        self.mlp = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.A_log = nn.Parameter(torch.ones(4, 2))
        self.A_log._no_weight_decay = True


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 3, 4))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def no_weight_decay(self):
        return {"pos_embed"}


def decaying(groups):
    return {id(p) for g in groups if g["weight_decay"] for p in as_tensors(g["params"])}


def as_tensors(params):
    return [p[1] if isinstance(p, tuple) else p for p in params]


def names(model, ids):
    return {name for name, p in model.named_parameters() if id(p) in ids}


def by_hand(preset, model):
    """The rule of each preset as its source writes it: the names that do not decay."""
    found = set()
    for name, p in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        norm = "Norm" in type(owner).__name__
        marked = name == "pos_embed" or name.endswith("A_log")
        if preset == "nanogpt":
            out = p.dim() < 2
        elif preset == "timm":
            out = p.ndim <= 1 or name.endswith(".bias") or marked
        else:
            out = norm or marked or name.endswith(("bias", "in_proj_bias"))
        found |= {name} if out else set()
    return found


@pytest.mark.parametrize("preset", ["nanogpt", "timm", "biases-and-norms"])
def test_a_preset_exempts_what_its_source_does(preset):
    model = Model()
    assert set(no_decay_policy(preset).exempt(model)) == by_hand(preset, model)


def test_hf_exempts_what_the_trainer_does():
    trainer = pytest.importorskip("transformers").Trainer
    model = Model()
    decays = set(trainer.get_decay_parameter_names(None, model))
    every = {name for name, _ in model.named_parameters()}
    assert set(no_decay_policy("hf").exempt(model)) == every - decays


@pytest.mark.parametrize(
    ("policy", "found"),
    [
        (NoDecayPolicy(modules=(Block,), marks=False), "blocks."),
        (NoDecayPolicy(embeddings=True, marks=False), "embed.weight"),
        (NoDecayPolicy(channels=True, marks=False), "scale"),
        (NoDecayPolicy(marks=True), ("A_log", "pos_embed")),
        (NoDecayPolicy(predicate=lambda n, p, m: isinstance(m, nn.Linear), marks=False), "mlp"),
        (NoDecayPolicy(names=("q_norm",), marks=False), "q_norm"),
    ],
)
def test_each_field_exempts_by_itself(policy, found):
    model = Model()
    exempt = policy.exempt(model)
    kept = {name for name, _ in model.named_parameters()} - set(exempt)
    found = (found,) if isinstance(found, str) else found
    tied = {"embed.weight"} if policy.predicate else set()  # the head is a Linear
    nested = {n for n in exempt if "out_proj" in n} if policy.predicate else set()
    assert all(any(word in name for word in found) for name in set(exempt) - tied - nested)
    assert not any(word in name for word in found for name in kept)


@pytest.mark.parametrize("preset", PRESETS)
def test_new_groups_decay_what_the_policy_does_not_exempt(preset):
    model, policy = Model(), no_decay_policy(preset)
    model.blocks[0].mlp.requires_grad_(False)
    groups = policy.groups(model, 0.1, lr=0.01)
    optimizer = AdamW(groups)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    exempt = set(policy.exempt(model))
    assert not names(model, decaying(optimizer.param_groups)) & exempt
    assert not [f for f in lint(optimizer, model, policy=policy) if f.code == "against-policy"]


@pytest.mark.parametrize("preset", PRESETS)
def test_within_an_optimizer_whose_groups_stay_only_the_others_shrink(preset):
    model, policy = Model(), no_decay_policy(preset)
    optimizer = SGD(model.parameters(), lr=0.5, weight_decay=0.5)
    scheduler = WeightDecayScheduler(
        optimizer, mf.Constant(0.5), groups=policy.rules(model), decoupled=True
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    exempt = policy.exempt(model)
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), before[name] * (1.0 if name in exempt else 0.75)), name
    assert len(optimizer.param_groups) == 1
    found = lint(optimizer, model, scheduler, policy=policy)
    assert not [f for f in found if f.code == "against-policy"]


def test_lint_lists_what_differs_from_a_policy():
    model = Model()
    optimizer = AdamW(
        [
            {"params": list(model.blocks.parameters()), "weight_decay": 0.1},
            {"params": [model.embed.weight, model.pos_embed], "weight_decay": 0.0},
            {"params": list(model.norm.parameters()), "weight_decay": 0.0},
        ]
    )
    found = [f for f in lint(optimizer, model, policy="nanogpt") if f.code == "against-policy"]
    assert [(f.group, f.level) for f in found] == [(0, "warning"), (1, "note")]
    assert "embed.weight" in found[1].message
    with pytest.raises(ValueError, match="model"):
        lint(optimizer, policy="nanogpt")


def test_a_policy_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match="biases-and-norms, nanogpt, timm, hf"):
        no_decay_policy("biases")
    with pytest.raises(TypeError, match=r"classes of torch\.nn"):
        NoDecayPolicy(modules=("LayerNorm",))
    with pytest.raises(ValueError, match="regular expressions"):
        NoDecayPolicy(names=("(",))
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        NoDecayPolicy().exempt([torch.ones(2)])
