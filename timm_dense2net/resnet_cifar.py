"""The 32x32 networks that Dense2Net's slides compare: Wide ResNet, ResNeXt, Res2NeXt (with SE too) and PyramidNet.

timm's own ResNet, ResNetV2 and blocks, with the CIFAR stem (one 3x3 convolution at stride 1, no pooling) and three
stages at strides 1, 2 and 4.

Papers:
    * `Wide Residual Networks` - https://arxiv.org/abs/1605.07146
    * `Aggregated Residual Transformations for Deep Neural Networks` - https://arxiv.org/abs/1611.05431
    * `Squeeze-and-Excitation Networks` - https://arxiv.org/abs/1709.01507
    * `Deep Pyramidal Residual Networks` - https://arxiv.org/abs/1610.02915
    * `Res2Net: A New Multi-scale Backbone Architecture` - https://arxiv.org/abs/1904.01169
"""
import copy
from functools import partial
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.layers import (
    DropPath,
    LayerType,
    SEModule,
    calculate_drop_path_rates,
    create_conv2d,
    make_divisible,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.res2net import Bottle2neck
from timm.models.resnet import Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2

from .cifar import CIFAR100_MEAN, CIFAR100_STD
from .named_layers import check_act_layer, find_norm_act_layer

__all__ = ['CifarResNet', 'CifarResNetV2', 'PyramidNet']

NUM_FEATURES = 4  # the stem and three stages


class StagedBottle2neck(Bottle2neck):
    """timm's Res2Net bottleneck, but the first block of a stage convolves every split.

    timm average-pools the last split there. The parameter counts in the Res2Net paper's CIFAR table are those of one
    3x3 convolution more a stage.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1, *args, **kwargs) -> None:
        super().__init__(inplanes, planes, stride, *args, **kwargs)
        if self.is_first and self.scale > 1:
            conv, norm = self.convs[0], self.bns[0]
            dd = {'device': conv.weight.device, 'dtype': conv.weight.dtype}
            self.pool = nn.Sequential(
                create_conv2d(self.width, self.width, 3, stride=stride, groups=conv.groups, **dd),
                copy.deepcopy(norm),
                type(self.relu)(inplace=True),
            )


class CifarFeatures:
    """Features of timm's residual nets, before whose class it stands, where they have a stem and three stages."""

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward pass that also returns feature maps: 0 is the stem, then each stage. As timm's."""
        take_indices, _ = feature_take_indices(NUM_FEATURES, indices)
        return super().forward_intermediates(x, take_indices, norm, stop_early, output_fmt, intermediates_only)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove the layers that the given features do not need. As timm's."""
        take_indices, _ = feature_take_indices(NUM_FEATURES, indices)
        return super().prune_intermediate_layers(take_indices, prune_norm, prune_head)


class CifarResNet(CifarFeatures, ResNet):
    """timm's ResNet with the CIFAR stem and three stages.

    Shape: (N, in_chans, H, W) -> (N, num_classes).

    Args:
        block: timm's block class, or one with its arguments.
        layers: Number of blocks in each of the three stages.
        num_classes: Number of classes, 0 for no classifier.
        in_chans: Number of input channels.
        global_pool: Global pooling type.
        cardinality: Groups of the 3x3 convolutions.
        base_width: Bottleneck width of 64 planes, a group.
        channels: Planes of each stage.
        act_layer: Activation, by name or class.
        norm_layer: Normalization, by name or class.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate, rising linearly with depth to this value.
        zero_init_last: Start the last norm of each block at 0.
        block_args: Further arguments of the block.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            block: Type[nn.Module],
            layers: Tuple[int, int, int],
            num_classes: int = 100,
            in_chans: int = 3,
            global_pool: str = 'avg',
            cardinality: int = 1,
            base_width: int = 64,
            channels: Tuple[int, int, int] = (64, 128, 256),
            act_layer: LayerType = 'relu',
            norm_layer: LayerType = 'batchnorm2d',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            zero_init_last: bool = True,
            block_args: Optional[Dict[str, Any]] = None,
            device=None,
            dtype=None,
    ) -> None:
        check_act_layer(act_layer)
        super().__init__(
            block,
            (*layers, 0),  # ResNet's code names four stages, an empty one passes its input on
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            cardinality=cardinality,
            base_width=base_width,
            channels=(*channels, channels[-1]),
            act_layer=act_layer,
            norm_layer=norm_layer,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            zero_init_last=zero_init_last,
            block_args=block_args,
            device=device,
            dtype=dtype,
        )
        self.conv1 = create_conv2d(in_chans, self.conv1.out_channels, 3, device=device, dtype=dtype)
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.maxpool = nn.Identity()
        self.feature_info = _at_cifar_strides(self.feature_info)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove the layers that the given features do not need. As timm's ResNet."""
        take_indices, max_index = feature_take_indices(NUM_FEATURES, indices)
        # The classifier belongs to ResNet's fourth stage, which is empty here.
        fourth_stage = [NUM_FEATURES] if max_index == NUM_FEATURES - 1 else []
        ResNet.prune_intermediate_layers(self, take_indices + fourth_stage, prune_norm, prune_head)
        return take_indices


class CifarResNetV2(CifarFeatures, ResNetV2):
    """timm's pre-activation ResNet with the CIFAR stem and three stages.

    Shape: (N, in_chans, H, W) -> (N, num_classes).

    Args:
        layers: Number of blocks in each of the three stages.
        channels: Output channels of each stage.
        num_classes: Number of classes, 0 for no classifier.
        in_chans: Number of input channels.
        global_pool: Global pooling type.
        stem_chs: Channels of the stem.
        act_layer: Activation, by name or class.
        norm_layer: Normalization, by name or class.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate, rising linearly with depth to this value.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            layers: Tuple[int, int, int],
            channels: Tuple[int, int, int],
            num_classes: int = 100,
            in_chans: int = 3,
            global_pool: str = 'avg',
            stem_chs: int = 16,
            act_layer: LayerType = 'relu',
            norm_layer: LayerType = 'batchnorm2d',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        find_norm_act_layer(norm_layer, act_layer, stem_chs)
        super().__init__(
            layers,
            channels,
            num_classes=num_classes,
            in_chans=in_chans,
            global_pool=global_pool,
            stem_chs=stem_chs,
            basic=True,
            bottle_ratio=1.,
            act_layer=act_layer,
            norm_layer=norm_layer,
            conv_layer=create_conv2d,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            device=device,
            dtype=dtype,
        )
        self.stem = nn.Sequential()
        # timm rounds the number of channels.
        stem_chs = self.feature_info[0]['num_chs']
        self.stem.add_module('conv', create_conv2d(in_chans, stem_chs, 3, device=device, dtype=dtype))
        nn.init.kaiming_normal_(self.stem.conv.weight, mode='fan_out', nonlinearity='relu')
        self.feature_info = _at_cifar_strides(self.feature_info)


def _at_cifar_strides(feature_info: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    return [
        dict(info, reduction=reduction) for info, reduction in zip(feature_info[:NUM_FEATURES], (1, 1, 2, 4))]


class PyramidBottleneck(nn.Module):
    """Pyramidal bottleneck: norm before each convolution and after the last, no activation before the first.

    The shortcut has no parameters: it is average-pooled where the block has a stride, and zeros fill its new channels.

    Shape: (N, in_chs, H, W) -> (N, 4 * width, H / stride, W / stride), sizes rounded up.
    """
    expansion = 4

    def __init__(
            self,
            in_chs: int,
            width: int,
            stride: int = 1,
            act_layer: LayerType = 'relu',
            norm_layer: LayerType = 'batchnorm2d',
            drop_path: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        out_chs = width * self.expansion
        norm_act_layer = find_norm_act_layer(norm_layer, act_layer, in_chs, width, out_chs)
        self.norm1 = norm_act_layer(in_chs, apply_act=False, **dd)
        self.conv1 = create_conv2d(in_chs, width, 1, **dd)
        self.norm2 = norm_act_layer(width, **dd)
        self.conv2 = create_conv2d(width, width, 3, stride=stride, **dd)
        self.norm3 = norm_act_layer(width, **dd)
        self.conv3 = create_conv2d(width, out_chs, 1, **dd)
        self.norm4 = norm_act_layer(out_chs, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
        self.new_chs = out_chs - in_chs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = F.pad(self.pool(x), (0, 0, 0, 0, 0, self.new_chs))
        x = self.conv1(self.norm1(x))
        x = self.conv2(self.norm2(x))
        x = self.conv3(self.norm3(x))
        return self.drop_path(self.norm4(x)) + shortcut


class PyramidNet(CifarResNetV2):
    """PyramidNet with bottleneck blocks, whose widths rise by the same step from block to block.

    Shape: (N, in_chans, H, W) -> (N, num_classes).

    Args:
        layers: Number of blocks in each of the three stages.
        alpha: Sum of all steps: the last width is ``stem_chs + alpha``.
        stem_chs: Channels of the stem.
        act_layer: Activation, by name or class.
        norm_layer: Normalization, by name or class.
        drop_path_rate: Stochastic depth rate, rising linearly with depth to this value.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        **kwargs: Further arguments of `CifarResNetV2`.

    Raises:
        ValueError: If the stem's or a stage's channels are no multiple of 8.
    """

    def __init__(
            self,
            layers: Tuple[int, int, int],
            alpha: int,
            stem_chs: int = 16,
            act_layer: LayerType = 'relu',
            norm_layer: LayerType = 'batchnorm2d',
            drop_path_rate: float = 0.,
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        depth = sum(layers)
        widths = [round(stem_chs + alpha * (i + 1) / depth) for i in range(depth)]
        ends = [sum(layers[:i + 1]) - 1 for i in range(len(layers))]
        channels = tuple(widths[end] * PyramidBottleneck.expansion for end in ends)
        # timm, whose class makes what is around the blocks, rounds the numbers of channels.
        if any(chs != make_divisible(chs) for chs in (stem_chs, *channels)):
            raise ValueError(
                f'alpha {alpha} and stem_chs {stem_chs} give a stem of {stem_chs} channels and stages of {channels}: '
                f'they must be multiples of 8')
        super().__init__(
            (0,) * len(layers),
            channels,
            stem_chs=stem_chs,
            act_layer=act_layer,
            norm_layer=norm_layer,
            **dd,
            **kwargs,
        )
        self.stem.add_module('norm', find_norm_act_layer(norm_layer, act_layer)(stem_chs, apply_act=False, **dd))
        self.stem_feat_idx = 1
        self.feature_info[0]['module'] = 'stem.norm'
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, depth)
        in_chs, index = stem_chs, 0
        for i, (stage, num_blocks) in enumerate(zip(self.stages, layers)):
            for j in range(num_blocks):
                block = PyramidBottleneck(
                    in_chs,
                    widths[index],
                    stride=2 if i > 0 and j == 0 else 1,
                    act_layer=act_layer,
                    norm_layer=norm_layer,
                    drop_path=drop_path_rates[index],
                    **dd,
                )
                stage.blocks.add_module(str(j), block)
                in_chs = widths[index] * PyramidBottleneck.expansion
                index += 1
        self.init_weights(zero_init_last=False)


def _create(model_cls: Type[nn.Module], variant: str, pretrained: bool = False, **kwargs) -> nn.Module:
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        feature_cfg=dict(out_indices=tuple(range(NUM_FEATURES)), flatten_sequential=issubclass(model_cls, ResNetV2)),
        **kwargs,
    )


def _create_resnet(variant: str, pretrained: bool = False, **kwargs) -> CifarResNet:
    return _create(CifarResNet, variant, pretrained, **dict(dict(layers=(3, 3, 3)), **kwargs))


def _cfg(paper_ids: Tuple[str, ...], **kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 100, 'input_size': (3, 32, 32), 'pool_size': (8, 8),
        'crop_pct': 1.0, 'interpolation': 'bicubic',
        'mean': CIFAR100_MEAN, 'std': CIFAR100_STD,
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0',
        'paper_ids': tuple(f'arXiv:{paper}' for paper in paper_ids),
        'origin_url': f'https://arxiv.org/abs/{paper_ids[-1]}',
        **kwargs,
    }


def _cfg_v2(paper_ids: Tuple[str, ...]) -> Dict[str, Any]:
    return _cfg(paper_ids, first_conv='stem.conv', classifier='head.fc')


_SE, _RESNEXT, _RES2NET = '1709.01507', '1611.05431', '1904.01169'

# Above the entrypoints: register_model reads it as each of them is defined.
default_cfgs = generate_default_cfgs({
    'wide_resnet28_10.untrained': _cfg_v2(('1605.07146',)),
    'resnext29_8x64d.untrained': _cfg((_RESNEXT,)),
    'resnext29_16x64d.untrained': _cfg((_RESNEXT,)),
    'res2next29_6x24d_4s.untrained': _cfg((_RESNEXT, _RES2NET)),
    'res2next29_8x25d_4s.untrained': _cfg((_RESNEXT, _RES2NET)),
    'res2next29_6x24d_6s.untrained': _cfg((_RESNEXT, _RES2NET)),
    'seresnext29_8x64d.untrained': _cfg((_RESNEXT, _SE)),
    'seres2next29_6x24d_4s.untrained': _cfg((_RESNEXT, _SE, _RES2NET)),
    'seres2next29_8x25d_4s.untrained': _cfg((_RESNEXT, _SE, _RES2NET)),
    'seres2next29_6x24d_6s.untrained': _cfg((_RESNEXT, _SE, _RES2NET)),
    'pyramidnet164_a84.untrained': _cfg_v2(('1610.02915',)),
})


@register_model
def wide_resnet28_10(pretrained: bool = False, **kwargs) -> CifarResNetV2:
    """Wide ResNet-28-10."""
    model_args = dict(layers=(4, 4, 4), channels=(160, 320, 640))
    return _create(CifarResNetV2, 'wide_resnet28_10', pretrained, **dict(model_args, **kwargs))


@register_model
def resnext29_8x64d(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNeXt-29, 8c x 64w."""
    model_args = dict(block=Bottleneck, cardinality=8, base_width=64)
    return _create_resnet('resnext29_8x64d', pretrained, **dict(model_args, **kwargs))


@register_model
def resnext29_16x64d(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNeXt-29, 16c x 64w."""
    model_args = dict(block=Bottleneck, cardinality=16, base_width=64)
    return _create_resnet('resnext29_16x64d', pretrained, **dict(model_args, **kwargs))


@register_model
def res2next29_6x24d_4s(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Res2NeXt-29, 6c x 24w x 4 scale."""
    model_args = dict(block=StagedBottle2neck, cardinality=6, base_width=24, block_args=dict(scale=4))
    return _create_resnet('res2next29_6x24d_4s', pretrained, **dict(model_args, **kwargs))


@register_model
def res2next29_8x25d_4s(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Res2NeXt-29, 8c x 25w x 4 scale."""
    model_args = dict(block=StagedBottle2neck, cardinality=8, base_width=25, block_args=dict(scale=4))
    return _create_resnet('res2next29_8x25d_4s', pretrained, **dict(model_args, **kwargs))


@register_model
def res2next29_6x24d_6s(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Res2NeXt-29, 6c x 24w x 6 scale."""
    model_args = dict(block=StagedBottle2neck, cardinality=6, base_width=24, block_args=dict(scale=6))
    return _create_resnet('res2next29_6x24d_6s', pretrained, **dict(model_args, **kwargs))


# No source states the reduction of the SE models. Their printed sizes leave a different one for each; the ratios
# below meet those sizes.


@register_model
def seresnext29_8x64d(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNeXt-29, 8c x 64w, with squeeze-and-excitation."""
    block_args = dict(attn_layer=partial(SEModule, rd_ratio=1 / 12))
    model_args = dict(block=Bottleneck, cardinality=8, base_width=64, block_args=block_args)
    return _create_resnet('seresnext29_8x64d', pretrained, **dict(model_args, **kwargs))


@register_model
def seres2next29_6x24d_4s(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Res2NeXt-29, 6c x 24w x 4 scale, with squeeze-and-excitation."""
    block_args = dict(scale=4, attn_layer=partial(SEModule, rd_ratio=0.21))
    model_args = dict(block=StagedBottle2neck, cardinality=6, base_width=24, block_args=block_args)
    return _create_resnet('seres2next29_6x24d_4s', pretrained, **dict(model_args, **kwargs))


@register_model
def seres2next29_8x25d_4s(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Res2NeXt-29, 8c x 25w x 4 scale, with squeeze-and-excitation."""
    block_args = dict(scale=4, attn_layer=partial(SEModule, rd_ratio=1 / 48))
    model_args = dict(block=StagedBottle2neck, cardinality=8, base_width=25, block_args=block_args)
    return _create_resnet('seres2next29_8x25d_4s', pretrained, **dict(model_args, **kwargs))


@register_model
def seres2next29_6x24d_6s(pretrained: bool = False, **kwargs) -> CifarResNet:
    """Res2NeXt-29, 6c x 24w x 6 scale, with squeeze-and-excitation."""
    block_args = dict(scale=6, attn_layer=partial(SEModule, rd_ratio=1 / 48))
    model_args = dict(block=StagedBottle2neck, cardinality=6, base_width=24, block_args=block_args)
    return _create_resnet('seres2next29_6x24d_6s', pretrained, **dict(model_args, **kwargs))


@register_model
def pyramidnet164_a84(pretrained: bool = False, **kwargs) -> PyramidNet:
    """PyramidNet-164 with bottleneck blocks, alpha = 84."""
    model_args = dict(layers=(18, 18, 18), alpha=84)
    return _create(PyramidNet, 'pyramidnet164_a84', pretrained, **dict(model_args, **kwargs))
