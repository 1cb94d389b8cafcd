import json
import subprocess
import sys

import pytest
import tiktoken
from transformers import AutoTokenizer

from diffx.config import UserError
from diffx.config.data import BpeTokenizer, BytesTokenizer, HfTokenizer, TiktokenTokenizer
from diffx.data.tokenizers import TiktokenEncoding, load_tokenizer, make_tokenizer

TEXTS = [
    "",
    " ",
    "plain text\n\tdef f(x):\r\n",
    "naïve 東京 🙂 e\u0301 \u200b\x00",
    "a<|endoftext|>b",
    "the theme " * 30,
]


def encoding(special=("<|endoftext|>",)):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257}
    return tiktoken.Encoding(
        "tiny",
        pat_str=r"\w+|\W+",
        mergeable_ranks=ranks,
        special_tokens=dict.fromkeys(special, 258),
    )


KINDS = ["bpe", "bytes", "hf", "tiktoken"]


def make(kind, folder):
    if kind == "bytes":
        return make_tokenizer(BytesTokenizer(), ())
    if kind == "tiktoken":
        return TiktokenEncoding(encoding())
    bpe = make_tokenizer(BpeTokenizer(vocab_size=263), TEXTS)
    if kind == "bpe":
        return bpe
    bpe.save(folder / "source")
    return make_tokenizer(HfTokenizer(name=str(folder / "source")), ())


@pytest.fixture(params=KINDS)
def tokenizer(request, tmp_path):
    return make(request.param, tmp_path)


def test_round_trip(tokenizer):
    batch = tokenizer.encode_batch(TEXTS)
    assert batch == [tokenizer.encode(text) for text in TEXTS]
    assert [tokenizer.decode(ids) for ids in batch] == TEXTS
    assert all(0 <= token < tokenizer.vocab_size for ids in batch for token in ids)
    assert tokenizer.eot_id not in batch[4], (
        "an end of text that is spelt in a text is no end of text"
    )
    assert tokenizer.decode([tokenizer.eot_id]) == "<|endoftext|>"


def test_sizes(tokenizer):
    assert (
        tokenizer.vocab_size
        == {"bytes": 257, "bpe": 263, "hf": 263, "tiktoken": 259}[tokenizer.kind]
    )
    assert (tokenizer.kind == "bytes") == (len(tokenizer.encode("the theme 東")) == 13)


@pytest.mark.slow
def test_all_reload_in_another_process(tmp_path):
    expected = []
    for kind in KINDS:
        tokenizer = make(kind, tmp_path)
        tokenizer.save(tmp_path / kind)
        expected.append(
            [
                kind,
                tokenizer.fingerprint,
                tokenizer.eot_id,
                tokenizer.vocab_size,
                tokenizer.encode_batch(TEXTS),
            ]
        )
        assert not [
            path
            for path in (tmp_path / kind).rglob("*")
            if path.suffix not in (".json", ".tiktoken")
        ]
    script = (
        "import sys, json; from diffx.data import load_tokenizer; "
        "texts = json.loads(sys.argv.pop());"
        "found = map(load_tokenizer, sys.argv[1:]);"
        "print(json.dumps([[t.kind, t.fingerprint, t.eot_id, t.vocab_size, "
        "t.encode_batch(texts)] for t in found]))"
    )
    command = [
        sys.executable,
        "-c",
        script,
        *(str(tmp_path / kind) for kind in KINDS),
        json.dumps(TEXTS),
    ]
    assert (
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        == expected
    )


def test_transformers_reads_the_folder(tokenizer, tmp_path):
    if tokenizer.kind == "tiktoken":
        pytest.skip("tiktoken's vocabulary has no form in the tokenizers library")
    tokenizer.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.eos_token_id == tokenizer.eot_id and len(theirs) == tokenizer.vocab_size
    for text in TEXTS[:4]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


def test_a_saved_tokenizer_used_through_hf_is_the_same_one(tmp_path):
    bpe = make_tokenizer(BpeTokenizer(vocab_size=263), TEXTS)
    bpe.save(tmp_path / "saved")
    assert (
        make_tokenizer(HfTokenizer(name=str(tmp_path / "saved")), ()).fingerprint == bpe.fingerprint
    )


def test_bpe_is_deterministic_and_says_what_size_it_reached(caplog):
    one, two = (make_tokenizer(BpeTokenizer(vocab_size=100000), TEXTS) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert one.vocab_size < 400 and str(one.vocab_size) in caplog.text
    assert make_tokenizer(BpeTokenizer(vocab_size=260), TEXTS).fingerprint != one.fingerprint


def test_errors(tmp_path, monkeypatch):
    def fails(config, *words):
        with pytest.raises(UserError) as caught:
            make_tokenizer(config, ())
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), (
            caught.value
        )

    fails(HfTokenizer(name="some/model"), "some/model", "hub")
    fails(HfTokenizer(name=str(tmp_path)), str(tmp_path))
    fails(TiktokenTokenizer(name="cl100k"), "cl100k", "cl100k_base", "gpt2")
    make_tokenizer(BytesTokenizer(), ()).save(tmp_path / "headless")
    settings = tmp_path / "headless" / "tokenizer_config.json"
    settings.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    fails(HfTokenizer(name=str(tmp_path / "headless")), "eos_token")

    def unreachable(name):
        raise ConnectionError("Max retries exceeded\nwith url")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    fails(TiktokenTokenizer(), "cl100k_base", "network", "Max retries")
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding(special=("<|other|>",)))
    fails(TiktokenTokenizer(), "end-of-text")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    fails(TiktokenTokenizer(), "pip install 'diffx[tiktoken]'")


def test_a_damaged_folder_is_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="cannot be used as a tokenizer"):
        load_tokenizer(tmp_path / "nothing")
    tokenizer.save(tmp_path / "saved")
    file = (
        tmp_path
        / "saved"
        / ("ranks.tiktoken" if tokenizer.kind == "tiktoken" else "tokenizer.json")
    )
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="cannot be used as a tokenizer"):
        load_tokenizer(tmp_path / "saved")
