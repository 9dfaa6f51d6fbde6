"""Reading media ahead of the encoders, by threads, a bounded number of files at a time."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av.error
import torch

from mmaudio_hf.features.jobs import Item, Job
from mmaudio_hf.media.audio import MediaError, cut_audio_clip, read_waveform
from mmaudio_hf.media.video import VideoClip, read_video


def read_ahead(job: Job, items: Sequence[Item], threads: int, ahead: int) -> Iterator[tuple[Item, Any]]:
    """Yield (item, VideoClip, waveform or MediaError) in order, while threads read up to `ahead` files further on.

    A video of 8 s is 58 MB. Close the generator to stop the threads.
    """
    groups = (list(group) for _, group in itertools.groupby(items, key=lambda item: item.path))
    waiting: deque = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for group in groups:
                waiting.append((group, pool.submit(_read_group, job, group)))
                if len(waiting) > ahead:
                    yield from _results(*waiting.popleft())
            while waiting:
                yield from _results(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _results(group: Sequence[Item], future) -> Iterator[tuple[Item, Any]]:
    """The items of a group with what was read, none of it held here any longer than needed."""
    media = deque(future.result())
    del future
    for item in group:
        yield item, media.popleft()


def _read_group(job: Job, items: Sequence[Item]) -> list[VideoClip | torch.Tensor | MediaError]:
    """The media of items of one file, each a result or the MediaError it met."""
    path = items[0].path
    try:
        if job.video:
            return [_read_video(job, path) for _ in items]
        waveform, rate = read_waveform(path)
    except MediaError as error:
        return [error] * len(items)
    except Exception as error:
        if isinstance(error, (OSError, MemoryError)) and not isinstance(error, av.error.FFmpegError):
            raise  # the machine's fault, not the file's
        return [MediaError("unexpected", f"{path}: reading failed ({error!r}); re-encode the file")] * len(items)
    cuts = {span: _cut(job, path, span, waveform, rate) for span in dict.fromkeys(item.span for item in items)}
    return [cuts[item.span] for item in items]


def _read_video(job: Job, path: str) -> VideoClip:
    return read_video(
        path,
        mode=job.mode,
        duration=job.duration,
        alignment=job.alignment,
        normalize_audio=job.normalize_audio,
        as_uint8=True,
    )


def _cut(job: Job, path: str, span: tuple[int, int], waveform: torch.Tensor, rate: int) -> torch.Tensor | MediaError:
    start, end = span
    try:
        return cut_audio_clip(
            waveform, rate, mode=job.mode, start_sample=start, end_sample=end, duration=job.duration, source=path
        )
    except MediaError as error:
        return error
