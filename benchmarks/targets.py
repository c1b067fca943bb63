"""For which devices are kernels compiled ahead of time, and what do these give to one block?"""

SHARED_MEMORY = {
    "sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376,
    "gfx942": 65_536,
}  # fmt: skip
"""Bytes of shared memory that one block may have."""

TENSOR_MEMORY = 512
"""Columns of tensor memory of a multiprocessor of sm_100."""
