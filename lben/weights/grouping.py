"""Which blocks of a network belong together, so that groups of them form a chain?

Note [Frontiers]
After block k, later blocks and the outputs read only some of the states z₀ … z_k: the frontier. A
chain has one block in its frontier, a residual network with sums two. What is proved of a network
one block after the other costs the cube of the width of its frontiers, and never of all units.

Symbols: docs/glossary.md.
"""

from __future__ import annotations

from lben.weights.network import Network


def frontiers(network: Network) -> tuple[tuple[int, ...], ...]:
    """Return the blocks that are still read after each block; see Note [Frontiers].

    Args:
        network: with K blocks.

    Returns:
        K + 1 tuples of increasing numbers of blocks, 0 for the input: entry k has the blocks of
        z₀ … z_k that are read by a block after k, or by the outputs. Blocks on which no output
        depends read nothing.

    Example:
        >>> import numpy as np
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.grouping import frontiers
        >>> from lben.weights.network import AffineMap, Block, Network
        >>> one, zero = np.ones((2, 2)), np.zeros(2)
        >>> maps = ({0: one}, {0: one, 1: one}, {2: one})  # z₂ reads x and z₁
        >>> blocks = tuple(Block(affine=AffineMap.of(m, zero), activation=RELU) for m in maps)
        >>> output = AffineMap.of({3: one}, zero)
        >>> frontiers(Network(input_shape=(2,), blocks=blocks, output=output))
        ((0,), (0, 1), (2,), (3,))
    """
    found = [tuple(sorted(network.output.matrices))]
    for k in range(len(network.blocks), 0, -1):
        after = set(found[-1])
        if k in after:
            after = (after - {k}) | set(network.blocks[k - 1].affine.matrices)
        found.append(tuple(sorted(after)))
    return tuple(reversed(found))


def group_blocks(network: Network) -> tuple[range, ...]:
    """Return consecutive groups of blocks, each fed by the group before it and by itself alone.

    The first group is the input. Every other one ends at the last block that reads the group before
    it. The outputs count as a part of the last block, and they read the last two groups alone. So a
    matrix that couples each block with the blocks that it reads, and the blocks that feed one block
    with each other, is block tridiagonal in groups.

    Args:
        network: with K blocks.

    Returns:
        Ranges that cover the numbers 0 … K.

    Example:
        >>> import numpy as np
        >>> from lben.weights.activation import RELU
        >>> from lben.weights.grouping import group_blocks
        >>> from lben.weights.network import AffineMap, Block, Network
        >>> one, zero = np.ones((2, 2)), np.zeros(2)
        >>> maps = ({0: one}, {1: one}, {1: one, 2: one})  # z₃ reads z₁ and z₂
        >>> blocks = tuple(Block(affine=AffineMap.of(m, zero), activation=RELU) for m in maps)
        >>> output = AffineMap.of({3: one}, zero)
        >>> group_blocks(Network(input_shape=(2,), blocks=blocks, output=output))
        (range(0, 1), range(1, 2), range(2, 4))
    """
    count = len(network.blocks)
    last = list(range(count + 1))  # the last block that reads each block
    for k, affine in enumerate((*(block.affine for block in network.blocks), network.output)):
        for j in affine.matrices:
            last[j] = max(last[j], min(k + 1, count))
    groups = [range(1)]
    while groups[-1].stop <= count:
        start = groups[-1].stop
        groups.append(range(start, max(start, *(last[j] for j in groups[-1])) + 1))
    return tuple(groups)
