"""A wrong environment variable is named."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import UserError
from shared.settings import from_environment


class Dials(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="EDITX_DIALS_")

    dtype: Literal["float32", "float16"] = "float32"
    slots: int = Field(default=1, ge=1)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITX_DIALS_SLOTS", "3")
    assert from_environment(Dials) == Dials(slots=3)


def test_every_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITX_DIALS_DTYPE", "int4")
    monkeypatch.setenv("EDITX_DIALS_SLOTS", "0")
    with pytest.raises(UserError) as caught:
        from_environment(Dials)
    assert caught.value.code == "invalid_setting"
    assert "EDITX_DIALS_DTYPE is 'int4': Input should be 'float32' or 'float16'" in caught.value.message
    assert "EDITX_DIALS_SLOTS is '0'" in caught.value.message
