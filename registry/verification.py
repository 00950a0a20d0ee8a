"""What MLflow holds against what was evaluated, before an alias names it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from errata.errors import RegistryError
from registry.models import ModelRegistry
from registry.release import Version


def verify_logits(
    registry: ModelRegistry,
    version: Version,
    expected: np.ndarray[Any, Any],
    measure: Callable[[Sequence[bytes], Callable[[str], bytes]], np.ndarray[Any, Any]],
    tolerance: float = 1e-5,
) -> None:
    """Check before the alias moves that MLflow holds the model that was evaluated.

    Args:
        expected: logits [prompts, vocabulary] of the candidate that was evaluated.
        measure: puts artifacts, given as bytes and as what reads their parts, on the base in memory and returns logits of the same
            prompts.
        tolerance: largest difference, relative to the largest logit.

    Raises:
        RegistryError: what was read back answers otherwise.
    """
    found = measure(registry.read_artifacts(version), lambda digest: registry.read_part(version.stream, digest))
    scale = max(1.0, float(np.abs(expected).max()))
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=0.0, atol=tolerance * scale):
        gap = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("nan")
        raise RegistryError(
            f"{version.uri}: expected the logits of the candidate that was evaluated for commit {version.commit}, "
            f"found others when it was read back (largest difference {gap:.3g}); the alias was not moved"
        )
