"""Traced peaks against what the CPU's allocator hands out, kernels' scratch included."""

import pytest
import torch

from cost_model.costs import build_cost_table
from cost_model.devices import device
from cost_model.measure import peak_bytes
from cost_model.scratch import MAX_BYTES, MAX_FLOPS, CpuScratch, TensorSpec, _within_limits
from cost_model.trace import Trace, fake_tensors
from model import EvoformerConfig, EvoformerStack, InputShape
from model.attention import Attention
