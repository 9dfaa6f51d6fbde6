"""The process that runs av-benchmark with its own interpreter: `python av_bench_job.py JOB.json RESULT.json`.

It imports nothing of this package, which need not be installed there, and reports in RESULT.json alone: the libraries
behind av-benchmark print to stdout and stderr as they like. It must run on the Python of any such environment.

The networks, the readers of audio and the settings are av-benchmark's own. The loop over files is not: its own never
ends where no file can be read, builds all networks before it uses one, and loses everything with the first error.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import json
import os
import random
import sys
import tempfile
import threading
import time
import traceback
import wave
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

PASST_SAMPLES = 320_000  # 10 s at 32 kHz, to which av-benchmark pads
PASST_CLASSES = 527  # logits, in front of the features
NAMES = {"panns": "Cnn14", "vggish": "VGGish", "passt_model": "get_basic_model", "synchformer": "Synchformer"}
NAMES |= {"imagebind": "imagebind_model.imagebind_huge", "laion_clap": "laion_clap.CLAP_Module", "ms_clap": "CLAP"}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job: "check", "extract", "text" or "video". Returns what there is to report; failures are exceptions."""
    try:
        import av_bench.extract
    except TypeError as error:  # transformers opens the file of a tokenizer that it could not fetch
        raise OSError("a tokenizer that it reads when it is imported is not in the cache of the Hub") from error
    import av_bench.extraction_models
    import torch

    # torch.hub asks on a terminal whether to trust VGGish's repository. Whoever runs av-benchmark has answered.
    hub_load, load = torch.hub.load, torch.load
    torch.hub.load = lambda *args, **options: hub_load(*args, **{"trust_repo": True, **options})
    # Weights are mapped, not read: ImageBind's are 4.8 GB beside the 4.8 GB of the network.
    torch.load = lambda file, *args, **options: load(
        file, *args, **{"mmap": isinstance(file, (str, os.PathLike)) and zipfile.is_zipfile(file), **options}
    )
    models = av_bench.extraction_models
    models._clap_ckpt_path, models._syncformer_ckpt_path = Path(job.get("clap", "")), Path(job.get("synchformer", ""))
    known = hasattr(av_bench.extract, "AudioDataset") and hasattr(models, "ExtractionModels")
    if job["action"] == "check":
        if known:
            read_example(av_bench.extract)
        modules = {name: sys.modules.get(name) for name in ("torch", "transformers")}
        versions = {name: getattr(module, "__version__", "not imported") for name, module in modules.items()}
        return {"python": sys.version.split()[0], **versions}
    Path(job["output_path"]).mkdir(parents=True, exist_ok=True)
    for path in (models._clap_ckpt_path, models._syncformer_ckpt_path):
        if not path.is_file():
            raise FileNotFoundError(path)
    with torch.inference_mode():
        if known:
            return {"text": text, "video": video}.get(job["action"], extract)(job, networks_of(models))
    if job["action"] != "extract":
        raise ImportError("this version of av-benchmark has no networks of a known name")
    by_package(job, av_bench.extract)
    return {}


def read_example(package: Any) -> None:
    """Read a WAV file as av-benchmark does; an exception says what torchaudio lacks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "example.wav"
        with wave.open(str(path), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", "not compressed"))
            file.writeframes(bytes(32000))
        try:
            package.AudioDataset([path], audio_length=1.0, sr=16000).read_from_file(path)
        except Exception as error:
            raise UnreadableAudio(message(error)) from error


class UnreadableAudio(RuntimeError):
    """torchaudio cannot read a WAV file."""


def by_package(job: dict[str, Any], package: Any) -> None:
    """Another version of av-benchmark, whose parts are not known: its own loop. No batch is left with one file, whose
    features it would store without their dimension.
    """
    files, size = len(list(Path(job["audio_path"]).glob("*.wav"))), job["batch_size"]
    package.extract(
        Path(job["audio_path"]),
        Path(job["output_path"]),
        audio_length=job["audio_length"],
        batch_size=next((b for b in range(size, size + files) if files % b != 1), size),
        num_workers=job["num_workers"],
        device=job["device"],
        skip_video_related=job["skip_video_related"],
        skip_clap=job["skip_clap"],
    )


# --- Networks ---------------------------------------------------------------------------------------------------------


class Deferred:
    """A network that is built when it is needed, with the arguments and calls that av-benchmark gave it."""

    def __init__(self, make: Callable[[], Any]):
        self._make = make
        self._calls: list[tuple[str, tuple, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Deferred:
            self._calls.append((name, args, options))
            return self

        return call

    def _build(self) -> Any:
        network = self._make()
        for name, args, options in self._calls:
            getattr(network, name)(*args, **options)
        return network


def networks_of(models: Any) -> Any:
    """av-benchmark's ExtractionModels with deferred networks: of 9 GB of weights one network is needed at a time."""

    def deferred(make: Callable[..., Any]) -> Callable[..., Deferred]:
        return lambda *args, **options: Deferred(lambda: make(*args, **options))

    with contextlib.ExitStack() as stack:
        for path in NAMES.values():
            *folders, name = path.split(".")
            owner = functools.reduce(getattr, folders, models)
            stack.enter_context(mock.patch.object(owner, name, deferred(getattr(owner, name))))
        return models.ExtractionModels()


def built(networks: Any, name: str, device: str) -> Any:
    """One network on its device. Its weights are fetched at first use, by one process of the machine at a time."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmaudio_hf" / "av_bench"
    folder.mkdir(parents=True, exist_ok=True)
    fetched = folder / f"{name}.fetched"
    with open(folder / f"{name}.lock", "w") as lock:
        if not fetched.exists():
            fcntl.flock(lock, fcntl.LOCK_EX)
        print(f"{name}: loading", flush=True)
        try:
            network = getattr(networks, name)._build()
        except Exception as error:
            # wget leaves a part of a file when it is ended, and PANNs' loader, which looks for the first of its two
            # files alone, fetches neither again.
            words = ("EOF", "PytorchStreamReader", "corrupt", "truncated")
            damaged = isinstance(error, (EOFError, FileNotFoundError)) or any(word in str(error) for word in words)
            if name != "panns" or not damaged:
                raise
            for path in (Path.home() / ".cache" / "audioldm_eval" / "ckpt").glob("Cnn14*.pth"):
                path.replace(path.with_suffix(".damaged"))
            print(f"panns: fetched again, since a file of it is missing or damaged ({message(error)})", flush=True)
            network = getattr(networks, name)._build()
        fetched.touch()
    if name == "ms_clap":  # it takes 7 s at a random place of longer files: at one that depends on the file alone
        load = network.load_audio_into_tensor

        def load_seeded(path: Path, *args: Any, **options: Any) -> Any:
            random.seed(Path(path).stem)
            return load(path, *args, **options)

        network.load_audio_into_tensor = load_seeded
    if name == "vggish":
        network.device = device
    return network.to(device) if hasattr(network, "to") else network


# --- Features of audio ------------------------------------------------------------------------------------------------


def families(job: dict[str, Any], networks: Any) -> Iterator[tuple[str, list[str], Callable, Callable]]:
    """Network, its files, how it reads an audio file, and how it makes features (file -> (B, ...)) of a batch."""
    from av_bench import extract as package
    from imagebind.models.imagebind_model import ModalityType

    seconds, device = job["audio_length"], job["device"]

    def reader(rate: int) -> Callable[[Path], Any]:
        return package.AudioDataset([], audio_length=seconds, sr=rate).read_from_file

    def passt(network: Any, batch: Any) -> dict[str, Any]:
        import torch

        length = batch.shape[-1]
        wav = torch.nn.functional.pad(batch[:, 0, :PASST_SAMPLES].float(), (0, max(0, PASST_SAMPLES - length)))
        out = network(wav.to(device))
        return {"passt_logits": out[:, :PASST_CLASSES], "passt_features_embed": out[:, PASST_CLASSES:]}

    def one(name: str, file: str, read: Callable, encode: Callable) -> tuple[str, list[str], Callable, Callable]:
        return name, [file], read, lambda network, batch: {file: encode(network, batch)}

    def read_synchformer(path: Path) -> Any:
        return package.SynchformerAudioDataset([path], duration=seconds).sample(0)[0]

    def by_itself(path: Path) -> Path:  # for networks that read files: only those that can be read
        return (read_16k(path), path)[1]

    read_16k = reader(16_000)
    yield one("panns", "pann_features", read_16k, lambda n, x: n(x[:, 0].float().to(device)))
    yield one("vggish", "vggish_features", read_16k, lambda n, x: n(x[:, 0].float()))
    if not job["skip_video_related"]:
        audio, read = ModalityType.AUDIO, package.ImageBindAudioDataset([]).load_and_transform_audio_data
        yield one("imagebind", "imagebind_audio", read, lambda n, x: n({audio: x[:, 0].to(device)})[audio])
        mel, encode_sync = networks.sync_mel_spectrogram.to(device), package.encode_audio_with_sync
        encode = lambda n, x: encode_sync(n, x.to(device), mel)  # noqa: E731
        yield one("synchformer", "synchformer_audio", read_synchformer, encode)
    if not job["skip_clap"]:
        encode = lambda n, x: n.get_audio_embedding_from_data(x[:, 0].to(device), use_tensor=True)  # noqa: E731
        yield one("laion_clap", "clap_laion_audio", reader(48_000), encode)
        yield one("ms_clap", "clap_ms_audio", by_itself, lambda n, paths: n.get_audio_embeddings(paths))
    if job.get("aesthetics"):
        make = lambda: importlib.import_module("audiobox_aesthetics.infer").initialize_predictor()  # noqa: E731
        networks.aesthetics = Deferred(make)
        yield one("aesthetics", "audiobox_aesthetics", by_itself, aesthetics)
    yield "passt_model", ["passt_features_embed", "passt_logits"], reader(32_000), passt


def aesthetics(network: Any, paths: list[Path]) -> Any:
    """Audiobox aesthetics (arXiv 2502.05139) of audio files, (B, 4): enjoyment, usefulness, complexity, quality."""
    import torch

    rows = network.forward([{"path": str(path)} for path in paths])
    return torch.tensor([[row[axis] for axis in ("CE", "CU", "PC", "PQ")] for row in rows])


def extract(job: dict[str, Any], networks: Any) -> dict[str, Any]:
    """Write the features of every audio file, one network after the other.

    Returns `failed`, files that could not be written and why, and `unreadable`, audio files that could not be read.
    """
    paths = sorted(Path(job["audio_path"]).glob("*.wav"), key=lambda path: path.stem)
    failed: dict[str, str] = {}
    unreadable: dict[str, str] = {}
    for name, files, read, encode in families(job, networks):
        if all((Path(job["output_path"]) / f"{file}.pth").is_file() for file in files):
            continue  # of an earlier process, which was killed
        try:
            network = built(networks, name, job["device"])
            features: dict[str, dict[str, Any]] = {}  # file -> id -> features
            for batch in batches(name, paths, read, job, unreadable):
                encode_batch(network, encode, batch, features)
            if not features:
                first = next(iter(unreadable.values()), "")
                raise RuntimeError(f"none of {len(paths)} audio files could be read: {first}")
            save(job, features)
            del network, features
        except Exception as error:  # whatever its libraries raise
            traceback.print_exc()
            failed |= {f"{file}.pth": message(error) for file in files}
    return {"failed": failed, "unreadable": unreadable}


def batches(
    name: str, paths: list[Path], read: Callable[[Path], Any], job: dict[str, Any], unreadable: dict[str, str]
) -> Iterator[list[tuple[Path, Any]]]:
    """Audio files of one length and what was read of them; those that cannot be read are left out."""

    def tried(path: Path) -> Any:
        try:
            return read(path)
        except Exception as error:
            return error

    with ThreadPoolExecutor(max(1, job["num_workers"])) as pool:
        size = job["batch_size"]
        for start in range(0, len(paths), size):
            chunk = paths[start : start + size]
            groups: dict[Any, list[tuple[Path, Any]]] = {}
            for path, value in zip(chunk, pool.map(tried, chunk)):  # noqa: B905  # Python 3.9 has no strict
                if isinstance(value, Exception):
                    print(f"{name}: {path.name} cannot be read: {message(value)}", flush=True)
                    unreadable[path.stem] = message(value)
                else:
                    groups.setdefault(getattr(value, "shape", None), []).append((path, value))
            yield from groups.values()
            print(f"{name}: {start + len(chunk)} of {len(paths)}", flush=True)


def encode_batch(network: Any, encode: Callable, group: list[tuple[Path, Any]], into: dict[str, dict]) -> None:
    """Add the features of files of one length."""
    import torch

    values = [value for _, value in group]
    batch = torch.stack(values) if isinstance(values[0], torch.Tensor) else values
    for file, rows in encode(network, batch).items():
        for i, (path, _) in enumerate(group):  # copies: a view would be saved with its whole batch
            several = isinstance(rows, dict)
            row = {key: v[i].cpu().clone() for key, v in rows.items()} if several else rows[i].cpu().clone()
            into.setdefault(file, {})[path.stem] = row


def save(job: dict[str, Any], features: dict[str, dict[str, Any]]) -> None:
    """Write files of features, each under another name first."""
    import torch

    for file, by_id in features.items():
        path = Path(job["output_path"]) / f"{file}.pth"
        torch.save(by_id, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)


# --- Features of what the audio belongs to ----------------------------------------------------------------------------


def text(job: dict[str, Any], networks: Any) -> dict[str, Any]:
    """Write the CLAP features of the captions in `captions`, a JSON file: id -> text."""
    captions = json.loads(Path(job["captions"]).read_text())
    failed: dict[str, str] = {}
    for name, file in (("laion_clap", "clap_laion_text"), ("ms_clap", "clap_ms_text")):
        try:
            network = built(networks, name, job["device"])
            features = {}
            for number, (item_id, caption) in enumerate(captions.items()):
                if name == "ms_clap":
                    rows = network.get_text_embeddings([caption])
                else:
                    rows = network.get_text_embedding([caption], use_tensor=True)
                features[item_id] = rows[0].cpu().clone()
                if number % job["batch_size"] == 0:
                    print(f"{name}: {number} of {len(captions)} captions", flush=True)
            save(job, {file: features})
            del network, features
        except Exception as error:
            traceback.print_exc()
            failed[f"{file}.pth"] = message(error)
    return {"failed": failed}


def video(job: dict[str, Any], networks: Any) -> dict[str, Any]:
    """Write the ImageBind features of frames at 0.5 fps, `frames`/ID.pt: uint8 (T, 3, H, W), as av-benchmark does.

    Its reader needs torio, which newer torchaudio does not have; its transforms do not.
    """
    import types

    import torch

    for name in ("torio", "torio.io"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["torio.io"].__dict__.setdefault("StreamingMediaDecoder", None)
    from av_bench.data.video_dataset import VideoDataset
    from imagebind.models.imagebind_model import ModalityType

    dataset, device = VideoDataset([], duration_sec=job["audio_length"]), job["device"]
    network = built(networks, "imagebind", device)
    features = {}
    paths = sorted(Path(job["frames"]).glob("*.pt"))
    for number, path in enumerate(paths):
        frames = dataset.ib_transform(torch.load(path, weights_only=True))
        crops = torch.stack(dataset.crop([frames]))  # (3, T, 3, 224, 224)
        pairs = torch.cat([crops[:, i : i + 2] for i in range(crops.shape[1] - 1)])  # of frames that follow each other
        pairs = pairs.transpose(1, 2)[None].to(device)  # (1, 3 * (T - 1), 3, 2, 224, 224), whose mean is taken
        features[path.stem] = network({ModalityType.VISION: pairs})[ModalityType.VISION][0].cpu().clone()
        print(f"imagebind: {number + 1} of {len(paths)} videos", flush=True)
    save(job, {"imagebind_video": features})
    return {"failed": {}}


# --- The process ------------------------------------------------------------------------------------------------------


def message(error: BaseException) -> str:
    """Type and first line of an error."""
    return type(error).__name__ + ": " + (str(error).strip().splitlines() or [""])[0]


def end_with(parent: int) -> None:
    """End this process when the one that started it has ended in any way."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main(job_file: str, result_file: str) -> None:
    with open(job_file) as file:
        job = json.load(file)
    threading.Thread(target=end_with, args=(job["parent"],), daemon=True).start()
    try:
        result: dict[str, Any] = {"ok": run(job)}
    except BaseException as error:
        traceback.print_exc()
        kind = "audio" if isinstance(error, UnreadableAudio) else "import" if isinstance(error, ImportError) else ""
        result = {"error": message(error), "kind": kind}
    with open(result_file + ".partial", "w") as file:
        json.dump(result, file)
    os.replace(result_file + ".partial", result_file)


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file, whose av_bench.py is another one
    main(*sys.argv[1:])
