"""Base models: what identifies one, and how it is loaded. Weights are frozen on load and never written to (design §5)."""

import copy
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from errata.errors import BaseMismatchError, ModelError
from errata.modeling.layout import ModelLayout, find_layout
from errata.modeling.offload import DeviceMap, find_device, list_free, list_parameters, read_parameter, spread_blocks

_BEHAVIOUR = (
    *("model_type", "num_attention_heads", "num_key_value_heads", "n_head", "activation_function", "hidden_act"),
    *("layer_norm_epsilon", "rms_norm_eps"),
    *("rotary_dim", "use_parallel_residual", "attention_layers", "window_size", "sliding_window"),
)
"""Config entries that change what equal weights compute and that keep one spelling across transformers versions."""
_SAMPLE = "The quick brown fox, 1984: Zoë's naïve café isn't far.\n東京"
"""Read by the tokenizer into the digest: what it puts in front and how it splits is behaviour that a vocabulary does not show."""


@dataclass(frozen=True)
class Base:
    """A loaded base model. `digest` names its weights and vocabulary wherever it was loaded from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: ModelLayout
    digest: str

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the token embedding."""
        return find_device(self.model.get_input_embeddings())

    @property
    def context(self) -> int:
        """Longest input in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 1024)

    @property
    def span(self) -> int:
        """Longest row in tokens that is optimised over. Where attention has a window, half of it: the parts of rows that
        `errata.modeling.suffix` puts side by side then lie within one window, so that it is as if there were none."""
        config = self.model.config
        local = "local" in getattr(config, "attention_layers", ())
        window = config.window_size if local else getattr(config, "sliding_window", None)
        return min(self.context, window // 2) if window else self.context


def choose_device(name: str) -> torch.device:
    """`auto` is the first accelerator, else the CPU.

    Raises:
        ModelError: torch does not know the device, or it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"device: expected 'auto', 'cpu' or an accelerator of this machine, found {name!r} ({reason})") from None
    return device


def load_base(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    expect: str | None = None,
    device_map: Literal["auto"] | DeviceMap | None = None,
    offload: Path | None = None,
) -> Base:
    """Load a base model from a folder or a Hugging Face id, in the dtype it is stored in.

    Args:
        source: folder with config.json, *.safetensors and a fast tokenizer, or a hub id.
        revision: pinned revision of a hub id.
        device: where it computes.
        expect: digest the base must have.
        device_map: module → device, `cpu` or `disk`, for a model larger than its device; `auto` fills the device, then main memory.
            Blocks that are elsewhere are moved in one by one, at every pass.
        offload: folder for blocks whose stored files cannot be read in place.

    Raises:
        ModelError: nothing loadable there.
        UnknownArchitectureError: no layout for its family.
        BaseMismatchError: it is not the base that `expect` names.
    """
    target = choose_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        options: dict[str, Any] = {"revision": revision, "dtype": "auto", "use_safetensors": True}
        if device_map == "auto":
            device_map = spread_blocks(sketch_model(source, revision), target, list_free(target))
        if device_map is not None:
            options |= {"device_map": device_map, "offload_folder": offload}
        model = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"base: expected a Hugging Face causal language model at {str(source)!r}, could not load it: {reason}") from None
    if device_map is None:
        nn.Module.to(model, target)
    return hold_base(model, tokenizer, expect=expect)


def sketch_model(source: str | Path, revision: str | None = None) -> PreTrainedModel:
    """A model without its weights, on the meta device, from its configuration alone.

    Args:
        source: a model folder, a config.json, or a Hugging Face id.

    Raises:
        ModelError: no configuration of a causal language model there.
    """
    try:
        return sketch_config(AutoConfig.from_pretrained(source, revision=revision))
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"base: expected a Hugging Face causal language model at {str(source)!r}, could not read it: {reason}") from None


def sketch_config(config: PreTrainedConfig) -> PreTrainedModel:
    """As `sketch_model`, in the dtype that the configuration names, else float32."""
    dtype = getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def hold_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, expect: str | None = None) -> Base:
    """A model already in memory as a base: evaluation mode, no gradients, checked against `expect`.

    Raises:
        UnknownArchitectureError, BaseMismatchError: see `load_base`.
    """
    layout = find_layout(model)
    model.train(False)
    model.requires_grad_(False)
    digest = digest_model(model, tokenizer)
    if expect is not None and digest != expect:
        raise BaseMismatchError(f"expected the base {expect[:12]}, found {digest[:12]}: other weights or another tokenizer")
    return Base(model, tokenizer, layout, digest)


def share_base(base: Base) -> Base:
    """A second model over the same tensors. What replaces tensors of the one, and never writes into them, leaves the other as it is."""
    shared: dict[int, Any] = {id(weight): nn.Parameter(weight.data, requires_grad=False) for weight in base.model.parameters()}
    shared.update((id(buffer), buffer) for buffer in base.model.buffers())
    return replace(base, model=copy.deepcopy(base.model, shared))


def digest_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over every parameter (name, dtype, shape, bytes), the tokenizer (vocabulary, and how it reads a sample), the rotary
    frequencies where there are any (to six digits), and the config entries of `_BEHAVIOUR`.

    Other config entries are left out on purpose: their defaults and spellings change between transformers releases, and an upgrade
    must not make a base a stranger to its own streams.
    """
    digest = hashlib.sha256()
    config = model.config.to_dict()
    digest.update(json.dumps({key: config[key] for key in _BEHAVIOUR if key in config}, sort_keys=True, default=str).encode())
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])).encode())
    digest.update(json.dumps(tokenizer(_SAMPLE).input_ids).encode())
    frequencies = {name: buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq")}
    digest.update(json.dumps({name: [f"{value:.6g}" for value in buffer.tolist()] for name, buffer in frequencies.items()}).encode())
    for name in sorted(list_parameters(model)):
        parameter = read_parameter(model, name)
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        digest.update(parameter.contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()
