r"""The flow dw = -(J_g^T grad f + alpha grad h) dt, integrated in w, in mu, or in x."""

from .solve import FlowStats, flow

__all__ = ["FlowStats", "flow"]
