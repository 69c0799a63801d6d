"""What a preparation has done: its numbers, contact sheets, one HTML page without other files.

summary = summarise(rows)
write_report(Path("faces"), "photos", shards, rows, summary)

A row is a dict of the fields of `encoder.prepare.crops.Row`; shards are their parquet files.
"""

import base64
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from html import escape
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from generators.disk import write_atomically
from generators.images import open_image

SHOWN = 100  # pictures per contact sheet

CELL, LABEL, COLUMNS = 96, 14, 10  # pixels, pixels, pictures per row
EDGES = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048)  # pixels
LISTED = 300  # rejected outcomes named on the page
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.1em .8em;text-align:left;overflow-wrap:anywhere}"
    "tr:nth-child(even){background:#f2f2f2}td.n{text-align:right}"
    "i{display:block;height:1em;background:#47a}img{max-width:100%}"
)


def summarise(rows: Sequence[Mapping]) -> dict:
    """Numbers of inputs and of rows (one per face, or per input without any), and the reasons."""
    inputs: list[bool] = []  # whether any crop of it is accepted
    for row in rows:
        if row["face"] == 0:
            inputs.append(False)
        inputs[-1] |= not row["reason"]
    reasons = Counter(row["reason"].partition(" (")[0] for row in rows if row["reason"])
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


def with_images(shards: Sequence[Path], rows: Sequence[dict]) -> Iterator[dict]:
    """The rows with their pictures, a shard at a time."""
    cells = (cell for f in shards for cell in pq.read_table(f, columns=["image"])[0].to_pylist())
    for row, cell in zip(rows, cells, strict=True):
        yield row | {"image": cell}


def write_report(
    output: Path, title: str, shards: Sequence[Path], rows: Sequence[dict], summary: Mapping
) -> None:
    """report.html, rejected.jsonl and the contact sheets accepted.png and rejected.png."""
    sheets = {}
    for good, name in ((True, "accepted"), (False, "rejected")):
        if summary[name]:
            file = sheets[f"Of the {name}"] = output / f"{name}.png"
            picture = sheet(_chosen(shards, rows, good, summary[name]))
            write_atomically(file, partial(picture.save, format="PNG"))
    rejected = [row for row in rows if row["reason"]]
    keys = ("source", "face", "reason", "width", "height")
    lines = [json.dumps({key: row[key] for key in keys}, ensure_ascii=False) for row in rejected]
    _write_text(output / "rejected.jsonl", "".join(f"{line}\n" for line in lines))
    counts = {k.replace("_", " "): v for k, v in summary.items() if k != "reasons"}
    sides = [row["side"] for row in rows if not row["reason"]]
    names = [(row["source"], row["reason"]) for row in rejected]
    _write_text(
        output / "report.html", page(title, counts, summary["reasons"], sides, names, sheets)
    )


def _write_text(file: Path, text: str) -> None:
    write_atomically(file, lambda p: p.write_text(text, encoding="utf-8"))


def _chosen(
    shards: Sequence[Path], rows: Sequence[dict], good: bool, total: int
) -> list[tuple[Image.Image | None, str]]:
    """About SHOWN of the accepted or of the rejected ones, evenly spread, each with its label."""
    shown: list[tuple[Image.Image | None, str]] = []
    alike = (row for row in with_images(shards, rows) if (not row["reason"]) == good)
    for number, row in enumerate(alike):
        if number * SHOWN // max(total, SHOWN) < len(shown):
            continue
        score = "" if row["score"] is None else f", {row['score']:.2f}"
        picture = open_image(row["image"]["bytes"]) if row["image"] else None
        shown.append((picture, f"{row['side']:.0f} px{score}" if good else row["reason"]))
    return shown


def sheet(pictures: Sequence[tuple[Image.Image | None, str]]) -> Image.Image:
    """Pictures of any size, each with a line of text, row by row; grey where there is none."""
    columns = max(1, min(COLUMNS, len(pictures)))
    rows = max(1, -(-len(pictures) // columns))
    result = Image.new("RGB", (columns * CELL, rows * (CELL + LABEL)), "white")
    draw, font = ImageDraw.Draw(result), ImageFont.load_default()
    for i, (picture, label) in enumerate(pictures):
        left, top = i % columns * CELL, i // columns * (CELL + LABEL)
        tile = Image.new("RGB", (CELL, CELL), "#ccc")
        if picture is not None:
            small = picture.copy()
            small.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
            tile.paste(small, ((CELL - small.width) // 2, (CELL - small.height) // 2))
        result.paste(tile, (left, top))
        text = label.encode("ascii", "replace").decode()  # all that the built-in font has
        while draw.textlength(text, font=font) > CELL - 4:
            text = text[:-1]
        draw.text((left + 2, top + CELL + 1), text, "black", font)
    return result


def page(
    title: str,
    counts: Mapping[str, int],
    reasons: Mapping[str, int],
    sides: Sequence[float],
    rejected: Sequence[tuple[str, str]],
    sheets: Mapping[str, Path],
) -> str:
    """The report as HTML.

    counts, reasons: {text: number}, shown in the given order
    sides: of the accepted squares, in pixels of their sources
    rejected: (name, reason) of each rejected outcome; the first LISTED are shown
    sheets: {heading: PNG file}, put into the page
    """
    histogram = [0] * (len(EDGES) + 1)
    for side in sides:
        histogram[bisect_right(EDGES, side)] += 1
    names = [f"below {EDGES[0]}"]
    names += [f"{low} – {high - 1}" for low, high in pairwise(EDGES)]
    names += [f"{EDGES[-1]} and more"]
    most = max(histogram) or 1
    bars = "".join(
        f"<tr><td>{name}<td class=n>{count}<td width=400>"
        f'<i style="width:{100 * count / most:.1f}%"></i>'
        for name, count in zip(names, histogram, strict=True)
        if count
    )
    lines = "".join(f"<tr><td>{escape(a)}<td>{escape(b)}" for a, b in rejected[:LISTED])
    more = f" (the first {LISTED}; all are in rejected.jsonl)" if len(rejected) > LISTED else ""
    images = "".join(
        f"<h2>{escape(heading)}</h2><img alt='{escape(heading)}' "
        f"src='data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}'>"
        for heading, file in sheets.items()
    )
    return (
        f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
        f"<h1>{escape(title)}</h1>{_table(counts)}"
        f"<h2>Why crops were rejected</h2>{_table(reasons) or 'None was.'}"
        f"<h2>Sides of the accepted squares, pixels of the source</h2><table>{bars}</table>"
        f"{images}<h2>Rejected{more}</h2><table>{lines}</table>\n"
    )


def _table(values: Mapping[str, int]) -> str:
    rows = "".join(f"<tr><td>{escape(k)}<td class=n>{v:,}" for k, v in values.items())
    return f"<table>{rows}</table>" if rows else ""
