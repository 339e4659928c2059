"""The exported folder of a checkpoint, for other programs and people."""

import os
import stat

import pytest
import yaml
from conftest import make_model, run_here, small_run, write_jsonl
from test_chat import CHATML, chat, tokenizer_with
from transformers import pipeline

from preflab.training import model_card
from utils import TRAINING_CONFIG


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A checkpoint of a chat run with an adapter, made under a umask that lets the group read."""
    folder = tmp_path_factory.mktemp("export")
    tokenizer, model = tokenizer_with(CHATML), make_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    rows = [{"chosen": chat(f"q{i}", "yes"), "rejected": chat(f"q{i}", "no")} for i in range(24)]
    data = write_jsonl(folder / "rows.jsonl", rows)
    before = os.umask(0o027)
    try:
        run_here(
            *small_run(
                folder / "model", folder, folder / "run", f"datasets=[{data}]", "n_examples=16",
                "test_fraction=0.3", "model.lora.r=2", "loss=ipo",
            )
        )  # fmt: skip
    finally:
        os.umask(before)
    return folder / "run" / "LATEST"


def test_files_have_the_modes_of_the_umask(exported):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in exported.resolve().rglob("*")}
    assert {"model.safetensors", "config.json", "adapter_model.safetensors"} <= modes.keys()
    assert set(modes.values()) == {0o640, 0o750}


def test_a_pipeline_answers_a_conversation(exported):
    write = pipeline("text-generation", model=str(exported / "hf"))
    [answer] = write([chat("q1")], max_new_tokens=4, do_sample=False)
    assert [message["role"] for message in answer[0]["generated_text"]] == ["user", "assistant"]


def test_the_card_says_what_the_model_is(exported):
    card = (exported / "hf" / "README.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["library_name"] == "transformers" and "ipo" in head["tags"]
    assert "base_model" not in head  # a local folder is no name on a hub
    assert "**Base model**: model" in body and "**Data**: rows.jsonl" in body
    assert head["license"] == "apache-2.0" and "base model, apache-2.0" in body
    assert "https://arxiv.org/abs/2310.12036" in body and "accuracy on held-out pairs" in body
    config = yaml.safe_load((exported / "hf" / TRAINING_CONFIG).read_text(encoding="utf-8"))
    assert config["loss"]["name"] == "ipo" and config["lr"] == 1e-3
    root = str(exported.parent.parent)
    assert root not in card and root not in (exported / "hf" / TRAINING_CONFIG).read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    "card", [None, "no head", "---\n- license\n---\n", "---\n{\n---\n", "---\n---"]
)
def test_a_base_that_states_no_license_leaves_it_to_its_card(tmp_path, card):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert model_card._license(str(tmp_path)) is None
    assert "which its card states" in model_card._sentence_on_license(None)
