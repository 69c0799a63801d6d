"""The training data sets: every kind of source, splits, batches, streams.

pytest tests/test_data.py
"""

import errno
import os
import warnings

import datasets
import pytest
import torch
from pictures import encoded, photo

from generators import data
from generators.data import (
    PictureFiles,
    PictureStream,
    PictureTensor,
    first_pictures,
    open_dataset,
    random_batch,
    start_at,
)
from generators.images import fit, to_float


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` caches out of the home folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows(count: int = 5, bad: tuple[int, ...] = ()) -> datasets.Dataset:
    """Lossless WebP pictures of mixed sizes under "image"; a text column too."""
    cells = [
        {"bytes": b"damaged" if i in bad else encoded(photo(i, 16 + i, 16), lossless=True)}
        for i in range(count)
    ]
    features = datasets.Features({"image": datasets.Image(), "source": datasets.Value("string")})
    cells = [cell | {"path": None} for cell in cells]
    return datasets.Dataset.from_dict({"image": cells, "source": ["a"] * count}, features)


def square(index: int) -> torch.Tensor:
    """What picture `index` of `rows` becomes at resolution 16: its middle."""
    return fit(photo(index, 16 + index, 16), 16)


def check(dataset: PictureTensor | PictureFiles, expected: list[int]) -> None:
    assert len(dataset) == len(expected)
    for place, index in enumerate(expected):
        assert dataset[place].dtype == torch.uint8
        assert torch.equal(dataset[place], square(index))


@pytest.mark.parametrize("limit, kind", [(2**30, PictureTensor), (0, PictureFiles)])
def test_every_kind_of_source_gives_the_same(tmp_path, monkeypatch, limit, kind):
    monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
    (tmp_path / "folder").mkdir()
    (tmp_path / "parquets").mkdir()
    for i in range(5):
        photo(i, 16 + i, 16).save(tmp_path / "folder" / f"{i}.png")
    rows().to_parquet(tmp_path / "all.parquet")
    rows().select([0, 1]).to_parquet(tmp_path / "parquets" / "0.parquet")
    rows().select([2, 3, 4]).to_parquet(tmp_path / "parquets" / "1.parquet")
    rows().save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows(), test=rows(2)).save_to_disk(tmp_path / "splits")
    for name in ("folder", "all.parquet", "parquets", "parquets/*.parquet", "saved", "splits"):
        dataset = open_dataset(f"{tmp_path}/{name}", 16)
        assert isinstance(dataset, kind), name
        check(dataset, [0, 1, 2, 3, 4])


def test_splits(tmp_path):
    rows(4).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    rows(2).to_parquet(tmp_path / "test.parquet")
    datasets.DatasetDict(a=rows(1), b=rows(3)).save_to_disk(tmp_path / "saved" / "x")
    check(open_dataset(tmp_path, 16), [0, 1, 2, 3])  # the test pictures stay out
    check(open_dataset(tmp_path, 16, split="test"), [0, 1])
    assert len(open_dataset(f"{tmp_path}/*.parquet", 16)) == 6  # as asked for
    assert len(open_dataset(tmp_path / "test.parquet", 16)) == 2
    assert len(open_dataset(tmp_path / "saved" / "x", 16, split="b")) == 3
    with pytest.raises(ValueError, match="no split 'val'; it has test, train"):
        open_dataset(tmp_path, 16, split="val")
    with pytest.raises(ValueError, match="no split 'train'; it has a, b"):
        open_dataset(tmp_path / "saved" / "x", 16)


def test_splits_of_a_folder_of_pictures(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        photo().save(tmp_path / name / "test-1.png")
    assert len(open_dataset(tmp_path, 16)) == 1
    assert len(open_dataset(tmp_path / "test", 16)) == 1


def test_unreadable_pictures_of_a_folder_are_named(folder):
    with pytest.warns(
        UserWarning, match=r"Skipped 1 of 3 pictures.*broken\.png: the file is empty"
    ):
        assert len(open_dataset(folder, 16)) == 2


@pytest.mark.parametrize("limit", [2**30, 0])
def test_unreadable_rows_are_skipped(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
    rows(4, bad=(1, 3)).to_parquet(tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="Skipped"):
        dataset = open_dataset(tmp_path / "a.parquet", 16)
        shown = [dataset[i] for i in range(len(dataset))]
    expected = [0, 2] if limit else [0, 2, 2, 0]
    assert all(torch.equal(a, square(b)) for a, b in zip(shown, expected, strict=True))


def test_empty_and_wrong_data_end_in_a_sentence(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="No training picture can be read"):
        open_dataset(tmp_path / "broken", 16)
    with pytest.raises(ValueError, match="No picture found"):
        (tmp_path / "empty").mkdir()
        open_dataset(tmp_path / "empty", 16)
    with pytest.raises(ValueError, match="no file or folder"):
        open_dataset(tmp_path / "none.parquet", 16)
    rows().to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column 'photo' in the data; it has image, source"):
        open_dataset(tmp_path / "a.parquet", 16, column="photo")
    datasets.Dataset.from_dict({"image": [1, 2]}).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(ValueError, match="does not hold pictures"):
        open_dataset(tmp_path / "numbers.parquet", 16)
    (tmp_path / "rubbish.parquet").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"Cannot read rubbish\.parquet"):
        open_dataset(tmp_path / "rubbish.parquet", 16)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_random_batch_is_a_function_of_the_generator():
    pictures = torch.stack([square(i) for i in range(5)])
    batch = random_batch(PictureTensor(pictures), 64, seeded(1))
    assert batch.shape == (64, 3, 16, 16) and batch.dtype == torch.float32
    assert torch.equal(batch, random_batch(PictureTensor(pictures), 64, seeded(1)))
    assert not torch.equal(batch, random_batch(PictureTensor(pictures), 64, seeded(2)))
    floats = to_float(pictures)
    plain = (batch[:, None] == floats).flatten(2).all(2).any(1)
    mirrored = (batch[:, None] == floats.flip(-1)).flatten(2).all(2).any(1)
    assert (plain ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_random_batch_from_files_equals_that_from_memory(tmp_path):
    files = []
    for i in range(3):
        photo(i, 16, 16).save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    memory = open_dataset(tmp_path, 16)
    lazy = PictureFiles(files, 16)
    assert torch.equal(random_batch(memory, 8, seeded(0)), random_batch(lazy, 8, seeded(0)))


@pytest.fixture
def hub(monkeypatch):
    """A hub that has one data set, of 5 rows."""

    def load(name: str, split: str, streaming: bool):
        if name != "some/faces" or split not in ("train", "tiny"):
            raise ConnectionError("no network")
        return rows(5 if split == "train" else 2, bad=(1,)).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_stream(hub):
    stream = open_dataset("hf:some/faces", 16)
    assert isinstance(stream, PictureStream)
    with pytest.warns(UserWarning, match="Skipped a picture"):
        assert all(torch.equal(p, square(i)) for p, i in zip(stream, (0, 2, 3, 4), strict=True))
        assert len(list(open_dataset("hf:some/faces:tiny", 16))) == 1


@pytest.mark.filterwarnings("ignore:Skipped")
def test_stream_resumes_exactly(hub):
    """Eight batches of 2 run through three epochs of 5; a new stream continues after any step."""
    stream = open_dataset("hf:some/faces", 16)
    whole = [random_batch(stream, 2, seeded(step)) for step in range(8)]
    for start in (0, 1, 3, 6):
        again = open_dataset("hf:some/faces", 16)
        again.seek(start * 2)
        rest = [random_batch(again, 2, seeded(step)) for step in range(start, 8)]
        assert torch.equal(torch.stack(rest), torch.stack(whole[start:]))


@pytest.mark.filterwarnings("ignore:Skipped")
def test_each_epoch_of_a_stream_has_its_own_order(hub):
    stream = open_dataset("hf:some/faces", 16)
    epochs = [stream.take(5).flatten(1).sum(1).tolist() for _ in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_ranks_share_a_stream(hub):
    stream = PictureStream(rows(4).to_iterable_dataset().cast_column(
        "image", datasets.Image(decode=False)), 16)  # fmt: skip
    seen = []
    for rank in (0, 1):
        stream.seek(0, rank=rank, world_size=2)
        seen += list(stream.take(2))
    assert sorted(p.sum().item() for p in seen) == sorted(square(i).sum().item() for i in range(4))


def test_no_network_is_a_sentence(hub):
    with pytest.raises(ValueError, match="check the name and the network"):
        open_dataset("hf:some/other", 16)


def test_decoding_does_not_change_the_warning_filters(folder):
    before = list(warnings.filters)
    with pytest.warns(UserWarning):
        open_dataset(folder, 16)
    assert warnings.filters == before


def sources(tmp_path) -> list[PictureTensor | PictureFiles]:
    """Five pictures in memory, and the same in files."""
    for i in range(5):
        photo(i, 16 + i, 16).save(tmp_path / f"{i}.png")
    return [open_dataset(tmp_path, 16), PictureFiles(sorted(tmp_path.glob("*.png")), 16)]


def test_ranks_share_a_batch(tmp_path):
    for dataset in sources(tmp_path):
        whole = random_batch(dataset, 8, seeded(3))
        parts = [random_batch(dataset, 8, seeded(3), rank, 4) for rank in range(4)]
        assert [len(part) for part in parts] == [2] * 4
        assert torch.equal(torch.cat(parts), whole)


def test_what_is_drawn_after_a_batch_is_the_same_on_every_rank():
    generators = [seeded(0), seeded(0)]
    for rank, generator in enumerate(generators):
        random_batch(PictureTensor(square(0)[None]), 4, generator, rank, 2)
    assert torch.equal(*(torch.rand(3, generator=generator) for generator in generators))


def test_first_pictures_are_spread_and_fixed(tmp_path):
    for dataset in sources(tmp_path):
        floats = to_float(torch.stack([square(i) for i in (0, 2)]))
        assert torch.equal(first_pictures(dataset, 2), floats)
        assert first_pictures(dataset, 9).shape == (5, 3, 16, 16)
        start_at(dataset, 4, 0, 1, 0)  # nothing to move


@pytest.mark.filterwarnings("ignore:Skipped")
def test_first_pictures_of_a_stream_leave_its_walk(hub):
    stream, other = open_dataset("hf:some/faces", 16), open_dataset("hf:some/faces", 16)
    for dataset in (stream, other):
        start_at(dataset, 0, 0, 1, seed=4)
    walk = [other.take(2) for _ in range(6)]
    for expected in walk:
        assert torch.equal(stream.take(2), expected)
        assert torch.equal(first_pictures(stream, 2), to_float(torch.stack([square(0), square(2)])))


@pytest.mark.filterwarnings("ignore:Skipped")
def test_start_at_resumes_every_rank(hub):
    stream = open_dataset("hf:some/faces", 16)
    for rank in (0, 1):
        start_at(stream, 0, rank, 2, seed=1)
        whole = [random_batch(stream, 4, seeded(step), rank, 2) for step in range(4)]
        assert whole[0].shape == (2, 3, 16, 16)
        start_at(stream, 2 * 2, rank, 2, seed=1)
        rest = [random_batch(stream, 4, seeded(step), rank, 2) for step in (2, 3)]
        assert torch.equal(torch.stack(rest), torch.stack(whole[2:]))


def test_a_named_pipe_is_no_parquet_file_to_wait_for(tmp_path):
    os.mkfifo(tmp_path / "a.parquet")
    for spec in (tmp_path, tmp_path / "a.parquet"):
        with pytest.raises(OSError, match="it is a pipe, a socket or a device, not a file"):
            open_dataset(spec, 8)


def test_a_row_that_names_a_pipe_or_a_device_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    cells = [{"bytes": encoded(photo(1)), "path": None}]
    cells += [{"bytes": None, "path": str(path)} for path in (tmp_path / "pipe.png", "/dev/zero")]
    rows = datasets.Dataset.from_dict({"image": cells})
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    with pytest.warns(UserWarning, match=r"Skipped 2 of 3 pictures\. .*pipe\.png"):
        assert len(open_dataset(tmp_path / "rows.parquet", 16)) == 1


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize("content", [b"[1]", b"{}", b'{"splits": 5}', b"\xff", b"garbage"])
def test_a_damaged_saved_data_set_ends_in_a_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="is not a whole folder of Dataset"):
        open_dataset(tmp_path, 16)


def test_a_full_disk_is_not_called_a_damaged_file(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").touch()

    def full(*_, **__):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("failed") from error

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(OSError, match="No space left"):
        open_dataset(tmp_path / "rows.parquet", 16)
