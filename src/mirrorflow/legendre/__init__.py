r"""Legendre functions R_a: `legendre` makes the one of a commuting pair (g, h) started at w0.

`__init__.pyi` lists the names. Each is imported on first use: the estimators take the formulas of
`_kernels` from here and do not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
