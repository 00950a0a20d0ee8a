"""What streams share is stored once, seen only whole, and checked when it is fetched."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from errata.edits import digest_of
from errata.errors import FormatError, InputError, KeyMissingError, ObjectCorruptError
from errata.modeling.loading import Base, load_base
from registry.shared import BaseRef, fetch_base, get_base, get_moments, get_profile, put_base, put_moments, put_profile
from registry.storage.base import Storage
from registry.storage.local import LocalStorage
from registry.storage.memory import MemoryStorage


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    yield LocalStorage(tmp_path / "root") if request.param == "local" else MemoryStorage()


def refer(base: Base) -> BaseRef:
    return BaseRef(kind="folder", source="somewhere", digest=base.digest)


def test_base_is_fetched_as_it_was_put(storage: Storage, base: Base, model_folder: Path, tmp_path: Path) -> None:
    ref = put_base(storage, refer(base), model_folder)
    assert get_base(storage, base.digest) == ref
    assert ref.files == {path.name: digest_of(path.read_bytes()) for path in model_folder.iterdir()}
    folder = fetch_base(storage, base.digest, tmp_path / "cache")
    assert load_base(folder, device="cpu", expect=base.digest).digest == base.digest
    assert fetch_base(storage, base.digest, tmp_path / "cache") == folder


def test_local_base_is_not_copied_into_the_cache(base: Base, model_folder: Path, tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "root")
    put_base(storage, refer(base), model_folder)
    assert fetch_base(storage, base.digest, tmp_path / "cache") == tmp_path / "root" / "shared" / "bases" / base.digest
    assert not (tmp_path / "cache").exists()


def test_only_what_a_base_is_loaded_from_is_copied(storage: Storage, base: Base, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"the same weights again")
    (folder / ".gitattributes").write_text("")
    assert set(put_base(storage, refer(base), folder).files) == {path.name for path in model_folder.iterdir()}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("calls", range(6))
def test_half_a_copy_is_never_seen_and_is_completed(calls: int, base: Base, model_folder: Path, tmp_path: Path) -> None:
    """The copy dies after so many creations; the last one is the record's."""
    storage = MemoryStorage()
    left = iter(range(calls))

    class Dying:
        url, exists, read, delete = storage.url, storage.exists, storage.read, storage.delete
        list, list_folders = storage.list, storage.list_folders

        def create(self, key: str, data: bytes) -> None:
            if next(left, None) is None:
                raise Killed
            storage.create(key, data)

    total = len(list(model_folder.iterdir())) + 1
    assert total == 6
    with pytest.raises(Killed):
        put_base(Dying(), refer(base), model_folder)
    with pytest.raises(KeyMissingError):
        fetch_base(storage, base.digest, tmp_path / "cache")
    put_base(storage, refer(base), model_folder)
    assert load_base(fetch_base(storage, base.digest, tmp_path / "cache"), device="cpu").digest == base.digest


def test_leftover_of_other_bytes_is_replaced(storage: Storage, base: Base, model_folder: Path, tmp_path: Path) -> None:
    storage.create(f"shared/bases/{base.digest}/config.json", b"{}")
    put_base(storage, refer(base), model_folder)
    assert load_base(fetch_base(storage, base.digest, tmp_path / "cache"), device="cpu").digest == base.digest


def test_damaged_download_leaves_nothing_in_the_cache(base: Base, model_folder: Path, tmp_path: Path) -> None:
    storage = MemoryStorage()
    put_base(storage, refer(base), model_folder)
    key = f"shared/bases/{base.digest}/model.safetensors"
    storage.delete(key)
    storage.create(key, b"damaged")
    with pytest.raises(ObjectCorruptError, match="model.safetensors: expected bytes with sha256"):
        fetch_base(storage, base.digest, tmp_path / "cache")
    assert list((tmp_path / "cache" / "bases").iterdir()) == []


def test_hub_base_is_a_record_only(storage: Storage, tmp_path: Path) -> None:
    ref = BaseRef(kind="hub", source="some/model", revision="c0ffee", digest="a" * 64)
    assert put_base(storage, ref) == get_base(storage, ref.digest) == ref
    assert [entry.key for entry in storage.list("shared/")] == [f"shared/bases/{ref.digest}.json"]
    with pytest.raises(InputError, match="expected one with files, found the hub model 'some/model' at revision c0ffee"):
        fetch_base(storage, ref.digest, tmp_path)


def test_hub_base_needs_a_pinned_revision() -> None:
    with pytest.raises(ValueError, match="expected the pinned commit of the hub model 'some/model', found none"):
        BaseRef(kind="hub", source="some/model", digest="a" * 64)


def test_folder_without_a_model_is_refused(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"expected config.json and \*.safetensors, found neither"):
        put_base(storage, BaseRef(kind="folder", source="x", digest="a" * 64), tmp_path)


def test_record_of_a_newer_format_is_refused(storage: Storage) -> None:
    storage.create("shared/bases/abc.json", b'{"format":2,"kind":"folder","source":"x","digest":"abc"}')
    with pytest.raises(FormatError, match="expected a base of format 1, found a mismatch at format"):
        get_base(storage, "abc")


def test_moments_and_profiles_are_verified(storage: Storage) -> None:
    moments = put_moments(storage, b"moments")
    profile = put_profile(storage, "b" * 64, b'{"format":1}')
    assert put_profile(storage, "b" * 64, b'{"format":1}') == profile
    assert (get_moments(storage, moments), get_profile(storage, "b" * 64, profile)) == (b"moments", b'{"format":1}')
    for key in (f"shared/moments/{moments}", f"shared/profiles/{'b' * 64}/{profile}.json"):
        storage.delete(key)
        storage.create(key, b"damaged")
    with pytest.raises(ObjectCorruptError):
        get_moments(storage, moments)
    with pytest.raises(ObjectCorruptError):
        get_profile(storage, "b" * 64, profile)
