"""Bad input: one ``error:`` line that names the culprit, exit code 2, nothing made."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaModel,
    T5Config,
)

from diffx.cli import main
from diffx.hub.configs import DexModelConfig

TEXT = "data=text data.path=text/good.jsonl"
TINY = (
    "tokenizer=bytes model.hidden_size=32 model.num_layers=1 model.num_heads=4 "
    "model.num_kv_heads=2 train.steps=2 train.seq_len=16 train.batch_tokens=32 "
    "train.sample_tokens=0 wandb.mode=disabled device=cpu data.val_tokens=500"
)

ADAPT = (
    f"{TEXT} train.steps=2 train.seq_len=16 train.batch_tokens=32 wandb.mode=disabled device=cpu "
    "data.val_tokens=500"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory, hf_folder, tokenizer):
    """A folder with a trained run, and with unusable texts, models and other files."""
    folder = tmp_path_factory.mktemp("place")
    text = folder / "text"
    text.mkdir()
    rows = [
        {"text": f"Document {n} says that {n} times {n} is {n * n}, no more. " * 3}
        for n in range(120)
    ]
    (text / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (text / "latin1.txt").write_bytes("déjà vu ".encode("latin-1") * 20)
    (text / "broken.jsonl").write_text('{"text": "fine"}\n{"text": "cut of\n')
    (text / "other_key.jsonl").write_text('{"body": "no text here"}\n')
    (text / "deep.jsonl").write_text('{"text": "fine", "label": "x"}\n' + "[" * 100_000 + "\n")
    (folder / "deep.json").write_text('{"a":' * 100_000)
    (text / "empty.txt").write_text("")
    (text / "damaged.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n' * 50)[:-20])
    (folder / "nothing").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes" / "todo.md").write_text("not a run, not shards")
    (folder / "picture.bmp").write_bytes(b"BM")
    shutil.copytree(hf_folder, folder / "llama")
    shape = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
    }
    for name, model in (
        ("bert", BertLMHeadModel(BertConfig(**shape, intermediate_size=64))),
        (
            "bloom",
            BloomForCausalLM(
                BloomConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, n_layer=1, n_head=4)
            ),
        ),
        ("headless", LlamaModel(LlamaConfig(**shape, intermediate_size=64))),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save(folder / name)
    T5Config().save_pretrained(folder / "t5")
    shutil.copytree(hf_folder, folder / "code")
    names = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config = json.loads((folder / "code" / "config.json").read_text()) | {
        "model_type": "of_its_own",
        "auto_map": names,
    }
    (folder / "code" / "config.json").write_text(json.dumps(config))
    DexModelConfig(LlamaConfig(**shape).to_dict()).save_pretrained(folder / "with_branch")
    plan = {
        "base": "f" * 64,
        "criterion": "random",
        "settings": {},
        "num_heads": [4],
        "scores": [],
        "heads": [[0]],
    }
    (folder / "heads.json").write_text(json.dumps(plan))
    before = os.getcwd()
    os.chdir(folder)
    patch = pytest.MonkeyPatch()
    patch.setenv("DIFFX_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("HF_HUB_OFFLINE", "1")
    try:
        assert main(["train", "run.dir=trained", *TEXT.split(), *TINY.split()]) == 0
        assert (
            main(
                [
                    "data",
                    "prepare",
                    *TEXT.split(),
                    "tokenizer=bpe",
                    "tokenizer.vocab_size=300",
                    "out=shards",
                ]
            )
            == 0
        )
        yield folder
    finally:
        os.chdir(before)
        patch.undo()


def everything(folder):
    return sorted(map(str, folder.rglob("*")))


TABLE = [
    # The words themselves.
    ("train train.stepz=3", ["train.stepz", "train.steps"]),
    ("train lr=1", ["lr", "train.lr"]),
    ("train modle=diff_v1", ["modle", "did you mean model"]),
    ("train model=diff_v3", ["model=diff_v3", "diff_v1", "transformer_1p5h"]),
    ("train model=ablation/no_nrom", ["ablation/no_nrom", "ablation/diff_v1_no_norm"]),
    ("train size=1.5b", ["size=1.5b", "1.4b"]),
    ("train size=25", ["size=25"]),
    ("train data=txt", ["data=txt", "text"]),
    ("train tokenizer=bpee", ["tokenizer=bpee", "bpe"]),
    ("train experiment=dex/controls", ["experiment=dex/controls", "`diffx adapt-dex`"]),
    (
        "adapt-dex base=llama experiment=diff/default_run",
        ["experiment=diff/default_run", "`diffx train`"],
    ),
    (
        "quantize checkpoint=x experiment=diff/architectures",
        ["experiment=diff/architectures", "`diffx train`"],
    ),
    ("train experiment=architectures", ["experiment=architectures", "diff/architectures"]),
    ("train hydra/launcher=basik", ["hydra/launcher=basik", "basic"]),
    ("train +foo=1", ["foo is not a key"]),
    ("train ++train.foo=1", ["train.foo is not a key"]),
    ("train ~train.lr", ["train.lr"]),
    ("train ~model", ["model is missing"]),
    ("train model=null", ["model=null"]),
    ("train train.steps=[1", ["train.steps=[1", "key=value"]),
    ("train steps", ["'steps'", "key=value"]),
    ("train model=diff_v1,diff_v2", ["model=diff_v1,diff_v2", "-m"]),
    ("train train.lr=range(1,3)", ["train.lr=range(1,3)", "-m"]),
    ("train train.lr=${nowhere}", ["train.lr", "nowhere"]),
    ("train data.path=x", ["data.path is not a key"]),
    ("train data=text", ["data.path is missing", "data.path=..."]),
    ("train data=hub", ["data.name is missing"]),
    ("train tokenizer=hf", ["tokenizer.name is missing"]),
    ("data prepare", ["out is missing"]),
    ("generate", ["checkpoint is missing"]),
    # The door.
    ("trian", ["trian", "train"]),
    ("train --multirn", ["--multirn", "--multirun"]),
    ("train --cfg jobs", ["jobs", "job"]),
    ("train --doc trian.lr", ["trian.lr", "train.lr"]),
    ("train --doc train.lr --cfg job", ["--doc", "--cfg"]),
    ("train -m --cfg job seed=0,1", ["--multirun", "--cfg"]),
    ("train --config-dir nowhere", ["--config-dir=nowhere"]),
    ("compare", ["RUN"]),
    ("bench train --rounds 0", ["--rounds"]),
    ("bench adapt --base nowhere/x", ["base=nowhere/x"]),
    ("bench adapt --base llama --seq-len 257", ["seq_len=257", "256 tokens at most"]),
    # Types and choices.
    ("train train.lr=fast", ["train.lr=fast", "a number"]),
    ("train train.eval_every=1.5", ["train.eval_every=1.5", "a whole number"]),
    ("train train.fused_attention=true device=cpu", ["train.fused_attention=true", "cpu", "GPU"]),
    ("train train.compile=maybe", ["train.compile=maybe", "true or false"]),
    ("train seed=null", ["seed=null"]),
    ("train train=3", ["train=3", "a group of keys, set one by one"]),
    ("train train.schedule=cosin", ["train.schedule=cosin", "cosine"]),
    ("train wandb.mode=offlin", ["wandb.mode=offlin", "offline"]),
    ("train device=gpu", ["device=gpu", "cuda"]),
    ("train model.lambda_scope=heads", ["model.lambda_scope=heads", "layer"]),
    # Numbers that cannot be.
    ("train train.lr=-1", ["train.lr=-1"]),
    ("train train.steps=0", ["train.steps=0"]),
    ("train train.tokens=many", ["train.tokens=many", "100M"]),
    ("train train.steps=5 train.tokens=1M", ["train.steps=5", "train.tokens=1M"]),
    ("train train.batch_tokens=1000", ["train.batch_tokens=1000", "train.seq_len=256"]),
    ("train train.steps=100 train.warmup=5000", ["train.warmup=5000", "steps"]),
    ("train train.beta2=1", ["train.beta2=1"]),
    ("train data.val_fraction=1", ["data.val_fraction=1"]),
    (
        "train train.compile=true train.mask_documents=true",
        ["train.mask_documents", "train.compile"],
    ),
    ("train tokenizer.vocab_size=100", ["tokenizer.vocab_size=100", "257"]),
    ("train run.name=a=b", ["a=b"]),
    ("train run.name=../../x", ["run.name=../../x", "a name of 1 to 100 characters"]),
    ("train run.name=.x", ["run.name=.x", "a name of 1 to 100 characters"]),
    (f"train run.name={'x' * 101}", ["run.name=xxx", "100"]),
    ("train 'run.dir=\"a,b\"'", ["run.dir=a,b"]),
    ("generate checkpoint=trained temperature=-1", ["temperature=-1"]),
    ("generate checkpoint=trained top_p=2", ["top_p=2"]),
    ("generate checkpoint=trained prompt=a prompt_file=b", ["prompt='a'", "prompt_file=b"]),
    ("data prepare data=shards data.path=trained out=x", ["data=shards"]),
    # Head counts.
    ("train size=25m model.num_heads=7", ["model.num_heads=7", "model.hidden_size=512"]),
    ("train size=25m model.num_heads=512", ["model.num_heads=512", "even head dimension"]),
    ("train size=25m model.num_kv_heads=3", ["model.num_kv_heads=3", "model.num_heads=8"]),
    ("train model=transformer_wide_head model.num_kv_heads=1", ["model.num_kv_heads=1", "even"]),
    ("train model=diff_v1 model.num_heads=1 model.num_kv_heads=1", ["model.num_heads=1", "even"]),
    ("train size=25m model=transformer_1p5h model.num_kv_heads=8", ["model.num_kv_heads=8", "12"]),
    (
        "train size=25m model=ablation/diff_v1_half_head_dim model.hidden_size=80",
        ["model.num_heads=8", "multiple of 4"],
    ),
    ("train model=diff_v2 model.ratio=3", ["model.ratio=3", "model.num_heads=4"]),
    ("train model=diff_v2 model.ratio=0", ["model.ratio=0", "positive"]),
    ("train model=diff_v2 model.ratio=4", ["model.num_kv_heads=2", "model.ratio=4"]),
    ("train model=diff_v2 model.pairing=along", ["model.pairing=along", "within, across"]),
    ("train model=diff_v2 model.lambda_form=relu", ["model.lambda_form=relu", "sigmoid"]),
    ("train model=diff_gda model.ratio=6", ["model.ratio=6", "from 1 to 4"]),
    ("train model=diff_gda model.ratio=0", ["model.ratio=0", "from 1 to 4"]),
    ("train model=diff_gda model.num_kv_heads=1", ["model.num_kv_heads=1", "even"]),
    ("train model.ratio=2", ["model.ratio", "not a key"]),
    ("train model.sign=times", ["model.sign=times", "minus, plus"]),
    ("train model.ffn=relu", ["model.ffn=relu", "swiglu, polynorm"]),
    ("train model.sublayer_norm_eps=0", ["model.sublayer_norm_eps=0", "positive"]),
    ("train model.lambda_init=width", ["model.lambda_init=width", "depth-1"]),
    ("train model=transformer_gated model.gate=row", ["model.gate=row", "head, element"]),
    ("train model=transformer_sink model.sink=deep", ["model.sink=deep", "learned, zero"]),
    ("train model.kind=diff_v2", ["model.kind=diff_v2", "model=diff_v2"]),
    ("train model.lambda_init=1.5", ["model.lambda_init=1.5"]),
    # Data.
    (f"train {TINY} data=text data.path=nowhere.txt", ["nowhere.txt"]),
    (f"train {TINY} data=text data.path=text/*.parquet", ["text/*.parquet"]),
    (f"train {TINY} data=text data.path=nothing", ["nothing"]),
    (f"train {TINY} data=text data.path=picture.bmp", ["picture.bmp", ".jsonl"]),
    (f"train {TINY} data=text data.path=text/empty.txt", ["text/empty.txt"]),
    (f"train {TINY} data=text data.path=text/latin1.txt", ["text/latin1.txt", "UTF-8"]),
    (f"train {TINY} data=text data.path=text/broken.jsonl", ["text/broken.jsonl", "2"]),
    (f"train {TINY} data=text data.path=text/other_key.jsonl", ["text/other_key.jsonl", "text"]),
    (f"train {TINY} data=text data.path=text/damaged.jsonl.gz", ["text/damaged.jsonl.gz"]),
    (f"train {TINY} {TEXT} data.prompt_key=question", ["question"]),
    (f"train {TINY} data=shards data.path=notes", ["notes"]),
    ("train data=recall data.pairs=64", ["data.pairs=64", "255 tokens"]),
    ("train data=recall data.pairs=20 data.keys=20", ["data.pairs=20", "data.keys=20"]),
    ("train data=recall data.length=0", ["data.length=0"]),
    ("train data=recall data.power=0", ["data.power=0", "positive"]),
    ("train data=recall data.length=128", ["train.seq_len=256", "data.length=128"]),
    ("train data=recall tokenizer=bytes", ["tokenizer=bytes", "data=recall", "leave it out"]),
    ("data prepare data=recall out=x", ["data=recall", "as they are needed"]),
    (f"train {TINY} data=shards data.path=nowhere", ["nowhere"]),
    (f"train {TINY} {TEXT} train.seq_len=65536 train.batch_tokens=65536", ["train.seq_len=65536"]),
    (
        f"train {TINY} {TEXT} tokenizer=hf tokenizer.name=nobody/nothing",
        ["tokenizer.name=nobody/nothing"],
    ),
    (f"train {TINY} {TEXT} tokenizer=tiktoken tokenizer.name=cl200k", ["tokenizer.name=cl200k"]),
    (f"train {TINY} {TEXT} model.vocab_size=10", ["model.vocab_size=10", "257"]),
    (f"data prepare {TEXT} out=notes", ["out=notes"]),
    # Adaptation and export.
    ("adapt-dex", ["base is missing", "base=FOLDER", "data=text"]),
    (
        f"adapt-dex base=nowhere {ADAPT}",
        ["base=nowhere", "there is no folder nowhere here", "offline mode is on", "accepted"],
    ),
    (
        f"adapt-dex base=some/deep/name {ADAPT}",
        ["there is no folder some/deep/name here", "accepted"],
    ),
    (f"adapt-dex base=notes {ADAPT}", ["base=notes", "accepted"]),
    (
        f"adapt-dex base=trained {ADAPT}",
        ["base=trained", "run folder", "diffx export checkpoint=trained"],
    ),
    (
        f"adapt-dex base=t5 {ADAPT}",
        ["base=t5", "a t5 is no causal language model", "AutoModelForCausalLM"],
    ),
    (f"adapt-dex base=bert {ADAPT}", ["base=bert", "no causal language model"]),
    (f"adapt-dex base=headless {ADAPT}", ["base=headless", "lm_head.weight"]),
    (f"adapt-dex base=bloom {ADAPT}", ["base=bloom", "BloomForCausalLM", "such as Llama"]),
    (
        f"adapt-dex base=hub train.fused_attention=true {ADAPT}",
        ["train.fused_attention=true", "attention of its own"],
    ),
    (f"adapt-dex base=with_branch {ADAPT}", ["base=with_branch", "adapted already", "fold=true"]),
    (f"adapt-dex base=llama {ADAPT} dex.k=5", ["dex.k=5", "4 heads"]),
    (f"adapt-dex base=llama {ADAPT} dex.k=0", ["dex.k=0"]),
    (f"adapt-dex base=llama {ADAPT} dex.k=2 dex.heads=all", ["dex.k=2", "dex.heads=all"]),
    (
        f"adapt-dex base=llama {ADAPT} dex.heads=entropy",
        ["dex.heads=entropy", "entropy_high", "heads.json"],
    ),
    (
        f"adapt-dex base=llama {ADAPT} dex.heads=heads.json",
        ["dex.heads=heads.json", "another model"],
    ),
    (f"adapt-dex base=llama {ADAPT} dex.heads=nowhere.json", ["dex.heads=nowhere.json"]),
    (f"adapt-dex base=llama {ADAPT} dex.variant=dexx", ["dex.variant=dexx", "attn_only"]),
    (f"adapt-dex base=llama {ADAPT} dex.anneal_steps=0", ["dex.anneal_steps=0", "dex.init=linear"]),
    (
        f"adapt-dex base=llama {ADAPT} train.seq_len=512 train.batch_tokens=512",
        ["train.seq_len=512", "256"],
    ),
    (f"adapt-dex base=llama {ADAPT} train.sample_tokens=5", ["train.sample_tokens=5"]),
    (f"adapt-dex base=llama {ADAPT} train.mask_documents=true", ["train.mask_documents=true"]),
    (f"adapt-dex base=llama {ADAPT} train.init_from=trained", ["train.init_from=trained", "base="]),
    (f"adapt-dex base=llama {ADAPT} train.resume=trained", ["train.resume=trained", "train run"]),
    (
        f"adapt-dex base=llama {ADAPT} data=shards data.path=shards",
        ["data=shards", "base=llama", "another tokenizer"],
    ),
    ("export", ["checkpoint is missing"]),
    ("export checkpoint=trained out=notes", ["out=notes", "exists"]),
    ("export checkpoint=trained out=x format=gguf", ["format=gguf", "hf"]),
    ("export checkpoint=trained out=x fold=false", ["fold=false", "trained"]),
    ("export checkpoint=llama out=x", ["checkpoint=llama", "run folder"]),
    ("eval checkpoint=bert suite=icl", ["checkpoint=bert", "no causal language model"]),
    (
        "adapt-dex base=llama data=recall train.seq_len=256 train.batch_tokens=256 device=cpu",
        ["data=recall", "base=llama", "another tokenizer"],
    ),
    # Evaluations.
    ("eval checkpoint=trained suite=recall", ["suite=recall", "trained", "data=recall"]),
    ("eval checkpoint=llama suite=recall", ["suite=recall", "llama", "data=recall"]),
    ("eval checkpoint=trained suite=outliers data=recall", ["data=recall", "not text"]),
    ("eval", ["suite is missing", "retrieval", "paper_lm"]),
    ("eval suite=icl", ["checkpoint is missing"]),
    ("eval checkpoint=trained suite=foo", ["suite=foo", "icl_order"]),
    ("eval checkpoint=trained suite=[icl,foo]", ["suite=foo", "icl_order"]),
    ("eval checkpoint=trained suite=[icl,]", ["suite=[icl,]", "[retrieval,outliers]"]),
    (
        "eval checkpoint=trained suite=[icl,outliers] suite.shots=2",
        ["suite.shots", "suite=outliers of the list"],
    ),
    ("eval checkpoint=trained suite=icl limit=1.5", ["limit=1.5", "between 0 and 1"]),
    (
        "eval checkpoint=trained suite=icl suite.chat_template=true",
        ["suite.chat_template=true", "a run has no chat template"],
    ),
    (
        "eval checkpoint=trained suite=harness suite.tasks=[a] suite.fewshot_as_multiturn=true",
        ["suite.fewshot_as_multiturn=true"],
    ),
    (
        "eval checkpoint=trained suite=harness suite.tasks=[a] suite.gen_kwargs=5",
        ["suite.gen_kwargs=5", "names and values"],
    ),
    (
        "eval checkpoint=trained suite=harness suite.tasks=[a] suite.gen_kwargs={top_k:5}",
        ["suite.gen_kwargs.top_k=5", "max_gen_toks"],
    ),
    (
        "eval checkpoint=nowhere suite=icl",
        ["checkpoint=nowhere", "there is no folder", "offline mode is on", "accepted: a run"],
    ),
    ("eval checkpoint=notes suite=icl", ["checkpoint=notes"]),
    ("eval checkpoint=trained@7 suite=icl", ["checkpoint=trained@7", "2"]),
    ("eval checkpoint=trained suite=icl dtype=int8", ["dtype=int8", "bf16"]),
    ("eval checkpoint=trained suite=icl batch=0", ["batch=0"]),
    (
        "eval checkpoint=trained suite=retrieval suite.samples=1000000000000",
        ["suite.samples=1000000000000", "1 to 1,000,000"],
    ),
    (
        "eval checkpoint=trained suite=icl_order suite.orders=1000000000",
        ["suite.orders=1000000000", "1 to 1,000,000"],
    ),
    (
        "eval checkpoint=trained suite=speed suite.rounds=1000000001",
        ["suite.rounds=1000000001", "1 to 1,000,000"],
    ),
    (
        "eval checkpoint=trained suite=icl suite.name=../../x",
        ["suite.name=../../x", "a name of 1 to 100 characters"],
    ),
    (
        "eval checkpoint=code suite=icl",
        ["checkpoint=code", "Python code", "trust_remote_code=true"],
    ),
    ("generate checkpoint=code", ["checkpoint=code", "Python code", "trust_remote_code=true"]),
    ("eval checkpoint=trained suite=icl limit=0", ["limit=0"]),
    ("eval checkpoint=trained suite=icl suite.shotz=1", ["suite.shotz", "suite.shots"]),
    ("eval checkpoint=trained suite=icl suite.shots=[1,1]", ["suite.shots=[1, 1]"]),
    ("eval checkpoint=trained suite=icl suite.template=x", ["suite.template=x", "{label}"]),
    ("eval checkpoint=trained suite=icl_order suite.orders=1", ["suite.orders=1"]),
    (
        "eval checkpoint=trained suite=icl_order suite.arrangements=[sorted]",
        ["suite.arrangements=sorted", "alternating"],
    ),
    ("eval checkpoint=trained suite=retrieval suite.cases=[[1,2]]", ["suite.cases=[[1, 2]]"]),
    ("eval checkpoint=trained suite=retrieval suite.depths=[2]", ["suite.depths=[2]"]),
    ("eval checkpoint=trained suite=outliers suite.top=[0]", ["suite.top=[0]"]),
    ("eval checkpoint=trained suite=speed suite.batches=[]", ["suite.batches=[]"]),
    ("quantize", ["checkpoint", "missing"]),
    ("quantize checkpoint=trained bits=[1]", ["bits=1", "from 2 to 16"]),
    ("quantize checkpoint=trained bits=[17,4]", ["bits=17", "from 2 to 16"]),
    ("quantize checkpoint=trained bits=[]", ["bits=[]", "[16,8,6,4]"]),
    (
        "quantize checkpoint=trained bits=8",
        ["bits=8 cannot be used: it must be a list such as [8]"],
    ),
    ("quantize checkpoint=trained bits=few", ["bits=few", "a list", "a whole number"]),
    ("quantize checkpoint=trained bits=null", ["bits=null", "a list", "a whole number"]),
    (
        "quantize checkpoint=trained method=weights method.skip=o_proj",
        ["method.skip=o_proj", "a list such as [o_proj]"],
    ),
    ("quantize checkpoint=trained method=magic", ["method=magic", "attention_logits"]),
    (
        "quantize checkpoint=trained method=activations method.kind=../x",
        ["method.kind=../x", "method=", "weights"],
    ),
    ("quantize checkpoint=trained method.scope=layer", ["method.scope", "layer", "head"]),
    ("quantize checkpoint=trained suite=speed", ["suite=speed", "speed"]),
    ("quantize checkpoint=trained suite=outliers", ["suite=outliers", "attention"]),
    ("eval checkpoint=trained suite=hallucination judge=human", ["judge=human", "endpoint"]),
    (
        "eval checkpoint=trained suite=hallucination judge=endpoint judge.base_url=x judge.model=y",
        ["judge.base_url=x", "http"],
    ),
    (
        "eval checkpoint=trained suite=icl judge=endpoint judge.base_url=http://x judge.model=y",
        ["judge=endpoint", "hallucination"],
    ),
    # Runs.
    (f"train {TINY} {TEXT} run.dir=trained", ["run.dir=trained", "exists"]),
    (f"train -m {TINY} {TEXT} run.dir=x seed=0,1", ["run.dir=x", "hydra.sweep.dir"]),
    (f"train {TINY} {TEXT} train.resume=nowhere", ["train.resume=nowhere"]),
    (f"train {TINY} {TEXT} train.resume=notes", ["train.resume=notes"]),
    (
        f"train {TINY} {TEXT} train.resume=trained train.lr=1e-5",
        ["train.lr=1e-05", "train.lr=0.005"],
    ),
    (
        f"train {TINY} {TEXT} train.resume=trained model=transformer",
        ["model", "transformer", "diff_v1"],
    ),
    (f"train {TINY} {TEXT} train.init_from=nowhere", ["train.init_from=nowhere"]),
    (f"train {TINY} {TEXT} train.init_from=trained model=transformer", ["transformer", "diff_v1"]),
    ("generate checkpoint=nowhere", ["checkpoint=nowhere"]),
    ("generate checkpoint=notes", ["checkpoint=notes"]),
    ("generate checkpoint=trained@7", ["checkpoint=trained@7", "2"]),
    ("generate checkpoint=trained prompt_file=nowhere", ["prompt_file=nowhere"]),
    (
        "generate checkpoint=trained prompt_file=text/latin1.txt",
        ["prompt_file=text/latin1.txt", "UTF-8"],
    ),
    ("compare nowhere", ["nowhere"]),
    ("compare notes", ["notes"]),
    ("compare suite=retrieval", ["suite=retrieval", "two or more"]),
    ("compare trained notes suite=retreival", ["suite=retreival", "retrieval"]),
    (
        "compare trained nowhere suite=icl",
        ["RUN=trained", "`diffx eval checkpoint=trained suite=icl`"],
    ),
    ("compare nowhere trained suite=icl", ["RUN=nowhere", "no folder"]),
    ("compare trained notes suite=icl suite=math", ["suite=math", "one suite"]),
    ("compare trained notes suite=icl --out x.txt", ["out=x.txt", ".png"]),
    ("params tokenizer=tiktoken", ["model.vocab_size"]),
    # Groups that are given no name.
    *(
        (f"train {group}=[1]", [f"{group}=[1]", "one of its options"])
        for group in ("model", "size", "data", "tokenizer", "experiment")
    ),
    *(
        (f"quantize checkpoint=trained {group}=[1]", [f"{group}=[1]", "one of its options"])
        for group in ("suite", "method", "judge")
    ),
    ("train model=[[1]]", ["model=[[1]]", "one of its options"]),
    ("train experiment=[diff/architectures,3]", ["experiment=[diff/architectures,3]"]),
    ("train hydra/launcher=[1]", ["hydra/launcher=[1]"]),
    ("train size={a:1}", ["size={a:1}", "one of its options"]),
    ("train model={a:1}", ["model.a is not a key"]),
    # Kinds that the group's choice sets.
    ("train data.kind=text", ["data.kind=text", "data=text"]),
    ("train tokenizer.kind=bytes", ["tokenizer.kind=bytes", "tokenizer=bytes"]),
    ("train kind=adapt", ["kind=adapt", "by hand"]),
    ("adapt-dex base=llama kind=train", ["kind=train", "by hand"]),
    (
        "eval checkpoint=trained suite=icl suite.kind=retrieval",
        ["suite.kind=retrieval", "suite=retrieval"],
    ),
    (
        "eval checkpoint=trained suite=icl judge.kind=endpoint",
        ["judge.kind=endpoint", "judge=endpoint"],
    ),
    ("quantize checkpoint=trained method.kind=weights", ["method.kind=weights", "method=weights"]),
    ("generate checkpoint=trained kind=eval", ["kind=eval", "by hand"]),
    ("export checkpoint=trained out=x kind=train", ["kind=train", "by hand"]),
    ("data prepare out=x data.kind=text", ["data.kind=text", "data=text"]),
    # Numbers beyond all ranges.
    *(
        (f"{job} seed={seed}", [f"seed={seed}"])
        for job in ("train", "adapt-dex base=llama")
        for seed in (-1, 2**32)
    ),
    *(
        (f"{job} seed={10**20}", [f"seed={10**20}"])
        for job in ("generate checkpoint=trained", "eval checkpoint=trained suite=icl")
    ),
    (
        f"eval checkpoint=trained suite=icl_order suite.seeds=[{2**32}]",
        [f"suite.seeds={2**32}", "4294967295"],
    ),
    *(
        (f"train {key}=inf", [f"{key}=inf", "finite"])
        for key in ("train.lr", "train.grad_clip", "model.rope_theta")
    ),
    ("train train.min_lr_ratio=nan", ["train.min_lr_ratio=nan"]),
    ("generate checkpoint=trained temperature=inf", ["temperature=inf", "finite"]),
    (
        "eval checkpoint=trained suite=retrieval suite.depths=[0,nan]",
        ["suite.depths=nan", "finite"],
    ),
    ("train 'train.tokens=\"inf\"'", ["train.tokens=inf"]),
    ("train train.tokens=99999999999T", ["train.tokens=99999999999T"]),
    # Sizes that cannot fit.
    ("train model.hidden_size=1000000000 model.num_heads=10", ["model.hidden_size=1000000000"]),
    (
        "train model.hidden_size=10000000 model.num_heads=10",
        ["model.hidden_size=10000000", "GiB are free"],
    ),
    ("train model.num_layers=1000000000", ["model.num_layers=1000000000"]),
    (
        "train model.hidden_size=32768 model.num_layers=10000",
        ["model.num_layers=10000", "GiB are free"],
    ),
    ("train model.vocab_size=200M", ["model.vocab_size=200M"]),
    (
        "train model.hidden_size=4096 model.vocab_size=200000000",
        ["model.vocab_size=200000000", "GiB are free"],
    ),
    (
        "train train.batch_tokens=1000000T train.seq_len=1",
        ["train.batch_tokens=1000000", "GiB are free"],
    ),
    (
        "train train.seq_len=100000000000 train.batch_tokens=100000000000",
        ["train.seq_len=100000000000", "GiB are free"],
    ),
    (
        "params model.hidden_size=1000000000000 model.num_heads=10",
        ["model.hidden_size=1000000000000"],
    ),
    # Addresses and texts.
    *(
        (
            "eval checkpoint=trained suite=hallucination judge=endpoint judge.model=y "
            f"judge.base_url='{url}'",
            [f"judge.base_url={url}"],
        )
        for url in (
            "http://[",
            "http://",
            "http://:80",
            "http://a:99999999",
            "http://a:b",
            "http://é",
            "ftp://a",
            "http://a:0x1",
        )
    ),
    (
        "eval checkpoint=trained suite=hallucination judge=endpoint judge.model=y judge.base_url=http://u:secret@[",
        ["judge.base_url"],
    ),
    ("generate checkpoint=trained prompt=null", ["prompt=null", "text"]),
    ("train train.sample_prompt=null", ["train.sample_prompt=null", "text"]),
    ("eval checkpoint=trained suite=icl suite.template=null", ["suite.template=null", "text"]),
    (
        "eval checkpoint=trained suite=icl 'suite.template={text}{{label}'",
        ["suite.template={text}{{label}"],
    ),
    (
        "eval checkpoint=trained suite=icl 'suite.template=\"{text}{label\"'",
        ["suite.template={text}{label", "{label}"],
    ),
    ("generate checkpoint='a\0b'", ["checkpoint='a\\x00b'", "null characters"]),
    ("generate checkpoint='a\udcff'", ["checkpoint='a\\udcff'", "UTF-8"]),
    (f"generate checkpoint=trained prompt_file={'x' * 300}", ["prompt_file=xxx", "too long"]),
    (f"train run.dir={'x' * 300}", ["xxx", "too long"]),
    ("train data=text data.path='~nobody-here/x'", ["begins with ~"]),
    ("export checkpoint=trained out='~nobody-here/x'", ["out=~nobody-here/x", "home directory"]),
    (f"train train.lr={'[' * 2000}", ["cannot be read"]),
    # Places below a file.
    ("export checkpoint=trained out=heads.json/x", ["out=heads.json/x", "heads.json is no folder"]),
    ("data prepare out=heads.json/x", ["out=heads.json/x", "heads.json is no folder"]),
    ("train run.dir=heads.json/x/y", ["run.dir=heads.json/x/y", "heads.json is no folder"]),
    (
        "train -m seed=0,1 hydra.sweep.dir=heads.json/x",
        ["hydra.sweep.dir=heads.json/x", "heads.json is no folder"],
    ),
    ("train -m seed=0,1 hydra.sweep.dir=heads.json", ["hydra.sweep.dir=heads.json"]),
    ("generate checkpoint=heads.json/x", ["checkpoint=heads.json/x"]),
    ("compare trained --out heads.json/x.png", ["out=heads.json/x.png", "heads.json is no folder"]),
    # Nested too deeply.
    (
        f"train {TINY} data=text data.path=text/deep.jsonl",
        ["text/deep.jsonl", "line 2", "nested too deeply"],
    ),
    (
        "eval checkpoint=trained suite=icl suite.tasks=[text/deep.jsonl]",
        ["text/deep.jsonl", "nested too deeply"],
    ),
    (
        "eval checkpoint=trained suite=hallucination suite.tasks=[text/deep.jsonl]",
        ["text/deep.jsonl", "nested too deeply"],
    ),
    (
        f"adapt-dex base=llama {ADAPT} dex.heads=deep.json",
        ["dex.heads=deep.json", "nested too deeply"],
    ),
    pytest.param(
        f"train {TINY} {TEXT} device=cuda",
        ["device=cuda"],
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
    ),
]


def check(code, out, mentions):
    assert code == 2, out
    lines = out.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), out
    for mention in mentions:
        assert mention in lines[0]


@pytest.mark.parametrize(("command", "mentions"), TABLE)
def test_bad_input_is_one_line(place, capfd, command, mentions):
    before = everything(place)
    code = main(words(command))
    check(code, capfd.readouterr().err, mentions)
    assert everything(place) == before, "something was made"


@pytest.mark.parametrize(
    ("command", "mentions"),
    [
        ("train train.stepz=3", ["train.stepz", "train.steps"]),
        pytest.param(
            f"train {TINY} data=text data.path=text/latin1.txt",
            ["text/latin1.txt", "UTF-8"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "generate checkpoint=nowhere", ["checkpoint=nowhere"], marks=pytest.mark.slow
        ),  # the imports take most of it
        ("trian", ["trian"]),
    ],
)
def test_the_program_says_the_same(place, command, mentions):
    done = subprocess.run(
        [sys.executable, "-m", "diffx", *words(command)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    check(done.returncode, done.stderr, mentions)


@pytest.mark.parametrize(
    ("command", "mention"),
    [
        (f"adapt-dex base=no/where {ADAPT}", "there is no folder no/where here"),
        ("eval checkpoint=no/where suite=icl", "there is no folder no/where here"),
        (f"train {TINY} {TEXT} tokenizer=hf tokenizer.name=no/where", "tokenizer.name=no/where"),
        (f"train {TINY} data=hub data.name=no/where", "data.name=no/where"),
        ("eval checkpoint=trained suite=icl suite.tasks=[trec]", "suite.tasks=trec"),
    ],
)
def test_without_a_network_the_hub_is_not_asked(place, capfd, monkeypatch, command, mention):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")  # RFC 6761: resolves nowhere
    monkeypatch.setattr("diffx.data.hub.getproxies", dict)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it is asked again and again"))
    code = main(words(command))
    check(code, capfd.readouterr().err, [mention, "hub.invalid cannot be reached"])


INTERRUPTED = [
    (
        "eval checkpoint=trained suite=icl",
        "evaluation.run.evaluate",
        "interrupted: what was measured is kept, and the same command",
    ),
    (
        "eval -m checkpoint=trained suite=icl,math",
        "evaluation.run.evaluate",
        "interrupted: what was measured is kept",
    ),
    (
        "quantize checkpoint=trained",
        "quantization.run.quantize",
        "interrupted: what was measured is kept, and the same command",
    ),
    ("generate checkpoint=trained", "evaluation.generate.generate_text", "interrupted"),
    ("export checkpoint=trained out=x", "export.export", "interrupted"),
    ("compare trained", "report.compare.compare_runs", "interrupted"),
]


@pytest.mark.parametrize(("command", "work", "line"), INTERRUPTED)
def test_an_interrupt_is_one_line(place, capfd, monkeypatch, command, work, line):
    calls = []

    def interrupted(*args):
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(f"diffx.{work}", interrupted)
    assert main(words(command)) == 130
    (told,) = capfd.readouterr().err.splitlines()
    assert told.startswith(line) and len(calls) == 1, "a sweep goes on"


def words(command):
    return [
        word.strip("'") if word.startswith("'") else word for word in command.split()
    ]  # as a shell takes quotes around a word


def test_the_table_is_long_enough():
    assert len(TABLE) >= 40
