"""torch.hub entry points: ``torch.hub.load(REPO, 'dense2net121_s8')``; ``torch.hub.list(REPO)`` names the Dense2Nets."""
from importlib.util import find_spec as _find_spec

dependencies = ['torch', 'torchvision', 'timm', 'safetensors', 'huggingface_hub']


def _entrypoints():
    # torch.hub looks at `dependencies` only after this module has been imported, and never when it lists.
    missing = [name for name in dependencies if _find_spec(name) is None]
    if missing:
        raise RuntimeError(f'missing packages: {", ".join(missing)}; install them: pip install {" ".join(missing)}')
    from timm import list_models, model_entrypoint
    import timm_dense2net  # noqa: F401

    return {name: model_entrypoint(name) for name in list_models(module='dense2net')}


globals().update(_entrypoints())
