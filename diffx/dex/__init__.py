"""DEX: a light differential step on the attention output of a pretrained model.

The method is that of Kong et al., arXiv 2505.16333.
"""

from diffx.dex.adapters import Adapters, load_adapter
from diffx.dex.registered import DexForCausalLM
from diffx.dex.trainer import DexCallback, get_dex_model

__all__ = ["Adapters", "DexCallback", "DexForCausalLM", "get_dex_model", "load_adapter"]
