"""A fake of av-benchmark for tests: a package with the same interface in an environment with an interpreter of its own.

It reads audio files and writes caches of the published names, whose features are fixed random projections of the
spectrum, and few, since the root of a large matrix takes a minute. The networks behind the real ones
cannot be fetched for a test. What goes wrong is asked for in `misdeed.txt` beside the package.

With `networks` it has the habits of the real package: readers that retry without end, torch.hub asking on a terminal
whether to trust a repository, weights that are fetched at first use, MS-CLAP taking a random stretch of a file.
"""

import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmaudio_hf.evaluation import av_bench

EXTRACTION_MODELS = """
from pathlib import Path

_clap_ckpt_path = Path("nowhere")
_syncformer_ckpt_path = Path("nowhere")
"""

EXTRACT = """
import os
import signal
import sys
import time
import wave
from pathlib import Path

from av_bench import extraction_models

MISDEED = Path(__file__).with_name("misdeed.txt").read_text()
if MISDEED == "import":
    raise ImportError("cannot import name 'find_pruneable_heads_and_indices' from 'transformers.pytorch_utils'")


def features(samples, name, *shape):
    import numpy as np

    spectrum = np.log1p(np.abs(np.fft.rfft(samples, 4096))[:256])
    weights = np.random.default_rng(len(name)).standard_normal((256, int(np.prod(shape)))).astype("float32") / 16
    return (spectrum.astype("float32") @ weights).reshape(shape)


def extract(audio_path, output_path, *, audio_length=8.0, batch_size=128, num_workers=32, device,
            skip_video_related=False, skip_clap=False):
    if MISDEED == "sleep":
        Path(__file__).with_name("pid.txt").write_text(str(os.getpid()))
        time.sleep(600)
    print("\\x00\\xff loading", audio_length, device, flush=True)
    sys.stdout.buffer.write(b"\\xff\\xfe{not json}\\n")
    sys.stdout.flush()
    for path in (extraction_models._clap_ckpt_path, extraction_models._syncformer_ckpt_path):
        if not path.is_file():
            raise FileNotFoundError(path)
    while MISDEED == "retry":  # as it does where torchaudio cannot read
        for path in sorted(audio_path.glob("*.wav")):
            print(f"ERROR:root:Error loading {path}: TorchCodec is required", flush=True)
    import numpy as np
    import torch

    if MISDEED == "raise":
        raise RuntimeError("CUDA out of memory")
    if MISDEED == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    files = {"pann_features": {}, "vggish_features": {}, "passt_features_embed": {}, "passt_logits": {}}
    if not skip_video_related:
        files |= {"imagebind_audio": {}, "synchformer_audio": {}}
    if not skip_clap:
        files |= {"clap_laion_audio": {}, "clap_ms_audio": {}}
    shapes = {"vggish_features": (8, 4), "passt_features_embed": (8,), "passt_logits": (9,), "imagebind_audio": (5,),
              "synchformer_audio": (24, 6, 768), "clap_laion_audio": (6,), "clap_ms_audio": (7,)}
    for path in sorted(audio_path.glob("*.wav"), key=lambda path: path.stem):
        with wave.open(str(path)) as file:
            assert file.getnframes() >= audio_length * file.getframerate()
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        for name, values in files.items():
            if name == "pann_features":
                sizes = {"logits": 9, "2048": 10, "clipwise_output": 9}
                values[path.stem] = {k: torch.from_numpy(features(samples, k, n)) for k, n in sizes.items()}
            else:
                values[path.stem] = torch.from_numpy(features(samples, name, *shapes[name]))
    if MISDEED == "forget":
        del files["passt_logits"]
    if MISDEED == "skip":
        for values in files.values():
            values.pop(sorted(values)[0])
    if len(files["pann_features"]) % batch_size == 1 and not skip_clap:  # it squeezes a batch of one
        values = files["clap_ms_audio"]
        values[sorted(values)[-1]] = values[sorted(values)[-1]][0]
    output_path.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        torch.save(values, output_path / (name + ".pth"))
"""

NETWORKS = """
import random
import sys
import time
import types
import urllib.error
import wave
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from av_bench.features import features

MISDEED = Path(__file__).with_name("misdeed.txt").read_text()
if MISDEED == "tokenizer":
    raise TypeError("stat: path should be string, bytes, os.PathLike or integer, not NoneType")
if MISDEED == "offline":
    raise OSError("Can't load tokenizer for 'roberta-base'")
_clap_ckpt_path = _syncformer_ckpt_path = Path("nowhere")


def trusting(repository, model, trust_repo=None):
    if not trust_repo:
        input(f"The repository {repository} does not belong to the list of trusted repositories: (y/N)")


torch.hub.load = trusting


class Network(torch.nn.Module):
    def __init__(self, shapes, axis=-1):
        super().__init__()
        self.shapes = shapes

    def encode(self, batch):
        one = {name: torch.stack([torch.from_numpy(features(row.flatten().numpy(), name, *shape)) for row in batch])
               for name, shape in self.shapes.items()}
        return one if len(one) > 1 else next(iter(one.values()))

    forward = extract_afeats = encode

    def get_audio_embedding_from_data(self, batch, use_tensor):
        return self.encode(batch)

    def get_text_embedding(self, captions, use_tensor):
        return torch.stack([torch.full((6,), float(len(caption))) for caption in captions])

    def load_ckpt(self, path, verbose):
        assert path.read_bytes() == b"weights"


class Cnn14(Network):
    def __init__(self, features_list):
        super().__init__({"logits": (9,), "2048": (10,)})
        folder = Path.home() / ".cache" / "audioldm_eval" / "ckpt"
        first, second = folder / "Cnn14_mAP=0.431.pth", folder / "Cnn14_16k_mAP=0.438.pth"
        if MISDEED == "panns":
            if not first.exists():  # it looks for this one alone
                folder.mkdir(parents=True, exist_ok=True)
                for path in (first, second):
                    torch.save({"model": {}}, path if not path.exists() else f"{path}.1")  # as wget names it
            torch.load(second, weights_only=True)


def VGGish():
    torch.hub.load("harritaylor/torchvggish", "vggish")
    if MISDEED == "fetch":
        log = Path(__file__).with_name("fetches.txt")
        with log.open("a") as file:
            file.write("begin\\n")
        deadline = time.monotonic() + 2  # another that does not wait begins meanwhile
        while log.read_text().count("begin") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        with log.open("a") as file:
            file.write("end\\n")
    return Network({"vggish_features": (8, 4)})


def get_basic_model():
    return Network({"passt": (527 + 8,)})


class ImageBind(Network):
    def forward(self, inputs):
        ((kind, batch),) = inputs.items()
        return {kind: batch.flatten(1)[:, :5].clone() if kind == "vision" else self.encode(batch)}


def imagebind_huge():
    if MISDEED == "network":
        raise urllib.error.URLError("Temporary failure in name resolution")
    return ImageBind({"imagebind": (5,)})


class CLAP:
    def load_audio_into_tensor(self, path):
        samples = read(path)[0]
        start = random.randrange(len(samples) // 8)
        return samples[start : start + len(samples) // 2]

    def get_audio_embeddings(self, paths):
        return Network({"ms": (7,)}).encode([self.load_audio_into_tensor(path) for path in paths])

    def get_text_embeddings(self, captions):
        return torch.stack([torch.full((7,), float(len(caption))) for caption in captions])


Synchformer = lambda: Network({"synchformer_audio": (24, 6, 768)})
imagebind_model = types.SimpleNamespace(imagebind_huge=imagebind_huge)
laion_clap = types.SimpleNamespace(CLAP_Module=lambda: Network({"laion": (6,)}))


class ExtractionModels(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.panns = Cnn14(features_list=["2048", "logits"])
        self.panns = self.panns.eval()
        self.vggish = VGGish().eval()
        self.passt_model = get_basic_model()
        self.imagebind = imagebind_model.imagebind_huge().eval()
        self.laion_clap = laion_clap.CLAP_Module().eval()
        self.laion_clap.load_ckpt(_clap_ckpt_path, verbose=False)
        self.ms_clap = CLAP()
        self.synchformer = Synchformer().eval()
        self.sync_mel_spectrogram = torch.nn.Identity()


def read(path):
    if MISDEED == "wheel":
        raise ImportError("TorchCodec is required for load_with_torchcodec")
    with wave.open(str(path)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    return torch.from_numpy(samples.astype("float32"))[None]


class AudioDataset:
    def __init__(self, paths, audio_length, sr):
        self.paths, self.length = paths, int(16000 * audio_length)

    def read_from_file(self, path):
        return read(path)[:, : self.length]

    def __getitem__(self, index):
        while True:
            try:
                return self.read_from_file(self.paths[index]), self.paths[index].stem
            except Exception as error:
                print(f"Error loading {self.paths[index]}: {error}", file=sys.stderr)


class ImageBindAudioDataset(AudioDataset):
    def __init__(self, paths):
        super().__init__(paths, 100, 16000)

    load_and_transform_audio_data = AudioDataset.read_from_file


class SynchformerAudioDataset(AudioDataset):
    def __init__(self, paths, duration):
        super().__init__(paths, duration, 16000)

    def sample(self, index):
        waveform = self.read_from_file(self.paths[index])[0]
        if len(waveform) != self.length:
            raise ValueError(f"Audio {self.paths[index]} is too short")
        return waveform, self.paths[index].stem


def encode_audio_with_sync(network, batch, mel):
    return network.extract_afeats(mel(batch))
"""

IMAGEBIND = """
class ModalityType:
    AUDIO, VISION = "audio", "vision"
"""

AESTHETICS = """
class Predictor:
    def forward(self, batch):
        return [{axis: float(len(axis) + len(row["path"]) % 3) for axis in ("CE", "CU", "PC", "PQ")} for row in batch]


initialize_predictor = Predictor
"""

VIDEO = """
from torio.io import StreamingMediaDecoder  # which newer torchaudio does not have


class VideoDataset:
    def __init__(self, paths, duration_sec):
        pass

    def ib_transform(self, frames):
        return frames[:, :, :8, :8].float() / 255

    def crop(self, videos):
        return [videos[0]] * 3
"""


class FakeAvBench:
    """The environment in `folder`; `python` is its interpreter."""

    def __init__(self, folder: Path, networks: bool = False):
        # Without pip, and with the libraries of this environment: another interpreter is the point.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
        self.python, self.site = folder / "env" / "bin" / "python", folder / "site"
        package = self.site / "av_bench"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "extraction_models.py").write_text(EXTRACTION_MODELS)
        (package / "extract.py").write_text(EXTRACT)
        if networks:
            start, end = EXTRACT.index("def features"), EXTRACT.index("def extract")
            (package / "features.py").write_text(EXTRACT[start:end])
            (package / "extraction_models.py").write_text(NETWORKS)
            (package / "extract.py").write_text(f"from av_bench.extraction_models import *\n{EXTRACT}")
            files = {"imagebind/models/imagebind_model": IMAGEBIND, "av_bench/data/video_dataset": VIDEO}
            for path, text in (files | {"audiobox_aesthetics/infer": AESTHETICS}).items():
                file = self.site / f"{path}.py"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
        self._misdeed, self.pid_file = package / "misdeed.txt", package / "pid.txt"
        self.fetches = package / "fetches.txt"
        self.misbehave("")
        (site,) = (folder / "env" / "lib").glob("python*/site-packages")
        libraries = Path(sys.prefix) / "lib" / site.parent.name / "site-packages"
        (site / "fake.pth").write_text(f"{self.site}\n{libraries}\n")

    def misbehave(self, how: str) -> None:
        """From here on "import", "raise", "die", "sleep", "forget" a file, "skip" an audio file, "retry" for ever, "".
        With `networks` also "offline", "tokenizer", "fetch" slowly, "network" (no ImageBind), "wheel" (torchcodec),
        "panns" (which reads its files)."""
        self._misdeed.write_text(how)


def fork_jobs(patch: pytest.MonkeyPatch) -> None:
    """Jobs of fakes are forked from this process, which has imported torch: an interpreter takes 2 to 3 s to do so.

    What a job does runs between fork and exec, to which it never comes.
    """

    def popen(words: list[str], env: dict[str, str], **options) -> subprocess.Popen:
        site = Path(words[0]).parents[2] / "site" if words[0].endswith("/env/bin/python") else None

        def job() -> None:
            os.closerange(3, 4096)  # with the pipe by which the parent learns whether exec has failed
            os.environ.clear()
            os.environ |= env
            torch.set_num_threads(1)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
            sys.argv, sys.path[:0] = words[1:], [os.path.dirname(words[1]), str(site)]
            try:
                runpy.run_path(words[1], run_name="__main__")
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(0)

        return subprocess.Popen(words, env=env, preexec_fn=job if site else None, **options)

    patch.setattr(av_bench, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": popen}))
