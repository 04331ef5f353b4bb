"""What the server of `support.forked` imports once for all its forks."""

import gc

import torch
import transformers.generation
import transformers.models.llama.modeling_llama
import transformers.trainer

import holdfast.api
import holdfast.cli
import holdfast.lab.pretrain
import holdfast.report.page
import holdfast.runner.loop
import support.unsynced

__all__ = ["holdfast", "support", "transformers"]

torch.set_num_threads(1)
gc.freeze()
