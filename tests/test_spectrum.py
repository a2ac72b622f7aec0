"""The spectrum of a product from Gram matrices, against the dense SVD."""

import pytest
import torch

from mirrorflow.spectrum import product_spectrum


def factors(seed, n, r, m, batch=(), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(*batch, n, r, generator=generator, dtype=torch.float64)
    B = torch.randn(*batch, r, m, generator=generator, dtype=torch.float64)
    return A.to(dtype), B.to(dtype)


@pytest.mark.parametrize(("n", "r", "m"), [(768, 8, 768), (40, 5, 60), (3, 5, 4), (7, 1, 9)])
def test_agrees_with_the_dense_svd(n, r, m):
    A, B = factors(0, n, r, m)
    dense = torch.linalg.svdvals(A @ B)
    spectrum = product_spectrum(A, B)
    k = min(n, r, m)
    assert torch.allclose(spectrum.singular_values, dense[:k], rtol=1e-12, atol=1e-12)
    assert abs(spectrum.nuclear / dense.sum() - 1) < 1e-13
    assert torch.isclose(spectrum.frobenius, torch.linalg.matrix_norm(A @ B), rtol=1e-13)


def test_batches_over_heads_and_layers():
    A, B = factors(1, 30, 4, 20, batch=(3, 2))
    batched = product_spectrum(A, B)
    for i in range(3):
        for j in range(2):
            single = product_spectrum(A[i, j], B[i, j])
            assert torch.allclose(batched.singular_values[i, j], single.singular_values)
    shared = product_spectrum(A, B[:, :1])  # one key head for two query heads
    assert shared.ratio.shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_factors_lose_nothing_more(dtype):
    A, B = factors(2, 64, 6, 64, dtype=dtype)
    dense = torch.linalg.svdvals(A.double() @ B.double())[:6]
    assert torch.allclose(product_spectrum(A, B).singular_values, dense, rtol=1e-12)


def test_ratios_of_a_zero_product_are_undefined_and_the_norms_are_zero():
    A, _ = factors(3, 10, 4, 10)
    spectrum = product_spectrum(A, torch.zeros(4, 10))
    assert not spectrum.defined and spectrum.nuclear == 0
    for value in (spectrum.ratio, spectrum.stable_rank, spectrum.effective_rank):
        assert torch.isnan(value)


def test_rank_deficient_factors_have_the_rank_of_the_product():
    A, B = factors(4, 50, 8, 50)
    A[:, 3:] = 0
    dense = torch.linalg.svdvals(A @ B)
    spectrum = product_spectrum(A, B)
    assert torch.isclose(spectrum.nuclear, dense.sum(), rtol=1e-7)
    assert (spectrum.singular_values[3:] < 1e-7 * dense[0]).all()


def test_known_spectra():
    U, V = torch.linalg.qr(torch.randn(9, 4))[0], torch.linalg.qr(torch.randn(7, 4))[0]
    s = torch.tensor([4.0, 2.0, 1.0, 1.0])
    spectrum = product_spectrum((U * s.sqrt()).double(), (s.sqrt()[:, None] * V.mT).double())
    assert spectrum.ratio.item() == pytest.approx(8 / 22**0.5, rel=1e-6)
    assert spectrum.stable_rank.item() == pytest.approx(22 / 16, rel=1e-6)
    p = (s / 8).tolist()
    entropy = -sum(q * torch.log(torch.tensor(q)).item() for q in p)
    assert spectrum.effective_rank.log().item() == pytest.approx(entropy, rel=1e-6)
    assert spectrum.gap.item() == pytest.approx(0, abs=1e-5)  # balanced and aligned
    assert spectrum.imbalance.abs().max() < 1e-5


def test_errors_name_the_factor():
    A, B = factors(5, 6, 2, 6)
    with pytest.raises(ValueError, match=r"A \(\.\.\., n, r\)"):
        product_spectrum(A, B.mT)
    B[0, 0] = torch.nan
    with pytest.raises(ValueError, match="B holds NaN"):
        product_spectrum(A, B)
