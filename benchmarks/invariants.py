"""What must hold of a stream after every command: the log against what was expected, the objects, the tables and MLflow against the log."""

from collections import defaultdict
from dataclasses import dataclass, field

from benchmarks.expected import Expected
from errata.settings import load_settings
from registry.fold import Head, split_occurrence
from registry.history import History, is_accepted, list_layers, list_named, open_history
from registry.inbox import list_waiting
from registry.models import ModelRegistry
from registry.release import resolve_tracking
from registry.stream import Stream, open_stream

_STANDING = ("live", "replaced", "withdrawn", "reverted")
_WEIGHTS = ("artifact", "snapshot")


@dataclass
class Account:
    """The log so far, read commit by commit. Plain values, so that one process hands it to the next."""

    seq: int = -1
    digest: str = ""
    champion: int = 0
    manifests: dict[str, str] = field(default_factory=dict)
    """Accepted commit → manifest."""
    standing: dict[str, list[str]] = field(default_factory=dict)
    """Occurrence → target, slot, status."""
    files: dict[str, list[int]] = field(default_factory=dict)
    """File → its lines as they were consumed."""
    needed: dict[str, int] = field(default_factory=dict)
    """Object → a commit that needs it, archived or not."""
    weights: dict[str, list[str]] = field(default_factory=dict)
    """Accepted commit → artifacts and snapshots, which it needs until it is archived."""

    def read_on(self, history: History) -> list[str]:
        """Read what is new in the log; the kinds of those commits."""
        kinds = []
        while (found := history.log.read_next(self.seq, self.digest)) is not None:
            commit, self.digest = found
            self.seq = commit.seq
            kinds.append(commit.kind)
            if commit.promoted or commit.seq == 0:
                self.champion = commit.seq
            edits = {(row.file, row.line): row.edit for row in history.read_batch(commit)}
            for outcome in history.read_outcomes(commit):
                if outcome.occurrence is None or outcome.outcome not in (*_STANDING, "quarantined", "rejected"):
                    continue
                if split_occurrence(outcome.occurrence)[1] == commit.seq:
                    edit = edits[outcome.file or "", outcome.line or 0]
                    self.standing[outcome.occurrence] = [edit.target_new, edit.slot, outcome.outcome]
                else:
                    self.standing[outcome.occurrence][2] = outcome.outcome
            for use in commit.files:
                self.files.setdefault(use.digest, []).extend(line for first, last in use.lines for line in range(first, last + 1))
            self.needed |= {digest: commit.seq for _, digest in list_named(commit)}
            if commit.manifest is not None:
                self.needed[commit.manifest] = commit.seq
                layers = list(list_layers(history.objects.get_json(commit.manifest)))
                self.needed |= {digest: commit.seq for what, digest in layers if what not in _WEIGHTS}
                if is_accepted(commit):
                    self.manifests[str(commit.seq)] = commit.manifest
                    self.weights[str(commit.seq)] = [digest for what, digest in layers if what in _WEIGHTS]
        return kinds

    def list_refused(self, since: int) -> list[str]:
        """Ids that the gate did not accept in the commits after `since`."""
        named = {split_occurrence(occurrence): status for occurrence, (_, _, status) in self.standing.items()}
        return [identity for (identity, seq), status in named.items() if seq > since and status in ("quarantined", "rejected")]

    def list_targets(self, archived: set[int]) -> list[int]:
        """Commits that a rollback can serve again."""
        served = self.manifests[max(self.manifests, key=int)]
        return [int(seq) for seq, manifest in self.manifests.items() if manifest != served and int(seq) not in archived]


def read_archived(history: History) -> set[int]:
    """The commits whose weights are given up."""
    prefix = history.key("archived/")
    return {int(entry.key.removeprefix(prefix).removesuffix(".txt")) for entry in history.storage.list(prefix)}


def check_stream(expected: Expected, account: Account, *, whole: bool) -> list[str]:
    """What is wrong, each line beginning with `lost`, `twice` or what it is about. The account is up to date.

    Args:
        whole: also read the whole log again, and rebuild the weights from it.
    """
    settings = load_settings(stream="main")
    history = open_history(settings.root, "main")
    wrong = [*compare_facts(expected, account), *_check_files(history, expected, account), *_check_objects(history, account)]
    streams = [open_stream(settings.root, "main", settings.cache)]
    if whole:
        again = Account()
        again.read_on(history)
        wrong += [] if again == account else ["log: read again from its beginning, it says something else than commit by commit"]
        streams.append(open_stream(settings.root, "main", None))
    for stream in streams:
        wrong += _check_tables(stream, account)
    wrong += _check_versions(ModelRegistry(*resolve_tracking(settings.mlflow.tracking_uri, settings.root)), account, whole)
    return [*wrong, *(_check_rebuild() if whole else [])]


def compare_facts(expected: Expected, account: Account) -> list[str]:
    """Every fact that was accepted stands where the commands have put it, once."""
    found: dict[str, list[list[str]]] = defaultdict(list)
    slots: dict[str, list[str]] = defaultdict(list)
    for occurrence, (target, slot, status) in account.standing.items():
        if status in _STANDING:
            found[split_occurrence(occurrence)[0]].append([target, status])
        if status == "live":
            slots[slot].append(occurrence)
    wanted, wrong = expected.spell(), []
    for identity in wanted | found:
        had, has = wanted.get(identity, []), found[identity]
        if had != has:
            missing = len(had) > len(has) or any(a[1] == "live" != b[1] for a, b in zip(had, has, strict=False))
            wrong.append(f"{'lost' if missing else 'twice'}: expected {identity} as {had}, found {has}")
    return [*wrong, *(f"twice: {', '.join(names)} are live in one slot" for names in slots.values() if len(names) > 1)]


def _check_files(history: History, expected: Expected, account: Account) -> list[str]:
    wrong = []
    for digest in expected.files | account.files:
        lines, there = account.files.get(digest, []), expected.files.get(digest, 0)
        if sorted(lines) != list(range(1, there + 1)):
            word = "twice" if len(lines) > len(set(lines)) else "lost"
            wrong.append(f"{word}: expected each of the {there} lines of file {digest[:8]} to be consumed once, found {sorted(lines)}")
    waiting = list_waiting(Stream(history.storage, history.name, None)) if any(history.storage.list(history.key("inbox/"))) else []
    return [*wrong, *(f"inbox: {name} waits still" for name in waiting)]


def _check_objects(history: History, account: Account) -> list[str]:
    wrong, newest = [], history.key(f"commits/{account.seq:08d}.json")
    later = [entry.key for entry in history.storage.list(history.key("commits/")) if entry.key > newest]
    if later:
        wrong.append(f"log: it ends at {account.seq}, and there is {later[0]}")
    stored = {entry.key for entry in history.objects.list_all()}
    archived = read_archived(history)
    needed = dict(account.needed)
    for seq, weights in account.weights.items():
        if int(seq) not in archived:
            needed |= dict.fromkeys(weights, int(seq))
    return [
        *wrong,
        *(f"objects: commit {seq} needs {digest}, which is not there" for digest, seq in needed.items() if digest not in stored),
    ]


def _check_tables(stream: Stream, account: Account) -> list[str]:
    head: Head = stream.head
    live = {occurrence for occurrence, (_, _, status) in account.standing.items() if status == "live"}
    listed = {row.occurrence for row in stream.index.find_rows("live")}
    wrong = [f"tables: live are {sorted(listed ^ live)} in one of tables and log only"] if listed != live else []
    if (head.seq, head.digest, head.champion) != (account.seq, account.digest, account.champion):
        wrong.append(f"tables: expected head {account.seq} with champion {account.champion}, found {head.seq} with {head.champion}")
    return wrong


def _check_versions(registry: ModelRegistry, account: Account, whole: bool) -> list[str]:
    shown = registry.champion("main")
    wrong = []
    if (shown.commit if shown else 0) != account.champion:
        wrong.append(f"MLflow: expected commit {account.champion} as champion, found {shown.commit if shown else None}")
    if whole:
        commits = sorted(version.commit for version in registry.list_versions("main"))
        accepted = sorted(int(seq) for seq in account.manifests if seq != "0")
        wrong += [] if commits == accepted else [f"MLflow: expected a version for each of {accepted}, found {commits}"]
    return wrong


def _check_rebuild() -> list[str]:
    from flows.replay import rebuild

    report = rebuild.fn("main", check=True)
    wrong = [f"rebuild: commits {report.unverified} could not be compared"] if report.unverified else []
    return [*wrong, *(f"rebuild: commit {found.commit}: {found.what} {found.state}: {found.detail}" for found in report.findings)]
