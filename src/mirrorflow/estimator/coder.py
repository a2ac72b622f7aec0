r"""Sparse coding by gradient descent on u and v, z = u^{2k} - v^{2k} or log u - log v."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array as sklearn_check_array
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import validate_data

__all__ = ["MirrorFlowCoder", "codes", "lipschitz"]

check_array: Any = sklearn_check_array  # its defaults mislead type checkers

Array = NDArray[Any]


def lipschitz(dictionary: Array) -> float:
    """Give the largest eigenvalue of D D^T: the curvature of |x - z D|^2 / 2 in z."""
    return float(np.linalg.norm(dictionary, 2)) ** 2


def codes(
    X: Array,
    dictionary: Array,
    form: str,
    k: int,
    alpha: float,
    beta: float,
    start: Array,
    step: float,
    off: float = np.inf,
) -> Iterator[Array]:
    r"""Give the codes z (n_samples, n_components) before the first step, after it, and so on.

    The steps descend :math:`\tfrac12 |x - z D|^2 + \alpha h(u, v)`, with the h that commutes with
    g (Corollary 3.7): u^{2k} + v^{2k}, or log u + log v. From step ``off`` on alpha is 0.
    """
    w = np.stack(_start(form, k, beta, np.broadcast_to(start, (len(X), len(dictionary)))))
    w = w.astype(X.dtype)
    gram, pull = dictionary @ dictionary.T, X @ dictionary.T
    signs = np.array([1.0, -1.0], dtype=X.dtype)[:, None, None]
    count = 0
    while True:
        z = w[0] ** (2 * k) - w[1] ** (2 * k) if form == "power" else np.log(w[0]) - np.log(w[1])
        yield z
        slope = 2 * k * w ** (2 * k - 1) if form == "power" else 1 / w
        decay = alpha if count < off else 0.0
        w = w - step * slope * (signs * (z @ gram - pull) + decay)
        count += 1


def _start(form: str, k: int, beta: float, x: Array) -> tuple[Array, Array]:
    """Give u and v with g(u, v) = x (Appendix E; for the power its erratum 14)."""
    if form == "power":
        root = np.sqrt(x**2 + beta**2)
        # The smaller of root + x and root - x without cancellation: their product is beta^2.
        large, small = (root + np.abs(x)) / 2, beta**2 / (2 * (root + np.abs(x)))
        u, v = np.where(x > 0, large, small), np.where(x > 0, small, large)
        return u ** (1 / (2 * k)), v ** (1 / (2 * k))
    return 1 / (beta * (1 + np.exp(-x))), 1 / (beta * (1 + np.exp(x)))


class MirrorFlowCoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Code signals in a given dictionary by training u and v, z = g(u, v).

    .. math:: \min_{u, v} \tfrac12 |x - g(u, v) D|^2 + \alpha h(u, v)

    by gradient descent. It is used like `sklearn.decomposition.SparseCoder`.

    Parameters
    ----------
    dictionary : array of shape (n_components, n_features)
        The atoms, one in each row; none may be 0.
    form : {"power", "log"}, default="power"
        g = u^{2k} - v^{2k} with h = sum u^{2k} + v^{2k}, which makes codes sparse, or g = log u -
        log v with h = sum log u + log v, whose decay spreads them.
    k : int, default=1
        Half the power.
    alpha : float, default=0.001
        The strength of h, >= 0.
    beta : float, default=0.01
        The scale of the start; for the power, small values make sparser codes.
    start : float or array that broadcasts to (n_samples, n_components), default=0.0
        The codes at the start.
    learning_rate : float, default=0.1
        The length of a step, in units of 1 / Lip(D), Lip(D) the largest eigenvalue of D D^T.
    n_steps : int, default=1000
        The number of steps: all of them are taken.
    switch_off : int or None, default=None
        The step from which on alpha is 0.

    Attributes
    ----------
    n_components_ : int
        The number of atoms.
    n_features_in_, feature_names_in_
        As everywhere in scikit-learn.

    Examples
    --------
    >>> import numpy as np
    >>> from mirrorflow import MirrorFlowCoder
    >>> D = np.eye(3)[[0, 1, 2, 0]] + np.eye(3)[[0, 1, 2, 1]]
    >>> coder = MirrorFlowCoder(D, alpha=0.01, n_steps=5000)
    >>> np.flatnonzero(coder.transform([[2.0, 0.0, 0.0]]).round(2))
    array([0])
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "dictionary": ["array-like"],
        "form": [StrOptions({"power", "log"})],
        "k": [Interval(Integral, 1, None, closed="left")],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "beta": [Interval(Real, 0, None, closed="neither")],
        "start": [Real, "array-like"],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "n_steps": [Interval(Integral, 0, None, closed="left")],
        "switch_off": [Interval(Integral, 0, None, closed="left"), None],
    }

    def __init__(
        self,
        dictionary: Any,
        *,
        form: str = "power",
        k: int = 1,
        alpha: float = 0.001,
        beta: float = 0.01,
        start: Any = 0.0,
        learning_rate: float = 0.1,
        n_steps: int = 1000,
        switch_off: int | None = None,
    ) -> None:
        self.dictionary = dictionary
        self.form = form
        self.k = k
        self.alpha = alpha
        self.beta = beta
        self.start = start
        self.learning_rate = learning_rate
        self.n_steps = n_steps
        self.switch_off = switch_off

    def fit(self, X: Any, y: Any = None) -> MirrorFlowCoder:
        """Check the parameters: there is nothing to learn.

        Parameters
        ----------
        X : array of shape (n_samples, n_features)
            Signals.
        y : ignored

        Returns
        -------
        self
        """
        self._validate_params()
        X = validate_data(self, X, dtype=[np.float64, np.float32])
        self._atoms(X)
        return self

    def transform(self, X: Any) -> Array:
        """Code signals.

        Parameters
        ----------
        X : array of shape (n_samples, n_features)
            Signals.

        Returns
        -------
        array of shape (n_samples, n_components)
        """
        self._validate_params()
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        D = self._atoms(X)
        off = np.inf if self.switch_off is None else self.switch_off
        if self.switch_off is not None and off > self.n_steps:
            raise ValueError(
                f"switch_off={off} comes after n_steps={self.n_steps}: the decay would never be "
                "switched off; None says so"
            )
        start = self._starts((len(X), len(D)))
        steps = codes(
            X, D, self.form, self.k, self.alpha, self.beta, start,
            self.learning_rate / lipschitz(D), off,
        )  # fmt: skip
        with np.errstate(all="ignore"):
            for _, z in zip(range(self.n_steps + 1), steps, strict=False):
                if not np.isfinite(z).all():
                    raise ValueError(self._diverged())
        return z

    def _starts(self, shape: tuple[int, int]) -> Array:
        """Give the codes at the start, checked."""
        start = np.asarray(self.start, dtype=np.float64)
        if not np.isfinite(start).all():
            raise ValueError("start holds NaN or infinite numbers")
        try:
            return np.broadcast_to(start, shape)
        except ValueError:
            raise ValueError(
                f"start must broadcast to (n_samples, n_components) = {shape}, has {start.shape}"
            ) from None

    def _diverged(self) -> str:
        """Say why codes are not finite, and what to do."""
        if self.form == "log":
            return "u or v has reached 0, where log ends: lower learning_rate, alpha, or n_steps"
        return "gradient descent diverged: lower learning_rate"

    def _atoms(self, X: Array) -> Array:
        """Give the dictionary, checked."""
        D = check_array(self.dictionary, dtype=X.dtype, input_name="dictionary")
        if D.shape[1] != X.shape[1]:
            raise ValueError(
                f"the atoms of dictionary have {D.shape[1]} features, X has {X.shape[1]} features"
            )
        if not (np.abs(D).max(axis=1) > 0).all():
            raise ValueError("dictionary has an atom that is 0 everywhere")
        return D

    def inverse_transform(self, X: Any) -> Array:
        """Give the signals z D of codes.

        Parameters
        ----------
        X : array of shape (n_samples, n_components)
            Codes.

        Returns
        -------
        array of shape (n_samples, n_features)
        """
        return check_array(X, dtype=[np.float64, np.float32]) @ np.asarray(self.dictionary)

    @property
    def n_components_(self) -> int:
        """The number of atoms."""
        return len(self.dictionary)

    @property
    def _n_features_out(self) -> int:
        return len(self.dictionary)

    def __sklearn_tags__(self) -> Any:
        """Need no fit, and keep float32."""
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
