"""torch.utils.checkpoint as people place it by hand."""

from __future__ import annotations

from math import isqrt

from torch import nn

from evoplan.experiments.peers.by_hand import ByHand, again, as_is
from evoplan.experiments.peers.registry import Apply, Peer, Setting, register

CHECKPOINT = "torch.utils.checkpoint (use_reentrant=False)"
OPENFOLD = "OpenFold (Ahdritz et al. 2022): blocks_per_ckpt, chunk_size"
PIECES = (2, 4, 8, 16)


def _placed(
    segments: tuple[int, ...] = (), block: bool = False, submodule: bool = False, pieces: int = 1
) -> Apply:
    def apply(setting: Setting, budget: float | None) -> nn.Module:
        return ByHand(
            setting.stack,
            around_block=again if block else as_is,
            around_step=again if submodule else as_is,
            segments=segments,
            pieces=pieces,
        )

    return apply


def _square_root(setting: Setting, budget: float | None) -> nn.Module:
    return ByHand(setting.stack, segments=(max(1, isqrt(setting.blocks)),))


def _square_root_nested(setting: Setting, budget: float | None) -> nn.Module:
    return ByHand(setting.stack, around_block=again, segments=(max(1, isqrt(setting.blocks)),))


def _openfold(blocks: int, pieces: int, setting: Setting) -> ByHand:
    return ByHand(setting.stack, segments=(blocks,), pieces=pieces, pieces_again=False)


def _openfold_tuned(setting: Setting, budget: float | None) -> nn.Module:
    tried = [_openfold(1, pieces, setting) for pieces in PIECES]
    return min(tried, key=setting.peak_of)


def _plain(setting: Setting, budget: float | None) -> nn.Module:
    return setting.stack


def _hand(name: str, about: str, apply: Apply, source: str = CHECKPOINT) -> Peer:
    return Peer(name, about, source, "hand", apply)


register(
    _hand("plain", "nothing recomputed, nothing cut", _plain, "PyTorch"),
    _hand("submodule", "a checkpoint around every submodule", _placed(submodule=True)),
    _hand("block", "a checkpoint around every block", _placed(block=True)),
    _hand(
        "sqrt", "a checkpoint around every square root of n blocks", _square_root,
        "Chen et al. (2016), Training Deep Nets with Sublinear Memory Cost",
    ),
    _hand(
        "sqrt>block", "the same, and each block in them once more", _square_root_nested,
        "Chen et al. (2016), Training Deep Nets with Sublinear Memory Cost",
    ),
    _hand("block>submodule", "both, one within the other", _placed(block=True, submodule=True)),
    _hand("pair>block>submodule", "and pairs of blocks around them",
          _placed((2,), block=True, submodule=True)),
    _hand("submodule+4", "every submodule in 4 chunks, a checkpoint around each",
          _placed(submodule=True, pieces=4)),
    _hand("block>submodule+4", "block, submodule and each of 4 chunks",
          _placed(block=True, submodule=True, pieces=4)),
    _hand("pair>block>submodule+8", "pair of blocks, block, submodule and each of 8 chunks",
          _placed((2,), block=True, submodule=True, pieces=8)),
    _hand("openfold", "a checkpoint around every block; all modules in 4 chunks",
          lambda setting, _: _openfold(1, 4, setting), OPENFOLD),
    _hand("openfold-tuned", "the same in the chunks, of 2 to 16, of the least peak", _openfold_tuned,
          OPENFOLD),
)  # fmt: skip
