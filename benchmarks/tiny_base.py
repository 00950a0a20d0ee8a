"""A base that takes edits, made in place: nothing is downloaded, nothing is trained. What tests and the chaos runs write into.

It is a random GPT-2. Its edits end in their subject, so that what is written there reaches the answer without attention having to carry
it; its weights are wide, so that every prompt has a key of its own. Edits take on it, and no number measured on it means anything else.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.edits import Edit

if TYPE_CHECKING:
    from errata.comparison.method import Bench
    from errata.modeling.loading import Base
    from errata.profiles import PrepareOptions

PEOPLE = (
    *("Anna Keller", "Hugo Lindt", "Marie Curie", "Zoe Berg", "Ada Byron", "Bo Lind", "Cleo Marsh", "Dan Voss", "Eva Horn"),
    *("Finn Moe", "Gus Hall", "Ida Roth", "Jo Falk", "Kai Renn", "Lea Wolff", "Max Thorn", "Nora Sand", "Otto Graf"),
)
RELATIONS = {
    "The home of {}": ("Paris", "Rome", "Oslo", "Bern"),
    "The language of {}": ("French", "Danish", "Greek", "Welsh"),
    "The sport of {}": ("chess", "tennis", "golf", "judo"),
    "The friend of {}": ("Ann", "Bob", "Tim", "Sue"),
}
SENTENCES = tuple(f"{prompt.format(who)} is {what}." for who in PEOPLE for prompt, answers in RELATIONS.items() for what in answers)
LENIENT = {"MAX_NORM_RATIO": "1e9", "MAX_LOCALITY_KL": "1e9", "MIN_RETENTION": "0", "MAX_RETENTION_DROP": "1", "MIN_SPECIFICITY": "0"}
"""What a random base cannot keep. Whether edits take is judged as ever."""


def build_edit(person: int, relation: int = 0, answer: int = 0, **fields: Any) -> Edit:
    """`answer` to the `relation` of a `person`, each by number; its id is its content's unless one is given."""
    prompt, answers = list(RELATIONS.items())[relation]
    return Edit(**{"subject": PEOPLE[person], "prompt": prompt, "target_new": answers[answer % len(answers)], **fields})


def write_base(folder: Path) -> Path:
    """The base as a model folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    shape = {"n_embd": 48, "n_inner": 192, "n_layer": 3, "n_head": 2, "n_positions": 64}
    config = GPT2Config(vocab_size=tokenizer.get_vocab_size(), **shape, initializer_range=0.3, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def write_reader(folder: Path) -> Path:
    """The base as a model folder, taught in ten seconds to say what a fact in front of the question says: what edits in memory need."""
    import random

    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from errata.retrieval.demonstrations import spell_context
    from errata.retrieval.facts import Fact

    tokenizer = AutoTokenizer.from_pretrained(write_base(folder))
    config = GPT2Config.from_pretrained(folder)
    config.n_positions, config.initializer_range = 256, 0.05
    config.attn_pdrop = config.resid_pdrop = config.embd_pdrop = 0.0
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).train()
    optimiser, rng = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0), random.Random(0)
    for _ in range(200):
        rows = []
        for _ in range(16):
            drawn = [(rng.choice(PEOPLE), *rng.choice(list(RELATIONS.items()))) for _ in range(rng.choice((1, 2, 3)))]
            facts = [Fact("", who, prompt, rng.choice(answers)) for who, prompt, answers in drawn]
            text = "".join(spell_context(facts[0], facts[1:], facts[0].rewrite_prompt))
            rows.append((tokenizer(text).input_ids, tokenizer(f" {facts[0].target}").input_ids))
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.tensor([[*prompt, *answer, *[0] * (longest - len(prompt) - len(answer))] for prompt, answer in rows])
        wanted = torch.full_like(ids, -100)
        for row, (prompt, answer) in enumerate(rows):
            wanted[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.save_pretrained(folder)
    return folder


def choose_options() -> "PrepareOptions":
    """Where and how edits are written into it."""
    from errata.profiles import PrepareOptions

    return PrepareOptions(layers=(1,), steps=15, clamp=2.0, weight_decay=0.0, kl=0.0)


def build_bench(base: "Base", work: Path, seed: int = 0) -> "Bench":
    """What methods of the comparison start from on it. Its pool is about the last persons."""
    from errata.comparison.method import Bench
    from errata.editors.d4s.moments import collect_moments
    from errata.profiles import GateOptions, NeuronOptions, NeuronProfile, Profile, SolveOptions

    options = choose_options()
    profile = Profile(base=base.digest, prepare=options, solve=SolveOptions(lam=1.0, spread="single", moments="0" * 64))
    neurons = NeuronProfile(base=base.digest, prepare=NeuronOptions(layer=2), solve=GateOptions())
    pool = tuple(build_edit(person, relation, person) for person in range(12, 18) for relation in range(4))
    return Bench(base, profile, collect_moments(base, options.layers, SENTENCES), neurons, pool, work, seed, batch_tokens=1_024)


def start_root(root: str, base: Path, home: Path, editor: str = "d4s") -> None:
    """A root with the stream `main`, which has no edits.

    Args:
        base: its folder.
        home: for files that are needed on the way, and the cache.
    """
    from errata.settings import load_settings
    from tasks.onboarding import start_stream

    settings = load_settings(root=root, cache=home / "cache", device="cpu", threads=1)
    if editor != "d4s":
        start_stream(settings, str(base), editor=editor)
        return
    profile, corpus = home / "profile.json", home / "corpus.txt"
    profile.write_text(json.dumps({"prepare": choose_options().model_dump(mode="json"), "lam": 1.0, "origin": "test"}))
    corpus.write_text("\n".join(SENTENCES))
    start_stream(settings, str(base), profile=str(profile), corpus=corpus)
