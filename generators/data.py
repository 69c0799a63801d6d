"""Data sets of pictures: folders, parquet files and Hugging Face data, whole or streamed.

    data = open_dataset("photos/", resolution=64)                 # or *.parquet, "hf:NAME", …
    start_at(data, position=0, rank=0, world=1, seed=0)           # or where a run resumes
    batch = random_batch(data, 16, torch.Generator().manual_seed(0))   # (16, 3, R, R) in [-1, 1]

Letters: B batch, N pictures, R resolution.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from generators.disk import find_files, open_regular
from generators.images import decode, find_images, fit, open_image, to_float
from generators.runs import rows_of_rank

MEMORY_LIMIT = 2 * 1024**3  # bytes; a data set that fits is decoded once and kept in memory
SPLITS = frozenset({"train", "test", "validation", "valid", "val"})


class PictureTensor(Dataset[Tensor]):
    """Pictures decoded once: `pictures` is uint8 (N, 3, R, R)."""

    def __init__(self, pictures: Tensor) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        """uint8 (3, R, R)"""
        return self.pictures[index]


class PictureFiles(Dataset[Tensor]):
    """Pictures decoded when asked for. In place of an unreadable one comes the next readable."""

    def __init__(self, sources: Sequence[Path | bytes], resolution: int) -> None:
        self.sources = sources
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Tensor:
        """uint8 (3, R, R)"""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        for step in range(len(self)):
            try:
                return fit(open_image(self.sources[(index + step) % len(self)]), self.resolution)
            except ValueError as error:
                warnings.warn(f"Skipped a picture. {error}", stacklevel=2)
        raise ValueError("None of the training pictures can be read; check the data.")


class PictureStream(IterableDataset[Tensor]):
    """Pictures of a streamed Hugging Face data set, shuffled in a buffer, epoch after epoch.

    Iterating gives the readable pictures of one epoch, uint8 (3, R, R). `random_batch` takes
    batches from an endless walk instead; `seek` puts that walk where a resumed run has to start.

    rows: a datasets.IterableDataset; its column holds undecoded pictures {"bytes", "path"}
    buffer: pictures held for shuffling; 0 keeps the order
    """

    def __init__(self, rows: Any, resolution: int, column: str = "image", buffer: int = 1000):
        self.rows = rows
        self.resolution = resolution
        self.column = column
        self.buffer = buffer
        self.seek(0)

    def seek(self, position: int, *, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        """Continue the endless walk after `position` pictures of this rank (steps · batch size).

        The pictures passed over are read but not decoded. Each rank sees its own share of rows.
        """
        from datasets.distributed import split_dataset_by_node

        rows = self.rows.shuffle(seed=seed, buffer_size=self.buffer) if self.buffer else self.rows
        rows = split_dataset_by_node(rows, rank=rank, world_size=world_size)
        self._walk = self._endless(rows)
        for _ in range(position):
            next(self._walk)

    def _endless(self, rows: Any) -> Iterator[dict]:
        epoch = 0
        while True:
            rows.set_epoch(epoch)
            empty = True
            for row in rows:
                empty = False
                yield row
            if empty:
                raise ValueError("The streamed data set has no rows; check its name and split.")
            epoch += 1

    def _picture(self, row: dict) -> Tensor | None:
        try:
            return fit(open_image(payload(row[self.column])), self.resolution)
        except ValueError as error:
            warnings.warn(f"Skipped a picture. {error}", stacklevel=2)
            return None

    def __iter__(self) -> Iterator[Tensor]:
        for row in self.rows:
            picture = self._picture(row)
            if picture is not None:
                yield picture

    def take(self, count: int) -> Tensor:
        """The next `count` pictures of the walk, uint8 (count, 3, R, R). An unreadable one is
        replaced by another of the batch, so that a position is always a number of rows."""
        pictures = [self._picture(next(self._walk)) for _ in range(count)]
        readable = [picture for picture in pictures if picture is not None]
        if not readable:
            raise ValueError(f"None of {count} streamed pictures can be read; check the column.")
        return torch.stack([readable[0] if p is None else p for p in pictures])


Pictures = PictureTensor | PictureFiles | PictureStream


def open_dataset(
    spec: str | Path, resolution: int, column: str = "image", split: str | None = None
) -> Pictures:
    """Training pictures of any size as uint8 (3, R, R): central squares, antialiased.

    spec: a folder of pictures | a .parquet file, a folder or a glob of them | a folder written by
        `Dataset.save_to_disk` | "hf:NAME" or "hf:NAME:SPLIT", streamed from the Hugging Face hub
    column: where parquet and Hugging Face data keep the picture
    split: which of several splits (sub-folders, or files named train-*.parquet); by default
        "train" if there is one, else everything

    All but streams are indexable; they are decoded once when the result fits MEMORY_LIMIT.
    Unreadable pictures are skipped with a warning that names them.

    Raises ValueError when there is no such data, column or split, or no picture can be read.
    """
    spec = str(spec)
    if not spec:
        raise ValueError("The data set has no name; give a folder, parquet or hf:NAME.")
    if spec.startswith("hf:"):
        return open_hub(spec, resolution, column, split)
    return _load(open_sources(Path(spec).expanduser(), column, split), resolution)


def open_sources(
    path: Path, column: str = "image", split: str | None = None
) -> Sequence[Path | bytes]:
    """What `open_image` reads, of a folder, of parquet files or of a saved data set; the latter
    two are `Rows`, which have other columns too."""
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return open_saved(path, column, split)
    parquet = frozenset({".parquet"})
    if path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet"))):
        files = _of_split(find_files(path, parquet, "parquet file"), split, path, by_name=True)
        return open_parquet(files, column)
    return _of_split(find_images(path), split, path, by_name=False)


def _of_split(
    files: list[tuple[Path, Path]], split: str | None, path: Path, by_name: bool
) -> list[Path]:
    """The files of a split, told by the first folder's name, or by the file name's first word.
    Files without any such label count as "train"."""
    labels = {}
    for file, relative in files:
        words = [relative.parts[0]] if len(relative.parts) > 1 else []
        words += [re.split(r"[-_.]", file.name)[0]] if by_name else []
        labels[file] = next((word for word in words if word in SPLITS or word == split), "train")
    if split is None and not path.is_dir():
        return list(labels)  # a file or a glob says what is wanted
    kinds = sorted(set(labels.values()))
    wanted = split or ("train" if "train" in kinds else None)
    chosen = [file for file, label in labels.items() if wanted in (None, label)]
    if not chosen:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(kinds)}.")
    return chosen


def _quietly(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call a reader of `datasets` without its progress bars and its log."""
    import datasets

    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return function(*args, **options)
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


class Rows(Sequence[Path | bytes]):
    """One column of a datasets.Dataset as undecoded pictures."""

    def __init__(self, rows: Any, column: str) -> None:
        self.table = rows
        self.rows = _undecoded(rows, column).select_columns(column)
        self.column = column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return payload(self.rows[index][self.column])

    def values(self, name: str) -> list[Any]:
        """Another column, whole. ValueError where there is none of that name."""
        if name not in self.table.column_names:
            names = ", ".join(n for n in self.table.column_names if n != self.column)
            raise ValueError(f"There is no column {name!r} beside the pictures; there is {names}.")
        return list(self.table[name])


def payload(cell: dict | None) -> Path | bytes:
    """{"bytes", "path"} of an Image(decode=False) -> what `open_image` reads."""
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        return b""
    return Path(cell["path"]) if cell["bytes"] is None else cell["bytes"]


def _undecoded(rows: Any, column: str) -> Any:
    import datasets

    names = rows.column_names or []
    if names and column not in names:
        raise ValueError(f"There is no column {column!r} in the data; it has {', '.join(names)}.")
    try:
        return rows.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's derive from these
        raise ValueError(f"Column {column!r} does not hold pictures; name another.") from error


def open_parquet(files: list[Path], column: str) -> Rows:
    import datasets

    names = ", ".join(file.name for file in files[:3])
    for file in files:
        open_regular(file).close()  # pyarrow would wait for a named pipe
    try:
        rows = _quietly(
            datasets.load_dataset, "parquet", data_files=[str(f) for f in files], split="train"
        )
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno:  # of its cache: a full disk
            raise cause from error
        raise ValueError(f"Cannot read {names}: not a parquet file, or damaged.") from error
    return Rows(rows, column)


def open_saved(path: Path, column: str, split: str | None) -> Rows:
    import datasets

    try:
        rows = _quietly(datasets.load_from_disk, str(path))
    except Exception as error:  # it checks little of what it reads
        raise ValueError(
            f"{path} is not a whole folder of Dataset.save_to_disk; write it again."
        ) from error
    if isinstance(rows, datasets.DatasetDict):
        name = split or ("train" if "train" in rows or len(rows) != 1 else next(iter(rows)))
        if name not in rows:
            raise ValueError(f"{path} has no split {name!r}; it has {', '.join(rows)}.")
        rows = rows[name]
    return Rows(rows, column)


def open_hub(spec: str, resolution: int, column: str, split: str | None) -> PictureStream:
    import datasets

    _, name, *rest = spec.split(":")
    split = split or (rest[0] if rest else "train")
    try:
        rows = _quietly(datasets.load_dataset, name, split=split, streaming=True)
    except Exception as error:  # the hub's client raises types of three libraries
        raise ValueError(
            f"Cannot open data set {name!r}, split {split!r}, on the Hugging Face hub; check the "
            "name and the network, or download it and give its folder."
        ) from error
    return PictureStream(_undecoded(rows, column), resolution, column)


def _load(sources: Sequence[Path | bytes], resolution: int) -> PictureTensor | PictureFiles:
    """Decode everything, with threads, if the result fits in memory; otherwise item by item."""
    if len(sources) * 3 * resolution**2 > MEMORY_LIMIT:
        return PictureFiles(sources, resolution)
    pictures = torch.empty(len(sources), 3, resolution, resolution, dtype=torch.uint8)

    def fill(index: int) -> str | None:
        """Fill one place; returns the reason when it cannot."""
        source = sources[index]
        name = f"row {index}" if isinstance(source, bytes) else str(source)
        try:
            pictures[index] = fit(decode(source, name), resolution)
        except ValueError as error:
            return str(error)
        return None

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")
        reasons = list(pool.map(fill, range(len(sources))))
    bad = [reason for reason in reasons if reason is not None]
    if len(bad) == len(sources):
        raise ValueError(f"No training picture can be read. {bad[0] if bad else 'There is none.'}")
    if bad:
        more = f" (and {len(bad) - 10} more)" if len(bad) > 10 else ""
        warnings.warn(
            f"Skipped {len(bad)} of {len(sources)} pictures. {' '.join(bad[:10])}{more}",
            stacklevel=3,
        )
        pictures = pictures[torch.tensor([reason is None for reason in reasons])]
    return PictureTensor(pictures)


def random_batch(
    dataset: Pictures, batch_size: int, generator: torch.Generator, rank: int = 0, world: int = 1
) -> Tensor:
    """Draw this rank's share of a batch, (B / world, 3, R, R) in [-1, 1], mirrored by chance.

    batch_size: of all ranks together, a multiple of `world`
    generator: the same on all ranks; one seeded by (seed, step) makes resuming exact

    Indices and mirroring are drawn for the whole batch, hence the same for any number of ranks;
    only the rank's own pictures are decoded. A stream gives its next pictures instead: tell it
    first where to begin, by `start_at`.
    """
    if isinstance(dataset, PictureStream):
        images = dataset.take(batch_size // world)
    else:
        indices = torch.randint(len(dataset), (batch_size,), generator=generator)
        indices = rows_of_rank(indices, rank, world)
        if isinstance(dataset, PictureTensor):
            images = dataset.pictures[indices]
        else:
            images = torch.stack([dataset[i] for i in indices.tolist()])
    flipped = torch.rand(batch_size, 1, 1, 1, generator=generator) < 0.5
    return to_float(torch.where(rows_of_rank(flipped, rank, world), images.flip(-1), images))


def first_pictures(dataset: Pictures, count: int) -> Tensor:
    """The same pictures at each call, (N, 3, R, R) in [-1, 1]: `count` of them, evenly spread, or
    all if there are fewer. Of a stream the first readable ones; its walk stays where it is."""
    if isinstance(dataset, PictureStream):
        pictures = list(islice(dataset, count))
        if not pictures:
            raise ValueError("None of the streamed pictures can be read; check the column.")
    else:
        count = min(count, len(dataset))
        pictures = [dataset[i * len(dataset) // count] for i in range(count)]
    return to_float(torch.stack(pictures))


def named_pictures(
    source: str | Path, count: int | None, resolution: int
) -> tuple[list[str], Tensor]:
    """Names and pictures (N, 3, R, R) in [-1, 1]: `count` of them, evenly spread, or all.

    A folder's names are relative paths without suffix; others are row numbers among the readable
    rows. ValueError for a stream, and for a picture of a folder that cannot be read.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and not any(folder.rglob("*.parquet")):
        files = find_images(folder)
        count = min(count or len(files), len(files))
        files = [files[i * len(files) // count] for i in range(count)]
        pixels = torch.stack([fit(open_image(file), resolution) for file, _ in files])
        return [name_of(relative) for _, relative in files], to_float(pixels)
    dataset = open_dataset(source, resolution)
    if isinstance(dataset, PictureStream):
        raise ValueError("A stream has no evenly spread pictures; give a folder or parquet files.")
    size = len(dataset)
    count = min(count or size, size)
    return [str(i * size // count) for i in range(count)], first_pictures(dataset, count)


def name_of(path: Path) -> str:
    """A relative path as a picture is named by: without suffix, with forward slashes."""
    return path.with_suffix("").as_posix()


def start_at(dataset: Pictures, position: int, rank: int, world: int, seed: int) -> None:
    """Put a stream where a run stands after `position` pictures of this rank, and share it out
    among the ranks. Other data sets need nothing: their batches are drawn anew."""
    if isinstance(dataset, PictureStream):
        dataset.seek(position, rank=rank, world_size=world, seed=seed)
