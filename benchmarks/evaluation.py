"""1,000 short questions: evaluation as a run does it beside one question after the other with plain transformers.

usage: python benchmarks/evaluation.py [--model FOLDER] [--batch-size 32] [--questions 1000] [--busy] [--skewed]
    [--instruction 0]

Where no model is named, a Llama of width 64, 4 layers, vocabulary 512 and random weights stands for one. Questions are
made: 10 to 40 tokens, with --skewed one in ten has ten times as many, and all of them begin with so many words of
--instruction; the responses, greedy, have 16 tokens and do not end early, so that both sides do the same work.
Both sides begin with the same examples and end with scored records, and their responses are compared. On a busy
machine, --busy counts the CPU seconds of one thread instead of the clock's.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from holdfast.api.task import Example, Task, Turn
from holdfast.config.model import ModelConfig
from holdfast.data.encode import Encoder
from holdfast.evaluation.at_test import ModelEvaluation
from holdfast.evaluation.respond import evaluate_task
from holdfast.lab.tokenizer import train_tokenizer
from holdfast.models.pretrained import load_tokenizer
from holdfast.scoring.score import response_records, score_records

LENGTH = 16
TEXT = "red green blue sea weed tide holds rock which year was the capital of a town in its first and last"


class Endless(Encoder):
    """Nothing ends a response."""

    stop_ids: list[int] = []  # type: ignore[assignment]  # noqa: RUF012


def make_model(folder: Path | None) -> tuple[Any, Any]:
    """Model and tokenizer: those of a folder, or random ones."""
    if folder is not None:
        return LlamaForCausalLM.from_pretrained(folder), load_tokenizer(ModelConfig(name=str(folder)))
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT] * 50, 512)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config), tokenizer


def make_task(count: int, skewed: bool, instruction: int) -> Task:
    """Questions of four to sixteen words, some ten times as long, after an instruction of so many words."""
    chance = random.Random(0)
    begun = chance.choices(TEXT.split(), k=instruction)
    lengths = [chance.randint(4, 16) * (10 if skewed and row % 10 == 0 else 1) for row in range(count)]
    asked = [" ".join([*begun, *chance.choices(TEXT.split(), k=length)]) + "?" for length in lengths]
    rows = [Example("made", row, (Turn("user", text), Turn("assistant", "yes"))) for row, text in enumerate(asked)]
    return Task("made", "accuracy", rows[:1], rows)


def one_by_one(model: Any, encoder: Encoder, task: Task) -> list[dict[str, Any]]:
    """What people write: a loop of ``generate``."""
    greedy = GenerationConfig(max_new_tokens=LENGTH, do_sample=False, pad_token_id=encoder.tokenizer.pad_token_id)
    responses = []
    with torch.inference_mode():
        for example in task.test:
            ids = torch.tensor([encoder.prompt(example, reserve=LENGTH)])
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
            responses.append(encoder.decode(tokens[0, ids.shape[1] :].tolist()))
    return score_records(task, response_records(task, responses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--skewed", action="store_true")
    parser.add_argument("--instruction", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.busy:
        torch.set_num_threads(1)
    clock = time.process_time if arguments.busy else time.perf_counter
    model, tokenizer = make_model(arguments.model)
    model.eval().generation_config.eos_token_id = None
    model.config.eos_token_id = None
    encoder = Endless(tokenizer, max_length=1024, template="plain")
    evaluation = ModelEvaluation(model, encoder, arguments.batch_size)
    warm, task = (make_task(n, arguments.skewed, arguments.instruction) for n in (40, arguments.questions))
    evaluate_task(evaluation, warm, max_new_tokens=LENGTH)
    one_by_one(model, encoder, Task("warm", "accuracy", warm.train, warm.test[:5]))

    started = clock()
    batched = evaluate_task(evaluation, task, max_new_tokens=LENGTH)
    between = clock()
    single = one_by_one(model, encoder, task)
    ended = clock()
    same = sum(a["response"] == b["response"] for a, b in zip(batched, single, strict=True))
    print(f"{len(batched)} questions, batches of {arguments.batch_size}, {torch.get_num_threads()} threads")
    print(f"{same} responses are the same\n")
    print("| side | seconds | speed / one by one |\n|---|---|---|")
    print(f"| batched | {between - started:.2f} | {(ended - between) / (between - started):.1f} |")
    print(f"| one by one | {ended - between:.2f} | 1.0 |")


if __name__ == "__main__":
    main()
