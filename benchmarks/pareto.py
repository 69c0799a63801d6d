"""What rows of benchmarks/inversion.py come to: at equal steps, at equal seconds; table, CSV, plot,
picture.

A row is a dict with method, family, steps, a column for each judge, p50_ms (a picture in a full
batch) and single_p50_ms. Shape letters: N pictures, R resolution.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import markdown
from torch import Tensor

from generators.images import grid, labelled, resize

POINTS = 60  # of a curve, evenly spread over the logarithm of the steps
ROWS, SIDE = 8, 144  # of the picture: people, and pixels of a face

# ------------------------------------------------------------------------- comparisons


def thinned(curve: np.ndarray) -> dict[str, list]:
    """{"steps", "mse"}: the start, the end, and POINTS at most between."""
    last = len(curve) - 1
    steps = np.unique(np.geomspace(1, last, POINTS).round().astype(int))
    steps = np.concatenate([[0], steps])
    return {"steps": steps.tolist(), "mse": [float(f"{x:.6g}") for x in curve[steps]]}


def longest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """By family, of the searches that start without the encoder."""
    found = {}
    for row in sorted(rows, key=lambda row: row["steps"]):
        if row["steps"] and not row["family"].startswith("encoder"):
            found[row["family"]] = row
    return found


def equal_steps(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{"steps", "mse": {family: mse}} for each number of steps of several searches."""
    result = []
    for steps in sorted({row["steps"] for row in rows} - {0}):
        errors = {row["family"]: row["mse"] for row in rows if row["steps"] == steps}
        if len(errors) > 1:
            result.append({"steps": steps, "mse": errors})
    return result


def equal_seconds(
    rows: Sequence[Mapping[str, Any]], curves: Mapping[str, Mapping[str, list]]
) -> list[dict[str, Any]]:
    """The encoder's rows against the longest other searches that take longer; see above."""
    result = []
    for row in rows:
        if not row["family"].startswith("encoder"):
            continue
        seconds = row["p50_ms"] / 1000
        for name in curves:
            against = next(other for other in rows if other["method"] == name)
            step_seconds = against["p50_ms"] / 1000 / (against["steps"] + 1)
            steps, errors = curves[name]["steps"], curves[name]["mse"]
            at = max(seconds / step_seconds - 1, 0.0)
            if at > steps[-1]:
                continue
            lowest = np.minimum.accumulate(errors)[::-1]  # rising, as np.interp wants it
            as_good = None
            if lowest[0] <= row["mse"]:
                needed = float(np.interp(row["mse"], lowest, steps[::-1]))
                as_good = round((needed + 1) * step_seconds, 4)
            result.append(
                {"method": row["method"], "seconds": round(seconds, 4), "mse": row["mse"],
                 "against": name, "at_step": round(at, 2),
                 "its_mse": float(np.interp(at, steps, errors)),
                 "its_seconds_to_be_as_good": as_good}
            )  # fmt: skip
    return result


def yardstick(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The longest run of Adam, in w+ from the mean where there is one."""
    runs = [row for row in rows if row["family"].startswith("Adam")]
    usual = [row for row in runs if row["family"] == "Adam in w+ from mean"]
    return max(usual or runs, key=lambda row: row["steps"], default=None)


def readme(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The README's table."""
    slow = yardstick(rows)
    header = ["method", "MSE", "PSNR, dB", "MS-SSIM", "LPIPS (alex)", "LPIPS (vgg)",
              "seconds a picture"]  # fmt: skip
    header += [] if slow is None else [f"faster than {slow['method']}"]
    columns = {"mse": ".4f", "psnr": ".2f", "ms_ssim": ".3f", "lpips_alex": ".3f",
               "lpips_vgg": ".3f"}  # fmt: skip
    lines = [header]
    for row in rows:
        line = [row["method"], *(f"{row[k]:{f}}" if k in row else "–" for k, f in columns.items())]
        line.append(f"{row['p50_ms'] / 1000:.3g}")
        if slow is not None:
            times = slow["p50_ms"] / row["p50_ms"]
            line.append(
                "–" if row["method"] == "mean face" else f"{times:.{0 if times >= 10 else 1}f}×"
            )
        lines.append(line)
    return markdown(lines)


# ------------------------------------------------------------------------------ output


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Error against seconds, a series a family, the steps beside its points; grey: the front."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels = {"mse": "MSE", "lpips_alex": "LPIPS (alex)", "lpips_vgg": "LPIPS (vgg)"}
    panels = {name: title for name, title in panels.items() if name in rows[0]}
    families = list(dict.fromkeys(row["family"] for row in rows))
    figure = Figure(figsize=(6.5 * len(panels), 6.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    plain = FuncFormatter(lambda x, _: f"{x:g}")
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        points = sorted((row["p50_ms"] / 1000, row[name]) for row in rows)
        x, y = np.array(points).T
        front = np.minimum.accumulate(y)
        axis.step(x, front, where="post", color="0.85", linewidth=6, zorder=0, label="best so far")
        for i, family in enumerate(families):
            chosen = [row for row in rows if row["family"] == family]
            style = STYLES.get(family) or dict(color=f"C{i}", marker="o")
            seconds = [row["p50_ms"] / 1000 for row in chosen]
            axis.plot(seconds, [row[name] for row in chosen], markersize=6, label=family, **style)
            # in turn above and below, where searches take equally long
            place, side = ((5, 2), "left") if i % 2 else ((-5, -9), "right")
            for row, s in zip(chosen, seconds, strict=True):
                if row["steps"]:
                    axis.annotate(str(row["steps"]), (s, row[name]), xytext=place, ha=side,
                                  textcoords="offset points", fontsize=7,
                                  color=style["color"])  # fmt: skip
        axis.margins(x=0.08)
        axis.set(xscale="log", yscale="log", xlabel="seconds a picture", title=title)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter(plain)
        axis.grid(which="both", color="0.93")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(panels),
                  frameon=False)  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


STYLES: dict[str, dict[str, Any]] = {  # colours of Okabe and Ito, told apart by everybody
    "mean face": dict(color="black", marker="X", linestyle="none"),
    "encoder": dict(color="black", marker="*", linestyle="none"),
    "encoder + L-BFGS": dict(color="#D55E00", marker="o"),
    "encoder + Adam": dict(color="#E69F00", marker="o"),
    "Adam in w from mean": dict(color="#56B4E9", marker="s", linestyle="--"),
    "Adam in w from random": dict(color="#56B4E9", marker="^", linestyle=":"),
    "Adam in w+ from mean": dict(color="#0072B2", marker="s", linestyle="--"),
    "Adam in w+ from random": dict(color="#0072B2", marker="^", linestyle=":"),
    "L-BFGS in w+ from mean": dict(color="#009E73", marker="D", linestyle="--"),
}


def sheet(
    images: Tensor, shown: Mapping[str, Sequence[Tensor]], rows: Sequence, path: Path
) -> None:
    """People, evenly spread, one or (with anime) two rows each; the longest run of each family."""
    last = {row["family"]: row for row in sorted(rows, key=lambda row: row["steps"])}
    order = list(dict.fromkeys(row["family"] for row in rows))
    count = len(images)
    chosen = [i * count // ROWS for i in range(ROWS)] if count > ROWS else list(range(count))
    kinds = len(next(iter(shown.values())))
    columns = [torch.stack([images[chosen]] * kinds, dim=1)]  # (P, kinds, 3, R, R)
    columns += [torch.stack([x[chosen] for x in shown[last[f]["method"]]], dim=1) for f in order]
    faces = torch.stack(columns, dim=2)  # (P, kinds, columns, 3, R, R)
    whole = grid(resize(faces.flatten(0, 2), SIDE).clamp(-1, 1), columns=len(columns))
    steps = [f"{last[f]['steps']} steps" if last[f]["steps"] else "" for f in order]
    heads, starts = zip(
        *(f.split(" from ") if " from " in f else (f, "") for f in order), strict=True
    )
    whole = labelled(labelled(whole, ["", *steps]), ["", *(s and f"from {s}" for s in starts)])
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled(whole, ["input", *heads]).save(path)
