"""Contexts of a base: what the model itself says after a few words, so that a key is read in company it knows (ROME §3.1; resolution H).

Sampled once with a seed and kept in the profile: keys can be reproduced, and are part of what names a pair.
"""

import torch

from errata.edits import SLOT
from errata.modeling.loading import Base
from errata.modeling.tokens import encode_prompt, find_ends

STARTS = ("The", "Therefore", "Because", "I", "You")
_TOKENS = 10
_TOP = 5


@torch.no_grad()
def sample_contexts(base: Base, seed: int = 0) -> tuple[str, ...]:
    """The bare prompt and one continuation of each of `STARTS`: ten tokens, each one of the five likeliest, as MEMIT draws them.

    A continuation that holds a line break, a brace, or nothing but its start is cut or left out: a context must end in its only slot.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = find_ends(base.tokenizer, base.model)
    contexts = [SLOT]
    for start in STARTS:
        ids = encode_prompt(base.tokenizer, start)
        first = len(ids)
        while len(ids) < min(first + _TOKENS, base.span // 2):
            row = torch.tensor([ids], device=base.device)
            hidden = base.model.get_submodule(base.layout.body)(input_ids=row, use_cache=False).last_hidden_state[:, -1]
            logits = base.model.get_submodule(base.layout.head)(hidden).float()[0].cpu()
            best = logits.topk(min(_TOP, len(logits)))
            drawn = int(best.indices[torch.multinomial(best.values.softmax(0), 1, generator=generator)])
            if drawn in ends:
                break
            ids.append(drawn)
        text = str(base.tokenizer.decode(ids, skip_special_tokens=True)).split("\n")[0].replace("{", "").replace("}", "").strip()
        if text.removeprefix(start).strip() and "\ufffd" not in text:
            contexts.append(f"{text.rstrip('.')}. {SLOT}")
    return tuple(dict.fromkeys(contexts))
