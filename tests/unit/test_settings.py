"""Settings: file, environment and overrides, and what is said about a key that nothing has."""

import os
from pathlib import Path

import pytest

from errata.errors import SettingsError
from errata.settings import SETTINGS_FILE, load_settings, spell_environment


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for variable in list(os.environ):
        if variable.upper().startswith("ERRATA_"):
            monkeypatch.delenv(variable)
    return tmp_path


def test_environment_overrides_file_and_argument_overrides_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / SETTINGS_FILE).write_text('root = "here"\nstream = "file"\n[gate]\nmin_efficacy = 0.25\nn_min = 7\n')
    monkeypatch.setenv("ERRATA_GATE__MIN_EFFICACY", "0.75")
    monkeypatch.setenv("ERRATA_STREAM", "environment")
    settings = load_settings(stream="argument", device=None)
    assert (settings.root, settings.stream, settings.device) == ("here", "argument", "auto")
    assert (settings.gate.min_efficacy, settings.gate.n_min) == (0.75, 7)


def test_a_section_in_part_keeps_the_other_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    default = load_settings().gate
    monkeypatch.setenv("ERRATA_GATE__N_MIN", str(default.n_min + 1))
    assert load_settings().gate == default.model_copy(update={"n_min": default.n_min + 1})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('rot = "x"', f"{SETTINGS_FILE}: rot: unknown setting 'rot'; did you mean 'root'?"),
        (
            "[gate]\nmin_eficacy = 0.5",
            f"{SETTINGS_FILE}: gate.min_eficacy: unknown setting 'gate.min_eficacy'; did you mean 'gate.min_efficacy'?",
        ),
        ("[gate]\nmin_efficacy = 2", f"{SETTINGS_FILE}: gate.min_efficacy: expected a value less than or equal to 1, found 2"),
        ("[gate]\nn_min = 1.5", f"{SETTINGS_FILE}: gate.n_min: expected a whole number, found 1.5"),
        ("gate = 3", f"{SETTINGS_FILE}: gate: expected an object, found 3"),
        ('stream = "A B"', "stream: expected text that matches"),
        ("[gate", f"{SETTINGS_FILE}: expected TOML in UTF-8, found a fault"),
    ],
)
def test_file_faults_are_explained(folder: Path, text: str, said: str) -> None:
    (folder / SETTINGS_FILE).write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert said in str(caught.value)
    assert "pydantic" not in str(caught.value) and "further information" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ERRATA_STREM", "x", "unknown setting 'ERRATA_STREM'; did you mean 'ERRATA_STREAM'?"),
        ("errata_strem", "x", "did you mean 'ERRATA_STREAM'?"),
        ("ERRATA_GATE__MIN_EFICACY", "1", "did you mean 'ERRATA_GATE__MIN_EFFICACY'?"),
        ("ERRATA_ROOT__X", "1", "unknown setting 'ERRATA_ROOT__X'"),
        ("ERRATA_GATE", "{}", "one by one, such as ERRATA_GATE__"),
        ("ERRATA_QQQQQ", "1", "expected one of ERRATA_ACTOR"),
        ("ERRATA_GATE__MIN_EFFICACY", "high", "ERRATA_GATE__MIN_EFFICACY: expected a number, found 'high'"),
        ("ERRATA_THREADS", "0", "ERRATA_THREADS: expected a value greater than or equal to 1, found '0'"),
    ],
)
def test_variable_faults_name_the_variable(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert said in str(caught.value)
    assert "pydantic" not in str(caught.value) and "further information" not in str(caught.value)


def test_variables_of_the_tests_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERRATA_TEST_SHARED", "/somewhere")
    assert load_settings().root == ".errata"


def test_another_process_elsewhere_gets_the_same_settings(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (folder / SETTINGS_FILE).write_text('root = "here"\ncache = "beside"\nthreads = 3\n[gate]\nmin_efficacy = 0.25\n')
    settings = load_settings()
    spelled = spell_environment(settings)
    assert "ERRATA_MLFLOW__TRACKING_URI" not in spelled
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for name, value in spelled.items():
        monkeypatch.setenv(name, value)
    assert load_settings() == settings.model_copy(update={"root": str(folder / "here"), "cache": folder / "beside"})
    assert spell_environment(settings.model_copy(update={"root": "s3://bucket/prefix"}))["ERRATA_ROOT"] == "s3://bucket/prefix"


def test_files_and_lists_arrive_in_another_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / SETTINGS_FILE).write_text(
        '[memory]\npool = "pool.jsonl"\n[watch]\nability_set = "asked.jsonl"\n[distill]\ntargets = ["q_proj", "v_proj"]\nlr = 1e-3\n'
    )
    spelled = spell_environment(load_settings())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for name, value in spelled.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert (settings.memory.pool, settings.watch.ability_set) == (folder / "pool.jsonl", folder / "asked.jsonl")
    assert (settings.distill.targets, settings.distill.lr) == (("q_proj", "v_proj"), 1e-3)
