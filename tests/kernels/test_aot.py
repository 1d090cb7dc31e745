"""Kernels compiled ahead of time: listed, compiled, found by the JIT, and sound as machine code.

No GPU takes part: a stand-in for Triton's driver names an architecture and counts launches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import machine_code
import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402

from meddanet.kernels import (  # noqa: E402
    aot,
    backend,
    conv_int_triton,
    head_triton,
    heat_head_triton,
    pooled_head_triton,
    shuffle_stage_triton,
    side_by_side,
    variants,
    way_up_triton,
)
from meddanet.kernels.precompiled import entries  # noqa: E402

# launches kernels, most on tensors of sizes that no list names; argv: the architecture of the
# "GPU", names of more launches, "few" to launch but some, "side by side" to have all compiled so
# beforehand
FIRST_LAUNCHES = """
import json, sys
from collections import Counter
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

counts, loaded = Counter(), []

class Driver:
    '''A GPU that loads and launches nothing.'''
    utils = property(lambda self: self)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)
    def get_device_properties(self, device): return {"max_shared_mem": 101376}
    def load_binary(self, name, kernel, shared, device):
        loaded.append(name)
        return None, 0, 32, 0, 1024
    def unload_module(self, module): pass
    def launcher_cls(self, source, metadata):
        return lambda *arguments: counts.update(["launched"])

def counted(stage):
    def run(self, *arguments, **options):
        counts.update([stage])
        return stages[stage](self, *arguments, **options)
    return run

stages = {name: getattr(CUDABackend, name) for name in ("make_ttir", "make_ttgir", "make_cubin")}
for name, method in stages.items():
    static = isinstance(CUDABackend.__dict__[name], staticmethod)
    if static:
        stages[name] = lambda self, *a, method=method, **k: method(*a, **k)
    setattr(CUDABackend, name, counted(name))
triton.runtime.driver.set_active(Driver())

from meddanet.kernels import crop_paste_triton, input_codes_triton, quantize_triton, variants
last = torch.channels_last

def launch():
    image = torch.ones(3, 4, 152, 184).contiguous(memory_format=last)
    feature = torch.ones(3, 32, 56, 64).contiguous(memory_format=last)
    offset = torch.zeros(3, 2)
    for source in (image, feature):
        patch = source[:, :, :40, :48].contiguous(memory_format=last)
        crop_paste_triton.shift(source, offset, patch, False)
        crop_paste_triton.shift(patch, offset, source, True)
        crop_paste_triton.offset_gradient(source, patch, offset)
    for name in sys.argv[2:]:
        variants.shape_classes()[name]()
    if few:
        return
    for x in (image, torch.ones(3, 7, 3)):
        for bits in (None, torch.full((3,), 16.0)):
            for bytes in (0, -(-x[0].numel() // 8)):
                packed = torch.empty(3 if bytes else 0, bytes, dtype=torch.uint8)
                quantize_triton.quantize(x, bits, 16, torch.ones(3), packed, 3)
        quantize_triton.masked_gradient(x, packed)
        quantize_triton.width_gradient(x, x, bits, torch.ones(1))
    for x in (image, torch.ones(3, 7, 3, 1)):
        for bits, count in ((8, 1), (torch.full((3,), 16.0), 2)):
            planes = torch.zeros(count, *x.shape, dtype=torch.int8)
            packed = torch.zeros(3, -(-x[0].numel() // 8), dtype=torch.uint8)
            for kept, mask in ((planes[:0], None), (planes, None), (planes, packed)):
                input_codes_triton.encode(x, bits, torch.ones(3), kept, x, mask)
            input_codes_triton.decode(planes, bits, torch.ones(3), torch.float32)

few, ahead = (option in sys.argv for option in ("few", "side by side"))
sys.argv = [word for word in sys.argv if word not in ("few", "side by side")]
if ahead:
    from meddanet.kernels.side_by_side import compile_side_by_side
    compile_side_by_side(launch)
    counts["ahead"] = counts.pop("make_cubin")
    assert not counts["launched"] and not loaded
launch()
print(json.dumps({"counts": counts, "loaded": sorted(set(loaded))}))
"""


def first_launches(arch: int, home, cache, *more: str) -> tuple[Counter, list[str], str]:
    """Runs FIRST_LAUNCHES in a fresh process; returns counts, kernels loaded, stderr."""
    run = subprocess.run(
        [sys.executable, "-c", FIRST_LAUNCHES, str(arch), *more],
        env=os.environ | {"XDG_CACHE_HOME": str(home), "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    return Counter(result["counts"]), result["loaded"], run.stderr


@pytest.fixture(autouse=True)
def scratch_cache(tmp_path):
    """Keeps Triton's cache of this process out of the user's home."""
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path / "scratch")
        yield


LAUNCHED = [
    "conv_kernel", "head_kernel", "input_decode_kernel", "input_encode_kernel",
    "masked_gradient_kernel", "offset_gradient_kernel", "quantize_kernel", "shift_kernel",
    "width_gradient_kernel",
]
KERNELS = {
    *LAUNCHED, "encode_kernel", "gradients_kernel", "heat_head_kernel", "pooled_head_kernel",
    "route_kernel", "seen_kernel", "select_kernel", "shuffle_stage_kernel", "shuffle_stem_kernel",
    "view_kernel",
    "way_up_kernel",
}
# which multiply in half precision
HALVES = ("heat_head_kernel", "pooled_head_kernel", "shuffle_stage_kernel", "shuffle_stem_kernel")
FIRST = "first convolution, 4 to 16 channels, 240"
FEW = FIRST, "head, int8", "few"
FEW_LOADED = ["conv_kernel", "head_kernel", "offset_gradient_kernel", "shift_kernel"]


# of training, whose kernels are small
SMALL = "crop", "paste", "gradient by", "decoded", "encoded", "one width", "width per sample"


def some_classes():
    """All that FIRST_LAUNCHES may launch: one convolution, a head and what training launches."""
    return {
        name: launch
        for name, launch in variants.shape_classes().items()
        if name.startswith(SMALL) or name in (FIRST, "head, int8")
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's cache folder with kernels compiled for sm_89."""
    home, chosen = tmp_path_factory.mktemp("home"), some_classes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variants, "shape_classes", lambda: chosen)
        aot.build([89], home / "meddanet" / "kernels")
    return home


def test_the_jit_finds_every_entry_and_compiles_nothing(home, tmp_path):
    counts, loaded, stderr = first_launches(89, home, tmp_path / "cache", FIRST, "head, int8")
    assert counts == {"launched": 36} and loaded == LAUNCHED
    assert not (tmp_path / "cache").exists(), "nothing needs the user's own cache"
    assert "triton" not in stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_first_launches_on_this_gpu_compile_nothing(tmp_path):
    major, minor = torch.cuda.get_device_capability()
    aot.build([10 * major + minor], tmp_path / "meddanet" / "kernels")
    code = """
import torch
from triton import knobs
hits = []
def listen(*, src, cache_hit, **others):
    # but the probe, which no list has
    if src.name != "nothing":
        hits.append(cache_hit)
knobs.compilation.listener = listen
from meddanet.kernels import affine_paste, bilinear_crop, fake_quantize
x = torch.randn(3, 4, 152, 184, device="cuda").contiguous(memory_format=torch.channels_last)
offset = torch.rand(3, 2, device="cuda", requires_grad=True)
out = affine_paste(bilinear_crop(fake_quantize(x, 8), offset, 40), offset, (152, 184))
torch.autograd.grad(out, offset, torch.randn_like(out))
torch.cuda.synchronize()
print(len(hits), all(hits))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "t")},
        capture_output=True, text=True,
    )
    launched, found = run.stdout.split()
    assert (int(launched), found) == (4, "True"), run.stderr


def test_for_another_architecture_the_jit_compiles(home, tmp_path):
    counts, loaded, _ = first_launches(86, home, tmp_path / "cache", *FEW)
    assert loaded == FEW_LOADED
    assert counts["launched"] == counts["make_cubin"] == counts["make_ttir"] == 8
    counts, _, _ = first_launches(86, home, tmp_path / "cache", *FEW)
    assert counts == {"launched": 8}, "Triton's own cache still works"


def test_another_triton_is_told_once_and_the_jit_compiles(home, tmp_path):
    kernels = tmp_path / "home" / "meddanet" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "0.0.1").symlink_to(home / "meddanet" / "kernels" / triton.__version__)
    counts, _, stderr = first_launches(89, tmp_path / "home", tmp_path / "cache", "few")
    assert counts["make_cubin"] == 6
    assert stderr.count(f"compiled for triton 0.0.1, but triton {triton.__version__} runs") == 1


def test_what_is_about_to_be_launched_is_compiled_side_by_side(tmp_path):
    """Nothing runs meanwhile, and nothing is left to compile where it is launched."""
    counts, loaded, _ = first_launches(
        89, tmp_path / "none", tmp_path / "cache", *FEW, "side by side"
    )
    # threads may lose a count to each other
    assert 4 < counts["ahead"] <= 8 and counts["make_cubin"] == 0
    assert counts["launched"] == 8 and loaded == FEW_LOADED


def test_entries_say_what_they_are(home):
    found = list(entries(home / "meddanet" / "kernels"))
    assert {(entry.arch, entry.triton) for entry in found} == {(89, triton.__version__)}
    listed = {v.key: v for name, launch in some_classes().items()
              for v in variants.record(89, name, launch)}
    assert {entry.key: entry.kernel for entry in found} == {k: v.name for k, v in listed.items()}
    assert {p.suffix for entry in found for p in entry.path.iterdir()} == {".cubin", ".json"}


def test_a_build_replaces_its_architecture_and_leaves_the_others(tmp_path, monkeypatch):
    launches = variants.shape_classes()
    crop, paste = "crop, any channels", "paste, any channels"
    for archs, names in (([86, 90], [crop]), ([86], [paste])):
        chosen = {name: launches[name] for name in names}
        monkeypatch.setattr(variants, "shape_classes", lambda chosen=chosen: chosen)
        steps = []
        # what another build is writing at this moment
        partial = tmp_path / triton.__version__ / ".partial-x" / "kernel.json"
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text('{"target":')
        aot.build(archs, tmp_path, lambda done, total, steps=steps: steps.append((done, total)))
        assert partial.exists()
        assert steps == [(n + 1, len(archs)) for n in range(len(archs))]
    keys = {(entry.arch, entry.key) for entry in entries(tmp_path)}
    wanted = [(arch, variants.record(arch, name, launches[name])[0].key)
              for arch, name in ((90, crop), (86, paste))]
    assert keys == set(wanted)


@triton.jit
def short_dot(pointer, K: tl.constexpr):
    """An int8 product of fewer than 32 terms, which no tensor core has."""
    offs = tl.arange(0, 16)[:, None] * K + tl.arange(0, K)[None, :]
    x = tl.load(pointer + offs)
    tl.store(pointer + offs, tl.dot(x, tl.trans(x)).to(tl.int8))


def test_what_does_not_compile_is_named(tmp_path, monkeypatch):
    pointer = torch.empty(16, 16, dtype=torch.int8, device="meta")
    broken = {"16 terms": lambda: short_dot[(1,)](pointer, K=16)}
    monkeypatch.setattr(variants, "shape_classes", lambda: broken)
    with pytest.raises(ValueError, match=r"short_dot \(16 terms\) does not compile for sm_89: "):
        aot.build([89], tmp_path)
    assert not list(tmp_path.rglob("*.cubin"))


@pytest.mark.parametrize("text", ["8.6;8.9;12.0", "12.0, 8.6 8.9,8.9"])
def test_architectures(text):
    assert aot.parse_archs(text) == [86, 89, 120]


@pytest.mark.parametrize(("text", "message"), [
    ("8.6;sm_89", "unknown CUDA architecture 'sm_89'; known are 8.0, 8.6"),
    ("7.5", "unknown CUDA architecture '7.5'"),
    (" ; ", "no CUDA architecture named"),
])
def test_architectures_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        aot.parse_archs(text)


def test_recording_leaves_triton_as_it_was():
    driver, hook = triton.runtime.driver._active, triton.knobs.runtime.jit_cache_hook
    with pytest.raises(ZeroDivisionError):
        variants.record(89, "", lambda: 1 // 0)
    assert triton.runtime.driver._active is driver
    assert triton.knobs.runtime.jit_cache_hook is hook


def test_every_launch_says_whether_products_and_sums_fuse(monkeypatch):
    """Triton's default changes with its version, and triton 3.9 warns where it is taken."""
    launches = {**variants.shape_classes(), "probe": partial(backend._launch, torch.device("cpu"))}
    found = []
    for default in ("0", "1"):
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
        found.append({
            name: [found.options["enable_fp_fusion"] for found in variants.record(89, name, run)]
            for name, run in launches.items()
        })
    assert found[0] == found[1] and all(found[0].values())


def test_recordings_take_turns_and_leave_other_threads_alone():
    """Two engines may go through their first plans at a time, and others launch meanwhile."""
    runtime, inside, entered = triton.knobs.runtime, threading.Event(), threading.Event()
    second = threading.Thread(
        target=lambda: inside.wait(20) and variants.record(89, "", entered.set)
    )
    before, active, asked = runtime.jit_cache_hook, triton.runtime.driver._active, []

    def others_hook(**facts):
        asked.append(facts)
        return "theirs"

    def first():
        inside.set()
        assert not entered.wait(0.1)
        with ThreadPoolExecutor(1) as elsewhere:
            hook = elsewhere.submit(runtime.jit_cache_hook, fn=None, compile={}, key=1)
            assert hook.result(20) is True and asked == [{"fn": None, "compile": {}, "key": 1}]

    try:
        runtime.jit_cache_hook = others_hook
        second.start()
        assert variants.record(89, "", first) == []
        second.join(20)
        assert entered.is_set() and runtime.jit_cache_hook is others_hook
        assert triton.runtime.driver._active is active
    finally:
        runtime.jit_cache_hook = before


class Meeting:
    """A kernel that compiles when as many others do; then it fails."""

    def __init__(self, barrier):
        self.barrier, self.met = barrier, False

    def compile(self):
        self.barrier.wait(20)
        self.met = True
        raise ValueError("told where it is launched")


def test_kernels_are_compiled_at_a_time(monkeypatch):
    monkeypatch.setattr(side_by_side.os, "cpu_count", lambda: 2)
    kernels = [Meeting(threading.Barrier(2))] * 2
    assert list(side_by_side.compile_in_threads(kernels)) == [(kernel, None) for kernel in kernels]
    assert all(kernel.met for kernel in kernels)


@pytest.mark.parametrize(("error", "told"), [
    (ImportError("no _base32 here"), "which ones cannot be told (ImportError: no _base32 here)"),
    (torch.OutOfMemoryError("CUDA out of memory"), None),
])
def test_kernels_that_cannot_be_told_compile_one_by_one(monkeypatch, caplog, error, told):
    """Triton's insides are its own business; what a plan needs of memory is the engine's."""

    def fail(*_):
        raise error

    monkeypatch.setattr(side_by_side, "uncompiled", fail)
    monkeypatch.setattr(triton.runtime.driver, "_active", variants._Driver(None))
    with nullcontext() if told else pytest.raises(torch.OutOfMemoryError):
        side_by_side.compile_side_by_side(None)
    assert [told in line for line in caplog.messages] == [True] * bool(told)


@triton.jit
def sums(x_ptr, out_ptr, COUNT: tl.constexpr):
    """Sums two loaded blocks, everything in flight at once."""
    offs = tl.arange(0, COUNT)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) + tl.load(x_ptr + COUNT + offs))


def machine_code_of(arch, name, launch):
    """Compiles the first variant of a launch and describes it."""
    variant, *_ = variants.record(arch, name, launch)
    return machine_code.describe(variant, variant.compile())


@pytest.mark.parametrize(("registers", "spills"), [(None, False), (24, True)])
def test_a_spill_is_seen(registers, spills):
    x = torch.empty(8192, device="meta")
    row = machine_code_of(89, "", lambda: sums[(1,)](x, x, COUNT=4096, maxnreg=registers))
    assert machine_code.spills(row) == spills
    assert row["registers"] == 24 if spills else row["registers"] > 40


@triton.jit
def tenths(x_ptr, count_ptr, out_ptr):
    """Converts to float64 twice, multiplies there, and converts back."""
    tenth = tl.load(x_ptr).to(tl.float64) * 0.1 * tl.load(count_ptr).to(tl.float64)
    tl.store(out_ptr, tenth.to(tl.float32))


def test_what_graphics_cards_do_slowly_is_seen():
    x, count = torch.empty(8, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    row = machine_code_of(89, "", lambda: tenths[(1,)](x, count, x, enable_fp_fusion=False))
    assert row["in_64_bits"] == 5


def one_per_class(arch):
    """The first variant of each kind of launch: what stands before the comma in its name."""
    kinds = {}
    for name, launch in variants.shape_classes().items():
        kinds.setdefault(name.split(",")[0], (name, launch))
    return [variants.record(arch, name, launch)[0] for name, launch in kinds.values()]


def assert_lean(row):
    """Nothing is spilled or computed in float64, every GPU has the room, and products run on the
    right tensor cores."""
    assert not machine_code.spills(row) and not row["in_64_bits"], row
    assert row["shared_bytes"] <= 99 * 1024, row
    assert 0 < row["registers"] <= 255 and row["instructions"] > 20, row
    for kernels, products in (
        (("conv_kernel", "way_up_kernel"), {"IMMA", "IGMMA"}),
        (HALVES, {"HMMA", "HGMMA"}),
    ):
        found = products & row["of_these"].keys()
        assert found if row["kernel"] in kernels else not found, row


def long(value):
    """A parameter beside others that compile to much the same."""
    return pytest.param(value, marks=pytest.mark.long)


@pytest.mark.parametrize("arch", machine_code.ARCHS)
def test_machine_code(arch):
    table = table_of_results()
    known = triton.__version__ == table["triton"]
    if arch != 90 and known:
        pytest.skip("the table of results has these kernels, by their keys, of this triton")
    rows, chosen = [], one_per_class(arch)
    assert {variant.name for variant in chosen} == KERNELS
    if known:
        # the shortest of each kernel: that the compiler here makes of them what the table says
        length = {row["key"]: row["instructions"] for row in table["variants"]}
        chosen.sort(key=lambda variant: length[variant.key], reverse=True)
        chosen = list({variant.name: variant for variant in chosen}.values())
    aot.compile_all(chosen, lambda *compiled: rows.append(machine_code.describe(*compiled)))
    for row in rows:
        assert_lean(row)


@pytest.mark.long
@pytest.mark.parametrize("wide", [False, True], ids=["8 bit", "8 and 16 bit"])
@pytest.mark.parametrize("channels", [256, 512])
def test_machine_code_of_wide_layers(channels, wide):
    """More channels than the shipped networks have: no spill, and room on the smallest GPU."""
    epilogue = {"mixed": wide, "mixed_out": wide, "residual": True, "stream": True, "relu": True}
    launch = partial(conv_int_triton._launch_meta, channels, channels, 3, 30, **epilogue)
    assert_lean(machine_code_of(86, "", launch))


@pytest.mark.long
@pytest.mark.parametrize(("channels", "arch"), [(6, 89), (24, 80), (24, 90), (128, 120), (256, 86)])
def test_machine_code_of_other_ways_up(channels, arch):
    """Channels to be padded, and more than the shipped networks have."""
    launch = partial(way_up_triton._launch_meta, channels, tile=channels < 128)
    assert_lean(machine_code_of(arch, "", launch))


@pytest.mark.parametrize("dtype", [torch.float16, long(torch.bfloat16), torch.float32])
@pytest.mark.parametrize("arch", [86, long(90)])
def test_machine_code_of_heads_of_floats(arch, dtype):
    """Which the shipped models do not launch."""
    assert_lean(machine_code_of(arch, "", partial(head_triton._launch_meta, dtype)))


@pytest.mark.long
@pytest.mark.parametrize("shape", [(96, 192, 4), (128, 256, 1), (128, 256, 2)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_machine_code_of_wide_stages(shape, dtype):
    """Those of "shufflenetv2" and the widest there are: no spill, and room on the smallest GPU."""
    launch = partial(shuffle_stage_triton._launch_meta, *shape, dtype)
    assert_lean(machine_code_of(86, "", launch))


@pytest.mark.parametrize("launch", [
    partial(pooled_head_triton._launch_meta, 192, 1024, 4),
    partial(pooled_head_triton._launch_meta, 256, 1024, 32),
    partial(heat_head_triton._launch_meta, 96, 64),
    partial(heat_head_triton._launch_meta, 128, 128),
], ids=["shufflenetv2", "widest pooled", "heat map of shufflenetv2", "widest map"])
@pytest.mark.parametrize("dtype", [torch.float16, long(torch.bfloat16)])
def test_machine_code_of_wide_heads(launch, dtype):
    """No spill, and room on the smallest GPU."""
    assert_lean(machine_code_of(86, "", partial(launch, dtype=dtype)))


@pytest.mark.parametrize(
    ("side", "channels", "index"), [(8192, 16, "int32"), (16384, 8, "int64"), (8192, 64, "int64")]
)
def test_maps_beyond_two_to_the_31_have_long_indices(side, channels, index):
    """By the elements of one slot's map; slots themselves are always 64-bit."""
    launch = partial(conv_int_triton._launch_meta, channels, channels, 1, side)
    (variant,) = variants.record(86, "", launch)
    assert str(variant.constants["INDEX"]) == index


@pytest.mark.parametrize(("side", "index"), [(8192, "int32"), (16384, "int64")])
def test_ways_up_to_maps_beyond_two_to_the_31_have_long_indices(side, index):
    (variant,) = variants.record(86, "", partial(way_up_triton._launch_meta, 16, side))
    assert str(variant.constants["INDEX"]) == index


def table_of_results():
    path = os.path.join(os.path.dirname(__file__), "../../benchmarks/results/kernels_compiled.json")
    with open(path) as stream:
        return json.load(stream)


def test_the_table_of_results_lists_every_variant():
    table = table_of_results()
    rows = table["variants"]
    listed = {(row["arch"], row["kernel"], row["shape_class"]) for row in rows}
    wanted = {(f"sm_{arch}", v.name, v.shape_class): v.key for arch in machine_code.ARCHS for v in
              variants.variants(arch)}
    advice = "run python benchmarks/machine_code.py FILE"
    assert wanted.keys() == listed, advice
    for row in rows:
        assert_lean(row)
    if triton.__version__ == table["triton"]:
        # the key changes with the kernel's source
        assert set(wanted.values()) == {row["key"] for row in rows}, advice
