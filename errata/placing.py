"""Files and folders that are there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """A file, in a folder that is there."""
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(draft).replace(path)
    finally:
        Path(draft).unlink(missing_ok=True)


def provide_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """`folder`; where there is none, `write` fills another one, which then takes its name."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(draft)
        draft.chmod(0o755)  # mkdtemp's folders are private
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # neither was it the other process that finished first
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
