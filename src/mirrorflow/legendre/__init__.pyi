from .base import LegendreFunction as LegendreFunction
from .base import RangeError as RangeError
from .build import IncompatiblePair as IncompatiblePair
from .build import legendre as legendre
from .dual import DualProblem as DualProblem
from .dual import ExponentialDual as ExponentialDual
from .dual import ExponentialProblem as ExponentialProblem
from .dual import NewtonProblem as NewtonProblem
from .homogeneous import RescaledFunction as RescaledFunction
from .hyperbolic import HyperbolicEntropy as HyperbolicEntropy
from .hyperbolic import OneSidedEntropy as OneSidedEntropy
from .logcosh import LogCoshEntropy as LogCoshEntropy
from .matrix import MatrixEntropy as MatrixEntropy
from .numerical import Inversion as Inversion
from .potential import Potential as Potential
from .power import PowerEntropy as PowerEntropy
from .product import ProductEntropy as ProductEntropy
from .quadratic import QuadraticEntropy as QuadraticEntropy
from .sign import SignEntropy as SignEntropy

__all__ = [
    "DualProblem",
    "ExponentialDual",
    "ExponentialProblem",
    "HyperbolicEntropy",
    "IncompatiblePair",
    "Inversion",
    "LegendreFunction",
    "LogCoshEntropy",
    "MatrixEntropy",
    "NewtonProblem",
    "OneSidedEntropy",
    "Potential",
    "PowerEntropy",
    "ProductEntropy",
    "QuadraticEntropy",
    "RangeError",
    "RescaledFunction",
    "SignEntropy",
    "legendre",
]
