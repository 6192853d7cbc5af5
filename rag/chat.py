"""A chat model for LangChain over a ``ModelHandle``, patched or not.

Every answer is made under the handle's read lock, so that none sees half-edited weights. The lock belongs to the thread that
generates, never to the one that reads a stream: who reads slowly or stops reading does not hold up an edit.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ChatMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field

from lab.errors import RequestError
from lab.handle import ModelHandle
from lab.tokens import encode_ids
from rag.decoding.contrast import position_limit, prompt_ids
from rag.prompts import prompts_for
from rag.streaming import Completion, Piece, Sampling, complete, pieces

_ROLES = {"human": "user", "ai": "assistant", "system": "system"}
_Key = tuple[str, Sampling]
# What a batch has generated in one pass, for the calls that report it one by one.
_READY: ContextVar[Mapping[_Key, Completion] | None] = ContextVar("knowlab_ready", default=None)


class KnowLabChat(BaseChatModel):
    """A ``ModelHandle`` as LangChain's chat model.

    The conversation is written in the model's own prompt format, through its chat template, or as a transcript; see
    ``rag.prompts``. ``batch`` generates all its inputs in padded forward passes. Tools are refused.

    Attributes:
        handle: The model; patches that are applied and undone meanwhile count from the next answer on.
        max_tokens: Longest answer.
        temperature: 0 takes the likeliest token.
        top_k: Sample among so many tokens; 0 for all.
        seed: Seeds the sampling.
        until: Strings that end every answer, beside those of the call.
        batch_size: Rows in one forward pass.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    handle: ModelHandle = Field(exclude=True)
    max_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    top_k: int = Field(default=0, ge=0)
    seed: int = 0
    until: tuple[str, ...] = ()
    batch_size: int = Field(default=16, ge=1)

    @property
    def _llm_type(self) -> str:
        return "knowlab"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        # A cache of answers keys on these: the same model with another patch is another one.
        return {
            "model": self.handle.name,
            "patches": [entry.patch.id for entry in self.handle.applied],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "seed": self.seed,
            "until": self.until,
        }

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids by the model's own tokenizer."""
        return list(encode_ids(self.handle.tokenizer, text))

    def prompt(self, messages: Sequence[BaseMessage]) -> str:
        """The text that the model continues.

        Raises:
            RequestError: There is no question, or a message of a kind that the model cannot be shown.
        """
        turns = []
        for message in messages:
            role = message.role if isinstance(message, ChatMessage) else _ROLES.get(_kind(message), "")
            if role not in _ROLES.values():
                raise RequestError(f"a local model cannot be shown a message of kind {_kind(message)!r}")
            turns.append((role, str(message.text)))
        if not any(role == "user" and text.strip() for role, text in turns):
            raise RequestError("the conversation holds no question of the user's")
        return prompts_for(self.handle).chat(turns)

    def _sampling(self, stop: Sequence[str] | None, settings: Mapping[str, Any]) -> Sampling:
        marks = (*prompts_for(self.handle).chat_stop, *self.until, *(stop or ()))
        return Sampling(
            max_new_tokens=settings.get("max_tokens", self.max_tokens),
            stop=tuple(dict.fromkeys(marks)),
            temperature=settings.get("temperature", self.temperature),
            top_k=settings.get("top_k", self.top_k),
            seed=settings.get("seed", self.seed),
        )

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        key = (self.prompt(messages), self._sampling(stop, kwargs))
        done = (_READY.get() or {}).get(key)
        if done is None:
            (done,) = complete(self.handle, [key[0]], key[1])
        message = AIMessage(done.text, usage_metadata=_usage(done), response_metadata=self._metadata(done))
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        prompt, sampling = self.prompt(messages), self._sampling(stop, kwargs)
        for piece in _from_thread(self.handle, prompt, sampling):
            done = piece.done
            message = (
                AIMessageChunk(content=piece.text)
                if done is None
                else AIMessageChunk(
                    content=piece.text,
                    usage_metadata=_usage(done),
                    response_metadata=self._metadata(done),
                    chunk_position="last",
                )
            )
            chunk = ChatGenerationChunk(message=message)
            if run_manager and piece.text:
                run_manager.on_llm_new_token(piece.text, chunk=chunk)
            yield chunk

    def _metadata(self, done: Completion) -> dict[str, Any]:
        return {"model_name": self.handle.name, "finish_reason": done.finish}

    # -- many at once ---------------------------------------------------------------------------------------------

    def batch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """See ``Runnable.batch``; generates in padded forward passes of ``batch_size`` rows."""
        with _ready(self._together(inputs, kwargs)):
            return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self,
        inputs: list[LanguageModelInput],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[AIMessage]:
        """See ``Runnable.abatch``; generates as ``batch`` does, in another thread."""
        found = await run_in_executor(None, self._together, inputs, kwargs)
        with _ready(found):
            return await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    def _together(
        self, inputs: Sequence[LanguageModelInput], kwargs: Mapping[str, Any]
    ) -> dict[_Key, Completion]:
        """Answers of all inputs that can be asked; the others fail in their own call, with its own error."""
        sampling = self._sampling(kwargs.get("stop"), kwargs)
        prompts: dict[str, None] = {}
        limit = position_limit(self.handle)
        for given in inputs:
            try:
                prompt = self.prompt(self._convert_input(given).to_messages())
            except (RequestError, ValueError):
                continue
            if len(prompt_ids(self.handle, [prompt])[0]) < limit:
                prompts[prompt] = None
        done = complete(self.handle, list(prompts), sampling, batch_size=self.batch_size)
        return {(prompt, sampling): completion for prompt, completion in zip(prompts, done, strict=True)}


def _kind(message: BaseMessage) -> str:
    return message.type.removesuffix("MessageChunk").lower()


def _usage(done: Completion) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=done.prompt_tokens,
        output_tokens=done.tokens,
        total_tokens=done.prompt_tokens + done.tokens,
    )


@contextmanager
def _ready(found: Mapping[_Key, Completion]) -> Iterator[None]:
    token = _READY.set(found)
    try:
        yield
    finally:
        _READY.reset(token)


def _from_thread(handle: ModelHandle, prompt: str, sampling: Sampling) -> Iterator[Piece]:
    """Pieces of one completion, made in a thread that holds the read lock; its exception is raised here."""
    box: queue.SimpleQueue[Piece | BaseException] = queue.SimpleQueue()
    unwanted = threading.Event()

    def work() -> None:
        try:
            with handle.reading(), torch.no_grad():
                for piece in pieces(handle, [prompt], sampling):
                    box.put(piece)
                    if unwanted.is_set():
                        return
        # Whatever it is, the reader of the stream must get it instead of waiting for ever.
        except BaseException as error:
            box.put(error)

    thread = threading.Thread(target=work, name="knowlab-stream", daemon=True)
    thread.start()
    try:
        while True:
            item = box.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if item.done is not None:
                return
    finally:
        unwanted.set()
