"""How fast gossip pulls replicas together, and when it throws them apart.

Second moments of the consensus error under the outer step of NoLoCo with uniformly
random groups: with x = phi - mean(phi), v = m - mean(m) and the means over replicas
A = E|x|^2, C = E<x, v>, D = E|v|^2, one round without gradients gives

    D' = alpha^2 D - 2 alpha gamma p C + gamma^2 p A
    C' = alpha C - gamma p A + D'
    A' = A + 2 (alpha C - gamma p A) + D'

where p = (n - 1) N / (n (N - 1)) for groups of n among N replicas: the expected
share of the disagreement that averaging within a group removes. Derived from
equations 1 to 3 of arXiv 2506.10911. The condition printed there (equation 74)
agrees with this one at alpha = 0.5 alone: at alpha = 0.9 every gamma that it
recommends diverges.

Nesterov's form moves x by alpha v' - gamma Q x, with v' = alpha v - gamma Q x and Q
the disagreement within the group (E Q = p, Q Q = Q), so that

    C' = alpha C - gamma p A + alpha^3 D - gamma p alpha (1 + 2 alpha) C
         + (1 + alpha) gamma^2 p A
    A' = A + alpha^4 D + (1 + alpha)^2 gamma^2 p A + 2 alpha^2 C
         - 2 (1 + alpha) gamma p A - 2 alpha^2 (1 + alpha) gamma p C
"""

import numpy as np


def mixing(axis_size: int, group_size: int = 2) -> float:
    """p: share of the disagreement that one averaging removes, in (0, 1]."""
    if axis_size < 2:
        return 1.0
    group_size = min(group_size, axis_size)
    return (group_size - 1) * axis_size / (group_size * (axis_size - 1))


def moment_matrix(
    momentum: float,
    gamma: float,
    axis_size: int,
    group_size: int = 2,
    *,
    nesterov: bool = False,
) -> np.ndarray:
    """float64[3, 3] that takes (A, C, D) to the next round's; see the module."""
    a, g, p = momentum, gamma, mixing(axis_size, group_size)
    d = np.array([g * g * p, -2 * a * g * p, a * a])
    if nesterov:
        c = [-g * p + (1 + a) * g * g * p, a - g * p * a * (1 + 2 * a), a**3]
        pull = (1 + a) * g
        first = [1 + p * (pull * pull - 2 * pull), 2 * a * a * (1 - pull * p), a**4]
        return np.stack([np.array(first), np.array(c), d])
    c = np.array([-g * p, a, 0.0]) + d
    return np.stack([np.array([1 - 2 * g * p, 2 * a, 0.0]) + d, c, d])


def contraction(
    momentum: float,
    gamma: float,
    axis_size: int,
    group_size: int = 2,
    *,
    nesterov: bool = False,
) -> float:
    """Factor of the replicas' variance over one round; above 1 it grows.

    The spectral radius of `moment_matrix`.

    Args:
        momentum: alpha of the outer step.
        gamma: strength of the gossip term.
        axis_size: number of replicas.
        group_size: replicas that average with each other in a round.
        nesterov: form of the momentum.
    """
    matrix = moment_matrix(momentum, gamma, axis_size, group_size, nesterov=nesterov)
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def gamma_max(
    momentum: float,
    axis_size: int,
    group_size: int = 2,
    *,
    nesterov: bool = False,
) -> float:
    """The gossip is stable in mean square for 0 < gamma < this.

    2 (1 - alpha^2) / (1 + alpha - 2 p alpha). Two replicas, or groups of all:
    2 (1 + alpha). Pairs among many: 2 (1 - alpha^2). The bound of Nesterov's
    form is found by bisection.

    Args:
        momentum: alpha of the outer step, in [0, 1).
        axis_size: number of replicas.
        group_size: replicas that average with each other in a round.
        nesterov: form of the momentum.
    """
    if not nesterov:
        p = mixing(axis_size, group_size)
        return 2 * (1 - momentum**2) / (1 + momentum - 2 * p * momentum)
    low, high = 0.0, 4.0
    while high - low > 1e-9:
        gamma = (low + high) / 2
        factor = contraction(momentum, gamma, axis_size, group_size, nesterov=True)
        low, high = (gamma, high) if factor < 1 else (low, gamma)
    return low


def stationary_variance(
    momentum: float,
    gamma: float,
    axis_size: int,
    group_size: int = 2,
    outer_lr: float = 0.7,
    *,
    nesterov: bool = False,
) -> float:
    """Replicas' variance that gossip settles at, per variance of an outer gradient.

    The fixed point of the moments when each round's outer gradients (theta - phi)
    differ between replicas by independent noise of variance 1.

    Args:
        momentum: alpha of the outer step.
        gamma: strength of the gossip term.
        axis_size: number of replicas.
        group_size: replicas that average with each other in a round.
        outer_lr: beta of the outer step.
        nesterov: form of the momentum.
    """
    noise = outer_lr**2 * (1 - mixing(axis_size, group_size)) * (1 - 1 / axis_size)
    matrix = moment_matrix(momentum, gamma, axis_size, group_size, nesterov=nesterov)
    reach = 1 + momentum if nesterov else 1.0  # how far a noise moves phi at once
    driven = noise * np.array([reach * reach, reach, 1.0])
    return float(np.linalg.solve(np.eye(3) - matrix, driven)[0])
