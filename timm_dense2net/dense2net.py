"""Dense2Net: the Res2Net hierarchy of small convolutions inside every DenseNet-BC layer.

Papers:
    * `Densely Connected Convolutional Networks` - https://arxiv.org/abs/1608.06993
    * `Res2Net: A New Multi-scale Backbone Architecture` - https://arxiv.org/abs/1904.01169
    * `Dense2Net: A Hybrid DenseNet/Res2Net Architecture`, N. Starliper and T. Songkakul (slides), which joins the two
"""
from collections import OrderedDict
from contextlib import nullcontext
from functools import lru_cache
from numbers import Integral
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerType,
    calculate_drop_path_rates,
    create_classifier,
    create_conv2d,
    get_device_dtype,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP

from .cifar import CIFAR100_CLASSES, CIFAR100_MEAN, CIFAR100_STD
from .fused import (
    FusedDenseBlock, FusedDenseTransition, FusedFeatures, FusedSplitHierarchyConv2d, is_fusable)
from .hooks import has_hooks, has_own_hooks, is_transformed
from .in_place import runs_by_parts
from .memory_pool import PoolOwner
from .named_layers import create_attn_layer, find_norm_act_layer
from .packaged import check_pretrained, is_packaged_file, packaged_file
from .parts import image_parts
from .training_form import block_has_training_form, block_in_training, has_training_form, transition_in_training

__all__ = ['Dense2Net', 'SplitHierarchyConv2d']


@torch.fx.wrap
def _check_input(x: torch.Tensor, min_size: int = 1, channels: Optional[int] = None) -> None:
    # A leaf for fx: shapes of a traced tensor have no truth value. torch.export gets its bounds from the caller, and
    # torch.jit.trace warns of each comparison.
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return
    if x.ndim != 4:
        raise ValueError(f'expected input of shape (N, C, H, W), got {list(x.shape)}')
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f'expected input of shape (N, {channels}, H, W), got {list(x.shape)}')
    if min(x.shape[2], x.shape[3]) < min_size:
        raise ValueError(
            f'input of {x.shape[2]}x{x.shape[3]} is too small for the strides of this network: '
            f'at least {min_size}x{min_size} is needed')


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, Integral):
            raise ValueError(f'{name} must be an integer, got {value!r}')
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}')


def _check_block_config(block_config: Any) -> None:
    if not isinstance(block_config, Iterable) or not all(isinstance(count, Integral) for count in block_config):
        raise ValueError(f'block_config must be a list of the number of layers in each block, got {block_config!r}')
    if not len(block_config) or min(block_config) < 1:
        raise ValueError(f'block_config must name at least one layer a block, got {tuple(block_config)}')


def _check_rates(**values: float) -> None:
    for name, value in values.items():
        if not 0. <= value < 1.:
            raise ValueError(f'{name} must be at least 0 and below 1, got {value}')


def _is_bare_conv(conv: nn.Module, kernel_size: int, dilation: int = 1, groups: Optional[int] = 1) -> bool:
    """Whether the layer is a convolution without bias that keeps the size of its input, padded with zeros."""
    if type(conv) is not nn.Conv2d or conv.bias is not None or conv.padding_mode != 'zeros':
        return False
    padding = dilation * (kernel_size - 1) // 2
    shape = tuple((value, value) for value in (kernel_size, 1, padding, dilation))
    return (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == shape and groups in (None, conv.groups)


def _is_untouched(module: nn.Module) -> bool:
    # Hooks make weights, too: those of torch's older weight_norm, spectral_norm and pruning.
    return module.is_original() and not any(map(has_own_hooks, module.modules()))


class SplitHierarchyConv2d(nn.Module):
    r"""Hierarchy of 3x3 convolutions over channel splits, from Res2Net in the form of the Dense2Net slides.

    The input is split into ``scale`` = s equal groups of channels :math:`x_1 \dots x_s`, and

    .. math:: y_1 = x_1, \qquad y_i = K_i(x_i + y_{i-1}) \quad 1 < i \le s

    where :math:`K_i` is convolution (no bias), norm, activation. The output is the concatenation of
    :math:`y_1 \dots y_s`; nothing follows it.

    This differs from the Res2Net paper and from timm's ``res2net.py`` in two ways: they add nothing to the split that
    is convolved first (here the untouched first split is added), and timm leaves the last split untouched, not the
    first. With ``scale=1`` the formula leaves the input as it is, so the layer has no parameters.

    Shape: (N, channels, H, W) -> (N, channels, H, W).

    Args:
        channels: Input and output channels.
        scale: Number of channel splits s.
        groups: Convolution groups within each split (cardinality).
        kernel_size: Convolution kernel size.
        dilation: Convolution dilation.
        act_layer: Activation, by name or class.
        norm_layer: Normalization, by name or class.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a number is below 1, kernel_size is even, scale does not divide the channels, or groups do not
            divide a split; in ``forward``, if the input has other than ``channels`` channels.
    """

    def __init__(
            self,
            channels: int,
            scale: int = 4,
            groups: int = 1,
            kernel_size: int = 3,
            dilation: int = 1,
            act_layer: LayerType = 'relu',
            norm_layer: LayerType = 'batchnorm2d',
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        _check_positive(
            channels=channels, scale=scale, groups=groups, kernel_size=kernel_size, dilation=dilation)
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, so that maps keep their size, got {kernel_size}')
        if channels % scale:
            raise ValueError(f'{channels} channels cannot be split by scale {scale}: scale must divide the channels')
        width = channels // scale
        if width % groups:
            raise ValueError(
                f'{width} channels a split ({channels} channels at scale {scale}) cannot be divided in {groups} '
                f'groups: groups must divide {width}')
        norm_act_layer = find_norm_act_layer(norm_layer, act_layer, width)
        self.channels = channels
        self.in_channels = self.out_channels = channels  # asked of a convolution by timm's ConvNormAct
        self.scale = scale
        self.width = width
        self.groups = groups
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.convs = nn.ModuleList([
            create_conv2d(width, width, kernel_size, dilation=dilation, groups=groups, **dd)
            for _ in range(scale - 1)])
        self.norms = nn.ModuleList([norm_act_layer(width, **dd) for _ in range(scale - 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_input(x, channels=self.channels)
        splits = torch.split(x, self.width, 1)
        y = splits[0]
        outputs = [y]
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            y = norm(conv(splits[i + 1] + y))
            outputs.append(y)
        return torch.cat(outputs, 1)

    @torch.jit.ignore
    def is_original(self) -> bool:
        """Whether the convolutions are those it is made with."""
        return type(self) is SplitHierarchyConv2d and all(
            _is_bare_conv(conv, self.kernel_size, self.dilation, self.groups) for conv in self.convs)

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Form for inference; itself if a norm is no batch norm with ReLU, or a layer is changed or hooked."""
        return FusedSplitHierarchyConv2d(self) if _is_untouched(self) and is_fusable(*self.norms) else self


class _RunningStatsFrozen:
    # Recomputing a layer must not count its batch a second time in the running statistics. Entered anew by each
    # backward pass through the same graph.
    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __enter__(self) -> None:
        self._momenta, self._counts = [], []
        for module in self._module.modules():
            if hasattr(module, 'momentum'):  # not batch norm alone
                self._momenta.append((module, module.momentum))
                module.momentum = 0.
            count = getattr(module, 'num_batches_tracked', None)
            if count is not None:
                self._counts.append((count, count.clone()))

    def __exit__(self, *_: Any) -> None:
        for module, momentum in self._momenta:
            module.momentum = momentum
        for count, before in self._counts:
            count.copy_(before)


class DenseLayer(nn.Module):
    """Dense layer: pre-activation 1x1 bottleneck, then the split hierarchy and a linear 1x1 convolution.

    With ``scale=None`` one 3x3 convolution takes the place of the hierarchy and the second 1x1 convolution, as in
    DenseNet-BC.

    Shape: list of (N, C_i, H, W), with C_i adding up to ``in_chs``, or one (N, in_chs, H, W) -> (N, growth_rate, H, W).

    Raises:
        ValueError: If the cardinality does not divide the growth rate, or hierarchy or attention cannot be made.
    """

    def __init__(
            self,
            in_chs: int,
            growth_rate: int,
            bn_size: int = 4,
            scale: Optional[int] = 4,
            cardinality: int = 1,
            attn_layer: Optional[str] = None,
            act_layer: LayerType = 'relu',
            norm_layer: LayerType = 'batchnorm2d',
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        mid_chs = bn_size * growth_rate
        norm_act_layer = find_norm_act_layer(norm_layer, act_layer, in_chs, mid_chs)
        self.growth_rate = growth_rate
        self.norm1 = norm_act_layer(in_chs, **dd)
        self.conv1 = create_conv2d(in_chs, mid_chs, 1, **dd)
        self.norm2 = norm_act_layer(mid_chs, **dd)
        if scale is None:
            if growth_rate % cardinality:
                raise ValueError(
                    f'growth rate {growth_rate} cannot be divided in {cardinality} groups: '
                    f'cardinality must divide the growth rate')
            self.conv2 = create_conv2d(mid_chs, growth_rate, 3, groups=cardinality, **dd)
            self.conv3 = nn.Identity()
        else:
            self.conv2 = SplitHierarchyConv2d(
                mid_chs, scale, groups=cardinality, act_layer=act_layer, norm_layer=norm_layer, **dd)
            self.conv3 = create_conv2d(mid_chs, growth_rate, 1, **dd)
        self.attn = create_attn_layer(attn_layer, growth_rate, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.grad_checkpointing = False
        self.compiles = False

    @torch.jit.ignore
    def norms(self) -> List[nn.Module]:
        """The norms with activation, in the order of their use."""
        return [self.norm1, self.norm2, *getattr(self.conv2, 'norms', [])]

    @torch.jit.ignore
    def is_original(self) -> bool:
        """Whether the convolutions are those it is made with: the forms for training and inference know no others."""
        if not _is_bare_conv(self.conv1, 1):
            return False
        if type(self.conv2) is SplitHierarchyConv2d:
            return (
                self.conv2.is_original() and _is_bare_conv(self.conv3, 1)
                and self.conv3.out_channels == self.growth_rate)
        return (
            _is_bare_conv(self.conv2, 3, groups=None) and self.conv2.out_channels == self.growth_rate
            and type(self.conv3) is nn.Identity)

    @torch.jit.ignore
    def sizes(self) -> Tuple[Any, ...]:
        """What is the same in all layers of a block that runs in the forms for training and inference."""
        names = ('scale', 'kernel_size', 'dilation', 'groups')
        return self.growth_rate, self.conv1.out_channels, *(getattr(self.conv2, name, None) for name in names)

    def _new_features(self, features: List[torch.Tensor]) -> torch.Tensor:
        x = self.after_bottleneck(self.conv1(self.norm1(torch.cat(features, 1))))
        return self.drop_path(self.attn(x))

    def after_bottleneck(self, x: torch.Tensor) -> torch.Tensor:
        """New features (N, growth_rate, H, W), before attention, of the bottleneck's maps (N, mid_chs, H, W)."""
        if not torch.jit.is_scripting() and self._compiles_now(x):
            return _compiled_growth()(self, x)
        return self._growth(x)

    @torch.jit.unused
    def _compiles_now(self, x: torch.Tensor) -> bool:
        # What is compiled knows nothing of hooks that come later, nor of torch.func.
        return self.compiles and self.training and not is_transformed(x) and not has_hooks(self)

    def _growth(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv3(self.conv2(self.norm2(x)))

    @torch.jit.unused
    def _new_features_checkpointed(self, features: List[torch.Tensor]) -> torch.Tensor:
        # Only the list is kept: the concatenation, the widest tensor of the layer, is made again in backward.
        def run(*xs: torch.Tensor) -> torch.Tensor:
            return self._new_features(list(xs))

        if torch.compiler.is_compiling():  # the compiler takes no context, and recomputes without side effects
            return checkpoint(run, *features, use_reentrant=False)
        return checkpoint(
            run, *features, use_reentrant=False, context_fn=lambda: (nullcontext(), _RunningStatsFrozen(self)))

    def forward(self, features: List[torch.Tensor]) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if isinstance(features, torch.Tensor):
                features = [features]
            if self.grad_checkpointing:
                return self._new_features_checkpointed(features)
        return self._new_features(features)


@lru_cache
def _compiled_growth() -> Callable[[DenseLayer, torch.Tensor], torch.Tensor]:
    # Of the class, not of each layer: all layers on maps of one size share what is compiled, and a copy of a layer uses
    # its own weights.
    return torch.compile(DenseLayer._growth, dynamic=False)


class DenseBlock(PoolOwner, nn.ModuleDict):
    """Dense layers, each of which sees the block's input and the new features of all layers before it.

    Shape: (N, in_chs, H, W) -> (N, in_chs + num_layers * growth_rate, H, W).
    """

    def __init__(self, num_layers: int, in_chs: int, growth_rate: int, drop_path: List[float], **layer_kwargs) -> None:
        super().__init__()
        self.out_chs = in_chs + num_layers * growth_rate
        for i in range(num_layers):
            self.add_module(f'denselayer{i + 1}', DenseLayer(
                in_chs + i * growth_rate, growth_rate, drop_path=drop_path[i], **layer_kwargs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if block_has_training_form(self, x):
                return block_in_training(self, x)
            if runs_by_parts(self, x):
                return torch.cat([self._features(part) for part in image_parts(x, self.out_chs)])
        return self._features(x)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)

    @torch.jit.ignore
    def norms(self) -> List[nn.Module]:
        """The norms with activation of all layers."""
        return [norm for layer in self.values() for norm in layer.norms()]

    @torch.jit.ignore
    def is_original(self) -> bool:
        """Whether its layers are those it is made with."""
        layers = list(self.values())
        return (
            type(self) is DenseBlock and all(type(layer) is DenseLayer and layer.is_original() for layer in layers)
            and len({layer.sizes() for layer in layers}) == 1
            and all(a.conv1.in_channels + a.growth_rate == b.conv1.in_channels for a, b in zip(layers, layers[1:])))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Form for inference; itself if a norm is no batch norm with ReLU, or a layer is changed or hooked."""
        return FusedDenseBlock(self) if _is_untouched(self) and is_fusable(*self.norms()) else self


class DenseTransition(PoolOwner, nn.Sequential):
    """Norm, activation and 1x1 convolution to ``out_chs`` channels, then 2x2 average pooling.

    Shape: (N, in_chs, H, W) -> (N, out_chs, H // 2, W // 2).
    """

    def __init__(self, in_chs: int, out_chs: int, norm_act_layer: Type[nn.Module], device=None, dtype=None) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__(OrderedDict([
            ('norm', norm_act_layer(in_chs, **dd)),
            ('conv', create_conv2d(in_chs, out_chs, 1, **dd)),
            ('pool', nn.AvgPool2d(kernel_size=2, stride=2)),
        ]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if has_training_form(self, x):
                return transition_in_training(self, x)
        for layer in self:
            x = layer(x)
        return x

    @torch.jit.ignore
    def norms(self) -> List[nn.Module]:
        """The norm with activation."""
        return [self.norm]

    @torch.jit.ignore
    def is_original(self) -> bool:
        """Whether convolution and pooling are those it is made with."""
        if type(self) is not DenseTransition or list(self._modules) != ['norm', 'conv', 'pool']:
            return False
        pool = self.pool
        return (
            _is_bare_conv(self.conv, 1) and type(pool) is nn.AvgPool2d
            and (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode, pool.divisor_override)
            == (2, 2, 0, False, None))

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Form for inference; itself if a norm is no batch norm with ReLU, or a layer is changed or hooked."""
        return FusedDenseTransition(self) if _is_untouched(self) and is_fusable(*self.norms()) else self


def _create_stem(
        stem_type: str,
        in_chans: int,
        out_chs: int,
        norm_act_layer: Type[nn.Module],
        device=None,
        dtype=None,
) -> Tuple['OrderedDict[str, nn.Module]', str, int]:
    """Layers of the stem, the name of the one whose output is feature 0 and that output's stride."""
    dd = {'device': device, 'dtype': dtype}
    if stem_type == 'cifar':
        return OrderedDict(conv0=create_conv2d(in_chans, out_chs, 3, **dd)), 'conv0', 1
    if stem_type == '':
        layers = OrderedDict(
            conv0=create_conv2d(in_chans, out_chs, 7, stride=2, **dd), norm0=norm_act_layer(out_chs, **dd))
    elif stem_type == 'deep':
        layers = OrderedDict()
        chs = [in_chans, out_chs // 2, out_chs // 2, out_chs]
        for i in range(3):
            layers[f'conv{i}'] = create_conv2d(chs[i], chs[i + 1], 3, stride=2 if i == 0 else 1, **dd)
            layers[f'norm{i}'] = norm_act_layer(chs[i + 1], **dd)
    else:
        raise ValueError(f"unknown stem_type '{stem_type}': it must be 'cifar', '' or 'deep'")
    feature_name = next(reversed(layers))
    layers['pool0'] = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    return layers, feature_name, 2


def _join_in_training(layer: nn.Module, follower: nn.Module, x: torch.Tensor) -> bool:
    """Whether the two are a dense block and its transition and run on x in their training form."""
    return (
        type(layer) is DenseBlock and type(follower) is DenseTransition
        and block_has_training_form(layer, x) and has_training_form(follower, x))


class Features(nn.Sequential):
    """Stem, dense blocks with the transitions between them, and the final norm.

    Shape: (N, in_chans, H, W) -> (N, num_features, H', W').
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            return self._forward_eagerly(x)
        for layer in self:
            x = layer(x)
        return x

    @torch.jit.unused
    def _forward_eagerly(self, x: torch.Tensor) -> torch.Tensor:
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if layers and _join_in_training(layer, layers[0], x):
                x = block_in_training(layer, x, layers.pop(0))
            else:
                x = layer(x)
        return x

    @torch.jit.ignore
    def fuse(self) -> nn.Module:
        """Form for inference; itself if its norms are other than batch norm with ReLU, or it is hooked."""
        if type(self) is not Features or has_own_hooks(self):
            return self
        layers = OrderedDict(
            (name, layer.fuse() if hasattr(layer, 'fuse') else layer) for name, layer in self.named_children())
        if not any(isinstance(m, FusedDenseBlock) for m in layers.values()):
            return self
        fused = FusedFeatures(layers)
        fused.training = self.training
        return fused


class Dense2Net(nn.Module):
    """Dense2Net, and with ``scale=None`` DenseNet-BC.

    Shape: (N, in_chans, H, W) -> (N, num_classes), for H and W from ``min_size`` up.

    Args:
        growth_rate: New feature channels of each dense layer (k in the DenseNet paper).
        block_config: Number of dense layers in each block; a transition halves channels and size between blocks.
        num_classes: Number of classes, 0 for no classifier.
        in_chans: Number of input channels.
        global_pool: Global pooling type.
        bn_size: Width of the bottleneck, in multiples of the growth rate.
        scale: Number of splits of the hierarchy (s in the Res2Net paper), None for one 3x3 convolution in its place.
        cardinality: Groups of each 3x3 convolution.
        attn_layer: Attention on each layer's new features, by timm's name ('se', 'eca', ...).
        stem_type: 'cifar' (one 3x3 convolution at stride 1), '' (7x7 and pooling, stride 4) or 'deep' (three 3x3 and
            pooling, stride 4).
        act_layer: Activation, by timm's name.
        norm_layer: Normalization, by timm's name.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate on each layer's new features, rising linearly with depth to this value.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If a size is below 1, a rate is outside [0, 1), the bottleneck cannot be split as asked, or the
            stem, attention, activation or norm is unknown; in ``forward``, if the input has not four dimensions or is
            too small for the strides.
    """

    def __init__(
            self,
            growth_rate: int = 32,
            block_config: Tuple[int, ...] = (6, 12, 24, 16),
            num_classes: int = 100,
            in_chans: int = 3,
            global_pool: str = 'avg',
            bn_size: int = 4,
            scale: Optional[int] = 4,
            cardinality: int = 1,
            attn_layer: Optional[str] = None,
            stem_type: str = 'cifar',
            act_layer: str = 'relu',
            norm_layer: str = 'batchnorm2d',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        _check_positive(growth_rate=growth_rate, bn_size=bn_size, in_chans=in_chans, cardinality=cardinality)
        _check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        if not isinstance(num_classes, Integral) or num_classes < 0:
            raise ValueError(f'num_classes must be an integer of at least 0, got {num_classes!r}')
        _check_block_config(block_config)
        norm_act_layer = find_norm_act_layer(norm_layer, act_layer)
        self.num_classes = num_classes
        self.in_chans = in_chans

        num_features = 2 * growth_rate
        layers, stem_feature, reduction = _create_stem(stem_type, in_chans, num_features, norm_act_layer, **dd)
        self.features = Features(layers)
        self.feature_info = [dict(num_chs=num_features, reduction=reduction, module=f'features.{stem_feature}')]
        if 'pool0' in layers:
            reduction *= 2
        # Smallest image for each feature: the stem rounds sizes up, the pooling of each transition rounds them down.
        self.min_sizes = [reduction * (2 ** max(i - 1, 0) - 1) + 1 for i in range(len(block_config) + 1)]
        self.min_size = self.min_sizes[-1]

        last = len(block_config) - 1
        # timm's rates are read from a tensor, which has no values under FakeTensorMode.
        drop_path_rates = (
            calculate_drop_path_rates(drop_path_rate, list(block_config), stagewise=True) if drop_path_rate
            else [[0.] * count for count in block_config])
        for i, num_layers in enumerate(block_config):
            self.features.add_module(f'denseblock{i + 1}', DenseBlock(
                num_layers,
                num_features,
                growth_rate,
                drop_path=drop_path_rates[i],
                bn_size=bn_size,
                scale=scale,
                cardinality=cardinality,
                attn_layer=attn_layer,
                act_layer=act_layer,
                norm_layer=norm_layer,
                **dd,
            ))
            num_features += num_layers * growth_rate
            feature = f'denseblock{i + 1}' if i < last else 'norm5'
            self.feature_info.append(dict(num_chs=num_features, reduction=reduction, module=f'features.{feature}'))
            if i < last:
                self.features.add_module(
                    f'transition{i + 1}', DenseTransition(num_features, num_features // 2, norm_act_layer, **dd))
                num_features //= 2
                reduction *= 2
        # Named as in timm's and torchvision's DenseNet, whatever the number of blocks: weights move between them.
        self.features.add_module('norm5', norm_act_layer(num_features, **dd))
        names = [name for name, _ in self.features.named_children()]
        self.feature_ends = [names.index(info['module'].split('.')[1]) for info in self.feature_info]

        self.num_features = num_features
        # The classifier comes last, as in timm: without the last of its children the net gives embeddings.
        self.global_pool, classifier = create_classifier(num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = num_features * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(drop_rate)
        self.classifier = classifier
        self.init_weights()

    def init_weights(self) -> None:
        """He initialization of convolutions, as in the DenseNet paper; norms keep 1 and 0.

        Those of attention too, as in timm's ResNet, but where the attention has a way of its own (`reset_parameters`).
        """
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)
            elif isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, DenseLayer) and hasattr(m.attn, 'reset_parameters'):
                m.attn.reset_parameters()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Regular expressions that put every parameter and module in a layer group, for layer decay."""
        final_norm = (r'^features\.norm5', MATCH_PREV_GROUP)
        if coarse:
            blocks = [(r'^features\.(?:denseblock|transition)(\d+)', None), final_norm]
        else:
            blocks = [
                (r'^features\.denseblock(\d+)\.denselayer(\d+)', None),
                (r'^features\.transition(\d+)', MATCH_PREV_GROUP),
                final_norm,
            ]
        return dict(stem=r'^features\.(?:conv|norm)[012]\b', blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each layer's new features in the forward pass and recompute the rest in backward."""
        for m in self.modules():
            if isinstance(m, DenseLayer):
                m.grad_checkpointing = enable

    @torch.jit.ignore
    def compile_layers(self) -> None:
        """In training mode, compile what follows the bottleneck of the dense layers, once for each size of maps.

        The layers of a block share it, so that it takes a fraction of the time of ``torch.compile`` of the whole net.
        Layers that train in the training form leave it alone, but for those without hierarchy on a GPU.
        """
        # Of blocks and sizes of maps; by default the ninth of a function would not be compiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for m in self.modules():
            if isinstance(m, DenseLayer):
                m.compiles = True

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier, ``nn.Identity`` where num_classes is 0."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replace the classifier by a new one, on the model's device, dtype and train mode.

        Args:
            num_classes: Number of classes, 0 for no classifier.
            global_pool: Global pooling type, None to keep it.
        """
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **get_device_dtype(self))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.classifier.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward pass that also returns feature maps.

        Args:
            x: Images (N, in_chans, H, W).
            indices: Features to return: the last n if int, all if None, else these. 0 is the stem before pooling, then
                each dense block before its transition; the last is the final norm's output.
            norm: Without effect, the last feature is normalized and the others have no norm of their own.
            stop_early: Stop at the last of the features asked for.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Return the list of features alone.

        Returns:
            The final feature map and the list of features, or the list alone.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.feature_ends), indices)

        if torch.jit.is_scripting() or not stop_early:  # torchscript cannot slice a Sequential
            _check_input(x, self.min_size)
            layers = self.features
        else:
            _check_input(x, self.min_sizes[max_index])
            layers = self.features[:self.feature_ends[max_index] + 1]
        feat_idx = 0
        for i, layer in enumerate(layers):
            x = layer(x)
            if i in self.feature_ends:
                if feat_idx in take_indices:
                    intermediates.append(x)
                feat_idx += 1

        if intermediates_only:
            return intermediates

        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove the layers that the given features do not need.

        Args:
            indices: Features to keep, as in ``forward_intermediates``.
            prune_norm: Without effect, the final norm is the last feature.
            prune_head: Remove the classifier, which goes in any case with the layers that feed it.

        Returns:
            Absolute indices of the features that are left.
        """
        take_indices, max_index = feature_take_indices(len(self.feature_ends), indices)
        shortened = max_index < len(self.feature_ends) - 1
        features = self.features[:self.feature_ends[max_index] + 1]
        features.training = self.features.training
        self.features = features
        self.min_size = self.min_sizes[max_index]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or shortened:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Final feature map (N, num_features, H', W') of images (N, in_chans, H, W)."""
        _check_input(x, self.min_size)
        return self.features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits (N, num_classes) of a final feature map, or what the classifier sees if ``pre_logits``."""
        x = self.global_pool(x)
        x = self.head_drop(x)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def _create_dense2net(variant: str, pretrained: bool = False, **kwargs) -> Dense2Net:
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    if 'file' not in overlay and (overlay.get('hf_hub_id') or overlay.get('url')):
        # timm would take the packaged file first.
        overlay = kwargs['pretrained_cfg_overlay'] = dict(overlay, file=None)
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    if pretrained:
        check_pretrained(cfg)
    if cfg.num_classes < 0:
        # By timm's train.py, for weights of other classes: it is the net's own number that is wanted.
        kwargs.setdefault('num_classes', get_pretrained_cfg(variant).num_classes)
    _check_block_config(kwargs['block_config'])
    num_features = len(kwargs['block_config']) + 1
    model = build_model_with_cfg(
        Dense2Net,
        variant,
        pretrained,
        feature_cfg=dict(flatten_sequential=True, out_indices=tuple(range(num_features))),
        **kwargs,
    )
    is_packaged = pretrained and is_packaged_file(cfg.file) and not cfg.state_dict
    if is_packaged and getattr(model, 'num_classes', None) == cfg.num_classes:
        # Not in the cfgs: a classifier with random weights has no names of classes.
        model.pretrained_cfg['label_names'] = CIFAR100_CLASSES
    return model


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 100, 'input_size': (3, 32, 32), 'pool_size': (4, 4),
        'crop_pct': 1.0, 'interpolation': 'bicubic',
        'mean': CIFAR100_MEAN, 'std': CIFAR100_STD,
        'first_conv': 'features.conv0', 'classifier': 'classifier', 'license': 'apache-2.0',
        'paper_ids': ('arXiv:1608.06993', 'arXiv:1904.01169'), 'origin_url': 'https://arxiv.org/abs/1904.01169',
        **kwargs,
    }


def _cfg_224(**kwargs) -> Dict[str, Any]:
    return _cfg(
        num_classes=1000, input_size=(3, 224, 224), pool_size=(7, 7), crop_pct=0.875,
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, **kwargs)


# Above the entrypoints: register_model reads it as each of them is defined.
default_cfgs = generate_default_cfgs({
    'densenet121_cifar.untrained': _cfg(paper_ids='arXiv:1608.06993', origin_url='https://arxiv.org/abs/1608.06993'),
    'dense2net121_s2.sprint_s2_c100': _cfg(file=packaged_file('dense2net121_s2.sprint_s2_c100')),
    'dense2net121_s4.merged_s4_c100': _cfg(file=packaged_file('dense2net121_s4.merged_s4_c100')),
    'dense2net121_s8.sprint_c100': _cfg(file=packaged_file('dense2net121_s8.sprint_c100')),
    'dense2net121_s8.short_ft7_c100': _cfg(file=packaged_file('dense2net121_s8.short_ft7_c100')),
    'dense2net121_s4_c32.sprint_s4_c32_ft_c100': _cfg(file=packaged_file('dense2net121_s4_c32.sprint_s4_c32_ft_c100')),
    'dense2net121_s4_se.sprint_s4_se_c100': _cfg(file=packaged_file('dense2net121_s4_se.sprint_s4_se_c100')),
    'dense2net121_s8_se.sprint_s8_se_c100': _cfg(file=packaged_file('dense2net121_s8_se.sprint_s8_se_c100')),
    'densenet40_k12_cifar.small_c100': _cfg(
        pool_size=(8, 8), file=packaged_file('densenet40_k12_cifar.small_c100'), paper_ids='arXiv:1608.06993',
        origin_url='https://arxiv.org/abs/1608.06993'),
    'dense2net40_k12_s4.sprint_40_k12_c100': _cfg(
        pool_size=(8, 8), file=packaged_file('dense2net40_k12_s4.sprint_40_k12_c100')),
    'dense2net40_k12_s4.small_c100': _cfg(pool_size=(8, 8), file=packaged_file('dense2net40_k12_s4.small_c100')),
    'dense2net40_k12_s4.quick_c100': _cfg(pool_size=(8, 8), file=packaged_file('dense2net40_k12_s4.quick_c100')),
    'dense2net100_k12_s4.sprint_k12_c100': _cfg(
        pool_size=(8, 8), file=packaged_file('dense2net100_k12_s4.sprint_k12_c100')),
    'dense2net100_k12_s4.small_ft_c100': _cfg(
        pool_size=(8, 8), file=packaged_file('dense2net100_k12_s4.small_ft_c100')),
    'dense2net100_k12_s4.small_c100': _cfg(pool_size=(8, 8), file=packaged_file('dense2net100_k12_s4.small_c100')),
    'dense2net169_s8.untrained': _cfg(),
    'dense2net201_s8.untrained': _cfg(),
    'dense2net161_s8.untrained': _cfg(),
    'dense2net190_k40_s4.untrained': _cfg(pool_size=(8, 8)),
    'densenet190_k40_cifar.untrained': _cfg(
        pool_size=(8, 8), paper_ids='arXiv:1608.06993', origin_url='https://arxiv.org/abs/1608.06993'),
    'dense2net121d_s4.untrained': _cfg_224(),
    'dense2net121d_s8.untrained': _cfg_224(),
    'dense2net169d_s8.untrained': _cfg_224(),
})


@register_model
def densenet121_cifar(pretrained: bool = False, **kwargs) -> Dense2Net:
    """DenseNet-121-BC (k = 32) with a CIFAR stem, the baseline."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16), scale=None)
    return _create_dense2net('densenet121_cifar', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net121_s2(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Dense2Net-121 (k = 32), scale 2."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16), scale=2)
    return _create_dense2net('dense2net121_s2', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net121_s4(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Dense2Net-121 (k = 32), scale 4."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16), scale=4)
    return _create_dense2net('dense2net121_s4', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net121_s8(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Dense2Net-121 (k = 32), scale 8."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16), scale=8)
    return _create_dense2net('dense2net121_s8', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net121_s4_c32(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Dense2Net-121 (k = 32), scale 4, cardinality 32: depthwise."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16), scale=4, cardinality=32)
    return _create_dense2net('dense2net121_s4_c32', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net121_s4_se(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Dense2Net-121 (k = 32), scale 4, with squeeze-and-excitation."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16), scale=4, attn_layer='se')
    return _create_dense2net('dense2net121_s4_se', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net121_s8_se(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Dense2Net-121 (k = 32), scale 8, with squeeze-and-excitation."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16), scale=8, attn_layer='se')
    return _create_dense2net('dense2net121_s8_se', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def densenet40_k12_cifar(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Three-block DenseNet-40-BC (k = 12) with a CIFAR stem."""
    model_args = dict(growth_rate=12, block_config=(6, 6, 6), scale=None)
    return _create_dense2net('densenet40_k12_cifar', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net40_k12_s4(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Three-block Dense2Net-40 (k = 12), scale 4: small enough to train on a CPU."""
    model_args = dict(growth_rate=12, block_config=(6, 6, 6), scale=4)
    return _create_dense2net('dense2net40_k12_s4', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net100_k12_s4(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Three-block Dense2Net-100 (k = 12), scale 4."""
    model_args = dict(growth_rate=12, block_config=(16, 16, 16), scale=4)
    return _create_dense2net('dense2net100_k12_s4', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net169_s8(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Dense2Net-169 (k = 32), scale 8."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 32, 32), scale=8)
    return _create_dense2net('dense2net169_s8', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net201_s8(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Dense2Net-201 (k = 32), scale 8."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 48, 32), scale=8)
    return _create_dense2net('dense2net201_s8', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net161_s8(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Dense2Net-161 (k = 48), scale 8."""
    model_args = dict(growth_rate=48, block_config=(6, 12, 36, 24), scale=8)
    return _create_dense2net('dense2net161_s8', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net190_k40_s4(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Three-block Dense2Net-190 (k = 40), scale 4."""
    model_args = dict(growth_rate=40, block_config=(31, 31, 31), scale=4)
    return _create_dense2net('dense2net190_k40_s4', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def densenet190_k40_cifar(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Three-block DenseNet-190-BC (k = 40) with a CIFAR stem."""
    model_args = dict(growth_rate=40, block_config=(31, 31, 31), scale=None)
    return _create_dense2net('densenet190_k40_cifar', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net121d_s4(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Dense2Net-121 (k = 32), scale 4, with the deep stride-4 stem."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16), scale=4, stem_type='deep')
    return _create_dense2net('dense2net121d_s4', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net121d_s8(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Dense2Net-121 (k = 32), scale 8, with the deep stride-4 stem."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 24, 16), scale=8, stem_type='deep')
    return _create_dense2net('dense2net121d_s8', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def dense2net169d_s8(pretrained: bool = False, **kwargs) -> Dense2Net:
    """Dense2Net-169 (k = 32), scale 8, with the deep stride-4 stem."""
    model_args = dict(growth_rate=32, block_config=(6, 12, 32, 32), scale=8, stem_type='deep')
    return _create_dense2net('dense2net169d_s8', pretrained=pretrained, **dict(model_args, **kwargs))
