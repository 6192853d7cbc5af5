"""The chat model: one answer however it is asked for, and the lock that it takes."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
import torch
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate

from lab.errors import ConfigError, RequestError
from lab.handle import ModelHandle
from lab.patch import LowRank, Provenance, WeightPatch
from rag.chat import KnowLabChat
from rag.prompts import FormatPrompts, PlainPrompts
from rag.streaming import Sampling, _Line, complete
from tests.tiny import tiny_handle, tiny_tokenizer

QUESTIONS = ["Who?", "What is the capital of France?", "The mother tongue of Danielle Darrieux is what?"]


@pytest.fixture(scope="module")
def tiny() -> ModelHandle:
    return tiny_handle("llama", scale=3.0)


@pytest.fixture
def chat(tiny) -> KnowLabChat:
    return KnowLabChat(handle=tiny, max_tokens=12)


def test_every_way_of_asking_gives_the_same_answer(chat):
    alone = [chat.invoke(question) for question in QUESTIONS]
    texts = [message.content for message in alone]
    assert all(texts) and len(set(texts)) == 3
    assert [message.content for message in chat.batch(QUESTIONS)] == texts
    assert ["".join(str(chunk.content) for chunk in chat.stream(question)) for question in QUESTIONS] == texts

    async def all_async():
        invoked = [await chat.ainvoke(question) for question in QUESTIONS]
        batched = await chat.abatch(QUESTIONS)
        streamed = [
            "".join([str(chunk.content) async for chunk in chat.astream(question)]) for question in QUESTIONS
        ]
        return [[message.content for message in messages] for messages in (invoked, batched)] + [streamed]

    assert asyncio.run(all_async()) == [texts] * 3


def test_usage_is_that_of_the_model(chat, tiny):
    message = chat.invoke(QUESTIONS[1])
    prompt = chat.prompt([HumanMessage(QUESTIONS[1])])
    read = len(tiny_tokenizer()(prompt)["input_ids"])
    assert message.usage_metadata == {"input_tokens": read, "output_tokens": 12, "total_tokens": read + 12}
    assert message.response_metadata["finish_reason"] == "length"
    chunks = list(chat.stream(QUESTIONS[1]))
    assert len(chunks) > 3
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.usage_metadata == message.usage_metadata
    assert total.content == message.content
    assert chat.get_num_tokens(prompt) == read


def test_stop_strings_end_every_way_of_asking(chat):
    whole = str(chat.invoke(QUESTIONS[1]).content)
    mark = whole[4:6]
    wanted = whole[: whole.index(mark)]
    message = chat.invoke(QUESTIONS[1], stop=[mark])
    assert message.content == wanted
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.usage_metadata["output_tokens"] <= 12
    assert "".join(str(chunk.content) for chunk in chat.stream(QUESTIONS[1], stop=[mark])) == wanted
    assert chat.batch([QUESTIONS[1]], stop=[mark])[0].content == wanted
    assert chat.bind(stop=[mark]).invoke(QUESTIONS[1]).content == wanted
    with pytest.raises(ConfigError, match="empty"):
        chat.invoke("x", stop=[""])


def test_a_batch_is_one_padded_pass(chat, tiny, monkeypatch):
    rows = []
    forward = type(tiny.model).forward

    def counted(self, input_ids=None, **kwargs):
        rows.append(input_ids.shape[0])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(tiny.model), "forward", counted)
    chat.batch([*QUESTIONS, QUESTIONS[0]])
    assert set(rows) == {3} and len(rows) == 12


def test_a_batch_returns_each_error_where_asked(chat):
    inputs = ["fine", "word " * 400, [SystemMessage("no question")]]
    found = chat.batch(inputs, return_exceptions=True)
    assert isinstance(found[0], AIMessage)
    assert isinstance(found[1], RequestError) and "tokens" in str(found[1])
    assert isinstance(found[2], RequestError)
    with pytest.raises(RequestError):
        chat.batch(inputs)


def test_sampling_does_not_depend_on_neighbours(tiny):
    chat = KnowLabChat(handle=tiny, max_tokens=12, temperature=1.0, top_k=20, seed=4)
    alone = [chat.invoke(question).content for question in QUESTIONS]
    assert [message.content for message in chat.batch(QUESTIONS)] == alone
    assert chat.invoke(QUESTIONS[0]).content == alone[0]
    others = {str(chat.invoke(QUESTIONS[0], seed=seed).content) for seed in range(4)}
    assert len(others) > 1
    before = torch.get_rng_state()
    chat.invoke(QUESTIONS[0])
    assert torch.equal(before, torch.get_rng_state())


def test_no_answer_sees_half_edited_weights(chat, tiny):
    started, seen = threading.Event(), []

    def ask():
        started.set()
        seen.append(chat.invoke(QUESTIONS[0]).content)

    with tiny.writing():
        thread = threading.Thread(target=ask)
        thread.start()
        started.wait()
        time.sleep(0.05)
        assert not seen
    thread.join()
    assert seen


def test_a_stream_that_nobody_reads_on_holds_up_no_edit(chat, tiny):
    stream = chat.stream(QUESTIONS[0])
    next(stream)
    with tiny.writing():
        pass
    stream.close()
    with tiny.writing():
        pass


def test_errors_in_the_thread_reach_the_reader(chat):
    with pytest.raises(RequestError, match="tokens"):
        list(chat.stream("word " * 400))


def test_a_patch_changes_the_next_answer(chat, tiny):
    weight = tiny.named_weight("model.layers.1.mlp.down_proj.weight")
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(size, generator=generator) for size in ((32, 1), (1, weight.shape[1])))
    patch = WeightPatch(tiny.fingerprint, {weight.name: LowRank(left, right)}, Provenance("by hand"))
    plain, key = chat.invoke(QUESTIONS[1]).content, chat._get_llm_string()
    with patch.applied(tiny):
        assert chat.invoke(QUESTIONS[1]).content != plain
        assert chat._get_llm_string() != key
    assert chat.invoke(QUESTIONS[1]).content == plain


def test_in_a_chain_of_langchain(chat):
    prompt = ChatPromptTemplate.from_messages([("system", "Be {mood}."), ("human", "{question}")])
    chain = prompt | chat | StrOutputParser()
    asked = {"mood": "brief", "question": QUESTIONS[1]}
    text = chain.invoke(asked)
    assert text and "".join(chain.stream(asked)) == text
    assert chain.batch([asked, asked]) == [text, text]
    assert chat.prompt(prompt.invoke(asked).to_messages()) == f"Be brief.\nUser: {QUESTIONS[1]}\nAssistant:"


def test_messages_that_cannot_be_shown(chat):
    with pytest.raises(RequestError, match="no question"):
        chat.invoke([SystemMessage("x")])
    with pytest.raises(RequestError, match="'tool'"):
        chat.invoke([HumanMessage("x"), ToolMessage("y", tool_call_id="1")])


def test_prompts_of_a_conversation(tiny):
    from copy import copy

    from lab.atlas.forms import load_format

    turns = [("system", "Be brief."), ("user", "Who?"), ("assistant", "Me."), ("user", "When?")]
    tokenizer = copy(tiny_tokenizer())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}{{ raise_exception('order') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompts = PlainPrompts(tokenizer)
    assert prompts.chat(turns) == "<system>Be brief.<user>Who?<assistant>Me.<user>When?<assistant>"
    assert prompts.chat_stop == ()
    with pytest.raises(RequestError, match="order"):
        prompts.chat([("assistant", "x"), ("user", "y")])
    atlas = FormatPrompts(load_format())
    assert atlas.chat(turns[1:]) == atlas.closed("When?")
    assert atlas.chat(turns).endswith(atlas.closed("When?")) and "Be brief." in atlas.chat(turns)


def test_text_is_shown_only_when_it_is_sure(tiny):
    ids = tiny_tokenizer()("é stop!", add_special_tokens=False)["input_ids"]
    line, shown = _Line(tiny, 1, 50, ("stop?", "END")), []
    for token in ids:
        piece, done = line.add(token, False)
        shown.append(piece)
        assert done is None
        assert "\ufffd" not in piece
        assert "é stop!".startswith("".join(shown))
    piece, done = line.add(0, True)
    assert "".join([*shown, piece]) == done.text == "é stop!"
    assert (done.tokens, done.finish) == (len(ids) + 1, "stop")
    line = _Line(tiny, 1, 50, ("stop",))
    pieces = [line.add(token, False) for token in ids]
    first = next(index for index, (_, done) in enumerate(pieces) if done)
    assert "".join(piece for piece, _ in pieces[: first + 1]) == pieces[first][1].text == "é "


def test_settings_are_checked(tiny):
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}):
        with pytest.raises(ConfigError):
            Sampling(**wrong)
    assert complete(tiny, [], Sampling()) == []
