"""Dense2Net models for timm: importing this package registers them."""
from . import convert, resnet_cifar  # noqa: F401
from .dense2net import Dense2Net, SplitHierarchyConv2d
from .version import __version__

__all__ = ['Dense2Net', 'SplitHierarchyConv2d', '__version__']
