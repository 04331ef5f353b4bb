"""Fine-tune once with a transformers Trainer that rehearses the model's own samples, and see what was forgotten.

usage: python examples/drop-in-trainer.py MODEL OUTPUT

for example: python examples/drop-in-trainer.py HuggingFaceTB/SmolLM2-135M-Instruct runs/drop-in
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, TrainingArguments

from holdfast import ContinualTrainer

name, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)


def encode(row):
    prompt = tokenizer(row["prompt"] + "\n", add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


trainer = ContinualTrainer(  # was: Trainer(
    model=model,
    args=TrainingArguments(output_dir=output, num_train_epochs=3, learning_rate=2e-5, logging_steps=1),
    train_dataset=load_dataset("csv", data_files="docs/tickets.csv", split="train").map(encode),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    method={"name": "kl_replay", "length": 64},  # new
)
trainer.train()
trainer.save_model(output)
print(trainer.forgetting_report())  # the loss on samples that were not rehearsed: a rise is what was forgotten
