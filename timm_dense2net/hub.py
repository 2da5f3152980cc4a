"""What the Hugging Face Hub's client raises, said in one line, and the check of downloaded weights."""
from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError, HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled,
)
from safetensors import SafetensorError
from timm.models import parse_model_name

from .errors import one_line
from .files import sha256_of

__all__ = ['HUB_ERRORS', 'LOAD_ERRORS', 'WEIGHTS_FILE', 'DIGEST_KEY', 'explain_hub_error', 'check_weights']

# All that the client raises for a fault of network, Hub or request, whichever HTTP library it is built on.
HUB_ERRORS = (HTTPError, OSError, RuntimeError, ValueError)
# And what timm does for a name, configuration or file that is none of its own.
LOAD_ERRORS = (*HUB_ERRORS, AssertionError, KeyError, TypeError, SafetensorError)

WEIGHTS_FILE = 'model.safetensors'
# Where config.json records the digest of the weights beside it.
DIGEST_KEY = 'weights_sha256'


def explain_hub_error(error: BaseException, repo_id: str) -> str:
    """One line that says what went wrong with a repository and what to do."""
    chain = []
    cause = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    host = constants.ENDPOINT
    if any(isinstance(item, OfflineModeIsEnabled) for item in chain):
        return f'{repo_id} is not in the cache and offline mode is on (HF_HUB_OFFLINE): go online once to fetch it'
    for item in chain:
        if isinstance(item, HfHubHTTPError) and item.response is not None:
            return _explain_status(item, repo_id, host)
    if any(isinstance(item, (HTTPError, LocalEntryNotFoundError, ConnectionError)) for item in chain):
        return f'{repo_id}: the connection to {host} failed ({one_line(chain[-1]) or type(chain[-1]).__name__})'
    if not isinstance(error, HUB_ERRORS):
        return f'{repo_id}: timm cannot load it ({type(error).__name__}: {one_line(error)})'
    return f'{repo_id}: {one_line(error)}'


def _explain_status(error: HfHubHTTPError, repo_id: str, host: str) -> str:
    status = error.response.status_code
    if status == 401:
        return (
            f'{repo_id}: {host} does not know the token, or there is no such repository (401); '
            'check the name, run `hf auth login` or set HF_TOKEN')
    if status == 403:
        return f'{repo_id}: the token does not allow this (403); use one with write access to the repository'
    if status == 404:
        what = 'file' if isinstance(error, EntryNotFoundError) else 'repository or revision'
        return f'{repo_id}: no such {what} on {host} (404)'
    if status == 429:
        return f'{repo_id}: {host} refuses more requests for now (429); wait some minutes and try again'
    if status >= 500:
        return f'{repo_id}: {host} is at fault ({status}); try again later'
    return f'{repo_id}: {host} answered {status}: {one_line(error)}'


def check_weights(model_name: str) -> None:
    """Compares the weights of a `hf-hub:` or `local-dir:` model with the digest that its config.json records.

    The Hub's client compares sizes only. A cached file that is not what was published is deleted, so that the next
    use fetches it anew. Models whose configuration records no digest are not checked.

    Raises:
        ValueError: If the digests differ.
    """
    source, model_id = parse_model_name(model_name)
    if source is None:
        return
    folder = Path(model_id)
    if source == 'hf-hub':
        repo_id, _, revision = model_id.partition('@')
        folder = Path(hf_hub_download(repo_id, 'config.json', revision=revision or None)).parent
    expected = json.loads((folder / 'config.json').read_text(encoding='utf-8')).get(DIGEST_KEY)
    weights = folder / WEIGHTS_FILE
    if expected is None or not weights.is_file() or sha256_of(weights) == expected:
        return
    if source == 'hf-hub':
        weights.resolve().unlink()
        weights.unlink(missing_ok=True)
    raise ValueError(
        f'{model_name}: {WEIGHTS_FILE} is not what was published (its SHA-256 is not {expected})'
        + ('; the cached copy was deleted, try again' if source == 'hf-hub' else ''))
