"""What is decided once for every stage: storage that does not answer is tried again, with growing pauses; nothing else is."""

import pytest

from errata.errors import ConflictError, EditorError, ErrataError, KeyMissingError, ObjectCorruptError, RegistryError, StorageError
from tasks._task import stage


@pytest.mark.parametrize(
    ("error", "tries"),
    [(StorageError, 3), (ObjectCorruptError, 1), (KeyMissingError, 1), (ConflictError, 1), (RegistryError, 1), (EditorError, 1)],
)
def test_only_a_storage_that_does_not_answer_is_tried_again(prefect_server: str, error: type[ErrataError], tries: int) -> None:
    calls = []

    @stage
    def touch() -> None:
        calls.append(len(calls))
        raise error("expected an answer, found none")

    assert touch.retry_delay_seconds == [2, 4]  # type: ignore[attr-defined]  # a Prefect task
    with pytest.raises(error):
        touch.with_options(retry_delay_seconds=0)()  # type: ignore[attr-defined]
    assert len(calls) == tries


def test_a_stage_goes_on_when_its_storage_does(prefect_server: str) -> None:
    calls = []

    @stage
    def touch() -> int:
        calls.append(len(calls))
        if len(calls) < 3:
            raise StorageError("expected an answer, found none")
        return 7

    assert touch.with_options(retry_delay_seconds=0)() == 7  # type: ignore[attr-defined]
