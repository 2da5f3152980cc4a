"""CIFAR-100: its 100 classes and 20 superclasses, by name, and the statistics of its training images.

The classes are from https://www.cs.toronto.edu/~kriz/cifar.html (A. Krizhevsky, "Learning Multiple Layers of Features
from Tiny Images", 2009). Class and superclass indices are the alphabetical positions of these names, as in the data
set's own `fine_label` and `coarse_label`.
"""
from __future__ import annotations

__all__ = [
    'CIFAR100_CLASSES', 'CIFAR100_MEAN', 'CIFAR100_STD', 'CIFAR100_SUPERCLASS_MEMBERS', 'CIFAR100_SUPERCLASSES',
    'CIFAR100_SUPERCLASS_OF']

# Of each channel over all pixels of the training images, in 0..1.
CIFAR100_MEAN = (0.50707516, 0.48654887, 0.44091784)
CIFAR100_STD = (0.26733429, 0.25643846, 0.27615047)

CIFAR100_SUPERCLASS_MEMBERS: dict[str, tuple[str, ...]] = {
    'aquatic_mammals': ('beaver', 'dolphin', 'otter', 'seal', 'whale'),
    'fish': ('aquarium_fish', 'flatfish', 'ray', 'shark', 'trout'),
    'flowers': ('orchid', 'poppy', 'rose', 'sunflower', 'tulip'),
    'food_containers': ('bottle', 'bowl', 'can', 'cup', 'plate'),
    'fruit_and_vegetables': ('apple', 'mushroom', 'orange', 'pear', 'sweet_pepper'),
    'household_electrical_devices': ('clock', 'keyboard', 'lamp', 'telephone', 'television'),
    'household_furniture': ('bed', 'chair', 'couch', 'table', 'wardrobe'),
    'insects': ('bee', 'beetle', 'butterfly', 'caterpillar', 'cockroach'),
    'large_carnivores': ('bear', 'leopard', 'lion', 'tiger', 'wolf'),
    'large_man-made_outdoor_things': ('bridge', 'castle', 'house', 'road', 'skyscraper'),
    'large_natural_outdoor_scenes': ('cloud', 'forest', 'mountain', 'plain', 'sea'),
    'large_omnivores_and_herbivores': ('camel', 'cattle', 'chimpanzee', 'elephant', 'kangaroo'),
    'medium_mammals': ('fox', 'porcupine', 'possum', 'raccoon', 'skunk'),
    'non-insect_invertebrates': ('crab', 'lobster', 'snail', 'spider', 'worm'),
    'people': ('baby', 'boy', 'girl', 'man', 'woman'),
    'reptiles': ('crocodile', 'dinosaur', 'lizard', 'snake', 'turtle'),
    'small_mammals': ('hamster', 'mouse', 'rabbit', 'shrew', 'squirrel'),
    'trees': ('maple_tree', 'oak_tree', 'palm_tree', 'pine_tree', 'willow_tree'),
    'vehicles_1': ('bicycle', 'bus', 'motorcycle', 'pickup_truck', 'train'),
    'vehicles_2': ('lawn_mower', 'rocket', 'streetcar', 'tank', 'tractor'),
}

CIFAR100_SUPERCLASSES: tuple[str, ...] = tuple(CIFAR100_SUPERCLASS_MEMBERS)
CIFAR100_SUPERCLASS_OF: dict[str, str] = {
    name: superclass for superclass, names in CIFAR100_SUPERCLASS_MEMBERS.items() for name in names}
CIFAR100_CLASSES: tuple[str, ...] = tuple(sorted(CIFAR100_SUPERCLASS_OF))
