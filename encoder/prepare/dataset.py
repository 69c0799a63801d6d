"""Raw pictures to a data set of aligned crops: find faces, cut, drop what is poor or repeated.

    python -m encoder.prepare --data photos/ --output faces --size 256 --workers 4
    python -m encoder.prepare --data drawings.tar.gz --output anime --detector cascade \\
        --cascade lbpcascade_animeface.xml --upscaler x4.safetensors
    python -m encoder.prepare --data crops.parquet --output square --detector none

Train on OUT/data. OUT/report.html and the two contact sheets show what was taken and what was not,
OUT/rejected.jsonl names every rejected picture with its reason. The result is the same for any
number of workers; after an interruption the same command goes on. Cascades and upscalers need
`pip install '.[prepare]'`.
"""

import json
import multiprocessing
import os
import shutil
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from encoder.prepare.crops import (
    COLUMNS,
    FEATURES,
    SHARD_SCHEMA,
    CropConfig,
    Detector,
    Row,
    Upscaler,
    examine,
    load_upscaler,
)
from encoder.prepare.report import summarise, with_images, write_report
from encoder.prepare.sources import Raw, find_sources
from generators.command import command, console, worker_processes
from generators.disk import held, write_atomically

SHARDS = ".shards"  # folder in the output, until all is done
SHARD = 32  # inputs that are done, or done again after a kill, together …
SHARD_BYTES = 256 * 1024**2  # … or as many as have that size
ROWS = 1000  # crops per parquet file


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(CropConfig):
    data: str  # folder, .zip, .tar, .tar.gz, .parquet, saved Hugging Face data set, or hf:NAME
    output: Path  # folder, made if need be
    duplicates: int = 4  # bits of 64 that a repeated crop may differ in; -1: keep all
    format: Literal["parquet", "folder"] = "parquet"  # of OUT/data; folder: PNG and metadata.jsonl
    column: str = "image"  # of parquet and Hugging Face data
    workers: int = 1  # processes, up to 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.workers <= 256:
            raise ValueError("--workers is 1 to 256.")
        if not -1 <= self.duplicates <= 16:
            raise ValueError("--duplicates is a number of bits from 0 to 16, or -1 to keep all.")


# -------------------------------------------------------------------- many, in processes

Job = list[tuple[str, Path | bytes | None, str]]  # name, source, or None and why there is none


@cache
def tools(config: PrepareConfig) -> tuple[Detector, Upscaler | None]:
    """Made once in each process. Raises ValueError where one cannot be had."""
    upscaler = load_upscaler(config.upscaler, config.device) if config.upscaler else None
    return config.load_detector(), upscaler


def make_shard(config: PrepareConfig, file: Path, job: Job) -> int:
    """Writes the rows of a few inputs; returns the number of inputs."""
    rows = []
    for name, source, reason in job:
        if source is None:
            rows.append(Row(name, reason=reason))
        else:
            rows += examine(name, source, config, *tools(config))
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=SHARD_SCHEMA)
    write_atomically(file, partial(pq.write_table, table))
    return len(job)


def make_shards(config: PrepareConfig, advance: Callable[[int], None]) -> list[Path]:
    """All shards in order, missing ones newly made; calls advance(inputs done)."""
    tools(config)  # a wrong set-up ends here
    shards: list[Path] = []
    sources = find_sources(config.data, config.column)
    pending: deque[Future[int]] = deque()
    folder = config.output / SHARDS
    with _tidy(folder), _one_thread(), worker_processes(config.workers, "spawn", _begin) as submit:
        while True:
            file = folder / f"{len(shards):06d}.parquet"
            # a shard that is there is passed over, once it is seen to be of the same inputs
            if names := _names(file):
                found = [raw.name for raw in islice(sources, len(names))]
                if found != names:
                    raise ValueError(
                        f"{config.data} has changed since {config.output} was begun; "
                        "give another --output."
                    )
                advance(len(names))
            elif job := _next_job(sources):
                if config.workers == 1:
                    advance(make_shard(config, file, job))
                else:
                    pending.append(submit(make_shard, config, file, job))
                if len(pending) >= 2 * config.workers:  # no more pictures in memory than that
                    advance(pending.popleft().result())
            else:
                break
            shards.append(file)
        for future in pending:
            advance(future.result())
    return shards


def _next_job(sources: Iterator[Raw]) -> Job:
    """The next SHARD inputs, or fewer if they are large; none at the end."""
    job: Job = []
    size = 0
    while len(job) < SHARD and size < SHARD_BYTES and (raw := next(sources, None)):
        try:
            source = raw.read()
            job.append((raw.name, source, ""))
            size += len(source) if isinstance(source, bytes) else 0
        except ValueError as error:
            job.append((raw.name, None, str(error)))
    return job


def _names(shard: Path) -> list[str]:
    """Its inputs; each has one row that is its first face or its only row. None: make it anew."""
    try:
        rows = pq.read_table(shard, columns=["source", "face"]).to_pylist()
    except (OSError, pa.ArrowException):  # missing, or damaged
        return []
    return [row["source"] for row in rows if row["face"] == 0]


@contextmanager
def _tidy(folder: Path) -> Iterator[None]:
    """Leaves no temporary file of workers that were ended while they wrote."""
    try:
        yield
    finally:
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Here as in the workers: sums depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _begin() -> None:
    """First act of a worker process."""

    def follow() -> None:  # without it a killed parent's workers wait for ever
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)


# ------------------------------------------------------------------------- the data set


def prepare(config: PrepareConfig, advance: Callable[[int], None] = lambda _: None) -> dict:
    """Runs or resumes the preparation; returns what summary.json holds.

    Raises ValueError when the data cannot be found, the output is not this preparation's, or no
    picture is accepted (then after the report is written).
    """
    _check(config)
    output, finished = config.output, config.output / "summary.json"
    with held(output):
        _claim(config)
        if not finished.exists():
            shards = make_shards(config, advance)
            if not shards:
                raise ValueError(f"There is no file in {config.data}.")
            names = [name for name in SHARD_SCHEMA.names if name != "image"]
            rows = [row for f in shards for row in pq.read_table(f, columns=names).to_pylist()]
            reject_duplicates(rows, config.duplicates)
            summary = summarise(rows)
            write_data(config, shards, rows)
            write_report(output, Path(config.data).name, shards, rows, summary)
            write_json(finished, summary)
        shutil.rmtree(output / SHARDS, ignore_errors=True)
        summary = read_json(finished)
    if not summary.get("accepted"):
        raise ValueError(f"No picture was accepted; see {output / 'report.html'}.")
    return summary


def _check(config: PrepareConfig) -> None:
    """ValueError where the output folder must not become one; before anything is written."""
    output = config.output
    if (output / "config.json").exists():
        return
    if output.exists() and any(not name.name.startswith(".") for name in output.iterdir()):
        raise ValueError(f"{output} is not empty; give another --output.")
    if Path(config.data).expanduser().resolve() in (output.resolve(), *output.resolve().parents):
        raise ValueError(f"{output} lies in {config.data}; give an --output outside of it.")


def _claim(config: PrepareConfig) -> None:
    """Records the folder's purpose; ValueError where it has another."""
    file = config.output / "config.json"
    record = asdict(config) | {"output": None, "workers": None}
    record = {key: str(value) for key, value in record.items() if value is not None}
    if not file.exists():
        write_json(file, record)
        return
    old = read_json(file)
    if changed := sorted(k for k in old.keys() | record.keys() if old.get(k) != record.get(k)):
        raise ValueError(
            f"{config.output} was made with another {', '.join(changed)}; repeat its command to "
            "go on with it, or give another --output."
        )


def write_json(file: Path, values: dict) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_atomically(file, lambda p: p.write_text(text, encoding="utf-8"))


def read_json(file: Path) -> dict:
    """What `write_json` wrote; ValueError in a sentence where it is something else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ValueError(f"{file} is damaged; remove {file.parent}, or give another --output.")
    return values


def reject_duplicates(rows: list[dict], distance: int) -> None:
    """Gives all but one of similar crops a reason: the one cut from the most pixels stays."""
    if distance < 0:
        return
    crops = [row for row in rows if not row["reason"]]
    crops.sort(key=lambda row: -row["side"])  # stable
    for late, first in find_duplicates([row["hash"] for row in crops], distance).items():
        crops[late]["reason"] = f"a duplicate (of {crops[first]['source']})"


def find_duplicates(hashes: Sequence[int], distance: int) -> dict[int, int]:
    """{position of a duplicate: position of the first kept hash within `distance` bits}, 0 to 63.

    Compressed and resized copies of an aligned crop differed in at most 3 bits (99 % in at most
    2), of 245,000 pairs of different FFHQ faces none in fewer than 7.

    Exact, and about linear in their number for small distances: cut into distance + 1 parts, two
    hashes that differ in at most `distance` bits agree in one part, so only those are compared
    (Norouzi et al. 2012, "Fast Search in Hamming Space with Multi-Index Hashing").
    """
    cuts = [64 * part // (distance + 1) for part in range(distance + 2)]
    ranges = [(low, (1 << high - low) - 1) for low, high in pairwise(cuts)]
    buckets: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    repeats: dict[int, int] = {}
    for position, value in enumerate(hashes):
        keys = [(low, value >> low & mask) for low, mask in ranges]
        near = (
            other
            for key in keys
            for other in buckets[key]
            if (hashes[other] ^ value).bit_count() <= distance
        )
        first = min(near, default=None)
        if first is not None:
            repeats[position] = first
            continue
        for key in keys:
            buckets[key].append(position)
    return repeats


def write_data(config: PrepareConfig, shards: list[Path], rows: list[dict]) -> None:
    """OUT/data: train-00000.parquet … of ROWS crops each, or PNG files and metadata.jsonl."""
    begun, folder = config.output / SHARDS / "data", config.output / "data"
    shutil.rmtree(begun, ignore_errors=True)  # of an attempt that was interrupted
    shutil.rmtree(folder, ignore_errors=True)
    begun.mkdir()
    accepted = (row for row in with_images(shards, rows) if not row["reason"])
    if config.format == "parquet":
        for number in count():
            part = [{name: row[name] for name in COLUMNS} for row in islice(accepted, ROWS)]
            if not part:
                break
            table = pa.Table.from_pylist(part, schema=FEATURES.arrow_schema)
            write_atomically(begun / f"train-{number:05d}.parquet", partial(pq.write_table, table))
    else:
        lines = []
        for number, row in enumerate(accepted):
            name = f"{number:08d}.png"
            (begun / name).write_bytes(row["image"]["bytes"])
            values = {key: row[key] for key in COLUMNS if key != "image"}
            lines.append(json.dumps({"file_name": name} | values, ensure_ascii=False) + "\n")
        (begun / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    begun.rename(folder)


def run(config: PrepareConfig) -> int:
    """With a bar of progress; the exit code."""
    columns = (TextColumn("prepare"), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            summary = prepare(config, lambda done: bar.advance(task, done))
    except BrokenProcessPool:
        console.print(
            "A worker died, perhaps for lack of memory; the same command with fewer --workers "
            "goes on."
        )
        return 1
    console.print(
        f"{summary['inputs']} inputs: {summary['accepted']} crops in {config.output / 'data'}, "
        f"{summary['inputs_rejected']} inputs rejected; see {config.output / 'report.html'}."
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return command(PrepareConfig, run, __doc__, argv)
