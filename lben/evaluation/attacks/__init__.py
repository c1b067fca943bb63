"""How close can an adversary come to a claimed bound or radius?"""

from lben.evaluation.attacks.common import freeze
from lben.evaluation.attacks.projected import (
    across_the_boundary,
    apgd_l2,
    auto_attack,
    pgd_l2,
    pgd_linf,
)
from lben.evaluation.attacks.quotient import (
    Pairs,
    ascend_quotient,
    corner_pairs,
    quotients,
    random_pairs,
)

__all__ = [
    "Pairs",
    "across_the_boundary",
    "apgd_l2",
    "ascend_quotient",
    "auto_attack",
    "corner_pairs",
    "freeze",
    "pgd_l2",
    "pgd_linf",
    "quotients",
    "random_pairs",
]
