"""The results table of the slides that the project is made from."""
from __future__ import annotations

from typing import NamedTuple

__all__ = ['DECK', 'DECK_LITERATURE_BEST', 'DeckRow']


class DeckRow(NamedTuple):
    """A row of the deck's results table: its name there, the model it is here, its validation accuracy in percent."""
    name: str
    model: str
    top1: float


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
# The best row of the literature table that the deck quotes (Res2NeXt-29 6c x 24w x 6s-SE, 36.9M parameters).
DECK_LITERATURE_BEST = 83.44
