"""Steps, accounts and gauges that are refused."""

import math

import pytest
import torch

from mirrorflow.balance import BalanceAccount, diagonal_step, gauge_projection, product_step


def test_an_impossible_gauge_is_refused():
    A, B = torch.randn(6, 3), torch.randn(3, 6)
    symmetric = torch.eye(3)
    with pytest.raises(ValueError, match="must be symmetric"):
        gauge_projection(A, B, torch.randn(3, 3))
    with pytest.raises(ValueError, match="must have full rank"):
        gauge_projection(
            A * torch.tensor([1.0, 1, 0]), B * torch.tensor([[1.0], [1], [0]]), symmetric
        )
    for wanted in (-symmetric, torch.diag(torch.tensor([1.0, 1.0, -0.1]))):
        with pytest.raises(ValueError, match="must be reachable"):
            gauge_projection(A, torch.zeros(3, 6), wanted)
    with pytest.raises(ValueError, match="must have one shape"):
        gauge_projection(A, B, torch.eye(2))
    with pytest.raises(ValueError, match="must be finite"):
        gauge_projection(A, B, torch.full((3, 3), math.nan))


A, B = torch.ones(4, 2), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: product_step(A, B.mT, A, B.mT, 0.1, 0.0), r"must be A \(..., n, r\)"),
        (lambda: product_step(A, B, A[:2], B, 0.1, 0.0), "must keep its shape"),
        (lambda: product_step(A, B, A, B, math.nan, 0.0), "lr must be finite, got nan"),
        (lambda: product_step(A.int(), B, A, B, 0.1, 0.0), "floating-point data, got torch.int32"),
        (lambda: product_step(A.to("meta"), B, A, B, 0.1, 0.0), "got the meta device"),
        (lambda: BalanceAccount([]), "must not be empty"),
        (lambda: BalanceAccount([(A, B)]).step([], 1.0), "must be the 1 of the account"),
        (lambda: BalanceAccount([(A, B)]).step([(A[:0], B)], 1.0), r"must keep the shapes"),
        (lambda: BalanceAccount([(A, B)]).step([(A, B)], [1.0, 1.0]), "one entry for each of 1"),
        (lambda: BalanceAccount([(A, B)]).step([(A, B)], math.nan), "moved()"),
        (
            lambda: BalanceAccount([(A, B)]).load_state_dict(
                BalanceAccount([(A[:, :1], B[:1])]).state_dict(), [(A, B)]
            ),
            "must belong to these pairs",
        ),
        (lambda: diagonal_step(A, A, A, lr=2.0, decay=0.5), "must differ from 1"),
        (lambda: diagonal_step(A, A, B, lr=2.0), "must have one shape"),
        (lambda: diagonal_step(A, A, A, lr=math.inf), "lr must be finite"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert str(raised.value).count(". ") >= 1


def test_rates_and_factors_of_another_kind_are_named():
    A, B = torch.ones(3, 2), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"lr must be a number, or one for A and one for B, got"):
        product_step(A, B, A, B, lr=(0.1, 0.1, 0.1), decay=0.1)
    with pytest.raises(TypeError, match="A, B must be tensors, got ndarray"):
        product_step(A.numpy(), B.numpy(), A.numpy(), B.numpy(), lr=0.1, decay=0.1)
    pairs, tuples = (product_step(A, B, A, B, lr=k(r), decay=0.1) for k, r in (
        (list, (0.1, 0.2)), (tuple, (0.1, 0.2))))  # fmt: skip
    assert torch.equal(pairs.decay, tuples.decay)
