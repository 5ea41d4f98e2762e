"""Augmentation in NumPy and Pillow is torchvision's."""

from __future__ import annotations

import numpy as np
import pytest

from coppice.keras import augment

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (120, 100, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["light", "standard", "strong", "trivialaugment"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (120, 100, 3)])
def test_images_keep_their_shape_and_kind(name: str, shape: tuple[int, int, int]) -> None:
    images = RNG.integers(0, 256, (12, *shape), dtype=np.uint8)
    transform = augment.make_augmentation(name, shape)
    assert transform is not None
    found, again = (transform(np.random.default_rng(3), images) for _ in range(2))
    assert found.shape == images.shape
    assert found.dtype == np.uint8
    assert np.array_equal(found, again)
    assert not np.array_equal(found, images)
    assert augment.make_augmentation("none", shape) is None


def test_what_is_not_to_be_mirrored_is_not() -> None:
    ramp = np.tile(np.arange(8, dtype=np.uint8)[None, :, None], (8, 1, 1))
    images = np.stack([ramp] * 16)
    mirrored = augment.make_augmentation("flip", (8, 8, 1))
    assert mirrored is not None
    found = mirrored(np.random.default_rng(0), images)
    flips = [np.array_equal(one, ramp[:, ::-1]) for one in found]
    assert 0 < sum(flips) < 16
    assert augment.make_augmentation("flip", (8, 8, 1), mirror=False) is None


def test_the_numbers_are_torchvisions() -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    image = torch.from_numpy(IMAGE).permute(2, 0, 1)

    def near(ours: np.ndarray, theirs: object, by: int = 1) -> None:  # type: ignore[type-arg]
        other = theirs.permute(1, 2, 0).numpy().astype(int)  # type: ignore[attr-defined]
        assert np.abs(ours.astype(int) - other).max() <= by

    for factor in (0.8, 1.2):
        near(augment.brightness(IMAGE, factor), functional.adjust_brightness(image, factor))
        near(augment.contrast(IMAGE, factor), functional.adjust_contrast(image, factor))
        near(augment.saturation(IMAGE, factor), functional.adjust_saturation(image, factor))
    cropped = functional.resized_crop(image, 10, 20, 90, 70, [120, 100], antialias=True)
    near(augment.resized(IMAGE, (20, 10, 90, 100)), cropped)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_op_of_randaugment_is_torchvisions(channels: int, wide: bool) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchvision")
    from PIL import Image
    from torchvision.transforms import InterpolationMode, v2

    from coppice.keras.randaugment import OPS, RAND_OPS, RAND_STRENGTH, STRONGEST

    theirs = v2.TrivialAugmentWide() if wide else v2.RandAugment()
    assert list(theirs._AUGMENTATION_SPACE) == list(OPS)
    assert theirs.num_magnitude_bins == STRONGEST + 1
    assert wide or (theirs.num_ops, theirs.magnitude) == (RAND_OPS, RAND_STRENGTH)
    image = Image.fromarray(IMAGE[..., 0] if channels == 1 else IMAGE)
    for name, (amounts, signed) in theirs._AUGMENTATION_SPACE.items():
        known = amounts(STRONGEST + 1, image.height, image.width)
        assert OPS[name].signed == signed
        for strength in (0, 7, 30):
            amount = OPS[name].amount(strength, wide, image.size)
            if known is not None and name != "Posterize":
                assert amount == pytest.approx(float(known[strength]), abs=1e-5)
            for way in (1, -1) if signed else (1,):
                wanted = 0.0 if known is None else way * float(known[strength])
                found = theirs._apply_image_or_video_transform(image, name, wanted, InterpolationMode.NEAREST, {Image.Image: None})
                # Their rows are in single precision, so a pixel on a border may come from the next one.
                off = np.asarray(OPS[name].do(image, way * amount)) != np.asarray(found)
                assert off.mean() < 0.02, (name, strength, way)
    assert torch.is_tensor(known) or known is None


def test_the_share_of_the_area_is_torchvisions() -> None:
    rng = np.random.default_rng(0)
    found = [augment._rectangle(rng, 200, 200, augment._AREA, augment._RATIO) for _ in range(500)]
    areas = [rows * columns / 40000 for rows, columns in (one for one in found if one is not None)]
    assert 0.69 < min(areas) < 0.73
    assert 0.95 < max(areas) <= 1


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_batches_are_mixed_in_the_share_that_is_said(name: str) -> None:
    batch = np.repeat(np.arange(4, dtype=np.float32), 16 * 12 * 3).reshape(4, 16, 12, 3)
    mix = augment.make_mix(f"crop+{name}")
    assert mix is not None
    shares = []
    for seed in range(40):
        mixed, share = mix(np.random.default_rng(seed), batch)
        other = np.roll(batch, 1, axis=0)
        assert mixed.dtype == np.float32
        assert np.allclose(mixed.mean((1, 2, 3)), share * batch.mean((1, 2, 3)) + (1 - share) * other.mean((1, 2, 3)), atol=1e-5)
        if name == "cutmix":
            assert np.isin(mixed, np.arange(4)).all()
        shares.append(share)
    extreme = sum(min(share, 1 - share) < 0.05 for share in shares)
    assert 0 <= min(shares) < 0.3 < 0.7 < max(shares) <= 1
    assert (extreme > 15) == (name == "mixup")  # its alpha is 0.2
    assert augment.make_mix("standard") is None
