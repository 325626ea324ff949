"""What a compiled kernel takes of a GPU, read from the binary without one."""

import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Resources:
    """Registers and local memory of a thread; shared memory of a block, what is reserved at launch left out."""

    registers: int
    spill_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor."""

    registers: int
    register_step: int  # registers of a warp are handed out in these
    warps: int
    blocks: int
    shared_bytes: int
    block_shared_bytes: int  # the most that one block may have
    reserved_bytes: int  # of each block


CHIPS = {
    "sm_80": Chip(65536, 256, 64, 32, 167936, 166912, 1024),
    "sm_90": Chip(65536, 256, 64, 32, 233472, 232448, 1024),
    "gfx942": Chip(4 * 512 * 64, 512, 32, 32, 65536, 65536, 0),  # 4 SIMDs of 512 registers a lane, 8 wavefronts each
}


def resources(cubin: bytes) -> Resources:
    """Resources of an NVIDIA binary by cuobjdump. Any local memory counts as spilled, arrays of its own too."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", text)}
    if "REG" not in found:
        raise ValueError(f"cuobjdump told no resources: {text!r}")
    return Resources(found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"])


def amd_resources(assembly: str) -> Resources:
    """Resources of an AMD kernel by the metadata of its assembly."""

    def read(name: str) -> int:
        return max((int(x) for x in re.findall(rf"\.{name}:\s+(\d+)", assembly)), default=0)

    return Resources(read("vgpr_count"), read("private_segment_fixed_size"), read("group_segment_fixed_size"))


def occupancy(target: str, registers: int, shared_bytes: int, warps: int) -> float:
    """Share of a multiprocessor's warps that can be resident; 0 if a block does not fit."""
    chip = CHIPS[target]
    if shared_bytes > chip.block_shared_bytes:
        return 0.0
    lanes = 64 if target.startswith("gfx") else 32
    of_a_warp = math.ceil(max(registers, 1) * lanes / chip.register_step) * chip.register_step
    by_shared = chip.shared_bytes // (shared_bytes + chip.reserved_bytes) if shared_bytes else chip.blocks
    blocks = min(chip.registers // of_a_warp // warps, chip.warps // warps, chip.blocks, by_shared)
    return blocks * warps / chip.warps


def cuobjdump() -> str:
    """Path of the tool, which Triton's wheel brings.

    Raises:
        FileNotFoundError: neither Triton nor the nvidia wheels bring it.
    """
    try:
        from triton import knobs

        return knobs.nvidia.cuobjdump.path
    except (ImportError, RuntimeError):
        import nvidia

    for root in nvidia.__path__:
        for path in Path(root).rglob("bin/cuobjdump"):
            return str(path)
    raise FileNotFoundError("cuobjdump was not found: install triton or nvidia-cuda-cuobjdump")
