"""Layers that users put in the place of a net's own."""
import torch


class Adapted(torch.nn.Conv2d):
    """A convolution that gives more than its weights do."""

    def forward(self, x):
        return super().forward(x) + 1.


class Wrapped(torch.nn.Module):
    """Half of what a layer gives."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) / 2


def change_layers(model, change):
    """A change that the plain form takes and that forms which know the layers must not overlook."""
    block, transition = model.features.denseblock2, model.features.transition1
    layers = list(block.values())
    if change == 'adapted':
        for layer in layers:
            layer.conv2.convs[0].__class__ = Adapted
    elif change == 'reflect':
        for layer in layers:
            for conv in layer.conv2.convs:
                conv.padding_mode, conv._reversed_padding_repeated_twice = 'reflect', [1, 1, 1, 1]
    elif change == 'ceil_mode':
        transition.pool.ceil_mode = True
    elif change == 'padded_pool':
        transition.pool = torch.nn.AvgPool2d(2, 2, padding=1)
    elif change == 'wide_transition':
        old = transition.conv
        transition.conv = torch.nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)
    elif change == 'appended':
        transition.append(torch.nn.Sigmoid())
    elif change == 'hooked':
        layers[1].conv1.register_forward_hook(lambda module, args, output: output / 2)
    elif change == 'own_forward':
        layer, forward = layers[1], layers[1].forward
        layer.forward = lambda features: forward(features) / 2
    elif change == 'narrow':
        layer, dtype = layers[1], next(model.parameters()).dtype
        block.denselayer2 = type(layer)(layer.conv1.in_channels, layer.growth_rate, bn_size=2, scale=4, dtype=dtype)
    elif change == 'subclass':
        class Halved(type(layers[1])):
            def forward(self, features):
                return super().forward(features) / 2

        layers[1].__class__ = Halved
    elif change == 'hierarchy_subclass':
        class Doubled(type(layers[1].conv2)):
            def forward(self, x):
                return super().forward(x) * 2

        layers[1].conv2.__class__ = Doubled
    elif change == 'own_drop_path':
        layers[1].drop_path = torch.nn.Hardtanh(-0.1, 0.1)
    elif change == 'in_place_attention':
        layers[1].attn = torch.nn.ReLU(inplace=True)
    elif change == 'in_place_before_block':
        model.features.denseblock2 = torch.nn.Sequential(torch.nn.ReLU(inplace=True), block)
    elif change == 'wrapped':
        block.denselayer2 = Wrapped(layers[1])
    return model


CHANGES = [
    'adapted', 'reflect', 'ceil_mode', 'padded_pool', 'wide_transition', 'appended', 'hooked', 'own_forward', 'narrow',
    'subclass', 'wrapped', 'hierarchy_subclass', 'own_drop_path', 'in_place_attention', 'in_place_before_block']
