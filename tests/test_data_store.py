"""The feature store: the reference layout byte for byte, round trips, kills, and every way a store can be wrong."""

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from data_stores import AUDIO_SHAPES, METADATA, SHAPES, make_store, random_values
from forked import Command
from golden_data import GOLDEN, MEDIA_SEED, tensor
from tensordict import TensorDict

from mmaudio_hf.data.layout import ids_hash
from mmaudio_hf.data.store import FeatureStore, Moments, StoreWriter
from mmaudio_hf.data.tools import verify

EXAMPLES = json.loads((GOLDEN / "media_memmap.json").read_text())


def golden_values(name: str) -> dict[str, torch.Tensor]:
    meta = EXAMPLES[name]["meta"]
    shapes = {key: entry["shape"][1:] for key, entry in meta.items() if isinstance(entry, dict)}
    return {
        key: torch.stack([tensor(f"{name}/{key}/{i}", shape, MEDIA_SEED) for i in range(3)])
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize("name", ["vgg-example", "audio-example"])
def test_writes_the_bytes_of_the_reference_layout(name, tmp_path):
    theirs = FeatureStore.open(GOLDEN / "media_memmap" / name)
    values = golden_values(name)
    shapes = {key: value.shape[1:] for key, value in values.items()}
    with StoreWriter(tmp_path / name, shapes, 3, **METADATA) as writer:
        writer.write(2, theirs.ids[2:], theirs.captions[2:], {key: value[2:] for key, value in values.items()})
        writer.write(0, theirs.ids[:2], theirs.captions[:2], {key: value[:2] for key, value in values.items()})
    expected = EXAMPLES[name]["files"]
    assert {file.name for file in (tmp_path / name).iterdir()} == set(expected)
    for file, entry in expected.items():
        assert hashlib.sha256((tmp_path / name / file).read_bytes()).hexdigest() == entry["sha256"], file
    assert (tmp_path / f"{name}.tsv").read_text() == EXAMPLES[name]["tsv_bytes"]
    loaded = TensorDict.load_memmap(tmp_path / name)
    assert sorted(loaded.keys()) == EXAMPLES[name]["loaded_keys"]
    assert all(torch.equal(loaded[key], value) for key, value in values.items())


@pytest.mark.parametrize("name", ["vgg-example", "audio-example"])
@pytest.mark.parametrize("vintage", ["new", "old"])
def test_reads_stores_of_the_reference_implementation(name, vintage, tmp_path):
    shutil.copytree(GOLDEN / "media_memmap" / name, tmp_path / name)
    shutil.copy(GOLDEN / "media_memmap" / f"{name}.tsv", tmp_path)
    if vintage == "old":
        meta = json.loads((tmp_path / name / "meta.json").read_text())
        for entry in meta.values():
            if isinstance(entry, dict):
                del entry["is_nested"]
        del meta["_format_version"], meta["_class"]
        (tmp_path / name / "meta.json").write_text(json.dumps(meta))
        TensorDict.load_memmap(tmp_path / name)
    store = FeatureStore.open(tmp_path / name)
    values = golden_values(name)
    assert len(store) == 3 and store.manifest is None and store.has_video == (name == "vgg-example")
    read = store.read([2, 0, 2])
    assert all(torch.equal(read[key], value[[2, 0, 2]]) for key, value in values.items())
    mean, std = store.latent_statistics()
    torch.testing.assert_close(mean, values["mean"].flatten(0, 1).mean(0))
    torch.testing.assert_close(std, values["mean"].flatten(0, 1).std(0))
    report = verify(tmp_path / name)
    assert report.ok and "no manifest" in report.notes[0]


def test_ids_and_captions_stay_text():
    video, audio = (FeatureStore.open(GOLDEN / "media_memmap" / name) for name in ("vgg-example", "audio-example"))
    assert video.ids[2] == 'x"y_000002' and video.captions[1] == 'say "hi", then\ttab'
    assert audio.captions == ["a", "a", "NA"] and audio.ids[0] == "00001_0"


def test_round_trip_of_awkward_text_and_types(tmp_path):
    ids = ["00008", "NA", "a.b", "-x", "null", "é"]
    captions = ["", "NA", "two\nlines", "bare\rreturn", '"quoted"', " spaces \t tab "]
    values = random_values(6)
    with StoreWriter(tmp_path / "s", SHAPES, 6, **METADATA, layout="compact") as writer:
        writer.write(0, ids, captions, {name: value.numpy() for name, value in values.items()})
    store = FeatureStore.open(tmp_path / "s")
    assert store.ids == ids and store.captions == captions
    assert store.columns["mean"] == ((5, 4), torch.float32) and store.columns["clip_features"].dtype == torch.bfloat16
    read = store.read(torch.tensor([5, 0]), ["mean", "text_features"])
    assert set(read) == {"mean", "text_features"}
    assert torch.equal(read["mean"], values["mean"][[5, 0]])
    assert torch.equal(read["text_features"], values["text_features"][[5, 0]].bfloat16())
    assert verify(store.path).ok


def test_the_bytes_do_not_depend_on_how_rows_are_grouped(tmp_path):
    values, ids = random_values(9), [f"id_{row}" for row in range(9)]
    written = []
    for size in (1, 2, 9):
        with StoreWriter(tmp_path / f"by_{size}", SHAPES, 9, **METADATA) as writer:
            for first in range(0, 9, size):
                rows = slice(first, first + size)
                writer.write(first, ids[rows], ids[rows], {name: value[rows] for name, value in values.items()})
        written.append((tmp_path / f"by_{size}.manifest.json").read_bytes())  # holds sums over every column
    assert written[0] == written[1] == written[2]


def test_manifest_tells_what_the_numbers_are(tmp_path):
    metadata = {"preprocessing": "p1", "normalisation": {"peak": True}, "counts": {"accepted": 9, "rejected": 2}}
    store = make_store(tmp_path / "s", 9, **metadata)
    manifest = store.manifest
    assert {**METADATA, **metadata}.items() <= manifest.items()
    assert manifest["schema_version"] == 1 and manifest["rows"] == 9
    assert (
        manifest["ids_sha256"]
        == ids_hash(store.ids)
        == hashlib.sha256("\n".join([*store.ids, ""]).encode()).hexdigest()
    )
    for name, column in manifest["columns"].items():
        data = (tmp_path / "s" / f"{name}.memmap").read_bytes()
        assert column == {"dtype": "float32", "shape": list(SHAPES[name]), "sha256": hashlib.sha256(data).hexdigest()}
    means = store.read(range(9))["mean"].flatten(0, 1).double()
    stored = manifest["latent_statistics"]
    torch.testing.assert_close(torch.tensor(stored["mean"], dtype=torch.float64), means.mean(0))
    torch.testing.assert_close(torch.tensor(stored["std"], dtype=torch.float64), means.std(0))
    assert [value.dtype for value in store.latent_statistics()] == [torch.float32] * 2
    torch.testing.assert_close(store.latent_statistics()[1], means.std(0).float())


def test_moments_keep_their_digits_far_from_zero():
    values = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    moments = Moments(3)
    for block in values.split(37):
        moments.add(block)
    torch.testing.assert_close(moments.mean, values.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.std(), values.std(0), rtol=1e-9, atol=0)


def test_reading_refuses_rows_outside_the_store(tmp_path):
    store = make_store(tmp_path / "s", 4)
    for rows in ([4], [-1]):
        with pytest.raises(IndexError, match="rows 0 to 3"):
            store.read(rows)
    assert store.read([])["mean"].shape == (0, 5, 4)


# --- reading -----------------------------------------------------------------------------------------------------

ORDERS = {
    "one": [3],
    "repeated": [5, 5, 0, 5],
    "in order": list(range(700)),
    "random": np.random.default_rng(1).permutation(700).tolist(),
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """700 rows of columns with less, more and far more than 16,384 elements, the last without a small divisor."""
    shapes = {"mean": (5, 4), "std": (5, 4), "clip_features": (9, 2048), "sync_features": (1, 17939)}
    return make_store(tmp_path_factory.mktemp("wide") / "s", 700, shapes)


@pytest.fixture(scope="module")
def wide_columns(wide):
    """What the files hold, by another way."""
    names = wide.columns.items()
    return {n: torch.from_numpy(np.fromfile(wide.path / f"{n}.memmap", "f4")).view(-1, *c.shape) for n, c in names}


@pytest.mark.parametrize("order", list(ORDERS))
def test_reads_rows_in_any_order(wide, wide_columns, order):
    rows = ORDERS[order]
    for name, values in wide.read(rows).items():
        assert torch.equal(values, wide_columns[name][rows]), name


def test_reads_into_memory_that_is_there_and_no_further(wide, wide_columns):
    out = torch.full((5, 9, 2048), 7.0)
    wide.read_into("clip_features", np.array([6, 2]), out[1:3])
    assert torch.equal(out[1:3], wide_columns["clip_features"][[6, 2]])
    assert (out[[0, 3, 4]] == 7).all()
    with pytest.raises(AssertionError):
        wide.read_into("clip_features", np.array([6, 2]), out[1:4])


def test_many_threads_read_at_once(wide, wide_columns):
    with ThreadPoolExecutor(4) as pool:
        for values in pool.map(lambda _: wide.read(ORDERS["random"], ["clip_features"]), range(8)):
            assert torch.equal(values["clip_features"], wide_columns["clip_features"][ORDERS["random"]])


def test_a_forked_process_reads_too(wide, wide_columns):
    def read():
        torch.set_num_threads(1)  # as a worker of a DataLoader
        assert torch.equal(wide.read([3, 600])["mean"], wide_columns["mean"][[3, 600]])

    process = multiprocessing.get_context("fork").Process(target=read)
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_nothing_can_be_written_through_an_open_store(tmp_path):
    """The files may belong to somebody else, and may not be writable."""
    store = make_store(tmp_path / "s", 4)
    store.close()
    for file in store.path.iterdir():
        file.chmod(0o400)
    store = FeatureStore.open(store.path)
    assert store.read([2])["mean"].shape == (1, 5, 4)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(store.path) in line]
    assert len(maps) == len(SHAPES) and all(mode == "r--s" for _, mode, *_ in maps)
    store.close()
    assert str(store.path) not in Path("/proc/self/maps").read_text()


def test_rows_can_be_dropped_from_the_page_cache_and_requested(wide):
    """The kernel is free to do otherwise; what is read stays right."""
    rows = np.array([4, 600, 5])
    before = wide.read(rows)
    for name in wide.columns:
        wide.drop_from_cache(name, rows)
        wide.prefetch(name, rows)
    wide.advise_random()
    assert all(torch.equal(value, before[name]) for name, value in wide.read(rows).items())


# --- writing -----------------------------------------------------------------------------------------------------


def test_writer_refuses_mistakes_and_leaves_nothing(tmp_path):
    def fails(message, first=0, ids=("a", "b"), captions=("", ""), **changes):
        with (
            pytest.raises(ValueError, match=message),
            StoreWriter(tmp_path / "s", AUDIO_SHAPES, 3, **METADATA) as writer,
        ):
            writer.write(0, ["first"], [""], random_values(1, AUDIO_SHAPES))
            writer.write(first, list(ids), list(captions), random_values(2, AUDIO_SHAPES) | changes)
        assert list(tmp_path.iterdir()) == []

    bad = random_values(2, AUDIO_SHAPES)["std"]
    bad[1, 2, 3] = float("nan")
    fails("row 0 .'a'. is written a second time")
    fails("rows 2 to 3 given", first=2)
    fails("'../b' is not a plain name", first=1, ids=("a", "../b"))
    fails("2 ids and 1 captions", first=1, captions=("",))
    fails("columns .* given", first=1, clip_features=bad)
    fails(r"mean has shape \(2, 4, 5\)", first=1, mean=torch.zeros(2, 4, 5))
    fails("std of id 'b' has values not finite", first=1, std=bad)


def test_writer_refuses_missing_rows_and_taken_names(tmp_path):
    with pytest.raises(ValueError, match="1 of 3 rows were never written, first 1"):  # noqa: SIM117
        with StoreWriter(tmp_path / "s", AUDIO_SHAPES, 3, **METADATA) as writer:
            writer.write(0, ["a"], [""], random_values(1, AUDIO_SHAPES))
            writer.write(2, ["b"], [""], random_values(1, AUDIO_SHAPES))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "list.tsv").write_text("id\tlabel\n")
    for name, message in (("list", "list.tsv exists"), ("v1.5", "has a dot")):
        with pytest.raises(ValueError, match=message):
            StoreWriter(tmp_path / name, AUDIO_SHAPES, 3, **METADATA)
    make_store(tmp_path / "s", 3)
    with pytest.raises(ValueError, match="exists: remove it"):
        StoreWriter(tmp_path / "s", AUDIO_SHAPES, 3, **METADATA)
    with pytest.raises(ValueError, match="come together"):
        StoreWriter(tmp_path / "t", {**AUDIO_SHAPES, "clip_features": (1, 1)}, 3, **METADATA)


def test_writer_finds_out_at_once_that_the_disk_is_too_small(tmp_path):
    with pytest.raises(OSError, match=r"the store needs 1\d*\.\d [kMG]?B.*, the disk has .*"):
        StoreWriter(tmp_path / "s", {**AUDIO_SHAPES, "text_features": (1 << 40, 4)}, 100, **METADATA)
    assert list(tmp_path.iterdir()) == []


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from data_stores import AUDIO_SHAPES, METADATA, random_values
    from mmaudio_hf.data import store

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if {moment!r} == "renaming":
        store.os.rename = die
    with store.StoreWriter({path!r}, AUDIO_SHAPES, 4, **METADATA) as writer:
        writer.write(0, ["a", "b", "c"], [""] * 3, random_values(3, AUDIO_SHAPES))
        if {moment!r} == "writing":
            die()
        writer.write(3, ["d"], [""], random_values(1, AUDIO_SHAPES))
"""


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_killed_export_leaves_nothing_that_opens(moment, tmp_path):
    path = tmp_path / "s"
    script = textwrap.dedent(KILLED.format(tests=os.path.dirname(__file__), path=str(path), moment=moment))
    (program := tmp_path / "export.py").write_text(script)
    done = Command(str(program)).result()
    assert done.returncode == -signal.SIGKILL, done.stderr
    program.unlink()
    assert (tmp_path / "s.partial").is_dir()
    for left in (path, tmp_path / "s.partial"):
        with pytest.raises(ValueError, match=r"no feature store|not finished"):
            FeatureStore.open(left)
        assert not verify(left).ok
    make_store(path, 2)  # the next export takes over
    assert verify(path).ok and {file.name for file in tmp_path.iterdir()} == {"s", "s.tsv", "s.manifest.json"}


def test_memory_of_the_writer_does_not_grow_with_the_rows(tmp_path):
    script = """
        import sys, torch
        from mmaudio_hf.data.store import StoreWriter
        from mmaudio_hf.training.logs import peak_memory_gb
        sys.path.insert(0, {tests!r})
        from data_stores import METADATA
        shapes = {{"mean": (250, 20), "std": (250, 20), "text_features": (77, 1024)}}
        rows = 200
        with StoreWriter({path!r}, shapes, rows, **METADATA) as writer:
            for row in range(rows):
                if row == 20:
                    before = peak_memory_gb(torch.device("cpu"))
                writer.write(row, [f"i{{row}}"], [""], {{k: torch.ones(1, *s) for k, s in shapes.items()}})
        print(1e3 * (peak_memory_gb(torch.device("cpu")) - before))
    """
    script = textwrap.dedent(script.format(tests=os.path.dirname(__file__), path=str(tmp_path / "s")))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 20  # MB; the store has 71


# --- broken stores -----------------------------------------------------------------------------------------------


def edit(**changes):
    return lambda whole: json.dumps(json.loads(whole) | changes).encode()


def entry(shape, dtype="torch.float32"):
    return {"shape": shape, "dtype": dtype}


def swap_rows(whole: bytes) -> bytes:
    header, first, second, *rest = whole.splitlines(keepends=True)
    return b"".join([header, second, first, *rest])


BROKEN = [  # file, what is done to it, message
    ("s/std.memmap", lambda whole: whole[:-1], "std.memmap has 319 bytes, meta.json says 320; .*extract"),
    ("s/mean.memmap", lambda whole: whole + b"\0" * 80, "mean.memmap has 400 bytes"),
    ("s/text_features.memmap", None, "text_features.memmap is missing"),
    ("s/meta.json", lambda whole: whole[:20], "meta.json is not readable JSON"),
    ("s/meta.json", edit(std=entry([3, 5, 4])), "different numbers of rows"),
    ("s/meta.json", edit(std=entry([4, 5, 5])), "of one shape"),
    ("s/meta.json", edit(std=entry("4")), "std has shape '4'"),
    ("s/meta.json", edit(std=entry([4, 5, 4], "torch.int64")), "std has dtype 'torch.int64'"),
    ("s/meta.json", edit(**{"../x": entry([4, 5])}), "not a plain name"),
    (
        "s/meta.json",
        lambda whole: whole.replace(b"tensordict:", b"tensorDict:"),
        "meta.json was changed after the export",
    ),
    ("s/meta.json", None, "it has no meta.json"),
    ("s.tsv", lambda whole: whole[: whole.index(b"s_003")], "s.tsv has 3 rows, .* has 4: they do not"),
    ("s.tsv", swap_rows, "does not list the ids of .* in their"),
    ("s.tsv", lambda whole: whole.replace(b"caption 2", b"cap\ttion"), "line 4: 3 fields, the header has 2"),
    ("s.tsv", lambda whole: whole.replace(b"s_001", b"../s_001"), "not a plain name.*line 3"),
    ("s.tsv", lambda whole: whole.replace(b"label", b"words"), "needs the columns"),
    ("s.tsv", lambda whole: whole.replace(b"caption 2", b"\xff\xfe"), "not a tab separated UTF-8 table"),
    ("s.tsv", None, "no s.tsv beside"),
    ("s.manifest.json", edit(schema_version=2), "schema version 2 is not known"),
    ("s.manifest.json", edit(rows=5), "describes 5 rows"),
    ("s.manifest.json", lambda _: b"{}", "schema version None"),
    ("s.manifest.json", lambda _: b'{"schema_version": 1}', "lacks mode, duration"),
    ("s.manifest.json", edit(columns={"mean": 3}), "columns or latent_statistics are malformed"),
    ("s.manifest.json", edit(latent_statistics={"mean": [0.0], "std": [1.0]}), "describes 4 rows"),
]


@pytest.mark.parametrize(("file", "change", "message"), BROKEN, ids=[f"{f} {m}" for f, _, m in BROKEN])
def test_a_broken_store_does_not_open_and_the_message_names_the_file(file, change, message, tmp_path):
    make_store(tmp_path / "s", 4)
    file = tmp_path / file
    whole = file.read_bytes()
    file.unlink() if change is None else file.write_bytes(change(whole))
    with pytest.raises(ValueError, match=message) as caught:
        FeatureStore.open(tmp_path / "s")
    assert str(tmp_path / "s") in str(caught.value)
    report = verify(tmp_path / "s")
    assert not report.ok and re.search(message, report.problems[0])
    file.write_bytes(whole)
    assert verify(tmp_path / "s").ok


def test_the_table_may_be_named_as_the_reference_implementation_does(tmp_path):
    make_store(tmp_path / "s", 4)
    (tmp_path / "s.manifest.json").unlink()
    (tmp_path / "s").rename(tmp_path / "audio-v1.16")
    (tmp_path / "s.tsv").rename(tmp_path / "audio-v1.tsv")
    assert len(FeatureStore.open(tmp_path / "audio-v1.16")) == 4


def test_verify_reports_flipped_bits_and_values_that_are_not_finite(tmp_path):
    path = tmp_path / "s"
    make_store(path, 4)
    assert verify(path).ok and verify(path).notes == ()
    file = path / "sync_features.memmap"
    whole = file.read_bytes()
    file.write_bytes(whole[:77] + bytes([whole[77] ^ 1]) + whole[78:])
    FeatureStore.open(path)
    assert (
        len(verify(path).problems) == 1 and "sync_features.memmap is not what was exported" in verify(path).problems[0]
    )
    infinite = torch.tensor([float("inf")]).numpy().tobytes()
    file.write_bytes(whole[: 2 * 192] + infinite + whole[2 * 192 + 4 :])
    problems = verify(path).problems
    assert len(problems) == 2 and problems[1].endswith("not finite in 1 rows: 2 (s_002)")


def test_a_file_that_shrinks_after_opening_is_named(tmp_path):
    store = make_store(tmp_path / "s", 4)
    os.truncate(tmp_path / "s" / "std.memmap", 100)
    for reading in (lambda: store.read([0]), lambda: list(store.blocks("std"))):
        with pytest.raises(OSError, match=r"std\.memmap has 100 bytes, 320 are needed: it became shorter"):
            reading()
