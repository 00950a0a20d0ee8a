"""A profile's bytes are its name: what was added to profiles later must not rename older ones."""

import json

import pytest
from pydantic import ValidationError

from errata.profiles import PrepareOptions, Profile, SolveOptions

PROFILE = Profile(base="b", prepare=PrepareOptions(layers=(1,)), solve=SolveOptions(lam=1.0, spread="single", moments="m"))


def test_a_norm_ratio_is_spelled_only_where_there_is_one() -> None:
    assert json.loads(PROFILE.to_bytes()).keys() == {"format", "base", "prepare", "solve", "origin"}
    bearing = PROFILE.model_copy(update={"max_norm_ratio": 3.0})
    assert json.loads(bearing.to_bytes())["max_norm_ratio"] == 3.0
    assert Profile.model_validate_json(bearing.to_bytes()) == bearing
    assert Profile.model_validate_json(PROFILE.to_bytes()) == PROFILE
    with pytest.raises(ValidationError, match="max_norm_ratio"):
        Profile.model_validate({**json.loads(PROFILE.to_bytes()), "max_norm_ratio": 0.5})


def test_frozen_keys_are_not_spelled() -> None:
    assert "keys" not in json.loads(PROFILE.to_bytes())["prepare"]
    assert PROFILE.prepare.digest == "717d28f831fe4ff57a0745b52ed0fa4831b3e809f983ed045543c0c42e55e098"
    cascading = PrepareOptions(layers=(1,), keys="cascade")
    assert PrepareOptions.model_validate_json(cascading.model_dump_json()) == cascading
    assert cascading.digest != PROFILE.prepare.digest
    assert PrepareOptions.model_validate(cascading.model_dump() | {"keys": "frozen"}).digest == PROFILE.prepare.digest
