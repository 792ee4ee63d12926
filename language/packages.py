"""The package that language models come from, imported where it is used."""

from __future__ import annotations

from typing import Any

from system.errors import UserError


def import_transformers() -> Any:
    """Hugging Face's transformers, without its progress bars and remarks.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(f'language models need transformers ({error}): pip install -e ".[lm]"') from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
