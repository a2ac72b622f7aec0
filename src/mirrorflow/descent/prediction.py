r"""The account of a run that has not been made, to first order in lr, from the flow alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from .._loss import LeastSquares, slope
from .._solution import Solution
from ..regularizer import Regularizer
from ..reparam import Parameters, Reparam
from ..schedule import Schedule
from ._account import Account, Unaccounted, coordinates
from .solve import drawn_amplitudes

__all__ = ["predicted_account", "require_predictable"]

Array = NDArray[np.float64]


def predicted_account(
    flow: Solution,
    loss: Callable[[Tensor], Tensor],
    lr: float,
    batch: int | None = None,
    label_noise: float | Schedule = 0.0,
    momentum: float = 0.0,
) -> Account:
    r"""Return the account of gradient descent on m * w with weight decay, from the flow alone.

    With eta = lr and beta = momentum, in the time t of the flow, a step takes eta/(1 - beta), and

    .. math::
        a_i = -\int \alpha\,dt
              - \frac{\eta}{2} \frac{1+\beta}{(1-\beta)^2} \int (\alpha^2 + G_i^2)\, dt
              - \frac{\eta}{2} \frac{1}{1-\beta} \int
                \Big(s\,\varphi\,V_i + \frac{\delta^2}{b} \overline{z_i^2}\Big) dt

    G is the gradient of the whole loss in x, V_i the variance of the gradients of single rows,
    s = (n - b)/(b (n - 1)) what batches of b out of n rows leave of it, delta the label noise;
    phi is 1 without momentum and less with it, as rows that the buffer has seen do not come again
    in the same epoch.
    So label noise is a weight decay alpha_i = (eta/2) delta^2 mean(z_i^2) at batch 1.

    Parameters
    ----------
    flow : Solution
        From `mirrorflow.flow` on ``Hadamard()`` with ``WeightDecay()``, with enough of ``save_at``
        (or its own steps) to resolve G^2 in time. With momentum, a schedule that acts at the step
        k has to act in the flow at the time k lr / (1 - momentum).
    loss : callable
        The loss of the flow; `LeastSquares` where a batch or label noise acts.
    lr, batch, label_noise, momentum
        As for `descend`.

    Returns
    -------
    Account
        At the times of the flow's path; ``mu`` is the flow's. What is left out is of second order
        in lr: the points that the run visits are not the flow's, and noise moves them.

    Raises
    ------
    ValueError
        If the solution has no path with mu, or lr, batch, label_noise or momentum is bad.
    TypeError
        If a batch or label noise is asked of a loss without rows.

    Examples
    --------
    >>> import torch, mirrorflow as mf
    >>> from mirrorflow.descent import predicted_account
    >>> loss = mf.LeastSquares(torch.tensor([[1.0, 2.0]]).double(), torch.tensor([1.0]).double())
    >>> w0 = (torch.zeros(2).double(), torch.ones(2).double())
    >>> pair = (loss, mf.Hadamard(), mf.WeightDecay(), w0, mf.SwitchOff(0.1, 1.0))
    >>> predicted = predicted_account(mf.flow(*pair, t_end=10.0), loss, lr=0.01)
    >>> trained = mf.descend(*pair, lr=0.01, steps=1000).path.account
    >>> torch.allclose(predicted.a[-1], trained.a[-1], atol=1e-4)
    True
    """
    _check_arguments(flow, loss, lr, batch, label_noise, momentum)
    path = flow.path
    assert path is not None
    t, x, mu, a = (_numpy(v) for v in (path.t, path.x, path.mu, path.a))
    # A step's factor is 1 - lr c, and log|1 - lr c| = -lr c - (lr c)^2/2: its square stores a.
    # With the buffer B it stores lr^2 / (2 (1 - beta)^2) sum G_k (2 B_k - G_k): where G is steady,
    # (1 + beta) / (1 - beta) G^2; where it is drawn anew, G^2. A step lasts lr / (1 - beta).
    smooth = -lr / 2 * (1 + momentum) / (1 - momentum) ** 2
    rough = -lr / 2 / (1 - momentum)
    if isinstance(loss, LeastSquares):
        G, scatter, squares = _row_statistics(loss, x)
        left, labels = _shares(len(loss.y), batch, momentum)
        amounts = _columns(_integrated_noise(label_noise, t, lr, momentum), x)
        noise = rough * (left * _integral(t, scatter) + labels * amounts * squares)
    else:
        G = np.stack([_numpy(slope(loss, point)) for point in path.x])
        noise = np.zeros_like(x)
    step = smooth * _integral(t, G**2)
    decay = _columns(a + smooth * _squared_rates(t, a), x) + np.zeros_like(x)
    return Account(*map(torch.from_numpy, (decay + step + noise, mu, decay, step, noise)))


def _row_statistics(loss: LeastSquares, x: Array) -> tuple[Array, Array, Array]:
    """Return the gradient at each x, the variance of those of single rows, and mean(z_i^2)."""
    Z, y = _numpy(loss.Z).reshape(len(loss.y), -1), _numpy(loss.y)
    r = x.reshape(len(x), *y.shape[1:], -1) @ Z.T - y.T  # a row for each column of y
    mean, squares = r @ Z / len(y), Z**2
    # Row i has the gradient r_i z_i: the mean of its square, less the square of its mean.
    variance = np.maximum(r**2 @ squares / len(y) - mean**2, 0.0)
    size = squares.mean(0).reshape(loss.Z.shape[1:])
    return mean.reshape(x.shape), variance.reshape(x.shape), size


def _shares(n: int, batch: int | None, momentum: float) -> tuple[float, float]:
    """Return what the batches of an epoch leave of the variances of rows and of labels."""
    batch = n if batch is None else batch
    sizes = np.array([batch] * (n // batch) + [n % batch] * (n % batch > 0), dtype=np.float64)
    labels = float(np.mean(1 / sizes))
    count = len(sizes)
    if count == 1:
        return 0.0, labels
    i = np.arange(1, count)
    # Two batches of an epoch have the covariance -V/(count - 1); the buffer weighs it momentum^i.
    seen = 1 - 2 / (count * (count - 1)) * float(((count - i) * momentum**i).sum())
    # The mean of b of n rows, drawn without replacement, has V (n - b) / (b (n - 1)).
    return float(np.mean((n - sizes) / (sizes * (n - 1)))) * seen, labels


def _integrated_noise(noise: float | Schedule, t: Array, lr: float, momentum: float) -> Array:
    """Return int delta^2 dt in the time of the flow, of which a step takes lr/(1 - momentum)."""
    if not isinstance(noise, Schedule):
        return noise**2 * t
    length = lr / (1 - momentum)
    grid = lr * np.arange(int(np.ceil(t[-1] / length)) + 1)
    sums = np.concatenate([[0.0], np.cumsum(noise.rate(grid) ** 2)]) * length
    return np.interp(t, length * np.arange(len(sums)), sums)


def _squared_rates(t: Array, a: Array) -> Array:
    """Return int alpha^2 dt, alpha being the mean rate between two times of the path."""
    length = np.diff(t)
    squares = np.diff(a) ** 2 / np.where(length > 0, length, 1.0)  # alpha^2 dt = (da/dt)^2 dt
    return np.concatenate([[0.0], np.cumsum(squares)])


def _integral(t: Array, values: Array) -> Array:
    """Return the integral up to each time, of what is smooth in between."""
    times, first, back = np.unique(t, return_index=True, return_inverse=True)
    if len(times) == 1:
        return np.zeros_like(values)
    whole = PchipInterpolator(times, values[first], axis=0).antiderivative()
    return np.asarray(whole(times) - whole(times[0]))[back]


def _columns(values: Array, x: Array) -> Array:
    """Return one value per time with the dimensions of x."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def _numpy(value: Tensor) -> Array:
    """Return a float64 NumPy array."""
    return value.detach().to("cpu", torch.float64).numpy()


def require_predictable(
    caller: str, g: Reparam, h: Regularizer, w0: Parameters, loss: object
) -> None:
    """Raise an error for a pair whose account is not known from its flow: all but m * w."""
    try:
        acting = coordinates(g, h, w0, loss)
    except Unaccounted:
        acting = None
    if acting is None or acting.basis is not None or (acting.slope, acting.decay) != (1.0, 1.0):
        raise ValueError(
            f"{caller}: lr must come with m * w (Hadamard, Depth(2)) and WeightDecay, got {g} with "
            f"{h}. Leave lr out: the step's share is not derived for this pair."
        )


def _check_arguments(
    flow: Solution,
    loss: Callable[[Tensor], Tensor],
    lr: float,
    batch: int | None,
    label_noise: float | Schedule,
    momentum: float,
) -> None:
    """Name the first bad argument."""
    if flow.path is None or flow.path.mu is None or flow.path.a is None:
        raise ValueError(
            "predicted_account: flow must have a path with mu and a. Pass mf.flow(...)"
        )
    if not 0 < lr < float("inf"):
        raise ValueError(f"predicted_account: lr must be positive and finite, got {lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"predicted_account: momentum must be in [0, 1), got {momentum}")
    drawn_amplitudes("predicted_account", loss, batch, label_noise, np.zeros(1))
