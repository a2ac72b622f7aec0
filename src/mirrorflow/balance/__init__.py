r"""Balance laws of discrete training: exact accounts for m * w and for products A B.

Under gradient flow with weight decay, ``D = A^T A - B B^T`` is ``e^{2a}`` times its start. Training
takes steps, on minibatches, with momentum or Adam, and then it is not: the size of D does not say
how much decay a run has absorbed. What holds is an identity, for any optimizer, loss and noise.
With the step ``A <- s A - P``, ``B <- s B - Q``, where ``s = 1 - lr decay`` and P, Q are what the
optimizer applied beside the decay,

.. math:: D \leftarrow s^2 D - s\,[A^T P + P^T A - B Q^T - Q B^T] + [P^T P - Q Q^T].

The first term is decay. The second, first order in the step, is 0 wherever P and Q are the same
multiple of the gradients of a loss of A B (``P = lr G B^T``, ``Q = lr A^T G``): momentum and Adam
make it. The third is what a finite step and the noise of its minibatch leave.

- `product_step` splits one step, `BalanceAccount` a run.
- `diagonal_step` is a step of ``m * w``, with what it adds to a and to mu per coordinate.
- `gauge_projection` changes D and leaves A B alone.
"""

from .account import BalanceAccount, BalanceSplit
from .gauge import GaugeProjection, gauge_projection
from .steps import DiagonalStep, ProductStep, diagonal_step, product_step

__all__ = [
    "BalanceAccount",
    "BalanceSplit",
    "DiagonalStep",
    "GaugeProjection",
    "ProductStep",
    "diagonal_step",
    "gauge_projection",
    "product_step",
]
