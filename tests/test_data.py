"""Every kind of data a user may name, its splits, and one clear sentence for what is broken in it."""

import io
import pickle
from hashlib import md5
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from coppice.augment import augment_batch, make_augmentation, make_mix
from coppice.data import batches, check_classes, load_data, raw_batches, sample_batches
from coppice.errors import CoppiceError
from coppice.preprocess import Preprocess
from coppice.recipe import PRESETS, augmentations, repeats
from coppice.seeding import derive_seed, seeded


def picture(seed: int, size: tuple[int, int] = (12, 12), mode: str = "RGB") -> Image.Image:
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def encoded(seed: int, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture(seed, **options).save(buffer, form)
    return buffer.getvalue()


def write_folder(root: Path, classes=("cat", "dog"), count: int = 10, start: int = 0, **options) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(start + 100 * label + index, **options).save(root / name / f"{index:03}.png")
    return root


def rows(labels, start: int = 0) -> dict[str, list]:
    return {"image": [{"bytes": encoded(start + index), "path": None} for index in range(len(labels))], "label": list(labels)}


def write_parquet(path: Path, data: dict, names: list[str] | None = ("cat", "dog")) -> Path:
    """As `Dataset.to_parquet` writes it: the features in the schema's metadata."""
    import datasets
    import pyarrow.parquet

    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(data).data.table.cast(features.arrow_schema)
    pyarrow.parquet.write_table(table, path)
    return path


def sentence(call, *arguments, **options) -> str:
    with pytest.raises(CoppiceError) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def pixels(dataset) -> list[bytes]:
    return [image.numpy().tobytes() for image, _ in (dataset[index] for index in range(len(dataset)))]


# --- splits ---------------------------------------------------------------------------------------------------------


def test_digits():
    data = load_data("digits")
    assert data.input_shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert len(data.train) + len(data.val) + len(data.test) == 1797
    image, label = data.train[0]
    assert image.dtype == torch.uint8
    assert image.max() > 200  # scaled from 0..16 to 0..255
    assert isinstance(label, int)
    assert not data.mirror


def test_train_and_val_folders_make_val_the_test_part(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", count=3, start=1000)
    data = load_data(str(tmp_path), val_fraction=0.2)
    assert (len(data.train), len(data.val), len(data.test)) == (16, 4, 6)
    assert data.classes == ("cat", "dog")
    assert torch.equal(data.test[0][0], tensor(picture(1000)))
    assert torch.equal(data.test[3][0], tensor(picture(1100)))
    assert [label for _, label in (data.test[index] for index in range(6))] == [0, 0, 0, 1, 1, 1]


def test_three_folders_are_used_as_named(tmp_path):
    for part, count in (("train", 5), ("valid", 2), ("test", 3)):
        write_folder(tmp_path / part, count=count)
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.val), len(data.test)) == (10, 4, 6)


def test_a_flat_folder_is_split_by_the_seed_class_by_class(tmp_path):
    write_folder(tmp_path, count=20)
    data = load_data(str(tmp_path), val_fraction=0.25, seed=1)
    for part, count in ((data.train, 12), (data.val, 4), (data.test, 4)):
        assert torch.bincount(part.labels).tolist() == [count, count]
    everything = pixels(data.train) + pixels(data.val) + pixels(data.test)
    assert len(set(everything)) == 40  # the parts do not overlap
    again = load_data(str(tmp_path), val_fraction=0.25, seed=1)
    other = load_data(str(tmp_path), val_fraction=0.25, seed=2)
    assert pixels(again.val) == pixels(data.val)
    assert pixels(other.val) != pixels(data.val)


def test_a_class_may_be_called_train(tmp_path):
    write_folder(tmp_path, classes=("bus", "train"))
    assert load_data(str(tmp_path)).classes == ("bus", "train")


def test_split_names_given_by_the_user(tmp_path):
    write_folder(tmp_path / "train", count=4)
    write_folder(tmp_path / "val", count=3)
    write_folder(tmp_path / "test", count=2)
    data = load_data(str(tmp_path), split_names={"train": "val", "test": "train"})
    assert len(data.test) == 8
    assert len(data.train) + len(data.val) == 6
    assert "its parts are test, train, val" in sentence(load_data, str(tmp_path), split_names={"test": "holdout"})
    assert "name train, val or test" in sentence(load_data, str(tmp_path), split_names={"tset": "val"})


def test_val_named_as_val_is_not_the_test_part(tmp_path):
    write_folder(tmp_path / "train", count=10)
    write_folder(tmp_path / "val", count=3)
    data = load_data(str(tmp_path), split_names={"val": "val"})
    assert (len(data.train), len(data.val), len(data.test)) == (16, 6, 4)


# --- kinds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.parquet", "test.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("train/0000.parquet", "test/0000.parquet"),
    ],
)
def test_parquet_as_the_hub_lays_it_out(tmp_path, train, test):
    write_parquet(tmp_path / train, rows([0, 1] * 10))
    write_parquet(tmp_path / test, rows([1, 0, 1], start=500))
    data = load_data(str(tmp_path))
    assert data.kind == "parquet"
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 3)
    assert [label for _, label in (data.test[index] for index in range(3))] == [1, 0, 1]
    assert torch.equal(data.test[2][0], tensor(picture(502)))


def test_parquet_shards_and_a_single_file(tmp_path):
    for shard in range(2):
        write_parquet(tmp_path / "data" / f"train-0000{shard}-of-00002.parquet", rows([0, 1] * 5, start=100 * shard))
    data = load_data(str(tmp_path))
    assert len(data.train) + len(data.val) + len(data.test) == 20
    single = load_data(str(tmp_path / "data" / "train-00000-of-00002.parquet"))
    assert len(single.train) + len(single.val) + len(single.test) == 10


def test_parquet_without_class_names(tmp_path):
    write_parquet(tmp_path / "train.parquet", rows([0, 2] * 10), names=None)
    assert load_data(str(tmp_path)).classes == ("0", "1", "2")


def test_a_dataset_saved_by_the_library(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    part = datasets.Dataset.from_dict(rows([0, 1] * 10), features=features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path / "saved"))
    data = load_data(str(tmp_path / "saved"))
    assert data.kind == "arrow"
    assert len(data.test) == 20
    single = load_data(str(tmp_path / "saved" / "train"))
    assert len(single.train) + len(single.val) + len(single.test) == 20
    arrow_file = next((tmp_path / "saved" / "train").glob("*.arrow"))
    assert load_data(str(arrow_file)).classes == ("cat", "dog")


def test_parquet_is_read_without_writing_anything_anywhere_near(tmp_path):
    write_parquet(tmp_path / "data" / "train.parquet", rows([0, 1] * 10))
    before = sorted(tmp_path.rglob("*"))
    load_data(str(tmp_path / "data"))
    assert sorted(tmp_path.rglob("*")) == before


def test_cifar10_as_torchvision_reads_it(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, md5((folder / name).read_bytes()).hexdigest()]

    batch = {"data": images.reshape(40, -1), "labels": [index % 4 for index in range(40)]}
    # torchvision knows the checksums of the real files; these are the checksums of the small ones.
    monkeypatch.setattr(CIFAR10, "train_list", [write("data_batch_1", batch)])
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", batch)])
    name, checksum = write("batches.meta", {"label_names": ["a", "b", "c", "d"]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    data = load_data(str(tmp_path))
    assert data.kind == "cifar10"
    assert data.classes == ("a", "b", "c", "d")
    assert (len(data.train), len(data.val), len(data.test)) == (36, 4, 40)
    assert torch.equal(data.test[7][0], torch.from_numpy(images[7]))
    assert len(load_data(str(folder)).test) == 40
    (folder / "test_batch").write_bytes(b"changed")
    assert "its checksums differ" in sentence(load_data, str(tmp_path))


def test_the_shared_cifar10(shared):
    data = load_data(str(shared / "data" / "cifar10"))
    assert (len(data.train), len(data.val), len(data.test)) == (45000, 5000, 10000)
    assert data.input_shape == (3, 32, 32)
    assert data.classes[0] == "airplane"
    assert torch.bincount(data.val.labels).tolist() == [500] * 10
    assert data.train.in_memory


def test_the_shared_imagenette(shared):
    data = load_data(str(shared / "data" / "imagenette224"))
    assert (len(data.train), len(data.val), len(data.test)) == (2700, 300, 1500)
    assert data.input_shape == (3, 224, 224)
    assert not data.test.in_memory
    part = data.test.subset(range(40))
    first = [images for images, _ in raw_batches(part, range(40), 16)]
    assert part.in_memory
    assert all(torch.equal(a, b) for a, (b, _) in zip(first, raw_batches(part, range(40), 16), strict=True))


# --- what is broken -------------------------------------------------------------------------------------------------


def test_no_data_at_all(tmp_path):
    assert "there is no data at nowhere" in sentence(load_data, "nowhere")
    assert "is empty" in sentence(load_data, str(tmp_path))
    (tmp_path / "file.txt").write_text("x")
    assert "neither a folder nor" in sentence(load_data, str(tmp_path / "file.txt"))


def test_an_empty_class_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "emu").mkdir()
    assert str(tmp_path / "emu") in sentence(load_data, str(tmp_path))


def test_a_class_that_train_lacks_is_named(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val", classes=("cat", "yak"))
    assert str(tmp_path / "val" / "yak") in sentence(load_data, str(tmp_path))


def test_only_a_test_part(tmp_path):
    write_parquet(tmp_path / "test.parquet", rows([0, 1]))
    assert "no training part" in sentence(load_data, str(tmp_path))


def test_an_image_that_is_no_image_is_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "dog" / "004.png").write_text("this is a poem")
    assert str(tmp_path / "dog" / "004.png") in sentence(load_data, str(tmp_path))


def test_an_image_is_named_that_another_library_needs_a_package_for(tmp_path, monkeypatch):
    write_folder(tmp_path)
    (tmp_path / "dog" / "004.png").write_text("this is a poem")
    pils_own = Image.open

    def replaced(content):  # as ultralytics does when it is imported
        try:
            return pils_own(content)
        except UnidentifiedImageError as error:
            raise ModuleNotFoundError("No module named 'pi_heif'") from error

    monkeypatch.setattr(Image, "open", replaced)
    assert str(tmp_path / "dog" / "004.png") in sentence(load_data, str(tmp_path))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_truncated_image_is_named(tmp_path, form):
    write_folder(tmp_path)
    path = tmp_path / "dog" / "004.jpg"
    content = encoded(0, form, size=(12, 12))
    path.write_bytes(content[: len(content) * 2 // 3])
    assert str(path) in sentence(load_data, str(tmp_path))


def test_a_broken_image_of_a_set_too_large_to_decode_at_once_is_named_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("coppice.data.EAGER_BYTES", 1)
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    path = tmp_path / "test" / "dog" / "004.png"
    path.write_bytes(path.read_bytes()[:150])  # its header, with the size, is whole
    data = load_data(str(tmp_path))
    assert str(path) in sentence(lambda: list(batches(data.test, data.preprocess, batch_size=8)))
    path.write_text("this is a poem")
    assert str(path) in sentence(load_data, str(tmp_path))


def test_rows_are_named(tmp_path):
    broken = rows([0, 1] * 4)
    broken["image"][5] = {"bytes": b"no image", "path": None}
    write_parquet(tmp_path / "a" / "train.parquet", broken)
    assert "train.parquet, row 5 is not a readable image" in sentence(load_data, str(tmp_path / "a"))
    write_parquet(tmp_path / "b" / "train.parquet", rows([0, 1, 7, 1]), names=None)
    write_parquet(tmp_path / "b" / "test.parquet", rows([0, 1, 8, 1]), names=None)
    assert "test.parquet, row 2 has the label 8" in sentence(load_data, str(tmp_path / "b"))
    write_parquet(tmp_path / "c" / "train.parquet", rows([0, -1, 1]), names=None)
    assert "train.parquet, row 1 has the label -1" in sentence(load_data, str(tmp_path / "c"))
    write_parquet(tmp_path / "d" / "train.parquet", rows([0, None, 1]), names=None)
    assert "train.parquet, row 1 has no label" in sentence(load_data, str(tmp_path / "d"))


def test_missing_columns_and_files_that_are_no_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": [1]}), tmp_path / "train.parquet")
    assert "has no column 'image': its columns are text, label" in sentence(load_data, str(tmp_path))
    (tmp_path / "train.parquet").write_text("not parquet")
    assert "truncated or not a parquet file" in sentence(load_data, str(tmp_path))


def test_sizes_that_differ_need_a_size(tmp_path):
    write_folder(tmp_path / "cat1")
    root = tmp_path / "cat1"
    picture(3, size=(20, 15)).save(root / "dog" / "004.png")
    assert "004.png is 20x15 pixels, other images are 12x12: give a size" in sentence(load_data, str(root))
    assert load_data(str(root), preprocess=Preprocess(size=12)).input_shape == (3, 12, 12)


def test_sizes_that_differ_are_found_without_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr("coppice.data.EAGER_BYTES", 1)
    write_folder(tmp_path)
    picture(3, size=(20, 15)).save(tmp_path / "dog" / "004.png")
    assert "004.png is 20x15 pixels" in sentence(load_data, str(tmp_path))


def test_one_image_a_class_cannot_be_split(tmp_path):
    write_folder(tmp_path, count=1)
    assert "one image a class" in sentence(load_data, str(tmp_path))


def test_a_validation_fraction_out_of_range():
    assert "between 0 and 1" in sentence(load_data, "digits", val_fraction=1.0)


def test_check_classes():
    data = load_data("digits")
    check_classes(data, 10)
    assert "10 classes and the model 1000 outputs" in sentence(check_classes, data, 1000)


# --- preprocessing --------------------------------------------------------------------------------------------------


def test_preprocess_equals_torchvisions_evaluation_transform(tmp_path):
    from torchvision.transforms import v2

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    write_folder(tmp_path / "train", size=(40, 30))
    write_folder(tmp_path / "test", size=(40, 30), count=3)
    preprocess = Preprocess(size=16, resize=20, mean=mean, std=std)
    data = load_data(str(tmp_path), preprocess=preprocess)
    reference = v2.Compose(
        [v2.Resize(20), v2.CenterCrop(16), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    )
    expected = torch.stack([reference(picture(seed, size=(40, 30))) for seed in (0, 1, 2, 100, 101, 102)])
    x, _ = next(batches(data.test, preprocess))
    torch.testing.assert_close(x, expected)


def test_mean_and_std_apply_to_pixels_between_0_and_1():
    x = Preprocess(mean=(0.5,), std=(0.5,)).normalise(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2))
    assert x.unique().tolist() == [-1.0, 1.0]  # RGB / 127.5 - 1


@pytest.mark.parametrize(
    "settings",
    [{"std": (0.0,)}, {"size": 0}, {"size": 10, "resize": 8}, {"mean": (1.0, 2.0), "std": (1.0, 2.0, 3.0)}, {"std": (float("nan"),)}],
)
def test_preprocessing_that_makes_no_sense(settings):
    sentence(Preprocess, **settings)


def test_preprocess_survives_a_round_trip():
    preprocess = Preprocess(size=16, mean=(0.1, 0.2, 0.3), std=(1.0,))
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess
    assert Preprocess.from_dict(Preprocess().to_dict()) == Preprocess()
    assert "no setting 'sise'" in sentence(Preprocess.from_dict, {"sise": 3})


def test_too_many_means_for_the_channels():
    data = load_data("digits", preprocess=Preprocess(mean=(0.1, 0.2), std=(1.0, 1.0)))
    assert "mean has 2 numbers, the images have" in sentence(lambda: next(batches(data.test, data.preprocess)))


def test_grey_images_have_one_channel_unless_three_means_are_given(tmp_path):
    write_folder(tmp_path, mode="L")
    assert load_data(str(tmp_path)).input_shape == (1, 12, 12)
    assert load_data(str(tmp_path), preprocess=Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3)).input_shape == (3, 12, 12)
    picture(1).save(tmp_path / "dog" / "004.png")
    assert "004.png is in colour, other images in grey" in sentence(load_data, str(tmp_path))


# --- batches and randomness -----------------------------------------------------------------------------------------


def test_batches_do_not_depend_on_what_is_in_memory(tmp_path, monkeypatch):
    write_folder(tmp_path)
    now = load_data(str(tmp_path))
    monkeypatch.setattr("coppice.data.EAGER_BYTES", 1)
    later = load_data(str(tmp_path))
    monkeypatch.setattr("coppice.data.KEPT_BYTES", 1)
    never = load_data(str(tmp_path))
    order = [5, 2, 11, 0, 7, 3, 9]
    expected = list(raw_batches(now.train, order, 3))
    assert [len(y) for _, y in expected] == [3, 3, 1]
    for data in (later, never):
        for (x, y), (u, v) in zip(expected, raw_batches(data.train, order, 3), strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)
    assert not never.train.in_memory


def test_samples_are_drawn_by_the_seed():
    data = load_data("digits")

    def drawn(**options):
        return torch.cat([x for x, _ in sample_batches(data.train, data.preprocess, images=50, batch_size=20, **options)])

    assert drawn(seed=0).shape == (50, 1, 8, 8)
    assert torch.equal(drawn(seed=0), drawn(seed=0))
    assert not torch.equal(drawn(seed=0), drawn(seed=1))
    assert not torch.equal(drawn(seed=0), drawn(seed=0, purpose="batchnorm"))


def test_a_users_batches_pass_through_and_anything_else_is_refused():
    batch = (torch.ones(2, 3), torch.tensor([0, 1]))
    x, y = next(batches([batch], None))
    assert torch.equal(x, batch[0])
    assert torch.equal(y, batch[1])
    assert "must yield pairs" in sentence(lambda: list(batches([torch.ones(2)], None)))
    assert len(list(sample_batches([batch] * 5, None, images=4, seed=0))) == 2


def test_augmentation_is_decided_by_seed_epoch_and_step_alone():
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = make_augmentation("light", (3, 32, 32))
    torch.manual_seed(1)
    first = augment_batch(images, transform, 0, 3, 5)
    before = torch.get_rng_state()
    again = augment_batch(images, transform, 0, 3, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    for address in ((1, 3, 5), (0, 4, 5), (0, 3, 6)):
        assert not torch.equal(augment_batch(images, transform, *address), first)
    same = images[:1].expand(8, -1, -1, -1)
    assert len({image.numpy().tobytes() for image in augment_batch(same, transform, 0, 0, 0)}) > 4  # every image has its own draw


@pytest.mark.parametrize("name", ["light", "standard", "strong", "crop", "none", "colour+trivialaugment+erasing"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 224, 160)])
def test_augmentation_keeps_the_shape(name, shape):
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    result = make_augmentation(name, shape)(image)
    assert result.shape == image.shape
    assert result.dtype == torch.uint8


def test_no_mirror_images_of_digits():
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8) + 1
    transform = make_augmentation("light", (1, 8, 8), mirror=False)
    for seed in range(20):
        with seeded(seed):
            row = transform(image)[0, 4]
        visible = row[row > 0].int()
        assert (visible.diff() == 1).all()  # shifted, never reversed


@pytest.mark.parametrize("name", ["heavy", "crop+", "crop flip", "repeat9"])
def test_an_unknown_augmentation(name):
    assert "choose none, light, standard, strong, auto" in sentence(make_augmentation, name, (3, 8, 8))


def test_the_fewer_images_the_more_augmentation():
    assert augmentations("auto", 1_000) == PRESETS["strong"]
    assert augmentations("auto", 50_000) == PRESETS["standard"]
    assert augmentations("auto", 1_281_167) == PRESETS["light"]


@pytest.mark.parametrize("name", ["mixup", "cutmix", "strong"])
def test_mixed_images_have_mixed_labels(name):
    x = torch.eye(8)[:, :, None, None].expand(8, 8, 16, 16).contiguous()  # image k is 1 in channel k
    with seeded(3):
        mixed, shares = make_mix(name, 8)(x, torch.arange(8))
    assert shares.shape == (8, 8)
    torch.testing.assert_close(mixed.mean((2, 3)), shares)
    assert not torch.equal(shares, torch.eye(8))
    assert make_mix("light", 8) is None


def test_repeats_and_their_limits():
    assert [repeats(name) for name in ("light", "crop+repeat3", "strong")] == [1, 3, 1]
    assert "choose one" in sentence(repeats, "repeat2+repeat3")


def test_seeds_differ_by_address():
    addresses = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 2), (0, "a", 1, 2), (-1,)]
    assert len({derive_seed(*address) for address in addresses}) == len(addresses)
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)
