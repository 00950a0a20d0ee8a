"""Prefect and MLflow on a real PostgreSQL, as `deployments/compose.yaml` has them: one batch goes through both."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from errata.edits import Edit

PASSWORD = "not-a-default"


def find_binaries() -> Path | None:
    """The folder of PostgreSQL's server programs, the newest one."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def find_user() -> str | None:
    """Whom the server runs as: it refuses to be root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


@pytest.fixture
def postgres() -> Iterator[str]:
    """`user:password@host:port` of a throw-away server with the databases that the compose file has."""
    psycopg2 = pytest.importorskip("psycopg2", reason="psycopg2 is not installed (the extra `postgres`)")
    binaries, user = find_binaries(), find_user()
    if binaries is None:
        pytest.skip("PostgreSQL's server programs are not on this machine")
    home = Path(tempfile.mkdtemp(prefix="errata-postgres-"))
    (home / "password").write_text(PASSWORD)
    if user is not None:
        for path in (home, home / "password"):
            shutil.chown(path, user)
    rights: dict[str, Any] = {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
    data = home / "data"
    make = [str(binaries / "initdb"), "-D", str(data), "-U", "errata", "--auth=scram-sha-256", f"--pwfile={home / 'password'}", "--no-sync"]
    subprocess.run(make, check=True, cwd=home, stdout=subprocess.DEVNULL, **rights)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run = [
        str(binaries / "postgres"),
        "-D",
        str(data),
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        "-c",
        "unix_socket_directories=",
        "-c",
        "fsync=off",
    ]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(run, cwd=home, stdout=log, stderr=log, **rights)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                connection = psycopg2.connect(host="127.0.0.1", port=port, user="errata", password=PASSWORD, dbname="postgres")
                break
            except psycopg2.OperationalError:
                if time.monotonic() > end or server.poll() is not None:
                    raise
                time.sleep(0.2)
        connection.autocommit = True
        statements = (Path(__file__).parents[2] / "deployments" / "databases.sql").read_text()
        for statement in [line for line in statements.splitlines() if line.startswith("CREATE")]:
            connection.cursor().execute(statement)
        connection.close()
        yield f"errata:{PASSWORD}@127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=60)
        shutil.rmtree(home)


@pytest.mark.long
def test_a_batch_goes_through_both(postgres: str, desk: Any, launch: Callable[..., Any], make_edit: Callable[..., Edit]) -> None:
    import psycopg2

    desk.submit("monday", make_edit(0, id="case-1"))
    up = launch(
        PREFECT_API_DATABASE_CONNECTION_URL=f"postgresql+asyncpg://{postgres}/prefect",
        ERRATA_MLFLOW__TRACKING_URI=f"postgresql://{postgres}/mlflow",
    )
    up.wait_until_ready()
    assert up.wait_for_champion().tags["errata.commit"] == "1"
    assert desk.live() == {"case-1": "Paris"}

    def count(database: str, query: str) -> int:
        connection = psycopg2.connect(f"postgresql://{postgres}/{database}")
        cursor = connection.cursor()
        cursor.execute(query)
        number = int(cursor.fetchone()[0])
        connection.close()
        return number

    up.wait_for("the end of the run", lambda: count("prefect", "SELECT count(*) FROM flow_run WHERE state_type = 'COMPLETED'"))
    assert count("mlflow", "SELECT count(*) FROM registered_model_aliases WHERE alias = 'champion' AND name = 'main'") == 1
    assert not list(desk.cache.glob("up/*/prefect/*.db")) and not (desk.root / "mlflow.db-wal").exists()
    shown = up.log.read_text() + " ".join(" ".join(process.cmdline()) for process in up.find_processes())
    assert PASSWORD not in shown
