"""Names of models, layers, options and files, as they are asked for and told."""
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from timm.models import is_model, list_models, parse_model_name, split_model_name_tag

__all__ = ['check_model_name', 'check_model_or_source', 'did_you_mean', 'is_utf8', 'layer_names', 'option']


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """End of a message on an unknown name: those that are close to it, if any."""
    close = difflib.get_close_matches(name, names, n=3)
    return f', did you mean {" or ".join(close)}?' if close else ''


def is_utf8(name: str) -> bool:
    """Whether a name can be written to a file in UTF-8, as one of a file or folder, which may be any bytes, may not."""
    try:
        name.encode('utf-8')
    except UnicodeEncodeError:
        return False
    return True


def option(name: str) -> str:
    """An argument's name as it stands on the command line."""
    return f'--{name.replace("_", "-")}'


def layer_names(cfg: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Layers that a pretrained cfg names, as `classifier` or `first_conv`: none, one or several."""
    names = cfg.get(key) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def check_model_name(name: str) -> None:
    """Checks that timm has a model of a name, with a tag or without.

    Raises:
        ValueError: If it has none; names that are close to it are told.
    """
    if not is_model(name):
        raise ValueError(f"timm has no model '{name}'{did_you_mean(split_model_name_tag(name)[0], list_models())}")


def check_model_or_source(name: str) -> None:
    """As `check_model_name`, of a name that may also be a model's on the Hub (`hf-hub:`) or in a folder (`local-dir:`).

    Raises:
        ValueError: Also if timm has no such source.
    """
    if parse_model_name(name)[0] is None:
        check_model_name(name)
