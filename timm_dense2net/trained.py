"""A trained model and what it needs to be used: its classes' names and how its input is prepared."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.data import resolve_input_data_config
from timm.models import get_arch_name

from .checkpoint import check_finite, load_weights
from .convert import conversion_in, reapply_conversion
from .data import load_images
from .errors import one_line
from .hub import LOAD_ERRORS, check_weights, explain_hub_error
from .images import PREPROCESSING, Images
from .meta import check_input
from .names import check_model_name, check_model_or_source, layer_names

__all__ = [
    'TrainedModel', 'load_trained', 'load_pretrained_model', 'load_checkpoint_model', 'load_test_split', 'check_fits',
    'weights_file', 'weights_shape', 'weights_config']


@dataclass(frozen=True)
class TrainedModel:
    """A model with weights, in evaluation mode.

    Args:
        name: What it was asked for by: a model name or a file.
        model: The model, on the CPU.
        data_config: timm's `resolve_input_data_config`'s: input_size, mean, std, interpolation, crop_pct, crop_mode.
        class_names: One name a class; None where they are not known.
        metadata: Text that the weights' file carries; empty for pretrained weights.
    """
    name: str
    model: nn.Module
    data_config: dict[str, Any]
    class_names: tuple[str, ...] | None
    metadata: Mapping[str, str]

    @property
    def conversion(self) -> Mapping[str, Any] | None:
        """What `convert.convert_res2net` recorded of it; None where it is as timm makes it."""
        return getattr(self.model, 'res2net_conversion', None)

    def class_name(self, index: int) -> str:
        """Name of a class, by its number where names are not known."""
        return self.class_names[index] if self.class_names else f'class {index}'


def load_trained(
        model: str | None = None,
        checkpoint: str | Path | None = None,
        model_kwargs: dict[str, Any] | None = None,
) -> TrainedModel:
    """Loads a model by name with its pretrained weights, or from a file of weights.

    Args:
        model: timm model name, `hf-hub:` or `local-dir:` name; with `checkpoint` only needed where the file does not
            say which model it is of.
        checkpoint: Run folder (the weights that it tested), safetensors file or checkpoint of timm's train.py.
        model_kwargs: Further arguments of the model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If there is no such model, it has no weights, or the weights do not fit.
    """
    if checkpoint is not None:
        return load_checkpoint_model(checkpoint, model, model_kwargs)
    if model is None:
        raise ValueError('name a model or a checkpoint')
    return load_pretrained_model(model, model_kwargs)


def load_pretrained_model(name: str, model_kwargs: dict[str, Any] | None = None) -> TrainedModel:
    """Loads a model with the weights its name stands for.

    Raises:
        ValueError: If there is no such model or no weights for it, or these are not finite.
    """
    check_model_or_source(name)
    try:
        try:
            model = timm.create_model(name, pretrained=True, **model_kwargs or {}).eval()
        except SafetensorError:
            check_weights(name)  # names what is torn, and drops it from the cache
            raise
        check_weights(name)
    except LOAD_ERRORS as e:
        raise ValueError(explain_hub_error(e, name.removeprefix('hf-hub:'))) from e
    check_finite(model.state_dict(), name)
    cfg = model.pretrained_cfg
    class_names = cfg.get('label_names')
    if isinstance(class_names, Mapping):  # from class indices, as texts in JSON
        class_names = [class_names[index] for index in sorted(class_names, key=int)]
    return TrainedModel(name, model, resolve_input_data_config(model), _names(class_names, model.num_classes), {})


def load_checkpoint_model(
        path: str | Path,
        name: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
) -> TrainedModel:
    """Builds the model that a file of weights is of, and loads them.

    Args:
        path: Run folder (the weights that it tested), safetensors file or checkpoint of timm's train.py.
        name: timm model name, where the file does not say it.
        model_kwargs: Further arguments of the model.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no weights, or the model is not known or does not fit.
    """
    path = weights_file(path)
    weights, metadata = load_weights(path)
    held = metadata.get('model')
    name = name or held
    if name is None:
        raise ValueError(f'{path} does not say which model it is of: name it with --model')
    try:
        model = _create_for(name, weights, metadata, model_kwargs or {})
        conversion = conversion_in(metadata)
        if conversion is not None:
            reapply_conversion(model, conversion)
        model.load_state_dict(weights)
        class_names = _names(json.loads(metadata.get('class_names', 'null')), model.num_classes)
    except (AssertionError, RuntimeError, TypeError) as e:
        why = one_line(e) if held is None or get_arch_name(held) == get_arch_name(name) else f'it is of {held}'
        raise ValueError(f'{path} does not fit {name}: {why}') from e
    data_config = resolve_input_data_config(model, weights_config(metadata))
    return TrainedModel(str(path), model.eval(), data_config, class_names, metadata)


def _create_for(
        name: str,
        weights: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
        model_kwargs: dict[str, Any],
) -> nn.Module:
    """Creates a model with as many classes and input channels as the weights have."""
    check_model_name(name)
    config = timm.get_pretrained_cfg(name)
    shape = weights_shape(config.to_dict(), weights, metadata) if config else {}
    if metadata.get('num_classes') == '0':  # there is no classifier to show it
        shape['num_classes'] = 0
    return timm.create_model(name, **json.loads(metadata.get('model_args', '{}')) | model_kwargs | shape)


def _check_classes(trained: TrainedModel, images: Images) -> None:
    """By their number and, where both have names, by these."""
    if trained.model.num_classes != images.num_classes:
        raise ValueError(f'{trained.name} has {trained.model.num_classes} classes, the data {images.num_classes}')
    nameless = tuple(str(index) for index in range(images.num_classes))
    if trained.class_names is None or images.class_names == nameless:
        return
    for index, names in enumerate(zip(trained.class_names, images.class_names)):
        if names[0] != names[1]:
            raise ValueError(f"class {index} is '{names[0]}' of {trained.name} and '{names[1]}' of the data")


def check_fits(trained: TrainedModel, images: Images) -> None:
    """Checks that images are of a model's classes, and of a shape that it takes.

    Raises:
        ValueError: If they are not.
    """
    _check_classes(trained, images)
    check_input(trained.model, trained.name, images.image_shape)


def load_test_split(
        trained: TrainedModel,
        dataset: str,
        *,
        img_size: int | None = None,
        **kwargs,
) -> Images:
    """The test split of a data set, its images resized and cropped as the model's weights ask for.

    Args:
        trained: The model.
        dataset: As for `data.load_images`.
        img_size: Side of the images; the model's own if it has one for all sides.
        **kwargs: Further arguments of `data.load_images`.

    Raises:
        FileNotFoundError: If the data set is not there.
        ValueError: If it is damaged.
    """
    config = trained.data_config
    _, height, width = config['input_size']
    if img_size is None and height == width:
        img_size = height
    preprocessing = {key: config[key] for key in PREPROCESSING}
    return load_images(dataset, 'test', img_size=img_size, **preprocessing, **kwargs)


def weights_file(path: str | Path) -> Path:
    """The file that a path to weights means: the weights that a run folder's figures are of, else the path itself.

    Those are the run's last, or with `--hold-out` its best; before the run has figures, its last so far.

    Raises:
        ValueError: If the run's figures cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    result = path / 'result.json'
    try:
        tested = json.loads(result.read_text(encoding='utf-8')).get('tested', 'last') if result.is_file() else 'last'
    except (AttributeError, ValueError) as e:
        raise ValueError(f'{result} cannot be read: {one_line(e)}') from None
    return path / f'{tested}.safetensors'


def weights_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """How input for weights is prepared, as far as their metadata says it, by the names of a pretrained cfg."""
    config = {key: json.loads(metadata[key]) for key in ('input_size', 'mean', 'std', 'crop_pct') if key in metadata}
    return config | {key: metadata[key] for key in ('interpolation', 'crop_mode') if key in metadata}


def weights_shape(
        cfg: Mapping[str, Any],
        weights: Mapping[str, torch.Tensor],
        metadata: Mapping[str, str],
) -> dict[str, int]:
    """Number of classes and of input channels that weights are for, where they or their metadata show it.

    Args:
        cfg: Pretrained configuration of their model.
        weights: State dict.
        metadata: Of their file.
    """
    shape = {}
    for argument, layer, axis in (('num_classes', 'classifier', 0), ('in_chans', 'first_conv', 1)):
        # Some models have several classifiers, all for the same classes.
        for name in layer_names(cfg, layer):
            if f'{name}.weight' in weights:
                shape[argument] = weights[f'{name}.weight'].shape[axis]
    if 'input_size' in metadata:
        # The first layer of some models sees more channels than the images have: pixels side by side.
        shape['in_chans'] = json.loads(metadata['input_size'])[0]
    return shape


def _names(names: Sequence[str] | None, num_classes: int) -> tuple[str, ...] | None:
    return tuple(names) if names is not None and len(names) == num_classes else None

