"""An edited base as an ordinary Hugging Face folder, for servers that know nothing of Errata."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from errata.errors import InputError, ModelError, StorageError
from errata.modeling.loading import Base
from errata.modeling.offload import list_parameters, read_parameter
from errata.modeling.patch import Attachable, attach

NOTE_FILE = "errata.json"
"""Says what the folder is."""


def export_folder(base: Base, artifacts: Sequence[Attachable], target: Path, note: Mapping[str, Any]) -> Path:
    """Write base plus artifacts as one model with merged weights, its tokenizer, and `errata.json`. dtype and tied embeddings are the
    base's. The folder is made beside its place, read back and compared, and then renamed: it is there whole or not at all.

    Args:
        target: a folder that does not exist, or is empty.

    Raises:
        InputError: something is there already, or an artifact is more than a change of weights.
        StorageError: the place cannot be written.
        ModelError: what was written is not what is in memory.
    """
    check_target(target)
    if any(not artifact.deltas for artifact in artifacts):
        raise InputError(
            "export: expected edits that are written into weights, found neurons or a memory, which no plain model folder can hold: "
            "`errata export --pyfunc` writes a folder that `mlflow.pyfunc.load_model` loads anywhere"
        )
    place = target.absolute()
    draft = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        with attach(base, artifacts):
            base.model.save_pretrained(draft)
            base.tokenizer.save_pretrained(draft)
            _compare(base, draft)
        (draft / NOTE_FILE).write_text(json.dumps(dict(note), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        draft.chmod(0o755)  # mkdtemp's folders are private
        check_target(target)
        draft.rename(place)
    except OSError as error:
        raise StorageError(f"export: expected to write {place}: {error.strerror or error}") from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
    return place


def check_target(target: Path) -> None:
    """Raises InputError: `target` holds something, or is no folder."""
    if target.is_dir():
        if any(target.iterdir()):
            raise InputError(f"export: expected a new or empty folder, found {target} with something in it")
    elif target.exists() or target.is_symlink():
        raise InputError(f"export: expected a new or empty folder, found the file {target}")


def _compare(base: Base, folder: Path) -> None:
    """Every parameter of the model, read back tensor by tensor. Tied ones are stored under one of their names, and some families store a
    weight under a name of old (GPT-NeoX's head is `embed_out`)."""
    wanted: dict[str, torch.Tensor] = base.model.state_dict()
    stored: set[int | str] = set()
    renamed: list[torch.Tensor] = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  safe_open is no mapping
                    if name not in wanted:
                        renamed.append(file.get_tensor(name))
                        continue
                    if not torch.equal(file.get_tensor(name), _read(base, name, wanted[name])):
                        raise ModelError(f"export: expected {name} in {path.name} as it is in memory, found it otherwise")
                    stored.add(_identify(name, wanted[name]))
        except SafetensorError as error:
            raise ModelError(f"export: expected {path} to be safetensors ({error})") from error
    missing = [
        name
        for name, weight in ((name, base.model.get_parameter(name)) for name in list_parameters(base.model))
        if _identify(name, weight) not in stored and not any(torch.equal(tensor, _read(base, name, weight)) for tensor in renamed)
    ]
    if missing:
        raise ModelError(f"export: expected every weight in {folder}, found none of {', '.join(missing[:3])}")


def _read(base: Base, name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu() if tensor.device.type != "meta" else read_parameter(base.model, name)


def _identify(name: str, tensor: torch.Tensor) -> int | str:
    """Where it lies, so that tied tensors are one; one that is offloaded lies nowhere, and is known by its name."""
    return tensor.data_ptr() if tensor.device.type != "meta" else name
