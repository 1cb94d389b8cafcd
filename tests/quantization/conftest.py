import json

import pytest

from diffx.cli import main

TRAIN = (
    "tokenizer=bytes model.hidden_size=32 model.num_layers=2 model.num_heads=4 "
    "model.num_kv_heads=2 model.init_std=0.2 train.steps=2 train.seq_len=64 "
    "train.batch_tokens=128 train.sample_tokens=0 wandb.mode=disabled device=cpu "
    "data.val_tokens=2000 data.val_fraction=0.2 data=text"
)


@pytest.fixture(scope="package")
def runs(tmp_path_factory):
    """Two seeds of two architectures, and one of a third."""
    folder = tmp_path_factory.mktemp("runs")
    rows = (
        {"text": f"Note {n}. The square of {n} is {n * n}. Nothing else is known of it. " * 3}
        for n in range(100)
    )
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFX_CACHE", str(folder / "cache"))
        for kind, seed in (
            ("transformer", 0),
            ("transformer", 1),
            ("diff_v1", 0),
            ("diff_v1", 1),
            ("diff_v2", 0),
        ):
            where = (
                f"run.dir={folder}/{kind}-{seed} data.path={folder}/text.jsonl "
                f"model={kind} seed={seed}"
            )
            assert main(["train", *TRAIN.split(), *where.split()]) == 0
    return folder
