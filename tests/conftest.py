import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny shapes: a second thread only waits, in subprocesses too
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels run on the CPU; said before Triton is imported


@pytest.fixture(scope="session", autouse=True)
def quick_ceiling():
    """Each run measures how fast this machine multiplies; that takes it a moment, and with bf16 often seconds."""
    from diffx.train import throughput

    throughput.SIDES["cpu"] = 128


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte."""
    from diffx.config.data import BytesTokenizer
    from diffx.data.tokenizers import make_tokenizer

    return make_tokenizer(BytesTokenizer(), ())


@pytest.fixture(scope="session")
def hf_folder(tokenizer, tmp_path_factory):
    """A folder as the hub's: a tiny Llama with random weights and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("hub") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eot_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder
