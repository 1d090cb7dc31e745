"""What the compiled kernels are made of: registers, shared memory, instructions per architecture.

    python benchmarks/machine_code.py benchmarks/results/kernels_compiled.json

compiles every variant for five architectures and writes the table. Rows that the file has under the
same key and the same assembler stay: source, options and triton have not changed since. The numbers
are read from the machine code by the disassembler that comes with triton; no GPU takes part, and
nothing here says how fast a kernel is.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from sass import instructions, issued

from meddanet.kernels.aot import compile_all
from meddanet.kernels.variants import Variant, variants

ARCHS = (80, 86, 89, 90, 120)
# the least that any supported GPU gives one program (sm_86, sm_89 and sm_120)
SHARED_LIMIT = 99 * 1024
# tensor cores, integer and half precision; global, shared and local memory; asynchronous copies
COUNTED = (
    "IMMA", "IGMMA", "HMMA", "HGMMA", "LDG", "STG", "LDS", "STS", "LDSM", "LDL", "STL", "LDGSTS",
)

# two per clock and multiprocessor on a GPU made for graphics, where float32 has 128
_SLOW = re.compile(
    r"\*/\s+(?:\{\s*)?(?:@!?\w+\s+)?(?:D(?:ADD|MUL|FMA|SETP|MNMX|MMA)\b"
    r"|(?:F2F|I2F|F2I|FRND)\.(?:\w+\.)*[FSU]64\b|MUFU\.\w*64H\b)"
)
_RESOURCE = re.compile(r"\b(REG|STACK|LOCAL):(\d+)")


def cuobjdump(option: str, cubin: str) -> str:
    """Returns what the disassembler that comes with triton prints of a compiled kernel."""
    from triton import knobs

    command = [knobs.nvidia.cuobjdump.path, option, cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def describe(variant: Variant, compiled: Any) -> dict[str, Any]:
    """Returns one row of the table.

    "registers" are per thread; "stack_bytes" and "local_bytes" per thread are 0 where nothing is
    spilled, and so are the counts of LDL and STL; "shared_bytes" per program. "in_64_bits" counts
    float64 arithmetic and conversions from or to 64 bits. "issued" is what a warp issues on the
    shortest way through (`sass.issued`), of a convolution for a slot of 8 bits and over all of K.
    "key" is the JIT's: it changes with the kernel, the options and triton.
    """
    cubin = compiled.metadata_group[f"{variant.name}.cubin"]
    resources = {
        name: int(value) for name, value in _RESOURCE.findall(cuobjdump("-res-usage", cubin))
    }
    code = cuobjdump("-sass", cubin)
    sizes = variant.constants
    steps, products = 1, None
    if "PART_M" in sizes:
        steps = -(-sizes["K"] // sizes["BLOCK_K"])
    if "PART_M" in sizes and sizes["NARROW"]:
        # a tile, whose parts are for other slots
        products = sizes["BLOCK_M"] * sizes["BLOCK_N"] * steps * sizes["BLOCK_K"]
        products //= compiled.metadata.num_warps
    counts = Counter(instruction.name for instruction in instructions(code))
    return {
        "kernel": variant.name,
        "shape_class": variant.shape_class,
        "arch": f"sm_{variant.arch}",
        "num_warps": compiled.metadata.num_warps,
        "num_stages": compiled.metadata.num_stages,
        "constants": {name: str(value) for name, value in variant.constants.items()},
        "registers": resources["REG"],
        "stack_bytes": resources["STACK"],
        "local_bytes": resources["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "instructions": counts.total(),
        "issued": issued(code, steps, products),
        "in_64_bits": len(_SLOW.findall(code)),
        "of_these": {name: counts[name] for name in COUNTED if counts[name]},
        "key": variant.key,
    }


def spills(row: dict[str, Any]) -> bool:
    """Tells whether a row's kernel keeps anything in local memory."""
    return bool(row["local_bytes"] or {"LDL", "STL"} & row["of_these"].keys())


def rows(arch: int, known: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Describes everything for an architecture; compiles what no known row, by key, describes."""
    listed = variants(arch)
    found = dict(known)

    def describe_one(variant: Variant, compiled: Any) -> None:
        found[variant.key] = describe(variant, compiled)

    compile_all([variant for variant in listed if variant.key not in known], describe_one)
    return [found[variant.key] | {"shape_class": variant.shape_class} for variant in listed]


def _head() -> dict[str, Any]:
    from triton import __version__, knobs

    return {
        "command": "python benchmarks/machine_code.py",
        # goes up with what `describe` tells, so that no row of before is kept
        "format": 2,
        "triton": __version__,
        "ptxas": knobs.nvidia.ptxas.version,
        "ptxas_blackwell": knobs.nvidia.ptxas_blackwell.version,
    }


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of a table by their keys, none if other tools wrote it."""
    if not path.exists():
        return {}
    table = json.loads(path.read_text())
    kept = table.pop("variants")
    return {row["key"]: row for row in kept} if table == _head() else {}


def write(path: Path, found: list[dict[str, Any]]) -> None:
    """Writes the table, a line per kernel."""
    lines = ",\n  ".join(json.dumps(row) for row in found)
    start = json.dumps(_head(), indent=1).removesuffix("\n}")
    path.write_text(f'{start},\n "variants": [\n  {lines}\n ]\n}}\n')


def main(path: str) -> int:
    """Writes the table; returns 1 if a kernel spills or takes too much memory."""
    known = read(Path(path))
    found: list[dict[str, Any]] = []
    for arch in ARCHS:
        found += rows(arch, known)
        print(f"sm_{arch}: {len(found)} described so far", flush=True)
    write(Path(path), found)
    bad = [row for row in found if spills(row) or row["shared_bytes"] > SHARED_LIMIT]
    for row in bad:
        print(f"{row['arch']} {row['kernel']} ({row['shape_class']}): spills or shared memory")
    fresh = sum(row["key"] not in known for row in found)
    print(f"{len(found)} kernels, {fresh} of them compiled now, {len(bad)} bad: {path}")
    return 1 if bad else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/machine_code.py FILE.json")
    sys.exit(main(sys.argv[1]))
