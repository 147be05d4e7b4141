"""Five steps in the trainers that people use, planned and not: the same weights afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import evoplan
from tests.zoo import GPT


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = GPT()

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch).flatten(0, 1), batch.flatten())

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    def trained(*callbacks: Any) -> dict[str, Tensor]:
        torch.manual_seed(1)
        data = torch.randint(50, (10, 13))
        module = Module()
        torch.manual_seed(2)
        trainer = lightning.Trainer(
            max_steps=5, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
        assert "forward" not in module.model.__dict__
        return module.state_dict()

    seen: list[evoplan.FitPlan] = []

    class Fit(evoplan.LightningFit):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(self.fitted.plan)

    expected = trained()
    got = trained(Fit("1.2MiB", lambda batch: ((batch,), {}), lambda module: module.model))
    assert len(seen) == 5
    assert seen[0].predicted.step_seconds > seen[0].baselines["none"].step_seconds
    for name, tensor in expected.items():
        assert tensor.equal(got[name]), name


def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(50, (20, 24))
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def trained(*callbacks: Any) -> dict[str, Tensor]:
        under = copy.deepcopy(model)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=4, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, seed=3, learning_rate=0.01,
        )  # fmt: skip
        transformers.Trainer(under, arguments, train_dataset=data, callbacks=list(callbacks)).train()
        assert "forward" not in under.__dict__
        return under.state_dict()

    plans: list[evoplan.FitPlan] = []

    class Fit(evoplan.TransformersFit):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            plans.append(self.fitted.plan)

    expected = trained()
    free = evoplan.fit(model, (), {"input_ids": tokens[:4], "labels": tokens[:4], "use_cache": False})
    free.remove()
    got = trained(Fit(free.plan.least_feasible_bytes + 2**14))
    assert len(plans) == 5
    assert plans[0].predicted.step_seconds > plans[0].baselines["none"].step_seconds
    for name, tensor in expected.items():
        assert torch.allclose(tensor, got[name], atol=1e-6), name
