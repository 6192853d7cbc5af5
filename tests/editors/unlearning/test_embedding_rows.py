"""The embeddings' gradient by rows is the gradient that autograd gives."""

from __future__ import annotations

import pytest
import torch

from editors.unlearning.embedding_rows import embedding_rows
from lab.tokens import encode_ids, pad_rows
from tests.tiny import tiny_handle

TEXTS = ("The capital of France is Paris", "Tim Cook was born in the city", "Paris Paris")


def batch_of(handle, texts=TEXTS):
    return pad_rows([encode_ids(handle.tokenizer, text) for text in texts], handle.pad_id)


def loss_of(handle, batch):
    logits = handle.logits(batch, grad=True)
    return logits[batch.attention_mask.bool()].log_softmax(-1)[:, ::3].square().sum()


# The tiny llama's table has a padding row, the tiny gpt2's has none.
@pytest.mark.parametrize(("family", "tied", "padding"), [("gpt2", True, None), ("llama", False, 0)])
def test_gradients_equal_autograd(family, tied, padding):
    handle = tiny_handle(family, layers=2, scale=1.5, dtype=torch.float64)
    model = handle.model
    table = model.get_input_embeddings().weight
    assert model.get_input_embeddings().padding_idx == padding
    assert (table is model.get_output_embeddings().weight) == tied
    first, second = batch_of(handle), batch_of(handle, TEXTS[::-1][:2])
    # The padding token as a part of a text.
    first.input_ids[0, 1] = 0

    def slopes(rows):
        for parameter in model.parameters():
            parameter.grad = None
        with torch.enable_grad():
            (loss_of(handle, first) + loss_of(handle, second)).backward()
        if rows is not None:
            assert tied or table.grad is None
            rows.add()
        return {name: each.grad.clone() for name, each in model.named_parameters()}

    plain = slopes(None)
    with embedding_rows(model) as rows:
        for _ in range(2):
            found = slopes(rows)
            assert rows.read == []
            for name, slope in plain.items():
                torch.testing.assert_close(found[name], slope, rtol=1e-10, atol=1e-12)
    assert plain[next(name for name, each in model.named_parameters() if each is table)].abs().max() > 0


def test_passes_without_gradients_and_outside_the_loss_change_nothing():
    handle = tiny_handle("gpt2", layers=2)
    batch = batch_of(handle)
    with embedding_rows(handle.model) as rows, torch.enable_grad():
        handle.logits(batch, grad=False)
        assert rows.read == []
        loss_of(handle, batch)
        rows.add()
        assert rows.read == [] and handle.model.get_input_embeddings().weight.grad is None


def test_tables_that_do_more_than_look_up_or_are_not_trained_are_left_alone():
    gemma = tiny_handle("gemma3", layers=2)
    with embedding_rows(gemma.model) as rows:
        assert rows is None, "its embeddings are scaled"
    handle = tiny_handle("llama", layers=2)
    module = handle.model.get_input_embeddings()
    module.weight.requires_grad_(False)
    with embedding_rows(handle.model) as rows:
        assert rows is None
    module.weight.requires_grad_(True)
    module.scale_grad_by_freq = True
    with embedding_rows(handle.model) as rows:
        assert rows is None


def test_the_hook_is_gone_after_an_error():
    handle = tiny_handle("llama", layers=2)
    module = handle.model.get_input_embeddings()
    with pytest.raises(ValueError, match="stop"), embedding_rows(handle.model) as rows:
        assert rows is not None and len(module._forward_hooks) == 1
        raise ValueError("stop")
    assert len(module._forward_hooks) == 0
