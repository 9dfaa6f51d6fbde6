"""A fake of av-benchmark for tests: a package with the same interface in an environment with an interpreter of its own.

It reads audio files and writes caches of the published names, whose features are fixed random projections of the
spectrum, and few, since the root of a large matrix takes a minute. The networks behind the real ones
cannot be fetched for a test. What goes wrong is asked for in `misdeed.txt` beside the package.
"""

import subprocess
import sys
from pathlib import Path

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
        time.sleep(120)
    import numpy as np
    import torch

    print("\\x00\\xff loading", audio_length, device, flush=True)
    sys.stdout.buffer.write(b"\\xff\\xfe{not json}\\n")
    for path in (extraction_models._clap_ckpt_path, extraction_models._syncformer_ckpt_path):
        if not path.is_file():
            raise FileNotFoundError(path)
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
    output_path.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        torch.save(values, output_path / (name + ".pth"))
"""


class FakeAvBench:
    """The environment in `folder`; `python` is its interpreter."""

    def __init__(self, folder: Path):
        # Without pip, and with the libraries of this environment: another interpreter is the point.
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
        self.python, package = folder / "env" / "bin" / "python", folder / "site" / "av_bench"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "extraction_models.py").write_text(EXTRACTION_MODELS)
        (package / "extract.py").write_text(EXTRACT)
        self._misdeed, self.pid_file = package / "misdeed.txt", package / "pid.txt"
        self.misbehave("")
        (site,) = (folder / "env" / "lib").glob("python*/site-packages")
        libraries = Path(sys.prefix) / "lib" / site.parent.name / "site-packages"
        (site / "fake.pth").write_text(f"{folder / 'site'}\n{libraries}\n")

    def misbehave(self, how: str) -> None:
        """From here on: "import", "raise", "die", "sleep", "forget" a file, "skip" an audio file, or ""."""
        self._misdeed.write_text(how)
