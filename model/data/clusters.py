"""What the rows that are no cluster centres tell of the rows that are. Free of torch.

Source: Jumper et al. (2021), Suppl. 1.2.7 and Table 1 (cluster_profile, cluster_deletion_mean).
"""

from __future__ import annotations

import numpy as np

from evoplan.model.data.alignment import GAP, N_TOKENS

_ROWS = 1024  # compared at a time: what a comparison needs besides its inputs does not grow with the depth


def nearest_centres(centres: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The centre closest to each row: int [n]; the first of those that are equally close.

    Close is to agree at many residues: neither gaps nor what is masked in a centre count, as in AlphaFold 2's
    Hamming distance.

    centres: [s, r], masked. tokens: [n, r].
    """
    agreement = np.zeros((len(tokens), len(centres)), dtype=np.float32)
    for token in range(GAP):
        agreement += (tokens == token).astype(np.float32) @ (centres == token).astype(np.float32).T
    nearest: np.ndarray = agreement.argmax(axis=1)
    return nearest


def summarise(
    centres: np.ndarray, centre_deletions: np.ndarray, tokens: np.ndarray, deletions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How often each token occurs in a cluster, and its mean number of deletions, position by position.

    A cluster is its centre, masked, and all rows that are closest to it, gaps included; so nothing of what is
    hidden in a centre is told but by its relatives.

    centres, centre_deletions: [s, r]. tokens, deletions: [n, r], the other rows; n may be 0.
    Returns float32 [s, r, 23], which sums to 1 over the tokens, and float32 [s, r].
    """
    s, r = centres.shape
    counts = np.zeros(s * r * N_TOKENS, dtype=np.float32)
    deleted = np.zeros((s, r), dtype=np.float32)
    members = np.zeros(s, dtype=np.float32)

    def add(cluster: np.ndarray, rows: np.ndarray, row_deletions: np.ndarray) -> None:
        positions = cluster[:, None] * r + np.arange(r)
        np.add.at(counts, (positions * N_TOKENS + rows).ravel(), np.float32(1.0))
        np.add.at(deleted, cluster, row_deletions.astype(np.float32))
        np.add.at(members, cluster, np.float32(1.0))

    add(np.arange(s), centres, centre_deletions)
    for start in range(0, len(tokens), _ROWS):
        some = slice(start, start + _ROWS)
        add(nearest_centres(centres, tokens[some]), tokens[some], deletions[some])
    return counts.reshape(s, r, N_TOKENS) / members[:, None, None], deleted / members[:, None]
