"""Masking, embedding, head and loss, and a few training steps around a tiny stack."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evoplan.model import EvoformerConfig, EvoformerStack, TrunkConfig
from evoplan.model.build import build_model
from evoplan.model.data.alignment import GAP, MASK, N_TOKENS, UNKNOWN, read_alignment
from evoplan.model.data.batch import extra_rows, mask_msa, random_alignment
from evoplan.model.data.clusters import nearest_centres, summarise
from evoplan.model.programs.masked_msa import MaskedMSAModel
from tests.conftest import TINY, TINY_EXTRA, randomise

UBIQUITIN = Path(__file__).parents[1] / "experiments/data/ubiquitin.a3m"
CONFIG = TINY.with_dropout(0.0)


def tiny_model(config: EvoformerConfig = CONFIG, seed: int = 0) -> MaskedMSAModel:
    torch.manual_seed(seed)
    return MaskedMSAModel(config, EvoformerStack(config))


def tiny_batch(n_seq: int = 6, n_res: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    a = random_alignment(n_seq, n_res, seed)
    return mask_msa(a.tokens, a.deletions, seed)


TINY_TRUNK = TrunkConfig(replace(TINY_EXTRA, c_m=7), CONFIG).with_dropout(0.0)
MODELS = {"main": CONFIG, "extra": TINY_EXTRA.with_dropout(0.0), "trunk": TINY_TRUNK}


def model_and_batch(name: str) -> tuple[MaskedMSAModel, dict[str, torch.Tensor]]:
    """In float64, 5 of 14 rows masked; the batch as `planner.runs.data` makes it, its masks with holes."""
    torch.manual_seed(0)
    config, a = MODELS[name], random_alignment(14, 7, 3)
    a.deletions[:] = np.random.default_rng(0).integers(0, 4, a.deletions.shape)
    model = randomise(MaskedMSAModel(config, build_model(config)).double())
    batch = mask_msa(
        a.tokens[:5], a.deletions[:5], 1, (a.tokens[5:], a.deletions[5:]), clusters=name != "extra"
    )
    if name == "trunk":
        batch |= extra_rows(a.tokens[8:], a.deletions[8:])
    for mask in config.masks:
        batch[mask] = (torch.rand(batch[mask].shape) > 0.2).float()
    return model, batch


def test_batch_has_the_documented_shapes() -> None:
    batch = tiny_batch(6, 9)
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "tokens_in": ((1, 6, 9), torch.int64),
        "targets": ((1, 6, 9), torch.int64),
        "is_masked": ((1, 6, 9), torch.bool),
        "deletions": ((1, 6, 9), torch.int32),
        "msa_mask": ((1, 6, 9), torch.float32),
        "pair_mask": ((1, 9, 9), torch.float32),
        "profile": ((1, 6, 9, N_TOKENS + 1), torch.float32),
    }
    assert batch["msa_mask"].all()
    assert batch["pair_mask"].all()


def test_masking_shares() -> None:
    # In columns of gaps, a draw from the profile looks unchanged, and only a random amino acid is a residue.
    tokens = torch.full((500, 800), GAP)
    batch = mask_msa(tokens, torch.zeros_like(tokens), seed=1)
    masked, now = batch["is_masked"][0], batch["tokens_in"][0]
    assert masked.float().mean().item() == pytest.approx(0.15, abs=0.003)
    assert torch.equal(now[~masked], tokens[~masked])
    assert torch.equal(batch["targets"][0], tokens)
    counts = torch.bincount(now[masked], minlength=N_TOKENS)
    shares = counts / counts.sum()
    assert shares[MASK].item() == pytest.approx(0.7, abs=0.01)
    assert shares[GAP].item() == pytest.approx(0.2, abs=0.01)
    assert shares[UNKNOWN].item() == 0.0
    torch.testing.assert_close(shares[:20], torch.full((20,), 0.005), atol=0.0015, rtol=0)


def test_profile_draws_follow_the_column() -> None:
    # One row in four has W, the others Y, in the first half of the columns; no row has either in the second.
    tokens = torch.zeros(2000, 200, dtype=torch.long)
    tokens[:, :100] = 19
    tokens[::4, :100] = 18
    batch = mask_msa(tokens, torch.zeros_like(tokens), seed=2)
    masked, now = batch["is_masked"][0], batch["tokens_in"][0]
    by_chance = 0.1 / 20
    from_w = now[masked & (tokens == 18)]
    assert (from_w == 19).float().mean().item() == pytest.approx(0.1 * 3 / 4 + by_chance, abs=0.015)
    elsewhere = now[masked & (tokens == 0)]
    assert (elsewhere == 19).float().mean().item() == pytest.approx(by_chance, abs=0.002)


def test_masking_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = tiny_batch(seed=0), tiny_batch(seed=0), tiny_batch(seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tokens_in"], other["tokens_in"])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("tokens", "deletions", "says"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), "must both be"),
        (torch.zeros(3), torch.zeros(3), "must both be"),
        (torch.zeros(0, 3), torch.zeros(0, 3), "must both be"),
        (torch.full((2, 3), MASK), torch.zeros(2, 3), "tokens must be from 0 to 21"),
        (torch.full((2, 3), -1), torch.zeros(2, 3), "tokens must be from 0 to 21"),
    ],
)
def test_masking_refuses(tokens, deletions, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        mask_msa(tokens, deletions, seed=0)


def test_random_alignment() -> None:
    a, again = random_alignment(50, 200, 3), random_alignment(50, 200, 3)
    assert (a.n_seq, a.n_res, len(a.names)) == (50, 200, 50)
    assert (a.tokens == again.tokens).all()
    assert (a.deletions == again.deletions).all()
    assert (a.tokens[0] < 20).all()
    assert a.deletions[0].max() == 0
    assert a.tokens.max() == GAP
    assert a.deletions.max() == 3
    same = (a.tokens[1:] == a.tokens[0]).mean(axis=1)
    assert same.min() > 0.25
    assert same.max() < 0.95
    assert random_alignment(1, 1, 0).tokens.shape == (1, 1)
    with pytest.raises(ValueError, match="n_seq must be"):
        random_alignment(0, 4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shapes_and_dtype(dtype: torch.dtype) -> None:
    model, batch = tiny_model().to(dtype), tiny_batch(6, 9)
    m, z = model.embed(batch)
    assert (m.shape, z.shape) == ((1, 6, 9, CONFIG.c_m), (1, 9, 9, CONFIG.c_z))
    assert m.dtype == z.dtype == model.head(m).dtype == dtype
    assert model.head(m).shape == (1, 6, 9, N_TOKENS)
    loss = model(batch)
    assert loss.shape == ()
    assert loss.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    loss.backward()


def test_embedding_equals_linear_layers_on_one_hot_vectors() -> None:
    model, batch = randomise(tiny_model().double()), tiny_batch(5, 40)
    batch["deletions"][0, 1, 2] = 6
    m, z = model.embed(batch)

    def linear(embedding: torch.nn.Embedding, token: int) -> torch.Tensor:
        one_hot = torch.zeros(embedding.num_embeddings, dtype=torch.float64)
        one_hot[token] = 1.0
        return one_hot @ embedding.weight

    s, i, j = 1, 2, 39
    query = batch["targets"][0, 0]
    has, value = 1.0, 2 / math.pi * math.atan(6 / 3)
    expected = linear(model.msa_embedding, batch["tokens_in"][0, s, i])
    expected = expected + model.deletion_embedding(torch.tensor([has, value], dtype=torch.float64))
    expected = expected + linear(model.query_embedding, query[i])
    expected = expected + model.profile_embedding(batch["profile"][0, s, i].double())
    torch.testing.assert_close(m[0, s, i], expected, atol=1e-6, rtol=0)  # features are made in float32

    for a, b, offset in ((i, j, -32), (j, i, 32), (i, i + 5, -5), (i, i, 0)):
        pair = linear(model.left_embedding, query[a]) + linear(model.right_embedding, query[b])
        pair = pair + linear(model.offset_embedding, offset + 32)
        torch.testing.assert_close(z[0, a, b], pair)


def test_a_trunk_embeds_e_from_rows_that_are_not_masked() -> None:
    model, batch = model_and_batch("trunk")
    e, m, z = model.embed(batch)
    assert [tuple(t.shape) for t in (e, m, z)] == [(1, 6, 7, 7), (1, 5, 7, CONFIG.c_m), (1, 7, 7, CONFIG.c_z)]
    count = batch["extra_deletions"][0, 2, 3].item()
    features = torch.tensor([min(count, 1), 2 / math.pi * math.atan(count / 3)], dtype=torch.float64)
    expected = model.extra_embedding.weight[batch["extra_tokens"][0, 2, 3]]
    expected = expected + model.extra_deletion_embedding(features)
    torch.testing.assert_close(e[0, 2, 3], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_stack_gets_its_state_and_masks(name: str) -> None:
    model, batch = model_and_batch(name)
    state = dict(zip(MODELS[name].state, model.embed(batch), strict=True))
    m, z = model.stack(**state, **{mask: batch[mask] for mask in MODELS[name].masks})
    torch.testing.assert_close(model(batch), model.loss((m, z), batch))


@pytest.mark.parametrize("name", MODELS)
def test_every_embedding_is_trained(name: str) -> None:
    model, batch = model_and_batch(name)
    model(batch).backward()
    for child, module in model.named_children():
        for parameter in module.parameters() if child != "stack" else ():
            assert parameter.grad.abs().max() > 0, child


@pytest.mark.parametrize("name", MODELS)
def test_parts_are_embedded_alone_and_their_losses_add_up(name: str) -> None:
    model, batch = model_and_batch(name)
    names = list(MODELS[name].state)
    whole = dict(zip(names, model.embed(batch), strict=True))
    some = {"e": (slice(4, 6), slice(1, 5)), "m": (slice(2, 5), slice(0, 3)), "z": (slice(3, 7), slice(2, 4))}
    for own in (some, {"m": some["m"]}, {"z": some["z"]}):
        for tensor, part in zip(names, model.embed(batch, own), strict=True):
            rows, columns = own.get(tensor, (slice(None), slice(None)))
            torch.testing.assert_close(part, whole[tensor][:, rows, columns], rtol=1e-12, atol=1e-12)
    losses = []
    for rows in (slice(0, 2), slice(2, 5)):
        for columns in (slice(0, 4), slice(4, 7)):
            own = {"m": (rows, columns), "z": (slice(0, 1), slice(None))}
            losses.append(model.loss((whole["m"][:, rows, columns], whole["z"][:, :1]), batch, own))
    assert sum(loss > 0 for loss in losses) > 1
    torch.testing.assert_close(sum(losses), model.loss((whole["m"], whole["z"]), batch))


def test_forward_hands_parts_to_the_stack_and_masks_whole() -> None:
    model, batch = model_and_batch("main")
    own = {"m": (slice(1, 4), slice(None)), "z": (slice(0, 3), slice(None))}
    own_outputs = {"m": (slice(None), slice(2, 6))}
    out = torch.randn(1, 5, 4, CONFIG.c_m, dtype=torch.float64)
    seen = {}

    def stack(m, z, msa_mask, pair_mask, dropout_seed):
        seen.update(m=m, z=z, msa_mask=msa_mask, pair_mask=pair_mask, seed=dropout_seed)
        return out, z

    model.stack = None
    object.__setattr__(model, "stack", stack)
    loss = model(batch, own, own_outputs, dropout_seed=5)
    assert (seen["m"].shape[1:3], seen["z"].shape[1:3], seen["seed"]) == ((3, 7), (3, 7), 5)
    for name in (
        "msa_mask",
        "pair_mask",
    ):  # whole, and of the state's dtype, which the stack would copy it to
        assert torch.equal(seen[name], batch[name].double())
        assert seen[name].dtype == torch.float64
    torch.testing.assert_close(loss, model.loss((out, seen["z"]), batch, own_outputs))


def test_clusters_by_hand() -> None:
    a, c, d, e = 0, 1, 2, 3
    centres = np.array([[a, MASK, d, a], [c, c, e, GAP]])
    tokens = np.array([[a, c, d, GAP], [c, c, GAP, GAP], [GAP] * 4, [a, c, e, GAP]], dtype=np.uint8)
    # What is masked and gaps agree with nothing: the last row has two residues of the second centre, one of
    # the first; the third agrees with neither and goes to the first.
    assert nearest_centres(centres, tokens).tolist() == [0, 1, 0, 1]
    profile, deletions = summarise(centres, np.array([[1, 0, 0, 0], [0, 4, 0, 0]]), tokens, tokens * 0 + 3)
    expected = np.zeros((2, 4, N_TOKENS))
    for cluster, rows in ((0, [centres[0], *tokens[[0, 2]]]), (1, [centres[1], *tokens[[1, 3]]])):
        for row in rows:
            expected[cluster, np.arange(4), row] += 1 / 3
    np.testing.assert_allclose(profile, expected, atol=1e-6)
    np.testing.assert_allclose(deletions, (np.array([[1, 0, 0, 0], [0, 4, 0, 0]]) + 6) / 3, atol=1e-6)


def test_clusters_of_many_rows_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evoplan.model.data.clusters._ROWS", 7)
    a = random_alignment(40, 30, 2)
    centres = mask_msa(a.tokens[:6], a.deletions[:6], 0)["tokens_in"][0].numpy()
    profile, deletions = summarise(centres, a.deletions[:6], a.tokens[6:], a.deletions[6:])
    members = {k: [(centres[k], a.deletions[k])] for k in range(6)}
    for row, deleted in zip(a.tokens[6:], a.deletions[6:], strict=True):
        agree = [sum(x == y < GAP for x, y in zip(row, centre, strict=True)) for centre in centres]
        members[agree.index(max(agree))].append((row, deleted))
    for k, cluster in members.items():
        rows = np.array([row for row, _ in cluster])
        for token in range(N_TOKENS):
            np.testing.assert_allclose(profile[k, :, token], (rows == token).mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(deletions[k], np.mean([d for _, d in cluster], axis=0), atol=1e-6)


def test_profiles_do_not_tell_what_is_hidden() -> None:
    """A residue of one centre that no other row has: where it is masked, the profile does not hold it."""
    tokens = np.zeros((6, 300), dtype=np.uint8)
    tokens[3] = 7
    batch = mask_msa(tokens[:4], tokens[:4], 0, (tokens[4:], tokens[4:]))
    hidden, told = batch["tokens_in"][0, 3] == MASK, batch["profile"][0, 3, :, 7]
    assert hidden.sum() > 20
    assert (told[hidden] == 0).all()
    assert (told[~batch["is_masked"][0, 3]] > 0).all()


def test_loss_is_the_mean_over_masked_positions() -> None:
    model, batch = randomise(tiny_model().double()), tiny_batch(6, 9)
    m, z = model.embed(batch)
    chosen = batch["is_masked"]
    each = -torch.log_softmax(model.head(m)[chosen], -1)
    expected = each.gather(-1, batch["targets"][chosen][:, None]).mean()
    torch.testing.assert_close(model.loss((m, z), batch), expected)


def test_loss_without_a_masked_position_is_zero() -> None:
    batch = tiny_batch()
    batch["is_masked"] = torch.zeros_like(batch["is_masked"])
    loss = tiny_model()(batch)
    loss.backward()
    assert loss.item() == 0.0


def test_only_the_last_blocks_pair_submodules_get_no_gradient() -> None:
    model = randomise(tiny_model().double())
    model(tiny_batch()).backward()
    without = {name.split(".")[3] for name, p in model.named_parameters() if p.grad is None}
    blocks = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is None}
    assert blocks == {str(CONFIG.n_block - 1)}
    assert without == {
        "outer_product_mean",
        "triangle_outgoing",
        "triangle_incoming",
        "triangle_starting",
        "triangle_ending",
        "pair_transition",
    }


def test_one_block_still_trains_the_pair_embedding() -> None:
    model = randomise(tiny_model(replace(CONFIG, n_block=1)).double())
    model(tiny_batch()).backward()
    assert model.left_embedding.weight.grad.abs().max() > 0


@pytest.mark.parametrize("source", ["random", "file"])
def test_loss_goes_down(source: str) -> None:
    a = random_alignment(8, 12, 0) if source == "random" else read_alignment(UBIQUITIN, max_sequences=8)
    model, batch = tiny_model(), mask_msa(a.tokens, a.deletions, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(N_TOKENS), rel=0.5)
    assert losses[-1] < 0.8 * losses[0]
