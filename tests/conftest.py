import json
import os

os.environ["OMP_NUM_THREADS"] = "1"  # tiny shapes: a second thread only waits, in subprocesses too
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # the kernels run on the CPU; said before Triton is imported
    )


@pytest.fixture(scope="session", autouse=True)
def quick():
    """What each run and each composition repeats, made short: a thousand of them are made."""
    from hydra.core.config_store import ConfigStore

    from diffx.train import throughput

    throughput.SIDES["cpu"] = (
        128  # the ceiling of matrix products takes a second where bf16 is slow
    )
    ConfigStore.__deepcopy__ = lambda store, memo: (
        store
    )  # Hydra copies every schema each time that it composes


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


@pytest.fixture
def make_run(tmp_path):
    """Makes run folders of given curves, written as `diffx train` writes them."""
    from diffx.config.bridge import save_config
    from diffx.config.data import BpeTokenizer, StdlibData
    from diffx.config.model import MODEL_CONFIGS
    from diffx.config.train import TrainConfig, TrainJob

    def make(
        name,
        kind="transformer",
        *,
        curve,
        seed=0,
        steps=100,
        train=None,
        finished=True,
        parameters=1000,
        sha256="aa",
        **model,
    ):
        """`curve` is a list of (tokens, loss); `model` and `train` are settings of the config."""
        folder = tmp_path / name
        folder.mkdir(parents=True)
        job = TrainJob(
            model=MODEL_CONFIGS[kind](**model),
            data=StdlibData(),
            tokenizer=BpeTokenizer(),
            train=TrainConfig(steps=steps, **(train or {})),
            seed=seed,
        )
        save_config(job, folder / "config.yaml")
        lines = [
            {
                "step": i,
                "tokens": t,
                "time": float(i),
                "val/loss": loss,
                "val/bpb": loss / 2,
                "train/tokens_per_second": 1000.0 + i,
            }
            for i, (t, loss) in enumerate(curve)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "data.json").write_text(json.dumps({"sha256": sha256}))
        if finished:
            counts = {"embedding": 500, "rest": parameters, "total": 500 + parameters}
            (folder / "summary.json").write_text(
                json.dumps({"finished": True, "step": steps, "parameters": counts})
            )
        return folder

    return make
