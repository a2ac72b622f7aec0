"""The spectrum of a product from Gram matrices, against the dense SVD."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mirrorflow.spectrum import SpectralTracker, product_spectrum
from mirrorflow.spectrum import _grams as gram


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
    assert abs(spectrum.nuclear / dense.sum() - 1) < 1e-12
    assert torch.isclose(spectrum.frobenius, torch.linalg.matrix_norm(A @ B), rtol=1e-12)


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
    with pytest.raises(ValueError, match=r"shapes \(\.\.\., n, r\)"):
        product_spectrum(A, B.mT)
    B[0, 0] = torch.nan
    with pytest.raises(ValueError, match="B must be finite"):
        product_spectrum(A, B)


@pytest.mark.parametrize(("n", "r", "m"), [(50, 8, 40), (4, 8, 40), (40, 8, 3)])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_batch_holds_full_deficient_and_zero_products_side_by_side(n, r, m, rank):
    A, B = factors(6, n, r, m, batch=(4,))
    A[1, :, rank:] = 0
    B[2, rank:] = B[2, :1]
    B[3] = 0
    dense = torch.linalg.svdvals(A @ B)
    spectrum = product_spectrum(A, B)
    assert spectrum.defined.tolist() == [True, True, True, False]
    assert torch.allclose(spectrum.nuclear, dense.sum(-1), rtol=1e-7, atol=1e-12)
    assert torch.allclose(spectrum.frobenius, torch.linalg.matrix_norm(A @ B), rtol=1e-7)
    stable = (dense.norm(dim=-1) / dense[:, 0]) ** 2
    assert torch.allclose(spectrum.stable_rank[:3], stable[:3], rtol=1e-7)
    assert torch.isnan(spectrum.ratio[3]) and spectrum.nuclear[3] == 0


def test_a_product_that_is_rounding_alone_is_zero():
    # A B = 0 although neither factor is: an invented ratio would be that of the rounding errors.
    Q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    A, B = torch.randn(20, 3, dtype=torch.float64), torch.randn(5, 20, dtype=torch.float64)
    spectrum = product_spectrum(A @ Q[:, :3].T, Q[:, 3:] @ B)
    assert not spectrum.defined and spectrum.nuclear == 0 and spectrum.gap > 1
    assert torch.isnan(spectrum.ratio)


@pytest.mark.parametrize("spread", [1e-2, 1e-5, 1e-9])
def test_ill_conditioned_products_keep_their_nuclear_norm(spread):
    U, V = (torch.linalg.qr(torch.randn(60, 10, dtype=torch.float64))[0] for _ in range(2))
    s = torch.logspace(0, math.log10(spread), 10, dtype=torch.float64)
    mix = torch.randn(10, 10, dtype=torch.float64)
    spectrum = product_spectrum(U * s @ mix, torch.linalg.solve(mix, V.T))
    assert spectrum.nuclear.item() == pytest.approx(s.sum().item(), rel=1e-6)
    assert torch.allclose(spectrum.singular_values, s, atol=1e-7)


@pytest.mark.parametrize("size", [1e-25, 1e-12, 1e12])
def test_the_ratios_do_not_depend_on_the_size(size):
    A, B = factors(7, 30, 4, 30, dtype=torch.float32)
    one, other = product_spectrum(A, B), product_spectrum(A * size, B)
    assert other.defined
    assert torch.isclose(other.ratio, one.ratio, rtol=1e-6)
    assert torch.isclose(other.nuclear, one.nuclear * size, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 500, 4), (1, 3000, 4), (2, 3, 500, 4), (5000, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_matrices_are_the_same_in_chunks(shape, dtype, monkeypatch):
    rows = torch.randn(shape).to(dtype).mT
    expected = rows.double() @ rows.double().mT
    monkeypatch.setattr(gram, "CHUNK", 900)
    assert torch.allclose(gram.gram(rows), expected, rtol=1e-12)


def test_no_float64_copy_of_a_large_factor_is_made():
    class Largest(TorchDispatchMode):
        """The largest float64 tensor that an operation makes."""

        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found.dtype == torch.float64:
                self.size = max(self.size, found.untyped_storage().nbytes() // 8)
            return found

    A = torch.randn(3, 1 << 18, 4)
    with Largest() as seen:
        product_spectrum(A, A.mT)
    assert 0 < seen.size <= gram.CHUNK


class Sizes(TorchDispatchMode):
    """How many elements the largest tensor has that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return found


@pytest.mark.parametrize("kind", ["full rank", "deficient", "zero", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_product_is_never_formed(kind, dtype):
    torch.manual_seed(0)
    n, r, m = 600, 8, 500
    A, B = torch.randn(n, r), torch.randn(r, m)
    if kind == "deficient":
        A[:, 3:] = 0
    if kind == "small":
        A[:, 4:] *= 1e-9
        B[:4] = 0  # B lies where A is small
    if kind == "zero":
        B = B * 0
    A, B = A.to(dtype), B.to(dtype)
    with Sizes() as seen:
        product_spectrum(A, B)
    assert seen.largest <= r * max(n, m) < n * m


def test_a_tracker_never_forms_a_product_through_a_small_dimension():
    model = torch.nn.Module()
    model.num_heads = 4
    model.q_proj, model.k_proj = (torch.nn.Linear(400, 16, bias=False) for _ in range(2))
    for level in ("layer", "head"):
        tracker = SpectralTracker(model, level=level)
        with Sizes() as seen:
            tracker.measure()
        assert 0 < seen.largest <= 16 * 400


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (torch.empty(4, 2, device="meta"), "A is on the meta device"),
        (torch.zeros(4, 2, dtype=torch.int8), "A is int8, not floating: dequantize"),
    ],
)
def test_factors_without_numbers_are_refused(factor, message):
    with pytest.raises(ValueError, match=message):
        product_spectrum(factor, torch.ones(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_chunks_that_share_their_memory_give_the_same_gram(dtype, monkeypatch):
    rows = torch.randn(7, 5, 300, dtype=torch.float64).to(dtype)
    whole = gram.gram(rows)
    monkeypatch.setattr(gram, "CHUNK", 1000)  # a part of one entry
    torch.testing.assert_close(gram.gram(rows), whole, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(gram, "CHUNK", 4000)  # two entries
    torch.testing.assert_close(gram.gram(rows), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole, whole.mT, rtol=1e-12, atol=1e-12)


def test_one_singular_factor_among_others_is_measured_as_alone():
    A = torch.randn(5, 20, 4, generator=torch.Generator().manual_seed(0))
    A[2, :, 3] = 0.0  # its Gram matrix has no Cholesky factor
    B = torch.randn(5, 4, 30, generator=torch.Generator().manual_seed(1))
    values = product_spectrum(A, B).singular_values
    dense = torch.linalg.svdvals(A.double() @ B.double())[..., :4]
    torch.testing.assert_close(values, dense, rtol=1e-10, atol=1e-12)
    assert values[2, 3] < 1e-11 and (values[[0, 1, 3, 4], 3] > 1).all()


def test_the_start_of_lora_keeps_its_stored_geometry():
    A, _ = factors(8, 16, 4, 16)
    spectrum = product_spectrum(A, torch.zeros(4, 16))
    assert torch.allclose(spectrum.imbalance, A.T @ A)
    assert torch.isclose(spectrum.gap, A.norm() ** 2 / 2)


def test_gradients_are_not_tracked():
    A, B = factors(9, 6, 2, 6)
    assert not product_spectrum(A.requires_grad_(), B).ratio.requires_grad
