"""Which replica gets the n-th use of an expert when its replicas are to get unequal shares.

Here belongs the rule, in integers, so that the CPU, the GPU and the router's kernel choose alike.
Where the shares come from is ``split.py``.

The first replica takes its share of all uses, the second its share of the uses that the first left,
and so on; what a replica takes of m uses is ``floor(m * share + phase)``, the counting function of
a Sturmian word (Lothaire, Algebraic Combinatorics on Words, chapter 2): spread as evenly as
integers can be, and known for the n-th use without looking at those before. Rounding at one
replica changes what the later ones see by less than one use: hence the bound in
:func:`pick_replica`.

Shapes: E experts, X most replicas of one expert, n uses.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Fixed-point shares: as many bits as a float32 weight has. With uses below 2**31, products of the
# two stay far below 2**63.
SHARE_BITS = 24
ONE = 1 << SHARE_BITS


def to_shares(weights: Tensor) -> Tensor:
    """Weights of replicas as the shares that :func:`pick_replica` takes.

    Args:
        weights: [..., E, X] floating, not negative; 0 where there is no replica. Only their
            proportions within an expert count. NaN and negative ones count as 0.

    Returns:
        int32 [..., E, X]: replica x's share of what the replicas before it leave, in units of
        2**-24. The last replica with a weight has 2**24; an expert without any has it at 0.

    >>> to_shares(torch.tensor([[0.5, 0.25, 0.25, 0.0]])).tolist()
    [[8388608, 8388608, 16777216, 0]]
    """
    fixed = (weights.double().nan_to_num(0.0).clamp(0.0, 1.0) * ONE).round().long()
    rest = fixed.flip(-1).cumsum(-1).flip(-1)  # of this replica and all after it
    shares = (fixed * ONE + rest // 2) // rest.clamp(min=1)
    # No weight at all: everything goes to the first replica, which every expert has.
    shares[..., 0] = shares[..., 0].where(rest[..., 0] > 0, ONE)
    return shares.to(torch.int32)


def share_phase(offset: int) -> int:
    """Where a rank starts to count, in units of 2**-24, in [0, 2**24).

    One half for offset 0: rounding to nearest. Ranks 0 to R-1 with R a power of two get all
    multiples of 1/R (the van der Corput sequence): where one rounds up another rounds down.

    >>> [share_phase(rank) / ONE for rank in range(4)]
    [0.5, 0.0, 0.75, 0.25]
    """
    reverse = int(f"{offset % ONE:0{SHARE_BITS}b}"[::-1], 2)
    return (reverse + ONE // 2) % ONE


def pick_replica(nth: Tensor, shares: Tensor, *, phase: int) -> Tensor:
    """The replica that takes each use.

    For any n, of an expert's first n uses each of its k replicas gets its weight times n within
    (k - 1) / 2 with the phase of offset 0, within k - 1 with any other; and n k / 2**24 for
    rounding the weights.

    Args:
        nth: int64 [n], how many uses of its expert came before each.
        shares: int32 [n, X], :func:`to_shares` of its expert.
        phase: :func:`share_phase` of the rank.

    Returns:
        int64 [n] in [0, X).
    """
    picked = torch.zeros_like(nth)
    is_open = torch.ones_like(nth, dtype=torch.bool)
    for replica, share in enumerate(shares.long().unbind(1)):
        taken = (nth * share + phase) >> SHARE_BITS
        takes = ((nth + 1) * share + phase) >> SHARE_BITS > taken
        picked.masked_fill_(is_open & takes, replica)
        is_open &= ~takes
        nth = nth - taken
    return picked
