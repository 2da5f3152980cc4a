"""The tables of the slides that the project is made from: their results, and other networks on CIFAR-100."""
from __future__ import annotations

from typing import NamedTuple

__all__ = ['DECK', 'TABLE', 'DeckRow', 'TableRow']


class DeckRow(NamedTuple):
    """A row of the deck's results table: its name there, the model it is here, its validation accuracy in percent."""
    name: str
    model: str
    top1: float


class TableRow(NamedTuple):
    """A row of the slides' table of other networks.

    Args:
        network: Its name there.
        model: The registered model.
        params: Parameters in millions, as printed.
        error: Top-1 error on CIFAR-100 in percent, as printed.
    """
    network: str
    model: str
    params: float
    error: float


# By the recipe that trains the row here.
DECK: dict[str, DeckRow] = {
    'deck_densenet_noaug': DeckRow('DenseNet No Augmentation', 'densenet121_cifar', 65.41),
    'deck_densenet': DeckRow('DenseNet', 'densenet121_cifar', 71.91),
    'deck_dense2net_noaug': DeckRow('Dense2Net No Augmentation', 'dense2net121_s4', 68.96),
    'deck_dense2net': DeckRow('Dense2Net', 'dense2net121_s4', 75.85),
    'deck_s2': DeckRow('Dense2Net scale = 2', 'dense2net121_s2', 75.26),
    'deck_s8': DeckRow('Dense2Net scale = 8', 'dense2net121_s8', 76.1),
    'deck_cutout': DeckRow('Dense2Net with Cutout', 'dense2net121_s4', 75.23),
    'deck_grouped': DeckRow('Dense2Net with Grouped Convs', 'dense2net121_s4_c32', 75.96),
    'deck_se': DeckRow('Dense2Net with SE', 'dense2net121_s4_se', 74.77),
}

# Without the classifier's parameters.
TABLE = (
    TableRow('Wide ResNet', 'wide_resnet28_10', 36.5, 20.50),
    TableRow('ResNeXt-29, 8c x 64w (base)', 'resnext29_8x64d', 34.4, 17.90),
    TableRow('ResNeXt-29, 16c x 64w', 'resnext29_16x64d', 68.1, 17.31),
    TableRow('DenseNet-BC (k = 40)', 'densenet190_k40_cifar', 25.6, 17.18),
    TableRow('Res2NeXt-29, 6c x 24w x 4 scale', 'res2next29_6x24d_4s', 24.3, 16.98),
    TableRow('Res2NeXt-29, 8c x 25w x 4 scale', 'res2next29_8x25d_4s', 33.8, 16.93),
    TableRow('Res2NeXt-29, 6c x 24w x 6 scale', 'res2next29_6x24d_6s', 36.7, 16.79),
    TableRow('ResNeXt-29, 8c x 64w-SE', 'seresnext29_8x64d', 35.1, 16.77),
    TableRow('Res2NeXt-29, 6c x 24w x 4 scale-SE', 'seres2next29_6x24d_4s', 26.0, 16.68),
    TableRow('Res2NeXt-29, 8c x 25w x 4 scale-SE', 'seres2next29_8x25d_4s', 34.0, 16.64),
    TableRow('Res2NeXt-29, 6c x 24w x 6 scale-SE', 'seres2next29_6x24d_6s', 36.9, 16.56),
)
