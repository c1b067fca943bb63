"""The fingerprint of a network is of all that a bound depends on, and of nothing else."""

import copy

import torch

from lben import EquilibriumLinear, Flatten, GroupSort, LipschitzSequential, Normalize, SLLLinear
from lben.layers.fingerprint import fingerprint
from solvers import Tanh


def network(seed=0):
    torch.manual_seed(seed)
    return nn_of(Normalize((0.5,), (0.5,)), Flatten(), SLLLinear(4, 3), EquilibriumLinear(4, 5, 2))


def nn_of(*layers):
    return LipschitzSequential(*layers)


def test_it_is_that_of_a_copy_and_of_the_same_numbers():
    net = network()
    own = fingerprint(net)
    assert fingerprint(copy.deepcopy(net)) == fingerprint(network()) == own
    other = network(1)
    assert fingerprint(other) != own
    other.load_state_dict(net.state_dict())
    assert fingerprint(other) == own


def test_how_equilibria_are_solved_is_no_part_of_it():
    net = network()
    own = fingerprint(net)
    net[3].tol, net[3].max_steps, net[3].on_failure = 1e-9, 7, "raise"
    net.eval()
    assert fingerprint(net) == own


def test_every_other_change_is_seen():
    seen = {fingerprint(network())}

    def by_activation(net):
        net[3].activation = Tanh()

    def by_weight(net):
        net[2].parameterization.b.data[0] += 1e-3

    def by_buffer(net):
        net[0].std *= 2

    def by_dtype(net):
        net.double()

    def by_order(net):
        net[0], net[1] = net[1], net[0]

    def by_another_map(net):
        net[1] = GroupSort(2)

    def by_its_setting(net):
        net[1] = GroupSort(3)

    changes = (
        by_activation, by_weight, by_buffer, by_dtype, by_order, by_another_map, by_its_setting
    )  # fmt: skip
    for change in changes:
        net = network()
        change(net)
        seen.add(fingerprint(net))
    assert len(seen) == 1 + len(changes)
