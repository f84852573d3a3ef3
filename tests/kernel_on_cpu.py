"""The warp kernel as Triton compiles it for an H100, run on a CPU: its LLVM IR, made into machine code of this machine instead.

Triton's interpreter shows that the kernel's text is right; this shows what Triton made of it: which thread makes what, the masks,
the packed stores. A call is one thread of one program. What is of a GPU is put into words that any CPU knows: the numbers of thread
and program become arguments, the assembler of loads and stores becomes loads and stores; llvmlite, which numba brings, compiles it.
`Unreadable` says that a Triton other than WRITTEN_FOR writes otherwise.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import struct
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm

WRITTEN_FOR = "3.8."  # Triton's version
POINTERS, NUMBERS = 7, ("tid.x", "ctaid.x", "ctaid.y", "ctaid.z", "nctaid.x")
_LOAD = re.compile(
    r'(%\w+) = tail call (i\d+) asm sideeffect "mov\.u\d+ \$0, 0x0;\\0A\\09(@\$\d )?ld\.global\.b(\d+) '
    r'\{ \$0 \}, \[ \$1 \+ 0 \];", "[^"]*"\(([^)]*)\)'
)
_STORE = re.compile(
    r'tail call void asm sideeffect "@\$\d st\.global\.(?:v\d\.)?b(\d+) \[ \$\d \+ 0 \], \{[^}]*\};", "[^"]*"\(([^)]*)\)'
)
_engines: list[object] = []  # machine code lives for as long as what made it


class Unreadable(Exception):
    """This Triton's LLVM IR is not what this module was written for."""


def features() -> dict[str, bool]:
    """What this machine's CPU can do, in LLVM's names. It must have instructions for the format that the kernel writes."""
    return dict(llvm.get_host_cpu_features())


class Compiled:
    """Takes the kernel's place: `Compiled(variants)[grid](*arguments)` runs every thread.

    variants: LLVM IR by whether it recolours, for resolutions that are multiples of 16.
    """

    def __init__(self, variants: dict[bool, str]) -> None:
        """Raises Unreadable."""
        self._variants = {variant: native(ir) for variant, ir in variants.items()}

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int) -> None:
            *tensors, resolution, recolour, whole = arguments
            assert whole
            assert resolution % 16 == 0
            addresses = [tensor.data_ptr() for tensor in tensors]
            for numbers in itertools.product(range(32 * num_warps), *map(range, grid)):
                self._variants[recolour](*addresses, resolution, *numbers, grid[0])

        return launch


def native(ir: str) -> Callable[..., None]:
    """A function of the kernel's arguments (POINTERS addresses, the resolution), then of NUMBERS."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    try:
        module = llvm.parse_assembly(_for_any_cpu(ir))
        module.verify()
    except RuntimeError as error:
        raise Unreadable(str(error)) from error
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten())
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    # Behind its own arguments Triton has two pointers for memory that this kernel does not use.
    types = [ctypes.c_void_p] * POINTERS + [ctypes.c_int32] + [ctypes.c_void_p] * 2 + [ctypes.c_int32] * len(NUMBERS)
    function = ctypes.CFUNCTYPE(None, *types)(engine.get_function_address("_warp_kernel"))
    return lambda *arguments: function(*arguments[: POINTERS + 1], None, None, *arguments[POINTERS + 1 :])


def _for_any_cpu(ir: str) -> str:
    ir = ir[: ir.index("attributes #0")]
    ir = re.sub(r"^(source_filename|target|declare .*nvvm).*$", "", ir, flags=re.MULTILINE)
    ir = re.sub(r",? ![\w.]+ !\d+", "", ir)  # metadata
    ir = re.sub(r" #\d+(?=\s|$)", "", ir, flags=re.MULTILINE)  # attributes
    ir = ir.replace("ptr addrspace(1)", "ptr").replace("ptx_kernel ", "").replace(" readnone captures(none)", "")
    # Newer LLVM writes a float's own bits; all LLVM reads those of the double of the same value.
    ir = re.sub(r"\bf0x([0-9A-F]{8})\b", lambda bits: _as_double(int(bits[1], 16)), ir)
    names = [number.replace(".", "_") for number in NUMBERS]
    for number, name in zip(NUMBERS, names, strict=True):
        ir = re.sub(rf"= tail call i32 @llvm\.nvvm\.read\.ptx\.sreg\.{re.escape(number)}\(\)", f"= add i32 %{name}, 0", ir)
    added = "".join(f", i32 %{name}" for name in names)
    ir = re.sub(r"(define void @_warp_kernel\([^)]*)\)", rf"\1{added})", ir)
    serial = itertools.count()
    ir = _LOAD.sub(lambda found: _load(found, next(serial)), ir)
    ir = _STORE.sub(lambda found: _store(found, next(serial)), ir)
    if "asm sideeffect" in ir:
        raise Unreadable(re.findall(r".*asm sideeffect.*", ir)[0])
    # Where a masked load reads, and a masked store writes.
    return f"@nothing = internal global [16 x i8] zeroinitializer\n@nowhere = internal global [64 x i8] zeroinitializer\n{ir}"


def _as_double(bits: int) -> str:
    value = struct.unpack("<f", struct.pack("<I", bits))[0]
    return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"


def _load(found: re.Match[str], serial: int) -> str:
    result, kind, masked, bits, arguments = found.groups()
    pointer, *mask = (argument.split()[-1] for argument in arguments.split(","))
    lines = []
    if masked:
        lines.append(f"%from{serial} = select i1 {mask[0]}, ptr {pointer}, ptr @nothing")
        pointer = f"%from{serial}"
    if kind == f"i{bits}":
        lines.append(f"{result} = load {kind}, ptr {pointer}, align 1")
    else:
        lines.append(f"%narrow{serial} = load i{bits}, ptr {pointer}, align 1")
        lines.append(f"{result} = zext i{bits} %narrow{serial} to {kind}")
    return "\n  ".join(lines)


def _store(found: re.Match[str], serial: int) -> str:
    bits, arguments = found.groups()
    *values, pointer, mask = (argument.strip() for argument in arguments.split(","))
    lines = [f"%to{serial} = select i1 {mask.split()[-1]}, ptr {pointer.split()[-1]}, ptr @nowhere"]
    for number, value in enumerate(values):
        lines.append(f"%to{serial}part{number} = getelementptr i8, ptr %to{serial}, i64 {number * int(bits) // 8}")
        lines.append(f"store {value}, ptr %to{serial}part{number}, align 1")
    return "\n  ".join(lines)
