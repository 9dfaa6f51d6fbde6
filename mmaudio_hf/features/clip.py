"""CLIP features of frames and captions by DFN5B ViT-H/14, and its tokenizer.

Radford et al., https://arxiv.org/abs/2103.00020; Fang et al., Data Filtering Networks, https://arxiv.org/abs/2309.17425.
Released as https://huggingface.co/apple/DFN5B-CLIP-ViT-H-14-384 for transformers and for open_clip.
"""

import gzip
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import ftfy
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from mmaudio_hf.schema import CLIP_DIM, CLIP_PIXELS, TEXT_DIM, TEXT_TOKENS, checked
from mmaudio_hf.weights import Source, load_state, load_strict, read_file

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
DOWNLOAD_HINT = "correct it, or fetch released weights with `mmaudio-hf weights download`"

VOCABULARY = 49_408
MERGES = VOCABULARY - 2 * 256 - 2
START_ID, END_ID = VOCABULARY - 2, VOCABULARY - 1
START, END = "<start_of_text>", "<end_of_text>"
WORDS = rf"(?i){START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|\p{{L}}+|\p{{N}}|[^\s\p{{L}}\p{{N}}]+"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json")


def clip_config(vision_layers: int = 32, text_layers: int = 24) -> CLIPConfig:
    """Configuration of DFN5B ViT-H/14; fewer layers for tests."""
    shared = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 16}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": TEXT_TOKENS, "num_hidden_layers": text_layers}
    text |= {"hidden_size": TEXT_DIM, "intermediate_size": 4 * TEXT_DIM}
    vision = {"image_size": 378, "patch_size": 14, "num_hidden_layers": vision_layers}
    vision |= {"hidden_size": 1280, "intermediate_size": 4 * 1280}
    return CLIPConfig(text_config=text | shared, vision_config=vision | shared, projection_dim=CLIP_DIM)


def load_empty_text(path: str | Path) -> Tensor:
    """CLIP text features (77, 1024) float32 of the empty string, from the released `empty_string.pth`.

    The file holds them alone, or as the first of a list, tuple or batch. ValueError naming the file for anything else;
    pickled code is never run.
    """
    value = read_file(path)
    if (isinstance(value, (list, tuple)) and value) or (isinstance(value, torch.Tensor) and value.ndim == 3):
        value = value[0]
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{path} holds a {type(value).__name__}, not text features: {DOWNLOAD_HINT}")
    if value.shape != (TEXT_TOKENS, TEXT_DIM) or not value.is_floating_point():
        what = f"{path} holds {value.dtype} of shape {tuple(value.shape)}"
        raise ValueError(f"{what}, not text features ({TEXT_TOKENS}, {TEXT_DIM}): {DOWNLOAD_HINT}")
    if not value.isfinite().all():
        raise ValueError(f"{path} holds values that are not finite: {DOWNLOAD_HINT}")
    return value.float().clone()


class ClipEncoder(nn.Module):
    """Frozen CLIP model for image and token features, at most `batch_size` images or captions at once.

    Make one with `from_pretrained` or `from_open_clip`. float32; bf16 with torch.autocast.
    """

    model: CLIPModel
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, model: CLIPModel, batch_size: int = 16):
        super().__init__()
        vision: Any = model.config.vision_config
        if not CLIP_PIXELS - vision.patch_size < vision.image_size <= CLIP_PIXELS:
            raise ValueError(f"this CLIP model sees {vision.image_size} pixels, not the {CLIP_PIXELS} of the features")
        self.model, self.batch_size, self.image_size = model, batch_size, int(vision.image_size)
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    @classmethod
    @checked
    def from_pretrained(cls, name: str | Path, revision: str | None = None, batch_size: int = 16) -> "ClipEncoder":
        """Encoder from transformers files: a directory, or a Hub id; ValueError where they are absent or do not fit."""
        read: Any = CLIPModel.from_pretrained  # its types do not know output_loading_info, which adds a second result
        try:
            model, report = read(
                name, revision=revision, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except UnpicklingError:  # without torch's own message, which recommends to run the code
            raise ValueError(f"CLIP model {str(name)!r} is refused: its pickle is damaged or would run code") from None
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"CLIP model {str(name)!r} cannot be read: {DOWNLOAD_HINT} ({error})") from error
        if faults := {kind: sorted(map(str, names))[:4] for kind, names in report.items() if names}:
            raise ValueError(f"CLIP model {str(name)!r} does not fit its configuration: {faults}")
        return cls(model, batch_size)

    @classmethod
    def from_open_clip(cls, source: Source, config: CLIPConfig | None = None, batch_size: int = 16) -> "ClipEncoder":
        """Encoder from an open_clip checkpoint (`open_clip_pytorch_model.bin`, `.safetensors`, or its state dict)."""
        state = _transformers_names(load_state(source, key="state_dict"))
        with torch.device("meta"):
            model = CLIPModel(config or clip_config())
        for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
            embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
        return cls(load_strict(model, state, source), batch_size)

    @torch.no_grad()
    def encode_images(self, frames: Tensor) -> Tensor:
        """Unit-length features (..., 1024) float32 of frames (..., 3, 384, 384) with values in [0, 1].

        The patches of 14 pixels cover rows and columns 0 to 377; the rest is cut off, nothing is resized.
        """
        if frames.shape[-3:] != (3, CLIP_PIXELS, CLIP_PIXELS) or not frames.is_floating_point():
            what = f"{frames.dtype} of shape {tuple(frames.shape)}"
            raise ValueError(f"frames are {what}: give floats (..., 3, 384, 384) in [0, 1]")
        size = self.image_size
        cut = frames[..., :size, :size].reshape(-1, 3, size, size)
        features = []
        for batch in cut.split(self.batch_size):
            pixels = ((batch - self.pixel_mean) / self.pixel_std).to(self.model.dtype)
            pooled = self.model.get_image_features(pixel_values=pixels).pooler_output
            features.append(F.normalize(pooled.float(), dim=-1))
        return torch.cat(features).view(*frames.shape[:-3], -1)

    @torch.no_grad()
    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Unit-length features (B, 77, 1024) float32 of every position of token ids (B, 77).

        Last hidden states after the final norm: not pooled, not projected, and without attention mask, since training
        uses the features of the zero padding, too (MMAudio, arXiv 2412.15322).
        """
        if token_ids.ndim != 2 or token_ids.shape[1] != TEXT_TOKENS:
            raise ValueError(f"token ids have shape {tuple(token_ids.shape)}: give (batch, {TEXT_TOKENS})")
        batches = token_ids.split(self.batch_size)
        states = [self.model.text_model(input_ids=batch).last_hidden_state.float() for batch in batches]
        return F.normalize(torch.cat(states), dim=-1)


def weight_files(source: str | Path) -> list[Path]:
    """The files with the weights of a CLIP model: a checkpoint itself, else those that transformers would read of a
    folder or Hub id, which is fetched if need be. ValueError where there are none.
    """
    if Path(source).is_file():
        return [Path(source)]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if whole := _model_file(source, name):
            return [whole]
        if index := _model_file(source, f"{name}.index.json"):
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} is damaged: download it again ({error!r})") from error
            paths = [path for shard in shards if (path := _model_file(source, shard))]
            if len(paths) == len(shards) > 0:
                return paths
    where = "this folder" if Path(source).is_dir() else "a file, a folder or on the Hub"
    raise ValueError(f"encoders.clip {str(source)!r}: no weights of CLIP are in {where}: {DOWNLOAD_HINT}")


def _model_file(source: str | Path, name: str) -> Path | None:
    if Path(source).is_dir():
        return path if (path := Path(source) / name).is_file() else None
    try:
        return Path(hf_hub_download(str(source), name))
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"encoders.clip {str(source)!r} is neither a file, a folder nor on the Hub: {DOWNLOAD_HINT} ({error})"
        ) from error


def hash_tensors(*files: Path) -> str:
    """sha256 of the tensors of a CLIP model, whatever files and names they are in: transformers' or open_clip's."""
    states = [load_state(file, key="state_dict", keep_dtype=True) for file in files]
    state = {name: value for tensors in states for name, value in tensors.items()}
    digest = hashlib.sha256()
    for name, value in sorted(_transformers_names(state).items()):
        if not name.endswith("position_ids"):  # a table of 0, 1, 2 ... that only some files have
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


_NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
}
_SUBSTRINGS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",  # so spelled in transformers
    "visual.ln_post.": "vision_model.post_layernorm.",
    "transformer.resblocks.": "text_model.encoder.layers.",
    "ln_final.": "text_model.final_layer_norm.",
    ".attn.": ".self_attn.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".c_fc.": ".fc1.",
    ".c_proj.": ".fc2.",
}


def _transformers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of open_clip under the names of transformers: q, k and v split, projections transposed."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        new = _NAMES.get(name, name)
        for theirs, ours in _SUBSTRINGS.items():
            new = new.replace(theirs, ours)
        if "in_proj_" in new and len(value) % 3 == 0:
            thirds = zip("qkv", value.chunk(3), strict=True)
            renamed |= {new.replace("in_proj_", f"{letter}_proj."): third for letter, third in thirds}
        else:
            renamed[new] = value.T.contiguous() if name in ("visual.proj", "text_projection") else value
    return renamed


class ClipTokenizer:
    """Captions to CLIP token ids with zeros behind the end, exactly as open_clip makes them.

    `tokenizer(captions)` returns int64 (B, 77): start, byte pairs, end, zeros; longer captions are cut and keep the end
    id in the last position. (transformers' CLIPTokenizer pads with the end id, which changes the features.)
    """

    def __init__(self, vocabulary: dict[str, int], merges: Sequence[tuple[str, str]]):
        words = {word: index for word, index in vocabulary.items() if index < START_ID}
        affixes: Any = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}
        vocab = words | {START: START_ID, END: END_ID}
        self.tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), **affixes))
        split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
        symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, symbols])
        self.tokenizer.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])

    @classmethod
    def from_files(cls, source: str | Path, revision: str | None = None) -> "ClipTokenizer":
        """Tokenizer from open_clip's `bpe_simple_vocab_16e6.txt.gz`, or from a directory or Hub id that has
        `vocab.json` and `merges.txt`, or `tokenizer.json`. ValueError where the table is not that of CLIP.
        """
        path = Path(source)
        if path.is_file():
            vocabulary, merges = _read_merge_list(path)
        else:
            vocabulary, merges = _read_folder(path if path.is_dir() else _download(str(source), revision))
        if sorted(vocabulary.values()) != list(range(VOCABULARY)) or len(merges) != MERGES:
            has = f"{source} has {len(vocabulary)} tokens and {len(merges)} merges"
            raise ValueError(f"{has}; the byte-pair table of CLIP has {VOCABULARY} and {MERGES}")
        return cls(vocabulary, merges)

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        if isinstance(captions, str):
            raise ValueError("give a list of captions, not one string")
        rows = torch.zeros(len(captions), TEXT_TOKENS, dtype=torch.int64)
        encodings = self.tokenizer.encode_batch([clean_caption(text) for text in captions], add_special_tokens=False)
        for row, encoding in zip(rows, encodings, strict=True):
            ids = [START_ID, *encoding.ids[: TEXT_TOKENS - 2], END_ID]
            row[: len(ids)] = torch.tensor(ids)
        return rows


def clean_caption(text: str) -> str:
    """Repaired Unicode, HTML entities resolved twice, single spaces, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _download(name: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(TOKENIZER_FILES)))
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {name!r} is neither a file, a folder nor on the Hub: {DOWNLOAD_HINT}") from error


def _read_folder(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    try:
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            return vocabulary, _pairs((folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:])
        if (folder / "tokenizer.json").is_file():
            table = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            added = {token["content"]: token["id"] for token in table.get("added_tokens", [])}
            return table["model"]["vocab"] | added, _pairs(table["model"]["merges"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds a damaged tokenizer: download it again ({error!r})") from error
    raise ValueError(f"{folder} has neither vocab.json and merges.txt nor tokenizer.json: {DOWNLOAD_HINT}")


def _read_merge_list(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Table from open_clip's list of merges, of which the first ones behind the header are in use."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        merges = _pairs(content.decode("utf-8").split("\n")[1 : MERGES + 1])
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a list of byte-pair merges: download it again ({error})") from error
    symbols = _byte_symbols()
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), START, END]
    return {word: index for index, word in enumerate(words)}, merges


def _pairs(merges: Sequence) -> list[tuple[str, str]]:
    """Merges as pairs; they are written as pairs or as two words in a string."""
    pairs = [tuple(merge.split() if isinstance(merge, str) else merge) for merge in merges if merge]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise ValueError(f"{wrong[0]} is not a pair")
    return pairs


def _byte_symbols() -> list[str]:
    """The 256 symbols of bytes: visible Latin-1 characters first, then substitutes from 256 on for the other bytes."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in visible] + [chr(256 + n) for n in range(256 - len(visible))]
