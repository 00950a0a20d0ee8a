"""Methods of the comparison that are neither streams of ours nor writers of weights in closed form."""

from errata.comparison.codebook import GRACE_RECIPE
from errata.comparison.contextual import CONTEXT_RECIPES
from errata.comparison.distilled import DISTILLED_RECIPE
from errata.comparison.tuned import FT_RECIPE, LORA_RECIPE

OTHER_RECIPES = (FT_RECIPE, LORA_RECIPE, GRACE_RECIPE, *CONTEXT_RECIPES, DISTILLED_RECIPE)
