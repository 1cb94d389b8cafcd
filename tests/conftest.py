import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny shapes: a second thread only waits, in subprocesses too
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
