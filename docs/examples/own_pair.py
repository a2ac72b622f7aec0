"""Your own g and h: x = e^u - e^v, from the check to the flow. Run me: python own_pair.py"""

import torch

import mirrorflow as mf


def difference(w):
    u, v = w
    return torch.exp(u) - torch.exp(v)


def total(w):
    u, v = w
    return (torch.exp(u) + torch.exp(v)).sum()


# elementwise: x_i depends on u_i and v_i only, and h is a sum over i. `check` tests the promise.
g = mf.CustomReparam(difference, elementwise=True)
h = mf.CustomRegularizer(total, elementwise=True)
w0 = (
    torch.tensor([-1.0, -0.8], dtype=torch.float64),
    torch.tensor([-1.1, -0.9], dtype=torch.float64),
)
pair = (g, h, w0)


def main():
    # 1. Does the theory apply? Plain weight decay does not commute with this g; its own terms do.
    print(mf.check(g, mf.WeightDecay(), w0).explain())
    print(mf.check(*pair).explain())

    # 2. R_a, by inversion: the minimizer, the range of mu, the mirror of a point.
    R = mf.legendre(*pair)
    print("centre ", R.centre(0.0), "->", R.centre(-2.0))
    bounds = R.range(-2.0)
    print("range  ", bounds)

    # 3. Train, with decay until t = 4, and compare the mirror of x with mu: the law of the theory.
    Z = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    loss = mf.LeastSquares(Z, torch.tensor([0.7], dtype=torch.float64))
    trained = mf.flow(loss, *pair, mf.SwitchOff(0.5, at=4.0), t_end=200.0, rtol=1e-10)
    x, mu, a = trained.value, trained.path.mu[-1], trained.path.a[-1]
    print("status ", trained.status.value)
    print("law    ", (R.mirror(x, float(a)) - mu).abs().max().item())
    return bounds, trained


if __name__ == "__main__":
    main()
