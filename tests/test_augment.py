"""Augmentation against what it must leave alone, and against cases worked out by hand."""

import pytest
import torch

from meddanet.data.augment import (
    Draws,
    augment,
    change_contrast,
    change_texture,
    spread,
    transplant,
)


def draws(count: int, rank: int = 0, world: int = 1) -> Draws:
    generator = torch.Generator().manual_seed(0)
    return Draws(generator, count, torch.device("cpu"), rank, world)


@pytest.fixture
def slices():
    """32 slices: brain in a square of 32 x 32 pixels, normal tissue 1, a lesion of 3 and 5."""
    images = torch.zeros(32, 2, 48, 48)
    images[:, :, 8:40, 8:40] = 1
    labels = torch.zeros(32, 48, 48, dtype=torch.long)
    labels[:, 16:26, 16:26], labels[:, 26:32, 16:26] = 1, 2
    images[(labels == 1)[:, None].expand_as(images)] = 3
    images[(labels == 2)[:, None].expand_as(images)] = 5
    return images, labels


def test_images_and_labels_move_together_and_the_background_stays(slices):
    images, labels = slices
    moved, turned = augment(images, labels, draws(32), shift=0.1)
    inside = (moved[:, 0] > 2) == (turned > 0)
    assert inside.double().mean() > 0.98
    assert not torch.equal(moved, images)
    assert moved[:, :, :2, :2].abs().max() == 0


def test_a_disc_stays_a_disc_on_slices_of_any_shape():
    """Turned and enlarged alike in both directions, whatever height and width are."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(128.0), indexing="ij")
    disc = ((y - 31.5) ** 2 + (x - 63.5) ** 2 <= 18**2).long().expand(16, -1, -1)
    images = disc[:, None].float()
    turned, labels = augment(images, disc, draws(16), rotation=60.0, scale=0.0, intensity=0.0)
    for label in labels:
        rows, columns = label.any(1).sum().item(), label.any(0).sum().item()
        assert abs(rows - 36) <= 2 and abs(columns - 36) <= 2, (rows, columns)


def test_contrast_moves_each_class_towards_normal_tissue_by_one_factor(slices):
    images, labels = slices
    changed = change_contrast(images, labels, draws(32), 1.0)
    # in the middle of a class its blurred mask is 1; 1 + (3 - 1) * a and 1 + (5 - 1) * b
    first, second = (changed[:, :, 20, 20] - 1) / 2, (changed[:, :, 29, 20] - 1) / 4
    for factor in (first, second):
        assert factor.min() >= 0.4 * 0.75 - 1e-5 and factor.max() <= 1.15 * 1.25 + 1e-5
        assert factor.std() > 0.1
    assert not torch.allclose(first, second, atol=0.01)
    assert not torch.allclose(first[:, 0], first[:, 1], atol=0.01)
    far = torch.ones(48, 48, dtype=torch.bool)
    far[12:36, 12:30] = False
    assert torch.equal(changed[..., far], images[..., far])
    assert torch.equal(change_contrast(images, labels, draws(32), 0.0), images)
    healthy = torch.zeros_like(labels)
    assert torch.equal(change_contrast(images, healthy, draws(32), 1.0), images)


def test_a_transplant_lies_where_it_lay_and_only_on_brain(slices):
    images, labels = slices
    plain = torch.where(images != 0, 1.0, 0.0)
    healthy = torch.zeros_like(labels)
    donors = images.clone(), labels.clone()
    # half of the donor's lesion lies where the other slice has no brain
    plain[:, :, :20] = 0
    mixed, taken = transplant(plain, healthy, donors, draws(32), 1.0)
    expected = labels.clone()
    expected[:, :20] = 0
    mirrored = expected.flip(2)
    straight = (taken == expected).flatten(1).all(1)
    assert ((taken == mirrored).flatten(1).all(1) ^ straight).all() and 0 < straight.sum() < 32
    assert (mixed[:, :, :20] == 0).all()
    assert (mixed[straight][:, :, 22, 20] == 3).all() and (mixed[straight][:, :, 29, 20] == 5).all()
    # the border is halfway between both
    edge = mixed[straight][:, 0, 29, 25]
    assert ((edge > 1) & (edge < 5)).all()
    same, unlabelled = transplant(plain, healthy, donors, draws(32), 0.0)
    assert torch.equal(same, plain) and torch.equal(unlabelled, healthy)


def test_texture_keeps_the_background_and_the_order_of_grey_values():
    ramp = torch.linspace(-2, 4, 64).repeat(8, 3, 64, 1)
    ramp[:, :, :8] = 0
    changed = change_texture(ramp, draws(8), 0.0)
    assert (changed[:, :, :8] == 0).all()
    assert (changed[:, :, 8:].diff(dim=3) > 0).all()
    assert not torch.equal(changed, ramp)
    bent = (changed != ramp).flatten(2).any(2)
    assert 0 < bent.sum() < 24
    rough = change_texture(ramp, draws(8), 1.0)
    assert (rough[:, :, :8] == 0).all()
    # away from edges blurring hardly moves a smooth curve: what is left is noise
    noise = (rough - changed)[:, :, 10:-2, 2:-2]
    assert noise.abs().max() < 0.6 and noise.std() > 0.01


def test_spread_is_that_of_the_signal_alone(slices):
    images = slices[0] * torch.linspace(0.1, 0.9, 32)[:, None, None, None]
    mean, deviation = spread(images)
    for image, its_mean, its_deviation in zip(images, mean, deviation, strict=True):
        signal = image[1][image[1] != 0].double()
        assert its_mean[1].item() == pytest.approx(signal.mean().item(), rel=1e-5)
        assert its_deviation[1].item() == pytest.approx(signal.std(correction=0).item(), rel=1e-5)
    assert [part.abs().max() for part in spread(torch.zeros(1, 2, 4, 4))] == [0, 0]


def test_a_hounsfield_window_is_varied_as_its_z_scores_would_be():
    """By a quarter of a standard deviation, not by a quarter of the whole window."""
    window = 0.3 + 0.4 * torch.rand(32, 2, 24, 24)
    mean, deviation = spread(window)

    def varied(images: torch.Tensor, mean, deviation) -> torch.Tensor:
        random, labels = draws(32), torch.zeros(32, 24, 24, dtype=torch.long)
        images = change_texture(images, random, 1.0, deviation)
        return augment(
            images, labels, random, rotation=0, scale=0, intensity=0.25, mean=mean,
            deviation=deviation,
        )[0]

    changed = varied(window, mean, deviation)
    like = varied((window - mean) / deviation, 0.0, 1.0)
    # at the border blurring takes in zeros, which are another height
    inside = (..., slice(1, -1), slice(1, -1))
    expected = mean + deviation * like
    torch.testing.assert_close(changed[inside], expected[inside], rtol=0, atol=1e-5)
    assert (changed.mean((2, 3)) - 0.5).abs().max() > 0.01


@pytest.mark.parametrize("share", [transplant, change_contrast, change_texture, augment])
def test_two_processes_see_what_one_would(slices, share):
    images, labels = slices
    images, labels = images[:8] + torch.rand(8, 1, 1, 1) * (images[:8] != 0), labels[:8]

    def run(rank: int, world: int):
        part = slice(rank, None, world)
        x, y = images[part], labels[part]
        random = draws(len(y), rank, world)
        if share is transplant:
            return transplant(x, y, (x.flip(2), y.flip(1)), random, 0.5)[0]
        if share is change_contrast:
            return change_contrast(x, y, random, 0.5)
        if share is change_texture:
            return change_texture(x, random, 0.5)
        return augment(x, y, random)[0]

    whole = run(0, 1)
    torch.testing.assert_close(whole[0::2], run(0, 2))
    torch.testing.assert_close(whole[1::2], run(1, 2))
