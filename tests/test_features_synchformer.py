import pytest
import torch
from golden_data import golden, relative_error, state_dict, tensor
from refusals import check_refusals

from mmaudio_hf.features.synchformer import SynchformerVisual, flops, segment_frames


@pytest.fixture(scope="module")
def shallow_state():
    """Released-style state dict of one block, with parts of the released file that are not used."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, value in SynchformerVisual(depth=1).state_dict().items():
        state[name] = torch.randn(value.shape, generator=generator) * 0.05 + name.endswith("norm.weight")
    state |= {"patch_embed.proj.weight": torch.zeros(768, 3, 16, 16), "patch_embed.proj.bias": torch.zeros(768)}
    return {f"vfeat_extractor.{name}": value for name, value in state.items()}


@pytest.fixture(scope="module")
def shallow(shallow_state):
    return SynchformerVisual(depth=1).load_released(shallow_state | {"afeat_extractor.x": torch.zeros(1)})


@pytest.fixture(scope="module")
def segments():
    return torch.rand(1, 2, 16, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def full():
    """All 12 blocks: 360 GFLOP per segment, half a minute for five of them on one core."""
    return SynchformerVisual().load_released(state_dict("synchformer_visual"))


@pytest.fixture(scope="module")
def video_segments():
    """The 24 segments of the golden video of 200 frames."""
    frames = [0.5 * tensor(f"synchformer_video/frame{i}", (3, 224, 224)) for i in range(200)]
    return segment_frames(torch.stack(frames))


def test_two_segments_match_golden(full):
    arrays = golden("synchformer_segments")
    features = full(0.5 * tensor("synchformer_segments/video", (1, 2, 16, 3, 224, 224)))
    assert features.shape == (1, 16, 768)
    assert relative_error(features.view(1, 2, 8, 768), arrays, "features") < 1e-4


def test_first_middle_and_last_segment_of_a_video_match_golden(full, video_segments):
    """Segments do not depend on each other, so three show what all show; the slow test takes all 24."""
    arrays, chosen = golden("synchformer_video"), [0, 11, 23]
    assert len(video_segments) == 24 and arrays["features.stride"] == 3
    theirs = torch.from_numpy(arrays["features.slice"]).view(24, 8, 256)[chosen]
    ours = full(video_segments[chosen][None]).view(3, 8, 768)[:, :, ::3]
    assert (ours - theirs).norm() / theirs.norm() < 1e-4


@pytest.mark.slow
def test_a_video_of_200_frames_matches_golden(full, video_segments):
    assert relative_error(full(video_segments[None]), golden("synchformer_video"), "features") < 1e-4


def test_segments_overlap_by_half_and_drop_the_rest():
    frames = torch.arange(39.0)[:, None, None, None].expand(-1, 3, 224, 224)
    first = segment_frames(frames)
    assert first.shape == (3, 16, 3, 224, 224)
    assert first[:, 0, 0, 0, 0].tolist() == [0, 8, 16] and first[:, -1, 2, 5, 5].tolist() == [15, 23, 31]
    assert segment_frames(torch.zeros(1, 3, 224, 224).expand(200, -1, -1, -1)).shape[0] == 24


def test_segments_are_independent_of_each_other_and_of_the_batch(shallow, segments):
    features = shallow(segments)
    assert features.shape == (1, 16, 768) and features.std() > 0.01
    shallow.segment_batch = 1
    torch.testing.assert_close(shallow(segments.transpose(0, 1)).view(1, 16, 768), features, rtol=1e-4, atol=1e-5)


def test_bf16_autocast_stays_near_float32(shallow, segments):
    features = shallow(segments[:, :1])
    with torch.autocast("cpu", torch.bfloat16):
        low = shallow(segments[:, :1])
    assert low.dtype == torch.float32 and not torch.equal(low, features)
    assert (low - features).norm() / features.norm() < 2e-2


def test_the_visual_encoder_alone_loads_too(shallow_state, shallow, segments):
    bare = {name.removeprefix("vfeat_extractor."): value for name, value in shallow_state.items()}
    encoder = SynchformerVisual(depth=1).load_released(bare)
    assert torch.equal(encoder(segments[:, :1]), shallow(segments[:, :1]))


def test_every_wrong_file_raises(shallow_state, tmp_path, capsys):
    bare = {name.removeprefix("vfeat_extractor."): value for name, value in shallow_state.items()}
    load = SynchformerVisual(depth=1).load_released
    check_refusals(load, bare, "blocks.0.timeattn.qkv.bias", tmp_path, capsys)


def test_the_unused_patch_embedding_must_be_there(shallow_state):
    del (state := dict(shallow_state))["vfeat_extractor.patch_embed.proj.bias"]
    with pytest.raises(ValueError, match=r"patch_embed\.proj\.bias is missing"):
        SynchformerVisual(depth=1).load_released(state)


@pytest.mark.parametrize("shape", [(1, 15, 3, 224, 224), (16, 3, 224, 224), (1, 1, 3, 16, 224, 224)])
def test_wrong_segment_shapes_raise(shape):
    with pytest.raises(ValueError, match="give \\(batch, segments, 16, 3, 224, 224\\)"):
        SynchformerVisual(depth=0)(torch.empty(shape, device="meta"))


@pytest.mark.parametrize("shape", [(15, 3, 224, 224), (16, 3, 384, 384), (16, 224, 224)])
def test_wrong_frame_shapes_raise(shape):
    with pytest.raises(ValueError, match="at least 16"):
        segment_frames(torch.empty(shape, device="meta"))


def test_flops():
    # 12 blocks of 16 D^2 multiplications per token (attention maps of two attentions, MLP), attention itself on top.
    linear = 2 * 12 * 1569 * 16 * 768**2
    assert 3 * linear < flops(3) < 3 * 1.07 * linear
