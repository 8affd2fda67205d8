import torch

torch.cuda.device_count = lambda: 2
