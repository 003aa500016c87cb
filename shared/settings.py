"""Settings from environment variables, where a wrong value is a message that names the variable."""

from __future__ import annotations

from typing import TypeVar

from pydantic import ValidationError
from pydantic_settings import BaseSettings

from shared.errors import UserError

Settings = TypeVar("Settings", bound=BaseSettings)


def from_environment(kind: type[Settings]) -> Settings:
    """The settings as the environment has them. Raises UserError naming each variable that cannot be used."""
    try:
        return kind()
    except ValidationError as error:
        prefix = kind.model_config.get("env_prefix", "")
        wrong = [
            f"{prefix}{'_'.join(map(str, one['loc'])).upper()} is {one['input']!r}: {one['msg']}"
            for one in error.errors()
        ]
        raise UserError(f"{'; '.join(wrong)}.", "Correct it or leave it out.", "invalid_setting") from error
