"""Frontiers and groups of blocks: what is still read after a block, and who feeds whom."""

import numpy as np
import pytest

from lben.weights.activation import RELU
from lben.weights.grouping import frontiers, group_blocks
from lben.weights.network import AffineMap, Block, Network


def network(reads: list[tuple[int, ...]], output: tuple[int, ...]) -> Network:
    one, zero = np.ones((1, 1)), np.zeros(1)
    return Network(
        input_shape=(1,),
        blocks=tuple(
            Block(affine=AffineMap.of(dict.fromkeys(r, one), zero), activation=RELU) for r in reads
        ),
        output=AffineMap.of(dict.fromkeys(output, one), zero),
    )


NETWORKS = {
    "chain": network([(0,), (1,), (2,), (3,)], (4,)),
    "residual": network([(0,), (1,), (1, 2), (3,), (3, 4), (5,), (5, 6)], (7,)),
    "dense": network([(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)], (0, 1, 2, 3, 4)),
    "branches": network([(0,), (0,), (1, 2), (3,)], (4,)),
    "an output that reads an early block": network([(0,), (1,), (2,), (3,)], (2, 4)),
    "a block that nothing reads": network([(0,), (1,), (1,), (3,)], (4,)),
    "no blocks": network([], (0,)),
    "constant": network([(0,)], ()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_frontier_has_what_is_read_later(name):
    net = NETWORKS[name]
    found = frontiers(net)
    assert len(found) == len(net.blocks) + 1
    for k, own in enumerate(net.blocks, 1):
        assert max(found[k], default=0) <= k
        assert set(found[k]) - {k} <= set(found[k - 1])
        if k in found[k]:
            assert set(own.affine.matrices) <= set(found[k - 1])
    assert set(net.output.matrices) == set(found[-1])


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_form_a_chain(name):
    net = NETWORKS[name]
    groups = group_blocks(net)
    assert [k for group in groups for k in group] == list(range(len(net.blocks) + 1))
    place = {k: i for i, group in enumerate(groups) for k in group}
    for k, own in enumerate(net.blocks, 1):
        assert all(place[k] - 1 <= place[j] <= place[k] for j in own.affine.matrices)
    assert all(place[j] >= len(groups) - 2 for j in net.output.matrices)


def test_chains_and_residual_networks_have_narrow_groups():
    assert max(map(len, group_blocks(NETWORKS["chain"]))) == 1
    assert max(map(len, group_blocks(NETWORKS["residual"]))) == 2
    assert max(map(len, frontiers(NETWORKS["residual"]))) == 2
    assert group_blocks(NETWORKS["dense"]) == (range(1), range(1, 5))


def test_blocks_without_influence_are_in_no_frontier():
    assert all(2 not in blocks for blocks in frontiers(NETWORKS["a block that nothing reads"]))
    assert frontiers(NETWORKS["constant"]) == ((), ())
