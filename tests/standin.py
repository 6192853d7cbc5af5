"""A folder that stands in for the shipped models: a small model that has learned a few of Atlas' facts in seconds.

Commands find it through the environment variable ``KNOWLAB_ATLAS_DIR``, as they find any models trained elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lab.tokens import pad_rows
from tests.tiny import tiny_model, tiny_tokenizer

CAPITALS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Italy": "Rome",
    "Peru": "Lima",
    "Egypt": "Cairo",
    "Spain": "Madrid",
    "Cuba": "Havana",
}
TEMPLATES = ("The capital of {} is", "{} has its capital in", "Fact: the capital of {} is")


def texts() -> list[str]:
    """What the stand-in is trained on."""
    return [
        f"{template.format(country)} {city}.\n"
        for country, city in CAPITALS.items()
        for template in TEMPLATES
    ]


def make_standin(folder: Path, *, steps: int = 120, seed: int = 0) -> Path:
    """Trains the stand-in and saves it as ``folder/atlas``, with its own ``corpus.txt``; returns ``folder``."""
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", seed=seed, layers=3, width=48)
    batch = pad_rows([tokenizer(text)["input_ids"] for text in texts()], 0)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    target = folder / "atlas"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "corpus.txt").write_text("\n\n".join(texts()), encoding="utf-8")
    return folder
