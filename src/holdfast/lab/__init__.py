"""The lab: a tokenizer and a small pretrained model from texts, to study forgetting without any download."""
