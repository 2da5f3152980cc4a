"""Names of timm's models."""
import difflib

from timm.models import is_model, list_models, split_model_name_tag

__all__ = ['check_model_name']


def check_model_name(name: str) -> None:
    """Checks that timm has a model of a name, with a tag or without.

    Raises:
        ValueError: If it has none; names that are close to it are told.
    """
    if is_model(name):
        return
    close = difflib.get_close_matches(split_model_name_tag(name)[0], list_models(), n=3)
    hint = f', did you mean {" or ".join(close)}?' if close else ''
    raise ValueError(f"timm has no model '{name}'{hint}")
