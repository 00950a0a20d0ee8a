"""Versions that wait: one is approved and becomes the champion, or refused, and the stream returns to the champion."""

from registry.commit import commit
from registry.events import PromotionCommit, RefusalCommit, write_commit
from registry.undoing import choose_waiting
from tasks._session import open_named
from tasks._task import stage
from tasks.committing import describe_writer
from tasks.undoing import draft_return, resolve_state


@stage
def promote(stream: str, version: str, reason: str) -> int:
    """Make a version that waits the champion; the number of the commit that says so, or of the newest where it is already.

    Raises:
        UnknownNameError: no such version.
        InputError: it does not wait.
        ConflictError: another writer committed meanwhile.
    """
    settings, opened = open_named(stream)
    head = opened.head
    if resolve_state(settings, opened, version) == head.champion:
        return head.seq  # an earlier try was cut off before MLflow showed it
    seq = choose_waiting(opened, resolve_state(settings, opened, version))
    draft = PromotionCommit(
        seq=head.seq + 1,
        parent=head.digest,
        of=seq,
        manifest=head.manifest,
        decision="approve",
        reasons=(reason,) if reason else (),
        **describe_writer(settings),
    )
    return commit(opened, draft, head).seq


@stage
def draft_refusal(stream: str, version: str, reason: str) -> str:
    """The commit that returns to the champion, stored and not yet made (`tasks.undoing.commit_rollback` makes it).

    Raises:
        UnknownNameError: no such version.
        InputError: it does not wait.
    """
    settings, opened = open_named(stream)
    seq = choose_waiting(opened, resolve_state(settings, opened, version))
    fields = draft_return(settings, opened, opened.head.champion, reason)
    return opened.objects.put(write_commit(RefusalCommit(of=seq, decision="refuse", **fields)))
