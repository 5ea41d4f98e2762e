"""Where labelled images come from: class folders, Hugging Face parquet and arrow files, CIFAR-10's batches, scikit-learn's digits.

Each reader lists what is there without decoding a pixel; `data.py` makes splits of it. A new kind of data is one more reader.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coppice.errors import CoppiceError

if TYPE_CHECKING:
    from datasets import Dataset as ArrowDataset

# What people call the parts of a data set, as folders and as files.
SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}
_ALL_SPLIT_NAMES = frozenset(name for names in SPLIT_NAMES.values() for name in names)
WHOLE = "all"  # the name of the only part of data that comes in one piece

_IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))  # as torchvision's ImageFolder


@dataclass(frozen=True)
class Examples:
    """One named part of a data set, not yet decoded."""

    labels: Sequence[int]
    read: Callable[[int], bytes | np.ndarray]  # index -> encoded image, or its pixels (HWC or HW); may raise OSError or ValueError
    name: Callable[[int], str]  # index -> where the image lies, for messages


@dataclass(frozen=True)
class Source:
    kind: str  # "folder", "parquet", "arrow", "cifar10" or "digits"
    classes: tuple[str, ...]
    parts: dict[str, Examples]
    mirror: bool = True  # whether a mirrored image is still of its class


def open_source(spec: str) -> Source:
    """List the labelled images that `spec` names: "digits", or the path of a folder or a file. Raises CoppiceError."""
    if spec == "digits":
        return _digits()
    path = Path(spec).expanduser()
    if not path.exists():
        raise CoppiceError(f"there is no data at {spec}: give a folder, a parquet or arrow file, or the word digits")
    if path.is_file():
        if path.suffix not in (".parquet", ".arrow"):
            raise CoppiceError(f"{spec} is neither a folder nor a .parquet or .arrow file")
        return _table_files(path.parent, [path])
    if path.name == _CIFAR10 or (path / _CIFAR10).is_dir():
        return _cifar10(path.parent if path.name == _CIFAR10 else path)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_dataset(path)
    files = sorted(file for pattern in ("*.parquet", "*.arrow") for depth in ("", "*/", "*/*/") for file in path.glob(depth + pattern))
    return _table_files(path, files) if files else _folder(path)


# --- class folders --------------------------------------------------------------------------------------------------


def _folder(root: Path) -> Source:
    """DIR/<split>/<class>/*, or DIR/<class>/* in one piece. The classes are the sorted folder names (of train)."""
    folders = _subfolders(root)
    if not folders:
        raise CoppiceError(f"{root} is empty: it has no folders with images")
    # A class may be called "train": the folder is a split only if it holds folders itself.
    splits = {folder.name: folder for folder in folders if folder.name.lower() in _ALL_SPLIT_NAMES and _subfolders(folder)}
    trains = [folder for name, folder in splits.items() if name.lower() in SPLIT_NAMES["train"]]
    named = splits if trains else {WHOLE: root}
    classes = tuple(folder.name for folder in _subfolders(trains[0] if trains else root))
    parts = {}
    for name, folder in named.items():
        files, labels = _class_files(folder, classes)
        parts[name] = Examples(labels, partial(_file_content, files), partial(_file_name, files))
    return Source("folder", classes, parts)


def _class_files(folder: Path, classes: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    files: list[Path] = []
    labels: list[int] = []
    for class_folder in _subfolders(folder):
        if class_folder.name not in classes:
            raise CoppiceError(f"{class_folder} is a class that the training folder does not have")
        found = sorted(file for file in class_folder.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES and file.is_file())
        if not found:
            raise CoppiceError(f"{class_folder} is empty: it has no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
        files += found
        labels += [classes.index(class_folder.name)] * len(found)
    return files, labels


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _file_content(files: Sequence[Path], index: int) -> bytes:
    return files[index].read_bytes()


def _file_name(files: Sequence[Path], index: int) -> str:
    return str(files[index])


# --- Hugging Face parquet and arrow ---------------------------------------------------------------------------------


def _table_files(root: Path, files: Sequence[Path]) -> Source:
    """Parquet or arrow files; the split is told by the file's or its folder's name.

    For example train.parquet, data/test-00000-of-00002.parquet, val/0000.parquet.
    """
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file, root), []).append(file)
    parts = {name: [(str(file), _read_table(file)) for file in group] for name, group in by_split.items()}
    return _table_source("arrow" if files[0].suffix == ".arrow" else "parquet", parts, root)


def _split_of(file: Path, root: Path) -> str:
    for part in reversed(file.relative_to(root).with_suffix("").parts):
        word = part.lower().replace("_", "-").replace(".", "-").split("-")[0]
        if word in _ALL_SPLIT_NAMES:
            return word
    return WHOLE


def _read_table(file: Path) -> "ArrowDataset":
    """One file as a `datasets.Dataset`, with nothing fetched and nothing written: its own loaders would copy the data into a cache."""
    datasets = _datasets_package()
    import pyarrow
    import pyarrow.parquet

    try:
        if file.suffix == ".arrow":
            return datasets.Dataset.from_file(str(file))  # memory-mapped
        return datasets.Dataset(pyarrow.parquet.read_table(file))
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise CoppiceError(
            f"{file} is truncated or not a {file.suffix[1:]} file of the datasets library: {str(error).splitlines()[0]}"
        ) from error


def _saved_dataset(root: Path) -> Source:
    """A folder written by `save_to_disk` of the datasets library."""
    datasets = _datasets_package()
    import pyarrow

    try:
        loaded = datasets.load_from_disk(str(root))
    except (pyarrow.ArrowException, OSError, ValueError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise CoppiceError(f"{root} could not be read as a saved dataset: {str(error).splitlines()[0]}") from error
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {WHOLE: loaded}
    return _table_source("arrow", {name: [(f"{root} ({name})", part)] for name, part in parts.items()}, root)


def _datasets_package() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CoppiceError("parquet and arrow data need the datasets package: pip install datasets") from error
    return datasets


def _table_source(kind: str, parts: dict[str, list[tuple[str, "ArrowDataset"]]], root: Path) -> Source:
    tables = {name: [_Table(where, data, root) for where, data in group] for name, group in parts.items()}
    reference = next((group for name, group in tables.items() if name in SPLIT_NAMES["train"]), next(iter(tables.values())))
    classes = reference[0].class_names or _names_of(np.concatenate([table.raw_labels for table in reference]), reference[0].where)
    return Source(kind, classes, {name: _table_examples(group, classes) for name, group in tables.items()})


def _names_of(labels: np.ndarray, where: str) -> tuple[str, ...]:
    """Class names where the schema has none: the sorted strings, or the numbers up to the largest."""
    if labels.size == 0:
        raise CoppiceError(f"{where} is empty: it has no rows")
    if labels.dtype.kind in "iu":
        return tuple(str(label) for label in range(int(labels.max()) + 1))
    return tuple(sorted(set(labels.tolist())))


def _table_examples(tables: Sequence["_Table"], classes: tuple[str, ...]) -> Examples:
    labels: list[int] = []
    rows: list[tuple[_Table, int]] = []
    for table in tables:
        labels += table.labels(classes)
        rows += [(table, row) for row in range(len(table.raw_labels))]
    return Examples(
        labels, lambda index: rows[index][0].content(rows[index][1]), lambda index: f"{rows[index][0].where}, row {rows[index][1]}"
    )


class _Table:
    """The image and label columns of one parquet or arrow file."""

    def __init__(self, where: str, data: "ArrowDataset", root: Path) -> None:
        datasets = _datasets_package()
        import pyarrow.compute

        self.where = where
        self._root = root
        image = self._column(data, "image", datasets.Image)
        label = self._column(data, "label", datasets.ClassLabel)
        feature = data.features[label]
        self.class_names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        try:
            table = data.cast_column(image, datasets.Image(decode=False)).with_format("arrow")[:]
        except (TypeError, ValueError, pyarrow.ArrowException) as error:
            raise CoppiceError(f"{where}: the column {image!r} holds no images ({str(error).splitlines()[0]})") from error
        self._bytes = pyarrow.compute.struct_field(table[image], "bytes")
        self._paths = pyarrow.compute.struct_field(table[image], "path")
        self.raw_labels = self._read_labels(table[label], label)

    def _column(self, data: "ArrowDataset", name: str, feature: type) -> str:
        """The column called `name`, or else the only one of its kind (CIFAR-10 on the hub calls its images `img`)."""
        if name in data.column_names:
            return name
        typed = [column for column, kind in data.features.items() if isinstance(kind, feature)]
        if len(typed) != 1:
            raise CoppiceError(f"{self.where} has no column {name!r}: its columns are {', '.join(data.column_names)}")
        return str(typed[0])

    def _read_labels(self, column: Any, name: str) -> np.ndarray:
        if column.null_count:
            row = next(row for row, value in enumerate(column) if not value.is_valid)
            raise CoppiceError(f"{self.where}, row {row} has no label")
        labels = np.asarray(column.to_pylist())
        if labels.size and labels.dtype.kind not in "iuU":
            raise CoppiceError(f"{self.where}: the column {name!r} holds {column.type}, not whole numbers or class names")
        return labels

    def labels(self, classes: tuple[str, ...]) -> list[int]:
        if self.raw_labels.dtype.kind == "U":
            number = {name: index for index, name in enumerate(classes)}
            labels = [number.get(name, -1) for name in self.raw_labels.tolist()]
        else:
            labels = self.raw_labels.tolist()
        for row, label in enumerate(labels):
            if not 0 <= label < len(classes):
                raise CoppiceError(
                    f"{self.where}, row {row} has the label {self.raw_labels[row]}, which is none of the {len(classes)} classes"
                )
        return [int(label) for label in labels]

    def content(self, row: int) -> bytes:
        content = self._bytes[row].as_py()
        if content is not None:
            return bytes(content)
        path = self._paths[row].as_py()
        if path is None:
            raise ValueError("there is no image in this row")
        return (self._root / str(path)).read_bytes()


# --- arrays ---------------------------------------------------------------------------------------------------------

_CIFAR10 = "cifar-10-batches-py"


def _cifar10(root: Path) -> Source:
    """CIFAR-10 as torchvision reads it; its checksums are compared before the batches, which are pickles, are opened."""
    from torchvision.datasets import CIFAR10

    try:
        splits = {"train": CIFAR10(str(root), train=True), "test": CIFAR10(str(root), train=False)}
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise CoppiceError(f"{root / _CIFAR10} is incomplete or was changed (its checksums differ): unpack CIFAR-10 again") from error
    parts = {name: _array_examples(data.data, data.targets, f"{root / _CIFAR10} ({name})") for name, data in splits.items()}
    return Source("cifar10", tuple(splits["train"].classes), parts)


def _digits() -> Source:
    """scikit-learn's embedded digits: 1,797 grey images of 8 x 8, pixels 0 to 16 scaled to 0 to 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CoppiceError("the digits need the scikit-learn package: pip install scikit-learn") from error
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    return Source("digits", tuple("0123456789"), {WHOLE: _array_examples(pixels, digits.target.tolist(), "digits")}, mirror=False)


def _array_examples(pixels: np.ndarray, labels: Sequence[int], where: str) -> Examples:
    return Examples(labels, lambda index: pixels[index], lambda index: f"{where}, image {index}")
