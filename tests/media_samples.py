"""Tiny videos and images for tests, written by PyAV and pillow."""

from fractions import Fraction

import av
import numpy as np
from PIL import Image


def picture(index, *, height=32, width=48):
    """A smooth picture [H, W, 3] uint8; red tells the index (steps of 8), so that a decoded frame can be recognised."""
    y, x = np.mgrid[:height, :width]
    planes = np.full((height, width), 20 + 8 * index), 255 * x / width, 255 * y / height
    return np.stack(planes, axis=-1).astype(np.uint8)


def write_video(path, times, *, height=32, width=48, first=0, lossless=True):
    """A video whose k-th frame is picture(first + k), shown at times[k] seconds (Fractions)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb" if lossless else "libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = width, height, "rgb24" if lossless else "yuv420p"
        stream.options = {"crf": "0" if lossless else "20", "preset": "ultrafast"}
        stream.codec_context.time_base = stream.time_base = Fraction(1, 12000)
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(first + index, height=height, width=width), format="rgb24")
            frame.pts, frame.time_base = round(time * 12000), Fraction(1, 12000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def steady(count, fps, *, start=Fraction(0)):
    """Times of `count` frames at `fps`."""
    return [start + Fraction(index) / Fraction(fps) for index in range(count)]


def indices(frames):
    """Which picture each frame of [3, F, H, W] uint8 shows."""
    return [round((float(frame.float().mean()) - 20) / 8) for frame in frames[0]]


def write_image(path, index, *, height=32, width=48):
    Image.fromarray(picture(index, height=height, width=width)).save(path)
    return path
