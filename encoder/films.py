"""Films and cameras through PyAV: frames in, as they are meant to be seen; MP4 with sound out.

    with read_film("clip.mov") as film:
        for time, picture in film.frames():                  # seconds, an upright RGB picture
            …
    writer = FilmWriter(file, (640, 480), rate=Fraction(30))
    writer.add(picture, time)
    writer.close()

Frames keep their times, whatever the rate or the lack of one. What turns or mirrors a frame (the
display matrix) and pixels that are not square are applied. The sound is copied where MP4 can hold
it, else encoded as AAC. Only the demuxers of FORMATS are used: others open further files, or
addresses.

What goes wrong inside `read` or `write` is kept and raised once PyAV has returned: PyAV loses
Ctrl-C there, and versions of it wait for ever where the disk is full.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from generators.command import printable
from generators.disk import open_regular
from generators.images import MAX_PIXELS

SUFFIXES = frozenset(".mp4 .m4v .mov .webm .mkv .avi .ts .mts .m2ts .ogv .3gp .mpg .mpeg".split())
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpegts,mpeg,ogg"
COPIED = ("aac", "mp3", "ac3", "eac3", "alac", "opus", "flac")  # sound that MP4 can hold as it is
TICKS = 90_000  # of a second, in which times are written
CAMERA = re.compile(r"webcam:(.+)")
CAMERAS = {  # by sys.platform: PyAV's format, and the camera of a number or a name
    "linux": ("v4l2", "/dev/video{}", "/dev/{}"),
    "darwin": ("avfoundation", "{}", "{}"),
    "win32": ("dshow", None, "video={}"),
}
UPRIGHT = {  # (a, b, c, d) of the display matrix: x' = a x + c y, y' = b x + d y, y down
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def is_film(path: Path) -> bool:
    """Whether it is a camera, has a film's suffix, or is a GIF of more than one frame."""
    if CAMERA.fullmatch(str(path)) or path.suffix.lower() in SUFFIXES:
        return True
    if path.suffix.lower() != ".gif" or not path.is_file():
        return False
    with suppress(Exception), Image.open(path, formats=["GIF"]) as picture:
        return getattr(picture, "is_animated", False)
    return False


def load_av(why: str) -> Any:
    """PyAV; ValueError that begins with `why` where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise ValueError(
            f"{why} needs PyAV: pip install 'amortized-gan-inversion[video]'"
        ) from error
    av.logging.set_level(None)  # what FFmpeg has to say of damaged files
    return av


class Guarded:
    """A file for PyAV, whose errors, and Ctrl-C meanwhile, wait for `check`."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: BaseException | None = None

    def read(self, size: int) -> bytes:
        return self._guarded(self.file.read, size, b"")

    def write(self, data: bytes) -> int:
        self._guarded(self.file.write, data, 0)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._guarded(lambda to: self.file.seek(to, whence), offset, 0)

    def tell(self) -> int:
        return self.file.tell()

    def _guarded(self, act: Callable[[Any], Any], argument: Any, otherwise: Any) -> Any:
        try:
            return otherwise if self.error else act(argument)
        except BaseException as error:
            self.error = error
            return otherwise

    def check(self) -> None:
        if self.error is not None:
            raise self.error


# --------------------------------------------------------------------------------- reading


class Film:
    """What `read_film` opened."""

    def __init__(self, name: str, container: Any, guard: Guarded | None) -> None:
        self.name, self.container, self.guard = name, container, guard
        if not container.streams.video:
            raise ValueError(f"{name} has no pictures, only sound; give a film.")
        self.stream = container.streams.video[0]
        self.stream.thread_type = "AUTO"
        width, height = self.stream.width, self.stream.height
        if width * height > MAX_PIXELS:
            raise ValueError(f"{name} has more than {MAX_PIXELS:,} pixels a frame.")
        self.sound = container.streams.audio[0] if container.streams.audio else None
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.rate = Fraction(rate) if rate and 1 <= rate <= 240 else Fraction(30)
        self.begin = (container.start_time or 0) / 1e6  # seconds: the first time of all streams
        self.begin = max(0.0, self.begin)  # below 0 there is sound that is not heard
        self.duration = float(container.duration or 0) / 1e6  # seconds; 0: unknown
        if self.stream.duration and self.stream.time_base:
            self.duration = max(self.duration, float(self.stream.duration * self.stream.time_base))
        self.expected = self.stream.frames or round(self.duration * self.rate) or None
        self.reached = 0.0  # seconds of the film that were there
        self.damaged = 0  # parts that could not be decoded
        self.size: tuple[int, int] = (0, 0)  # of the first frame, upright, in square pixels

    def frames(
        self, hear: Callable[[Any], None] | None = None
    ) -> Iterator[tuple[float, Image.Image]]:
        """(seconds, upright RGB picture), in order; `hear` gets the sound's packets meanwhile."""
        streams = [self.stream, self.sound] if hear and self.sound else [self.stream]
        last, step = -1.0, float(1 / self.rate)
        for packet in self._packets(streams):
            if packet.pts is not None and packet.time_base:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base) - self.begin
                self.reached = max(self.reached, end)
            if packet.stream is not self.stream:
                self._shift(packet)
                if hear is not None:
                    hear(packet)
                continue
            for frame in self._decoded(packet):
                time = frame.time
                time = last + step if time is None else max(0.0, time - self.begin)
                time = max(time, last + 1 / TICKS)  # always later than the one before
                last = time
                yield time, self._picture(frame)

    def cut_short(self) -> str | None:
        """After the last frame: a sentence, where the film should have gone on."""
        if self.duration and self.reached < self.duration - max(0.5, 2 / float(self.rate)):
            return (
                f"{self.name} ends in the middle, after {self.reached:.1f} of {self.duration:.1f} "
                "seconds; what was there is drawn. Get the whole file and repeat the command."
            )
        return None

    def _packets(self, streams: list[Any]) -> Iterator[Any]:
        import av

        packets = self.container.demux(streams)
        while True:
            try:
                packet = next(packets, None)
            except (av.FFmpegError, OSError):  # nothing readable follows
                packet = None
            if self.guard is not None and not isinstance(self.guard.error, OSError):
                self.guard.check()
            if packet is None:
                return
            yield packet

    def _shift(self, packet: Any) -> None:
        """Takes a packet of the sound to the times that `frames` gives."""
        begin = round(self.begin / packet.time_base) if packet.time_base else 0
        if packet.pts is not None:
            packet.pts -= begin
        if packet.dts is not None:
            packet.dts -= begin

    def _decoded(self, packet: Any) -> list[Any]:
        import av

        try:
            return packet.decode()
        except (av.FFmpegError, OSError):
            self.damaged += 1
            return []

    def _picture(self, frame: Any) -> Image.Image:
        if any(component.is_alpha for component in frame.format.components):
            layer = Image.fromarray(frame.to_ndarray(format="rgba"))
            picture = Image.new("RGBA", layer.size, "white")
            picture.alpha_composite(layer)
            picture = picture.convert("RGB")
        else:
            picture = frame.to_image()
        shape = self.stream.sample_aspect_ratio
        if shape and shape != 1 and 1 / 8 <= shape <= 8:
            picture = picture.resize((max(1, round(picture.width * shape)), picture.height))
        turn = orientation(frame)
        picture = picture if turn is None else picture.transpose(turn)
        if self.size == (0, 0):
            self.size = picture.size
        return picture if picture.size == self.size else picture.resize(self.size)


def orientation(frame: Any) -> Image.Transpose | None:
    """What makes a decoded frame upright, of its display matrix; to the nearest quarter turn."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None or len(bytes(data)) != 36:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data))
    largest = max(map(abs, (a, b, c, d))) or 1
    a, b, c, d = (round(x / largest) for x in (a, b, c, d))
    return UPRIGHT.get((a, b, c, d))


@contextmanager
def read_film(source: str | Path) -> Iterator[Film]:
    """The film of a file, or of "webcam:0". ValueError, one sentence, where there is none."""
    name = printable(source)
    av = load_av(f"reading {name}")
    camera = CAMERA.fullmatch(str(source))
    with ExitStack() as opened:
        try:
            if camera:
                address, kind = camera_address(camera[1])
                options = {"framerate": "30", "video_size": "640x480"}
                container = opened.enter_context(av.open(address, format=kind, options=options))
                film = Film(name, container, None)
            else:
                guard = Guarded(opened.enter_context(open_regular(source)))
                options = {"format_whitelist": FORMATS}
                reader = av.open(guard, "r", metadata_errors="replace", options=options)
                film = Film(name, opened.enter_context(reader), guard)
        except (av.FFmpegError, OSError) as error:
            reason = printable(error.strerror or error).rstrip(".")
            raise ValueError(
                f"The camera {name} cannot be opened ({reason}); is it plugged in, free, allowed?"
                if camera
                else f"Cannot read {name}: it is no film in a known format, or damaged ({reason})."
            ) from error
        yield film


def camera_address(camera: str) -> tuple[str, str | None]:
    """What PyAV opens for "0" or a camera's name, and as which format."""
    if sys.platform not in CAMERAS:
        raise ValueError(f"cameras cannot be read on {sys.platform}; record a film and give that.")
    kind, numbered, named = CAMERAS[sys.platform]
    pattern = numbered if camera.isdigit() else named
    if pattern is None:
        raise ValueError(
            "Windows knows cameras by name: give webcam:NAME, as its settings show it, such as "
            "'webcam:Integrated Camera'."
        )
    return pattern.format(camera), kind


# --------------------------------------------------------------------------------- writing


class FilmWriter:
    """MP4 in H.264, 4:2:0, which every player reads, frame by frame; `close` completes it."""

    def __init__(
        self,
        file: BinaryIO,  # to be written to, and seekable
        size: tuple[int, int],  # of the frames; an odd side loses a pixel
        rate: Fraction,  # nominal frames a second; each frame has its own time
        sound: Any = None,  # the stream of the film that is read, for `hear`
    ) -> None:
        av = load_av("writing .mp4")
        self.guard = Guarded(file)
        self.container = av.open(self.guard, "w", format="mp4")
        # without frames out of order, which MP4 gives a wrong length where the rate varies
        options = {"crf": "18", "preset": "veryfast", "bf": "0"}
        self.stream = self.container.add_stream("libx264", rate=rate, options=options)
        self.size = (max(2, size[0] // 2 * 2), max(2, size[1] // 2 * 2))
        self.stream.width, self.stream.height = self.size
        self.stream.pix_fmt = "yuv420p"
        self.time_base = Fraction(1, TICKS)
        self.stream.codec_context.time_base = self.time_base
        self.last = -1
        self.sound, self.copies = None, False
        if sound is not None:
            self.copies = sound.codec_context.name in COPIED
            if self.copies:
                self.sound = self.container.add_stream_from_template(sound)
            else:
                self.sound = self.container.add_stream("aac", rate=48_000)
                many = sound.codec_context.layout.nb_channels > 1
                self.sound.codec_context.layout = "stereo" if many else "mono"

    def add(self, picture: Image.Image, time: float) -> None:
        """The next frame, to be shown from `time` seconds on."""
        import av

        width, height = self.size
        if picture.size != self.size:
            fitted = Image.new("RGB", self.size)  # an odd side, or one of a single pixel
            fitted.paste(picture.crop((0, 0, max(width, 1), max(height, 1))))
            picture = fitted
        frame = av.VideoFrame.from_image(picture)
        self.last = max(self.last + 1, round(time * TICKS))
        frame.pts, frame.time_base = self.last, self.time_base
        self._mux(self.stream.encode(frame))

    def hear(self, packet: Any) -> None:
        """A packet of the sound; a damaged one is silence."""
        import av

        if self.sound is None:
            return
        with suppress(av.FFmpegError):
            if not self.copies:
                for frame in packet.decode():
                    self._mux(self.sound.encode(frame))
            elif packet.dts is not None:
                packet.stream = self.sound
                self._mux([packet])
        self.guard.check()

    def close(self) -> None:
        """Completes the file; OSError where it could not be written."""
        self._mux(self.stream.encode())
        if self.sound is not None and not self.copies:
            self._mux(self.sound.encode())
        self.container.close()
        self.guard.check()

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            self.container.mux(packet)
        self.guard.check()
