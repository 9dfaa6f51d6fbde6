import csv
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_data import GOLDEN, MEDIA_SEED, golden
from refusals import Code, check_refusals
from released_files import clip_state, open_clip_names, write_merge_list
from transformers import CLIPConfig, CLIPModel

from mmaudio_hf.features import clip
from mmaudio_hf.features.clip import ClipEncoder, ClipTokenizer, clean_caption, clip_config

LAYERS = {"twin": (2, 2), "full": (32, 24)}
CAPTIONS = json.loads((GOLDEN / "media_tokens.json").read_text(encoding="utf-8"))


# Encoder


def tiny_config() -> CLIPConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 100, "max_position_embeddings": 77, "eos_token_id": 99}
    return CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 378, "patch_size": 14}, projection_dim=24)


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    return CLIPModel(tiny_config()).eval()


def frames_of_golden() -> torch.Tensor:
    generator = np.random.Generator(np.random.PCG64([zlib.crc32(b"clip_frames"), MEDIA_SEED]))
    return torch.from_numpy(generator.random((2, 3, 384, 384), dtype=np.float32))


@pytest.mark.parametrize("size", ["twin", pytest.param("full", marks=pytest.mark.slow)])
def test_features_match_golden(size):
    arrays = golden(f"media_clip_{size}")
    encoder = ClipEncoder.from_open_clip(
        open_clip_names(clip_state(*LAYERS[size])), clip_config(*LAYERS[size]), batch_size=3
    )
    image = encoder.encode_images(frames_of_golden())
    assert image.shape == (2, 1024)
    assert np.abs(image.numpy() - arrays["image"]).max() < 1e-5
    text = encoder.encode_text(torch.from_numpy(arrays["tokens"]).long())
    assert text.shape == (4, 77, 1024)
    assert np.abs(text[:, :, ::8].numpy() - arrays["text_strided8"]).max() < 1e-5
    assert np.abs(text[:, [0, 1, 76]].numpy() - arrays["text_first_last"]).max() < 1e-5
    assert np.abs(text.double().sum(-1).numpy() - arrays["text_token_sum"]).max() < 1e-4
    with torch.no_grad():
        states = encoder.model.text_model(input_ids=torch.from_numpy(arrays["tokens"]).long()).last_hidden_state
        pixels = ((frames_of_golden() - encoder.pixel_mean) / encoder.pixel_std)[..., :378, :378]
        patches = encoder.model.vision_model.embeddings.patch_embedding(pixels).flatten(2).mT
    assert np.allclose(states.norm(dim=-1).numpy(), arrays["text_prenorm_length"], rtol=1e-5)
    if "patch_embed_81_16" in arrays:
        assert np.abs(patches[:, ::81, ::16].numpy() - arrays["patch_embed_81_16"]).max() < 1e-5


def test_leading_axes_batches_and_unused_border(tiny):
    encoder = ClipEncoder(tiny, batch_size=4)
    frames = torch.rand(2, 3, 3, 384, 384, generator=torch.Generator().manual_seed(1))
    features = encoder.encode_images(frames)
    assert features.shape == (2, 3, 24)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 3))
    torch.testing.assert_close(encoder.encode_images(frames[1, 2]), features[1, 2])
    frames[..., 378:, :] = 0
    frames[..., 378:] = 0
    torch.testing.assert_close(encoder.encode_images(frames), features)
    frames[..., 377] = 0
    assert not torch.allclose(encoder.encode_images(frames), features)


def test_text_rows_are_unit_length_and_independent_of_the_batch(tiny):
    ids = torch.randint(100, (5, 77), generator=torch.Generator().manual_seed(2))
    features = ClipEncoder(tiny, batch_size=2).encode_text(ids)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(5, 77))
    torch.testing.assert_close(ClipEncoder(tiny, batch_size=5).encode_text(ids), features)


def test_bf16_autocast_stays_near_float32(tiny):
    encoder, frames = ClipEncoder(tiny), torch.rand(1, 3, 384, 384)
    features = encoder.encode_images(frames)
    with torch.autocast("cpu", torch.bfloat16):
        low = encoder.encode_images(frames)
    assert low.dtype == torch.float32 and 0 < (low - features).abs().max() < 2e-2


def test_transformers_files_and_open_clip_checkpoint_agree(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "model")
    torch.save(open_clip_names(tiny.state_dict()), tmp_path / "open_clip_pytorch_model.bin")
    one = ClipEncoder.from_pretrained(tmp_path / "model")
    two = ClipEncoder.from_open_clip(tmp_path / "open_clip_pytorch_model.bin", tiny_config())
    frames, ids = torch.rand(2, 3, 384, 384), torch.randint(100, (2, 77))
    assert torch.equal(one.encode_images(frames), two.encode_images(frames))
    assert torch.equal(one.encode_text(ids), two.encode_text(ids))
    assert not one.training and not any(p.requires_grad for p in two.parameters())


def test_every_wrong_open_clip_file_raises(tiny, tmp_path, capsys):
    def load(source):
        return ClipEncoder.from_open_clip(source, tiny_config())

    check_refusals(load, open_clip_names(tiny.state_dict()), "logit_scale", tmp_path, capsys)


def test_wrong_transformers_files_raise(tiny, tmp_path):
    with pytest.raises(ValueError, match="mmaudio-hf weights download"):
        ClipEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mmaudio-hf weights download"):
        ClipEncoder.from_pretrained(tmp_path / "absent" / "deep")
    state = tiny.state_dict()
    del state["visual_projection.weight"]
    state["text_projection.weight"] = torch.zeros(3, 3)
    tiny.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"does not fit.*visual_projection\.weight.*text_projection\.weight"):
        ClipEncoder.from_pretrained(tmp_path)


def test_damaged_transformers_files_raise_and_their_code_is_not_run(tiny, tmp_path, capsys):
    tiny.config.save_pretrained(tmp_path)
    torch.save({"logit_scale": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="would run code"):
        ClipEncoder.from_pretrained(tmp_path)
    assert Code.MARK not in capsys.readouterr().out
    (tmp_path / "model.safetensors").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="cannot be read"):
        ClipEncoder.from_pretrained(tmp_path)


def test_models_for_other_image_sizes_raise():
    config = tiny_config()
    config.vision_config.image_size = 224
    with pytest.raises(ValueError, match="224 pixels"):
        ClipEncoder(CLIPModel(config))


def test_wrong_inputs_raise(tiny):
    encoder = ClipEncoder(tiny)
    with pytest.raises(ValueError, match="give floats"):
        encoder.encode_images(torch.zeros(1, 3, 384, 384, dtype=torch.uint8))
    with pytest.raises(ValueError, match="give floats"):
        encoder.encode_images(torch.zeros(1, 3, 378, 378))
    with pytest.raises(ValueError, match="give \\(batch, 77\\)"):
        encoder.encode_text(torch.zeros(1, 76, dtype=torch.long))


# Tokenizer: logic on a table made here, ids on the real table where it can be had


@pytest.fixture(scope="module")
def merge_list(tmp_path_factory):
    return write_merge_list(tmp_path_factory.mktemp("bpe") / "bpe.txt.gz")


@pytest.fixture(scope="module")
def synthetic(merge_list):
    return ClipTokenizer.from_files(merge_list)


def test_ids_follow_the_layout_of_the_table(synthetic):
    first_merge, letter = 512, ord("a") - 33
    ids = synthetic(["", "dog", "Dog  CAT", "zb", "!"])
    assert ids.shape == (5, 77) and ids.dtype == torch.int64
    assert ids[0].tolist() == [49406, 49407] + [0] * 75
    assert ids[1, :4].tolist() == [49406, first_merge + 1, 49407, 0]
    assert ids[2, :5].tolist() == [49406, first_merge + 1, first_merge + 3, 49407, 0]
    assert ids[3, 1:4].tolist() == [letter + 25, letter + 1 + 256, 49407]
    assert ids[4, 1].item() == 256  # "!</w>": "!" itself is 0, as the padding


def test_long_captions_are_cut_and_keep_the_end(synthetic):
    ids = synthetic(["dog " * 75, "dog " * 76, "dog " * 74])
    assert ids[0, -2:].tolist() == ids[1, -2:].tolist() == [513, 49407]
    assert ids[2, -2:].tolist() == [49407, 0]


def test_captions_are_cleaned():
    assert clean_caption("  Rock &amp;amp; ROLL\t&lt;b&gt;\n ") == "rock & roll <b>"
    assert clean_caption("<x> a &amp;lt; b") == "<x> a < b"  # tags keep ftfy from resolving entities
    assert clean_caption("caf\u00c3\u00a9 \u201cx\u201d \ufb01") == 'caf\u00e9 "x" fi'


def test_hub_files_give_the_same_ids(synthetic, merge_list, tmp_path):
    vocabulary, merges = clip._read_merge_list(merge_list)
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(word, word): index for word, index in vocabulary.items()}
    lines = [" ".join(pair) for pair in merges]
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "two" / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary, "merges": lines}}))
    expected = synthetic(CAPTIONS["captions"])
    assert torch.equal(ClipTokenizer.from_files(tmp_path / "two")(CAPTIONS["captions"]), expected)
    assert torch.equal(ClipTokenizer.from_files(tmp_path / "one")(CAPTIONS["captions"]), expected)


def test_wrong_tables_raise(tmp_path):
    table = tmp_path / "bpe.txt.gz"
    for content in (b"", b"not gzip", gzip.compress(b"#v\na b c\n"), gzip.compress(b"\xff\xff\n\xff")):
        table.write_bytes(content)
        with pytest.raises(ValueError, match="merges"):
            ClipTokenizer.from_files(table)
    table.write_bytes(gzip.compress(b"#v\nd o\n"))
    with pytest.raises(ValueError, match="515 tokens and 1 merges"):
        ClipTokenizer.from_files(table)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither vocab\.json"):
        ClipTokenizer.from_files(tmp_path / "empty")
    (tmp_path / "empty" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="damaged tokenizer"):
        ClipTokenizer.from_files(tmp_path / "empty")
    with pytest.raises(ValueError, match="mmaudio-hf weights download"):
        ClipTokenizer.from_files(tmp_path / "absent" / "deep" / "bpe.txt.gz")


def test_one_string_raises(synthetic):
    with pytest.raises(ValueError, match="list of captions"):
        synthetic("dog")


@pytest.fixture(scope="session")
def real_tokenizer():
    """Tokenizer on the real table, which the wheel of open_clip ships; fetched once into the temporary directory."""
    table = Path(tempfile.gettempdir()) / f"mmaudio_hf_tests_{os.getuid()}" / "bpe_simple_vocab_16e6.txt.gz"
    if not table.is_file():
        with tempfile.TemporaryDirectory() as folder:
            package = ["--no-deps", "--only-binary", ":all:", "--dest", folder, "open_clip_torch==3.3.0"]
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "1", "--timeout", "10"]
            done = subprocess.run([*pip, *package], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"the byte-pair table cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
            content = zipfile.ZipFile(next(Path(folder).glob("*.whl"))).read(f"open_clip/{table.name}")
        table.parent.mkdir(exist_ok=True)
        table.with_suffix(".part").write_bytes(content)
        table.with_suffix(".part").rename(table)
    return ClipTokenizer.from_files(table)


def test_ids_match_golden(real_tokenizer):
    assert np.array_equal(real_tokenizer(CAPTIONS["captions"]), golden("media_tokens")["ids"])


def test_ids_of_whole_label_lists_match_golden(real_tokenizer):
    folder = Path(os.environ.get("MMAUDIO_HF_EXAMPLES", "absent")) / "sets"
    if not folder.is_dir():
        pytest.skip("MMAUDIO_HF_EXAMPLES does not name a folder with sets/")
    for name in ("vgg-val", "vgg-test"):
        with open(folder / f"{name}.tsv", newline="", encoding="utf-8") as file:
            labels = [row["label"] for row in csv.DictReader(file, delimiter="\t")]
        ids = real_tokenizer(labels).numpy()
        assert int((ids != 0).sum()) == CAPTIONS[f"{name}_nonzero"]
        assert hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest() == CAPTIONS[f"{name}_sha256_int64le"]
