"""Windows of a long video in one pass, still images, and how long a video is."""

import av
import odd_media
import pytest
import torch
from odd_media import Odd, cut_without_encoding, overwrite_packet, read_codes, steady, write_odd
from PIL import Image

from mmaudio_hf.media import video
from mmaudio_hf.media.container import MediaError
from mmaudio_hf.media.video import read_image, read_video, read_windows, video_seconds

STARTS = (0, 0.7, 1.504, 3.3)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    odd = Odd(steady(5, fps="30000/1001"), options=(("g", "40"),))
    return write_odd(tmp_path_factory.mktemp("scene") / "scene.mp4", odd)


@pytest.mark.parametrize("alignment", video.ALIGNMENTS)
def test_windows_are_what_reading_each_of_them_gives(scene, alignment):
    windows = read_windows(scene, STARTS, duration=1.2, alignment=alignment)
    for start, window in zip(STARTS, windows, strict=True):
        how = {"duration": 1.2, "start": start, "alignment": alignment, "as_uint8": True, "video_only": True}
        alone = read_video(scene, **how)
        assert torch.equal(window.clip_frames, alone.clip_frames), start
        assert torch.equal(window.sync_frames, alone.sync_frames), start
        assert window.audio is None


def test_a_frame_is_resized_once_and_few_windows_are_held(scene, monkeypatch):
    resized, aligned = [], []
    monkeypatch.setattr(video, "_resize", lambda rgb, fps, real=video._resize: resized.append(fps) or real(rgb, fps))
    monkeypatch.setattr(video, "_align", lambda *a, real=video._align: aligned.append(1) or real(*a))
    windows = read_windows(scene, [n / 2 for n in range(9)], duration=1.0)
    for number, _ in enumerate(windows, start=1):
        assert len(aligned) <= number + 2
    assert resized.count(8) <= 5 * 8 + 8 and resized.count(25) <= 5 * 25 + 25


def test_the_end_of_a_file(scene):
    assert video_seconds(scene) == pytest.approx(5.0, abs=0.04)
    late = next(read_windows(scene, [4.1], duration=1.1))  # 0.2 s more than there is
    assert read_codes(late.sync_frames[-5:].float() / 255) == [149] * 5
    windows = read_windows(scene, [0, 4.5], duration=1.1)
    next(windows)
    with pytest.raises(MediaError, match="needed") as caught:
        next(windows)
    assert caught.value.reason == "video_too_short"
    with pytest.raises(ValueError, match="ascend"):
        read_windows(scene, [1, 0])
    cut = cut_without_encoding(scene, scene.with_name("cut.mp4"), 1.5)
    assert video_seconds(cut) == pytest.approx(3.5, abs=0.05)


def test_damage_is_met_when_its_window_is_reached(scene, tmp_path):
    damaged = overwrite_packet(scene, tmp_path / "damaged.mp4", "video", 3.0)
    windows = read_windows(damaged, [0, 1, 2, 3], duration=1.0)
    assert next(windows).sync_frames.shape == (25, 3, 224, 224)
    with pytest.raises(MediaError, match="damaged data"):
        list(windows)


def test_a_still_image(tmp_path):
    with av.open(str(tmp_path / "a.png"), "w", format="image2") as container:
        stream = container.add_stream("png", width=200, height=100)
        stream.pix_fmt = "rgb24"
        frame = av.VideoFrame.from_ndarray(odd_media.code_image(321, 200, 100), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    image = read_image(tmp_path / "a.png")
    assert image.clip_frames.shape == (1, 3, 384, 384) and image.sync_frames.shape == (0, 3, 224, 224)
    assert read_codes(image.clip_frames / 255) == [321]
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(MediaError, match=r"text\.png"):
        read_image(tmp_path / "text.png")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photo_is_turned_as_its_exif_says(image_format, tmp_path):
    """PyAV has no name for the EXIF of a frame, and refuses all its side data."""
    exif, upright = Image.Exif(), Image.fromarray(odd_media.code_image(321, 200, 100))
    for orientation, operation in ((1, None), (2, Image.Transpose.FLIP_LEFT_RIGHT), (6, Image.Transpose.ROTATE_90)):
        exif[0x0112] = orientation
        stored = upright.transpose(operation) if operation is not None else upright
        stored.save(tmp_path / "a", image_format, exif=exif)
        assert read_codes(read_image(tmp_path / "a").clip_frames / 255) == [321], orientation
