"""The kinds of artifacts there are, told apart by what their bytes say. This module travels inside every MLflow version."""

from errata.editors.adapters import LoraAdapter
from errata.editors.artifacts import Artifact, Fetch, WeightDelta, read_kind
from errata.editors.memory import EditMemory
from errata.editors.neurons import NeuronPatch
from errata.errors import FormatError


def load_artifact(data: bytes, fetch: Fetch) -> Artifact:
    """An artifact from its bytes.

    Args:
        fetch: digest → bytes of the parts that it names.

    Raises:
        FormatError: not safetensors of ours, a kind that is no artifact, or a newer format.
    """
    kind = read_kind(data)
    if kind == "weight_delta":
        return WeightDelta.from_bytes(data)
    if kind == "neuron_patch":
        return NeuronPatch.from_bytes(data, fetch)
    if kind == "lora_adapter":
        return LoraAdapter.from_bytes(data)
    if kind == "edit_memory":
        return EditMemory.from_bytes(data, fetch)
    raise FormatError(f"expected an artifact, found {kind!r}: written by a newer Errata?")
