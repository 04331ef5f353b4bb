"""Options that mean something only in the company of others: told where they are alone, never passed over."""

from __future__ import annotations

import typer

from holdfast.errors import ConfigError


def refuse(context: typer.Context, why: str, *parameters: str) -> None:
    """Refuse options that the user wrote, where they would have no effect.

    Args:
        why: what is said of them.
        parameters: the names of their parameters.

    Raises:
        ConfigError: one of them was written.
    """
    options = {parameter.name: parameter for parameter in context.command.params}
    for name in parameters:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            parameter = options[name]
            shown = parameter.opts[0] if parameter.param_type_name == "option" else name.upper()
            raise ConfigError(f"{shown}: {why}")
