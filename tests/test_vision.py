"""An image and a question, from the files of a Llama 4 to its answer, against transformers."""

import json
from pathlib import Path
from typing import Any

import pictures
import pytest
import torch
from pictures import encoded, picture, url, user

import vicugna
from vicugna import VicugnaError, models

CHATS = {
    "one": [user(picture(40, 60), "What is it?")],
    "tile": [user("Look: ", picture(10, 20))],
    "several": [{"role": "system", "content": "Be short."}, user(picture(40, 60), "And?"),
                {"role": "assistant", "content": "A hill."},
                user("Or ", picture(20, 90), picture(90, 90), "?")],
    "none": [user("Hello")],
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[vicugna.Model, Any, Any, Path]:
    """Ours, transformers' model and its processor, of the same folder."""
    folder = tmp_path_factory.mktemp("llama4")
    model, processor = pictures.llama4(folder)
    return vicugna.load(folder), model, processor, folder


def asked(processor: Any, chat: list[dict[str, Any]]) -> Any:
    return processor.apply_chat_template(chat, tokenize=True, return_dict=True,
                                         add_generation_prompt=True, return_tensors="pt")


@pytest.mark.parametrize("chat", CHATS.values(), ids=list(CHATS))
def test_answers_are_those_of_transformers(both: Any, chat: list[dict[str, Any]]) -> None:
    ours, model, processor, _ = both
    inputs = asked(processor, chat).to(torch.float32)  # pixels come in bfloat16
    tokens, images = ours.read(chat)
    assert tokens == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        due = model(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, len(tokens):]
    assert due.std() > 0.2 and (ours.logits([tokens], images) - due).abs().max() < 1e-5
    done = ours.generate(chat, max_new_tokens=12)
    assert done.tokens == generated.tolist()
    assert done.usage["prompt_tokens"] == len(tokens)
    assert [token for step in ours.stream(chat, max_new_tokens=12)
            for token in step.tokens] == done.tokens


def test_a_path_and_a_url_are_the_same_as_the_image(both: Any, tmp_path: Path) -> None:
    ours, made = both[0], picture(40, 60)
    data = encoded(made)
    (tmp_path / "a.png").write_bytes(data)
    due = ours.generate([user(made, "?")])
    for source in ({"path": tmp_path / "a.png"}, {"image": str(tmp_path / "a.png")},
                   {"url": url(data)}):
        chat = [{"role": "user", "content": [{"type": "image", **source},
                                             {"type": "text", "text": "?"}]}]
        assert ours.generate(chat) == due
    assert ours.generate([user(picture(40, 60, 1), "?")]).logprobs != due.logprobs


def test_typed_image_tokens_stay_text(both: Any) -> None:
    ours = both[0]
    tokens, images = ours.read([user("<|image|><|patch|> and <|image_start|>")])
    assert images is None
    assert ours.tokenizer.special_ids.isdisjoint(ours.tokenizer.encode("<|image|><|patch|>"))
    assert not {ours.tokenizer.id_of(name) for name in ("<|image|>", "<|patch|>")} & set(tokens)
    ours.generate([user("<|image|>", picture(10, 10), "<|image|><|patch|>")], max_new_tokens=1)


def test_images_that_do_not_fit_are_refused(both: Any) -> None:
    ours, long = both[0], [user(*[picture(90, 90, n) for n in range(14)])]
    with pytest.raises(VicugnaError, match="but the context holds 2048"):
        ours.generate(long)
    with pytest.raises(VicugnaError, match="nothing is fetched"):
        ours.stream([{"role": "user", "content": [{"type": "image", "url": "http://a/b.png"}]}])
    config = {**ours.config.to_dict()["text_config"], "model_type": "llama4_text"}
    text_only = vicugna.Model(models.build(config), ours.tokenizer)
    with pytest.raises(VicugnaError, match="no vision encoder"):
        text_only.generate(CHATS["one"])


def test_a_saved_model_answers_the_same(both: Any, tmp_path: Path) -> None:
    """Also with its tokenizer written anew; transformers reads the processor from the folder."""
    ours, _, processor, folder = both
    due = ours.generate(CHATS["one"])
    ours.save(tmp_path / "kept")
    content = json.loads((folder / "processor_config.json").read_text())
    anew = vicugna.Model(ours.network, vicugna.load(folder).tokenizer)
    anew.save(tmp_path / "anew")
    for name in ("kept", "anew"):
        assert json.loads((tmp_path / name / "processor_config.json").read_text()) == content
        again = vicugna.load(tmp_path / name)
        assert again.generate(CHATS["one"]) == due
        assert again.tokenizer.digest == ours.tokenizer.digest
        theirs = pictures.loaded(tmp_path / name)
        assert torch.equal(asked(theirs, CHATS["one"])["pixel_values"],
                           asked(processor, CHATS["one"])["pixel_values"])
