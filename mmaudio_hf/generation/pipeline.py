"""Video, image and/or text to audio: `MMAudioPipeline`.

pipeline = MMAudioPipeline.from_pretrained("output/run")
result = pipeline("dog.mp4", prompt="a dog barks")
save_generated(result, "dog_with_audio.mp4", video="dog.mp4")
"""

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from tqdm.auto import tqdm
from tqdm.std import tqdm as plain_tqdm

from mmaudio_hf.config import EncoderConfig
from mmaudio_hf.features.encoders import (
    Encoders,
    check_encoders,
    decoder_fingerprint,
    fingerprints,
    load_encoders,
    pick_device,
)
from mmaudio_hf.generation import (
    DTYPES,
    MAX_STEPS,
    RECIPE_FILE,
    SEEDS,
    Generated,
    GeneratedList,
    Media,
    Options,
    Request,
    check_choice,
    check_number,
    described,
    draw_seed,
    files_to_copy,
    precision_of,
    read_encoders,
    requests_of,
    save_generated,
    save_with_note,
    starting_noise,
    with_seed,
)
from mmaudio_hf.generation.windows import (
    WindowSchedule,
    blended_velocity,
    checked_lengths,
    decode_chunks,
    latent_seconds,
    lengths_set,
    read_ahead,
    schedule_windows,
)
from mmaudio_hf.media.container import probe
from mmaudio_hf.media.video import (
    ALIGNMENTS,
    VideoClip,
    array_image,
    array_windows,
    read_image,
    read_windows,
    video_seconds,
)
from mmaudio_hf.models.flow import VelocityFunction, sample_adaptive, sample_euler
from mmaudio_hf.models.network import MMAudio
from mmaudio_hf.models.pretrained import (
    CARD_FILE,
    Adapter,
    check_hub_options,
    find_pretrained,
    is_weights_file,
    merge_adapters,
    read_adapter,
    write_encoders,
)
from mmaudio_hf.models.sampling import GuidedVelocity, prepared_convolutions
from mmaudio_hf.schema import (
    CLIP_FEATURES,
    LATENT_STRIDE,
    SYNC_FEATURES,
    TEXT_FEATURES,
    SequenceLengths,
    audio_mode,
    checked,
)

# Published cards import these from here.
__all__ = ["RECIPE_FILE", "Generated", "MMAudioPipeline", "Request"]
__all__ += ["save_generated", "save_with_note", "starting_noise"]

_CLIPS_AHEAD = 4  # read while the model works; 58 MB each
# One for each network: two pipelines may share it, and sampling sets its lengths.
_LOCKS: WeakKeyDictionary[MMAudio, threading.RLock] = WeakKeyDictionary()

OnReject = Callable[[Request, Exception], None]
OnStepEnd = Callable[["MMAudioPipeline", int, float, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


@dataclasses.dataclass
class _Item:
    """A request in progress: its windows, and their features so far."""

    request: Request
    schedule: WindowSchedule = dataclasses.field(init=False)
    note: str = ""
    problem: Exception | None = None
    features: list[tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=list)  # CLIP and sync


class MMAudioPipeline:
    """A flow model with its encoders and decoder. Encoders are loaded when a request first needs them.

    Several threads may call one pipeline: files are read side by side, the networks work for one call at a time.
    """

    def __init__(
        self,
        model: MMAudio,
        encoders: EncoderConfig | Encoders,
        *,
        device: str | int | torch.device | None = None,
        precision: str = "fp32",
        alignment: str = "timestamps",
    ):
        """`model` is moved to `device` (None: stays on its own) and put into evaluation mode.

        encoders: how to load them, or loaded ones with the components that will be needed. precision: of the model.
        alignment: how `read_video` aligns frames; should be that of the features the model was trained on.
        """
        check_choice("precision", precision, DTYPES)
        check_choice("alignment", alignment, ALIGNMENTS)
        if not isinstance(model, MMAudio) or not isinstance(encoders, EncoderConfig | Encoders):
            raise ValueError("give model as an MMAudio, and encoders as an EncoderConfig or loaded Encoders")
        if not (torch.isfinite(model.latent_mean).all() and torch.isfinite(model.latent_std).all()):
            raise ValueError("the model has no latent statistics: train it, or load a trained one")
        if model.latent_mean.dtype != torch.float32:
            raise ValueError(f"model has weights in {model.latent_mean.dtype}: call model.float(), and set precision")
        if isinstance(encoders, Encoders) and encoders.mode != model.config.mode:
            raise ValueError(f"the encoders are of mode {encoders.mode}, the model of {model.config.mode}")
        self.device = model.latent_mean.device if device is None else pick_device(device)
        self.model = model.to(self.device).eval()
        self.precision, self.alignment = precision, alignment
        self.adapters: dict[str, float] = {}  # scales of the active ones
        self._loaded_adapters: dict[str, Adapter] = {}
        self._originals: dict[str, torch.Tensor] = {}  # weights that adapters changed, on the CPU
        self._source = encoders
        self._encoder_config = encoders.config if isinstance(encoders, Encoders) else encoders
        self._loaded: dict[str, Encoders] = {}
        self._lock = _LOCKS.setdefault(model, threading.RLock())
        self._model_hash = ""
        self._progress_bar: dict[str, Any] = {}
        self._compiled = False

    @classmethod
    @checked
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        device: str | int | torch.device | None = "auto",
        encoders: EncoderConfig | Encoders | None = None,
        precision: str = "",
        alignment: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> Self:
        """Load a run folder (its last checkpoint), a checkpoint, a `pretrained_model` folder, a Hub id or a file.

        encoders, alignment: in place of those saved with the model, as when the encoder files are elsewhere on this
        machine; a file of released weights has none. precision, or as `torch_dtype` or `dtype`: in which the flow
        model computes; weights stay float32. options: revision, subfolder, token, cache_dir, local_files_only,
        force_download, as in huggingface_hub.
        ValueError naming what is missing; the weights of the encoders are looked for when they are needed.
        """
        check_hub_options(options, ("device", "encoders", "precision", "alignment", "torch_dtype", "dtype"))
        if not isinstance(precision, str) or precision:
            check_choice("precision", precision, DTYPES)
        names = {precision_of(name, value) for name, value in (("torch_dtype", torch_dtype), ("dtype", dtype))}
        if len(chosen := {*names, precision} - {""}) > 1:
            raise ValueError(f"precision, torch_dtype and dtype say different things: {', '.join(sorted(chosen))}")
        where = pick_device(device)  # before a download
        folder = None if is_weights_file(source) else find_pretrained(source, **options)
        if encoders is None or alignment is None:
            saved_encoders, saved_alignment = read_encoders(folder)
            encoders = saved_encoders if encoders is None else encoders
            alignment = saved_alignment if alignment is None else alignment
        model = MMAudio.from_pretrained(source if folder is None else folder)
        return cls(model, encoders, device=where, precision=next(iter(chosen), "fp32"), alignment=alignment)

    @checked
    def save_pretrained(self, save_directory: str | os.PathLike, *, copy_encoders: bool = False) -> None:
        """Write what `from_pretrained` reads: config.json, model.safetensors, encoders.json and a card.

        The weights are those that generate now: adapters that are set are merged into them, and named in the card.
        Encoders are named, with their paths; only a toy codec is copied, or with `copy_encoders` the files of
        Synchformer, mel VAE and vocoder, which are then found beside the weights. CLIP stays where it is. Device and
        precision belong to `from_pretrained`. ValueError for a file in place of a folder, or a missing encoder file.
        """
        folder, encoders = Path(save_directory), self._encoder_config
        copied = copy_encoders or encoders.kind == "toy"
        if copied:
            check_encoders(encoders, self.mode, ("sync", "latent", "decode"))
        with self._lock:
            self.model.save_pretrained(folder)
            merged = ", ".join(f"{name} x {scale:g}" for name, scale in self.adapters.items() if scale)
        card = folder / CARD_FILE  # that of an earlier call stays, apart from this
        text = re.sub(r"\n## Adapters\n\nMerged into .*\n", "", card.read_text(encoding="utf-8"))
        text += f"\n## Adapters\n\nMerged into these weights: {merged}.\n" if merged else ""
        card.write_text(text, encoding="utf-8")
        write_encoders(folder, encoders, self.alignment, ("clip",) if copied else ("weights_dir", "clip"))
        for file in set(files_to_copy(encoders, self.mode)) if copied else ():
            target = folder / file.relative_to(encoders.weights_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not (target.exists() and target.samefile(file)):  # the folder it was loaded from
                shutil.copyfile(file, target)

    # --- settings ----------------------------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """Audio mode of the model, "16k" or "44k"."""
        return self.model.config.mode

    @property
    def sample_rate(self) -> int:
        """Hz of generated waveforms."""
        return audio_mode(self.mode).sample_rate

    @property
    def network(self) -> str:
        """Variant, size, length and rate of the model, in a line."""
        config, millions = self.model.config, sum(p.numel() for p in self.model.parameters()) / 1e6
        return f"{config.variant}, {millions:.1f} M parameters, {config.duration:g} s at {self.sample_rate} Hz"

    @property
    def dtype(self) -> torch.dtype:
        """In which the flow model computes; its weights are float32."""
        return DTYPES[self.precision]

    def to(
        self,
        *targets: str | int | torch.device | torch.dtype,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Self:
        """Compute on another device, in another dtype, or both; returns the pipeline. Encoders are loaded again."""
        for value in targets:
            if isinstance(value, torch.dtype):
                dtype = value
            elif device is None:
                device = value
            else:
                raise ValueError(f"to() takes one device and one dtype, not {value!r} besides {device!r}")
        precision = self.precision if dtype is None else precision_of("dtype", dtype)
        where = self.device if device is None else pick_device(device)
        with self._lock:
            self.precision = precision
            if where != self.device:
                self.device, self.model = where, self.model.to(where)
                self._loaded.clear()
        return self

    def compile(self) -> Self:
        """Compile the blocks of the flow model with torch.compile; the first call of each length then takes minutes.

        Returns the pipeline. ValueError where torch.compile does not work.
        """
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=self.device))
        except Exception as error:
            raise ValueError(f"torch.compile does not work here: {str(error).splitlines()[0]}") from error
        with self._lock:
            if not self._compiled:
                self.model.compile_blocks()
                self._compiled = True
        return self

    def set_progress_bar_config(self, **options: Any) -> None:
        """Options of tqdm for the bars of `pipeline(...)`, as disable=True."""
        if unknown := sorted(set(options) - set(inspect.signature(plain_tqdm.__init__).parameters)):
            raise ValueError(f"set_progress_bar_config: tqdm does not know {', '.join(unknown)}")
        self._progress_bar = options

    def load_lora_weights(
        self, source: str | os.PathLike, scale: float = 1.0, adapter_name: str | None = None, **options: Any
    ) -> Self:
        """Add an adapter in peft's format: a folder of it, a run folder, or a Hub id. Returns the pipeline.

        It is merged into the weights with `scale` (1: as trained); see `set_adapters` for several. options: as those of
        `from_pretrained`. ValueError for an adapter that does not fit the network; the pipeline is then as before.
        """
        if not isinstance(adapter_name, str | None):
            raise ValueError(f"adapter_name must be text, not {described(adapter_name)}")
        name = adapter_name or f"adapter_{len(self._loaded_adapters)}"
        if name in self._loaded_adapters:
            raise ValueError(f"adapter_name {name!r} is taken: choose another one")
        check_number("scale", scale, -100, 100)
        check_hub_options(options, ("scale", "adapter_name"))
        self._loaded_adapters[name] = read_adapter(source, **options)
        try:
            self._merge(self.adapters | {name: float(scale)})
        except ValueError:
            del self._loaded_adapters[name]
            self._merge(self.adapters)
            raise
        return self

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Use these of the loaded adapters alone, each with its scale (None: 1); none with an empty list."""
        if not isinstance(adapter_names, str | list | tuple):
            raise ValueError(f"adapter_names must be names of loaded adapters, not {described(adapter_names)}")
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        scale: Any = 1.0 if adapter_weights is None else adapter_weights
        scales = list(scale) if isinstance(scale, list | tuple) else [scale] * max(1, len(names))
        for scale in scales:
            check_number("adapter_weights", scale, -100, 100)
        if unknown := [name for name in names if name not in list(self._loaded_adapters)]:
            loaded = ", ".join(self._loaded_adapters) or "none"
            raise ValueError(f"adapter_names: {described(unknown[0])} is not loaded; loaded: {loaded}")
        if names and len(scales) != len(names):
            raise ValueError(f"adapter_weights has {len(scales)} numbers for {len(names)} adapters")
        self._merge(dict(zip(names, map(float, scales), strict=False)))

    def unload_lora_weights(self) -> None:
        """Drop all adapters: the weights are, to the bit, what they were without."""
        self._merge({})
        self._loaded_adapters.clear()

    def _merge(self, adapters: dict[str, float]) -> None:
        with self._lock:
            active = [(self._loaded_adapters[name], scale) for name, scale in adapters.items() if scale]
            merge_adapters(self.model, active, self._originals)
            self.adapters, self._model_hash = adapters, ""

    def __repr__(self) -> str:
        """A few lines on network, encoders and adapters."""
        encoders = self._encoder_config
        loaded = self._source.networks if isinstance(self._source, Encoders) else self._loaded
        lines = {
            "network": self.network,
            "computes": f"in {self.precision} on {self.device}{', compiled' if self._compiled else ''}",
            "encoders": f"{encoders.kind}, {encoders.weights_dir}, loaded: {', '.join(loaded) or 'none yet'}",
            "alignment": self.alignment,
            "adapters": ", ".join(f"{name} x {scale:g}" for name, scale in self.adapters.items()) or "none",
        }
        return "MMAudioPipeline(\n" + "".join(f"  {name}: {text}\n" for name, text in lines.items()) + ")"

    # --- generation --------------------------------------------------------------------------------------------------

    def __call__(
        self,
        video: Media | Sequence[Media | None] | None = None,
        prompt: str | Sequence[str | None] | None = "",
        negative_prompt: str | Sequence[str | None] | None = "",
        *,
        image: Media | Sequence[Media | None] | None = None,
        frame_rate: float | Sequence[float | None] | None = None,
        duration: float | Sequence[float | None] | None = None,
        text_features: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
        negative_text_features: torch.Tensor | Sequence[torch.Tensor | None] | None = None,
        seed: int | Sequence[int] | None = 0,
        generator: Any = None,
        **options: Any,
    ) -> Any:  # Generated, or a GeneratedList: a union would have to be told apart after every call
        """Generate audio for a video or image, a caption, both or neither; see `generate` for the options.

        Every argument may be a list with one value for each audio: then a list is returned. A video is a file, or
        frames (`Media`, so also a list of PIL images) with their `frame_rate` in Hz. `text_features` (77, 1024)
        replace a prompt. seed: None draws one, `Generated.seed` tells it. generator: a torch.Generator that draws the
        seed, or a list of them.
        """
        if unknown := sorted(set(options) - set(_OPTIONS)):
            known = dict.fromkeys((*list(inspect.signature(self.__call__).parameters)[:-1], *_OPTIONS))
            raise ValueError(f"the pipeline does not know {', '.join(unknown)}; it takes {', '.join(known)}")
        if generator is not None:
            if seed is not None and not (isinstance(seed, int) and seed == 0):
                raise ValueError("give seed or generator, not both")
            several = isinstance(generator, list | tuple)
            if several and not generator:
                raise ValueError("generator is an empty list: it must have one entry for each audio")
            seed = [draw_seed(one) for one in generator] if several else draw_seed(generator)
        seeds = seed if isinstance(seed, list | tuple) else None
        requests, several = requests_of(
            {"seed": seeds}
            | {"video": video, "prompt": prompt, "negative_prompt": negative_prompt, "image": image}
            | {"frame_rate": frame_rate, "duration": duration}
            | {"text_features": text_features, "negative_text_features": negative_text_features}
        )
        call: Any = {"progress": True, **options, "seed": 0 if seeds is not None else seed}
        with contextlib.closing(self.generate(requests, **call)) as results:
            return GeneratedList(results) if several else next(results)

    def generate(
        self,
        requests: Sequence[Request],
        batch_size: int = 8,
        *,
        duration: float | None = None,
        window: float | None = None,
        num_inference_steps: int | None = None,
        num_steps: int | None = None,
        guidance_scale: float = 4.5,
        seed: int | None = 0,
        solver: str = "euler",
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: bool = False,
        on_reject: OnReject | None = None,
    ) -> Generator[Generated, None, None]:
        """Generate one audio per request, in order, `batch_size` at a time; requests of the same length are batched.

        duration: seconds; None is that of the video, and without one the length the model was trained for. Audio is
        never longer than its video: `Generated.note` says where that shortens it. window: seconds, None is the trained
        length; longer audio is generated in windows of that length, which overlap by a quarter and are blended at each
        step. num_inference_steps, or num_steps: Euler steps, 25. guidance_scale: below 1 turns guidance off.
        The starting noise depends on the seed and the key of a request alone, not on batches or order.
        callback_on_step_end: called with pipeline, number and time of a step, and {"latents": (B, N, C)} after it; what
        it returns in place of these is continued with. There are no other tensor inputs. progress: a bar over the steps
        of each batch.
        Wrong settings, unreadable files and missing weights raise ValueError here, before the model runs. With
        `on_reject`, files are opened when their turn comes only, and a request that fails is passed to it.
        """
        steps = 25
        for name, value in (("num_steps", num_steps), ("num_inference_steps", num_inference_steps)):
            if value is not None:
                check_number(name, value, 1, MAX_STEPS, whole=True)
                steps = value
        if None not in (num_steps, num_inference_steps) and num_steps != num_inference_steps:
            raise ValueError(f"num_inference_steps {num_inference_steps} and num_steps {num_steps}: give one of them")
        inputs = callback_on_step_end_tensor_inputs
        if not isinstance(inputs, list | tuple) or [*map(str, inputs)] != ["latents"]:
            raise ValueError("callback_on_step_end_tensor_inputs: a callback gets ['latents'], and nothing else")
        if seed is not None:
            check_number("seed", seed, *SEEDS, whole=True)
        call_seed = secrets.randbelow(2**32) if seed is None else seed
        if not isinstance(requests, list | tuple) or not all(isinstance(request, Request) for request in requests):
            raise ValueError(f"requests must be a list of Request, not {described(requests)}")
        requests = [with_seed(request, str(index), call_seed) for index, request in enumerate(requests)]
        settings: Any = (duration, steps, guidance_scale, solver, batch_size)
        options = Options(*self._window(window), *settings, callback_on_step_end, progress, on_reject)  # type: ignore
        if duration is not None:
            checked_lengths(self.mode, duration)
        if on_reject is None:
            for request in requests:
                request.check()
        self._check_components({"decode"}.union(*(request.components for request in requests)))
        if on_reject is None:
            for request in requests:
                self._schedule(request, options)
        return self._generate(requests, options)

    def decode(self, latent_NC: torch.Tensor) -> torch.Tensor:
        """Waveform (samples,), on the CPU, of one latent (N, C) that is not normalised, as feature stores hold them."""
        channels = self.model.config.latent_channels
        if not isinstance(latent_NC, torch.Tensor) or latent_NC.ndim != 2 or latent_NC.shape[1] != channels:
            raise ValueError(f"latent_NC must be a tensor (N, {channels}), not {described(latent_NC)}")
        with self._lock:
            return self._encoders("decode").decode_latent(latent_NC[None])[0].float().cpu()

    def fingerprint(self, request: Request) -> dict[str, Any]:
        """What the audio of a request depends on beside itself: hashes of weights, precision, alignment.

        The model is hashed once: it must not change between two calls.
        """
        if not isinstance(request, Request):
            raise ValueError(f"request must be a Request, not {described(request)}")
        entries = fingerprints(self._encoder_config, self.mode, sorted(request.components - {"decode"}))
        result: dict[str, Any] = {component: entry["fingerprint"] for component, entry in entries.items()}
        result["decode"] = decoder_fingerprint(self._encoder_config, self.mode)
        if request.video is not None:
            result["alignment"] = self.alignment
        if not self._model_hash:
            digest = hashlib.sha256()
            for name, tensor in sorted(self.model.state_dict().items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._model_hash = digest.hexdigest()
        return result | {"network": self._model_hash, "precision": self.precision}

    # --- before the model runs ---------------------------------------------------------------------------------------

    def _window(self, window: float | None) -> tuple[SequenceLengths, float]:
        """Lengths and seconds of a window."""
        config = self.model.config
        seconds = config.duration if window is None else window
        lengths = checked_lengths(self.mode, seconds, "window")
        if seconds == config.duration:  # a model may be built with lengths of its own
            own = {"latent": config.latent_length, "clip": config.clip_length, "sync": config.sync_length}
            lengths = dataclasses.replace(lengths, **own)
        return lengths, seconds

    def _check_components(self, needed: set[str]) -> None:
        if isinstance(self._source, EncoderConfig):
            check_encoders(self._source, self.mode, sorted(needed))
        elif missing := needed - set(self._source.networks):
            raise ValueError(f"these requests need encoders that were not loaded: {', '.join(sorted(missing))}")

    def _schedule(self, request: Request, options: Options) -> tuple[WindowSchedule, str]:
        """Windows of a request, and a note where they are shorter than requested; ValueError for a wrong request."""
        request.check()
        duration = options.duration if request.duration is None else request.duration
        seconds, note, name = options.window if duration is None else duration, "", "duration"
        if isinstance(request.image, str | os.PathLike) and "video" not in probe(request.image):
            raise ValueError(f"{request.image} is not an image")
        if request.video is not None:
            if isinstance(request.video, str | os.PathLike):
                if "video" not in probe(request.video):
                    raise ValueError(f"{request.video} has no video frames: give a video, or only a prompt")
                available, name = video_seconds(request.video), str(request.video)
            else:
                available, name = request.video_seconds, f"video of item {request.key}"
            if duration is not None and available < duration:
                note = f"{available:.2f} s long, as its video is, not the requested {duration:g} s"
            seconds = available if duration is None else min(available, duration)
        checked_lengths(self.mode, seconds, name)
        schedule = schedule_windows(self.mode, seconds, options.window, options.lengths)
        self._check_features(request, schedule)
        return schedule, note

    def _check_features(self, request: Request, schedule: WindowSchedule) -> None:
        config, lengths = self.model.config, schedule.lengths
        shapes = dict.fromkeys((TEXT_FEATURES, "negative_text_features"), (config.text_tokens, config.text_dim))
        visual = {CLIP_FEATURES: (lengths.clip, config.clip_dim), SYNC_FEATURES: (lengths.sync, config.sync_dim)}
        for name, shape in (visual | shapes).items():
            features, what = getattr(request, name), f"{name} of item {request.key} are"
            if features is not None and tuple(features.shape) != shape:
                raise ValueError(f"{what} {tuple(features.shape)}, this duration needs {shape}")
            if features is not None and name in visual and len(schedule.starts) > 1:
                raise ValueError(f"{what} those of one window: use a shorter duration")

    # --- from requests to features -----------------------------------------------------------------------------------

    def _generate(self, requests: Sequence[Request], options: Options) -> Generator[Generated, None, None]:
        """Items with the same schedule are batched; one of several windows fills the batches alone."""
        for schedule, items in itertools.groupby(self._encoded(requests, options), key=lambda item: item.schedule):
            size = options.batch_size if len(schedule.starts) == 1 else 1
            while batch := list(itertools.islice(items, size)):
                yield from self._generate_batch(batch, options)

    def _encoded(self, requests: Sequence[Request], options: Options) -> Iterator[_Item]:
        """Items with the features of all their windows; what cannot be read is rejected or raised."""
        with contextlib.closing(read_ahead(self._read(requests, options), _CLIPS_AHEAD)) as windows:
            for item, clip in windows:
                if item.problem is None:
                    item.features.append(self._visual_features(item, clip))
                    del clip  # 58 MB
                    if len(item.features) == len(item.schedule.starts):
                        yield item
                elif options.on_reject is None:
                    raise item.problem
                else:
                    options.on_reject(item.request, item.problem)

    def _read(self, requests: Sequence[Request], options: Options) -> Iterator[tuple[_Item, VideoClip | None]]:
        """Each item with the frames of each of its windows, in order; or once, with the problem it has."""
        for request in requests:
            item = _Item(request)
            try:
                item.schedule, item.note = self._schedule(request, options)
                clips = self._clips(request, item.schedule)
                for clip in clips:
                    yield item, clip
                    del clip
            except ValueError as problem:
                item.problem = problem
                yield item, None

    def _clips(self, request: Request, schedule: WindowSchedule) -> Iterable[VideoClip | None]:
        """The frames of each window; None where none are needed."""
        video: Any = request.video
        image: Any = request.image
        if video is not None and (request.clip_features is None or request.sync_features is None):
            starts = [start * latent_seconds(self.mode) for start in schedule.starts]
            size: Any = {"mode": self.mode, "duration": schedule.duration}
            if isinstance(video, str | os.PathLike):
                return read_windows(video, starts, alignment=self.alignment, **size)
            return array_windows(video, request.frame_rate or 0, starts, **size)
        if image is not None and request.clip_features is None:
            clip = read_image(image) if isinstance(image, str | os.PathLike) else array_image(image)
            return [clip] * len(schedule.starts)
        return [None] * len(schedule.starts)

    @torch.inference_mode()
    def _visual_features(self, item: _Item, clip: VideoClip | None) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP (T, 1024) and sync (S, 768) features of one window, with the empty ones where nothing is given."""
        lengths, request = item.schedule.lengths, item.request
        clip_f, sync_f = request.clip_features, request.sync_features
        if clip is not None and clip_f is None:
            # A still image is encoded once, and its features are repeated for all times.
            clip_f = self._encoders("clip").encode_clip(clip.clip_frames[None])[0].expand(lengths.clip, -1)
        if clip is not None and sync_f is None and request.video is not None:
            sync_f = self._encoders("sync").encode_sync(clip.sync_frames[None])[0]
        clip_f = self.model.empty_clip_feat.expand(lengths.clip, -1) if clip_f is None else clip_f
        sync_f = self.model.empty_sync_feat.expand(lengths.sync, -1) if sync_f is None else sync_f
        return clip_f.to(self.device, torch.float32), sync_f.to(self.device, torch.float32)

    def _text_features(self, prompt: str, features: torch.Tensor | None = None) -> torch.Tensor:
        """`features`, or those of a prompt, (77, 1024); without text, those of the empty string in training."""
        if features is None:
            features = self._encoders("text").encode_text([prompt])[0] if prompt else self.model.empty_string_feat
        return features.to(self.device, torch.float32)

    def _encoders(self, component: str) -> Encoders:
        """Encoders with `component`, loaded at the first use. One CLIP network encodes images and text."""
        if isinstance(self._source, Encoders):
            return self._source
        group = ("clip", "text") if component in ("clip", "text") else (component,)
        with self._lock:
            if group[0] not in self._loaded:
                self._loaded[group[0]] = load_encoders(self._source, self.mode, group, device=self.device)
            return self._loaded[group[0]]

    # --- from features to audio --------------------------------------------------------------------------------------

    def _generate_batch(self, batch: Sequence[_Item], options: Options) -> Iterator[Generated]:
        # Not around the loop: between two results the model has the lengths that its owner set, and others may use it.
        with self._lock, lengths_set(self.model, batch[0].schedule.lengths):
            latents, waveforms = self._sample(batch, options)
        for item, latent, waveform in zip(batch, latents, waveforms, strict=True):
            request = item.request
            yield Generated(waveform, self.sample_rate, latent, request.key, item.note, request.seed)

    @torch.inference_mode()
    def _sample(self, batch: Sequence[_Item], options: Options) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (B, N, C) and waveforms (B, samples), on the CPU, of items with the same schedule.

        Each item has one window, or there is one item, whose windows go through the model a batch at a time.
        """
        model, schedule, decoder = self.model, batch[0].schedule, self._encoders("decode")
        shape = (schedule.latent, model.config.latent_channels)
        noise = [starting_noise(item.request.seed or 0, item.request.key, shape) for item in batch]
        x0_BNC = torch.stack(noise).to(self.device)
        autocast = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.precision != "fp32")
        with autocast, prepared_convolutions(model, self.precision):
            velocity: VelocityFunction
            if len(schedule.starts) == 1:
                velocity = self._velocity(batch, range(1), options)
            else:
                count, size = len(schedule.starts), options.batch_size
                chunks = [range(first, min(first + size, count)) for first in range(0, count, size)]
                velocities = [self._velocity(batch, chunk, options) for chunk in chunks]
                batch[0].features.clear()  # they are in the conditions now
                velocity = blended_velocity(schedule, chunks, velocities, self.device)
            adaptive = options.solver == "adaptive"
            x1_BNC = sample_adaptive(velocity, x0_BNC) if adaptive else self._sample_euler(velocity, x0_BNC, options)
        latent_BNC = model.unnormalize(x1_BNC.float())
        if len(schedule.starts) == 1:
            return latent_BNC.cpu(), decoder.decode_latent(latent_BNC).float().cpu()
        samples_per_latent = audio_mode(self.mode).mel_hop * LATENT_STRIDE
        waveform = decode_chunks(decoder.decode_latent, latent_BNC[0], schedule.lengths.latent, samples_per_latent)
        return latent_BNC.cpu(), waveform[None]

    def _sample_euler(self, velocity: VelocityFunction, x0_BNC: torch.Tensor, options: Options) -> torch.Tensor:
        """`flow.sample_euler` with a bar, and the callback of the user after each step."""
        config: Any = {"total": options.num_steps, "disable": not options.progress, "unit": "step"}
        config |= self._progress_bar
        with tqdm(**config) as bar:

            def on_step(step: int, x_BNC: torch.Tensor) -> torch.Tensor:
                bar.update()
                if options.callback is None:
                    return x_BNC
                values = options.callback(self, step, (step + 1) / options.num_steps, {"latents": x_BNC})
                changed = x_BNC if values is None else values.get("latents", x_BNC)
                if not isinstance(changed, torch.Tensor) or changed.shape != x_BNC.shape:
                    raise ValueError(f"callback_on_step_end must return latents of the shape {tuple(x_BNC.shape)}")
                return changed.to(x_BNC)

            return sample_euler(velocity, x0_BNC, options.num_steps, on_step=on_step)

    def _velocity(self, items: Sequence[_Item], windows: Sequence[int], options: Options) -> GuidedVelocity:
        """Guided velocity of the given windows of each item, a batch of items x windows."""
        features = [item.features[index] for item in items for index in windows]
        clip, sync = (torch.stack(column) for column in zip(*features, strict=True))
        requests = [item.request for item in items]
        texts = [self._text_features(r.prompt, r.text_features) for r in requests]
        negative = [self._text_features(r.negative_prompt, r.negative_text_features) for r in requests]
        text, negative_text = (torch.stack(each).repeat_interleave(len(windows), 0) for each in (texts, negative))
        conditions = self.model.preprocess_conditions(clip, sync, text)
        given = any(r.negative_prompt or r.negative_text_features is not None for r in requests)
        unconditional = self.model.empty_conditions(len(features), negative_text if given else None)
        return GuidedVelocity(self.model, conditions, unconditional, options.guidance_scale)


_OPTIONS = list(inspect.signature(MMAudioPipeline.generate).parameters)[2:]  # after self and requests
