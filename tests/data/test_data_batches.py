import json

import numpy as np
import pytest
import torch

from diffx.config import UserError
from diffx.config.data import BytesTokenizer, HubData, TextData
from diffx.data import cu_seqlens, open_data
from diffx.data.batches import WindowBatches
from diffx.data.shards import TokenArray

T, B = 16, 4


@pytest.fixture(params=["windows", "stream", "prompts", "stream of prompts"])
def corpus(request, jsonl, rows):
    for part in range(3):  # several files, so that a stream's position is more than a row
        lines = [json.dumps(row) + "\n" for row in rows[part::3]]
        (jsonl.parent / f"part{part}.jsonl").write_text("".join(lines))
    jsonl.unlink()
    options = {"val_fraction": 0.2, "prompt_key": "prompt" if "prompts" in request.param else None}
    if "stream" in request.param:
        data = HubData(name=str(jsonl.parent), shuffle_buffer=17, tokenizer_documents=60, **options)
    else:
        data = TextData(path=str(jsonl.parent), **options)
    return open_data(data, BytesTokenizer())


def same(one, two):
    return (
        torch.equal(one.inputs, two.inputs)
        and torch.equal(one.targets, two.targets)
        and one.position == two.position
    )


def test_shapes_and_shift(corpus):
    batches = corpus.batches(T, B, seed=0)
    for _ in range(5):
        batch = next(batches)
        assert batch.inputs.shape == batch.targets.shape == (B, T)
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        scored = batch.targets[:, :-1] != -100
        assert torch.equal(batch.targets[:, :-1][scored], batch.inputs[:, 1:][scored])
        assert batch.position
    assert scored.all() or corpus.data.prompt_key


def test_order_depends_on_the_seed_alone(corpus):
    one, two, other = (corpus.batches(T, B, seed=seed) for seed in (5, 5, -6))
    pairs = [(next(one), next(two), next(other)) for _ in range(40)]
    assert all(same(a, b) for a, b, _ in pairs)
    assert not any(same(a, c) for a, _, c in pairs)


def test_resumes_exactly_within_and_across_epochs(corpus):
    batches = corpus.batches(T, B, seed=1)
    states, made = [], []
    for _ in range(900):
        states.append(json.dumps(batches.state_dict()))
        made.append(next(batches))
    assert any("epoch 3" in batch.position for batch in made), (
        "the test must pass the ends of epochs"
    )
    assert max(map(len, states)) < 2000
    for start in (0, 1, 150, 301, 555, 870):
        resumed = corpus.batches(T, B, seed=1)
        next(resumed)
        resumed.load_state_dict(json.loads(states[start]))
        assert json.dumps(resumed.state_dict()) == states[start]
        assert all(same(next(resumed), made[step]) for step in range(start, min(start + 40, 900)))


def test_ranks_share_the_same_batch(corpus):
    whole = corpus.batches(T, B, seed=2)
    ranks = [corpus.batches(T, B, seed=2, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(30):
        batch, parts = next(whole), [next(rank) for rank in ranks]
        for rank, part in enumerate(parts):
            assert torch.equal(part.inputs, batch.inputs[rank::2]) and torch.equal(
                part.targets, batch.targets[rank::2]
            )
    with pytest.raises(UserError, match=r"train.batch_tokens=64 .*3 processes"):
        corpus.batches(T, B, seed=2, rank=0, world_size=3)


def test_no_held_out_document_is_trained_on(corpus, texts_of, rows):
    """No batch has 12 bytes in a row that only held-out documents contain."""
    key = corpus.data.prompt_key
    documents = {(row["prompt"] if key else "") + row["text"] for row in rows}
    held_out = set(texts_of(corpus.val, corpus.tokenizer))
    assert held_out and held_out < documents
    batches = corpus.batches(T, B, seed=0)
    stream = b"".join(
        corpus.tokenizer.decode(row).encode()
        for _ in range(300)
        for row in next(batches).inputs.tolist()
    )
    rest = "\n".join(documents - held_out)
    starts = [
        document[:12]
        for document in held_out
        if document[:12] not in rest and document[:12].isascii()
    ]
    assert starts and not [start for start in starts if start.encode() in stream]


def test_another_corpus_is_refused_on_resuming(corpus, jsonl):
    state = corpus.batches(T, B, seed=0).state_dict()
    file = jsonl.parent / "part0.jsonl"
    file.write_text(json.dumps({"prompt": "", "text": "something new"}) + "\n" + file.read_text())
    with pytest.raises(UserError, match="checkpoint"):
        open_data(corpus.data, BytesTokenizer()).batches(T, B, seed=0).load_state_dict(state)


def test_an_epoch_takes_every_window_once():
    tokens = TokenArray([np.arange(0, 70), np.arange(70, 103)])
    batches = WindowBatches(tokens, "", seq_len=10, batch_size=5, seed=0)
    orders = []
    for _ in range(20):
        rows = torch.cat([next(batches).inputs for _ in range(2)])  # 102 targets make 10 windows
        starts = rows[:, 0].tolist()
        assert torch.equal(rows, torch.tensor(starts)[:, None] + torch.arange(10))
        assert sorted(starts) == list(range(min(starts), min(starts) + 100, 10)), (
            "windows do not overlap"
        )
        orders.append(starts)
    assert {min(starts) for starts in orders} == {0, 1, 2}, (
        "the tokens left over differ between epochs"
    )
    assert len({tuple(start - min(starts) for start in starts) for starts in orders}) == 20


def test_batches_larger_than_an_epoch():
    batches = WindowBatches(TokenArray([np.arange(31)]), "", seq_len=10, batch_size=7, seed=0)
    windows = torch.cat([next(batches).inputs for _ in range(3)])[:, 0].tolist()
    assert all(sorted(windows[i : i + 3]) == [0, 10, 20] for i in range(0, 21, 3))


def test_text_shorter_than_a_sequence_is_refused(jsonl):
    corpus = open_data(TextData(path=str(jsonl)), BytesTokenizer())
    size = len(corpus.train)
    assert next(corpus.batches(size - 1, 1, seed=0)).inputs.shape == (1, size - 1)
    with pytest.raises(UserError, match=rf"train.seq_len={size} .*{size} tokens"):
        corpus.batches(size, 1, seed=0)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seq_len", [1, 7, 16, 10**4])
def test_val_batches_predict_every_token_once(corpus, seq_len, world_size):
    batch_size = 6
    ranks = [
        list(corpus.val_batches(seq_len, batch_size, rank, world_size))
        for rank in range(world_size)
    ]
    assert len({tuple(batch.inputs.shape for batch in batches) for batches in ranks}) == 1, (
        "processes keep step"
    )
    inputs, targets = [], []
    for step in range(len(ranks[0])):
        for row in range(len(ranks[0][step].inputs)):
            for batches in ranks:
                inputs.append(batches[step].inputs[row])
                targets.append(batches[step].targets[row])
    inputs, targets = torch.cat(inputs), torch.cat(targets)
    tokens, mask = corpus.val.read(0, len(corpus.val))
    expected = torch.from_numpy(tokens[1:].astype(np.int64))
    if mask is not None:
        expected[torch.from_numpy(mask[1:] == 0)] = -100
    assert (
        torch.equal(targets[: len(expected)], expected) and (targets[len(expected) :] == -100).all()
    )
    assert torch.equal(inputs[: len(expected)], torch.from_numpy(tokens[:-1].astype(np.int64)))
    assert int((targets != -100).sum()) == corpus.val.n_tokens
    assert int(inputs.min()) >= 0 and int(inputs.max()) < corpus.tokenizer.vocab_size


def test_held_out_text_is_the_same_for_every_seed(corpus):
    again = open_data(corpus.data, BytesTokenizer())
    next(again.batches(T, B, seed=7))
    assert all(
        same(one, two)
        for one, two in zip(corpus.val_batches(T, B), again.val_batches(T, B), strict=True)
    )


def test_an_unshuffled_stream_keeps_its_order(jsonl, rows, texts_of):
    corpus = open_data(
        HubData(name=str(jsonl.parent), shuffle_buffer=0, val_fraction=0.2), BytesTokenizer()
    )
    batches = corpus.batches(T, B, seed=0)
    tokens = np.concatenate([next(batches).inputs.flatten().numpy() for _ in range(40)])
    held_out = texts_of(corpus.val, corpus.tokenizer)
    expected = [
        token
        for row in rows
        if row["text"] not in held_out
        for token in [256, *corpus.tokenizer.encode(row["text"])]
    ]
    assert tokens.tolist() == expected[: len(tokens)]


def test_cu_seqlens():
    inputs = torch.tensor([[9, 1, 2, 9, 3], [4, 5, 9, 9, 6], [1, 1, 1, 1, 1]])
    before = inputs.clone()
    bounds = cu_seqlens(inputs, 9)
    assert bounds.tolist() == [0, 3, 5, 7, 8, 10, 15] and bounds.dtype == torch.int32
    assert torch.equal(inputs, before)
