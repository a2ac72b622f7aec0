"""LoRA under the names that tools give its two factors, and what else looks like an adapter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .pairs import Factor, Facts, Pair, Shapes

__all__ = ["alpha_keys", "lora", "names_a_configuration", "unmeasured"]


@dataclass(frozen=True)
class Form:
    """How a tool names the factors: a pattern with the module, the name of A and that of B.

    ``turned`` where A is stored as (in, r) and B as (r, out), if the shapes allow for it.
    """

    pattern: re.Pattern[str]
    down: str
    up: str
    turned: bool = False


def _form(pattern: str, down: str, up: str, turned: bool = False) -> Form:
    return Form(re.compile(pattern), down, up, turned)


NAME = r"(?:\.(?!(?:weight|bias)$)(?P<adapter>[^.]+))?"  # of an adapter, as PEFT's "default"
FORMS = (
    # PEFT, diffusers, ai-toolkit; loralib and Mochi without ".weight".
    _form(rf"(?P<module>.*)\.lora_A{NAME}(?:\.weight)?", ".lora_A", ".lora_B"),
    _form(rf"(?P<module>.*)\.lora_embedding_A{NAME}(?:\.weight)?",
          ".lora_embedding_A", ".lora_embedding_B"),
    # The scripts of kohya, OneTrainer, LyCORIS.
    _form(r"(?P<module>.*)\.lora_down(?:\.weight)?", ".lora_down", ".lora_up"),
    # diffusers: text encoders and attention before PEFT; as converted from PEFT.
    _form(r"(?P<module>.*)\.lora_linear_layer\.down(?:\.weight)?",
          ".lora_linear_layer.down", ".lora_linear_layer.up"),
    _form(r"(?P<module>.*)\.lora\.down(?:\.weight)?", ".lora.down", ".lora.up"),
    # diffusers' attention processors, and XLabs' with a number.
    _form(r"(?P<module>.*_lora\d?)\.down(?:\.weight)?", ".down", ".up"),
    # torchtune's modules, MLX' arrays (in, r) and (r, out).
    _form(r"(?P<module>.*)\.lora_a\.weight", ".lora_a", ".lora_b"),
    _form(r"(?P<module>.*)\.lora_a", ".lora_a", ".lora_b", turned=True),
    # NeMo and Megatron.
    _form(r"(?P<module>.*\.(?:lora_\w*|adapter))\.linear_in\.weight", ".linear_in", ".linear_out"),
)  # fmt: skip
# Ranks and scales of these stand in a configuration of their own.
CONFIGURED = re.compile(r"\.lora_[ab](?:\.weight)?$|\.linear_(?:in|out)\.weight$")
NO_PRODUCT = {  # what other updates are made of
    ".lora_E": "AdaLoRA's product has a third factor, lora_E",
    ".vera_lambda_b": "VeRA's factors are frozen, between two scales that train",
    ".lora_mid.weight": "LoRA with lora_mid has three factors",
    ".hada_w1_a": "LoHa's update is not a product of two factors",
    ".lokr_w1": "LoKr's update is a Kronecker product",
    ".lokr_w1_a": "LoKr's update is a Kronecker product",
    ".oft_blocks": "OFT multiplies the weight by a rotation",
    ".oft_R": "OFT multiplies the weight by a rotation",
    ".oft_diag": "OFT multiplies the weight by a rotation",
    ".boft_R": "BOFT multiplies the weight by rotations",
    ".ia3_l": "IA3 scales the outputs and adds no product",
    ".a1.weight": "GLoRA's update has terms that depend on the weight",
    ".diff": "the whole difference of a weight is not a product of two factors",
}
# Words by which a weight belongs to an adapter, wherever in its name.
ADAPTER = re.compile(
    r"(?:^|(?<=[._]))(?:lora|lokr|hada|vera|oft|boft|ia3|hra|fourierft|waveft|c3a|randlora|shira"
    r"|glora|lycoris)\d?(?=[._])"
)
BESIDE = re.compile(  # what stands beside two factors, and is read with them or not needed
    r"(?:\.|_)(?:alpha|dora_scale|diff_b|bias|rank_num|ranknum|network_scale)$"
    r"|\.lora_magnitude_vector(?:\.|$)|\.lora_bias(?:\.|$)"
)


def lora(key: str, shapes: Shapes, facts: Facts) -> Pair | str | None:
    """LoRA on Linear, Conv1D, convolutions and Embedding: scale B A, B (out, r) and A (r, in)."""
    for form in FORMS:
        if match := form.pattern.fullmatch(key):
            start, _, end = key.rpartition(form.down)
            other = f"{start}{form.up}{end}"
            adapter = match.groupdict().get("adapter") or ""
            turned = form.turned and _is_turned(shapes.get(key, ()), shapes.get(other, ()))
            factors = Factor(other, transposed=not turned), Factor(key, transposed=turned)
            return _pair(match["module"], adapter, factors, shapes, facts)
    return next((reason for end, reason in NO_PRODUCT.items() if _ends(key, end)), None)


def _is_turned(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether A is (in, r) and B (r, out); where both readings have a product, the smaller r is."""
    if len(a) != 2 or len(b) != 2 or a[1] != b[0]:
        return len(a) == 2 == len(b) and a[0] != b[1]
    return a[0] != b[1] or a[1] <= a[0]


def _ends(key: str, end: str) -> bool:
    return key.endswith(end) or f"{end}." in key


def alpha_keys(module: str, key: str) -> tuple[str, ...]:
    """Return the names under which tools store the alpha of the factor A of a module."""
    stem = re.sub(r"\.(?:lora_)?down(?:\.weight)?$", "", key)
    return tuple(dict.fromkeys((f"{module}.alpha", f"{stem}.alpha", f"{key}.alpha")))


def names_a_configuration(key: str) -> bool:
    """Whether a factor's tool keeps rank and scale in a configuration of its own."""
    return CONFIGURED.search(key) is not None


def _pair(
    module: str, adapter: str, factors: tuple[Factor, Factor], shapes: Shapes, facts: Facts
) -> Pair | str | None:
    """Pair the two weights of an adapter."""
    left, right = factors
    if f"{module}.lora_mid.weight" in shapes:
        return None  # its third factor says why
    if left.key not in shapes:
        return f"{left.key} is missing"
    if reason := _no_product(left, right, shapes):
        return reason
    rank, m = right.size(shapes)
    known = facts.adapter(module, adapter, rank, alpha_keys(module, right.key))
    if known.skip:
        return known.skip
    notes = (*known.notes, *_dora(module, adapter, shapes))
    shape = (left.size(shapes)[1], rank, m)
    return Pair(module, "lora", left, right, shape, adapter=adapter, scale=known.scale, notes=notes)


def _no_product(left: Factor, right: Factor, shapes: Shapes) -> str:
    """Say why two weights have no product that is a matrix; empty where they have one."""
    a, b = shapes[right.key], shapes[left.key]
    if min(len(a), len(b)) < 2:
        return "not a matrix (is it quantized?)"
    if right.key.endswith(".lora_a") and len(a) > 2:
        return "LoRA on stacked experts is not one product"
    if any(size != 1 for size in b[2:]):
        return "the product of these convolutions is not a matrix product"
    (rank, m), (inner, n) = right.size(shapes), left.size(shapes)
    if 0 in (rank, m, inner, n):
        return "it is empty"
    if inner == rank:
        return ""
    if len(a) > 2 and rank % inner == 0:
        return f"a convolution in {rank // inner} groups has a product for each"
    return f"A and B have no product: A has {rank} rows, B {inner} columns"


def _dora(module: str, adapter: str, shapes: Shapes) -> tuple[str, ...]:
    """Note that a magnitude stands beside the factors, as MLX' m does."""
    suffix = f".{adapter}" if adapter else ""
    vector = f".lora_magnitude_vector{suffix}"
    ends = (vector, f"{vector}.weight", ".dora_scale", ".m", ".magnitude")
    found = any(f"{module}{end}" in shapes for end in ends)
    return ("DoRA: A B before its normalization",) if found else ()


def unmeasured(shapes: Shapes, pairs: Iterable[Pair], said: Iterable[str]) -> Iterator[str]:
    """Return a weight of each module whose weights look like an adapter's and are in no pair."""
    known = {_stem(factor.key) for pair in pairs for factor in (pair.left, pair.right)}
    known |= {_stem(key) for key in said}
    for key in shapes:
        if BESIDE.search(key) or not ADAPTER.search(key):
            continue
        if (stem := _stem(key)) not in known:
            known.add(stem)
            yield key


def _stem(key: str) -> str:
    """Return what the weights of an adapter on one module have in common."""
    found = [match.start() for match in ADAPTER.finditer(key)]
    inside = [start for start in found if "." in key[start:] and "." in key[:start]]
    if not inside:
        return key.rpartition(".")[0]
    return key[: inside[-1]].rstrip("._")
