"""The methods that are compared. A new one is a `Recipe` in the module that writes it."""

from collections.abc import Mapping, Sequence

from errata.comparison.codebook import GRACE_RECIPE
from errata.comparison.contextual import CONTEXT_RECIPES
from errata.comparison.distilled import DISTILLED_RECIPE
from errata.comparison.method import Bench, Recipe
from errata.comparison.streams import OWN_RECIPES
from errata.comparison.tuned import FT_RECIPE, LORA_RECIPE
from errata.comparison.weights import WEIGHT_RECIPES
from errata.edits import Edit
from errata.errors import InputError
from errata.modeling.patch import Attachable

EVERY = "all"


class _Untouched:
    """Writes nothing: what the base says is what all others are seen against."""

    refused: Mapping[str, str] = {}

    def __init__(self, bench: Bench) -> None:
        pass

    def write(self, edits: Sequence[Edit]) -> None:
        pass

    def build_artifacts(self) -> Sequence[Attachable]:
        return ()

    def count_bytes(self) -> int:
        return 0


BASE = Recipe("base", "base, unedited", "", _Untouched, same=True)
OTHER_RECIPES = (FT_RECIPE, LORA_RECIPE, GRACE_RECIPE, *CONTEXT_RECIPES, DISTILLED_RECIPE)
RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in (BASE, *OWN_RECIPES, *WEIGHT_RECIPES, *OTHER_RECIPES)}


def choose_methods(spelled: str) -> list[str]:
    """Methods as a user wrote them, `d4s,memit` or `all`, in the order of the tables; the base is always among them.

    Raises:
        InputError: there is no such method.
    """
    wanted = [name.strip() for name in spelled.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in RECIPES and name != EVERY]:
        raise InputError(f"methods: expected {EVERY!r} or some of {', '.join(RECIPES)}, found {unknown[0]!r}")
    return [name for name in RECIPES if name in wanted or EVERY in wanted or name == BASE.name]


def list_once(batches: Sequence[int]) -> dict[str, int]:
    """Methods that are measured with one size of batches alone, and which: some come to the same whatever the size, and what is measured
    at the end alone takes too long to be repeated.

    Args:
        batches: sizes, ascending.
    """
    once = {name: batches[0] for name, recipe in RECIPES.items() if recipe.same}
    return once | {name: batches[-1] for name, recipe in RECIPES.items() if recipe.final_only}
