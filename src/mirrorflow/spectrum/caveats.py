"""What attention does to Q, K and V beside projecting them, which a product does not show."""

from __future__ import annotations

from .pairs import Facts, Shapes

__all__ = ["NORMS", "caveats"]

NORMS = (
    *("q_norm", "q_layernorm", "q_layer_norm", "q_ln", "norm_q", "qk_norm"),
    *("query_norm", "query_layernorm", "norm_query"),
)
# By model_type, normalized without a weight: Q and K (Swin V2 has a logit_scale instead), and V.
COSINE = {"yoso", "dory", "muse_glimmer_text", "muse_spark_text", "nanochat", "neomme"}
V_NORMS = {
    "diffusion_gemma_text", "embedding_gemma2_text", "gemma3n_text", "gemma4_text",
    "gemma4_vision", "gemma4_unified_text",
}  # fmt: skip
CONVOLVED = "convolution_projection_key.convolution_projection.convolution.weight"  # CvT
SCALES = ("per_dim_scale", "scaling", "sqk")  # factors for the dimensions of Q, where they learn


def caveats(prefix: str, shapes: Shapes, facts: Facts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Say what the forward does to Q, K and V beside projecting: of the scores, and of W_O W_V."""
    module = prefix.removesuffix(".")
    kind = facts.architecture(module)
    scores = [
        f"{name} scales the dimensions of Q: it is left out"
        for name in SCALES
        if f"{prefix}{name}" in shapes
    ]
    if kind in COSINE or _has_norm(prefix, shapes) or facts.normalized(module):
        scores.append("Q and K are normalized: their scale is inert, the norms mean nothing")
    values = []
    if kind in V_NORMS:
        values.append("V is normalized: its scale is inert, the norms mean nothing")
    if f"{prefix}{CONVOLVED}" in shapes:
        for notes in (scores, values):
            notes.append("Q, K and V are projections of tokens after a convolution")
    return tuple(scores), tuple(values)


def _has_norm(prefix: str, shapes: Shapes) -> bool:
    """Whether a normalization of Q has a weight."""
    ends = (".weight", ".norms.0.weight")
    names = ("logit_scale", *(f"{norm}{end}" for norm in NORMS for end in ends))
    return any(f"{prefix}{name}" in shapes for name in names)
