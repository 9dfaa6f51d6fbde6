"""Opening media: what is no video or audio at all, what needs a key, and the lengths that headers state."""

import av
import odd_media
import pytest
from odd_media import Odd, steady, write_odd
from PIL import Image, features

from mmaudio_hf.media.audio import read_waveform
from mmaudio_hf.media.container import MediaError, open_media, probe
from mmaudio_hf.media.measure import measure
from mmaudio_hf.media.video import read_image, read_video


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_an_image_with_the_name_of_a_video_is_named_as_that(image_format, tmp_path):
    path = tmp_path / "a.mp4"
    if image_format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    Image.fromarray(odd_media.code_image(5, 96, 96)).save(path, image_format)
    for read in (read_video, read_waveform, open_media, lambda path: read_video(path, video_only=True)):
        with pytest.raises(MediaError, match=r"a\.mp4: is a still image or an animation") as caught:
            read(path)
        assert caught.value.reason == "unreadable"
    assert "is a still image" in measure(path, "video")["damage"] and not measure(path, "video")["opened"]
    assert read_image(path).clip_frames.shape == (1, 3, 384, 384) and probe(path)["video"]["width"] == 96


@pytest.mark.parametrize(
    ("content", "kind"), [("<!DOCTYPE html>", "it is text: '<!DOCTYPE html>'"), ("", "it is empty"), ("\0" * 999, "")]
)
def test_what_a_download_left_is_named_as_that(content, kind, tmp_path):
    (tmp_path / "a.mp4").write_text(content)
    with pytest.raises(MediaError, match=r"a\.mp4: cannot be opened as media") as caught:
        open_media(tmp_path / "a.mp4")
    assert caught.value.reason == "unreadable" and kind in str(caught.value)


def test_an_encrypted_file_is_named_as_that(tmp_path):
    options = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": 32 * "a", "encryption_kid": 32 * "b"}
    path = write_odd(tmp_path / "a.mp4", Odd(steady(1.5)), options)
    for read in (read_video, read_waveform, lambda path: read_video(path, video_only=True)):
        with pytest.raises(MediaError, match="encrypted") as caught:
            read(path)
        assert caught.value.reason == "decode_error" and caught.value.probe["video"]["codec"] == "h264"
    assert "encrypted" in measure(path, "video")["damage"]


def test_what_a_probe_says(tmp_path):
    stated = probe(write_odd(tmp_path / "a.mp4", Odd(steady(1.5), size=(64, 48), rate=32_000)))
    assert stated["video"] | {"codec": "h264", "width": 64, "height": 48, "frames": 38} == stated["video"]
    assert stated["audio"] | {"codec": "aac", "sample_rate": 32_000, "channels": 2} == stated["audio"]
    assert "mp4" in stated["format"] and stated["bytes"] == (tmp_path / "a.mp4").stat().st_size
    with pytest.raises(MediaError) as caught:
        probe(tmp_path / "b.mp4")
    assert caught.value.reason == "not_found" and caught.value.probe == {}
    assert av.__version__.startswith("18."), "PyAV 19 takes no metadata_errors, which every open passes"
