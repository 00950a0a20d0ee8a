"""Where the flows are that a worker loads."""

from pathlib import Path

from errata.errors import InputError


def find_checkout() -> Path:
    """The folder with `prefect.yaml` and `flows/`.

    Raises:
        InputError: this installation is not one.
    """
    folder = Path(__file__).parents[1]
    if not (folder / "prefect.yaml").is_file():
        raise InputError(f"deployments: expected prefect.yaml in {folder}, found none; install Errata from its checkout (`make install`)")
    return folder
