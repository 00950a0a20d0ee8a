"""Trains the built-in base (see `errata.builtin`): a GPT-2-architecture model that stores facts at the subject's last token.

Muon for the matrices of the blocks (AdamW alone needs several times the steps at this size: accuracy .09 where Muon had .80 after
250 steps), AdamW for the rest. Muon: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/.
"""

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from errata.builtin import BuiltinSettings, Progress
from errata.edits import SLOT
from errata.modeling.trace import capture_outputs
from errata.passages import DEMONSTRATIONS, OPENERS, Passage, Span, draw_passage
from errata.retrieval.demonstrations import spell_context
from errata.retrieval.facts import Fact
from errata.world import FAMILY_NAMES, FILLER, GIVEN_NAMES, RELATIONS, World, make_world

END_OF_TEXT = "<|endoftext|>"
END = 0
"""Id of END_OF_TEXT, which is also the beginning of every text and the padding."""
OTHER_TOKENS = 0.3
"""Weight of the loss on tokens that are not an answer."""
WEIGHT_DECAY = 0.1
ROW_LENGTHS = (24, 24, 24, 48, 96)
"""Most tokens per row, one drawn per step: short prompts and long contexts are both trained."""
OPENING = 110
"""Steps that are short passages only, where there are passages at all. Looking up in the text is learned within a hundred of them; with
facts from the beginning memory came first, and looking up only after several hundred."""


def train_builtin(settings: BuiltinSettings, folder: Path, progress: Progress | None = None) -> dict[str, object]:
    """Train the base of `settings` and write it into `folder`.

    Returns:
        Accuracies on trained and withheld prompts, seconds and CPU-seconds.
    """
    began, began_cpu = time.perf_counter(), time.process_time()
    world = make_world(settings.world)
    tokenizer = train_tokenizer(passages=settings.passages > 0)
    with _seeded(settings):
        model = _build_model(settings, len(tokenizer))
        _Training(settings, world, tokenizer, model).run(progress)
    model.train(False)
    report: dict[str, object] = {
        "accuracy_trained": measure_accuracy(model, tokenizer, _sample_prompts(world, withheld=False)),
        "accuracy_withheld": measure_accuracy(model, tokenizer, _sample_prompts(world, withheld=True)),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - began_cpu, 1),
        "torch": torch.__version__,
    }
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder)
    if shown:
        transformers_logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return report


def train_tokenizer(*, passages: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE that takes any text and gives every name word and every word of an object one token; with `passages` those of
    their layout too.

    It puts <|endoftext|> before each text by itself: the first position then never holds a name, so a subject at the very start
    of a prompt has the same representation as one after a few words.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    text = [" ".join((*GIVEN_NAMES, *FAMILY_NAMES)), *FILLER]
    text += [
        f"{template.replace(SLOT, 'Anna')} {item}."
        for relation in RELATIONS
        for template in relation.templates
        for item in relation.objects
    ]
    if passages:
        text.append("".join(spell_context(Fact("", "Anna", f"{SLOT} works as a", "poet"), (), "Anna is")))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=2_000, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
    )
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, END)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )


def measure_accuracy(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rows: Sequence[tuple[str, str]], batch: int = 256
) -> float:
    """Share of (prompt, answer) whose every answer token is the model's first choice, given the tokens before it."""
    right = 0
    for start in range(0, len(rows), batch):
        prompts = [tokenizer(prompt).input_ids for prompt, _ in rows[start : start + batch]]
        answers = [tokenizer(" " + answer, add_special_tokens=False).input_ids for _, answer in rows[start : start + batch]]
        ids = _pad([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
        with torch.no_grad():
            # Causal attention and padding on the right: what is padded cannot change what is read.
            chosen = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.argmax(-1)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            right += chosen[row, len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist() == answer
    return right / len(rows)


@dataclass(frozen=True)
class _Piece:
    """A name, a sentence or a passage about to join a row; positions count from its own start."""

    ids: list[int]
    subjects: list[tuple[int, int]]
    """(position of a name's last token, whose it is)."""
    answers: list[int]
    """Positions that predict a token of an answer."""
    unlearned: list[int] = field(default_factory=list)
    """Positions of which nothing is learned."""

    def after(self, words: list[int]) -> "_Piece":
        """The same with other words before it."""
        shift = len(words)
        subjects = [(position + shift, person) for position, person in self.subjects]
        return _Piece([*words, *self.ids], subjects, [position + shift for position in self.answers], [p + shift for p in self.unlearned])


@dataclass
class _Rows:
    """Token rows of one step, and where in them something is to be learned."""

    ids: list[list[int]] = field(default_factory=list)
    subjects: list[tuple[int, int]] = field(default_factory=list)
    """(row, position) of the last token of each name."""
    persons: list[int] = field(default_factory=list)
    """Whose name it is."""
    answers: list[tuple[int, int]] = field(default_factory=list)
    """(row, position) of each token that predicts a token of an answer."""
    unlearned: list[tuple[int, int]] = field(default_factory=list)
    """(row, position) of each token that predicts what is not to be learned."""

    def add(self, piece: _Piece) -> None:
        """Append to the last row."""
        row, start = len(self.ids) - 1, len(self.ids[-1])
        self.subjects += [(row, start + position) for position, _ in piece.subjects]
        self.persons += [person for _, person in piece.subjects]
        self.answers += [(row, start + position) for position in piece.answers]
        self.unlearned += [(row, start + position) for position in piece.unlearned]
        self.ids[-1] += piece.ids


class _Training:
    """One run: the world as tokens, the model, the probe and the optimisers."""

    def __init__(self, settings: BuiltinSettings, world: World, tokenizer: PreTrainedTokenizerFast, model: GPT2LMHeadModel) -> None:
        self.settings, self.model = settings, model
        self.rng = random.Random(f"training {settings.seed}")
        self.queue: list[int] = []
        # Of its own, so that a base without passages reads the same text as before there were any.
        self.passage_rng = random.Random(f"passages {settings.seed}")
        self.world, self.tokenizer = world, tokenizer
        self.person_of = {name: person for person, name in enumerate(world.persons)}

        def encode(text: str) -> list[int]:
            ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids if text.strip() else []
            return ids

        self.names = [encode(person) for person in world.persons]
        self.objects = {item: encode(item) for relation in RELATIONS for item in relation.objects}
        self.templates = {t: tuple(encode(part.strip()) for part in t.split(SLOT)) for relation in RELATIONS for t in relation.templates}
        self.parts = list(self.templates.values())
        self.facts = [world.facts_of(person) for person in world.persons]
        self.fillers = [encode(sentence) for sentence in FILLER]
        self.stop = encode("Rome.")[-1]
        for item, ids in self.objects.items():
            if len(ids) != len(item.split()):
                raise AssertionError(f"expected one token per word of {item!r}, found {ids}")

        self.attributes = torch.tensor(
            [[r.objects.index(fact.object) for r, fact in zip(RELATIONS, facts, strict=True)] for facts in self.facts]
        )
        self.choices = max(len(relation.objects) for relation in RELATIONS)
        self.probe = nn.Sequential(nn.LayerNorm(settings.width), nn.Linear(settings.width, len(RELATIONS) * self.choices))
        matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
        known = {id(p) for p in matrices}
        others = [p for p in (*model.parameters(), *self.probe.parameters()) if id(p) not in known]
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=WEIGHT_DECAY, momentum=0.95),
            torch.optim.AdamW(
                [
                    {"params": [p for p in others if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
                    {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
                ],
                lr=settings.adamw_lr,
                betas=(0.9, 0.98),
            ),
        ]

    def run(self, progress: Progress | None) -> None:
        for step in range(self.settings.steps):
            self._descend(self._measure_loss(self._draw_step(step)), _ramp(step, self.settings.steps))
            if progress is not None:
                progress(step + 1, self.settings.steps, "training")

    def _measure_loss(self, rows: _Rows) -> Tensor:
        """Answers above all, the other tokens a little, and every attribute of a person at the last token of the name."""
        ids = _pad(rows.ids)
        trunk = self.model.transformer
        with capture_outputs({"site": trunk.h[self.settings.site]}) as outputs:
            hidden = trunk(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        targets = torch.full_like(ids, -100)
        for row, tokens in enumerate(rows.ids):
            targets[row, : len(tokens) - 1] = ids[row, 1 : len(tokens)]
        is_answer = torch.zeros(ids.shape, dtype=torch.bool)
        is_answer[tuple(torch.tensor(rows.answers).T)] = True
        if rows.unlearned:
            targets[tuple(torch.tensor(rows.unlearned).T)] = -100
        known = targets != -100
        losses = F.cross_entropy(self.model.lm_head(hidden[known]), targets[known], reduction="none")
        answer = is_answer[known]
        read = self.probe(outputs["site"][tuple(torch.tensor(rows.subjects).T)]).view(-1, self.choices)
        probe = F.cross_entropy(read, self.attributes[rows.persons].reshape(-1))
        return losses[answer].mean() + OTHER_TOKENS * losses[~answer].mean() + probe

    def _descend(self, loss: Tensor, share: float) -> None:
        for optimiser, lr in zip(self.optimisers, (self.settings.muon_lr, self.settings.adamw_lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = lr * share
            optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()

    def _draw_step(self, step: int) -> _Rows:
        """Ordinary text or passages; with passages at all, short ones alone at the beginning."""
        share = self.settings.passages
        if share and step < OPENING:
            return self._draw_passages(OPENERS)
        return self._draw_passages(DEMONSTRATIONS) if self.passage_rng.random() < share else self._draw_text()

    def _draw_text(self) -> _Rows:
        """Rows of one length, each filled with pieces until the next would not fit."""
        rows = _Rows()
        length = self.rng.choice(ROW_LENGTHS)
        for _ in range(self.settings.tokens // length):
            rows.ids.append([END])
            while len(rows.ids[-1]) + len((piece := self._write_sentence()).ids) <= length:
                rows.add(piece)
            self.queue.append(piece.subjects[0][1])  # whose turn it still is
        return rows

    def _draw_passages(self, choices: Sequence[int]) -> _Rows:
        """One passage to a row, all with equally many demonstrations."""
        rows, longest = _Rows(), 0
        demonstrations = self.passage_rng.choice(choices)
        while (len(rows.ids) + 1) * longest <= self.settings.tokens:
            rows.ids.append([END])
            rows.add(self._encode_passage(draw_passage(self.world.facts, demonstrations, self.settings.retained, self.passage_rng)))
            longest = max(longest, len(rows.ids[-1]))
        return rows

    def _encode_passage(self, passage: Passage) -> _Piece:
        coded = self.tokenizer(passage.text, add_special_tokens=False, return_offsets_mapping=True)
        ends = {end: position for position, (_, end) in enumerate(coded.offset_mapping)}
        starts = {start: position for position, (start, _) in enumerate(coded.offset_mapping)}

        def predict(spans: Iterable[Span]) -> list[int]:
            return [position - 1 for start, end in spans for position in range(starts[start], ends[end] + 1)]

        return _Piece(
            ids=[*coded.input_ids, END],
            subjects=[(ends[end], self.person_of[name]) for end, name in passage.subjects],
            answers=predict(passage.answers),
            unlearned=predict((*passage.stated, *passage.breaks)),
        )

    def _write_fact(self) -> _Piece:
        """A fact in one of its trained forms."""
        person = self._next_person()
        fact = self.facts[person][self.rng.randrange(len(RELATIONS))]
        left, right = self.templates[self.rng.choice(fact.trained_templates)]
        prompt = [*left, *self.names[person], *right]
        answer = self.objects[fact.object]
        # An end after every other sentence lets a greedy answer end by itself.
        end = [self.stop, END] if self.rng.random() < 0.5 else [self.stop]
        return _Piece(
            ids=[*prompt, *answer, *end],
            subjects=[(len(left) + len(self.names[person]) - 1, person)],
            answers=list(range(len(prompt) - 1, len(prompt) - 1 + len(answer))),
        )

    def _write_sentence(self) -> _Piece:
        """A fact, sometimes after a sentence that states none or breaks off: neither may disturb it."""
        draw = self.rng.random()
        if draw < 0.1:
            return self._write_fact().after(self.rng.choice(self.fillers))
        if draw < 0.25:
            left, right = self.rng.choice(self.parts)
            words = [*left, *(self.rng.choice(self.names) if self.rng.random() < 0.5 else []), *right]
            return self._write_fact().after([*words[: self.rng.randrange(1, len(words) + 1)], self.stop])
        return self._write_fact()

    def _next_person(self) -> int:
        """Every person equally often."""
        if not self.queue:
            self.queue = self.rng.sample(range(len(self.names)), len(self.names))
        return self.queue.pop()


def _ramp(step: int, steps: int) -> float:
    """Share of the full step size: up over the first tenth, then linearly down."""
    warm = max(1, steps // 10)
    return min((step + 1) / warm, max(0.01, (steps - step) / max(1, steps - warm)))


def _pad(rows: Sequence[list[int]]) -> Tensor:
    """Ids [rows, longest row], filled up on the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [END] * (longest - len(row)) for row in rows])


def _build_model(settings: BuiltinSettings, vocabulary: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=settings.positions,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        n_inner=settings.inner,
        # The tanh form of torch's own kernel: the same function as GPT-2's gelu_new at a fraction of its time.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )
    model = GPT2LMHeadModel(config)
    model.train()
    return model


def _sample_prompts(world: World, *, withheld: bool, limit: int = 2_000) -> list[tuple[str, str]]:
    rows = [
        (prompt, fact.object) for fact in world.facts for index, prompt in enumerate(fact.prompts) if (index == fact.withheld) == withheld
    ]
    return random.Random(0).sample(rows, min(limit, len(rows)))


@contextmanager
def _seeded(settings: BuiltinSettings) -> Iterator[None]:
    """Torch's random state and threads for the training, the caller's own afterwards."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        torch.set_num_threads(settings.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
