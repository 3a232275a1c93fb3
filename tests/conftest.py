"""One torch thread: the models here are tiny, and threads that wait for each other cost more than they bring."""

from __future__ import annotations

import torch
import transformers

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
