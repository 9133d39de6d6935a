"""Settings that come from a TOML file, the environment and flags, each overriding the one before."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict


class FileSettings(BaseSettings):
    """Base of the controller's and the worker's settings. Unknown keys are refused, wherever they come from."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    @classmethod
    def from_command_line(cls, arguments: Sequence[str], program: str) -> Self:
        """Reads the settings of a whole program; ``--config`` or ``<prefix>CONFIG`` names the file.

        Raises:
            OSError, tomllib.TOMLDecodeError, pydantic.ValidationError: as :meth:`load`.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--config", default=os.environ.get(f"{cls.model_config['env_prefix']}CONFIG"))
        file, _ = parser.parse_known_args(arguments)
        return cls.load(Path(file.config) if file.config else None, arguments, program)

    @classmethod
    def load(
        cls, file: Path | None = None, flags: Sequence[str] | None = None, program: str = "", **overrides: object
    ) -> Self:
        """Reads the settings; later sources win: defaults, ``file``, environment, ``flags``, ``overrides``.

        Args:
            file: TOML with one key per setting.
            flags: command-line arguments such as ``["--tick-ms", "50"]``; ``--help`` prints them all and exits.
            program: name of the program for ``--help``.
            overrides: single settings; those that are None count as not given.

        Raises:
            OSError, tomllib.TOMLDecodeError: the file cannot be read.
            pydantic.ValidationError: a key is unknown or a value not accepted; names both.
        """
        values = {} if file is None else tomllib.loads(file.read_text(encoding="utf-8"))

        class FromFile(PydanticBaseSettingsSource):
            def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
                return values.get(field_name), field_name, False

            def __call__(self) -> dict[str, Any]:
                return values

        class Loaded(cls):  # type: ignore[misc, valid-type]  # a subclass is how pydantic-settings takes one more source
            model_config = SettingsConfigDict(title=cls.__name__)

            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                return init_settings, env_settings, FromFile(settings_cls)

        Loaded.__name__, Loaded.__qualname__, Loaded.__doc__ = cls.__name__, cls.__qualname__, cls.__doc__
        given = {key: value for key, value in overrides.items() if value is not None}
        if flags is not None:
            given |= {"_cli_parse_args": list(flags), "_cli_prog_name": program or None, "_cli_kebab_case": True}
        loaded: Self = Loaded(**given)
        return loaded
