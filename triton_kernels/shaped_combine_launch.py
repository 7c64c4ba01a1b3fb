"""What the launchers share: tiles, chunks, the table of packed sequences, strides, the interpreter's bfloat16."""

import torch
import triton

PROGRAMS = 512  # fills the largest GPU; a constant, so that no result depends on the card
INTERPRETED = triton.knobs.runtime.interpret  # @triton.jit looks at it at the same moment, the import
FURTHEST = 1 << 29  # beyond every position, and four times it still fits 32 bits with its sign


def small(x: torch.Tensor) -> bool:
    """Whether ``x`` is on a card whose programs have less shared memory than an A100's (consumer cards: 99 KiB)."""
    if x.device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin < 163 << 10


def interpretable(*outputs: str):
    """The interpreter computes bfloat16 wrongly: there, and only there, a launcher's tensors are widened to float32."""

    def decorate(launcher):
        if not INTERPRETED:
            return launcher
        names = launcher.__code__.co_varnames[: launcher.__code__.co_argcount]

        def launch(*args, **kwargs):
            given = dict(zip(names, args, strict=False)) | kwargs
            tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
            narrow = {name: x for name, x in tensors.items() if x.dtype == torch.bfloat16}
            wide = {name: x.float() for name, x in narrow.items()}
            result = launcher(**given | wide)
            for name in narrow.keys() & set(outputs):
                narrow[name].copy_(wide[name])
            return result

        return launch

    return decorate


def named(name: str, x: torch.Tensor | None) -> dict[str, int]:
    """The strides of ``x`` under the names its kernels give them."""
    strides = (0, 0, 0, 0) if x is None else x.stride()
    return {f"{name}_{axis}": stride for axis, stride in zip("bhtd", strides, strict=True)}


def sweep_tile(width: int, dtype: torch.dtype, windowed: bool) -> dict:
    """Columns, rows and warps of a sweep's tile: as many rows as leave every thread its registers."""
    block = max(16, triton.next_power_of_2(width))
    if windowed or block == 256:  # a window's 0/1 products take float32 operands, on the ordinary cores
        rows = 16
    elif width % 8:  # its rows are loaded element by element
        rows = max(16, min(32, 2048 // block))
    else:
        rows = 64 if block <= 64 and dtype != torch.float32 else 32
    # Numbers of a tile that a warp's registers take without spilling; a window's second tile halves them, and so does
    # what every column costs beside its numbers where there are 16 or fewer.
    each = 512 >> (windowed + (block == 16))
    warps = min(8, max(1, rows * block // each))
    return {"BLOCK": block, "BLOCK_T": rows, "num_warps": warps, "num_stages": 2}


def chunk_rows(rows: int, heads: int, block: int) -> int:
    """Rows a program sweeps: all where the heads alone fill a GPU, else a power of two of at least four tiles."""
    wanted = triton.cdiv(rows, max(1, PROGRAMS // max(1, heads)))
    return max(4 * block, triton.next_power_of_2(max(1, wanted)))


def chunk_table(cu_seqlens: torch.Tensor, rows: int, chunk: int) -> torch.Tensor:
    """int32 [programs, 2]: sequence and chunk of each program, on the device, without reading a length back.

    Lengths stay unknown to the host, so there are as many programs as any lengths could need; −1 marks the spare ones.
    """
    chunks = (cu_seqlens.diff() + (chunk - 1)) // chunk
    ends = chunks.cumsum(0)
    index = torch.arange(rows // chunk + len(chunks), device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, index, right=True)
    spare = sequence == len(chunks)
    sequence = sequence.clamp(max=len(chunks) - 1)
    chunk_of_sequence = index - (ends - chunks)[sequence]
    return torch.stack([sequence.masked_fill(spare, -1), chunk_of_sequence], 1).int()


class Mask:
    """The mask arguments of an operator as its kernels take them."""

    def __init__(self, causal, window, query_start, key_lengths, cu_seqlens):
        self.window = min(window or 0, FURTHEST)
        self.tensors = {"BOUNDS": cu_seqlens, "START": query_start, "LENGTHS": key_lengths}
        self.flags = {"CAUSAL": causal, "WINDOWED": window is not None, "PACKED": cu_seqlens is not None}
        self.tensors = {name: None if x is None else x.contiguous() for name, x in self.tensors.items()}

    def split(self, batch: int, rows: int, chunk: int) -> tuple[int, torch.Tensor | None, int]:
        """Programs along ``rows``, their table if sequences are packed, and chunks of a sequence."""
        bounds = self.tensors["BOUNDS"]
        if bounds is None:
            chunks = triton.cdiv(rows, chunk)
            return batch * chunks, None, chunks
        table = chunk_table(bounds, rows, chunk)
        return len(table), table, 1
