"""The commit log: numbered files that are created only if absent, each naming its parent by digest. The newest one is the head."""

from errata.edits import digest_of
from errata.errors import ConflictError, FormatError, KeyExistsError, KeyMissingError, ObjectCorruptError
from registry.events import Commit, read_commit, write_commit
from registry.storage.base import Storage


class CommitLog:
    """The commits of one stream.

    Args:
        prefix: where they lie, e.g. `streams/main/commits`.
    """

    def __init__(self, storage: Storage, prefix: str) -> None:
        self._storage = storage
        self._prefix = prefix.rstrip("/")

    def append(self, commit: Commit) -> str:
        """Make a commit the one after its parent; its digest. When this returns or finds the same bytes there already (a repeated
        request that met its own first try), the commit is ours and durable.

        Raises:
            ConflictError: another commit has that number.
        """
        return self.append_bytes(commit.seq, write_commit(commit))

    def append_bytes(self, seq: int, data: bytes) -> str:
        """As `append`, for a commit as it stands in another log: whatever wrote it, its bytes are what its successor names."""
        try:
            self._storage.create(self._key(seq), data)
        except KeyExistsError:
            found = self.read_bytes(seq)
            if found != data:
                raise ConflictError(
                    f"expected commit {seq - 1} to be the newest, found {self._describe(seq, found)} after it: "
                    "another writer committed first. Nothing is lost; run it again on the new head."
                ) from None
        return digest_of(data)

    def read_bytes(self, seq: int) -> bytes:
        """
        Raises:
            KeyMissingError: there is no such commit.
        """
        return self._storage.read(self._key(seq))

    def read(self, seq: int) -> Commit:
        """
        Raises:
            KeyMissingError: there is no such commit.
            FormatError: written by a newer Errata, or of an unknown kind.
        """
        return self._parse(seq, self.read_bytes(seq))

    def read_next(self, seq: int, digest: str) -> tuple[Commit, str] | None:
        """The commit after `seq` and its own digest; None where `seq` is the head.

        Args:
            digest: of the commit `seq`, which the next one must name as its parent. -1 and "" come before the first commit.

        Raises:
            ObjectCorruptError: the chain of digests is broken.
            FormatError: written by a newer Errata, or of an unknown kind.
        """
        try:
            data = self.read_bytes(seq + 1)
        except KeyMissingError:
            return None
        commit = self._parse(seq + 1, data)
        if commit.parent != digest:
            raise ObjectCorruptError(f"{self._where(seq + 1)}: expected parent {digest or 'none'}, found {commit.parent or 'none'}")
        return commit, digest_of(data)

    def _parse(self, seq: int, data: bytes) -> Commit:
        commit = read_commit(data, self._where(seq))
        if commit.seq != seq:
            raise ObjectCorruptError(f"{self._where(seq)}: expected seq {seq}, found {commit.seq}")
        return commit

    def _describe(self, seq: int, data: bytes) -> str:
        try:
            return self._parse(seq, data).name
        except FormatError:
            return f"a commit {seq} of a newer format"

    def _where(self, seq: int) -> str:
        return f"{self._storage.url}/{self._key(seq)}"

    def _key(self, seq: int) -> str:
        return f"{self._prefix}/{seq:08d}.json"
