"""An oracle for attention: the q, k and output that a model's own forward makes of basis vectors.

The input of one attention module is replaced by basis vectors, each a sequence of its own at
position 0, where rotary embeddings do not turn. Without biases its q is then W_Q^T, its scores are
W_Q^T W_K up to one factor, and its output, as a single token attends to itself, is the sum of
W_O W_V over the heads. q and k are seen where they meet: in the first product of activations.
"""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

MATMUL, BMM = (torch.matmul, torch.Tensor.matmul), (torch.bmm, torch.Tensor.bmm)
NORMS = (
    "q_norm",
    "k_norm",
    "q_layernorm",
    "k_layernorm",
    "query_layernorm",
    "key_layernorm",
    "qk_norm",
    "v_norm",
)


class Seen(Exception):
    """The forward of the module is over; there is no need to go on."""


class Meeting(TorchFunctionMode):
    """Records the q and k that a product or an attention function is called with."""

    def __init__(self):
        super().__init__()
        self.found = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.found is None:
            if func is nn.functional.scaled_dot_product_attention:
                self.found = list(args[:2]) or [kwargs["query"], kwargs["key"]]
            elif func in (torch.baddbmm, torch.Tensor.baddbmm):
                a, b = kwargs.get("batch1"), kwargs.get("batch2")
                self.found = [args[1] if a is None else a, (args[2] if b is None else b).mT]
            elif func is torch.einsum and args[0].startswith("bind,bjnd"):  # Funnel
                self.found = [part.transpose(1, 2) for part in args[1:3]]
            elif func in BMM or (func in MATMUL and all(a.ndim >= 4 for a in args[:2])):
                self.found = [args[0], args[1].mT]
        return func(*args, **kwargs)


def prepared(model, norms=False):
    """Random weights, no biases, and no normalization of q and k, which hides their size.

    What does not train stays as it is: RoFormer's table of rotations is among the parameters.
    """
    for module in list(model.modules()):
        for norm in () if norms else NORMS:
            if isinstance(getattr(module, norm, None), nn.Module):
                setattr(module, norm, nn.Identity())
    for name, weight in model.named_parameters():
        if "bias" in name:
            nn.init.zeros_(weight)
        elif weight.requires_grad:
            nn.init.normal_(weight, std=0.5)
    return model.double().eval()


def forward(model, module, run):
    """q (in, heads, width), k (in, key heads, width), and the output (in, out), of basis vectors.

    ``run(model)`` calls the model with as many sequences as the module's input is wide. Tokens of a
    sequence all get the same input, and the first is looked at.
    """
    mode, seen = Meeting(), {}

    def before(_, args, kwargs):
        name = next((n for n in ("hidden_states", "query", "x") if n in kwargs), None)
        shown = kwargs[name] if name else args[0]
        x = torch.eye(shown.shape[-1], dtype=torch.float64)[:, None].expand(shown.shape)
        mode.__enter__()
        same = lambda a: isinstance(a, torch.Tensor) and a.shape == x.shape  # noqa: E731
        if name is None:  # CTRL's takes the input three times
            return tuple(x if same(a) else a for a in args), kwargs
        return args, {**kwargs, name: x}

    def after(_, args, output):
        mode.__exit__(None, None, None)
        seen["out"] = output[0] if isinstance(output, (tuple, list)) else output
        raise Seen

    hooks = (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    )
    try:
        with torch.no_grad():
            run(model)
    except Seen:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    q, k = (part[..., 0, :] for part in mode.found)
    out = seen["out"]
    return q.reshape(len(out), -1, q.shape[-1]), k.reshape(len(out), -1, k.shape[-1]), out[:, 0]
