"""Spectra of the products that weight decay shapes: LoRA's B A, attention's Q K^T.

- `product_spectrum` measures one product, or a batch, from its factors.
- `SpectralTracker` finds the products in a model and measures them while it trains.
- `ProductAccount` splits their D = A^T A - B B^T into decay, optimizer, and step and noise.
- `audit` measures those of a checkpoint on disk; `compare` sets two measurements side by side.
- `truncate` replaces them by their best approximations of lower rank.
"""

from .account import ProductAccount
from .audit import audit
from .comparison import Comparison, compare
from .product import ProductSpectrum, product_spectrum
from .records import Measurement, Record, table
from .tracker import SpectralTracker
from .truncate import TruncationPlan, plan_truncation, truncate
from .truncation import Truncation, TruncationReport, truncated_product

__all__ = [
    "Comparison",
    "Measurement",
    "ProductAccount",
    "ProductSpectrum",
    "Record",
    "SpectralTracker",
    "Truncation",
    "TruncationPlan",
    "TruncationReport",
    "audit",
    "compare",
    "plan_truncation",
    "product_spectrum",
    "table",
    "truncate",
    "truncated_product",
]
