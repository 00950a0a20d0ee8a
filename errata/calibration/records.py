"""What every record of a calibration is: frozen, and stored as canonical JSON."""

from typing import Self

from pydantic import BaseModel, ConfigDict

from errata.edits import canonical_json


class Record(BaseModel):
    """Names and numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        return cls.model_validate_json(data)
