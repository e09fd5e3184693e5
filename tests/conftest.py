"""Tiny tensors gain nothing from threads, and spinning ones slow every other process of the machine down."""

import torch

torch.set_num_threads(1)
