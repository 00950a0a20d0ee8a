"""Commands that are killed, again and again, on one stream: is anything lost, or done twice?

    python -m benchmarks.chaos [--kills 200] [--seed 0] [--storage both]

Each round draws a command (apply a small batch, withdraw, roll back, collect garbage), runs it in a process of its own and kills that:
three times out of four before or after its n-th write, which the seed repeats, else at a random moment. The next process runs the same
command to its end. Then the log, the objects, the tables and MLflow are compared with what the commands should have done
(`benchmarks.expected`), and every so often `rebuild --check` is asked. The stream lives on through all rounds.

S3 is moto in a process of its own, unless ERRATA_TEST_S3_ENDPOINT names a server (credentials from AWS_*).
"""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.deaths import Trap, fork, import_everything, lay_trap, storage_ahead
from benchmarks.expected import Expected
from benchmarks.invariants import Account, check_stream, read_archived
from benchmarks.tiny_base import LENIENT, PEOPLE, build_edit, start_root, write_base
from errata.edits import Edit, digest_of
from errata.errors import InputError

KINDS = ("apply", "withdraw", "rollback", "gc")
_SHARES = (50, 20, 14, 16)
_STEPS = {
    "local": {"apply": 48, "withdraw": 33, "rollback": 22, "gc": 40},
    "s3": {"apply": 35, "withdraw": 25, "rollback": 18, "gc": 32},
}
"""About how many steps they take: where the trap is laid."""
_SECONDS = {"apply": 1.5, "withdraw": 1.4, "rollback": 1.2, "gc": 0.4}
"""About how long they take: when the clock kills."""
_SETTINGS = {
    **{f"ERRATA_GATE__{budget}": value for budget, value in LENIENT.items()},
    "ERRATA_DEVICE": "cpu",
    "ERRATA_THREADS": "1",
    "ERRATA_ACTOR": "chaos",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "ERRATA_APPLY__SNAPSHOT_EVERY": "3",
    "ERRATA_APPLY__REFRESH_EVERY": "60",
    "ERRATA_KEEP__RECENT": "4",
    "ERRATA_KEEP__DAILY_DAYS": "0",
}

out = Console(width=110)


@dataclass
class Command:
    """What one round does."""

    kind: str
    edits: Sequence[Edit] = ()
    file: str = ""
    """Name in the inbox."""
    ids: Sequence[str] = ()
    target: int = 0
    ahead: bool = False
    """Everything stored is old."""

    @property
    def lines(self) -> bytes:
        return "".join(edit.model_dump_json(exclude_none=True) + "\n" for edit in self.edits).encode()

    def run(self) -> None:
        import flows.edit
        import flows.keep
        import flows.undo

        with ExitStack() as stack:
            if self.ahead:
                stack.enter_context(storage_ahead())
            match self.kind:
                case "apply":
                    flows.edit.apply_edits.fn("main")
                case "withdraw":
                    flows.undo.withdraw_edits.fn("main", list(self.ids), "chaos")
                case "rollback":
                    flows.undo.rollback.fn("main", str(self.target), "chaos")
                case "gc":
                    flows.keep.collect_garbage.fn("main")

    def tell(self, expected: Expected, refused: Sequence[str]) -> None:
        """What it should have done."""
        match self.kind:
            case "apply" if digest_of(self.lines) not in expected.files:
                expected.files[digest_of(self.lines)] = len(self.edits)
                expected.apply(self.edits, refused)
            case "withdraw":
                expected.withdraw(self.ids)
            case "rollback":
                expected.roll_back(self.target)


@dataclass
class Tally:
    """What became of one storage's rounds."""

    storage: str
    rounds: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    by_clock: int = 0
    before: int = 0
    """Died before the commit."""
    after: int = 0
    converged: int = 0
    """The command that followed ended as it should."""
    checks: int = 0
    """Asked `rebuild --check`."""
    commits: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, word: str) -> int:
        return sum(line.startswith(word) for line in self.wrong)


def run(
    kills: Annotated[int, typer.Option(min=1, help="In all; shared between the storages.")] = 200,
    seed: Annotated[int, typer.Option(help="Of commands, traps and moments.")] = 0,
    storage: Annotated[Literal["local", "s3", "both"], typer.Option(help="Where the stream lies.")] = "both",
    check_every: Annotated[int, typer.Option(min=1, help="Rounds between two rebuilds.")] = 25,
) -> None:
    import_everything()
    names = ["local", "s3"] if storage == "both" else [storage]
    work = Path(tempfile.mkdtemp(prefix="errata-chaos-"))
    tallies = []
    for name in names:
        place = work / name
        place.mkdir()
        with open_place(name, place) as root:
            tallies.append(torment(name, root, place, kills // len(names) + (name == names[0]) * (kills % len(names)), seed, check_every))
    out.print(build_table(tallies, seed))
    for tally in tallies:
        for line in tally.wrong:
            out.print(f"{tally.storage}, seed {seed}, round {tally.rounds}: {line}", markup=False)
    if any(tally.wrong for tally in tallies):
        out.print(f"what is left lies in {work}")
        raise typer.Exit(1)
    shutil.rmtree(work)


@contextmanager
def open_place(name: str, home: Path) -> Iterator[str]:
    """The URL of an empty root, with the settings that go with it in the environment."""
    variables = {**_SETTINGS, "ERRATA_CACHE": str(home / "cache"), "ERRATA_MLFLOW__TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}"}
    server = None
    if name == "s3" and "ERRATA_TEST_S3_ENDPOINT" not in os.environ:
        server, url = _start_moto(home)
        variables |= {"AWS_ENDPOINT_URL_S3": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "NO_PROXY": "127.0.0.1"}
    elif name == "s3":
        variables["AWS_ENDPOINT_URL_S3"] = os.environ["ERRATA_TEST_S3_ENDPOINT"]
    variables.setdefault("AWS_DEFAULT_REGION", os.environ.get("AWS_DEFAULT_REGION", "us-east-1"))
    bucket = f"errata-chaos-{uuid.uuid4().hex[:12]}"
    root = f"s3://{bucket}/root" if name == "s3" else str(home / "root")
    before = dict(os.environ)
    for variable in [variable for variable in os.environ if variable.startswith("ERRATA_") or variable == "AWS_PROFILE"]:
        del os.environ[variable]
    os.environ |= {**variables, "ERRATA_ROOT": root}
    try:
        ended = fork(lambda: _furnish(root, bucket if name == "s3" else None, home), home)
        if ended.status:
            raise RuntimeError((home / "output.txt").read_text()[-3000:])
        yield root
    finally:
        os.environ.clear()
        os.environ |= before
        if server:
            server.kill()
            server.wait()


def torment(name: str, root: str, home: Path, kills: int, seed: int, check_every: int) -> Tally:
    """Rounds until so many commands have been killed, or something is wrong."""
    tally, expected, account, chance, begun = Tally(name), Expected(), Account(), random.Random(f"{seed} {name}"), time.monotonic()
    targets: list[int] = []
    expected.remember(0)
    with Progress(console=out, transient=True, auto_refresh=False) as progress:  # its refreshing thread would be forked along
        bar = progress.add_task(f"{name}: killed", total=kills)
        while tally.killed.total() < kills and not tally.wrong and tally.rounds < 3 * kills:
            tally.rounds += 1
            command = draw_command(chance, expected, targets, tally.rounds)
            if command.kind == "apply":
                fork(lambda command=command: leave_file(root, command), home)
            by_clock, between = chance.random() < 0.25, chance.random() < 0.15
            moment = chance.uniform(0, _SECONDS[command.kind]) if by_clock else None
            trap = None if by_clock else Trap(chance.randint(1, _STEPS[name][command.kind]), chance.random() < 0.5)
            ended = fork(lambda command=command, trap=trap: strike(command, trap), home, moment)
            killed = ended.status == -signal.SIGKILL
            tally.killed[command.kind] += killed
            tally.by_clock += killed and by_clock
            if ended.status not in (0, -signal.SIGKILL):
                tally.wrong.append(f"{command.kind}: failed on its own, with status {ended.status}: {_read_tail(home)}")
                break
            whole = tally.rounds % check_every == 0 or tally.killed.total() == kills
            told = fork(lambda rest=(command, expected, account, whole, killed and between): finish(*rest), home)
            if told.result is None:
                tally.wrong.append(f"{command.kind}: the command that followed failed: {_read_tail(home)}")
                break
            account, targets = Account(**told.result["account"]), told.result["targets"]
            command.tell(expected, told.result["refused"])
            expected.remember(account.seq)
            tally.before += killed and not told.result["landed"]
            tally.after += killed and told.result["landed"]
            tally.converged += killed and not told.result["wrong"]
            tally.checks += whole
            tally.commits = account.seq
            tally.wrong += told.result["wrong"]
            progress.update(bar, completed=tally.killed.total(), refresh=True)
    if not tally.wrong and tally.killed.total() < kills:
        tally.wrong.append(f"traps: expected {kills} deaths, found {tally.killed.total()} in {tally.rounds} rounds")
    tally.seconds = time.monotonic() - begun
    return tally


def draw_command(chance: random.Random, expected: Expected, targets: list[int], number: int) -> Command:
    """What comes next, as far as it can be done."""
    (kind,) = chance.choices(KINDS, _SHARES)
    live = [fact.edit.edit_id for fact in expected.live]
    targets = [target for target in targets if target in expected.states]
    if kind == "gc":
        return Command(kind, ahead=True)
    ahead = chance.random() < 0.2
    if kind == "withdraw" and live:
        return Command(kind, ids=chance.sample(live, min(len(live), chance.randint(1, 2))), ahead=ahead)
    if kind == "rollback" and targets:
        return Command(kind, target=chance.choice(targets), ahead=ahead)
    edits: list[Edit] = []
    for _ in range(chance.randint(1, 4)):
        person = chance.randrange(len(PEOPLE))
        name = {"id": f"case-{person}"} if chance.random() < 0.2 else {}
        edits.append(build_edit(person, chance.randrange(2), chance.randrange(4), **name))
    if chance.random() < 0.2:
        edits.append(chance.choice(edits))
    return Command("apply", edits=edits, file=f"{number:05d}.jsonl", ahead=ahead)


def leave_file(root: str, command: Command) -> None:
    """Put the batch into the inbox, as a producer does."""
    from registry.storage.base import open_storage

    open_storage(root).create(f"streams/main/inbox/{command.file}", command.lines)


def strike(command: Command, trap: Trap | None) -> list[str]:
    """Run the command, up to the trap; the steps it took if it missed it."""
    steps = lay_trap(trap)
    command.run()
    return steps


def finish(command: Command, expected: Expected, account: Account, whole: bool, between: bool) -> dict[str, Any]:
    """Run the command again, and look at everything.

    Args:
        between: before that, garbage is collected long after the first one died.
    """
    from registry.history import open_history

    history, before = open_history(os.environ["ERRATA_ROOT"], "main"), account.seq
    landed = before >= 0 and history.storage.exists(history.key(f"commits/{before + 1:08d}.json"))
    if between:
        Command("gc", ahead=True).run()
    try:
        command.run()
    except InputError:
        if not landed:  # else it says rightly that this is done already
            raise
    kinds = account.read_on(history)[before < 0 :]
    refused, archived = account.list_refused(before), read_archived(history)
    command.tell(expected, refused)
    expected.remember(account.seq)
    wrong = check_stream(expected, account, whole=whole)
    own = {"apply": {"edits", "rejection", "compaction"}, "withdraw": {"withdrawal"}, "rollback": {"rollback"}, "gc": set()}[command.kind]
    if not own.issuperset(kinds) or (command.kind in ("withdraw", "rollback") and len(kinds) != 1):
        wrong.append(f"twice: expected {command.kind} to commit {own or 'nothing'}, found {kinds}")
    return {"landed": landed, "refused": refused, "account": asdict(account), "targets": account.list_targets(archived), "wrong": wrong}


def build_table(tallies: Sequence[Tally], seed: int) -> Table:
    table = Table(title=f"killed and run again, seed {seed}")
    table.add_column()
    for tally in tallies:
        table.add_column(tally.storage, justify="right")
    rows: dict[str, Callable[[Tally], float]] = {
        "rounds": lambda tally: tally.rounds,
        "killed": lambda tally: tally.killed.total(),
        **{f"  {kind}": lambda tally, kind=kind: tally.killed[kind] for kind in KINDS},
        "  at a random moment": lambda tally: tally.by_clock,
        "  before the commit": lambda tally: tally.before,
        "  after it": lambda tally: tally.after,
        "the next command converged": lambda tally: tally.converged,
        "lost": lambda tally: tally.count("lost"),
        "applied twice": lambda tally: tally.count("twice"),
        "rebuild --check": lambda tally: tally.checks,
        "  disagreed": lambda tally: tally.count("rebuild"),
        "anything else wrong": lambda tally: len(tally.wrong) - sum(map(tally.count, ("lost", "twice", "rebuild"))),
        "commits": lambda tally: tally.commits,
        "seconds": lambda tally: round(tally.seconds),
    }
    for name, read in rows.items():
        table.add_row(name, *(str(read(tally)) for tally in tallies))
    return table


def _furnish(root: str, bucket: str | None, home: Path) -> None:
    if bucket:
        import boto3

        boto3.client("s3").create_bucket(Bucket=bucket)
    base = home / "base"
    base.mkdir()
    start_root(root, write_base(base), home)
    from registry.models import ModelRegistry

    ModelRegistry(f"sqlite:///{home / 'mlflow.db'}").champion("main")


def _start_moto(home: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, command = f"http://127.0.0.1:{port}", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (home / "moto.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    for _ in range(300):
        try:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5).close()
            return server, url
        except OSError:
            time.sleep(0.1)
    server.kill()
    raise RuntimeError(f"no S3 at {url}: {(home / 'moto.log').read_text()[-3000:]}")


def _read_tail(home: Path) -> str:
    return (home / "output.txt").read_text()[-3000:]


if __name__ == "__main__":
    typer.run(run)
