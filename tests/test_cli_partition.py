"""`mmaudio-hf partition`: what it says of the recordings it cut, and of those that it could not use."""

import json

import torch
import yaml

from mmaudio_hf.cli import main
from mmaudio_hf.media.audio import write_audio
from mmaudio_hf.media.lists import read_clips


def write_recipe(folder):
    source = {"name": "noises", "media_dir": str(folder / "media"), "list": str(folder / "captions.tsv")}
    tree = {"name": "noises", "extraction": {"output_dir": str(folder / "out"), "audios": [source], "num_proc": 2}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    (folder / "media").mkdir()
    return str(folder / "recipe.yaml")


def test_partition_accounts_for_every_file(tmp_path, capsys):
    recipe, media = write_recipe(tmp_path), tmp_path / "media"
    write_audio(media / "long.flac", torch.rand(8000 * 17), 8000)
    write_audio(media / "short.flac", torch.rand(8000 * 8), 8000)
    (media / "broken.wav").write_text("no audio")
    (media / "notes.txt").write_text("not media")
    assert main(["partition", recipe]) == 0
    clips, rejects = tmp_path / "out" / "noises.clips.tsv", tmp_path / "out" / "noises.clips.rejects.jsonl"
    printed = capsys.readouterr()
    assert f"{clips}: 2 clips, 2 audio files rejected, see {rejects}; 1 other files ignored" in printed.out
    assert "3/3" in printed.err  # the bar
    assert [clip.id for clip in read_clips(clips)] == ["long_0", "long_1"]
    lines = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(line["file"], line["reason"]) for line in lines] == [
        ("broken.wav", "unreadable"),
        ("short.flac", "audio_too_short"),
    ]
    (media / "broken.wav").unlink()
    (media / "short.flac").unlink()
    assert main(["partition", recipe]) == 0
    assert rejects.read_text() == "" and "rejects.jsonl" not in capsys.readouterr().out


def test_no_clip_at_all_is_an_error(tmp_path, capsys):
    recipe, media = write_recipe(tmp_path), tmp_path / "media"
    write_audio(media / "short.flac", torch.rand(8000 * 8), 8000)
    assert main(["partition", recipe]) == 2
    error = capsys.readouterr().err
    assert f"{media}: no audio file gives a clip" in error and "8.1 s" in error
    assert not (tmp_path / "out" / "noises.clips.tsv").exists()
    assert "audio_too_short" in (tmp_path / "out" / "noises.clips.rejects.jsonl").read_text()
