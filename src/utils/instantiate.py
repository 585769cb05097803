"""From configs to objects by Hydra, with errors that name the option."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from scatterbrain.errors import UserError
from src.utils.text import first_line


def escape_interpolations(content: Any) -> Any:
    """The content with each `${` in its strings escaped, so that OmegaConf reads the strings as they are.

    Args:
        content: a string, or nested dicts and lists that are resolved already.
    """
    if isinstance(content, dict):
        return {key: escape_interpolations(value) for key, value in content.items()}
    if isinstance(content, list):
        return [escape_interpolations(value) for value in content]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", content) if isinstance(content, str) else content


def _instantiate(config: DictConfig, **options: Any) -> Any:
    """`hydra.utils.instantiate`, which resolves values twice, on a config whose values are resolved once."""
    content = OmegaConf.to_container(config, resolve=True)
    return hydra.utils.instantiate(escape_interpolations(escape_interpolations(content)), **options)


def build(config: DictConfig, group: str, **objects: Any) -> Any:
    """Instantiate `config`, which has a `_target_`.

    Args:
        config: the group's config.
        group: its name, for the message.
        **objects: arguments that no config holds.

    Raises:
        UserError: the object refuses its arguments; the message is its own.
    """
    try:
        return _instantiate(config, **objects)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, UserError):
            raise cause from error
        reason = str(cause).strip().rstrip(".!")
        if isinstance(cause, ModuleNotFoundError):
            reason = first_line(cause)  # the other lines of Lightning's loggers list alternatives
            raise UserError(f"{group} needs a package that is not installed: {reason}. Or choose another.") from error
        raise UserError(f"{group} cannot be built: {reason}. Check the options under '{group}'.") from error


def build_later(config: DictConfig, group: str, **changes: Any) -> Callable[..., Any]:
    """The function of a config's `_target_` with its options, for objects that come later, such as a model.

    Args:
        config: the group's config.
        group: its name, for the message.
        **changes: options in place of the config's.

    Raises:
        UserError: from the function, where it refuses its arguments.
    """
    # the objects it is applied to must not pass through the instantiation, which copies
    partial = _instantiate(config, _partial_=True, **changes)

    @functools.wraps(partial.func)
    def make(*arguments: Any, **options: Any) -> Any:
        try:
            return partial(*arguments, **options)
        except (AssertionError, TypeError, ValueError, ZeroDivisionError) as error:
            reason = str(error).strip().rstrip(".!") or type(error).__name__
            raise UserError(f"{group} cannot be built: {reason}. Check the options under '{group}'.") from error

    return make


def build_group(config: DictConfig | None, group: str) -> list[Any]:
    """Instantiate every entry of a group such as `callbacks` or `logger`; None is an empty group."""
    entries = config.items() if config is not None else ()
    return [build(entry, f"{group}.{name}") for name, entry in entries if entry is not None]
