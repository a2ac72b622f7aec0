"""`check`: which pairs (g, h) the theory covers, and what it says of those it does not."""

import numpy as np
import pytest
import torch

import mirrorflow as mf
from cases import COMMUTE, COMMUTING, EIGEN, FAIL, GENERAL

DECAY, TERMS = mf.WeightDecay(), mf.Separable()
AT = torch.from_numpy(np.random.default_rng(5).uniform(0.6, 1.1, (4, 3)))
TWO, THREE = (AT[0], AT[1] / 2), (AT[0], AT[1], AT[2])


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def orthogonal(n, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]


def aligned(n, m, count=4):
    """Return matrices (count, n, m) with shared singular vectors."""
    U, V = orthogonal(n, 1), orthogonal(m, 2)
    s = np.random.default_rng(3).standard_normal((count, min(n, m)))
    return torch.from_numpy(np.einsum("ik,ak,jk->aij", U[:, : s.shape[1]], s, V[:, : s.shape[1]]))


def measurements(case):
    return None if case.span is None else torch.from_numpy(case.span.T.reshape(-1, 3, 3))


def failing(report):
    return {c.name for c in report.conditions if not c.ok}


def custom(fn):
    return mf.CustomRegularizer(fn)


# Decisions.


@pytest.mark.parametrize("case", COMMUTE, ids=str)
@pytest.mark.sample(9)
def test_pairs_that_the_theory_covers(case, seed=1):
    report = mf.check(case.g, case.h, case.start(seed), sensing=measurements(case), seed=seed)
    assert report and report.applies and report.regular and report.commuting
    assert report.advice == ""
    assert report.pair == f"{case.g} with {case.h}"
    assert report.explain().startswith(f"{case.g} with {case.h}: Theorem 3.2 applies.\n  yes ")


@pytest.mark.parametrize("case", FAIL, ids=str)
def test_pairs_that_the_theory_does_not_cover(case, seed=0):
    report = mf.check(case.g, case.h, case.start(seed), seed=seed)
    assert not report and not report.applies and not report.commuting and not report.contracting
    worst = max(c.size for c in report.conditions if c.name == "commuting" and not c.ok)
    assert 1e-2 < worst <= 1
    text = report.explain()
    assert "Theorem 3.2 does not apply" in text and text.endswith(report.advice)
    assert f"NO  commuting ({worst:.2g}): [grad g_i, grad " in text


@pytest.mark.parametrize(
    ("g", "h", "w0", "well_posed", "contracting"),
    [
        (mf.Hadamard(), DECAY, TWO, True, True),
        (mf.PowerDifference(2), TERMS, TWO, True, True),
        (mf.PowerDifference(2), mf.Separable((1.0, 1.0)), TWO, False, True),  # u^4 - v^4, u > v
        (mf.PowerDifference(2), mf.Separable((1.0, 1.0)), TWO[::-1], False, False),
        (mf.LogRatio(), TERMS, (AT[0] + 1, AT[1] + 1), False, True),
        (mf.LogRatio(), TERMS, (AT[0] / 2, AT[1] / 2), False, False),  # log u + log v < 0
        (mf.CommutingQuadratic(torch.from_numpy(COMMUTING)), DECAY, AT[:, 0], True, True),
        (mf.Identity(), TERMS, AT[0], False, True),  # sum x is a line, positive at the start
        (mf.Identity(), custom(lambda x: x.sum() - 9), AT[0], False, False),
    ],
)
@pytest.mark.sample(2)
def test_penalties_that_commute_need_not_contract(g, h, w0, well_posed, contracting):
    report = mf.check(g, h, w0)
    assert report.applies
    assert (report.well_posed, report.contracting) == (well_posed, contracting)


def test_the_logarithms_of_log_ratio_are_named():
    text = mf.check(mf.LogRatio(), TERMS, TWO).explain()
    assert "NO  well posed: h has logarithms, which fall without bound" in text
    assert "Theorem 3.2 applies" in text


L1 = custom(lambda x: x.abs().sum())
L1_OF_ALL = custom(lambda w: sum(f.abs().sum() for f in w))


@pytest.mark.parametrize(
    ("h", "start"),
    [
        (L1, AT[0]),
        (L1, vector(5.0)),
        (L1, vector(-0.2, 0.7)),
        (L1, vector(1e-6, 1.0)),
    ],
)
@pytest.mark.sample(2)
def test_corollary_d_1_without_overparametrization_no_norm_commutes(h, start):
    """Also where the start is far from the kink of L1, or so close that no flow gets by."""
    report = mf.check(mf.Identity(), h, start)
    assert not report.commuting and report.well_posed
    assert report.advice.startswith("Corollary D.1: without overparametrization only a linear h")


def test_a_deep_product_with_another_penalty_is_advised_to_take_weight_decay():
    report = mf.check(mf.Depth(3), L1_OF_ALL, THREE)
    assert failing(report) == {"commuting", "contracting"}
    assert report.advice.endswith("up to a change of clock, with WeightDecay().")


@pytest.mark.parametrize(
    ("g", "terms"),
    [
        (mf.PowerDifference(2), "h = u^4 + v^4."),
        (mf.PowerDifference(3), "h = u^6 + v^6."),
        (mf.LogRatio(), "h = log u + log v."),
    ],
)
@pytest.mark.sample(1)
def test_corollary_3_7_names_the_penalty_that_works(g, terms):
    report = mf.check(g, L1_OF_ALL, TWO)
    assert report.advice.startswith("Corollary 3.7") and report.advice.endswith(terms)
    assert mf.check(g, TERMS, TWO).applies


@pytest.mark.slow
def test_theorem_3_10_needs_matrices_that_commute():
    w0 = AT[:, 0]
    bad = mf.check(mf.CommutingQuadratic(torch.from_numpy(GENERAL)), DECAY, w0)
    assert bad.advice.startswith("Theorem 3.10: the matrices A_i must commute")
    assert "largest at w0 for i = " in bad.explain()
    g = mf.CommutingQuadratic(torch.from_numpy(COMMUTING))
    B = torch.from_numpy(COMMUTING[0] @ COMMUTING[0] + COMMUTING[1])
    assert mf.check(g, custom(lambda w: w @ B @ w / 2), w0).applies
    other = mf.check(g, custom(lambda w: w @ torch.from_numpy(GENERAL[0]) @ w / 2), w0)
    assert not other.commuting
    assert "h = 1/2 w^T B w works for a symmetric B that commutes with every A_i" in other.advice


def test_a_pair_of_matrices_that_does_not_commute_is_found_by_its_indices():
    A = np.array([np.diag([1.0, 2, 3]), np.diag([0.5, -1, 2]), np.eye(3), np.diag([1.0, 1, 4])])
    A[3, 0, 1] = A[3, 1, 0] = 1e-3
    report = mf.check(mf.CommutingQuadratic(torch.from_numpy(A[1:])), DECAY, AT[0])
    assert not report.commuting and "i = 0, j = 2" in report.explain()


# Matrices.


@pytest.mark.parametrize(
    ("g", "w0"),
    [
        (mf.SymmetricFactor(), torch.from_numpy(orthogonal(3, 0))),
        (mf.Product(), (torch.from_numpy(orthogonal(3, 0)), torch.from_numpy(orthogonal(3, 4)))),
    ],
)
@pytest.mark.sample(1)
def test_general_data_on_matrices_and_what_is_needed(g, w0):
    general = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 3, 3)))
    for sensing in (None, general):
        report = mf.check(g, DECAY, w0, sensing=sensing)
        assert failing(report) == {"commuting", "contracting"}
        assert "aligned with the factors" in report.advice
        assert "measurements <A_i, X> with commuting A_i" in report.advice


def test_measurements_that_commute():
    eigen = torch.from_numpy(EIGEN.T.reshape(-1, 3, 3))
    U0 = torch.from_numpy(orthogonal(3, 0))
    assert mf.check(mf.SymmetricFactor(), DECAY, U0, sensing=eigen).applies
    skew = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 3, 3)))
    assert mf.check(mf.SymmetricFactor(), DECAY, U0, sensing=eigen + skew - skew.mT).applies
    tilted = eigen.clone()
    tilted[0, 0, 1] += 1e-4
    assert not mf.check(mf.SymmetricFactor(), DECAY, U0, sensing=tilted).commuting


@pytest.mark.parametrize(("n", "m"), ((3, 3), (2, 4), (4, 2)))
def test_measurements_with_shared_singular_vectors(n, m):
    A, B = (torch.from_numpy(np.random.default_rng(n).standard_normal(s)) for s in ((n, n), (n, m)))
    assert mf.check(mf.Product(), DECAY, (A, B), sensing=aligned(n, m)).applies


def test_a_thin_factor_is_not_regular():
    eigen = torch.from_numpy(EIGEN.T.reshape(-1, 3, 3))
    report = mf.check(mf.SymmetricFactor(), DECAY, AT[:3, :2], sensing=eigen)
    assert report.commuting and not report.regular
    assert report.advice.startswith("Corollary C.3: start from U0 U0^T = beta I")
    assert "NO  regular (0): J_g loses rank at w0" in report.explain()


# Regularity.


def test_a_coordinate_that_starts_at_zero_of_all_factors_is_found_among_many():
    m, w = torch.zeros(5000), torch.ones(5000)
    assert mf.check(mf.Hadamard(), DECAY, (m, w)).applies
    w[4321] = 0
    report = mf.check(mf.Hadamard(), DECAY, (m, w))
    assert not report.regular and report.commuting
    assert report.advice.startswith("Definition A.3: start where no row of J_g vanishes")
    w[:] = 0
    assert mf.check(mf.Hadamard(), DECAY, (m, w)).advice == report.advice


@pytest.mark.parametrize(
    ("g", "h", "w0"),
    [
        (mf.Hadamard(), DECAY, (vector(0.0, 0.0, 0.0), vector(1e-14, 1.0, 1e5))),
        (mf.PowerDifference(5), TERMS, (vector(0.01, 0.9), vector(0.02, 0.8))),
        (mf.LogRatio(), TERMS, (vector(1e-7, 1e7), vector(2e-7, 1e7))),
    ],
)
@pytest.mark.sample(2)
def test_coordinates_of_very_different_sizes_are_regular(g, h, w0):
    """Rows that share no parameter are independent, whatever their sizes."""
    assert mf.check(g, h, w0).regular


# Brackets whose two terms are 0 up to rounding.

norm = torch.linalg.vector_norm


def length_of_two(w):
    return torch.sqrt(w[0] ** 2 + w[1] ** 2)


def group_lengths(w):
    return torch.stack([norm(w[:3]), norm(w[3:])])


NORMS = {
    "one coordinate": (mf.CustomReparam(lambda w: norm(w).reshape(1)), custom(norm)),
    "elementwise": (
        mf.CustomReparam(length_of_two, elementwise=True),
        mf.CustomRegularizer(lambda w: length_of_two(w).sum(), elementwise=True),
    ),
    "groups": (mf.CustomReparam(group_lengths), custom(lambda w: group_lengths(w).sum())),
    "one of two": (mf.CustomReparam(group_lengths), custom(lambda w: norm(w[:3]))),
}


@pytest.mark.parametrize(
    ("name", "size"),
    [("one coordinate", 1e-6), ("elementwise", 1.0), ("groups", 1e6), ("one of two", 1.0)],
)
@pytest.mark.sample(1)
def test_norms_commute_with_themselves(name, size):
    """r = r0 + mu + a: the gradient of |w| has unit length, and does not change along itself."""
    w = size * vector(1.0, 0.5, 0.3, 0.7, -0.4)
    w0 = (w, 2 * w) if name == "elementwise" else w
    report = mf.check(*NORMS[name], w0)
    assert report.applies and report.contracting, report.explain()


@pytest.mark.slow
def test_a_norm_does_not_commute_with_another():
    w = vector(1.0, 0.5, 0.3)
    g = mf.CustomReparam(lambda w: norm(w).reshape(1))
    report = mf.check(g, custom(lambda w: norm(w * vector(1.0, 1.0, 2.0))), w)
    assert not report.commuting and report.advice.startswith("h must commute with every")
    assert mf.check(g, DECAY, w).degree == 1  # with weight decay it does, up to a change of clock
    assert mf.check(mf.CustomReparam(lambda w: (w @ w).reshape(1)), DECAY, w).degree == 2


# Models whose coordinates determine one another.


@pytest.mark.parametrize(
    ("fn", "rank"),
    [
        (lambda w: torch.softmax(w, 0), 3),
        (lambda w: w * w / (w @ w), 3),
        (lambda w: torch.cat([w, w[:2]]), 4),
        (lambda w: torch.stack([w.sum(), (2 * w).sum(), w.prod()]), 2),
    ],
    ids=("softmax", "squares on the simplex", "copies", "sums"),
)
@pytest.mark.sample(2)
def test_a_rank_that_no_start_repairs_is_named(fn, rank):
    report = mf.check(mf.CustomReparam(fn), DECAY, vector(1.0, 0.5, 0.3, 0.8))
    assert not report.regular
    assert f"J_g has rank {rank} at random points as well" in report.advice
    assert "no row of J_g vanishes" not in report.advice


def test_a_start_of_low_rank_is_told_from_a_model_of_low_rank():
    g = mf.CustomReparam(lambda w: torch.stack([w[0] * w[1], w[2] * w[3]]))
    report = mf.check(g, DECAY, vector(0.0, 0.0, 1.0, 0.5))
    assert "start where J_g has rank 2, as at random points; from w0 it falls to 1" in report.advice
    flat = mf.CustomReparam(lambda w: w / w.abs(), elementwise=True)
    assert "rank 0 at random points as well" in mf.check(flat, DECAY, vector(1.0, 2.0)).advice


@pytest.mark.parametrize("g", (mf.Hadamard(), mf.Depth(2)))
@pytest.mark.sample(1)
def test_two_factors_are_not_taken_for_more(g):
    fourth = mf.CustomRegularizer(lambda w: (w[0] ** 4).sum(), elementwise=True)
    assert "WeightDecay() does" in mf.check(g, fourth, TWO).advice


# Pairs of a user's own.


def cubes(w):
    return w[0] ** 3 + w[0] - w[1] ** 3 - w[1]


def positive_cubes(w):
    return (w[0] ** 3 + w[0] + w[1] ** 3 + w[1]).sum()


def rotated(w):
    return torch.stack([w[0] * w[1], w[0] + w[1] ** 2])


def neighbours(w):
    return w * w + 0.1 * w.roll(1)


@pytest.mark.parametrize("promise", (False, True))
@pytest.mark.sample(1)
def test_ones_own_separable_pair(promise):
    """u^3 + u - v^3 - v commutes with u^3 + u + v^3 + v (Corollary 3.7), but not with decay."""
    g = mf.CustomReparam(cubes, elementwise=promise)
    good = mf.check(g, mf.CustomRegularizer(positive_cubes, elementwise=promise), TWO)
    assert good.applies and good.contracting
    bad = mf.check(g, DECAY, TWO)
    assert failing(bad) == {"commuting", "contracting"}
    assert bad.advice.startswith("h must commute with every coordinate of g")


def test_ones_own_g_whose_coordinates_do_not_commute():
    report = mf.check(mf.CustomReparam(rotated), DECAY, AT[0, :2])
    assert not report.commuting
    assert report.advice.startswith("The coordinates of g do not commute with each other")
    assert "largest at w0 for i = 0, j = 1" in report.explain()


def one_bad(w):
    """Return weight decay, but w^4 in the last of many coordinates."""
    return (w[0] ** 2 + w[1] ** 2)[:-1].sum() / 2 + 1e-3 * w[1][-1] ** 4


def test_many_good_coordinates_do_not_hide_a_bad_one():
    w0 = (torch.zeros(300, dtype=torch.float64), torch.ones(300, dtype=torch.float64))
    report = mf.check(mf.Hadamard(), mf.CustomRegularizer(one_bad, elementwise=True), w0)
    assert not report.commuting and max(c.size for c in report.conditions) > 0.1


@pytest.mark.parametrize(
    ("g", "h", "w0", "culprit"),
    [
        (mf.CustomReparam(neighbours, elementwise=True), DECAY, AT[0], "J_g of CustomReparam(neig"),
        (
            mf.Hadamard(),
            mf.CustomRegularizer(lambda w: w[0].sum() ** 2, elementwise=True),
            TWO,
            "grad of CustomRegularizer",
        ),
        (
            mf.Hadamard(),
            mf.CustomRegularizer(lambda w: (w[0] ** 2).sum() + w[1].sum() ** 2, elementwise=True),
            TWO,
            "grad of CustomRegularizer",
        ),
    ],
    ids=("g", "h in m", "h in w"),
)
@pytest.mark.sample(2)
def test_a_false_promise_of_elementwise_is_found(g, h, w0, culprit):
    report = mf.check(g, h, w0)
    broken = [c for c in report.conditions if "although elementwise=True was promised" in c.detail]
    assert not report.applies and broken and culprit in broken[0].detail
    assert report.advice.startswith("Leave elementwise=True out")


@pytest.mark.parametrize("seed", (1, 3))
@pytest.mark.parametrize(
    ("fn", "bounded"),
    [
        (lambda x: torch.cos(x).sum(), True),
        (lambda x: torch.log1p(x * x).sum() - 9, True),
        (lambda x: -torch.log1p(x * x).sum(), False),
        (lambda x: -torch.exp(x).sum(), False),
        (lambda x: (x**2 - 1e-8 * x**4).sum(), False),
        (lambda x: torch.sinh(x).sum(), False),  # inf - inf at large x
        (lambda x: torch.cosh(x).sum(), True),
    ],
    ids=("cos", "log", "-log", "-exp", "quartic", "sinh", "cosh"),
)
@pytest.mark.sample(4)
def test_whether_ones_own_penalty_is_bounded_below(fn, bounded, seed):
    assert mf.check(mf.Identity(), custom(fn), AT[0], seed=seed).well_posed == bounded


# The report.


TINY = tuple(vector(*f) for f in ((1.0, 2.0), (3.0, -1.0)))


@pytest.mark.parametrize("size", (1e-80, 1e-300))
@pytest.mark.parametrize(
    ("g", "h", "applies", "power"),
    [
        (mf.Hadamard(), DECAY, True, 1),
        (mf.CustomReparam(lambda w: w[0] * w[1]), DECAY, True, 1),
        (mf.PowerDifference(2), TERMS, True, 3),
        (mf.PowerDifference(2), DECAY, True, 3),
        (mf.PowerDifference(2), L1_OF_ALL, False, 3),
    ],
)
@pytest.mark.sample(2)
def test_starts_of_any_size(g, h, applies, power, size):
    """The squares of 1e-200 underflow; the conditions are relative."""
    size = size ** (1 / power)
    report = mf.check(g, h, tuple(size * f for f in TINY))
    assert report.regular and report.commuting is applies, report.explain()


@pytest.mark.slow
def test_reports_are_determined_by_the_seed_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    pair = (mf.Depth(3), L1_OF_ALL, THREE)
    reports = [mf.check(*pair, seed=s) for s in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    first, again, other = ([c.size for c in r.conditions if c.ok is False] for r in reports)
    assert first[:2] == again[:2] != other[:2]
    assert reports[0].explain() == reports[1].explain()


def test_the_start_is_left_alone():
    w0 = tuple(f.clone().requires_grad_() for f in TWO)
    assert mf.check(mf.Hadamard(), DECAY, w0).applies
    assert all(f.requires_grad and f.grad is None for f in w0)
    assert all(torch.equal(a, b) for a, b in zip(w0, TWO, strict=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.sample(1)
def test_low_precision_starts_are_decided_in_double(dtype):
    w0 = tuple(f.to(dtype) for f in TWO)
    for h, applies in ((TERMS, True), (DECAY, True), (L1_OF_ALL, False)):
        assert mf.check(mf.PowerDifference(2), h, w0).applies == applies


def test_x_may_have_any_shape():
    w0 = (AT.reshape(2, 3, 2), AT.reshape(2, 3, 2) / 3)
    assert mf.check(mf.Hadamard(), DECAY, w0).applies
    assert mf.check(mf.Hadamard(), DECAY, (AT[0, 0], AT[0, 0] / 2)).applies
    assert not mf.check(mf.PowerDifference(2), L1_OF_ALL, w0).applies
