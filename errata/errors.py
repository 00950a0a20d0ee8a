"""Every error Errata raises on purpose, as one tree. Each message says what was expected, what was found, and where.

    ErrataError                     exit code 1
    ├── InputError                  exit code 2: the user can mend it
    │   ├── RecordError             one bad edit; carries origin and field, never stops the other edits
    │   ├── SettingsError           errata.toml, ERRATA_* or a profile
    │   └── UnknownNameError        no such stream, commit, version or edit
    ├── ModelError
    │   ├── UnknownArchitectureError
    │   ├── BaseMismatchError       weights, pairs, state or artifact belong to another base or profile
    │   └── TokenizationError       a subject or target that the tokenizer cannot place
    ├── EditorError                 the algebra cannot go on (singular matrix, non-finite values)
    ├── StorageError
    │   ├── KeyMissingError
    │   │   └── ErasedError         what was there was erased on purpose
    │   ├── KeyExistsError          create-if-absent found something there
    │   ├── ObjectCorruptError      bytes do not match their digest
    │   ├── UnsafeStorageError      the store ignores create-if-absent
    │   └── FormatError             written by a newer Errata, or of an unknown kind
    ├── RegistryError               MLflow: unreachable, or what was read back is not what was written
    └── ConflictError               exit code 4: another writer committed first

A batch refused by the gate is a result, not an error; the console exits with code 3.
"""

from errata.redaction import redact


class ErrataError(Exception):
    """Base of the tree. `exit_code` is what the console returns when it reaches the top. Messages quote URLs and what other libraries
    say; secrets are taken out here, since messages end up in logs, pages and Prefect's states."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


class InputError(ErrataError):
    exit_code = 2


class RecordError(InputError):
    """One record of an input that cannot become an edit.

    Args:
        reason: what was expected and what was found.
        origin: `file:line` or `file[index]`, where known.
        field: the record's field at fault, where one is.
    """

    def __init__(self, reason: str, *, origin: str | None = None, field: str | None = None) -> None:
        self.reason, self.origin, self.field = reason, origin, field
        where = ": ".join(part for part in (origin, field) if part)
        super().__init__(f"{where}: {reason}" if where else reason)


class SettingsError(InputError):
    pass


class UnknownNameError(InputError):
    pass


class ModelError(ErrataError):
    pass


class UnknownArchitectureError(ModelError):
    exit_code = 2


class BaseMismatchError(ModelError):
    pass


class TokenizationError(ModelError):
    pass


class EditorError(ErrataError):
    pass


class StorageError(ErrataError):
    pass


class KeyMissingError(StorageError):
    pass


class ErasedError(KeyMissingError):
    pass


class KeyExistsError(StorageError):
    pass


class ObjectCorruptError(StorageError):
    pass


class UnsafeStorageError(StorageError):
    exit_code = 2


class FormatError(StorageError):
    pass


class RegistryError(ErrataError):
    pass


class ConflictError(ErrataError):
    exit_code = 4
