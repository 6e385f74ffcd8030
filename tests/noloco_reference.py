"""NoLoCo by its equations, in float64 NumPy loops; shared by several tests."""

import numpy as np


def groups_of(partner_sn):
    """Replicas that average with each other in a round, from the stages' partners."""
    partner_sn = np.atleast_2d(partner_sn)
    groups = [{i} for i in range(partner_sn.shape[1])]
    for partner_n in partner_sn:
        groups = [groups[i] | groups[j] for i, j in enumerate(partner_n)]
    return [sorted(group) for group in groups]


def outer_round(
    theta_nd, phi_nd, m_nd, groups, *, alpha, beta, gamma, nesterov=False, weight=None
):
    """Equations 1 to 3 of arXiv 2506.10911 (appendix signs): new phi and m.

    `groups[i]` are the replicas that i averages with, itself among them.
    """
    phi, m = np.array(phi_nd, np.float64), np.array(m_nd, np.float64)
    weight = np.ones(len(phi)) if weight is None else np.asarray(weight, np.float64)
    for i, group in enumerate(groups):
        share = weight[group] / weight[group].sum()
        delta = sum(
            s * (theta_nd[j] - phi_nd[j]) for s, j in zip(share, group, strict=True)
        )
        apart = phi_nd[i] - sum(
            s * phi_nd[j] for s, j in zip(share, group, strict=True)
        )
        drive = beta * delta - gamma * apart
        m[i] = alpha * m_nd[i] + drive
        phi[i] = phi_nd[i] + (alpha * m[i] + drive if nesterov else m[i])
    return phi, m
