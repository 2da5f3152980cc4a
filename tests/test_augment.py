"""Batch augmentation against torchvision's and timm's image by image."""
import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.mixup import Mixup, cutmix_bbox_and_lam
from torchvision import transforms
from torchvision.transforms import functional as F

from timm_dense2net.augment import (
    AugmentConfig,
    BatchAugment,
    ImageDraws,
    MixDraws,
    Normalize,
    ProgressiveResize,
    _copy_rows,
    _take_elements,
    crop_and_flip,
    cutout_mask,
    draw_images,
    draw_mix,
    mix_images,
    mix_targets,
)

CPU = torch.device('cpu')
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def random_images(count, channels=3, height=32, width=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def augment_pixels(config, images, draws):
    augment = BatchAugment(config, Normalize(MEAN, STD, CPU))
    return augment.pixels(augment.pad(images.contiguous()), np.arange(len(images)), draws)


def smooth_images(count, seed=0):
    """Images with structure and unused grey levels, so that autocontrast and equalize have something to do."""
    small = random_images(count, height=6, width=6, seed=seed).float()
    images = torch.nn.functional.interpolate(small, size=(32, 32), mode='bicubic').clamp(0, 255)
    return (images * 0.7 + 20).to(torch.uint8)


def assert_same_frequencies(observed, expected):
    """Chi-square test at five standard deviations of the statistic; `expected` are counts."""
    observed, expected = np.asarray(observed, dtype=float).ravel(), np.asarray(expected, dtype=float).ravel()
    assert observed[expected == 0].sum() == 0
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (observed, expected)


def assert_same_histograms(first, second):
    """Two-sample chi-square test of equal totals, at five standard deviations of the statistic."""
    first, second = np.asarray(first, dtype=float).ravel(), np.asarray(second, dtype=float).ravel()
    assert first.sum() == second.sum()
    used = first + second > 0
    statistic = ((first - second)[used] ** 2 / (first + second)[used]).sum()
    freedom = used.sum() - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), (first, second)


def assert_same_mean(first, second):
    """Two-sample test of the mean at five standard errors."""
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    error = math.sqrt(first.var() / len(first) + second.var() / len(second))
    assert abs(first.mean() - second.mean()) < 5 * error, (first.mean(), second.mean(), error)


def test_runs_are_taken_alike_on_every_device():
    """A CPU copies rows, other devices take elements; both ways are tried here on the CPU's memory."""
    values = random_images(3, 2, 7, 5)
    first = torch.tensor([0, 11, 11, 204])
    expected = [values.flatten()[start:start + 6] for start in first]
    for way in (_copy_rows, _take_elements):
        assert torch.equal(way(values, first, 6), torch.stack(expected))


@pytest.mark.parametrize('count, channels, height, width, padding', [
    (16, 3, 32, 32, 4), (1, 3, 32, 32, 4), (5, 1, 33, 17, 3), (4, 3, 9, 9, 0), (4, 3, 5, 8, 11), (3, 2, 1, 1, 1),
])
def test_crop_and_flip_is_torchvisions(count, channels, height, width, padding):
    images = random_images(count, channels, height, width)
    rng = np.random.default_rng(0)
    crop = rng.integers(2 * padding + 1, size=(count, 2))
    flip = rng.random(count) < 0.5
    index = rng.permutation(count)
    got = crop_and_flip(F.pad(images, padding), index, crop, flip, (height, width))
    for image, (top, left), flipped, result in zip(images[index], crop.tolist(), flip, got):
        expected = F.crop(F.pad(image, padding), top, left, height, width)
        assert torch.equal(result, F.hflip(expected) if flipped else expected)


def test_crops_and_flips_are_distributed_as_torchvisions():
    """Both are seen on an image whose every pixel tells its place, so that a result tells its crop and flip."""
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 8, 8)
    count, padding = 8000, 2
    config = AugmentConfig(crop_padding=padding)
    draws = draw_images(config, count, (8, 8), np.random.default_rng(0))
    got = augment_pixels(config, image.expand(count, 1, 8, 8), draws)
    torch.manual_seed(0)
    theirs = transforms.Compose([transforms.RandomCrop(8, padding), transforms.RandomHorizontalFlip()])
    reference = torch.stack([theirs(image) for _ in range(count)])

    def outcomes(batch):
        # The middle pixels are inside the image whatever the crop.
        left, right = batch[:, 0, 4, 3].int(), batch[:, 0, 4, 4].int()
        return np.bincount((left * 65 + right).numpy(), minlength=65 * 65)

    assert np.count_nonzero(outcomes(reference)) == 50
    assert_same_histograms(outcomes(got), outcomes(reference))


def test_draws_are_uniform_and_independent():
    config = AugmentConfig(hflip=0.3, cutout_holes=2, auto_augment='cifar10')
    count = 40000
    draws = draw_images(config, count, (32, 24), np.random.default_rng(1))
    assert_same_frequencies(np.bincount(draws.flip), (0.7 * count, 0.3 * count))
    joint = np.zeros((9, 9))
    np.add.at(joint, tuple(draws.crop.T), 1)
    assert_same_frequencies(joint, np.full((9, 9), count / 81))
    assert_same_frequencies(np.bincount(draws.policy), np.full(25, count / 25))
    for axis, length in enumerate((32, 24)):
        assert_same_frequencies(np.bincount(draws.holes[:, 1, axis]), np.full(length, count / length))
    holes = draws.holes.reshape(count, 4)
    columns = np.column_stack((draws.flip, draws.crop, draws.policy, draws.apply, draws.negate, holes))
    correlation = np.corrcoef(columns.T.astype(float)) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 5 / math.sqrt(count)


@pytest.mark.parametrize('length, holes, size', [
    (8, 1, (32, 32)), (8, 3, (32, 32)), (1, 1, (7, 5)), (16, 2, (17, 33)), (100, 1, (32, 32)), (64, 1, (32, 20)),
])
def test_cutout_is_the_papers(length, holes, size):
    rng = np.random.default_rng(0)
    centres = rng.integers(size, size=(40, holes, 2))
    got = cutout_mask(centres, length, size, CPU)
    assert got.shape == (40, 1, *size) and got.dtype == torch.float32
    for image, mask in zip(centres, got[:, 0].numpy()):
        expected = np.ones(size, np.float32)
        for y, x in image:
            rows = np.clip((y - length // 2, y + length - length // 2), 0, size[0])
            columns = np.clip((x - length // 2, x + length - length // 2), 0, size[1])
            expected[rows[0]:rows[1], columns[0]:columns[1]] = 0.
        assert np.array_equal(mask, expected)


def test_cutout_areas_are_distributed_as_the_papers():
    """Squares are clipped at the border: the area's distribution is that of the product of two clipped lengths."""
    config = AugmentConfig(cutout_holes=1, cutout_length=8)
    count = 20000
    draws = draw_images(config, count, (32, 32), np.random.default_rng(2))
    areas = (1. - cutout_mask(draws.holes, 8, (32, 32), CPU)).sum((1, 2, 3)).int().numpy()
    lengths = [min(centre + 4, 32) - max(centre - 4, 0) for centre in range(32)]
    expected = np.bincount([a * b for a in lengths for b in lengths], minlength=65) * (count / 32 ** 2)
    assert_same_frequencies(np.bincount(areas, minlength=65), expected)


def test_cutout_fills_with_the_mean():
    config = AugmentConfig(hflip=0., crop_padding=0, cutout_holes=1, cutout_length=8)
    images = random_images(64)
    draws = draw_images(config, 64, (32, 32), np.random.default_rng(0))
    augment = BatchAugment(config, Normalize(MEAN, STD, CPU))
    assert torch.equal(augment_pixels(config, images, draws), images)
    kept = cutout_mask(draws.holes, 8, (32, 32), CPU).bool()
    got = augment.finish(images, draws)
    assert torch.equal(got, torch.where(kept, augment.normalize(images), torch.zeros(())))
    assert 0 < (~kept).sum() < kept.sum()


@pytest.mark.parametrize('channels', [1, 3])
def test_normalisation_is_torchvisions(channels):
    images = random_images(8, channels)
    expected = transforms.Normalize(MEAN[:channels], STD[:channels])(images.float() / 255.)
    torch.testing.assert_close(Normalize(MEAN[:channels], STD[:channels], CPU)(images), expected)


class GivenDraws:
    """Stands for torch inside torchvision's AutoAugment and hands it one image's draws when it asks for random ones."""

    def __init__(self, transform, draws, index):
        self.policy = draws.policy[index]
        self.uniform = []
        for stage, (name, probability, _) in enumerate(transform._policies[self.policy]):
            self.uniform.append(draws.apply[index, stage])
            if draws.apply[index, stage] <= probability and transform._AUGMENTATION_SPACE[name][1]:
                self.uniform.append(0.25 if draws.negate[index, stage] else 0.75)

    def __getattr__(self, name):
        return getattr(torch, name)

    def randint(self, high, size):
        return torch.tensor(self.policy)

    def rand(self, size):
        return torch.tensor(self.uniform.pop(0), dtype=torch.float64)


@pytest.mark.parametrize('channels, height, width', [(3, 32, 32), (3, 33, 25), (1, 32, 32)])
def test_auto_augment_is_torchvisions_for_every_operation(monkeypatch, channels, height, width):
    """All sub-policies, signs and outcomes of the two probabilities, each image compared bit for bit."""
    cases = np.array([
        (policy, *apply, *negate)
        for policy in range(25)
        for apply in ((0., 0.), (0., 1.), (1., 0.), (1., 1.))
        for negate in ((0, 0), (0, 1), (1, 0), (1, 1))
    ])
    count = len(cases)
    images = torch.nn.functional.interpolate(
        smooth_images(count)[:, :channels].float(), size=(height, width)).to(torch.uint8)
    config = AugmentConfig(hflip=0., crop_padding=0, auto_augment='cifar10')
    draws = draw_images(config, count, (height, width), np.random.default_rng(0))._replace(
        policy=cases[:, 0].astype(int), apply=cases[:, 1:3], negate=cases[:, 3:].astype(bool))
    got = augment_pixels(config, images, draws)
    theirs = transforms.v2.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    for index, image in enumerate(images):
        given = GivenDraws(theirs, draws, index)
        monkeypatch.setattr('torchvision.transforms.v2._auto_augment.torch', given)
        assert torch.equal(got[index], theirs(image)), cases[index]
        assert not given.uniform
    assert (got != images).flatten(1).any(1).sum() > count / 2


def test_auto_augment_does_not_depend_on_the_batch():
    config = AugmentConfig(auto_augment='cifar10')
    images = smooth_images(300)
    draws = draw_images(config, 300, (32, 32), np.random.default_rng(0))
    together = augment_pixels(config, images, draws)
    for part in (slice(0, 1), slice(1, 100), slice(100, 300)):
        assert torch.equal(augment_pixels(config, images[part], draws.take(part)), together[part])


def test_auto_augmented_images_are_distributed_as_torchvisions():
    count = 3000
    image = smooth_images(1)
    config = AugmentConfig(hflip=0., crop_padding=0, auto_augment='cifar10')
    draws = draw_images(config, count, (32, 32), np.random.default_rng(0))
    got = augment_pixels(config, image.repeat(count, 1, 1, 1), draws)
    torch.manual_seed(0)
    theirs = transforms.v2.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10)
    reference = torch.stack([theirs(image[0]) for _ in range(count)])
    for statistic in (lambda x: x.float().mean((1, 2, 3)), lambda x: x.float().std((1, 2, 3)),
                      lambda x: x[:, 0, 16, 16].float(), lambda x: x[:, 2, 2, 29].float(),
                      lambda x: (x == image).float().mean((1, 2, 3))):
        assert_same_mean(statistic(got), statistic(reference))


def test_whole_pipeline_is_distributed_as_torchvisions():
    """Flip, crop, normalisation and cutout together: mean and variance of every pixel over many draws."""
    count = 6000
    image = random_images(1, height=8, width=8)
    config = AugmentConfig(crop_padding=1, cutout_holes=1, cutout_length=4)
    augment = BatchAugment(config, Normalize(MEAN, STD, CPU))
    draws = draw_images(config, count, (8, 8), np.random.default_rng(0))
    got = augment.finish(augment_pixels(config, image.repeat(count, 1, 1, 1), draws), draws)

    def cutout(tensor):
        y, x = torch.randint(8, (2,)).tolist()
        tensor[:, max(y - 2, 0):y + 2, max(x - 2, 0):x + 2] = 0.
        return tensor

    theirs = transforms.Compose([
        transforms.ToPILImage(), transforms.RandomCrop(8, 1), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(MEAN, STD), cutout])
    torch.manual_seed(0)
    reference = torch.stack([theirs(image[0]) for _ in range(count)])
    for moment in (1, 2):
        first, second = got ** moment, reference ** moment
        error = ((first.var(0) + second.var(0)) / count).sqrt()
        deviation = (first.mean(0) - second.mean(0)) / error
        assert deviation.abs().max() < 5
        assert 0.7 < deviation.std() < 1.3


def test_mixup_and_cutmix_of_given_draws():
    images, partners = torch.rand(3, 3, 8, 6), torch.rand(3, 3, 8, 6)
    draws = MixDraws(
        pixel_weight=np.array([0.25, 1., 1.], np.float32),
        box=np.array([[[4, 4], [4, 4]], [[2, 1], [8, 4]], [[0, 0], [8, 6]]]),
        target_weight=np.array([0.25, 1 - 18 / 48, 0.], np.float32))
    got = mix_images(images, partners, draws)
    torch.testing.assert_close(got[0], 0.25 * images[0] + 0.75 * partners[0])
    expected = images[1].clone()
    expected[:, 2:8, 1:4] = partners[1][:, 2:8, 1:4]
    assert torch.equal(got[1], expected)
    assert torch.equal(got[2], partners[2])


def test_mixed_batch_is_timms():
    """timm's own elementwise Mixup, made to use our draws, gives the same images and targets."""
    count = 64
    config = AugmentConfig(mixup=0.8, cutmix=1., smoothing=0.1)
    draws = draw_mix(config, count, (16, 16), np.random.default_rng(0))
    images, labels = torch.rand(count, 3, 16, 16), torch.arange(count) % 10
    expected = images.clone()
    for index in range(count):
        partner = images[count - 1 - index]
        if draws.pixel_weight[index] < 1.:
            expected[index] = expected[index] * draws.pixel_weight[index] + partner * (1 - draws.pixel_weight[index])
        else:
            (top, left), (bottom, right) = draws.box[index]
            expected[index, :, top:bottom, left:right] = partner[:, top:bottom, left:right]
    torch.testing.assert_close(mix_images(images, images.flip(0), draws), expected)
    targets = mix_targets(labels, 10, draws, 0.1)
    own, other = torch.full((count, 10), 0.01), torch.full((count, 10), 0.01)
    own[range(count), labels] = other[range(count), labels.flip(0)] = 0.91
    weight = torch.from_numpy(draws.target_weight).unsqueeze(1)
    torch.testing.assert_close(targets, own * weight + other * (1 - weight))
    torch.testing.assert_close(mix_targets(labels, 10, None, 0.1), own)


@pytest.mark.parametrize('mixup, cutmix, prob, switch', [
    (0.2, 1., 1., 0.5), (0.8, 0., 1., 0.5), (0., 1., 0.5, 0.5), (1., 0.4, 0.7, 0.2),
])
def test_mix_draws_are_distributed_as_timms(mixup, cutmix, prob, switch):
    count, size = 20000, (32, 24)
    config = AugmentConfig(mixup=mixup, cutmix=cutmix, mixup_prob=prob, mixup_switch_prob=switch)
    got = draw_mix(config, count, size, np.random.default_rng(0))
    theirs = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, prob=prob, switch_prob=switch, mode='elem')
    np.random.seed(0)
    weights, boxes = [], []
    for weight, use_cutmix in zip(*theirs._params_per_elem(count)):
        box = (0, 0, 0, 0)
        if use_cutmix and weight != 1.:
            box, weight = cutmix_bbox_and_lam((3, *size), weight)
        weights.append(weight)
        boxes.append(box)
    top, bottom, left, right = np.array(boxes).T

    bins = np.linspace(0., 1.0001, 21)
    assert_same_histograms(np.histogram(got.target_weight, bins)[0], np.histogram(weights, bins)[0])
    start, stop = got.box[:, 0], got.box[:, 1]
    empty = (stop <= start).any(1)
    assert abs(empty.mean() - ((bottom <= top) | (right <= left)).mean()) < 5 * math.sqrt(0.5 / count)
    filled, theirs_filled = ~empty, (bottom > top) & (right > left)
    if cutmix:
        for ours, other in ((start[:, 0], top), (stop[:, 0], bottom), (start[:, 1], left), (stop[:, 1], right)):
            assert_same_mean(ours[filled], other[theirs_filled])
    assert (got.pixel_weight[filled] == 1.).all()
    area = (stop - start).prod(1)
    np.testing.assert_allclose(got.target_weight[filled], 1. - area[filled] / (32 * 24), rtol=1e-6)


def test_draws_follow_the_generator_alone():
    config = AugmentConfig(auto_augment='cifar10', cutout_holes=1, mixup=0.2, cutmix=1.)

    def draw(seed):
        rng = np.random.default_rng(seed)
        return *draw_images(config, 32, (32, 32), rng), *draw_mix(config, 32, (32, 32), rng)

    np.random.seed(0)
    torch.manual_seed(0)
    first = draw(5)
    np.random.seed(1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    for one, other in zip(first, draw(5)):
        assert np.array_equal(one, other)
    assert torch.equal(state, torch.get_rng_state())
    assert not np.array_equal(first[1], draw(6)[1])


def test_draws_join_and_take():
    config = AugmentConfig(cutout_holes=1)
    draws = [draw_images(config, count, (32, 32), np.random.default_rng(count)) for count in (3, 5)]
    joined = ImageDraws.join(draws)
    for values, first, second in zip(joined, *draws):
        assert np.array_equal(values[:3], first) and np.array_equal(values[3:], second)
    for values, second in zip(joined.take(slice(3, 8)), draws[1]):
        assert np.array_equal(values, second)


@pytest.mark.parametrize('name, value', [
    ('hflip', 1.5), ('hflip', float('nan')), ('crop_padding', -1), ('cutout_holes', -1), ('cutout_length', 0),
    ('auto_augment', 'v0'), ('mixup', -0.1), ('cutmix', float('nan')), ('mixup_prob', 2.), ('smoothing', -0.1),
])
def test_bad_values_are_named(name, value):
    with pytest.raises(ValueError, match=f'{name}.*{value}'):
        AugmentConfig(**{name: value})


def test_progressive_sizes():
    resize = ProgressiveResize(initial_size=16, full_size_epoch=4)
    assert [resize.size(epoch, (32, 32)) for epoch in range(6)] == [(side, side) for side in (16, 20, 24, 28, 32, 32)]
    # The shorter side is what is given; the other goes with it.
    assert [resize.size(epoch, (25, 50)) for epoch in range(5)] == [(16, 32), (20, 36), (20, 40), (24, 44), (25, 50)]
    assert ProgressiveResize(4, 1).size(0, (7, 7)) == (4, 4)


@pytest.mark.parametrize('channels, height, width', [(3, 32, 32), (1, 28, 44)])
def test_smaller_images_are_pillows(channels, height, width):
    images = random_images(4, channels, height, width).float()
    resize = ProgressiveResize(initial_size=16, full_size_epoch=3)
    for epoch in range(3):
        size = resize.size(epoch, (height, width))
        expected = [[np.array(Image.fromarray(plane.numpy()).resize(size[::-1], Image.Resampling.BILINEAR))
                     for plane in image] for image in images]
        torch.testing.assert_close(resize(images, epoch), torch.tensor(np.array(expected)), rtol=0., atol=1e-3)
    assert torch.equal(resize(images, 3), images)


@pytest.mark.parametrize('initial_size, full_size_epoch, message', [
    (0, 3, 'initial_size must be at least 1, got 0'),
    (8, 0, 'full_size_epoch must be at least 1, got 0'),
    (18, 3, 'initial_size must be a multiple of 4, got 18'),
])
def test_bad_progressive_sizes_are_named(initial_size, full_size_epoch, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveResize(initial_size, full_size_epoch)
