"""The words of docs/design.md: identifiers, docstrings, comments and messages say what the field says."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Words that have no place in an identifier, each with what is written instead.
IDENTIFIERS = {
    **dict.fromkeys(("picture", "pictures"), "frame, frames, image"),
    **dict.fromkeys(("sound", "sounds"), "audio, waveform, sample"),
    **dict.fromkeys(("recording", "recordings"), "audio_file"),
    **dict.fromkeys(("fact", "facts"), "metadata, probe, flags: by what it is"),
    **dict.fromkeys(("slot", "slots"), "sample_index (global)"),
    **dict.fromkeys(("place", "places"), "index, batch_row, path"),
    **dict.fromkeys(("made", "found", "told", "noted", "asked", "wanted"), "the name of the result"),
    **dict.fromkeys(("average", "averages", "averaged"), "ema_weights"),
    **dict.fromkeys(("judge", "judged", "judging"), "should_stop, check, evaluate"),
    **dict.fromkeys(("refuse", "refused", "refusal"), "skip, reject, error"),
    **dict.fromkeys(("say", "said", "tell"), "log, output"),
    **dict.fromkeys(("part", "parts", "portion"), "shard, chunk, component: by what it is"),
    **dict.fromkeys(("room", "filling"), "buffer"),
    **dict.fromkeys(("autopsy", "stray", "strays", "stranger", "strangers"), "diagnostics, stale, unknown"),
    **dict.fromkeys(("counted", "draws"), "valid, noise"),
    **dict.fromkeys(("strange", "anew", "sturdy", "twin"), "the usual term"),
}
KEPT = {
    "Draws",  # public name
    "average_rate",  # PyAV
    "found_inf",  # torch.optim
}
# Phrases that a reader of the torch and diffusers docs would stumble over.
PHRASES = {
    r"\bpictures?\b": "frame(s), image(s)",
    r"\bsounds?\b(?! (bible|effects?))": "audio, waveform, sample(s)",
    r"\brecordings?\b": "audio file(s)",
    r"\bfacts?\b": "metadata, figures",
    r"\bshared? out\b": "sharded",
    r"\bbut for\b": "except",
    r"\bas of\b": "from, at",
    r"\bgiven? back\b": "returned, freed",
    r"\bheld back\b": "frozen",
    r"\bstands? for\b": "is, means",
    r"\bleaves? word\b": "signal",
    r"\btaken? up\b|\btakes? up\b": "resume",
    r"\bgoes on\b|\bgo on\b": "continue, resume",
    r"\banew\b": "again",
    r"\bautopsy\b": "diagnostics",
    r"\bjudged?\b": "check, evaluate",
    r"\bopening parts? of\b": "prefix",
    r"\bsea of\b": "the usual term",
    r"\binterpreter lock\b": "GIL",
    r"\bpage-locked\b": "pinned",
    r"\bspec (networks|media)\b|\(spec\b": "a paper section or a page of docs/",
}
# Where one of these words is a name: SoundBible, and names of files and folders that exist in runs.
EXEMPT = re.compile(r"SoundBible|Sound Effects|soundfile|SoundFile|autopsy/|BBC Sound|bbcsound|\"facts\"")

FILES = sorted(path for folder in ("mmaudio_hf", "tests", "scripts") for path in (ROOT / folder).rglob("*.py"))
DOCS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.yaml")])


def names_of(tree: ast.AST):
    """Every name that the code itself chooses, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def prose_of(text: str):
    """Comments and string literals, which hold docstrings and messages, with their lines."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            for offset, line in enumerate(token.string.splitlines()):
                yield line, token.start[0] + offset


def problems_in_prose(lines) -> list[str]:
    problems = []
    for line, number in lines:
        for phrase, better in PHRASES.items():
            match = re.search(phrase, EXEMPT.sub("", line), re.IGNORECASE)
            if match:
                problems.append(f"{number}: {match[0]!r} -> {better}: {line.strip()[:90]}")
    return problems


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_uses_the_words_of_the_field(path):
    if path == Path(__file__):
        return  # it lists the words
    text = path.read_text()
    problems = problems_in_prose(prose_of(text))
    for name, number in names_of(ast.parse(text)):
        words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+", name)} if name not in KEPT else set()
        problems += [f"{number}: {name}: {word} -> {IDENTIFIERS[word]}" for word in sorted(words & IDENTIFIERS.keys())]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_docs_use_the_words_of_the_field(path):
    if path.name == "design.md":
        return  # it holds the glossary
    problems = problems_in_prose([(line, n) for n, line in enumerate(path.read_text().splitlines(), 1)])
    assert not problems, "\n".join(problems)


def test_the_check_finds_a_word_in_each_place():
    assert problems_in_prose(prose_of('"""The pictures of a video."""')) and problems_in_prose(prose_of("# its facts"))
    assert [name for name, _ in names_of(ast.parse("def judge(sound): made = 1"))] == ["judge", "sound", "made"]
