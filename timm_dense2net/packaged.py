"""Weights inside the package: half-precision safetensors under `weights/`, each with its SHA-256 in `SHA256SUMS`."""
from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from timm.models import PretrainedCfg, list_models

from .files import sha256_of

__all__ = [
    'BEST_PACKAGED', 'packaged_file', 'is_packaged', 'is_packaged_file', 'check_pretrained', 'check_packaged',
    'read_sums']

# Used where no weights are named: those of the highest top-1.
BEST_PACKAGED = 'dense2net121_s8.sprint_c100'

WEIGHTS_DIR = Path(__file__).parent / 'weights'
SUMS_FILE = WEIGHTS_DIR / 'SHA256SUMS'


def packaged_file(name: str) -> str:
    """Path of the packaged weights of ``ARCH.TAG``, for a pretrained cfg's ``file``."""
    return str(WEIGHTS_DIR / f'{name}.safetensors')


def is_packaged(name: str | Path) -> bool:
    """Whether there are packaged weights of that name, ``ARCH.TAG``."""
    return f'{name}.safetensors' in read_sums()


def is_packaged_file(file: str | Path | None) -> bool:
    """Whether a pretrained cfg's ``file`` is of packaged weights, all of which are for CIFAR-100."""
    return bool(file) and Path(file).parent == WEIGHTS_DIR


def check_pretrained(cfg: PretrainedCfg) -> None:
    """Checks that a pretrained cfg stands for weights, before a model is built for them.

    Raises:
        RuntimeError: If it has none, or its packaged weights are not those recorded.
    """
    if not (cfg.has_weights or cfg.state_dict):
        names = ', '.join(list_models(module='dense2net', pretrained=True, include_tags=True))
        raise RuntimeError(
            f'No pretrained weights exist for {cfg.architecture}; use pretrained=False for random weights, '
            f'pretrained_cfg_overlay=dict(file=...) for weights of your own, or one of: {names}')
    if cfg.file and cfg.source != 'local-dir':
        check_packaged(cfg.file)


def read_sums() -> dict[str, str]:
    """SHA-256 of each packaged file, by its name."""
    lines = SUMS_FILE.read_text(encoding='utf-8').splitlines() if SUMS_FILE.exists() else []
    return {name: digest for digest, name in (line.split('  ', 1) for line in lines)}


@lru_cache(maxsize=None)
def check_packaged(file: str) -> None:
    """Checks packaged weights against the SHA-256 recorded for them; other files are left to their owner.

    Raises:
        RuntimeError: If the file is not there, or is not the one recorded.
    """
    if not is_packaged_file(file):
        return
    path = Path(file)
    if not path.is_file():
        raise RuntimeError(f'packaged weights {path.name} are not there: install timm_dense2net again')
    digest = sha256_of(path)
    if digest != read_sums().get(path.name):
        raise RuntimeError(
            f'packaged weights {path.name} are damaged: their SHA-256 is {digest}, and {SUMS_FILE.name} has '
            f'{read_sums().get(path.name, "none")}; install timm_dense2net again')
