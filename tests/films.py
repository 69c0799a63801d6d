"""Small films for the tests, made on the fly.

make_film(tmp_path / "clip.mp4", times=[0, 0.04, 0.2], sound="aac", turned=90)
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest


def coloured(i: int, size: tuple[int, int] = (64, 48)) -> np.ndarray:
    """Frame i: one colour, with a red mark at the top left."""
    pixels = np.full((size[1], size[0], 3), (20, 60 + 10 * i % 150, 90), np.uint8)
    pixels[: size[1] // 3, : size[0] // 3] = (250, 20, 20)
    return pixels


def make_film(
    path: Path,
    times: Sequence[float] = (0, 0.04, 0.08, 0.12),
    *,
    codec: str = "libx264",
    kind: str | None = None,  # PyAV's format; None: by the suffix
    size: tuple[int, int] = (64, 48),
    sound: str | None = None,  # codec
    seconds: float | None = None,  # of sound
    turned: int = 0,  # degrees against the clock, that a player is to turn it by
    wide: Fraction | None = None,  # of a pixel: width / height
    frame: Callable[[int], np.ndarray] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    with av.open(str(path), "w", format=kind, options=options or {}) as film:
        stream = film.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        base = Fraction(1, 100) if codec == "gif" else Fraction(1, 90_000)
        stream.codec_context.time_base = base
        if wide is not None:
            stream.codec_context.sample_aspect_ratio = wide
        if turned:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this version of PyAV cannot write turned films")
            stream.set_display_rotation(turned)
        if sound is not None:
            voice = film.add_stream(sound, rate=48_000)
            voice.codec_context.layout = "mono"
        for i, time in enumerate(times):
            pixels = frame(i) if frame else coloured(i, size)
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts, picture.time_base = round(time / base), base
            film.mux(stream.encode(picture))
        if sound is not None:
            count = round((seconds or times[-1]) * 48_000)
            wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(count) / 48_000)
            noise = av.AudioFrame.from_ndarray(np.float32(wave)[None], "fltp", "mono")
            noise.sample_rate, noise.pts, noise.time_base = 48_000, 0, Fraction(1, 48_000)
            film.mux(voice.encode(noise))
            film.mux(voice.encode())
        film.mux(stream.encode())
    return path


def read_film(path: Path) -> tuple[list[float], list[np.ndarray], float]:
    """Times and frames, and the seconds of sound; by PyAV alone."""
    with av.open(str(path)) as film:
        frames = [(float(f.time), f.to_ndarray(format="rgb24")) for f in film.decode(video=0)]
    length = 0.0
    with av.open(str(path)) as film:
        if film.streams.audio:
            length = sum(f.samples / f.sample_rate for f in film.decode(audio=0))
    return [time for time, _ in frames], [pixels for _, pixels in frames], length
