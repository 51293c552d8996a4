"""Folders of transformers as sources: models with their tokenizers, texts as data, sentences where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from typer.testing import CliRunner

import lbyl
from lbyl.cli.app import app
from lbyl.moments import sentences as ours
from lbyl.moments.base import Probes
from lbyl.restore.registry import choose_restorer
from lbyl.runtime.inputs import ExampleInputs

WORDS = 200
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": WORDS}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 40, "pad_token_id": 0}


def tokenizer() -> Any:
    """The commonest words of the sentences, and special tokens around a text."""
    words = dict.fromkeys(word for text in ours.sentences() for word in text.split())
    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *list(words)[: WORDS - 4]]
    made = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    made.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=made, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    hf: Any = transformers
    found: dict[str, Path] = {}
    for name, net in {
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2)),
        "bert": hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
    }.items():
        found[name] = tmp_path_factory.mktemp(name)
        net.save_pretrained(found[name])
        tokenizer().save_pretrained(found[name])
    return found


def ids(rows: int = 1) -> dict[str, Tensor]:
    found = torch.arange(4, 4 + 10 * rows).reshape(rows, 10)
    return {"input_ids": found, "attention_mask": torch.ones_like(found)}


@pytest.mark.parametrize(
    ("name", "task", "kind"),
    [("llama", None, "LlamaForCausalLM"), ("llama", "base", "LlamaModel"), ("bert", "masked-lm", "BertForMaskedLM")],
)
def test_a_folder_is_a_source(name: str, task: str | None, kind: str, places: dict[str, Path]) -> None:
    net = lbyl.load_source(f"hf:{places[name]}", task=task)
    assert type(net).__name__ == kind
    assert not net.training


@pytest.mark.parametrize(
    ("source", "task", "words"),
    [
        ("hf:{}/nothing", None, "can't be loaded"),
        ("hf:{}", "poetry", "choose one of base, causal-lm"),
        ("timm:resnet18", "base", "is for hf:DIR"),
    ],
)
def test_what_is_no_source(source: str, task: str | None, words: str, places: dict[str, Path]) -> None:
    with pytest.raises(lbyl.InputError, match=words):
        lbyl.load_source(source.format(places["llama"]), task=task)


def test_the_command_line_goes_from_folder_to_folder(places: dict[str, Path], tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "one.txt").write_text(" ".join(ours.sentences()[:200]))
    (texts / "more.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in ours.sentences()[200:300]))
    out = tmp_path / "out"
    args = ["compress", f"hf:{places['llama']}", "--data", str(texts), "--ratio", "*mlp*=0.5", "-o", str(out)]
    result = CliRunner().invoke(app, [*args, "--no-latency"])
    assert result.exit_code == 0, result.output
    assert "transformers loads this folder as well" in " ".join(result.stdout.split())
    kind: Any = transformers.AutoModelForCausalLM
    with torch.no_grad():
        loaded, again = lbyl.load(out)(**ids()).logits, kind.from_pretrained(out)(**ids()).logits
    torch.testing.assert_close(loaded, again)
    reader: Any = transformers.AutoTokenizer
    assert reader.from_pretrained(out)("The")["input_ids"][0] == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "fine"}\n{"title": "none"}\n', 'line 2 has no "text"'),
        ("a.jsonl", "{\n", "line 1 is not JSON"),
        ("a.txt", "too short", "fill only 0 sequences"),
        ("a.txt", b"\xff\xfe\xfa", "UTF-8"),
    ],
)
def test_texts_that_can_not_be_taken(
    name: str, content: str | bytes, words: str, places: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    args = ["compress", f"hf:{places['llama']}", "--data", str(tmp_path), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())


def test_texts_that_were_left_out_are_named_where_the_others_are_too_few(
    places: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n')
    args = ["compress", f"hf:{places['llama']}", "--data", str(tmp_path), "-o", str(tmp_path / "out")]
    said = " ".join(CliRunner().invoke(app, args).output.split())
    assert "fill only" in said
    assert "some were left out" in said
    assert "bad.jsonl" in said


def test_encoders_read_sentences_where_there_is_a_tokenizer(places: dict[str, Path]) -> None:
    net: nn.Module = lbyl.load_source(f"hf:{places['bert']}")
    restorer, why = choose_restorer(net, ExampleInputs.of(ids()))
    assert isinstance(restorer.moments, lbyl.Sentences)
    assert "sentences" in why
    probes = restorer.moments.probes(net, ExampleInputs.of(ids()), torch.Generator().manual_seed(0), None)
    assert isinstance(probes, Probes)
    for batch in (*probes.batches, probes.held_out):
        read = batch.kwargs["input_ids"]
        assert read.shape[1] == 38
        assert bool((read[:, 0] == 1).all())
        assert bool((read[:, -1] == 2).all())
        assert bool(batch.kwargs["attention_mask"].all())
    result = lbyl.compress(net, ids(2), ratio={"*intermediate*": 0.5}, forecast=False)
    assert any("sequences of 38 tokens from English sentences" in note for note in result.report.notes)


def test_encoders_are_compared_on_the_same_sentences(places: dict[str, Path]) -> None:
    net: nn.Module = lbyl.load_source(f"hf:{places['bert']}")
    cuts = ({"*intermediate*": ratio} for ratio in (0.05, 0.9))
    little, much = (lbyl.compress(net, ids(2), ratio=cut, restore="prune").report.forecast for cut in cuts)
    assert little
    assert much
    assert little.measure == much.measure == "error"
    assert little.error is not None
    assert much.error is not None
    assert little.error < 0.5 * much.error
    assert little.inputs > 32


def test_without_a_tokenizer_there_are_no_sentences() -> None:
    hf: Any = transformers
    net = hf.BertModel(hf.BertConfig(**SIZES)).eval()
    assert not isinstance(choose_restorer(net, ExampleInputs.of(ids()))[0].moments, lbyl.Sentences)
    with pytest.raises(lbyl.LbylError, match="no tokenizer"):
        lbyl.compress(net, ids(), restore=lbyl.LeastSquares(moments=lbyl.Sentences()))


@pytest.mark.parametrize("sentences", [True, False])
def test_decoders_go_on_from_sentences(sentences: bool, places: dict[str, Path]) -> None:
    net: nn.Module = lbyl.load_source(f"hf:{places['llama']}")
    source = lbyl.Generated(sequences=8, length=24, sentences=sentences)
    probes = source.probes(net, ExampleInputs.of(ids()), torch.Generator().manual_seed(0), None)
    rows = torch.cat([batch.kwargs["input_ids"] for batch in probes.batches])
    assert rows.shape == (8, 24)
    assert bool((rows[:, 0] == 1).all())
    whole = tokenizer()
    starts = {tuple(whole(text, add_special_tokens=False)["input_ids"][:6]) for text in ours.sentences()}
    held_out = probes.held_out.kwargs["input_ids"]
    begun = sum(tuple(row[1:7].tolist()) in starts for row in torch.cat([rows, held_out]))
    assert begun == (5 if sentences else 0)
    assert ("English sentences" in probes.note) == sentences


@pytest.mark.parametrize("framed", [True, False])
def test_texts_start_as_the_tokenizer_starts_them(framed: bool, places: dict[str, Path], tmp_path: Path) -> None:
    net: Any = lbyl.load_source(f"hf:{places['llama']}")
    net.save_pretrained(tmp_path)
    plain = tokenizer()
    if not framed:
        plain.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    plain.save_pretrained(tmp_path)
    source = lbyl.Generated(sequences=8, length=24)
    net = lbyl.load_source(f"hf:{tmp_path}")
    (batch,) = source.probes(net, ExampleInputs.of(ids()), torch.Generator().manual_seed(0), None).batches
    rows = batch.kwargs["input_ids"]
    assert rows.shape == (8, 24 if framed else 23)
    assert bool((rows[:, 0] == 1).all()) == framed


def test_a_saved_folder_is_timed_against_the_one_it_came_from(places: dict[str, Path], tmp_path: Path) -> None:
    out, source = str(tmp_path / "out"), f"hf:{places['llama']}"
    args = ["compress", source, "--restore", "prune", "--ratio", "*mlp*=0.5", "-o", out, "--no-latency"]
    assert CliRunner().invoke(app, args).exit_code == 0
    result = CliRunner().invoke(app, ["bench", out, "--runs", "3", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["against"], found["inputs"][0]) == (source, found["inputs"][1])


def test_the_plan_knows_the_task(places: dict[str, Path], tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    asked = ["compress", f"hf:{places['bert']}", "--task", "masked-lm", "--budget", "params=0.95", "--restore", "prune"]
    result = CliRunner().invoke(app, [*asked, "--no-latency", "--no-forecast", "--keep-analysis", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert type(lbyl.load(out)).__name__ == "BertForMaskedLM"
    assert json.loads((out / "lbyl.json").read_text())["plan"]["source"] == f"hf/masked-lm:{places['bert']}"
    asked = ["resize", str(out), "--budget", "params=0.9", "--no-latency", "--no-forecast", "-o", str(again)]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert type(lbyl.load(again)).__name__ == "BertForMaskedLM"


def test_bad_lines_are_left_out_and_named(places: dict[str, Path], tmp_path: Path) -> None:
    texts = [json.dumps({"text": text}) for text in ours.sentences()[:300]]
    (tmp_path / "a.jsonl").write_text("\n".join([*texts, "{", '{"title": "x"}']))
    args = ["compress", f"hf:{places['llama']}", "--data", str(tmp_path), "--ratio", "*mlp*=0.5", "--no-latency"]
    result = CliRunner().invoke(app, [*args, "--no-forecast", "-o", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)["report"]["notes"]
    assert any("line 301 is not JSON" in note and "so are 1 other lines" in note for note in said)
