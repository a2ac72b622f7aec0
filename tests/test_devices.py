"""Tensors on another device: accepted, computed on the CPU, and returned where they came from."""

import pytest
import torch

import mirrorflow as mf
from cases import EVERY, SCHEDULES, loss
from mirrorflow import _devices

CUDA = torch.device("cuda")
CLOSED = [c for c in EVERY if c.commutes and not c.slow]


class Remote(torch.Tensor):
    """A tensor as if it were on a GPU: it refuses NumPy, and to meet tensors on the CPU."""

    device = property(lambda self: CUDA)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        flat = [a for v in args for a in (v if isinstance(v, (tuple, list)) else [v])]
        with torch._C.DisableTorchFunctionSubclass():
            tensors = [v for v in flat if isinstance(v, torch.Tensor) and v.ndim]
        if any(not isinstance(v, Remote) for v in tensors):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")
        return super().__torch_function__(func, types, args, kwargs or {})


def remote(value):
    if isinstance(value, torch.Tensor):
        return value.as_subclass(Remote)
    return tuple(remote(v) for v in value)


@pytest.fixture(autouse=True)
def there(monkeypatch):
    """Send what goes to CUDA to the pretended device."""
    to = _devices._to
    monkeypatch.setattr(
        _devices,
        "_to",
        lambda value, device: remote(value) if device == CUDA else to(value, device),
    )


def test_the_pretended_device_refuses_what_a_gpu_refuses():
    ones = torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        remote(ones) + ones
    with pytest.raises(TypeError, match="numpy"):
        remote(ones).numpy()
    assert (remote(ones) + remote(ones)).device == CUDA


@pytest.mark.parametrize("case", CLOSED, ids=lambda c: c.id)
def test_the_end_comes_back_where_Z_is(case):
    R, Z = mf.legendre(case.g, case.h, case.start(0)), loss(case, "least-squares").torch.Z
    y = torch.tensordot(Z, R.primal(torch.full_like(R.centre(0.0), 0.02), -0.1), R.centre(0.0).ndim)
    expected = mf.limit(R, Z, y, -0.1)
    R = mf.legendre(case.g, case.h, remote(case.start(0)))
    found = mf.limit(R, remote(Z), remote(y), -0.1)
    assert found.value.device == found.aux["theta"].device == CUDA
    assert (found.value.cpu() - expected.value).abs().max() < 1e-12


@pytest.mark.parametrize("view", ["parameters", "mirror"])
@pytest.mark.parametrize("own", [False, True])
def test_the_path_of_a_flow_comes_back_where_w0_is(view, own):
    case = next(c for c in EVERY if c.id == "hadamard")
    data, schedule = loss(case, "least-squares").torch, SCHEDULES["off-on-off"]
    expected = mf.flow(data, case.g, case.h, case.start(0), schedule, 2.0, view)
    Z, y = remote(data.Z), remote(data.y)
    there = (lambda x: ((Z @ x - y) ** 2).sum() / (2 * len(y))) if own else mf.LeastSquares(Z, y)
    found = mf.flow(there, case.g, case.h, remote(case.start(0)), schedule, 2.0, view)
    assert found.value.device == found.path.x.device == found.path.mu.device == CUDA
    assert (found.value.cpu() - expected.value).abs().max() < 1e-7


def test_check_takes_them():
    case = next(c for c in EVERY if c.id == "hadamard")
    assert mf.check(case.g, case.h, remote(case.start(0))).applies


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    monkeypatch.undo()
    case = next(c for c in EVERY if c.id == "hadamard")
    data, w0 = loss(case, "least-squares").torch, _devices.moved(case.start(0), CUDA)
    Z, y = data.Z.to(CUDA), data.y.to(CUDA)
    end = mf.limit(mf.legendre(case.g, case.h, w0), Z, y, -0.1)
    expected = mf.limit(mf.legendre(case.g, case.h, case.start(0)), data.Z, data.y, -0.1)
    assert end.value.is_cuda and (end.value.cpu() - expected.value).abs().max() < 1e-12
    path = mf.flow(mf.LeastSquares(Z, y), case.g, case.h, w0, mf.Constant(0.1), 1.0).path
    assert path.x.is_cuda and path.mu.is_cuda
