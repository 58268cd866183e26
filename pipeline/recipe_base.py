"""What recipe sections are made of: strict sections and checked numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_truth_value(value: Any) -> Any:
    """Refuses yes/no/true/false, which would otherwise count as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


Number = Annotated[float, BeforeValidator(_no_truth_value), Field(allow_inf_nan=False)]
Integer = Annotated[int, BeforeValidator(_no_truth_value)]
Fraction = Annotated[Number, Field(gt=0.0, lt=1.0)]
Positive = Annotated[Number, Field(gt=0.0)]
NonNegative = Annotated[Number, Field(ge=0.0)]
Count = Annotated[Integer, Field(ge=1)]
TrainerArguments = dict[str, Any]
"""Settings of a library trainer under exactly their transformers/TRL names; checked by `pipeline.trl_args`."""


class Section(BaseModel):
    """A recipe section: unknown keys are refused, values are immutable once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
