"""The mistakes of users, which are answered in one line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's, which a program ends with. The message is one line: what was given, what would do.

    A plain ValueError is none: it may come from a function or an environment of the user's own, and where it was raised
    is then what the user needs to know.
    """


class ConfigError(UserError):
    """A mistake in a config file or on the command line."""
