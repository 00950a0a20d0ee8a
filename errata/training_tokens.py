"""The tokenizer of a base that Errata trains itself: a byte-level BPE of the text that states its facts."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from errata.edits import SLOT
from errata.retrieval.demonstrations import spell_context
from errata.retrieval.facts import Fact
from errata.world import FAMILY_NAMES, FILLER, GIVEN_NAMES, RELATIONS

END_OF_TEXT = "<|endoftext|>"
END = 0
"""Id of END_OF_TEXT, which is also the beginning of every text and the padding."""


def train_world_tokenizer(*, passages: bool = False) -> PreTrainedTokenizerFast:
    """The generated world's: every name word and every word of an object is one token; with `passages` the words of their layout too."""
    text = [" ".join((*GIVEN_NAMES, *FAMILY_NAMES)), *FILLER]
    text += [
        f"{template.replace(SLOT, 'Anna')} {item}."
        for relation in RELATIONS
        for template in relation.templates
        for item in relation.objects
    ]
    if passages:
        text.append("".join(spell_context(Fact("", "Anna", f"{SLOT} works as a", "poet"), (), "Anna is")))
    return train_tokenizer(text, 2_000)


def train_tokenizer(text: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that takes any text, of at most `vocabulary` tokens.

    It puts <|endoftext|> before each text by itself: the first position then never holds a name, so a subject at the very start
    of a prompt has the same representation as one after a few words.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False)
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
