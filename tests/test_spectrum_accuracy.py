"""How exact spectra are: products far smaller than their factors, and products that are formed.

Two ways lead to the singular values of a product whose Gram matrices lose too much; both are
compared with factors whose product is known beforehand.
"""

import pytest
import torch

from mirrorflow.spectrum import SpectralTracker, product_spectrum
from mirrorflow.spectrum._grams import gram
from mirrorflow.spectrum.product import spectrum_of_grams

S = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
RATIO = S.sum() / S.norm()


def orthogonal(n, k):
    return torch.linalg.qr(torch.randn(n, k, dtype=torch.float64))[0]


def small_product(size, n=60, m=50):
    """A and B of size 1 whose product has the singular values size S.

    A = U diag(1, size S) W and B = W^T [0; 1] V^T meet in r = 8, W orthogonal: B lies where A is
    small, and A^T A holds the squares of that. The product is determined to EPS / size.
    """
    scale = torch.cat([torch.ones(4, dtype=torch.float64), size * S])
    U, V, W = orthogonal(n, 8), orthogonal(m, 4), orthogonal(8, 8)
    return U * scale @ W, W[4:].mT @ V.mT


def cancelling_product(size, n=60, m=50):
    """The same from factors without full rank: A = U [1, a] W, B = W^T [b; 1] V^T, a = size S - b.

    Here rounding is all that the small directions of the Gram matrices hold.
    """
    b = torch.randn(4, 4, dtype=torch.float64)
    U, V, W = orthogonal(n, 4), orthogonal(m, 4), orthogonal(8, 8)
    eye = torch.eye(4, dtype=torch.float64)
    return U @ torch.cat([eye, torch.diag(size * S) - b], 1) @ W, W.mT @ torch.cat([b, eye]) @ V.mT


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e-8, 1e-9, 1e-10])
@pytest.mark.parametrize("make", [small_product, cancelling_product])
def test_a_product_far_smaller_than_its_factors_keeps_its_ratio(size, make):
    torch.manual_seed(0)
    A, B = make(size)
    spectrum = product_spectrum(A, B)
    assert spectrum.defined and A.norm() * B.norm() > 3
    known = 1e-15 / size  # what the entries of A and B determine
    assert torch.isclose(spectrum.ratio, RATIO, rtol=max(known, 1e-10))
    torch.testing.assert_close(spectrum.singular_values[:4], size * S, rtol=10 * known, atol=0)
    assert (spectrum.singular_values[4:] < 1e-12).all()


@pytest.mark.parametrize("make", [small_product, cancelling_product])
def test_what_is_rounding_alone_has_no_ratio(make):
    torch.manual_seed(0)
    A, B = make(1e-17)
    spectrum = product_spectrum(A, B)
    assert not spectrum.defined and torch.isnan(spectrum.ratio) and spectrum.nuclear == 0


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-9])
def test_gram_matrices_alone_give_the_ratio_or_nothing(size):
    # This is all that sharded factors give: an error of the root of EPS.
    torch.manual_seed(0)
    A, B = small_product(size)
    spectrum = spectrum_of_grams(gram(A.mT), gram(B), 8)
    assert spectrum.defined.item() == (size > 1e-6)
    if spectrum.defined:
        assert torch.isclose(spectrum.ratio, RATIO, rtol=1e-2)


def test_a_tracker_measures_small_products_by_layer_and_by_head():
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.num_heads, model.head_dim = 4, 8
    model.q_proj = torch.nn.Linear(60, 32, bias=False)
    model.k_proj = torch.nn.Linear(50, 16, bias=False)  # two key heads
    parts = [small_product(1e-9) for _ in range(2)]
    with torch.no_grad():
        model.double()
        model.k_proj.weight.copy_(torch.cat([B for _, B in parts]))
        model.q_proj.weight.copy_(torch.cat([parts[i // 2][0].mT for i in range(4)]))
    heads = SpectralTracker(model, level="head").measure()
    assert [r.status for r in heads.records] == ["ok"] * 4
    assert [r.ratio for r in heads.records] == pytest.approx([RATIO.item()] * 4, rel=1e-5)
    (whole,) = SpectralTracker(model).measure().records
    Q, K = model.q_proj.weight.detach(), model.k_proj.weight.detach()
    K = K.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    dense = torch.linalg.svdvals(Q.mT @ K)
    assert whole.ratio == pytest.approx((dense.sum() / dense.norm()).item(), rel=1e-5)


@pytest.mark.parametrize(("n", "r", "m"), [(40, 40, 40), (40, 60, 50), (30, 40, 90), (5, 64, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_wide_products_agree_with_the_dense_svd(n, r, m, dtype):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, n, r, generator=generator).to(dtype)
    B = torch.randn(1, r, m, generator=generator).to(dtype)
    A[1, :, 2:] = 0  # rank 2
    dense = torch.linalg.svdvals(A.double() @ B.double())
    spectrum = product_spectrum(A, B)
    torch.testing.assert_close(spectrum.nuclear, dense.sum(-1), rtol=1e-10, atol=0)
    torch.testing.assert_close(spectrum.frobenius, dense.norm(dim=-1), rtol=1e-12, atol=0)
    ratio = dense.sum(-1) / dense.norm(dim=-1)
    torch.testing.assert_close(spectrum.ratio, ratio, rtol=1e-10, atol=0)
    torch.testing.assert_close(spectrum.gram_b, B.double() @ B.double().mT)
    zero = product_spectrum(A * 0, B)
    assert not zero.defined.any() and (zero.nuclear == 0).all()


@pytest.mark.parametrize("slope", [1.0, 3.0])
def test_decaying_wide_spectra_agree_with_the_dense_svd(slope):
    torch.manual_seed(0)
    s = torch.arange(1, 201, dtype=torch.float64) ** -slope
    A, B = orthogonal(200, 200) * s, orthogonal(200, 200)
    assert product_spectrum(A, B).nuclear.item() == pytest.approx(s.sum().item(), rel=1e-10)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [((0, 3), (3, 4), "0 x 4"), ((4, 3), (3, 0), "4 x 0")],
)
def test_an_empty_product_is_refused(a, b, message):
    with pytest.raises(ValueError, match=f"A B must not be empty, got {message}"):
        product_spectrum(torch.zeros(a), torch.zeros(b))


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_a_small_product_of_full_rank_keeps_its_norm(size):
    """Each factor is small where the other is large, so that no singular value stands out."""
    small, large = torch.full((4,), size, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    U, V, W = orthogonal(60, 8), orthogonal(50, 8), orthogonal(8, 8)
    A = U * torch.cat([large, small]) @ W
    B = W.mT * torch.cat([small, large]) @ V.mT
    # The product is determined to EPS / size.
    tolerance = 1e-10 + 1e-15 / size
    assert product_spectrum(A, B).nuclear.item() == pytest.approx(8 * size, rel=tolerance)
