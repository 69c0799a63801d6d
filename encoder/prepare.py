"""Raw pictures to a data set of aligned crops: find faces, cut, drop what is poor or repeated.

    python -m encoder.prepare --data photos/ --output faces --size 256 --workers 4
    python -m encoder.prepare --data drawings.tar.gz --output anime --detector cascade \\
        --cascade lbpcascade_animeface.xml --upscaler x4.safetensors
    python -m encoder.prepare --data crops.parquet --output square --detector none

Train on OUT/data. OUT/report.html and the two contact sheets show what was taken and what was not,
OUT/rejected.jsonl names every rejected picture with its reason. The result is the same for any
number of workers; after a kill -9 the same command goes on. Cascades and upscalers need
`pip install '.[prepare]'`.
"""

import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import count, islice
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from encoder.crops import COLUMNS, FEATURES, SHARD_SCHEMA, CropConfig, Row, examine
from encoder.dedup import find_duplicates
from encoder.detect import Detector, Upscaler, load_upscaler
from encoder.report import page, sheet
from encoder.sources import Raw, find_sources
from generators.images import open_image
from generators.runs import write_atomically

SHARDS = ".shards"  # folder in the output, until all is done
SHARD = 32  # inputs that are done, or done again after a kill, together
ROWS = 1000  # crops per parquet file
SHOWN = 100  # pictures per contact sheet


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(CropConfig):
    data: str  # folder, .zip, .tar, .tar.gz, .parquet, saved Hugging Face data set, or hf:NAME
    output: Path  # folder, made if need be
    duplicates: int = 4  # bits of 64 that a repeated crop may differ in; -1: keep all
    format: Literal["parquet", "folder"] = "parquet"
    column: str = "image"  # of parquet and Hugging Face data
    workers: int = 1  # processes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 1:
            raise ValueError("--workers is 1 or more.")
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


def _begin() -> None:
    """First act of a worker process."""

    def follow() -> None:  # without it a killed parent's workers wait for ever
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)


def make_shards(config: PrepareConfig, advance: Callable[[int], None]) -> list[Path]:
    """All shards in order, missing ones newly made; calls advance(inputs done)."""
    tools(config)  # a wrong set-up ends here
    shards: list[Path] = []
    sources = find_sources(config.data, config.column)
    pool = ProcessPoolExecutor(config.workers, multiprocessing.get_context("spawn"), _begin)
    pending: deque[Future[int]] = deque()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers: sums depend on it
    try:
        while True:
            file = config.output / SHARDS / f"{len(shards):06d}.parquet"
            names = _names(file) if file.exists() else None
            job: Job = []
            for raw in islice(sources, SHARD):
                job.append((raw.name, None, "") if names else (raw.name, *_read(raw)))
            if not job:
                break
            shards.append(file)
            if names:
                if names != [name for name, _, _ in job]:
                    raise ValueError(
                        f"{config.data} has changed since {config.output} was begun; "
                        "give another --output."
                    )
                advance(len(job))
            elif config.workers == 1:
                advance(make_shard(config, file, job))
            else:
                pending.append(pool.submit(make_shard, config, file, job))
                if len(pending) >= 2 * config.workers:  # no more pictures in memory than that
                    advance(pending.popleft().result())
        for future in pending:
            advance(future.result())
    finally:
        torch.set_num_threads(threads)
        pool.shutdown(cancel_futures=True)
    return shards


def _names(shard: Path) -> list[str]:
    """Its inputs; each has one row that is its first face or its only row."""
    rows = pq.read_table(shard, columns=["source", "face"]).to_pylist()
    return [row["source"] for row in rows if row["face"] == 0]


def _read(raw: Raw) -> tuple[Path | bytes | None, str]:
    try:
        return raw.read(), ""
    except ValueError as error:
        return None, str(error)


# ------------------------------------------------------------------------- the data set


def prepare(config: PrepareConfig, advance: Callable[[int], None] = lambda _: None) -> dict:
    """Runs or resumes the preparation; returns what summary.json holds.

    Raises ValueError when the data cannot be found, the output is not this preparation's, or no
    picture is accepted (then after the report is written).
    """
    finished = config.output / "summary.json"
    _claim(config)
    if not finished.exists():
        shards = make_shards(config, advance)
        if not shards:
            raise ValueError(f"There is no file in {config.data}.")
        names = [name for name in SHARD_SCHEMA.names if name != "image"]
        rows = [row for file in shards for row in pq.read_table(file, columns=names).to_pylist()]
        reject_duplicates(rows, config.duplicates)
        summary = summarise(rows)
        write_data(config, shards, rows)
        write_report(config, shards, rows, summary)
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        write_atomically(finished, lambda p: p.write_text(text, encoding="utf-8"))
    shutil.rmtree(config.output / SHARDS, ignore_errors=True)
    summary = json.loads(finished.read_text(encoding="utf-8"))
    if summary["accepted"] == 0:
        raise ValueError(f"No picture was accepted; see {config.output / 'report.html'}.")
    return summary


def _claim(config: PrepareConfig) -> None:
    """Makes the output folder and records its purpose; ValueError where it has another."""
    file, output = config.output / "config.json", config.output
    record = asdict(config) | {"output": None, "workers": None}
    record = {key: str(value) for key, value in record.items() if value is not None}
    if file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        changed = sorted(k for k in old.keys() | record.keys() if old.get(k) != record.get(k))
        if changed:
            raise ValueError(
                f"{output} was made with another {', '.join(changed)}; repeat its command to go "
                "on with it, or give another --output."
            )
        return
    if output.exists() and any(not name.name.startswith(".") for name in output.iterdir()):
        raise ValueError(f"{output} is not empty; give another --output.")
    if Path(config.data).expanduser().resolve() in (output.resolve(), *output.resolve().parents):
        raise ValueError(f"{output} lies in {config.data}; give an --output outside of it.")
    (output / SHARDS).mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=2) + "\n"
    write_atomically(file, lambda p: p.write_text(text, encoding="utf-8"))


def reject_duplicates(rows: list[dict], distance: int) -> None:
    """Gives all but one of similar crops a reason: the one cut from the most pixels stays."""
    if distance < 0:
        return
    crops = [row for row in rows if not row["reason"]]
    crops.sort(key=lambda row: -row["side"])  # stable
    for late, first in find_duplicates([row["hash"] for row in crops], distance).items():
        crops[late]["reason"] = f"a duplicate (of {crops[first]['source']})"


def summarise(rows: list[dict]) -> dict:
    """Numbers of inputs and of rows (one per face, or per input without any), and the reasons."""
    inputs: list[bool] = []  # whether any crop of it is accepted
    for row in rows:
        if row["face"] == 0:
            inputs.append(False)
        inputs[-1] |= not row["reason"]
    reasons = Counter(_kind(row["reason"]) for row in rows if row["reason"])
    return {
        "inputs": len(inputs),
        "inputs_accepted": sum(inputs),
        "inputs_rejected": len(inputs) - sum(inputs),
        "accepted": len(rows) - reasons.total(),
        "rejected": reasons.total(),
        "faces_not_asked_for": sum(row["more"] for row in rows),
        "upscaled": sum(row["upscaled"] and not row["reason"] for row in rows),
        "reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
    }


def _kind(reason: str) -> str:
    return reason.partition(" (")[0]


def _with_images(shards: list[Path], rows: list[dict]) -> Iterator[dict]:
    """The rows with their pictures, a shard at a time."""
    cells = (cell for f in shards for cell in pq.read_table(f, columns=["image"])[0].to_pylist())
    for row, cell in zip(rows, cells, strict=True):
        yield row | {"image": cell}


def write_data(config: PrepareConfig, shards: list[Path], rows: list[dict]) -> None:
    """OUT/data: train-00000.parquet … of ROWS crops each, or PNG files and metadata.jsonl."""
    folder = config.output / "data"
    folder.mkdir(exist_ok=True)
    accepted = (row for row in _with_images(shards, rows) if not row["reason"])
    if config.format == "parquet":
        for number in count():
            part = [{name: row[name] for name in COLUMNS} for row in islice(accepted, ROWS)]
            if not part:
                return
            table = pa.Table.from_pylist(part, schema=FEATURES.arrow_schema)
            pq.write_table(table, folder / f"train-{number:05d}.parquet")
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as notes:
        for number, row in enumerate(accepted):
            name = f"{number:08d}.png"
            (folder / name).write_bytes(row["image"]["bytes"])
            values = {key: row[key] for key in COLUMNS if key != "image"}
            print(json.dumps({"file_name": name} | values, ensure_ascii=False), file=notes)


def write_report(
    config: PrepareConfig, shards: list[Path], rows: list[dict], summary: dict
) -> None:
    """report.html, rejected.jsonl and the contact sheets accepted.png and rejected.png."""
    totals = {True: summary["accepted"], False: summary["rejected"]}
    seen = {True: 0, False: 0}
    shown: dict[bool, list[tuple[Image.Image | None, str]]] = {True: [], False: []}
    for row in _with_images(shards, rows):
        good = not row["reason"]
        number, total = seen[good], max(totals[good], SHOWN)
        seen[good] += 1
        if number * SHOWN // total == (number - 1) * SHOWN // total:
            continue  # so that about SHOWN are taken, evenly spread
        score = "" if row["score"] is None else f", {row['score']:.2f}"
        picture = open_image(row["image"]["bytes"]) if row["image"] else None
        shown[good].append((picture, f"{row['side']:.0f} px{score}" if good else row["reason"]))
    sheets = {}
    for good, name in ((True, "accepted"), (False, "rejected")):
        if shown[good]:
            sheets[f"Of the {name}"] = config.output / f"{name}.png"
            sheet(shown[good]).save(config.output / f"{name}.png")
    rejected = [row for row in rows if row["reason"]]
    with open(config.output / "rejected.jsonl", "w", encoding="utf-8") as notes:
        for row in rejected:
            line = {key: row[key] for key in ("source", "face", "reason", "width", "height")}
            print(json.dumps(line, ensure_ascii=False), file=notes)
    counts = {k.replace("_", " "): v for k, v in summary.items() if k != "reasons"}
    sides = [row["side"] for row in rows if not row["reason"]]
    names = [(row["source"], row["reason"]) for row in rejected]
    html = page(Path(config.data).name, counts, summary["reasons"], sides, names, sheets)
    (config.output / "report.html").write_text(html, encoding="utf-8")


def main() -> None:
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    columns = (TextColumn("prepare"), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        config = tyro.cli(PrepareConfig, description=__doc__)
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=None)
            summary = prepare(config, lambda done: bar.advance(task, done))
    except ValueError as error:
        console.print(str(error))
        raise SystemExit(2) from None
    except BrokenProcessPool:
        console.print(
            "A worker died, perhaps for lack of memory; the same command with fewer --workers "
            "goes on."
        )
        raise SystemExit(1) from None
    console.print(
        f"{summary['inputs']} inputs: {summary['accepted']} crops in {config.output / 'data'}, "
        f"{summary['inputs_rejected']} inputs rejected; see {config.output / 'report.html'}."
    )


if __name__ == "__main__":
    main()
