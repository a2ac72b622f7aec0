r"""Sparse coding by gradient descent on u and v, z = u^{2k} - v^{2k} or log u - log v."""

from __future__ import annotations

import warnings
from copy import copy
from itertools import islice
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array as sklearn_check_array
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import validate_data

from .._threads import small_on_one_thread
from ._base import without_small
from ._codes import codes, lipschitz, settled_codes, sizes

__all__ = ["MirrorFlowCoder", "codes", "lipschitz"]

check_array: Any = sklearn_check_array  # its defaults mislead type checkers

Array = NDArray[Any]


class MirrorFlowCoder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Code signals in a given dictionary by training u and v, z = g(u, v).

    .. math:: \min_{u, v} \tfrac12 |x - g(u, v) D|^2 + \alpha h(u, v)

    by gradient descent. It is used like `sklearn.decomposition.SparseCoder`.

    Parameters
    ----------
    dictionary : array of shape (n_components, n_features)
        The atoms, one in each row; none may be 0. They need not have norm 1.
    form : {"power", "log"}, default="power"
        g = u^{2k} - v^{2k} with h = sum u^{2k} + v^{2k}, which makes codes sparse, or g = log u -
        log v with h = sum log u + log v, whose decay spreads them.
    k : int, default=1
        Half the power.
    alpha : float, default=0.1
        The strength of h, >= 0, absolute: not divided by the number of features. For the power it
        acts like the penalty alpha \|z\| of the lasso, and from alpha = max \|x D^T\| on all codes
        are 0.
    beta : float, default=0.01
        The scale of the start; for the power in units of the size of a signal's codes, the largest
        that one atom alone would have. Where alpha is 0 small values make sparser codes.
    start : float or array that broadcasts to (n_samples, n_components), default=0.0
        The codes at the start.
    learning_rate : "adaptive" or float, default="adaptive"
        The length of the steps. "adaptive" chooses it for each signal from its own u and v, so
        that no size of signals diverges, and stops once codes have settled. A number is the length
        in units of 1 / Lip(D), Lip(D) the largest eigenvalue of D D^T, as in the paper: n_steps
        steps are taken, whether they settle or not; it must be smaller for larger signals.
    n_steps : int, default=20000
        The largest number of steps, and with a number as ``learning_rate`` their number.
    tol : float, default=1e-3
        When codes have settled ("adaptive" only): when the lasso's duality gap proves them to be
        within ``tol`` of the least value, relative to it. Where alpha is 0, when the largest force
        on a code is at most ``tol`` times that on codes 0.
    switch_off : int or None, default=None
        The step from which on alpha is 0; with "adaptive" already once codes have settled.
    zero_tol : float, default=1e-3
        Codes smaller than ``zero_tol`` times the largest of their signal are set to exactly 0:
        training makes them small, never 0. With 0 they are left as they are.
    positive_code : bool, default=False
        Whether codes are >= 0: z = u^{2k}, without v. For the power only.
    n_nonzero : int or None, default=None
        The most codes of a signal that are not 0: the largest are left as they are, the others are
        set to 0 (they are not fitted again).

    Attributes
    ----------
    n_components_ : int
        The number of atoms.
    n_features_in_, feature_names_in_
        As everywhere in scikit-learn.

    Warns
    -----
    ConvergenceWarning
        From `transform`, if codes have not settled after ``n_steps`` steps ("adaptive" only). There
        is no ``n_iter_``: coding leaves nothing behind in the coder.

    Notes
    -----
    For the power, c times the signals with c times alpha (and start) gives c times the codes; c
    times the dictionary with c times alpha and 1 / c times the start gives 1 / c times the codes.
    With a number as ``learning_rate`` this does not hold: the curvature in u and v grows with the
    codes. Nor does it for the log form, whose codes are logarithms, without a unit.

    The log form with alpha > 0 has no least value, u and v shrink to 0, and "adaptive" refuses it:
    give a number as ``learning_rate``, and stop.

    The parameters of `SparseCoder` and ours: ``transform_alpha`` is ``alpha``,
    ``transform_max_iter`` is ``n_steps``, ``transform_algorithm`` has its nearest in "lasso_cd".
    ``transform_n_nonzero_coefs`` has its nearest in ``n_nonzero``. There is no ``split_sign`` and
    no ``n_jobs``.

    Examples
    --------
    >>> import numpy as np
    >>> from mirrorflow import MirrorFlowCoder
    >>> D = np.eye(3)[[0, 1, 2, 0]] + np.eye(3)[[0, 1, 2, 1]]
    >>> MirrorFlowCoder(D, alpha=0.01).transform([[2.0, 0.0, 0.0]]).round(2) + 0.0
    array([[1., 0., 0., 0.]])
    """

    n_components_: int

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "dictionary": ["array-like"],
        "form": [StrOptions({"power", "log"})],
        "k": [Interval(Integral, 1, None, closed="left")],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "beta": [Interval(Real, 0, None, closed="neither")],
        "start": [Real, "array-like"],
        "learning_rate": [StrOptions({"adaptive"}), Interval(Real, 0, None, closed="neither")],
        "n_steps": [Interval(Integral, 0, None, closed="left")],
        "tol": [Interval(Real, 0, 1, closed="neither")],
        "switch_off": [Interval(Integral, 0, None, closed="left"), None],
        "zero_tol": [Interval(Real, 0, 1, closed="left")],
        "positive_code": ["boolean"],
        "n_nonzero": [Interval(Integral, 1, None, closed="left"), None],
    }

    def __init__(
        self,
        dictionary: Any,
        *,
        form: str = "power",
        k: int = 1,
        alpha: float = 0.1,
        beta: float = 0.01,
        start: Any = 0.0,
        learning_rate: float | str = "adaptive",
        n_steps: int = 20_000,
        tol: float = 1e-3,
        switch_off: int | None = None,
        zero_tol: float = 1e-3,
        positive_code: bool = False,
        n_nonzero: int | None = None,
    ) -> None:
        self.dictionary = dictionary
        self.form = form
        self.k = k
        self.alpha = alpha
        self.beta = beta
        self.start = start
        self.learning_rate = learning_rate
        self.n_steps = n_steps
        self.tol = tol
        self.switch_off = switch_off
        self.zero_tol = zero_tol
        self.positive_code = positive_code
        self.n_nonzero = n_nonzero

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
        self._check_parameters()
        fitted = copy(self)  # a refused X leaves self as it was
        X = validate_data(fitted, X, dtype=[np.float64, np.float32])
        fitted.n_components_ = len(self._atoms(X))
        self.__dict__ = fitted.__dict__
        return self

    def _check_parameters(self) -> None:
        """Refuse what is wrong whatever the signals."""
        self._validate_params()
        if self.switch_off is not None and self.switch_off > self.n_steps:
            raise ValueError(
                f"switch_off must be at most n_steps={self.n_steps}, got {self.switch_off}. Use "
                "None to keep the decay"
            )
        if self.form == "log" and self.positive_code:
            raise ValueError(
                "positive_code=True must go with form='power', got form='log'. "
                "Its codes without v would have no 0"
            )
        if self.form == "log" and self.alpha > 0 and self.learning_rate == "adaptive":
            raise ValueError(
                "learning_rate must be a number with form='log' and alpha > 0, where the objective "
                "has no minimum to settle at, got 'adaptive'. Use 0.1 and n_steps, or alpha=0"
            )

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
        self._check_parameters()
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        D = self._atoms(X)
        find = self._settle if self.learning_rate == "adaptive" else self._descend
        with small_on_one_thread(max(X.size, len(D) ** 2)):
            z = without_small(find(X, D, self._starts((len(X), len(D)))), self.zero_tol)
        if self.n_nonzero is None or self.n_nonzero >= len(D):
            return z
        smaller = np.argsort(-np.abs(z), axis=1, kind="stable")[:, self.n_nonzero :]
        np.put_along_axis(z, smaller, 0.0, axis=1)
        return z

    def _settle(self, X: Array, D: Array, start: Array) -> Array:
        """Train until codes have settled, and warn of those that have not."""
        with np.errstate(all="ignore"):
            z, distance = settled_codes(
                X.astype(np.float64), D.astype(np.float64), self.form, self.k, self.alpha,
                self.beta, start, self.tol, self.n_steps, self.switch_off, self.positive_code,
            )  # fmt: skip
        if not np.isfinite(distance).all():
            raise ValueError(
                f"beta and start must keep u and v finite, got beta={self.beta}. Choose them "
                "nearer to the size of the codes"
            )
        late = distance > self.tol
        if late.any():
            warnings.warn(
                f"codes must settle to tol={self.tol:g} within n_steps={self.n_steps} steps, got "
                f"{distance.max():.1e} at most, for {late.sum()} of {len(X)} signals. Increase "
                "n_steps or tol",
                ConvergenceWarning,
                stacklevel=3,
            )
        return z.astype(X.dtype)

    def _descend(self, X: Array, D: Array, start: Array) -> Array:
        """Take n_steps steps of one length."""
        beta = self.beta * sizes(X, D)[:, None] if self.form == "power" else self.beta
        rate: Any = self.learning_rate
        off = np.inf if self.switch_off is None else self.switch_off
        path = codes(
            X, D, self.form, self.k, self.alpha, beta, start, rate / lipschitz(D), off,
            self.positive_code,
        )  # fmt: skip
        with np.errstate(all="ignore"):
            for z in islice(path, self.n_steps + 1):
                if not np.isfinite(z).all():
                    raise ValueError(self._diverged())
        return z

    def _starts(self, shape: tuple[int, int]) -> Array:
        """Return the codes at the start, checked."""
        start = np.asarray(self.start, dtype=np.float64)
        if not np.isfinite(start).all():
            raise ValueError("start must be finite, got NaN or infinity. Use 0.0")
        if self.positive_code and start.min(initial=0.0) < 0:
            raise ValueError(
                f"start must be >= 0 with positive_code=True, got {start.min():g}. Codes cannot be "
                "negative"
            )
        try:
            return np.broadcast_to(start, shape)
        except ValueError:
            raise ValueError(
                f"start must broadcast to (n_samples, n_components) = {shape}, got {start.shape}. "
                "Use a number for one start"
            ) from None

    def _diverged(self) -> str:
        """Say why codes are not finite, and what to do."""
        if self.form == "log":
            return "u or v has reached 0, where log ends: lower learning_rate, alpha, or n_steps"
        return "gradient descent diverged: lower learning_rate, or take learning_rate='adaptive'"

    def _atoms(self, X: Array) -> Array:
        """Return the dictionary, checked."""
        D = check_array(self.dictionary, dtype=X.dtype, input_name="dictionary")
        if D.shape[1] != X.shape[1]:
            raise ValueError(
                f"dictionary must have {X.shape[1]} columns, as X has, got {D.shape[1]}. "
                "Transpose it if its columns are the atoms"
            )
        if not (np.abs(D).max(axis=1) > 0).all():
            zero = int(np.abs(D).max(axis=1).argmin())
            raise ValueError(
                f"each atom of dictionary must be non-zero, got row {zero} = 0. Remove it"
            )
        return D

    def inverse_transform(self, X: Any) -> Array:
        """Return the signals z D of codes.

        Parameters
        ----------
        X : array of shape (n_samples, n_components)
            Codes.

        Returns
        -------
        array of shape (n_samples, n_features)
        """
        z = check_array(X, dtype=[np.float64, np.float32], input_name="X")
        D = check_array(self.dictionary, dtype=z.dtype, input_name="dictionary")
        if z.shape[1] != len(D):
            raise ValueError(
                f"X must have a column for each of the {len(D)} atoms, got {z.shape[1]}. Pass what "
                "transform returns"
            )
        return z @ D

    @property
    def _n_features_out(self) -> int:
        return self.n_components_

    def __sklearn_tags__(self) -> Any:
        """Need no fit, and keep float32."""
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
