"""A fact as an edit memory keeps it: texts, and nothing of a model. This module travels inside every MLflow version."""

from dataclasses import dataclass

_SLOT = "{}"


def find_edit(name: str) -> str:
    """The id of the edit behind a fact's id, which in a stream is an occurrence, `<edit id>@<seq>`."""
    return name.rpartition("@")[0] or name


@dataclass(frozen=True)
class Fact:
    """One live edit, or one training edit of a pool."""

    id: str
    """Of its edit; in a stream, of its occurrence: see `find_edit`."""
    subject: str
    prompt: str
    """Exactly one `{}` where the subject stands."""
    target: str
    aliases: tuple[str, ...] = ()
    """Other names of the subject."""
    paraphrases: tuple[str, ...] = ()
    """Full texts that ask for the target; of a stream's own edits, only those of the training half (design §6)."""

    @property
    def rewrite_prompt(self) -> str:
        """The prompt with the subject in its slot."""
        return self.prompt.replace(_SLOT, self.subject)
