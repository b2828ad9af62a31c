"""What clients send within a body: SDKs send whole answers back, so unknown fields are ignored."""

from pydantic import BaseModel, ConfigDict


class Lenient(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, use_attribute_docstrings=True
    )
